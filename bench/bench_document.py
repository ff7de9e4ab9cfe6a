"""What a document costs by its length and by its agents, all by the public API: publish, save, load, Engine.

    python bench/bench_document.py [--here] [--lengths 255 3774] [--agents 1 64] [--dtype bfloat16] [--model PATH] [--tiny]
                                   [--random-qwen3-4b] [--scratch FOLDER] [--seconds 300]

By default SmolLM2 of the demo over the first tokens of the GNU GPL 3, in bf16 where a CPU multiplies it (AVX-512-BF16), else in
fp32; --random-qwen3-4b and --tiny take bench_engine's random models and random tokens. Naming --lengths alone leaves the agents
out, and the other way round. After each cell document.json is written; a cell that it holds is skipped, one that failed is run
again, none begins after --seconds; what the others are compared with comes first. .kv files lie in --scratch, by default where
temporary files do: name a folder on the disk to be measured where these are kept in memory (`df /tmp`).

Before any time, first tokens are held against torch's attention without document or pages (bench_engine.check). In each cell
a document that was loaded has to have the sums of all blocks and the first tokens of the one that was published, and agents with
a copy each have to say what they say over the shared one: else the script ends.

All times are of one clock on the host, the device idle before and after. Fields of a cell by length, seconds.NAME a list of samples:

    prefill        publish: forward of all tokens, the 64-bit sums, the identity with the tokenizer's digest, where there is a
                   tokenizer; the digest of the weights was taken before
    forward        of that, up to the last token
    save           write the .kv file with its SHA-256, synced
    load_cold      kvkern.load, every digest verified, after the file's pages were dropped; `cold` says whether they were: true,
                   false, or null where the file system does not tell
    load_warm      the same with the file in the page cache
    attach         kvkern.load(mmap=True), the CPU's way to open a file without a copy, verified as well; [] on a GPU
    copy_pinned, copy_pageable   as many bytes from host memory into a GPU's; [] on the CPU
    question       one agent: submit its 16 tokens, up to the first token of the answer
    step           one token more for one agent over the resident document, within the invariant rounding class
    answer         the other 63 of a 64-token answer
    kv_bytes, file_bytes         of the KV, padded to 128 tokens, and of the file
    ratios         of the medians, so computed from measured parts:
                     paper    prefill / step
                     reader   (prefill + question + answer) / (load + question + answer), load as `ratios.load` says
                     host_N   N (prefill + question + answer) / (prefill + N (question + answer)), N agents one after another

By agents, each with a question of its own; of N together over one shared copy, and again (NAME_copied) each over a copy that it
alone reads, loaded from the .kv file:

    seconds.step, .step_copied    one token for each; three at least, more for --part-seconds, --samples at most
    seconds.load_copy             to load each copy, from the page cache
    extend_s, extend_copied_s     all questions, up to the first token of each
    answer_s, answer_copied_s     the rest of a 64-token answer for each; null, not measured, where it would take longer than
                                  20 times --part-seconds
    copies         measured: false where all copies, needed_bytes, do not fit into found_bytes: --copies-gib, or half of what is
                   free; then what is _copied is null or []
    bytes_per_agent (copy / N + pages of question and answer), bytes_per_agent_copied (each with a copy of its own)
    from_scratch   {agents: seconds}: so many agents without any of this, by transformers' own generate and attention, all at once:
                   prefill of document and question, and 64 tokens for each. Measured for few: 1, then 2, then 4, while that
                   takes at most 45 times --part-seconds
    scratch_per_agent_s          of the most agents that were measured

    document part=length P=3774 model=... | prefill <s> s, load <s> cold <s> warm, question <ms> ms, step <ms> ms, answer <s> s |
             paper <n>x, reader <n>x, host <n>x of 1, <n>x of 16, ...
    document part=agents B=64 P=3774 ... | step <ms> ms, <ms> ms an agent, <ms> ms with copies | <n> MiB an agent, ...
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bench_engine
import torch
from bench_engine import FAILURES, QUESTION, draw
from from_scratch import attention
from harness import Bench, WrongResult, shown
from peers import available_memory

import kvkern
from kvkern import _C, cost, demo, opening
from kvkern.demo_model import demo_model
from kvkern.identity import model_geometry

LENGTHS, AGENTS, DOCUMENT = (255, 512, 1024, 2048, 3774, 7500), (1, 16, 64, 256, 1024), 3774
FIRST_CELLS = {"length": (255, 3774), "agents": (1, 64, 1024)}
"""Lengths, and numbers of agents, that come before all others."""
TINY_LENGTHS, TINY_AGENTS, TINY_DOCUMENT = (100, 255), (1, 3), 100
ANSWER = 64
"""Tokens of an answer."""
FIRST = 8
"""Tokens of an answer that are compared."""
HOSTED = (1, 16, 256, 1024)
WORDS = "\n\nOn which date was version 3 of this license published, and by which foundation was it?"

PATIENCE, SCRATCH_PATIENCE = 20, 45
"""An answer of all agents, and agents from scratch, are measured where that takes at most so many --part-seconds."""
SCRATCH_AGENTS = 4
"""From scratch, at most."""

Asked = tuple[float, list[float], float, list[int]]
"""Seconds of the question, of each timed step, of all steps together, and the tokens."""


def options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default=None, help="a folder of a model; by default the demo's")
    which.add_argument("--random-qwen3-4b", action="store_true", help="random weights in Qwen3-4B's shape")
    which.add_argument("--tiny", action="store_true", help="a small random model: to see that all of it runs")
    parser.add_argument(
        "--dtype", default=None, choices=("float32", "bfloat16", "float16"), help="of the model; see above"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="tokens of the documents")
    parser.add_argument("--agents", type=int, nargs="+", default=None, help="these numbers of agents on one document")
    parser.add_argument("--document", type=int, default=None, help="tokens of that one")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for .kv files, on the disk to be measured")
    parser.add_argument("--copies-gib", type=float, default=None, help="of all copies; by default half of what is free")
    parser.add_argument("--no-invariant", dest="invariant", action="store_false", help="forwards of free shapes")
    parser.add_argument(
        "--part-seconds", type=float, default=1.0, help="a part is repeated for so long, at most 3 times"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="no cell begins after these")
    parser.set_defaults(fuse=None)  # an engine decides


# -- what is measured on -----------------------------------------------------------------------------------------------


class Source:
    """A model, its tokenizer, and token ids of documents and questions."""

    def __init__(self, bench: Bench) -> None:
        chosen = bench.options
        self.random = chosen.tiny or chosen.random_qwen3_4b
        if self.random:
            config = bench_engine.SMALL if chosen.tiny else bench_engine.QWEN3_4B
            self.model = bench_engine.random_model(config, bench.device, getattr(torch, model_dtype(bench)))
            self.tokenizer = bench_engine.words(self.model.config.vocab_size)
            return
        self.model, self.tokenizer = opening.open_model(
            chosen.model or str(demo_model()), model_dtype(bench), bench.device
        )
        # No answer ends before its 64 tokens.
        self.model.generation_config.eos_token_id = None
        self.tokenizer.eos_token = None
        text = opening.read_document(demo.DATA / demo.DOCUMENT)
        self.text_ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def document(self, tokens: int) -> tuple[list[int], str]:
        """Its token ids, and what they are."""
        if self.random:
            return draw(tokens, self.model.config.vocab_size), "random tokens"
        times = -(-tokens // len(self.text_ids))
        what = f"{demo.DOCUMENT}, of {len(self.text_ids)} tokens" + (f", {times} times over" if times > 1 else "")
        return (self.text_ids * times)[:tokens], what

    def question(self) -> list[int]:
        if self.random:
            return draw(QUESTION, self.model.config.vocab_size)
        ids: list[int] = self.tokenizer(WORDS, add_special_tokens=False)["input_ids"]
        return (ids * QUESTION)[:QUESTION]


def model_name(bench: Bench) -> str:
    chosen = bench.options
    if chosen.tiny or chosen.random_qwen3_4b:
        return "tiny" if chosen.tiny else "qwen3-4b, random"
    return Path(chosen.model).name if chosen.model else "SmolLM2-135M-Instruct"


def model_dtype(bench: Bench) -> str:
    """Known before the model is made, so that a file that is complete needs none."""
    chosen, cuda = bench.options, bench.device.type == "cuda"
    if chosen.dtype:
        return str(chosen.dtype)
    if chosen.tiny:
        return "bfloat16" if cuda else "float32"
    return "bfloat16" if cuda and chosen.random_qwen3_4b else dtype_for(bench.device)


def dtype_for(device: torch.device) -> opening.Dtype:
    """As kvkern.opening's, but bf16 on a CPU that multiplies it."""
    cpu = device.type == "cpu"
    return "bfloat16" if cpu and _C.instruction_sets()[0] == "avx512bf16" else opening.dtype_for(device)


