"""The command line: publish, inspect, verify, ask, fit, cost, demo, check, env.

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
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from kvkern import console, cost, describe, opening, pricing
from kvkern.answers import AnswerWriter
from kvkern.cost import render_bytes
from kvkern.errors import CapacityError, IdentityError, KvkernError, RequestError, StoreError

if TYPE_CHECKING:
    import torch

    from kvkern.geometry import Geometry
    from kvkern.header import Header

app = typer.Typer(
    help="One document, one KV copy, thousands of agents: attention over a shared, read-only prefix.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

INTERRUPTED, READER_GONE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as a shell has it

P = ParamSpec("P")

# Options that several commands share.
Json = Annotated[bool, typer.Option("--json", help="Print JSON with the same fields.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Folder or name of the model; by default the one that made FILE.")
]
DtypeOption = Annotated[
    opening.Dtype | None,
    typer.Option("--dtype", help="Of the weights; auto: the checkpoint's. By default float32 on a CPU, auto on a GPU."),
]
FileDtypeOption = Annotated[
    opening.Dtype | None,
    typer.Option("--dtype", help="Of the weights; auto: the checkpoint's. By default that of FILE."),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:N; by default a GPU where there is one.")
]
BackendOption = Annotated[
    str | None, typer.Option("--backend", help="Which arithmetic; by default the device decides.")
]


def _input(name: str) -> Any:
    """The option of an input of kvkern.cost, its help with the unit."""
    text = cost.Inputs.__dataclass_fields__[name].metadata["help"]
    return typer.Option(help=f"{text[0].upper()}{text[1:]}.")


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
                console.note(console.error_text(error))
                if kwargs["as_json"]:
                    with contextlib.suppress(StoreError):  # stdout itself is what fails
                        console.say(json.dumps({"error": console.error_fields(error)}))
                raise typer.Exit(1) from None
            except KeyboardInterrupt:
                console.note("interrupted")
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
    compress: Annotated[
        bool,
        typer.Option(
            "--compress", help="Pack KV in bfloat16 without loss, with the same digests; it is unpacked at load."
        ),
    ] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: Json = False,
) -> None:
    """Read DOCUMENT once with MODEL, and write its KV as a .kv file."""
    template_kwargs = _template_kwargs(template_kwarg or [])
    text = opening.read_document(document)
    _check_output(output)

    from kvkern import packing, store
    from kvkern.identity import model_geometry
    from kvkern.publish import CHUNK
    from kvkern.publish import publish as prefill

    form = packing.FORM if compress else None
    if form is not None:
        packing.check(form)
    live, tokenizer = _open(model, dtype, opening.device_of(device))
    if form is not None:
        packing.check(form, model_geometry(live).dtype)
    times = [time.perf_counter()]
    with console.bar("prefill", "tokens") as progress:

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
    with made as kv, console.bar("save", "bytes") as progress:
        kv.save(output, compress=form, progress=progress)
    times.append(time.perf_counter())
    header = store.inspect(output)
    read, hashed, saved = (end - begin for begin, end in pairwise(times))
    seconds = {"prefill_seconds": read, "hash_seconds": hashed, "save_seconds": saved}
    result = {**describe.header_fields(header), **{name: round(value, 3) for name, value in seconds.items()}}
    speed = f"{read:.1f} s ({header.tokens / read:,.0f} tokens/s)"
    took = ("took", f"prefill {speed}  weights hashed {hashed:.1f} s  saved {saved:.1f} s")
    console.result(result, [*describe.header_lines(header), took], as_json=as_json)


@app.command()
@_command
def inspect(file: Annotated[Path, typer.Argument(metavar="FILE", help="A .kv file.")], as_json: Json = False) -> None:
    """Say what a .kv file holds and what it was made with, by its header alone."""
    from kvkern import store

    header = store.inspect(file)
    console.result(describe.header_fields(header), describe.header_lines(header), as_json=as_json)


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
    from kvkern import identity, store

    if model is not None:
        _check_root(store.inspect(file))
    started = time.perf_counter()
    with console.bar("verify", "bytes") as progress:
        header = store.verify(file, progress=progress)
    seconds = time.perf_counter() - started
    compared = "digests only, no model compared"
    if model is not None:
        # Weights are the same on every device, and this needs no room beside a running engine.
        live, tokenizer = _open(model, dtype or opening.dtype_of(header), opening.device_of(device or "cpu"))
        given = tokenizer if header.identity.tokenizer is not None else None
        identity.match(header.identity, live, given, where=file.name)
        compared = f"the identity is that of {model}"
    blocks = f"{len(header.kv)} blocks, {render_bytes(header.size_bytes)} in {seconds:.1f} s"
    result = {
        **describe.header_fields(header),
        "verified": {"blocks": len(header.kv), "seconds": round(seconds, 3), "model": model},
    }
    console.result(result, [*describe.header_lines(header), ("verified", f"{blocks}  {compared}")], as_json=as_json)


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

    A blank line among those of a file is refused at once. A question that is refused later is reported, and the others go on;
    the exit code is then 1.
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
    _check_root(header)
    memory_bytes = _check_room(header.identity.geometry, memory, max_new_tokens)
    place = opening.device_of(device)
    choose(backend, place)
    name = model if model is not None else opening.model_of(header)

    live, tokenizer = _open(name, dtype or opening.dtype_of(header), place)
    from kvkern.engine import Engine
    from kvkern.publish import load

    with console.bar("load", "bytes") as progress:
        document = load(file, live, tokenizer, progress=progress)
    with document:
        do = "give less --memory, or free some"
        with opening.room_for(f"{memory} of suffixes", place, do), console.bar("rounding class"):
            engine = Engine(live, tokenizer, max_agents=agents, memory_bytes=memory_bytes, backend=backend)
        answers = engine.ask(document, asked, seed=seed, **options)
        with AnswerWriter(asked, output, ordered=ordered, as_json=as_json) as writer:
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
    dtype: Annotated[
        opening.Dtype, typer.Option("--dtype", help="Of weights and KV; auto: the checkpoint's.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Say how many agents fit into a memory budget, with the arithmetic."""
    geometry, weights_bytes, weights_from = opening.weigh_model(model, dtype)
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
    token = f"{render_bytes(n.token_bytes)} a token"
    result = {"model": model, "dtype": kind, "weights_from": weights_from, **asdict(n)}
    lines = [
        ("memory", f"{render_bytes(n.memory_bytes)}"),
        ("weights", f"{render_bytes(n.weights_bytes)} in {kind}, by {weights_from}"),
        (
            "document",
            f"{render_bytes(n.prefix_bytes)} = {n.document_tokens:,} tokens, padded to {padded:,}, of {token}",
        ),
        ("left", f"{render_bytes(left)} = memory - weights - document"),
        (
            "one agent",
            f"{render_bytes(n.suffix_bytes)} = {n.suffix_tokens:,} tokens, {paged:,} in whole pages, of {token}",
        ),
        ("agents", f"{n.agents:,} = left / one agent"),
        ("unshared", f"{n.agents_expanded:,} agents, if each had its own copy of the document's KV"),
        ("not counted", "activations: leave room for them in the budget"),
    ]
    console.result(result, lines, as_json=as_json)


