"""Process 2 of the demo: a .kv file and questions, never the document's text. Loads, verifies, and lets all agents answer.

A request goes in as JSON on stdin, results come back as lines of JSON on stdout:

    model, dtype, device, threads    as for `opening.open_model`, and torch's threads
    kv, backend                      the .kv file; None: the device decides
    questions, new_tokens            texts, an agent each; tokens of an answer at most
    compared                         indices of the agents that answer again with the document's values zeroed

    {"progress": [what, done, total, note]}      as it comes
    {"answers": [...], "control": [...], ...}    what `_serve` tells last
    {"error": [type, field, {...}]}              a KvkernError; the process then ends with status 1
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kvkern import opening
from kvkern.console import Update
from kvkern.cost import render_bytes
from kvkern.engine import Answer, Engine
from kvkern.errors import KvkernError
from kvkern.geometry import PAGE
from kvkern.identity import model_geometry
from kvkern.publish import Document, load

EXTEND_ROWS = 2048
"""Question rows in one step at least, where there are so many. A step fills forwards of the largest bucket (128 to 512 rows)
one after another, and only its last forward is padded to a smaller bucket: of 8 or more, little of what is computed."""

EXTEND_STEPS = 4
"""Steps in which all agents join: a bar that moves, and decode forwards that are full from the fifth on."""


def serve() -> None:
    """The whole process: a request on stdin, results on stdout, a KvkernError as its fields."""
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
    model, tokenizer = opening.open_model(request["model"], request["dtype"], torch.device(request["device"]))

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
    steps = max(1, min(EXTEND_STEPS, new_tokens // 2))
    return Engine(
        model,
        tokenizer,
        max_agents=len(suffixes),
        memory_bytes=pages * PAGE * model_geometry(model).token_bytes(),
        max_extend_tokens=max(EXTEND_ROWS, -(-sum(map(len, suffixes)) // steps)),
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
