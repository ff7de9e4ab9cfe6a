"""The command line: publish, inspect, verify, ask, fit, demo, env.

    $ kvkern inspect handbook.kv
    handbook.kv  3,774 tokens  36 layers  8 kv heads of 128  bfloat16  530.7 MiB
    model        Qwen/Qwen3-4B  weights 9c1f..e07a  made by kvkern 0.1.0

Results go to stdout, progress and warnings to stderr. With --json the result is one JSON object with the same fields (of
`ask`: one object a line, an answer each), and so is a refusal: {"error": {type, field, found, needed, do}}, beside its text
on stderr. A usage error is text on stderr alone.

Exit codes: 0 done; 1 refused, with the error; 2 wrong usage; 130 after Ctrl-C; 141 where the reader of stdout has gone.

torch and transformers are imported by the commands that need them, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, ParamSpec, TextIO

import typer

from kvkern.errors import CapacityError, DeviceError, KvkernError, RequestError, StoreError, UnsupportedError

if TYPE_CHECKING:
    import torch

    from kvkern.engine import Answer, Engine
    from kvkern.geometry import Geometry
    from kvkern.store import Header

app = typer.Typer(
    help="One document, one KV copy, thousands of agents: attention over a shared, read-only prefix.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

INTERRUPTED, READER_GONE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as a shell has it

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
P = ParamSpec("P")

# Options that several commands share.
Json = Annotated[bool, typer.Option("--json", help="Print JSON with the same fields.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Folder or name of the model; by default the one that made FILE.")
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option("--dtype", help="Of the weights; auto: the checkpoint's. By default float32 on a CPU, auto on a GPU."),
]
FileDtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="Of the weights; auto: the checkpoint's. By default that of FILE.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:N; by default a GPU where there is one.")
]
BackendOption = Annotated[
    str | None, typer.Option("--backend", help="Which arithmetic; by default the device decides.")
]


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `args` are those of the process if None."""
    code: Any = 0
    try:
        app(None if args is None else list(args), prog_name="kvkern")
    except SystemExit as ended:
        code = ended.code
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _reader_gone()
    return int(code or 0)


def _command(run: Callable[P, None]) -> Callable[P, None]:
    """The one place where an error ends: a refusal becomes text, JSON and exit code 1. A bug keeps its traceback."""

    @functools.wraps(run)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            try:
                run(*args, **kwargs)
            except KvkernError as error:
                _note(_render_error(error))
                if kwargs["as_json"]:
                    with contextlib.suppress(StoreError):  # stdout itself is what fails
                        _say(json.dumps({"error": _error_fields(error)}))
                raise typer.Exit(1) from None
            except KeyboardInterrupt:
                _note("interrupted")
                raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(_reader_gone()) from None

    return guarded


