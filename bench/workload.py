"""What the simulator is given: who asks what, the machine and its prices; and traces that are drawn from it.

Every field of Workload, Machine, Prices and Sampling is an option of simulate.py, with its default and its help.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from replica import Replica, Trace
from step_model import StepModel, by_arithmetic

from kvkern.errors import CapacityError, RequestError


def _input(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Workload:
    """Who asks what."""

    agents: float = _input(80e6, "agents in the period, on average; each asks once")
    period_s: float = _input(86400.0, "seconds of the period, which is one wave")
    wave: float = _input(0.6, "the rate is its mean times 1 + wave * sin, in [0, 1)")
    documents: int = _input(1000, "documents that are asked about")
    zipf: float = _input(1.0, "popularity of the n-th document is n ** -zipf")
    document_tokens: int = _input(3774, "tokens of a document, the mean")
    document_spread: float = _input(0.0, "standard deviation of the logarithm of a document's tokens")
    question_tokens: int = _input(16, "tokens of a question")
    answer_tokens: int = _input(64, "tokens of an answer, the mean; at most 4 times as many")
    answer_spread: int = _input(1, "1: lengths of answers are geometric; 0: all are the mean")

    def __post_init__(self) -> None:
        good = {
            "agents": self.agents > 0,
            "period_s": self.period_s > 0,
            "wave": 0 <= self.wave < 1,
            "documents": self.documents >= 1,
            "zipf": self.zipf >= 0,
            "document_tokens": self.document_tokens >= 1,
            "document_spread": 0 <= self.document_spread <= 3,
            "question_tokens": self.question_tokens >= 1,
            "answer_tokens": self.answer_tokens >= 1,
            "answer_spread": self.answer_spread in (0, 1),
        }
        _check(self, good)

    @property
    def longest_answer(self) -> int:
        return 4 * self.answer_tokens if self.answer_spread else self.answer_tokens

    def rate(self, t: np.ndarray) -> np.ndarray:
        """Agents a second, at seconds t; the peak is in the middle of the period."""
        return self.agents / self.period_s * (1 + self.wave * np.sin(2 * np.pi * (t / self.period_s - 0.25)))

    @property
    def peak(self) -> float:
        return self.agents / self.period_s * (1 + self.wave)

    def popularity(self) -> np.ndarray:
        weights = np.arange(1, self.documents + 1, dtype=float) ** -self.zipf
        return weights / weights.sum()

    def lengths(self, seed: int) -> np.ndarray:
        """Tokens of each document."""
        sigma = self.document_spread
        drawn = np.random.default_rng([seed, 1]).lognormal(-sigma * sigma / 2, sigma, self.documents)
        return np.maximum(1, np.rint(self.document_tokens * drawn)).astype(int)


@dataclass(frozen=True)
class Machine:
    """What one replica is made of."""

    parameters: float = _input(4.02e9, "of the model, each 2 flop a row; as Qwen3-4B")
    weight_bytes: float = _input(2.0, "bytes of a parameter")
    token_bytes: float = _input(147456.0, "K and V of one token over all layers; 36 layers, 8 kv heads of 128, 2 bytes")
    attention_flop: float = _input(589824.0, "of one row with one token, over all layers; 4 * 36 * 32 * 128")
    flop_per_s: float = _input(989e12, "of the device, bf16 products by the data sheet of an H100 SXM")
    bytes_per_s: float = _input(3.35e12, "of its memory, by the same")
    efficiency: float = _input(0.5, "share of both that steps reach: assumed")
    memory_bytes: float = _input(80e9, "of the device")
    reserve_bytes: float = _input(8e9, "of it for activations")
    host_bytes: float = _input(512e9, "of host memory that keeps documents")
    host_bytes_per_s: float = _input(50e9, "from host to device: assumed")
    disk_bytes_per_s: float = _input(5e9, "from disk to device: assumed")
    max_agents: int = _input(256, "that run at once, as kvkern.Engine's default")
    max_extend: int = _input(256, "extend rows in one step, as kvkern.Engine's default")
    chunk: int = _input(64, "extend rows of one agent in one step, as kvkern.Engine's")
    prefill_chunk: int = _input(2048, "max_extend and chunk where documents are computed")
    load: float = _input(0.7, "share of the replicas' capacity that the peak needs")
    pools: int = _input(1, "of replicas, each with documents of its own")

    def __post_init__(self) -> None:
        optional = {"host_bytes", "reserve_bytes"}
        good = {f.name: getattr(self, f.name) > 0 or f.name in optional for f in dataclasses.fields(self)}
        _check(self, good | {"load": 0 < self.load < 1})

    @property
    def weights_bytes(self) -> float:
        return self.parameters * self.weight_bytes

    def steps(self) -> StepModel:
        names = ("parameters", "weights_bytes", "token_bytes", "attention_flop")
        rates = ("flop_per_s", "bytes_per_s", "efficiency")
        return by_arithmetic(**{name: getattr(self, name) for name in names + rates})

    def replica(self, policy: str, workload: Workload, seconds: Callable[..., float]) -> Replica:
        """Slots and room for documents follow from memory. Raises CapacityError where nothing fits."""
        own = (workload.question_tokens + workload.longest_answer) * self.token_bytes
        free = self.memory_bytes - self.weights_bytes - self.reserve_bytes
        an_agent = own if policy == "shared" else own + workload.document_tokens * self.token_bytes
        slots = min(self.max_agents, int(free // an_agent)) if free > 0 else 0
        left = free - slots * own
        if slots < 1 or (policy == "shared" and left <= 0):
            raise CapacityError(
                "memory_bytes",
                found=f"{self.memory_bytes:.4g} bytes",
                needed=f"more than weights, reserve and one agent of {an_agent:.4g}",
                do="give more memory, fewer agents, or shorter documents",
            )
        wide = policy == "prefill"
        return Replica(
            policy,
            seconds,
            slots=slots,
            max_extend=self.prefill_chunk if wide else self.max_extend,
            chunk=self.prefill_chunk if wide else min(self.chunk, self.max_extend),
            token_bytes=self.token_bytes,
            device_bytes=left if policy == "shared" else math.inf,
            host_bytes=self.host_bytes,
            host_bytes_per_s=self.host_bytes_per_s,
            disk_bytes_per_s=self.disk_bytes_per_s,
        )


@dataclass(frozen=True)
class Prices:
    """In dollars, and what the user has where the KV is shipped."""

    gpu_hour: float = _input(3.0, "dollars of one replica for an hour: assumed")
    egress_gb: float = _input(0.09, "dollars for 1e9 bytes that leave the host, as in arXiv 2606.13361")
    storage_gb_month: float = _input(0.023, "dollars for 1e9 bytes of documents kept for 30 days: assumed")
    user_bytes_per_s: float = _input(12.5e6, "that a user receives: assumed")
    user_step_s: float = _input(0.296, "a step on the user's machine: an M1 Pro at 3,774 tokens, by arXiv 2606.13361")

    def __post_init__(self) -> None:
        good = {f.name: getattr(self, f.name) >= 0 for f in dataclasses.fields(self)}
        _check(self, good | {"user_bytes_per_s": self.user_bytes_per_s > 0})


@dataclass(frozen=True)
class Sampling:
    """How much of it is simulated."""

    seed: int = _input(0, "of everything that is drawn")
    groups: int = _input(8, "replicas that are sampled, as many of each pool and two at least")
    windows: int = _input(24, "windows of each, spread over the period")
    sampled_agents: float = _input(1e6, "agents that are simulated and counted, about, for each policy")

    def __post_init__(self) -> None:
        good = {"seed": self.seed >= 0, "groups": self.groups >= 2, "windows": self.windows >= 1}
        _check(self, good | {"sampled_agents": self.sampled_agents >= 1})


def _check(inputs: Any, good: dict[str, bool]) -> None:
    for name, well in good.items():
        if not well:
            needed = f"a number in its range ({inputs.__dataclass_fields__[name].metadata['help']})"
            raise RequestError(name, found=getattr(inputs, name), needed=needed, do="give another")


@dataclass(frozen=True)
class Inputs:
    workload: Workload
    machine: Machine
    prices: Prices
    sampling: Sampling


# -- traces ------------------------------------------------------------------------------------------------------------


def parted(popularity: np.ndarray, pools: int) -> np.ndarray:
    """The pool of each document: the most popular first, each to the pool that has least so far."""
    shares, pool = [0.0] * pools, np.zeros(len(popularity), dtype=int)
    for document, share in enumerate(popularity.tolist()):
        pool[document] = least = min(range(pools), key=shares.__getitem__)
        shares[least] += share
    return pool


class Source:
    """Draws the traces of a replica: of one pool, whose replicas share what is asked about its documents evenly."""

    def __init__(self, workload: Workload, seed: int, *, pool: int = 0, pools: int = 1) -> None:
        self.workload = workload
        self.lengths = workload.lengths(seed)
        popularity = workload.popularity()
        mine = parted(popularity, pools) == pool
        if not mine.any():
            found, needed = f"{pools} for {workload.documents} documents", "at most one for each document"
            raise RequestError("pools", found=found, needed=needed, do="take fewer pools")
        self.share = float(popularity[mine].sum())
        self._popularity = popularity * mine / self.share
        self._cumulative = np.cumsum(self._popularity)
        self._last = int(np.flatnonzero(mine)[-1])

    def rate(self, replicas: int) -> float:
        """Agents a second for one of `replicas` of this pool, the mean."""
        return self.workload.agents / self.workload.period_s * self.share / replicas

    def documents(self, rng: np.random.Generator, count: int) -> np.ndarray:
        drawn = np.searchsorted(self._cumulative, rng.random(count), side="right")
        return np.minimum(drawn, self._last)

    def poisson(self, rng: np.random.Generator, begin: float, end: float, replicas: int) -> np.ndarray:
        """Arrivals in [begin, end) by thinning: drawn at the peak's rate, and kept with the chance rate / peak."""
        peak = self.workload.peak
        count = rng.poisson(peak * self.share / replicas * (end - begin))
        times = np.sort(rng.uniform(begin, end, count))
        return times[rng.random(count) * peak < self.workload.rate(times)]

    def trace(self, rng: np.random.Generator, arrival: np.ndarray) -> Trace:
        count, mean = len(arrival), self.workload.answer_tokens
        answer = np.full(count, mean)
        if self.workload.answer_spread:
            answer = np.minimum(rng.geometric(1 / mean, count), self.workload.longest_answer)
        question = np.full(count, self.workload.question_tokens)
        return Trace(arrival, self.documents(rng, count), question, answer, self.lengths)

    def past(self, rng: np.random.Generator, reads: float) -> list[int]:
        """Documents in the order in which so many reads before a window have last touched them: what the caches then hold.

        When independent reads last touched a document is exponential by its popularity, so no read has to be drawn.
        """
        with np.errstate(divide="ignore"):
            age = rng.exponential(size=len(self._popularity)) / self._popularity
        order = np.argsort(-age, kind="stable")
        return order[np.isfinite(age[order]) & (age[order] <= reads)].tolist()
