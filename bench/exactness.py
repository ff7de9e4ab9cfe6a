"""Whether answers over a document's KV are those from scratch: many questions, several ways to the same KV, and KV that is not it.

    python bench/exactness.py [--questions 1000] [--long-questions 16] [--full] [--tokens 32] [--seconds 900] [--here | --out FOLDER]

Greedy answers to questions about documents of 255 and 3,774 tokens, of the real model in fp32 (--model, --dtype), by these ways:

    batch 256, batch 1    an engine of so many agents, over the document that it published
    file                  `kvkern ask` in a process of its own, over the document's .kv file

and, to show what is lost, over KV that was rounded once, an engine of 256: int8 with a scale for each layer's K and V (per tensor)
or for each of their channels, fp8 e4m3 with a scale per tensor.

From scratch is transformers' own attention over document, question and the tokens of the answer in one forward: where each of
these tokens is the largest logit, greedy decoding from scratch gives this answer. At the first that is not, the tokens after it
are compared with nothing, and the gap between the two largest logits is kept: rounding alone can turn a gap near zero.

order: what it would cost to take the document's KV where another system prompt stands before it (kvkern refuses: its tokens are
others): the answers over the document beside those from scratch with that prompt.

bf16: logits of the first token of an answer, kvkern's and transformers' in bf16, each by its distance from those in fp64.

Fields of exactness.json, a result per document and way: shape (part, P, way), questions, tokens (compared), equal, flips (question,
token, got, wanted, gap), seconds; of the part "logits": max_error and mean_error by name, over all questions and the vocabulary.
After each the file is written; what it holds is skipped. --full: all questions over the long document too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bench_engine
import torch
from harness import Bench, shown
from torch import Tensor

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

FEW = {"batch 256": None, "batch 1": 32, "file": 64}
"""Questions of each way at most; None: all."""
ROUNDED = 32
"""Questions over rounded KV, in another order, and over logits."""
PROMPT = "You are a patient lawyer who answers in plain words, and never in more of them than needed.\n\n"
"""A system prompt that the document's KV knows nothing of."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=None, help="a folder of a model; by default the demo's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--documents", type=int, nargs="+", default=[255, 3774], help="lengths in tokens")
    parser.add_argument("--questions", type=int, default=1000, help="over the documents of up to 1,024 tokens")
    parser.add_argument("--long-questions", type=int, default=16, help="over longer ones")
    parser.add_argument("--full", action="store_true", help="--questions over the longer ones too")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--seconds", type=float, default=900.0, help="no part begins after these")
    parser.add_argument("--tiny", action="store_true", help="a small random model: to see that all of it runs")


# -- documents and questions -------------------------------------------------------------------------------------------


class Subject:
    """A model, with documents of token ids and questions of token ids about them."""

    def __init__(self, bench: Bench) -> None:
        chosen = bench.options
        self.tiny, self.name = chosen.tiny, chosen.model or str(demo_model()) if not chosen.tiny else "tiny"
        if chosen.tiny:
            self.model = bench_engine.random_model(bench_engine.SMALL, bench.device)
            self.tokenizer = bench_engine.words(self.model.config.vocab_size)
            return
        self.model, self.tokenizer = opening.open_model(self.name, chosen.dtype, bench.device)

    def document(self, tokens: int, prompt: str = "") -> Document:
        """prompt: what stands before the document; of the tiny model's so many tokens."""
        if self.tiny:
            # The same at every call.
            size, drawn = self.model.config.vocab_size, torch.Generator().manual_seed(tokens)
            before = torch.arange(len(prompt)) % size
            ids = torch.cat([before, torch.randint(size, (tokens,), generator=drawn)])
            return kvkern.publish(self.model, None, ids)
        text, _ = demo._cut(self.tokenizer, opening.read_document(demo.DATA / demo.DOCUMENT), tokens)
        return kvkern.publish(self.model, self.tokenizer, prompt + text)

    def questions(self, count: int) -> list[Any]:
        """Texts, or of the tiny model token ids."""
        if self.tiny:
            return [bench_engine.draw(5 + n % 7, self.model.config.vocab_size) for n in range(count)]
        asked = opening.read_questions(demo.DATA / "questions.jsonl")
        framed = [frame.format(question) for frame in FRAMES for question in asked]
        if count > len(framed):
            raise SystemExit(f"--questions: found {count}, needed at most {len(framed)}\n  do: ask fewer")
        return framed[:count]

    def suffixes(self, document: Document, questions: Sequence[Any]) -> list[list[int]]:
        return [list(q) for q in questions] if self.tiny else document.encode_ids(questions)


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation("kvkern")


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