# -- clocks ------------------------------------------------------------------------------------------------------------


def idle(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)


def clock(bench: Bench, run: Callable[[], Any]) -> float:
    """Seconds of wall clock of one run, the device idle before and after."""
    idle(bench)
    began = time.perf_counter()
    run()
    idle(bench)
    return time.perf_counter() - began


def repeated(bench: Bench, once: Callable[[], float]) -> list[float]:
    """Samples of a long part: three, or fewer where they have taken --part-seconds."""
    samples = [once()]
    while len(samples) < 3 and sum(samples) < bench.options.part_seconds:
        samples.append(once())
    return samples


def forget(path: Path) -> bool | None:
    """Drop a file from the page cache. True: it is gone; False: it is not; None: the file system does not tell."""
    if not hasattr(os, "posix_fadvise"):
        return False
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        # A read that must not wait finds what is still in memory, and nothing else.
        for part in range(4):
            os.preadv(fd, [bytearray(1)], path.stat().st_size * part // 4, os.RWF_NOWAIT)
    except OSError as error:
        return (
            True if error.errno == errno.EAGAIN else None if error.errno in (errno.EOPNOTSUPP, errno.EINVAL) else False
        )
    finally:
        os.close(fd)
    return False


# -- parts -------------------------------------------------------------------------------------------------------------


def prefill(bench: Bench, source: Source, ids: list[int]) -> tuple[kvkern.Document, dict[str, list[float]]]:
    """A published document, and the samples; on a GPU the first run of a length compiles and chooses, and does not count."""
    made: list[kvkern.Document] = []
    tokenizer = None if source.random else source.tokenizer
    forward: list[float] = []

    def once() -> float:
        while made:
            made.pop().release()

        def progress(done: int, total: int) -> None:
            if done == total:  # The sums that follow wait for the device anyway.
                idle(bench)
                forward.append(time.perf_counter() - began)

        began = time.perf_counter()
        return clock(bench, lambda: made.append(kvkern.publish(source.model, tokenizer, ids, progress=progress)))

    if bench.device.type == "cuda":
        once()
        forward.clear()
    samples = repeated(bench, once)
    return made.pop(), {"prefill": samples, "forward": forward}


def ask(
    bench: Bench,
    engine: kvkern.Engine,
    document: kvkern.Document,
    question: list[int],
    tokens: int,
    *,
    steps: bool = False,
) -> Asked:
    """One agent's answer of so many tokens: the question apart, then its steps, each by itself where they are wanted."""
    made: list[Any] = []

    def begin() -> None:
        made.append(engine.submit(document, question, max_new_tokens=tokens, do_sample=False))
        while not made[0].new_tokens and made[0].answer is None:
            engine.step()

    def rest() -> None:
        while made[0].answer is None:
            if steps:
                samples.append(clock(bench, engine.step))
            else:
                engine.step()

    samples: list[float] = []
    asked = clock(bench, begin)
    answered = clock(bench, rest)
    found = list(made[0].answer.token_ids)
    if len(found) != tokens:
        raise RuntimeError(f"an answer of {len(found)} tokens, needed {tokens}: {made[0].answer}")
    return asked, samples, answered, found


def opened(
    bench: Bench,
    source: Source,
    path: Path,
    sums: torch.Tensor,
    told: Callable[[kvkern.Document], bool],
    *,
    mmap: bool,
) -> float:
    """Seconds to load the file; raises WrongResult where it is not the document that was published, or answers otherwise."""
    made: list[kvkern.Document] = []
    tokenizer = None if source.random else source.tokenizer
    seconds = clock(bench, lambda: made.append(kvkern.load(path, source.model, tokenizer, mmap=mmap)))
    with made[0] as document:
        if not torch.equal(document.sums, sums) or not told(document):
            raise WrongResult("wrong result: a loaded document is not the published one; no time is reported")
    return seconds


def from_host(bench: Bench, size: int) -> dict[str, list[float]]:
    """Seconds to copy so many bytes from host memory into memory of the GPU that is there already."""
    if bench.device.type != "cuda":
        return {"copy_pinned": [], "copy_pageable": []}
    there = torch.empty(size, dtype=torch.uint8, device=bench.device)
    found = {}
    for name, pinned in (("copy_pinned", True), ("copy_pageable", False)):
        here = torch.ones(size, dtype=torch.uint8)
        if pinned:
            here = here.pin_memory()
        there.copy_(here)
        found[name] = [clock(bench, partial(there.copy_, here, non_blocking=True)) for _ in range(3)]
    return found


def ratios(medians: dict[str, float], *, cold: bool) -> dict[str, Any]:
    """Three, from medians of the parts; see the top of this file."""
    load = "load_cold" if cold else "load_warm"
    before, own = medians["prefill"], medians["question"] + medians["answer"]
    return {
        "paper": before / medians["step"],
        "reader": (before + own) / (medians[load] + own),
        "load": load,
        **{f"host_{n}": n * (before + own) / (before + n * own) for n in HOSTED},
    }


# -- cells -------------------------------------------------------------------------------------------------------------


class Shared(NamedTuple):
    """The document of the agents, and the seconds of some of them from scratch, by their number."""

    document: kvkern.Document
    scratch: dict[int, float]


def by_length(
    bench: Bench, source: Source, engine: kvkern.Engine, tokens: int, folder: Path, keep: list[Shared] | None
) -> dict[str, Any]:
    """`keep`: where the document goes instead of being released, once all of it is measured."""
    ids, what = source.document(tokens)
    question, cuda = source.question(), bench.device.type == "cuda"
    path = folder / f"{tokens}.kv"
    fresh, samples = prefill(bench, source, ids)
    try:
        # Compiles what this length needs; a GPU's kernels also for the pages of a whole answer.
        first = ask(bench, engine, fresh, question, ANSWER if cuda else FIRST)[3][:FIRST]
        samples["save"] = repeated(bench, lambda: clock(bench, lambda: fresh.save(path)))
        gone: list[bool | None] = []

        def told(document: kvkern.Document) -> bool:
            return ask(bench, engine, document, question, FIRST)[3] == first

        def load(*, cold: bool = False, mmap: bool = False) -> float:
            if cold:
                gone.append(forget(path))
            return opened(bench, source, path, fresh.sums, told, mmap=mmap)

        samples["load_cold"] = repeated(bench, lambda: load(cold=True))
        samples["load_warm"] = repeated(bench, load)
        samples["attach"] = [] if cuda else repeated(bench, lambda: load(mmap=True))
        samples |= from_host(bench, fresh.size_bytes)
        file_bytes = path.stat().st_size
        answers: list[Asked] = []

        def answer() -> float:
            answers.append(ask(bench, engine, fresh, question, ANSWER))
            return answers[-1][0] + answers[-1][2]

        repeated(bench, answer)
        samples["question"], samples["answer"] = [a[0] for a in answers], [a[2] for a in answers]
        if any(a[3][:FIRST] != first for a in answers):
            raise WrongResult("wrong result: the same question has another answer; no time is reported")
        samples["step"] = ask(bench, engine, fresh, question, bench.options.samples + 1, steps=True)[1]
        kv_bytes = fresh.size_bytes
        medians = {name: statistics.median(found) for name, found in samples.items() if found}
        if keep is not None:
            fresh.retain()
            keep.append(Shared(fresh, {}))
    finally:
        fresh.release()
        path.unlink(missing_ok=True)
    cold = None if None in gone else all(gone)
    return {
        "backend": engine.backend.name,
        "document": tokens,
        "text": what,
        "kv_bytes": kv_bytes,
        "file_bytes": file_bytes,
        "cold": cold,
        "seconds": samples,
        "ratios": ratios(medians, cold=cold is True),
        "rounding": engine.describe()["rounding"],
    }


def agents_share(bench: Bench, source: Source, tokens: int) -> Shared:
    """Their document where no cell by length has left one."""
    document, _ = prefill(bench, source, source.document(tokens)[0])
    return Shared(document, {})


class Together(NamedTuple):
    """Seconds to the first token of all agents, of steps of one token for each, of what was left of all answers; and the tokens."""

    extend: float
    steps: list[float]
    answer: float | None
    tokens: list[list[int]]
    engine: kvkern.Engine


def together(
    bench: Bench, source: Source, documents: Sequence[kvkern.Document], questions: Sequence[list[int]]
) -> Together:
    """An agent for each document, all at once."""
    chosen, agents, answer = bench.options, len(documents), ANSWER
    engine = kvkern.Engine(
        source.model,
        source.tokenizer,
        max_agents=agents,
        memory_bytes=agents * own_pages(documents[0]),
        max_extend_tokens=min(QUESTION * agents, 8192),
        invariant=chosen.invariant,
        backend=chosen.backend,
        fused=chosen.fuse,
    )
    requests = [
        engine.submit(document, question, index=i, max_new_tokens=answer, do_sample=False)
        for i, (document, question) in enumerate(zip(documents, questions, strict=True))
    ]

    def made() -> int:
        return sum(len(request.new_tokens) for request in requests)

    extend, rest = 0.0, 0.0
    steps: list[float] = []
    while not all(request.new_tokens for request in requests):
        extend += clock(bench, engine.step)
    while any(request.answer is None for request in requests):
        before = made()
        seconds = clock(bench, engine.step)
        # The first step plans anew, and on a GPU compiles; in the last ones some have ended.
        if rest and made() - before == agents and len(steps) < chosen.samples:
            steps.append(seconds)
        rest += seconds
        enough = len(steps) >= min(3, chosen.samples) and rest > chosen.part_seconds
        left = answer - min(len(request.new_tokens) for request in requests)
        if enough and rest + left * statistics.median(steps) > PATIENCE * chosen.part_seconds:
            break
    whole = all(request.answer is not None for request in requests)
    for request in requests:
        engine.cancel(request)
    if not steps:
        raise RuntimeError(f"no step made a token for each of {agents} agents")
    return Together(extend, steps, rest if whole else None, [list(request.new_tokens) for request in requests], engine)


def own_pages(document: kvkern.Document) -> int:
    """Bytes of the pages of one agent's question and answer."""
    return cost.fit(
        document.geometry, document_tokens=1, suffix_tokens=QUESTION + ANSWER, memory_bytes=1 << 60
    ).suffix_bytes


@contextlib.contextmanager
def copied(bench: Bench, source: Source, document: kvkern.Document, count: int, path: Path) -> Iterator[Any]:
    """(copies, the seconds to load each), from a file that is written where it is not there."""
    if not path.exists():
        named = document.identity
        # Without a tokenizer's digest, which each load would take again.
        document.identity = replace(named, tokenizer=None)
        try:
            document.save(path)
        finally:
            document.identity = named
    seconds: list[float] = []
    with contextlib.ExitStack() as held:
        copies: list[kvkern.Document] = []
        for _ in range(count):
            seconds.append(clock(bench, lambda: copies.append(kvkern.load(path, source.model, None))))
            held.enter_context(copies[-1])
        if not all(torch.equal(copy.sums, document.sums) for copy in copies):
            raise WrongResult("wrong result: a loaded document is not the published one; no time is reported")
        yield copies, seconds


def from_scratch(bench: Bench, source: Source, shared: Shared, questions: Sequence[list[int]]) -> dict[int, float]:
    """{agents: seconds} of few of them without kvkern, as many as there is time for; what was measured before is not again."""
    document, known = shared.document.token_ids.tolist(), shared.scratch

    def generate(agents: int, tokens: int) -> None:
        ids = torch.tensor([[*document, *question] for question in questions[:agents]], device=bench.device)
        with attention(source.model, "sdpa"), torch.no_grad():
            found = source.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                repetition_penalty=1.0,
                pad_token_id=0,
            )
        if found.shape[1] != ids.shape[1] + tokens:
            raise RuntimeError(f"{found.shape[1] - ids.shape[1]} tokens from scratch, needed {tokens}")

    agents, limit = 1, SCRATCH_PATIENCE * bench.options.part_seconds
    while agents <= min(len(questions), SCRATCH_AGENTS) and (agents == 1 or known[1] * agents <= limit):
        if agents not in known:
            if bench.device.type == "cuda":
                generate(agents, 2)  # the first run of a shape chooses its kernels
            known[agents] = clock(bench, partial(generate, agents, ANSWER))
        agents *= 2
    return dict(known)


