"""The main job, end to end, on any machine: three processes, one copy of a document's KV, and a ledger.

    process 1    `run`: publishes the document once and writes the .kv file
    process 2    attach.py, a fresh interpreter that never sees the document's text: loads and verifies the file, lets all
                 agents answer together over the one copy, then the compared ones again with the document's values zeroed
    process 3    scratch.py, which never imports kvkern: answers the compared questions from scratch with transformers alone

They run one after another, each with all threads. A request goes in as JSON on stdin, results come back as lines of JSON on
stdout. The demo's own model comes from demo_model.py.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvkern import console, errors, opening, qwen3
from kvkern.backends import choose
from kvkern.cost import render_bytes
from kvkern.demo_model import MODEL, default_cache_dir, demo_model
from kvkern.errors import CapacityError, KvkernError, RequestError, TemplateError
from kvkern.ledger import DemoResult
from kvkern.publish import Wording, publish

DOCUMENT = "gpl-3.txt"
DOCUMENT_TOKENS = 3774  # the length of the paper's document

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
# The package of this very file, whatever else is installed; -P keeps the user's folder from shadowing modules.
SERVE = [
    *(sys.executable, "-P", "-c"),
    "import sys; sys.path.insert(0, sys.argv[1]); from kvkern.attach import serve; serve()",
    str(HERE.parent),
]
SCRATCH = [sys.executable, str(HERE / "scratch.py")]

SHOWN = 3  # answers that are printed
PATIENCE_S = 5.0  # for a process that was told to end

Say = Callable[[console.Lines], None]


# -- process 1 ---------------------------------------------------------------------------------------------------------


def run(
    *,
    model: str | os.PathLike[str] | None = None,
    document: str | os.PathLike[str] | None = None,
    questions: str | os.PathLike[str] | None = None,
    agents: int = 256,
    new_tokens: int = 24,
    compared: int = 8,
    document_tokens: int | None = None,
    backend: str | None = None,
    device: str | None = None,
    json: bool = False,
    out_dir: str | os.PathLike[str] | None = None,
) -> DemoResult:
    """Publish a document, let many agents ask it over one copy of its KV, and compare with transformers from scratch.

    model            folder of a checkpoint, or its name on the hub; the demo's own if None
    document         text file in UTF-8; the GNU GPL 3 if None
    questions        file with a question a line, plain or {"question": ...}; those shipped, on the GPL, if None
    agents           each with one question: questions are cut to this number, or asked again from the first
    new_tokens       an answer has at most, greedy
    compared         agents, spread over the batch, whose answers are compared
    document_tokens  take the first so many tokens of the document; if None 3,774 of the GPL, and all of another document
    backend          "triton", "cpu" or "torch"; by default the device decides
    device           "cuda", "cuda:1", "cpu"; a GPU if there is one
    json             print one JSON object instead of text
    out_dir          folder that keeps the .kv file; a temporary one if None

    On CUDA the model has its checkpoint's dtype, on the CPU float32. Results go to stdout, progress to stderr.
    Raises RequestError, CapacityError, DeviceError or BackendError before anything is computed, naming the argument; any
    KvkernError of the other processes; KvkernError naming the process that ended otherwise. Then, and after Ctrl-C, no
    process and no half-written file is left.
    """
    started = time.perf_counter()
    say: Say = (lambda lines: None) if json else (lambda lines: console.say(console.table(lines, width=8)))
    for name, count in (("agents", agents), ("new_tokens", new_tokens), ("compared", compared)):
        _at_least_one(name, count)
    if document is None and document_tokens is None:
        document_tokens = DOCUMENT_TOKENS
    if document_tokens is not None:
        _at_least_one("document_tokens", document_tokens)
    where = opening.device_of(device)
    choose(backend, where)
    asked = opening.read_questions(DATA / "questions.jsonl" if questions is None else Path(questions))
    text = opening.read_document(DATA / DOCUMENT if document is None else Path(document))
    name, source = _model_source(model)

    picked = _spread(agents, min(compared, agents))
    dtype = opening.dtype_for(where)
    common: dict[str, Any] = {"dtype": dtype, "device": str(where), "threads": torch.get_num_threads()}
    with contextlib.ExitStack() as stack:
        if out_dir is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvkern-demo-")))
        else:
            work = _work_folder(Path(out_dir))
        kv = work / f"{Path(document or DOCUMENT).stem}.kv"
        mine = [asked[i % len(asked)] for i in range(agents)]
        made = _publish(_Job(source.name, dtype, where, text, document_tokens, mine, new_tokens, kv))
        _say_published(say, kv, made, kept=out_dir is not None)

        # What the model was opened from lies beside its config now, so the others need no network.
        common["model"] = source.folder()
        served = _ask(
            {
                **common,
                "kv": str(kv),
                "backend": backend,
                "questions": made.questions,
                "new_tokens": new_tokens,
                "compared": picked,
            }
        )
        _say_served(say, served, made.questions, len(asked), picked)
        prompts = [made.prompts[i] for i in picked]
        scratch = _from_scratch({**common, "max_new_tokens": new_tokens, "prompts": prompts})

    result = _result(made, served, scratch, picked, model=name, device=where, started=started)
    say(result.lines())
    if json:
        console.say(result.to_json())
    return result


def _result(
    made: _Made,
    served: Mapping[str, Any],
    scratch: Mapping[str, Any],
    picked: Sequence[int],
    *,
    model: str,
    device: torch.device,
    started: float,
) -> DemoResult:
    """What the three processes found, put together. Raises TemplateError where they were not asked the same."""
    answers, agents = served["answers"], len(made.questions)
    for i, peer in zip(picked, scratch["answers"], strict=True):
        prompt_tokens = made.prefix_tokens + answers[i]["prompt_tokens"]
        if peer["prompt_tokens"] != prompt_tokens:
            raise TemplateError(
                "chat_template",
                found=f"{prompt_tokens} tokens of document and question {i} by reuse",
                needed=f"{peer['prompt_tokens']}, as transformers makes of the conversation",
                do="publish with chat=False, or use a template in which a question does not change the document",
            )
    truth = [peer["token_ids"] for peer in scratch["answers"]]
    answer_tokens = sum(len(answer["token_ids"]) for answer in answers)
    scratch_seconds = sum(peer["seconds"] for peer in scratch["answers"])
    scratch_each, reuse_each = scratch_seconds / len(picked), served["ask_seconds"] / agents
    once = made.prefill_seconds + made.save_seconds + served["load_seconds"] + served["engine_seconds"]
    told = ("running_together", "suffix_kv_bytes", "peak_memory_bytes", "load_seconds", "engine_seconds", "ask_seconds")
    return DemoResult(
        **{name: served[name] for name in (*told, "backend", "rounding", "dtype")},
        agents=agents,
        questions=len(set(made.questions)),
        document_tokens=made.document_tokens,
        prefix_tokens=made.prefix_tokens,
        new_tokens=made.new_tokens,
        answer_tokens=answer_tokens,
        token_exact=_share_equal([answers[i]["token_ids"] for i in picked], truth),
        compared_agents=len(picked),
        compared_tokens=sum(map(len, truth)),
        control_tokens_equal=_share_equal(served["control"], truth),
        kv_bytes=made.kv_bytes,
        kv_bytes_expanded=made.prefix_tokens * made.token_bytes * agents,
        file_bytes=made.file_bytes,
        prefill_seconds=made.prefill_seconds,
        save_seconds=made.save_seconds,
        tokens_per_second=answer_tokens / served["ask_seconds"],
        scratch_seconds=scratch_seconds,
        scratch_seconds_per_agent=scratch_each,
        reuse_seconds_per_agent=reuse_each,
        ratio=scratch_each / reuse_each,
        once_seconds=once,
        ratio_with_once=scratch_each / (reuse_each + once / agents),
        seconds=time.perf_counter() - started,
        model=model,
        device=str(device),
        machine=_machine(device),
        versions={"kvkern": importlib.metadata.version("kvkern"), **scratch["versions"]},
    )


class _Job(NamedTuple):
    """What process 1 is to publish. document_tokens None: the whole text."""

    source: str
    dtype: str
    device: torch.device
    text: str
    document_tokens: int | None
    questions: list[str]
    new_tokens: int
    kv: Path


class _Made(NamedTuple):
    """What process 1 leaves: numbers, and the questions as the two other processes are given them."""

    document_tokens: int
    prefix_tokens: int
    new_tokens: int
    chat: bool
    kv_bytes: int
    file_bytes: int
    token_bytes: int
    prefill_seconds: float
    save_seconds: float
    questions: list[str]
    prompts: list[Any]


def _publish(job: _Job) -> _Made:
    """Prefill the document once and write the .kv file; model and KV are freed before the next process starts."""
    with console.bar("load the model", in_logs=True):
        model, tokenizer = opening.open_model(job.source, job.dtype, job.device)
    text, tokens = _cut(tokenizer, job.text, job.document_tokens)
    chat = tokenizer.chat_template is not None
    # Without a template nothing would stand between the document and the question.
    questions = job.questions if chat else [f"\n\n{question}\n" for question in job.questions]
    wording = Wording(tokenizer, chat=chat)
    prefix, prompts = wording.document_ids(text), []
    for i, question in enumerate(questions):
        suffix = wording.question_ids(question, {})
        _fits(i, len(prefix), len(suffix), job.new_tokens, qwen3.max_positions(model))
        # The peer does its own templating; without a template the ids are given, since a text may be cut otherwise.
        talk = [{"role": "system", "content": text}, {"role": "user", "content": question}]
        prompts.append(talk if chat else prefix + suffix)

    started = time.perf_counter()
    prefilled = started
    with console.bar("prefill", "tokens", in_logs=True) as update:

        def progress(done: int, total: int) -> None:
            nonlocal prefilled
            prefilled = time.perf_counter()
            update(done, total, f"{done / (prefilled - started):,.0f} tokens/s")

        made = publish(model, tokenizer, text, chat=chat, progress=progress)
    with made, console.bar("write", "bytes", in_logs=True) as update:
        saving = time.perf_counter()
        made.save(job.kv, progress=update)
        done = time.perf_counter()
        numbers = _Made(
            document_tokens=tokens,
            prefix_tokens=made.tokens,
            new_tokens=job.new_tokens,
            chat=chat,
            kv_bytes=made.size_bytes,
            file_bytes=job.kv.stat().st_size,
            token_bytes=made.geometry.token_bytes(),
            prefill_seconds=prefilled - started,
            save_seconds=done - saving,
            questions=questions,
            prompts=prompts,
        )
    del model, made
    gc.collect()
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    return numbers


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run process 2. Its results: those it tells by name, "answers" and the "control" among them."""
    served: dict[str, Any] = {}
    with console.bars(in_logs=True) as bars, contextlib.closing(_process("second process", SERVE, request)) as lines:
        for line in lines:
            if "progress" in line:
                what, done, total, note = line["progress"]
                bars(what)(done, total, note)
            served.update(line)
    return served


