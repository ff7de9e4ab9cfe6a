"""Seconds of an engine's step as a function of what it holds: measured, fitted, or by arithmetic.

A step is described by five counts, FEATURES, and lasts a constant plus a weight for each, none of them negative:

    decode         rows of agents that have an answer begun: one each, with logits
    extend         rows of questions, or of documents where there is no shared copy
    row_tokens     sum over rows of the tokens before them that many rows multiply at once (a shared document)
    prefix_tokens  tokens of the distinct shared documents, read once a step
    suffix_tokens  sum over agents of tokens in pages of their own, read once for each

`fit` takes samples {rows, extend_rows, prefix, suffix_tokens, seconds}, as `record` keeps them of a real engine.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kvkern.errors import RequestError

FEATURES = ("decode", "extend", "row_tokens", "prefix_tokens", "suffix_tokens")

Clock = Callable[[], float]
"""time.perf_counter; for one thread on a machine that others use too, time.process_time."""


class Seconds(Protocol):
    """What the simulator asks of a model of steps."""

    def __call__(
        self, decode: float, extend: float, row_tokens: float, prefix_tokens: float, suffix_tokens: float
    ) -> float: ...


@dataclass(frozen=True)
class StepModel:
    """constant + weights . FEATURES, in seconds; source says where the weights come from."""

    constant: float
    decode: float = 0.0
    extend: float = 0.0
    row_tokens: float = 0.0
    prefix_tokens: float = 0.0
    suffix_tokens: float = 0.0
    source: str = "given"

    def __call__(
        self, decode: float, extend: float, row_tokens: float, prefix_tokens: float, suffix_tokens: float
    ) -> float:
        return (
            self.constant
            + self.decode * decode
            + self.extend * extend
            + self.row_tokens * row_tokens
            + self.prefix_tokens * prefix_tokens
            + self.suffix_tokens * suffix_tokens
        )

    def prefill_seconds(self, tokens: int, chunk: int) -> float:
        """A document alone, in chunks: each row multiplies with what was read before its chunk."""
        seconds = 0.0
        for begin in range(0, tokens, chunk):
            rows = min(chunk, tokens - begin)
            seconds += self(0, rows, rows * begin, 0, begin + rows)
        return seconds

    def fields(self) -> dict[str, Any]:
        return asdict(self)


def by_arithmetic(
    *,
    parameters: float,
    weights_bytes: float,
    token_bytes: float,
    attention_flop: float,
    flop_per_s: float,
    bytes_per_s: float,
    efficiency: float,
) -> StepModel:
    """A step by what it moves and multiplies, one after the other; nothing of it is measured.

    parameters      of the model: 2 flop each, for every row
    weights_bytes   read once a step
    token_bytes     K and V of one token over all layers
    attention_flop  of one row with one token, over all layers: 4 * layers * num_qo_heads * head_dim
    flop_per_s, bytes_per_s  of the device, by its data sheet
    efficiency      share of both that is reached, in (0, 1]
    """
    if not 0 < efficiency <= 1:
        raise RequestError("efficiency", found=efficiency, needed="a share in (0, 1]", do="give such a number")
    flop, moved = flop_per_s * efficiency, bytes_per_s * efficiency
    row, token = 2 * parameters / flop, token_bytes / moved
    return StepModel(
        constant=weights_bytes / moved,
        decode=row,
        extend=row,
        row_tokens=attention_flop / flop,
        prefix_tokens=token,
        suffix_tokens=token,
        source=f"arithmetic, not measured: {efficiency:g} of {flop_per_s:.4g} flop/s and {bytes_per_s:.4g} B/s",
    )


# -- fitting -----------------------------------------------------------------------------------------------------------


def fit(samples: Sequence[Mapping[str, float]]) -> StepModel:
    """Least squares of errors relative to the prediction, with no weight below zero.

    samples  each {rows, extend_rows, prefix, suffix_tokens, seconds}; rows: all of the step; prefix: tokens of its distinct
             documents; row_tokens where rows have different documents, else rows * prefix

    A feature that never varies apart from the others cannot be told from them: then one of them takes the weight.
    Raises RequestError for fewer samples than weights, for a missing field, and for a number that is negative or not finite.
    """
    least = len(FEATURES) + 1
    if len(samples) < least:
        raise RequestError("samples", found=len(samples), needed=f"at least {least}", do="measure more steps")
    rows = np.array([_features(i, sample) for i, sample in enumerate(samples)])
    seconds = np.array([sample["seconds"] for sample in samples], dtype=float)
    if not (np.isfinite(rows).all() and np.isfinite(seconds).all() and (rows >= 0).all() and (seconds > 0).all()):
        raise RequestError(
            "samples", found="a negative or infinite number", needed="counts, and seconds above 0", do="measure again"
        )
    design = np.hstack([np.ones((len(rows), 1)), rows])
    # By errors relative to what is predicted: relative to the measured seconds, slow outliers would count too little, and the
    # sum of many steps would come out low.
    scale = seconds
    for _ in range(10):
        weights = nonnegative_least_squares(design / scale[:, None], seconds / scale)
        scale = np.maximum(design @ weights, 1e-9)
    return StepModel(*weights.tolist(), source=f"fitted to {len(samples)} measured steps")


def _features(i: int, sample: Mapping[str, float]) -> list[float]:
    try:
        rows, extend, prefix = sample["rows"], sample["extend_rows"], sample["prefix"]
        row_tokens = sample.get("row_tokens", rows * prefix)
        return [rows - extend, extend, row_tokens, prefix, sample["suffix_tokens"]]
    except KeyError as error:
        raise RequestError(
            f"samples[{i}]",
            found=f"no {error.args[0]}",
            needed="rows, extend_rows, prefix, suffix_tokens and seconds",
            do="measure again",
        ) from None


def nonnegative_least_squares(design: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """x >= 0 [n] with the smallest |design x - wanted|, for a design [samples, n] of few columns.

    The best x is the free least-squares solution of its own support, so all 2^n supports are tried: exact for small n.
    """
    columns = design.shape[1]
    scale = np.linalg.norm(design, axis=0)
    scale[scale == 0] = 1.0
    scaled = design / scale
    best, least = np.zeros(columns), float(wanted @ wanted)
    for size in range(1, columns + 1):
        for support in itertools.combinations(range(columns), size):
            chosen = list(support)
            found, _, rank, _ = np.linalg.lstsq(scaled[:, chosen], wanted, rcond=1e-10)
            if rank < size or (found < 0).any():
                continue
            left = wanted - scaled[:, chosen] @ found
            # A larger support has to earn its place: by rounding alone it would always win.
            if (error := float(left @ left)) < least * (1 - 1e-9):
                best, least = np.zeros(columns), error
                best[chosen] = found
    return best / scale


# -- measuring ---------------------------------------------------------------------------------------------------------


def record(engine: Any, clock: Clock, *, copies: bool = False) -> tuple[list[dict[str, float]], Callable[[], None]]:
    """(samples, step): each call of step runs engine.step once, and appends what it held and its seconds.

    copies  each document has one agent, and counts as tokens of its own
    """
    samples: list[dict[str, float]] = []
    held: list[dict[str, float]] = []
    next_step = engine.scheduler.next_step

    def watched() -> Any:
        step = next_step()
        held.append(_describe(step, copies=copies))
        return step

    engine.scheduler.next_step = watched

    def step() -> None:
        held.clear()
        started = clock()
        engine.step()
        seconds = clock() - started
        (sample,) = held
        samples.append(sample | {"seconds": seconds})

    return samples, step


def _describe(step: Iterable[tuple[Any, int]], *, copies: bool) -> dict[str, float]:
    """Counts of a scheduler's step, before it is computed."""
    rows = extend = row_tokens = suffix = 0
    documents: dict[int, int] = {}
    for sequence, own in step:
        # One that is resumed reads its own answer again.
        reads = sequence.remaining > 1 or len(sequence.tokens) == sequence.num_prompt
        rows += own
        extend += own if reads else 0
        # What stands before a chunk in its own pages is multiplied by all its rows, as a document is.
        shared, copied = (0, sequence.node.end) if copies else (sequence.node.end, 0)
        row_tokens += own * (shared + (copied + sequence.computed if reads else 0))
        suffix += copied + sequence.computed + own
        for node in sequence.node.path() if shared else ():
            documents[id(node)] = node.tokens
    return {
        "rows": rows,
        "extend_rows": extend,
        "row_tokens": row_tokens,
        "prefix": sum(documents.values()),
        "suffix_tokens": suffix,
    }


