"""Whether answers over a document's KV are those from scratch: many questions, several ways to the same KV, and KV that is not it.

    python bench/exactness.py [--questions 1000] [--long-questions 16] [--full] [--tokens 32] [--seconds 450] [--here | --out FOLDER]

Greedy answers to questions about documents of 255 and 3,774 tokens, of the real model in fp32 (--model, --dtype), by these ways:

    batch 256, batch 1    an engine of so many agents, over the document that it published
    file                  `kvkern ask` in a process of its own, over the document's .kv file

and, to show what is lost, over KV that was rounded once, an engine of 256: int8 with a scale for each layer's K and V (per tensor)
or for each of their channels, fp8 e4m3 with a scale per tensor.

From scratch is transformers' own attention over document, question and the tokens of the answer in one forward: where each of
these tokens is the largest logit, greedy decoding from scratch gives this answer. At the first that is not, the tokens after it
are compared with nothing, and the gap between the two largest logits is kept: rounding alone can turn a gap near zero. What a
forward has said of a document, a question and the tokens so far is not asked again for another way.

Over the shortest document, for a reader who means other tokens than the publisher: whether kvkern refuses and by which error, and
what it would cost if it did not, answers over the KV as it stands beside those from scratch of what the reader means.

    order         another system prompt stands before the document
    template      the reader's tokenizer has another chat template
    tokenizer     it cuts text otherwise; questions are in its tokens, the KV is of the publisher's
    unchanged     the control: a tokenizer made again of the same parts, not refused, all tokens equal

logits, in each of three dtypes: the largest difference between kvkern's and transformers' over all tokens of answers, and the
distance of both from fp64 at the first. RoPE's frequencies are fp32 in all of them, norms are fp64 in fp64.

Of 1,000 questions the first 64 are judged first, then all else is measured, then the others. No part begins and no answer is
judged after --seconds; after each part the file is written. What a run leaves, and one that is stopped, the next takes up: answers
and verdicts stand in exactness.begun until all is done, at most half a minute old. 2 cores need about 20 minutes for all of it.

Fields of exactness.json, a result per document and way: shape (part, P, way, model, dtype, new), asked (questions of the part),
questions (judged so far), answer_tokens (of their answers), tokens (of these compared), equal, first_tokens_other (answers whose
first token is another), flips (question, token, got, wanted, gap), seconds; of order, template, tokenizer and unchanged also
refused, and if so refused_by, error, field and message; published_tokens and meant_tokens of the document, and other_tokens, those
of the meant that are not among the published, in order. Of logits: questions, tokens, tokens_equal, difference, mean_difference,
and by name max_error, mean_error, first_tokens_equal (to fp64). --full: --questions over the longer documents too, however long.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bench_engine
import torch
from from_scratch import Begun, Scratch, attention, compared
from harness import Bench, shown
from readers import CHANGED, REVISIONS, TEMPLATES, meant, readers_tokenizer, refusal, token_counts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import kvkern
from kvkern import demo, opening
from kvkern.demo_model import demo_model
from kvkern.publish import Document

FRAMES = (
    "{}",
    "In one sentence: {}",
    "{} Answer briefly.",
    "According to the text, {}",
)
"""Each question of the package's file in so many words, until there are enough."""

SHORT = 1024
"""Documents of more tokens are asked --long-questions."""
WAVE = 256
"""Questions that an engine is given at once, and agents of "batch 256"."""
FIRST = 64
"""Questions over a short document that are judged before all else."""
MOST = {"batch 1": 8, "file": 32, "rounded": 32, "logits": 8, **dict.fromkeys(CHANGED, 12)}
"""Questions of a way or a part at most; those that are not here have all."""
LOGITS = ("float32", "bfloat16", "float16")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=None, help="a folder of a model; by default the demo's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--documents", type=int, nargs="+", default=[255, 3774], help="lengths in tokens")
    parser.add_argument(
        "--questions", type=int, default=None, help=f"over the documents of up to {SHORT:,} tokens: 1,000; --tiny: 24"
    )
    parser.add_argument("--long-questions", type=int, default=16, help="over longer ones")
    parser.add_argument("--full", action="store_true", help="--questions over the longer ones too")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument(
        "--seconds",
        type=float,
        default=None,
        help="no part begins and no answer is judged after these: 450; --full: no end",
    )
    parser.add_argument("--tiny", action="store_true", help="a small random model: to see that all of it runs")