def room(bench: Bench) -> int:
    """Bytes that copies may take."""
    if bench.options.copies_gib is not None:
        return int(bench.options.copies_gib * 2**30)
    cuda = bench.device.type == "cuda"
    return (torch.cuda.mem_get_info(bench.device)[0] if cuda else available_memory()) // 2


def by_agents(bench: Bench, source: Source, shared: Shared, agents: int, path: Path) -> dict[str, Any]:
    document, size = shared.document, source.model.config.vocab_size
    questions = [draw(QUESTION, size) for _ in range(agents)]
    if bench.device.type == "cuda":
        together(bench, source, [document] * agents, questions)  # compiles
    ours = together(bench, source, [document] * agents, questions)
    pages = own_pages(document)
    needed, found = agents * (document.size_bytes + pages), room(bench)
    theirs, loads = None, []
    if needed <= found:
        with copied(bench, source, document, agents, path) as (copies, loads):
            theirs = together(bench, source, copies, questions)
        for own, other in zip(ours.tokens, theirs.tokens, strict=True):
            both = min(len(own), len(other))
            if own[:both] != other[:both]:
                raise WrongResult(
                    "wrong result: an agent with a copy of its own has another answer; no time is reported"
                )
    scratch = from_scratch(bench, source, shared, questions)
    return {
        "backend": ours.engine.backend.name,
        "agents": agents,
        "document": document.tokens,
        "seconds": {"step": ours.steps, "step_copied": theirs.steps if theirs else [], "load_copy": loads},
        "step_per_agent_s": statistics.median(ours.steps) / agents,
        "step_copied_per_agent_s": statistics.median(theirs.steps) / agents if theirs else None,
        "extend_s": ours.extend,
        "extend_copied_s": theirs.extend if theirs else None,
        "answer_s": ours.answer,
        "answer_copied_s": theirs.answer if theirs else None,
        "copies": {"measured": theirs is not None, "needed_bytes": needed, "found_bytes": found},
        "bytes_per_agent": document.size_bytes / agents + pages,
        "bytes_per_agent_copied": document.size_bytes + pages,
        "from_scratch": {str(n): seconds for n, seconds in scratch.items()},
        "scratch_per_agent_s": scratch[max(scratch)] / max(scratch),
        "rounding": ours.engine.describe()["rounding"],
    }