@dataclass(frozen=True)
class Run:
    """One batch of agents that all ask at once: what it is for ("fit" or "judge") and its sizes, in tokens.

    copies  each agent has a copy of the document, loaded from its file, else all share one
    """

    use: str
    agents: int
    document: int
    question: int
    answer: int
    copies: bool = False


def runs(agents: Sequence[int], judged: Sequence[int], *, document: int, answer: int) -> list[Run]:
    """The batches of `--measure`: those to judge between those to fit, since a machine's pace changes in minutes.

    Besides, so that the weights can be told apart: a short document, a long question, a document of 8 times the length (by
    default longer than those that are simulated), and copies of 4 times the length, since tokens that an agent reads for
    itself are few elsewhere.
    """
    few, some, short = min(agents), min(64, max(agents)), min(8, answer)
    both = [Run("fit", count, document, 16, answer) for count in agents]
    both += [Run("judge", count, document, 16, answer) for count in judged]
    apart = [
        Run("fit", few, 64, 16, answer),
        Run("fit", some, 64, 16, short),
        Run("fit", few, 64, 256, short),
        Run("fit", some, 8 * document, 16, short),
        Run("fit", few, 4 * document, 16, short, copies=True),
    ]
    return apart + sorted(both, key=lambda run: run.agents)