def _reader_gone() -> int:
    """Nothing more can be said on stdout, and Python must not try when it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return READER_GONE


# -- commands ----------------------------------------------------------------------------------------------------------


@app.command()
@_command
def publish(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or name of a causal language model of transformers.")
    ],
    document: Annotated[str, typer.Argument(metavar="DOCUMENT", help="Text file in UTF-8; - for standard input.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The .kv file to write.")],
    plain: Annotated[
        bool, typer.Option("--plain", help="Take the text as it is, not as the system message of the chat template.")
    ] = False,
    template_kwarg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Keyword of the chat template; the value is JSON, or else a text."),
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens prefilled at once.")] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: Json = False,
) -> None:
    """Read DOCUMENT once with MODEL, and write its KV as a .kv file."""
    template_kwargs = _template_kwargs(template_kwarg or [])
    text = _read_document(document)
    _check_output(output)

    from kvkern import store
    from kvkern.publish import CHUNK
    from kvkern.publish import publish as prefill

    with _opened(model, dtype, _device(device)) as (live, tokenizer):
        times = [time.perf_counter()]
        with _progress("prefill", "tokens") as progress:

            def done(tokens: int, total: int) -> None:
                progress(tokens, total)
                if tokens == total:
                    times.append(time.perf_counter())

            made = prefill(
                live,
                tokenizer,
                text,
                chat=False if plain else None,
                chunk=CHUNK if chunk is None else chunk,
                progress=done,
                **template_kwargs,
            )
        times.append(time.perf_counter())
        with made as kv, _progress("save", "bytes") as progress:
            kv.save(output, progress=progress)
        times.append(time.perf_counter())
    header = store.inspect(output)
    read, hashed, saved = (end - begin for begin, end in pairwise(times))
    seconds = {"prefill_seconds": read, "hash_seconds": hashed, "save_seconds": saved}
    result = {**_header_fields(header), **{name: round(value, 3) for name, value in seconds.items()}}
    speed = f"{read:.1f} s ({header.tokens / read:,.0f} tokens/s)"
    took = ("took", f"prefill {speed}  weights hashed {hashed:.1f} s  saved {saved:.1f} s")
    _result(result, [*_header_lines(header), took], as_json)


@app.command()
@_command
def inspect(file: Annotated[Path, typer.Argument(metavar="FILE", help="A .kv file.")], as_json: Json = False) -> None:
    """Say what a .kv file holds and what it was made with, by its header alone."""
    from kvkern import store

    header = store.inspect(file)
    _result(_header_fields(header), _header_lines(header), as_json)


@app.command()
@_command
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .kv file.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Compare with this model too; by default digests only.")
    ] = None,
    dtype: FileDtypeOption = None,
    device: DeviceOption = None,
    as_json: Json = False,
) -> None:
    """Check every digest of a .kv file; with --model, also that this model would have made it."""
    from kvkern import store

    started = time.perf_counter()
    with _progress("verify", "bytes") as progress:
        header = store.verify(file, progress=progress)
    seconds = time.perf_counter() - started
    compared = "digests only, no model compared"
    if model is not None:
        from kvkern import identity

        # Weights are the same on every device, and this needs no room beside a running engine.
        with _opened(model, dtype or _file_dtype(header), _device(device or "cpu")) as (live, tokenizer):
            given = tokenizer if header.identity.tokenizer is not None else None
            identity.match(header.identity, live, given, where=file.name)
        compared = f"the identity is that of {model}"
    blocks = f"{len(header.kv)} blocks, {_bytes(header.size_bytes)} in {seconds:.1f} s"
    result = {
        **_header_fields(header),
        "verified": {"blocks": len(header.kv), "seconds": round(seconds, 3), "model": model},
    }
    _result(result, [*_header_lines(header), ("verified", f"{blocks}  {compared}")], as_json)


@app.command()
@_command
def ask(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .kv file.")],
    question: Annotated[list[str] | None, typer.Argument(metavar="QUESTION...", help="An agent each.")] = None,
    questions: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.jsonl", help='Questions, a line each: {"question": "..."} or plain; - for standard input.'
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the answers there, as JSON lines, not to stdout."),
    ] = None,
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 128,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens; so does --temperature, --top-k or --top-p. Greedy otherwise.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="Above 0; by default the model's own.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many tokens; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the tokens that reach this share.")] = None,
    seed: Annotated[int, typer.Option(help="Question i draws with seed + i.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text that ends an answer.")] = None,
    ordered: Annotated[bool, typer.Option("--ordered", help="Answers in the order of the questions.")] = False,
    memory: Annotated[str, typer.Option(help="For the suffixes of all agents: 2GiB, 512M.")] = "2GiB",
    agents: Annotated[int, typer.Option(help="Agents that run at once at most.")] = 256,
    backend: BackendOption = None,
    dtype: FileDtypeOption = None,
    device: DeviceOption = None,
    as_json: Json = False,
) -> None:
    """Ask questions about the document of a .kv file, all at once; each answer is printed as it ends.

    A question that is refused is reported, and the others go on; the exit code is then 1.
    Ctrl-C keeps the answers that have ended; the exit code is then 130.
    """
    asked = _questions(question or [], questions)
    if output is not None:
        _check_output(output)

    from kvkern import store
    from kvkern.backends import choose
    from kvkern.sampling import SamplingParams

    sample = sample or any(value is not None for value in (temperature, top_k, top_p))
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop_strings": stop or None}
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        **{name: value for name, value in given.items() if value is not None},
    }
    # What can be refused at once is refused before gigabytes are read.
    SamplingParams(seed=seed, **options)
    if agents < 1:
        raise RequestError("agents", found=agents, needed="at least 1", do="give more --agents")
    header = store.inspect(file)
    memory_bytes = _check_room(header.identity.geometry, memory, max_new_tokens)
    place = _device(device)
    choose(backend, place)
    name = model if model is not None else _model_of(header)

    with _opened(name, dtype or _file_dtype(header), place) as (live, tokenizer):
        from kvkern.engine import Engine
        from kvkern.publish import load

        with _progress("load", "bytes") as progress:
            document = load(file, live, tokenizer, progress=progress)
        with document:
            with _room_for(memory, place), _status("measuring the rounding class"):
                engine = Engine(live, tokenizer, max_agents=agents, memory_bytes=memory_bytes, backend=backend)
            answers = engine.ask(document, asked, seed=seed, **options)
            with _AnswerWriter(asked, output, ordered=ordered, as_json=as_json) as writer:
                writer.write_all(answers)
            writer.report(engine)
    if writer.interrupted:
        raise typer.Exit(INTERRUPTED)
    if writer.refused:
        raise typer.Exit(1)


@app.command()
@_command
def fit(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or name of a model; its weights are not loaded.")
    ],
    document_tokens: Annotated[int, typer.Option(help="Tokens of the document.")],
    suffix_tokens: Annotated[int, typer.Option(help="Tokens of one agent: question and answer.")],
    memory: Annotated[str, typer.Option(help="For weights, document and agents: 80GiB, 512M.")],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of weights and KV; auto: the checkpoint's.")] = "auto",
    as_json: Json = False,
) -> None:
    """Say how many agents fit into a memory budget, with the arithmetic."""
    from kvkern import cost

    geometry, weights_bytes, weights_from = _plan_model(model, dtype)
    n = cost.fit(
        geometry,
        document_tokens=document_tokens,
        suffix_tokens=suffix_tokens,
        memory_bytes=cost.parse_bytes(memory),
        weights_bytes=weights_bytes,
    )
    kind = str(geometry.dtype).removeprefix("torch.")
    padded, paged = n.prefix_bytes // n.token_bytes, n.suffix_bytes // n.token_bytes
    left = n.memory_bytes - n.weights_bytes - n.prefix_bytes
    token = f"{_bytes(n.token_bytes)} a token"
    result = {"model": model, "dtype": kind, "weights_from": weights_from, **asdict(n)}
    lines = [
        ("memory", f"{_bytes(n.memory_bytes)}"),
        ("weights", f"{_bytes(n.weights_bytes)} in {kind}, by {weights_from}"),
        ("document", f"{_bytes(n.prefix_bytes)} = {n.document_tokens:,} tokens, padded to {padded:,}, of {token}"),
        ("left", f"{_bytes(left)} = memory - weights - document"),
        ("one agent", f"{_bytes(n.suffix_bytes)} = {n.suffix_tokens:,} tokens, {paged:,} in whole pages, of {token}"),
        ("agents", f"{n.agents:,} = left / one agent"),
        ("unshared", f"{n.agents_expanded:,} agents, if each had its own copy of the document's KV"),
        ("not counted", "activations: leave room for them in the budget"),
    ]
    _result(result, lines, as_json)


@app.command()
@_command
def demo(
    model: Annotated[
        str | None, typer.Option("--model", help="Folder or name of a model; by default the demo's own.")
    ] = None,
    document: Annotated[Path | None, typer.Option(help="Text file in UTF-8; by default the GNU GPL 3.")] = None,
    questions: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="By default 256 questions on the GPL.")
    ] = None,
    agents: Annotated[int, typer.Option(help="Each with one question.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 24,
    compared: Annotated[int, typer.Option(help="Agents whose answers are compared with from scratch.")] = 8,
    document_tokens: Annotated[int | None, typer.Option(help="Take so many tokens of the document.")] = None,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the .kv file there.")] = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    as_json: Json = False,
) -> None:
    """Publish a document, let 256 agents ask it from another process, and compare with transformers from scratch."""
    from kvkern.demo import run

    run(
        model=model,
        document=document,
        questions=questions,
        agents=agents,
        new_tokens=new_tokens,
        compared=compared,
        document_tokens=document_tokens,
        backend=backend,
        device=device,
        json=as_json,
        out_dir=keep,
    )


@app.command()
@_command
def env(
    model: Annotated[str | None, typer.Option("--model", help="Measure this model's rounding class too.")] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    as_json: Json = False,
) -> None:
    """Say what kvkern has to work with here: backend, instruction set, threads, devices, versions."""
    import torch

    from kvkern.backends import choose

    place = _device(device)
    chosen = choose(backend, place)
    result: dict[str, Any] = {
        "backend": {"name": chosen.name, "why": chosen.why},
        "device": str(place),
        "devices": _devices(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": _versions(),
    }
    devices = (" ".join(str(value) for value in known.values()) for known in _devices_for_eyes(result["devices"]))
    lines = [
        ("backend", f"{chosen.name} on {place}: {chosen.why}"),
        ("devices", "; ".join(devices)),
        ("cpu", f"instruction set {result['instruction_set']}, torch threads {result['threads']}"),
        ("platform", result["platform"]),
        ("versions", "  ".join(f"{name} {found or 'not installed'}" for name, found in result["versions"].items())),
    ]
    if model is not None:
        from kvkern.linear import measure

        with _opened(model, dtype, place) as (live, _), _status("measuring the rounding class"):
            rounding = measure(live).describe()
        result["model"], result["rounding"] = model, rounding
        lines += [("model", f"{model}  {rounding['dtype']}"), *_rounding_lines(rounding)]
    _result(result, lines, as_json)


# -- what is said ------------------------------------------------------------------------------------------------------

Lines = Sequence[tuple[str, str]]


def _result(result: Mapping[str, Any], lines: Lines, as_json: bool) -> None:
    """A result on stdout: the object, or the same in aligned lines."""
    if as_json:
        _say(json.dumps(result))
    else:
        width = max(len(name) for name, _ in lines)
        _say("\n".join(f"{name:<{width}}  {text}" for name, text in lines))


def _say(text: str) -> None:
    """Whole lines on stdout, at once."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StoreError("stdout", found=error.strerror, needed="a place to write to", do="free some space") from None


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _render_error(error: KvkernError) -> str:
    return f"{type(error).__name__}: {error}"