# -- documents and questions -------------------------------------------------------------------------------------------


TURNS = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def small_tokenizer(vocab_size: int) -> Any:
    """Bytes, and the merges that the demo's document asks for first."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([opening.read_document(demo.DATA / demo.DOCUMENT)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[2], pad_token=special[0])
    tokenizer.chat_template = TURNS
    return tokenizer


class Subject:
    """A model with its tokenizer, documents and questions."""

    def __init__(self, bench: Bench) -> None:
        chosen = bench.options
        self.tiny, self.name = chosen.tiny, chosen.model or str(demo_model()) if not chosen.tiny else "tiny"
        if chosen.tiny:
            self.model = bench_engine.random_model(bench_engine.SMALL, bench.device)
            self.tokenizer = small_tokenizer(self.model.config.vocab_size)
        else:
            self.model, self.tokenizer = opening.open_model(self.name, chosen.dtype, bench.device)

    def text(self, tokens: int) -> str:
        """The beginning of the demo's document, so many tokens without a template."""
        return demo._cut(self.tokenizer, opening.read_document(demo.DATA / demo.DOCUMENT), tokens)[0]

    def document(self, tokens: int) -> Document:
        return kvkern.publish(self.model, self.tokenizer, self.text(tokens))

    def questions(self, count: int) -> list[str]:
        asked = opening.read_questions(demo.DATA / "questions.jsonl")
        framed = [frame.format(question) for frame in FRAMES for question in asked]
        if count > len(framed):
            raise SystemExit(f"--questions: found {count}, needed at most {len(framed)}\n  do: ask fewer")
        return framed[:count]


# -- answers, and what is true -----------------------------------------------------------------------------------------


def answers(
    subject: Subject, document: Document, suffixes: Sequence[Sequence[int]], *, agents: int, tokens: int
) -> list[list[int]]:
    engine = kvkern.Engine(subject.model, subject.tokenizer, max_agents=agents)
    asked = engine.ask(document, suffixes, ordered=True, max_new_tokens=tokens, do_sample=False)
    found = []
    for answer in asked:
        if answer.error is not None:
            raise answer.error
        found.append(list(answer.token_ids))
    return found


def answers_of_a_process(
    subject: Subject, document: Document, questions: Sequence[str], chosen: argparse.Namespace
) -> list[list[int]]:
    """Of `kvkern ask` over the document's file."""
    with tempfile.TemporaryDirectory() as folder:
        kv, asked, said = (Path(folder) / name for name in ("document.kv", "questions.jsonl", "answers.jsonl"))
        document.save(kv)
        asked.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions), encoding="utf-8")
        command = [sys.executable, "-c", "import sys; from kvkern.cli import main; sys.exit(main())", "ask", str(kv)]
        command += ["--questions", str(asked), "--output", str(said), "--max-new-tokens", str(chosen.tokens)]
        command += ["--model", subject.name, "--dtype", chosen.dtype, "--ordered"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in said.read_text(encoding="utf-8").splitlines()]
    return [list(line["token_ids"]) for line in lines]


# -- KV that is not the document's -------------------------------------------------------------------------------------