def measure(
    model: Any,
    tokenizer: Any,
    run: Run,
    *,
    max_extend_tokens: int,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Let the real engine serve a run: its steps, its makespan by `clock`, and the limits that a simulator needs.

    Questions and document are random token ids, and no answer ends early: the lengths are those of the run.
    """
    import kvkern

    def load(path: Path) -> Any:
        started = time.perf_counter()
        document = kvkern.load(path, model, None)
        loads.append(time.perf_counter() - started)
        return held.enter_context(document)

    loads: list[float] = []
    generator = np.random.default_rng(seed)
    size = model.config.vocab_size
    ids = generator.integers(size, size=run.document).tolist()
    with contextlib.ExitStack() as held:
        document = held.enter_context(kvkern.publish(model, None, ids))
        documents = [document] * run.agents
        if run.copies:
            with tempfile.TemporaryDirectory(prefix="kvkern-bench-") as folder:
                document.save(path := Path(folder) / "document.kv")
                documents = [load(path) for _ in range(run.agents)]
        engine = kvkern.Engine(model, tokenizer, max_agents=run.agents, max_extend_tokens=max_extend_tokens)
        samples, step = record(engine, clock, copies=run.copies)
        requests = [
            engine.submit(
                own,
                generator.integers(size, size=run.question).tolist(),
                index=i,
                max_new_tokens=run.answer,
                do_sample=False,
                eos_token_ids=(),
            )
            for i, own in enumerate(documents)
        ]
        started = clock()
        while any(request.answer is None for request in requests):
            step()
        makespan = clock() - started
        size_bytes = document.size_bytes
    assert all(len(request.new_tokens) == run.answer for request in requests), "no answer ends early"
    return {
        **asdict(run),
        "slots": engine.scheduler.max_agents,
        "max_extend": engine.scheduler.max_extend_tokens,
        "chunk": engine.scheduler.chunk,
        "kv_bytes": size_bytes,
        "load_s": loads,
        "preemptions": sum(request.suffix.preemptions for request in requests),
        "makespan_s": makespan,
        "steps": samples,
    }