def line(shape: dict[str, Any], found: dict[str, Any]) -> str:
    s: dict[str, Any] = {name: statistics.median(v) if v else None for name, v in found["seconds"].items()}
    if shape["part"] == "agents":
        per, copies = found["step_copied_per_agent_s"], found["copies"]
        copied = (
            f"not measured with copies: {cost.render_bytes(copies['needed_bytes'])} of "
            f"{cost.render_bytes(copies['found_bytes'])}"
            if per is None
            else f"{per * 1e3:.3f} ms with copies"
        )
        return (
            f"document {shown(shape)} | step {s['step'] * 1e3:.2f} ms, {found['step_per_agent_s'] * 1e3:.3f} ms an agent, {copied} | "
            f"{cost.render_bytes(found['bytes_per_agent'])} an agent, "
            f"{cost.render_bytes(found['bytes_per_agent_copied'])} with copies | "
            f"from scratch {found['scratch_per_agent_s']:.2f} s an agent, {max(map(int, found['from_scratch']))} at once"
        )
    r = found["ratios"]
    cold = {True: "cold", False: "not cold", None: "cold, not confirmed"}[found["cold"]]
    attach = "" if s["attach"] is None else f", attach {s['attach']:.3f} s"
    if s["copy_pinned"] is not None:
        attach = f", from host {s['copy_pinned'] * 1e3:.1f} ms pinned, {s['copy_pageable'] * 1e3:.1f} ms pageable"
    hosted = ", ".join(f"{r[f'host_{n}']:.2f}x of {n}" for n in HOSTED)
    return (
        f"document {shown(shape)} | {cost.render_bytes(found['kv_bytes'])}, prefill {s['prefill']:.3f} s, save {s['save']:.3f} s, "
        f"load {s['load_cold']:.3f} s {cold}, {s['load_warm']:.3f} s warm{attach}, question {s['question'] * 1e3:.1f} ms, "
        f"step {s['step'] * 1e3:.2f} ms, answer {s['answer']:.2f} s | paper {r['paper']:.1f}x, reader {r['reader']:.2f}x, "
        f"host {hosted}"
    )