def int8(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Rounded to 255 steps up to the largest magnitude over `dims`, and back."""
    scale = x.abs().amax(dims, keepdim=True).clamp(min=1e-30) / 127
    return (x / scale).round().clamp(-127, 127) * scale


def fp8(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    scale = x.abs().amax(dims, keepdim=True).clamp(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8 per tensor": lambda x: int8(x, (-3, -2, -1)),
    "int8 per channel": lambda x: int8(x, (-2,)),
    "fp8 e4m3 per tensor": lambda x: fp8(x, (-3, -2, -1)),
}
"""Of K or V [layers, 2, kv heads, tokens, head_dim]: a scale for each layer's K and V, or for each head's dimension too."""


def altered(document: Document, form: Callable[[Tensor], Tensor]) -> Document:
    """The same tokens and identity, other KV."""
    other = Document(document.geometry, document.token_ids, device=document.device)
    for name in Document.__annotations__:
        setattr(other, name, getattr(document, name))
    kept = slice(0, document.tokens)
    other.block()[:, :, :, kept] = form(document.block()[:, :, :, kept].float()).to(document.geometry.dtype)
    other.publish(identity=document.identity, provenance={**document.provenance, "kv": "rounded"})
    return other


# -- logits in each dtype ----------------------------------------------------------------------------------------------


def of_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The same weights, rounded; RoPE's frequencies stay as they are; in fp64 norms are computed in it too."""
    other = copy.deepcopy(model).to(dtype)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(owner), leaf, buffer.clone())
    for module in other.modules():
        # transformers computes them in fp32, whatever is given.
        if dtype == torch.float64 and hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(norm, module)
    return other


def norm(module: Any, x: Tensor) -> Tensor:
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))


@torch.no_grad()
def from_scratch(model: Any, ids: Sequence[int], keep: int) -> Tensor:
    """[keep, vocab_size] of the last `keep` tokens, by transformers' own attention."""
    with attention(model, "sdpa"):
        whole = torch.tensor([list(ids)], device=model.device)
        return model(whole, logits_to_keep=keep, use_cache=False).logits[0].double().cpu()


class Exact:
    """[texts, vocab_size] in fp64 of the token after each text, from scratch; each is computed once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, texts: Sequence[Sequence[int]]) -> Tensor:
        missing = [tuple(ids) for ids in texts if tuple(ids) not in self.rows]
        if missing:
            wide = of_dtype(self.model, torch.float64)
            self.rows |= {ids: from_scratch(wide, ids, 1)[0] for ids in missing}
        return torch.stack([self.rows[tuple(ids)] for ids in texts])


def logits(
    subject: Subject, exact: Exact, tokens: int, questions: Sequence[str], new: int, dtype: str
) -> dict[str, Any]:
    """kvkern's logits over an answer beside transformers' from scratch, and both beside fp64's at its first token."""
    narrow = of_dtype(subject.model, getattr(torch, dtype))
    with kvkern.publish(narrow, subject.tokenizer, subject.text(tokens)) as document:
        asked: dict[str, Any] = document.encode(questions)
        ids = document.path_token_ids().tolist()
        suffixes = document.encode_ids(questions)
        out = kvkern.generate(
            narrow,
            document,
            **asked,
            max_new_tokens=new,
            min_new_tokens=new,  # an answer that ended would have no logits
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    said = out.sequences[:, -new:].tolist()
    ours = [torch.stack([step[row].double().cpu() for step in out.logits]) for row in range(len(said))]
    wholes = [[*ids, *suffix, *answer[:-1]] for suffix, answer in zip(suffixes, said, strict=True)]
    theirs = [from_scratch(narrow, whole, new) for whole in wholes]
    del narrow, out
    right = exact([[*ids, *suffix] for suffix in suffixes])
    apart = torch.stack([(a - b).abs() for a, b in zip(ours, theirs, strict=True)])
    equal = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(ours, theirs, strict=True))
    found: dict[str, Any] = {
        "questions": len(said),
        "tokens": len(said) * new,
        "tokens_equal": equal,
        "difference": apart.max().item(),
        "mean_difference": apart.mean().item(),
        "max_error": {},
        "mean_error": {},
        "first_tokens_equal": {},
    }
    for how, rows in (("kvkern", ours), ("sdpa", theirs)):
        first = torch.stack([row[0] for row in rows])
        error = (first - right).abs()
        found["max_error"][how], found["mean_error"][how] = error.max().item(), error.mean().item()
        found["first_tokens_equal"][how] = int((first.argmax(-1) == right.argmax(-1)).sum())
    return found


# -- all of it ---------------------------------------------------------------------------------------------------------