@app.command("cost")
@_command
def cost_(
    preset: Annotated[
        str | None, typer.Option(help="paper, paper-255 or list; by default paper, with --measured list.")
    ] = None,
    inputs: Annotated[
        str | None, typer.Option(metavar="FILE.toml", help="Inputs by name; - for standard input.")
    ] = None,
    measured: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="Seconds and bytes, of bench_document.py or publish --json.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Take bytes of KV a token from its config.")] = None,
    tokens: Annotated[int | None, _input("tokens")] = None,
    token_bytes: Annotated[float | None, _input("token_bytes")] = None,
    gb_bytes: Annotated[float | None, _input("gb_bytes")] = None,
    prefill_seconds: Annotated[float | None, _input("prefill_seconds")] = None,
    reuse_seconds: Annotated[float | None, _input("reuse_seconds")] = None,
    gpu_hour: Annotated[float | None, _input("gpu_hour")] = None,
    prefill_price: Annotated[float | None, _input("prefill_price")] = None,
    cache_read_factor: Annotated[float | None, _input("cache_read_factor")] = None,
    egress_gb: Annotated[float | None, _input("egress_gb")] = None,
    gpu_gb_hour: Annotated[float | None, _input("gpu_gb_hour")] = None,
    cpu_gb_hour: Annotated[float | None, _input("cpu_gb_hour")] = None,
    disk_gb_month: Annotated[float | None, _input("disk_gb_month")] = None,
    cpu_bytes_per_s: Annotated[float | None, _input("cpu_bytes_per_s")] = None,
    disk_bytes_per_s: Annotated[float | None, _input("disk_bytes_per_s")] = None,
    reads_month: Annotated[float | None, _input("reads_month")] = None,
    agents: Annotated[float | None, _input("agents")] = None,
    as_json: Json = False,
) -> None:
    """Say what reading a document costs: prefill, reuse, egress and hosting, by list prices and by measured seconds.

    Options override --measured, --measured overrides --inputs, and all of them the preset.
    """
    given = locals()  # an option has the name of its input
    options = {name: given[name] for name in pricing.NAMES}
    read, origin, notes = pricing.gather(options, preset_name=preset, file=inputs, measured=measured, model=model)
    for beware in notes:
        console.note(beware)
    console.result(pricing.fields(read, origin), pricing.lines(read, origin), as_json=as_json)


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
def check(
    model: Annotated[
        str | None, typer.Option("--model", help="Folder or name of a model; by default a tiny random one.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of all random values; by default drawn afresh.")] = None,
    as_json: Json = False,
) -> None:
    """Check on this machine what kvkern promises: kernels, bits, rounding classes, documents; each with a control.

    The exit code is 1 if something did not hold. What is not checked is said, and counts as neither.
    Ctrl-C prints what held so far; the exit code is then 130.
    """
    from kvkern.checks.run import run

    held = run(model=model, dtype=dtype, device=device, backend=backend, seed=seed, as_json=as_json)
    if not held:
        raise typer.Exit(1)


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

    from kvkern import native
    from kvkern.backends import choose

    isa, forced = native.instruction_set(), native.forced_instruction_set() is not None
    place = opening.device_of(device)
    chosen = choose(backend, place)
    result: dict[str, Any] = {
        "backend": {"name": chosen.name, "why": chosen.why},
        "device": str(place),
        "devices": describe.devices(),
        "instruction_set": isa,
        "instruction_set_forced": forced,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": describe.versions(),
    }
    devices = (
        " ".join(str(value) for value in known.values()) for known in describe.devices_for_eyes(result["devices"])
    )
    lines = [
        ("backend", f"{chosen.name} on {place}: {chosen.why}"),
        ("devices", "; ".join(devices)),
        (
            "kernels",
            f"in C++ for {isa}{', forced by KVKERN_ISA' if forced else ''}; torch for {result['torch_instruction_set']}",
        ),
        ("threads", str(result["threads"])),
        ("platform", result["platform"]),
        ("versions", "  ".join(f"{name} {found or 'not installed'}" for name, found in result["versions"].items())),
    ]
    if model is not None:
        from kvkern.linear import measure

        live, _ = _open(model, dtype, place)
        with console.bar("rounding class"):
            rounding = measure(live).describe()
        result["model"], result["rounding"] = model, rounding
        lines += [("model", f"{model}  {rounding['dtype']}"), *describe.rounding_lines(rounding)]
    console.result(result, lines, as_json=as_json)