# -- all of it ---------------------------------------------------------------------------------------------------------


def shapes(bench: Bench) -> list[dict[str, Any]]:
    """Every cell that is wanted: FIRST_CELLS, then the others; lengths first of each."""
    chosen = bench.options
    kind = {
        "model": model_name(bench),
        "dtype": model_dtype(bench),
        "backend": chosen.backend,
        "invariant": chosen.invariant,
    }
    both = chosen.lengths is None and chosen.agents is None
    lengths: Sequence[int] = chosen.lengths or ((TINY_LENGTHS if chosen.tiny else LENGTHS) if both else ())
    agents: Sequence[int] = chosen.agents or ((TINY_AGENTS if chosen.tiny else AGENTS) if both else ())
    tokens = chosen.document or (TINY_DOCUMENT if chosen.tiny else DOCUMENT)
    cells = [{"part": "length", "P": p, **kind} for p in lengths]
    cells += [{"part": "agents", "B": b, "P": tokens, **kind} for b in agents]
    return sorted(cells, key=lambda cell: cell.get("B", cell["P"]) not in FIRST_CELLS[str(cell["part"])])


def main() -> None:
    bench, began = Bench.start("document", __doc__, extra=options), time.monotonic()
    chosen = bench.options
    bench.resume()
    torch.seed()
    left = [shape for shape in shapes(bench) if not bench.has(shape)]
    if not left:
        return
    source = Source(bench)
    bench_engine.check(source.model, source.tokenizer, chosen.backend, invariant=chosen.invariant, fused=chosen.fuse)
    engine = kvkern.Engine(
        source.model,
        source.tokenizer,
        max_agents=1,
        memory_bytes=(QUESTION + ANSWER + chosen.samples + 64) * model_geometry(source.model).token_bytes(),
        invariant=chosen.invariant,
        backend=chosen.backend,
        fused=chosen.fuse,
    )
    shared: list[Shared] = []
    together_over = {shape["P"] for shape in left if shape["part"] == "agents"}
    with tempfile.TemporaryDirectory(prefix="kvkern-bench-", dir=chosen.scratch) as folder:
        for shape in left:
            if time.monotonic() - began > chosen.seconds:
                break
            try:
                tokens = shape["P"]
                if shape["part"] == "length":
                    keep = shared if tokens in together_over and not shared else None
                    found = by_length(bench, source, engine, tokens, Path(folder), keep)
                else:
                    if not shared:
                        shared.append(agents_share(bench, source, tokens))
                    found = by_agents(bench, source, shared[0], shape["B"], Path(folder) / "shared.kv")
            except FAILURES as error:
                bench.fail(shape, error)
            else:
                bench.keep(shape, found)
                print(line(shape, found), flush=True)
            bench.save()
            gc.collect()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