def line(shape: dict[str, Any], found: dict[str, Any]) -> str:
    head = f"exact    {shown(shape)} | "
    if shape["part"] == "logits":
        errors = " | ".join(
            f"{how} max {found['max_error'][how]:.3g} mean {found['mean_error'][how]:.3g}" for how in found["max_error"]
        )
        return (
            f"{head}{found['questions']} questions, {found['tokens_equal']} of {found['tokens']} tokens equal, largest "
            f"difference {found['difference']:.3g} | from fp64: {errors} | {found['seconds']:.1f} s"
        )
    asked = f"{found['questions']} of {found['asked']}" if found["questions"] < found["asked"] else found["questions"]
    gaps = f", largest gap {max(flip['gap'] for flip in found['flips']):.3g}" if found["flips"] else ""
    refused = ""
    if shape["part"] in CHANGED:
        refused = f"{found['error']}: {found['message']} | " if found["refused"] else "not refused | "
    return (
        f"{head}{refused}{found['equal']} of {found['tokens']} tokens of {asked} questions equal, "
        f"{len(found['flips'])} flips{gaps} | {found['seconds']:.1f} s"
    )


def parts(bench: Bench) -> list[tuple[dict[str, Any], int | None]]:
    """What is to be measured, what matters most first; with it how many questions of a part are judged for now, None for all."""
    chosen, model = bench.options, "tiny" if bench.options.tiny else Path(bench.options.model or demo_model()).name
    lengths, least = sorted(chosen.documents), min(chosen.documents)

    def shape(part: str, tokens: int, way: str) -> dict[str, Any]:
        return {"part": part, "P": tokens, "way": way, "model": model, "dtype": chosen.dtype, "new": chosen.tokens}

    def others(tokens: int) -> Iterator[dict[str, Any]]:
        if not chosen.tiny:  # it is in no file
            yield shape("tokens", tokens, "file")
        yield from (shape("rounded", tokens, form) for form in FORMS)

    found: list[tuple[dict[str, Any], int | None]] = [
        (shape("tokens", P, "batch 256"), FIRST) for P in lengths if P <= SHORT
    ]
    found.append((shape("unchanged", least, "the same tokenizer"), None))
    found.append((shape("order", least, "after another system prompt"), None))
    found += [(shape("template", least, way), None) for way in TEMPLATES]
    found += [(shape("tokenizer", least, way), None) for way in REVISIONS]
    found += [(shape("logits", least, dtype), None) for dtype in LOGITS]
    found += [(each, None) for P in lengths if P <= SHORT for each in others(P)]
    for P in lengths:
        if P > SHORT:
            found.append((shape("tokens", P, "batch 256"), chosen.long_questions))
            found += [(each, None) for each in others(P)]
    # A step of one row has little work for two threads: beside other processes it takes several times as long.
    found += [(shape("tokens", P, "batch 1"), None) for P in lengths]
    return [*found, *((shape("tokens", P, "batch 256"), None) for P in lengths)]


def count(chosen: argparse.Namespace, shape: dict[str, Any]) -> int:
    """Questions of a part."""
    most: int = chosen.questions if shape["P"] <= SHORT or chosen.full else chosen.long_questions
    return min(most, MOST.get(shape["way"], MOST.get(shape["part"], most)))