def _error_fields(error: KvkernError) -> dict[str, str]:
    kind = type(error).__name__
    return {"type": kind, "field": error.field, "found": error.found, "needed": error.needed, "do": error.do}


def _bytes(n: float) -> str:
    from kvkern.cost import render_bytes

    return render_bytes(n)


def _progress(label: str, unit: Literal["tokens", "bytes", "answers"]) -> contextlib.AbstractContextManager[Any]:
    """A bar on stderr, driven by calls with (done, in all); nothing where stderr is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    silent = contextlib.nullcontext(lambda done, total, note="": None)
    return _bar(label, unit, console) if console.is_terminal else silent


@contextlib.contextmanager
def _bar(label: str, unit: str, console: Any) -> Iterator[Callable[..., None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn("{task.fields[count]}")
    columns = (TextColumn("{task.description}"), BarColumn(), text, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=None, count="")

        def update(done: int, total: int, note: str = "") -> None:
            count = f"{_bytes(done)} of {_bytes(total)}" if unit == "bytes" else f"{done:,} of {total:,} {unit}"
            progress.update(task, completed=done, total=total, count=f"{count}  {note}" if note else count)

        yield update


def _status(text: str) -> contextlib.AbstractContextManager[Any]:
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else contextlib.nullcontext()


def _header_fields(header: Header) -> dict[str, Any]:
    from kvkern.geometry import pad_tokens

    geometry = header.identity.geometry
    return {
        "file": str(header.path),
        "tokens": header.tokens,
        "size_bytes": header.size_bytes,
        "kv_bytes": pad_tokens(header.tokens) * geometry.token_bytes(),
        "segments": header.segments,
        "blocks": len(header.kv),
        "identity": header.identity.to_dict(),
        "provenance": dict(header.provenance),
    }


def _header_lines(header: Header) -> Lines:
    from kvkern.geometry import segment_tokens
    from kvkern.identity import short

    identity, geometry, by = header.identity, header.identity.geometry, header.provenance
    kind = str(geometry.dtype).removeprefix("torch.")
    shape = f"{geometry.layers} layers  {geometry.num_kv_heads} kv heads of {geometry.head_dim}  {kind}"
    made = [f"{name} {by[name]}" for name in ("torch", "transformers", "backend") if name in by]
    chunk = f"  {by['prefill_chunk']:,} tokens a chunk" if isinstance(by.get("prefill_chunk"), int) else ""
    keywords = "".join(f"  {name}={json.dumps(value)}" for name, value in sorted(identity.template_kwargs.items()))
    wording = f"chat template {short(identity.template)}{keywords}" if identity.template else "no chat template"
    rope = "  ".join(f"{name} {value}" for name, value in sorted(identity.rope.items()))
    above = f", below {short(identity.ancestors)}" if identity.ancestors else ""
    length = f" of {segment_tokens(header.tokens):,} tokens"
    cut = f"{header.segments} segments{length}" if header.segments > 1 else "1 segment"
    return [
        (header.path.name, f"{header.tokens:,} tokens  {shape}  {_bytes(header.size_bytes)}"),
        ("model", f"{by.get('model', '?')}  weights {short(identity.weights)}  made by kvkern {by.get('kvkern', '?')}"),
        ("tokens", f"{short(identity.token_ids)}  from position {identity.position:,}{above}"),
        ("words", f"tokenizer {short(identity.tokenizer)}  {wording}"),
        ("rope", rope),
        ("blocks", f"{len(header.kv)}, each with its digest: {geometry.layers} layers x K and V x {cut}"),
        ("made", f"{by.get('created', '?')}  {'  '.join(made)}{chunk}"),
    ]


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = [{"name": "cpu", "cores": os.cpu_count()}]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        arch = f"sm_{card.major}{card.minor}"
        found.append({"name": f"cuda:{i}", "card": card.name, "arch": arch, "memory_bytes": card.total_memory})
    return found


def _devices_for_eyes(devices: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    units = {"cores": lambda n: f"({n} cores)", "memory_bytes": _bytes}
    for device in devices:
        yield {name: units[name](value) if name in units else value for name, value in device.items()}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("kvkern", "torch", "triton", "transformers"):
        found[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _rounding_lines(rounding: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, buckets, outside in (
        ("rows", "row_buckets", "outside"),
        ("rows of lm_head", "head_row_buckets", "head_outside"),
    ):
        yield name, f"{', '.join(map(str, rounding[buckets]))}: one rounding class"
        for rows, why in rounding[outside].items():
            yield "", f"not {rows}: {why}"
    where = f"{rounding['device']}, {rounding['dtype']}, {rounding['threads']} threads"
    yield "measured", f"on {where}, in {rounding['seconds']:.1f} s, of {', '.join(rounding['modules'])}"


class _AnswerWriter:
    """Answers as they end: to stdout, or to a file of JSON lines; with what there is to say of all of them.

    A line is one write, so that Ctrl-C leaves none in part.
    """

    def __init__(self, questions: Sequence[str], output: Path | None, *, ordered: bool, as_json: bool) -> None:
        self.questions, self.output, self.ordered, self.as_json = questions, output, ordered, as_json
        self.answers = self.refused = self.new_tokens = 0
        self.interrupted = False
        self.seconds = 0.0
        self._file: TextIO | None = None

    def __enter__(self) -> _AnswerWriter:
        if self.output is not None:
            try:
                self._file = self.output.open("w", encoding="utf-8", buffering=1)
            except OSError as error:
                raise _cannot_write(self.output, error) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write_all(self, answers: Iterator[Answer]) -> None:
        """Until the last one has ended, or Ctrl-C; then those that have ended are still written."""
        started = time.perf_counter()
        held: dict[int, Answer] = {}
        following = 0
        try:
            with _progress("ask", "answers") as progress:
                for answer in answers:
                    held[answer.index] = answer
                    while held and (not self.ordered or following in held):
                        self._write(held.pop(following if self.ordered else answer.index))
                        following += 1
                    self.seconds = time.perf_counter() - started
                    speed = f"{self.new_tokens / self.seconds:,.1f} tokens/s"
                    progress(self.answers + self.refused, len(self.questions), speed)
        except KeyboardInterrupt:
            self.interrupted = True
            for index in sorted(held):
                self._write(held[index])
        self.seconds = time.perf_counter() - started

    def _write(self, answer: Answer) -> None:
        if answer.error is None:
            self.answers += 1
            self.new_tokens += len(answer.token_ids)
        else:
            self.refused += 1
            _note(f"question {answer.index} is refused: {_render_error(answer.error)}")
        if self._file is not None:
            assert self.output is not None
            try:
                self._file.write(json.dumps(self._fields(answer)) + "\n")
            except OSError as error:
                raise _cannot_write(self.output, error) from None
        elif self.as_json:
            _say(json.dumps(self._fields(answer)))
        elif answer.error is None:
            _say(self._lines(answer))

    def _fields(self, answer: Answer) -> dict[str, Any]:
        error = None if answer.error is None else _error_fields(answer.error)
        return {"index": answer.index, "question": self.questions[answer.index], **vars(answer), "error": error}

    def _lines(self, answer: Answer) -> str:
        text = answer.text.strip().replace("\n", "\n    ")
        ended = f"{len(answer.token_ids):,} new tokens ({answer.finish_reason})"
        reused = f"{answer.prompt_tokens:,} question tokens after {answer.cached_tokens:,} cached"
        return f"[{answer.index}] {self.questions[answer.index].strip()}\n    {text}\n    {ended}  {reused}\n"

    def report(self, engine: Engine) -> None:
        """How many, how long: on stdout if the answers went to a file, else on stderr."""
        speed = self.new_tokens / self.seconds if self.seconds else 0.0
        known = engine.describe()
        result = {
            "file": None if self.output is None else str(self.output),
            "questions": len(self.questions),
            "answers": self.answers,
            "refused": self.refused,
            "interrupted": self.interrupted,
            "new_tokens": self.new_tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(speed, 3),
            "backend": known["backend"],
            "max_agents": known["max_agents"],
            "suffix_tokens": known["suffix_tokens"],
            "memory_bytes": known["memory_bytes"],
        }
        counts = f"{self.answers:,} of {len(self.questions):,} answered" + (
            f", {self.refused:,} refused" if self.refused else ""
        )
        room = f"at most {known['max_agents']:,} agents and {known['suffix_tokens']:,} suffix tokens at once"
        lines = [
            (self.output.name if self.output is not None else "answers", counts + ", interrupted" * self.interrupted),
            ("speed", f"{self.new_tokens:,} new tokens in {self.seconds:.1f} s, {speed:,.1f} tokens/s"),
            ("engine", f"backend {known['backend']}, {room} ({_bytes(known['memory_bytes'])})"),
        ]
        if self.output is not None:
            _result(result, lines, self.as_json)
        else:
            _note("\n".join(f"{name:<7}  {text}" for name, text in lines))


# -- what is read ------------------------------------------------------------------------------------------------------


def _read_text(field: str, source: str) -> str:
    """A text file, or standard input for "-", as UTF-8, its line ends untouched."""
    name = "standard input" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise RequestError(
            field, found=f"{name}: {why}", needed="a text file that can be read", do="name such a file"
        ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {error.start:,} of {name}"
        raise RequestError(field, found=found, needed="text in UTF-8", do="convert the file to UTF-8") from None


def _read_document(source: str) -> str:
    text = _read_text("document", source)
    if not text.strip():
        found = f"{source}: {len(text)} characters, all blank" if text else f"{source}: an empty file"
        raise RequestError("document", found=found, needed="a text", do="give a file that is not empty")
    return text


def _questions(given: Sequence[str], source: str | None) -> list[str]:
    """The questions on the command line or those in a file, never both."""
    if given and source is not None:
        raise typer.BadParameter("give questions, or --questions, not both", param_hint="QUESTION")
    if source is None:
        if not given:
            raise typer.BadParameter("give at least one question, or --questions FILE.jsonl", param_hint="QUESTION")
        return list(given)
    lines = _read_text("questions", source).rstrip().split("\n")
    if lines == [""]:
        raise RequestError("questions", found=f"{source}: no line", needed="at least one", do="write a question a line")
    return [_question(source, number, line.strip()) for number, line in enumerate(lines, start=1)]


def _question(source: str, number: int, line: str) -> str:
    """A line that begins like JSON is JSON; every other is a question as it stands, an empty one too, for the engine to refuse."""
    if line[:1] not in ("{", '"'):
        return line
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    question = value.get("question") if isinstance(value, dict) else value
    if not isinstance(question, str):
        found = f"an object with {sorted(value)}" if isinstance(value, dict) else "no JSON"
        needed = '{"question": "..."}, a text in quotes, or a plain line'
        field = f"questions, line {number}"
        raise RequestError(field, found=f"{found} in {source}", needed=needed, do="write one question a line")
    return question


def _template_kwargs(given: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE, ...: true is a bool, 3 a number, monday a text."""
    found: dict[str, Any] = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"{word!r} is not NAME=VALUE", param_hint="--template-kwarg")
        if name in TAKEN:
            raise RequestError(
                f"template_kwargs.{name}", found="a keyword", needed="one of the chat template", do="leave it out"
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


TAKEN = frozenset(
    {"model", "tokenizer", "text", "chat", "parent", "chunk", "progress", "conversation", "chat_template", "tokenize"}
    | {"add_generation_prompt", "continue_final_message", "return_dict", "return_tensors", "padding", "truncation"}
    | {"max_length", "return_assistant_tokens_mask", "tokenizer_kwargs"}
)
"""Keywords of publish and of apply_chat_template that are none of the template."""


def _check_output(path: Path) -> None:
    """What is to be written can be: found out before the work, not after it."""
    if path.is_dir() or not path.parent.is_dir():
        found = f"{path}, a folder" if path.is_dir() else f"no folder {path.parent}"
        raise StoreError("output", found=found, needed="a file name in a folder that is there", do="name such a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise StoreError("output", found=f"{path}, not writable", needed="a file to write", do="name another file")


def _cannot_write(path: Path, error: OSError) -> StoreError:
    found = f"{path}: {error.strerror}"
    return StoreError("output", found=found, needed="a file to write", do="free some space, or name another file")


# -- models and devices ------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """What transformers is asked for: a folder, which is read without a look at the network, or a name."""

    name: str
    local: bool


def _source(name: str) -> _Source:
    path = Path(name).expanduser()
    if path.is_dir():
        return _Source(str(path.resolve()), True)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        found = f"{name}, a file" if path.exists() else f"no folder {name}"
        raise _no_model(found)
    return _Source(name, False)


def _no_model(found: str, do: str = "name such a folder, or a model that can be downloaded") -> RequestError:
    needed = "a folder with config.json, tokenizer and safetensors, or a name such as Qwen/Qwen3-4B"
    return RequestError("model", found=found, needed=needed, do=do)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """What transformers says of a model that it cannot read becomes one error."""
    from safetensors import SafetensorError

    try:
        yield
    except KvkernError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[0] if lines else type(error).__name__
        raise _no_model(f"{name}: {why if len(why) <= 200 else why[:197] + '...'}") from None


@contextlib.contextmanager
def _opened(name: str, dtype: Dtype | None, device: torch.device) -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer) ready for kvkern, every weight from safetensors, no code of the model's own run."""
    source = _source(name)
    with _status(f"loading {name}"):
        import torch
        import transformers

        from kvkern import qwen3

        _quiet()
        if dtype is None:
            dtype = "float32" if device.type == "cpu" else "auto"
        options = {"local_files_only": source.local, "trust_remote_code": False}
        with _reading(name):
            # First, so that a name that nobody knows is asked for once.
            config = transformers.AutoConfig.from_pretrained(source.name, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.name, **options)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                source.name,
                config=config,
                attn_implementation=qwen3.NAME,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise _no_model(f"{name}: no tokenizer in it", "put the model's tokenizer.json there")
        for problem in ("missing", "mismatched"):
            # transformers would draw these weights at random, and say so in a warning.
            wrong = info[f"{problem}_keys"]
            if wrong:
                first = min(key if isinstance(key, str) else key[0] for key in wrong)
                found = f"{name}: {len(wrong)} {problem} weights, among them {first}"
                raise _no_model(found, "copy the model again: config and weights are not of one model")
        with _room_for("the weights", device):
            model = model.to(device).eval()
        qwen3.check_model(model)
    yield model, tokenizer


def _quiet() -> None:
    """No bars and remarks of the libraries between ours: what matters of them becomes an error."""
    import huggingface_hub
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()


@contextlib.contextmanager
def _room_for(what: str, device: torch.device) -> Iterator[None]:
    """A device that is full is no bug."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise CapacityError(
            "memory",
            found=f"no room for {what} on {device}",
            needed="free memory",
            do="give less --memory, or free some",
        ) from None


def _device(name: str | None) -> torch.device:
    import torch

    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    wanted = (there[1] if len(there) > 1 else "cpu") if name is None else "cuda:0" if name == "cuda" else name
    if wanted not in there:
        raise DeviceError(
            "device", found=name, needed=f"one of {', '.join(there)}", do="leave it out, or name one of these"
        )
    return torch.device(wanted)


def _model_of(header: Header) -> str:
    """The model that made a file, by its provenance."""
    name = header.provenance.get("model")
    if not isinstance(name, str) or not name:
        raise _no_model(f"none in the provenance of {header.path.name}", "name it by --model")
    try:
        _source(name)
    except RequestError as error:
        raise _no_model(f"{error.found}, which {header.path.name} names", "name it by --model") from None
    return name


def _file_dtype(header: Header) -> Dtype:
    dtype: Any = str(header.identity.geometry.dtype).removeprefix("torch.")
    return dtype


def _check_room(geometry: Geometry, memory: str, max_new_tokens: int) -> int:
    """The budget in bytes; an error if no question at all would find room, instead of one for each."""
    from kvkern.cost import parse_bytes
    from kvkern.geometry import PAGE

    memory_bytes = parse_bytes(memory)
    # A question has one token at least, and the last new token is never attended to.
    needed = -(-max(max_new_tokens, 1) // PAGE) * PAGE * geometry.token_bytes()
    if memory_bytes < needed:
        raise CapacityError(
            "memory",
            found=memory,
            needed=f"at least {_bytes(needed)} for one agent of {max_new_tokens:,} new tokens",
            do="give more --memory, or fewer --max-new-tokens",
        )
    return memory_bytes


def _plan_model(name: str, dtype: Dtype) -> tuple[Geometry, int, str]:
    """(geometry, bytes of the weights, what these are known by), without loading any."""
    source = _source(name)
    import torch
    import transformers

    from kvkern.identity import model_geometry

    _quiet()
    options = {"local_files_only": source.local, "trust_remote_code": False}
    with _reading(name):
        config = transformers.AutoConfig.from_pretrained(source.name, **options)
    kind = getattr(config, "dtype", None) or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    try:
        geometry = model_geometry(SimpleNamespace(config=config, dtype=kind, named_parameters=lambda: ()))
    except AttributeError as error:
        raise UnsupportedError(
            "model.config",
            found=f"{config.model_type} without {error.name}",
            needed="a decoder with attention in every layer",
            do="use a causal language model",
        ) from None
    elements = _stored_elements(Path(source.name)) if source.local else None
    if elements is not None:
        return geometry, elements * kind.itemsize, "its safetensors headers"
    with _reading(name), torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    elements = sum(parameter.numel() for parameter in model.parameters())
    return geometry, elements * kind.itemsize, "its config"


def _stored_elements(folder: Path) -> int | None:
    """Elements of all weights in a folder, by the headers of its safetensors files; None where it has none."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    total = 0
    with _reading(str(folder)):
        names = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ["model.safetensors"]
        for file in sorted({folder / name for name in names}):
            if not file.is_file():
                return None
            with safe_open(file, framework="pt") as opened:
                total += sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118
    return total


if __name__ == "__main__":
    sys.exit(main())