def _from_scratch(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run process 3: {"answers": [...], "versions": {...}}."""
    answers: list[dict[str, Any]] = []
    closing: dict[str, Any] = {}
    count = len(request["prompts"])
    with (
        console.bar("from scratch", "answers", in_logs=True) as update,
        contextlib.closing(_process("third process", SCRATCH, request)) as lines,
    ):
        update(0, count, "loading")
        for line in lines:
            if line.get("done"):
                closing = line
            else:
                answers.append(line)
                update(len(answers), count, f"{line['seconds']:.1f} s each")
    return {**closing, "answers": answers}


# -- processes ---------------------------------------------------------------------------------------------------------


def _process(what: str, command: Sequence[str], request: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
    """Start a process, give it a request, yield its lines. It is ended with this generator, however that ends.

    Raises the KvkernError that the process told, or one that says how it ended and the last line it left on stderr.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, encoding="utf-8", errors="replace"
        )
        try:
            assert child.stdin is not None and child.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended already; its exit status says why
                child.stdin.write(json.dumps(request))
                child.stdin.close()
            for line in child.stdout:
                if not line.startswith("{"):
                    continue  # a library's remark
                told = json.loads(line)
                if "error" in told:
                    kind, field, words = told["error"]
                    raise getattr(errors, kind)(field, **words)
                yield told
            if child.wait() != 0:
                log.seek(0)
                last = next((line.strip() for line in reversed(log.readlines()) if line.strip()), "nothing on stderr")
                raise KvkernError(
                    what,
                    found=f"killed by signal {-child.returncode}"
                    if child.returncode < 0
                    else f"exit status {child.returncode}: {last}",
                    needed="a process that ends with status 0",
                    do="give the machine more free memory, or ask with fewer --agents"
                    if child.returncode < 0
                    else "try another --model or --device; if that changes nothing, report it with this line",
                )
        finally:
            _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