class Run:
    """One call of the script."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.chosen, self.began = bench, bench.options, time.monotonic()
        self.begun, self.subject = Begun(bench), Subject(bench)
        self.exact = Exact(self.subject.model)
        self.document: Document | None = None
        self.held = 0
        """Tokens that the document was asked for."""
        name = f"{parts(bench)[0][0]['model']} {self.chosen.dtype}"
        self.scratch = Scratch(self.subject.model, name, self.begun)

    def late(self) -> bool:
        return time.monotonic() - self.began > self.chosen.seconds

    def can(self, shape: dict[str, Any]) -> bool:
        """A model without a chat template has no other one either."""
        return shape["part"] != "template" or bool(self.subject.tokenizer.chat_template)

    def published(self, tokens: int) -> Document:
        if self.document is None or self.held != tokens:
            if self.document is not None:
                self.document.release()
            self.document, self.held = self.subject.document(tokens), tokens
        return self.document

    def answers(self, document: Document, shape: dict[str, Any], questions: list[str], suffixes: Any) -> Any:
        if shape["way"] == "file":
            return answers_of_a_process(self.subject, document, questions, self.chosen)
        agents = 1 if shape["way"] == "batch 1" else WAVE
        return answers(self.subject, document, suffixes, agents=agents, tokens=self.chosen.tokens)

    def judged(
        self, asked: Document, wanted: Document, shape: dict[str, Any], suffixes: list[list[int]], limit: int
    ) -> dict[str, Any]:
        """Answers over `asked` beside those from scratch of `wanted`, wave by wave."""
        questions = self.subject.questions(len(suffixes))
        found = self.begun.answers.setdefault(shown(shape), [])
        while True:
            if len(found) < limit:
                wave = slice(len(found), len(found) + WAVE)
                found += self.answers(asked, shape, questions[wave], suffixes[wave])
                self.begun.save()
            known = min(limit, len(found))
            result = compared(self.scratch, wanted, suffixes[:known], found[:known], self.late)
            if result["questions"] == limit or self.late():
                return result

    def measure(self, shape: dict[str, Any], limit: int) -> dict[str, Any]:
        part, way, asked = shape["part"], shape["way"], count(self.chosen, shape)
        questions = self.subject.questions(asked)
        if part == "logits":
            return {"asked": asked} | logits(self.subject, self.exact, shape["P"], questions, self.chosen.tokens, way)
        document = self.published(shape["P"])
        if part == "rounded":
            with altered(document, FORMS[way]) as rounded:
                result = self.judged(rounded, document, shape, document.encode_ids(questions), limit)
        elif part in CHANGED:
            tokenizer = readers_tokenizer(self.subject.tokenizer, part, way)
            with meant(self.subject.model, tokenizer, self.subject.text(shape["P"]), part) as wanted:
                result = self.judged(document, wanted, shape, wanted.encode_ids(questions), limit)
                result |= refusal(self.subject.model, document, part, tokenizer) | token_counts(document, wanted)
        else:
            result = self.judged(document, document, shape, document.encode_ids(questions), limit)
        return {"asked": asked, **result}


def held(bench: Bench, shape: dict[str, Any]) -> dict[str, Any] | None:
    return next((result for result in bench.results if result["shape"] == shape), None)


def left(bench: Bench) -> list[tuple[dict[str, Any], int]]:
    """Parts of which questions are to be judged, and how many of them for now."""
    found = []
    for shape, for_now in parts(bench):
        limit = min(count(bench.options, shape), for_now or sys.maxsize)
        result = held(bench, shape)
        if result is None or result["questions"] < limit:
            found.append((shape, limit))
    return found


def main() -> None:
    bench = Bench.start("exactness", __doc__, extra=options)
    chosen = bench.options
    if chosen.questions is None:
        chosen.questions = 24 if chosen.tiny else 1000
    if chosen.seconds is None:
        chosen.seconds = math.inf if chosen.full else 450.0
    bench.resume()
    torch.manual_seed(0)
    if not left(bench):
        return
    run = Run(bench)
    todo = [(shape, limit) for shape, limit in left(bench) if run.can(shape)]
    try:
        for n, (shape, limit) in enumerate(todo):
            before = held(bench, shape)
            if before is not None and before["questions"] >= limit:  # the time was over, and another pass has done it
                continue
            if run.late():
                names = " ".join(f"{each['part']}/{each['P']}/{each['way']}" for each, _ in todo[n:])
                print(
                    f"exact    {run.chosen.seconds:g} s are over; run again for {len(todo) - n} parts: {names}",
                    flush=True,
                )
                break
            began = time.perf_counter()
            found = run.measure(shape, limit)
            found["seconds"] = time.perf_counter() - began + (before["seconds"] if before else 0.0)
            bench.results = [result for result in bench.results if result["shape"] != shape]
            bench.keep(shape, found)
            bench.save()
            print(line(shape, found), flush=True)
    finally:
        if any(run.can(shape) for shape, _ in left(bench)):
            run.begun.save()
        else:
            run.begun.end()


if __name__ == "__main__":
    main()