@torch.no_grad()
def compared(
    model: Any, document: Document, suffixes: Sequence[Sequence[int]], found: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Every token of every answer beside the largest logit from scratch, up to an answer's first that is another."""
    ids, tokens, equal, flips = document.path_token_ids().tolist(), 0, 0, []
    with attention(model, "sdpa"):
        for n, (suffix, answer) in enumerate(zip(suffixes, found, strict=True)):
            whole = torch.tensor([[*ids, *suffix, *answer[:-1]]], device=model.device)
            logits = model(whole, logits_to_keep=len(answer)).logits[0].float()
            wanted = logits.argmax(-1).tolist()
            first = next((i for i, (a, b) in enumerate(zip(answer, wanted, strict=True)) if a != b), len(answer))
            tokens, equal = tokens + min(first + 1, len(answer)), equal + first
            if first < len(answer):
                top = logits[first].topk(2).values
                flip = {"question": n, "token": first, "got": answer[first], "wanted": wanted[first]}
                flips.append({**flip, "gap": (top[0] - top[1]).item()})
    return {"questions": len(found), "tokens": tokens, "equal": equal, "flips": flips}


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


# -- logits in 16 bits -------------------------------------------------------------------------------------------------


@torch.no_grad()
def first_logits(model: Any, document: Document, suffixes: Sequence[Sequence[int]], how: str) -> Tensor:
    """[questions, vocab_size] in fp64; how: "kvkern", or transformers' attention by its name, from scratch."""
    ids, rows = document.path_token_ids().tolist(), []
    for suffix in suffixes:
        if how == "kvkern":
            given = torch.tensor([list(suffix)], device=model.device)
            out = kvkern.generate(
                model,
                document,
                given,
                max_new_tokens=1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            rows.append(out.logits[0][0].double().cpu())
        else:
            with attention(model, how):
                whole = torch.tensor([[*ids, *suffix]], device=model.device)
                rows.append(model(whole, logits_to_keep=1).logits[0, -1].double().cpu())
    return torch.stack(rows)


def logits(subject: Subject, bench: Bench, tokens: int, questions: Sequence[Any]) -> dict[str, Any]:
    """kvkern and transformers in bf16 by their distance from fp64."""
    document = subject.document(tokens)
    suffixes = subject.suffixes(document, questions)
    wide = first_logits(subject.model.double(), document, suffixes, "sdpa")
    subject.model.to(torch.bfloat16)
    document.release()
    document = subject.document(tokens)
    found = {how: first_logits(subject.model, document, suffixes, how) for how in ("kvkern", "sdpa")}
    document.release()
    errors = {how: (of - wide).abs() for how, of in found.items()}
    return {
        "questions": len(questions),
        "max_error": {how: error.max().item() for how, error in errors.items()},
        "mean_error": {how: error.mean().item() for how, error in errors.items()},
        "first_tokens_equal": {how: int((of.argmax(-1) == wide.argmax(-1)).sum()) for how, of in found.items()},
    }


# -- all of it ---------------------------------------------------------------------------------------------------------


def line(shape: dict[str, Any], found: dict[str, Any]) -> str:
    if shape["part"] == "logits":
        parts = [
            f"{how} max {found['max_error'][how]:.3g} mean {found['mean_error'][how]:.3g}" for how in found["max_error"]
        ]
        return f"exact    {shown(shape)} | {found['questions']} questions | {' | '.join(parts)}"
    gaps = f", largest gap {max(flip['gap'] for flip in found['flips']):.3g}" if found["flips"] else ""
    return (
        f"exact    {shown(shape)} | {found['equal']} of {found['tokens']} tokens of {found['questions']} questions equal, "
        f"{len(found['flips'])} flips{gaps} | {found['seconds']:.1f} s"
    )


def parts(bench: Bench) -> list[dict[str, Any]]:
    """What is to be measured, what matters most first."""
    chosen, model = bench.options, "tiny" if bench.options.tiny else Path(bench.options.model or demo_model()).name
    ways = [way for way in FEW if not (chosen.tiny and way == "file")]
    of = {"model": model, "dtype": chosen.dtype, "new": chosen.tokens}
    found = [{"part": "tokens", "P": P, "way": way, **of} for way in ways[:1] for P in chosen.documents]
    found += [{"part": "tokens", "P": P, "way": way, **of} for P in chosen.documents for way in ways[1:]]
    found += [{"part": "rounded", "P": P, "way": form, **of} for P in chosen.documents for form in FORMS]
    found += [{"part": "order", "P": P, "way": "after another system prompt", **of} for P in chosen.documents]
    return [*found, {"part": "logits", "P": min(chosen.documents), "way": "bfloat16", **of}]


def count(chosen: argparse.Namespace, shape: dict[str, Any]) -> int:
    most = chosen.questions if shape["P"] <= 1024 or chosen.full else chosen.long_questions
    limit = FEW[shape["way"]] if shape["part"] == "tokens" else ROUNDED
    return most if limit is None else min(most, limit)


def measure(bench: Bench, subject: Subject, document: Document, shape: dict[str, Any]) -> dict[str, Any]:
    chosen, began = bench.options, time.perf_counter()
    questions = subject.questions(count(chosen, shape))
    suffixes = subject.suffixes(document, questions)
    asked = document
    if shape["part"] == "rounded":
        asked = altered(document, FORMS[shape["way"]])
    if shape["way"] == "file":
        found = answers_of_a_process(subject, document, questions, chosen)
    else:
        agents = 1 if shape["way"] == "batch 1" else 256
        found = answers(subject, asked, suffixes, agents=agents, tokens=chosen.tokens)
    if asked is not document:
        asked.release()
    if shape["part"] == "order":
        with subject.document(shape["P"], PROMPT) as second:
            return compared(subject.model, second, suffixes, found) | {"seconds": time.perf_counter() - began}
    return compared(subject.model, document, suffixes, found) | {"seconds": time.perf_counter() - began}


def main() -> None:
    bench, began = Bench.start("exactness", __doc__, extra=options), time.monotonic()
    bench.resume()
    torch.manual_seed(0)
    left = [shape for shape in parts(bench) if not bench.has(shape)]
    subject = Subject(bench) if left else None
    document: Document | None = None
    for shape in left:
        if time.monotonic() - began > bench.options.seconds:
            print(
                f"exact    {len(left) - left.index(shape)} parts not begun: {bench.options.seconds:g} s are over",
                flush=True,
            )
            break
        assert subject is not None
        if shape["part"] == "logits":  # last, for it leaves the model in bf16
            if document is not None:
                document.release()
            found = logits(subject, bench, shape["P"], subject.questions(min(ROUNDED, bench.options.questions)))
        else:
            if document is None or document.tokens < shape["P"] or document.tokens > shape["P"] + 64:
                if document is not None:
                    document.release()
                document = subject.document(shape["P"])
            found = measure(bench, subject, document, shape)
        bench.keep(shape, found)
        print(line(shape, found), flush=True)
        bench.save()


if __name__ == "__main__":
    main()