# -- what is given -----------------------------------------------------------------------------------------------------


def _at_least_one(name: str, count: int) -> None:
    if count < 1:
        raise RequestError(
            name, found=count, needed="at least 1", do=f"give a larger number of {name.replace('_', ' ')}"
        )


def _model_source(model: str | os.PathLike[str] | None) -> tuple[str, opening.Source]:
    """(name to print, what to open); a name that the hub does not know is refused here."""
    if model is None:
        if not (default_cache_dir() / MODEL).is_dir():
            console.note(f"{MODEL}: converted once, about a minute, to {default_cache_dir()}")
        return MODEL, opening.source_of(str(demo_model()))
    source = opening.source_of(os.fspath(model))
    source.folder()
    return os.fspath(model), source


def _work_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            "out_dir", found=f"{path}: {error.strerror or error}", needed="a folder to write to", do="name another"
        ) from None
    return path


def _cut(tokenizer: Any, text: str, document_tokens: int | None) -> tuple[str, int]:
    """The text up to where its first so many tokens end, and how many these are; None: the whole of it."""
    ends = [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
    if document_tokens is None or document_tokens == len(ends):
        return text, len(ends)
    if document_tokens > len(ends):
        raise RequestError(
            "document_tokens",
            found=document_tokens,
            needed=f"at most the document's {len(ends):,} tokens",
            do="ask for fewer, or name a longer document",
        )
    return text[: ends[document_tokens - 1]], document_tokens


def _fits(i: int, prefix: int, suffix: int, new_tokens: int, positions: int) -> None:
    """Raises CapacityError where document, question and answer have no place in the model."""
    if prefix + suffix + new_tokens <= positions:
        return
    # A document that leaves no room for an answer is at fault itself.
    field, shorter = (
        ("document", "name a part of the document")
        if prefix + new_tokens >= positions
        else (f"questions[{i}]", "shorten the question")
    )
    raise CapacityError(
        field,
        found=f"a document of {prefix:,} tokens, a question of {suffix:,} and {new_tokens:,} new ones",
        needed=f"at most the model's {positions:,} positions together",
        do=f"{shorter}, or use a model with more positions",
    )


def _spread(agents: int, count: int) -> list[int]:
    """Indices of so many agents, the first and the last among them."""
    return [round(i * (agents - 1) / max(1, count - 1)) for i in range(count)]


def _share_equal(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of tokens that are the same at the same place; where one answer is longer, its rest is different."""
    same = sum(a == b for own, other in zip(ours, theirs, strict=True) for a, b in zip(own, other, strict=False))
    return same / sum(max(len(own), len(other)) for own, other in zip(ours, theirs, strict=True))


def _machine(device: torch.device) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    machine = {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return machine


# -- what is said ------------------------------------------------------------------------------------------------------


def _say_published(say: Say, kv: Path, made: _Made, *, kept: bool) -> None:
    template = f", {made.prefix_tokens:,} with the chat template" if made.chat else ""
    say(
        [
            ("publish", f"{kv if kept else kv.name}  {render_bytes(made.file_bytes)}"),
            ("", f"{made.document_tokens:,} tokens of the document{template}"),
            ("", f"prefill {made.prefill_seconds:.2f} s, written in {made.save_seconds:.2f} s"),
        ]
    )


def _say_served(
    say: Say, served: Mapping[str, Any], questions: Sequence[str], distinct: int, picked: Sequence[int]
) -> None:
    agents, answers, seconds = len(questions), served["answers"], served["ask_seconds"]
    again = f"; the {distinct} questions repeat" if agents > distinct else ""
    together = f"{served['running_together']} running together"
    tokens = sum(len(answer["token_ids"]) for answer in answers)
    lines = [
        ("attach", "by a second process, which has never seen the text"),
        ("", f"loaded in {served['load_seconds']:.2f} s: identity and {served['digests']:,} digests verified"),
        ("ask", f"{agents} agents with {min(agents, distinct)} questions, {together}{again}"),
        ("", f"{tokens:,} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s"),
    ]
    for i in sorted({picked[n] for n in _spread(len(picked), min(SHOWN, len(picked)))}):
        lines.append(("", f"{i + 1:>4}  {' '.join(questions[i].split())}"))
        lines.append(("", f"      {' '.join(answers[i]['text'].split())}"))
    say(lines)