# -- what is given -----------------------------------------------------------------------------------------------------


def _questions(given: Sequence[str], source: str | None) -> list[str]:
    """The questions on the command line or those in a file, never both."""
    if given and source is not None:
        raise typer.BadParameter("give questions, or --questions, not both", param_hint="QUESTION")
    if source is None:
        if not given:
            raise typer.BadParameter("give at least one question, or --questions FILE.jsonl", param_hint="QUESTION")
        return list(given)
    return opening.read_questions(source)


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


def _check_root(header: Header) -> None:
    """A file that continues another needs that one's KV before its own, and there is no command that takes two."""
    from kvkern.identity import short

    if header.identity.ancestors is not None:
        raise IdentityError(
            "ancestors",
            found=f"{short(header.identity.ancestors)} in {header.path.name}, which continues another document",
            needed="none: the command line serves documents without a parent",
            do="load both in Python: kvkern.load(FILE, model, tokenizer, parent=kvkern.load(PARENT, model, tokenizer))",
        )


def _open(name: str, dtype: opening.Dtype | None, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer), with a bar meanwhile."""
    with console.bar("load the model"):
        return opening.open_model(name, dtype, device)


def _check_room(geometry: Geometry, memory: str, max_new_tokens: int) -> int:
    """The budget in bytes; an error if no question at all would find room, instead of one for each."""
    from kvkern.geometry import PAGE

    memory_bytes = cost.parse_bytes(memory)
    # A question has one token at least, and the last new token is never attended to.
    needed = -(-max(max_new_tokens, 1) // PAGE) * PAGE * geometry.token_bytes()
    if memory_bytes < needed:
        raise CapacityError(
            "memory",
            found=memory,
            needed=f"at least {render_bytes(needed)} for one agent of {max_new_tokens:,} new tokens",
            do="give more --memory, or fewer --max-new-tokens",
        )
    return memory_bytes


if __name__ == "__main__":
    sys.exit(main())
