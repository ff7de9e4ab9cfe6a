"""One replica of the simulator: a queue, an engine's steps, documents that are loaded and evicted.

`serve` is a plain loop over steps, some microseconds for each agent; replica_exact.py says the same by processes of simpy, and
tests hold the two against each other, agent by agent.

What a replica does with an agent that asks about document d:

    shared   waits until the one copy of d is on the device (hit, or a load that others may wait for too), then for a slot
    copies   waits for a slot, then for a copy of d's KV of its own, loaded over the same link
    prefill  waits for a slot, then computes all of d in its own pages

A step is as in kvkern's scheduler: one row for each agent that has begun to answer, the next chunk of each that is being
extended, and, in the order of arrival, whoever waits as far as slots and extend rows allow; a chunk that does not fit waits.
The end of the last chunk gives the first token. Loads run beside the steps, one after the other; a document that an agent
has asked for is not evicted until that agent has its answer.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from step_model import Seconds

from kvkern.errors import CapacityError, RequestError

POLICIES = ("prefill", "copies", "shared")


class Cache:
    """Documents by bytes; when there is no room, the least recently used that nobody holds goes."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.used = 0.0
        self._sizes: OrderedDict[int, float] = OrderedDict()

    def __contains__(self, document: int) -> bool:
        return document in self._sizes

    def __iter__(self) -> Generator[int, None, None]:
        """From the least recently used to the most."""
        yield from self._sizes

    def touch(self, document: int) -> bool:
        """Whether it is there; then it is the most recently used."""
        if document not in self._sizes:
            return False
        self._sizes.move_to_end(document)
        return True

    def put(self, document: int, size: float, held: Collection[int] = ()) -> bool:
        """Take in a new document, evicting as many as needed; False, with nothing changed, if those in `held` leave no room."""
        leaving, free = [], self.capacity - self.used
        for other, freed in self._sizes.items():
            if free >= size:
                break
            if other not in held:
                leaving.append(other)
                free += freed
        if free < size:
            return False
        for other in leaving:
            self.used -= self._sizes.pop(other)
        self._sizes[document] = size
        self.used += size
        return True


class Trace(NamedTuple):
    """Who asks: four arrays, one element an agent, and the length of each document, in tokens.

    arrival   seconds, ascending
    document  index into document_tokens
    question, answer  tokens, at least 1
    """

    arrival: np.ndarray
    document: np.ndarray
    question: np.ndarray
    answer: np.ndarray
    document_tokens: np.ndarray

    def check(self) -> None:
        """Raises RequestError naming the array."""
        count = len(self.arrival)
        needs = {
            "arrival": bool((np.diff(self.arrival) >= 0).all() and np.isfinite(self.arrival).all()),
            "document": bool(((self.document >= 0) & (self.document < len(self.document_tokens))).all()),
            "question": bool((self.question >= 1).all()),
            "answer": bool((self.answer >= 1).all()),
            "document_tokens": bool((self.document_tokens >= 1).all()),
        }
        for name in ("document", "question", "answer"):
            needs[name] = needs[name] and len(getattr(self, name)) == count
        for name, good in needs.items():
            if not good:
                needed = f"{count} numbers in their range, arrivals ascending"
                raise RequestError(f"trace.{name}", found="others", needed=needed, do="draw the trace again")


@dataclass(frozen=True)
class Replica:
    """What one replica has.

    policy        "prefill", "copies" or "shared"
    seconds       a model of steps
    slots         agents that run at once
    max_extend    extend rows in one step
    chunk         rows that one agent brings to a step at most
    token_bytes   K and V of one token over all layers
    device_bytes  for shared documents
    host_bytes    of memory that documents are loaded from, the least recently asked for going first; others come from the disk
    host_bytes_per_s, disk_bytes_per_s  of a load
    """

    policy: str
    seconds: Seconds
    slots: int = 256
    max_extend: int = 256
    chunk: int = 64
    token_bytes: float = 1.0
    device_bytes: float = math.inf
    host_bytes: float = math.inf
    host_bytes_per_s: float = math.inf
    disk_bytes_per_s: float = math.inf

    def check(self, trace: Trace) -> None:
        """Raises RequestError for a limit out of range, CapacityError for a document that never fits."""
        trace.check()
        if self.policy not in POLICIES:
            needed = ", ".join(POLICIES)
            raise RequestError("policy", found=self.policy, needed=f"one of {needed}", do="name one of these")
        for name in ("slots", "max_extend", "chunk", "token_bytes", "host_bytes_per_s", "disk_bytes_per_s"):
            value = getattr(self, name)
            if not value > 0:
                raise RequestError(name, found=value, needed="more than 0", do=f"give a larger {name}")
        if self.chunk > self.max_extend:
            needed = f"at most max_extend = {self.max_extend}"
            raise RequestError("chunk", found=self.chunk, needed=needed, do="give a smaller chunk")
        longest = float(trace.document_tokens.max(initial=0)) * self.token_bytes
        if self.policy == "shared" and longest > self.device_bytes:
            raise CapacityError(
                "device_bytes",
                found=self.device_bytes,
                needed=f"at least {longest:.0f}, the longest document",
                do="give the device more memory, or shorter documents",
            )


@dataclass
class Served:
    """What became of each agent, and what the replica did. Times in seconds; NaN: not yet.

    first, end      when an agent's first token came, and its last
    queued          agents in the system without a step, as each agent found them when it came
    steps, busy_s   engine steps, and seconds in them
    step_ends, step_busy, step_rows  end of each step, busy seconds up to it, and its decode rows
    agent_seconds, queue_seconds  integrals over time of agents in the system, and of those queued
    loaded_for      whether a load was begun for an agent
    loads, disk_loads  loads in all, and how many of them from the disk
    end_s           when it stopped
    """

    first: np.ndarray
    end: np.ndarray
    queued: np.ndarray
    steps: int
    busy_s: float
    step_ends: np.ndarray
    step_busy: np.ndarray
    step_rows: np.ndarray
    agent_seconds: float
    queue_seconds: float
    loaded_for: np.ndarray
    disk_loads: int
    end_s: float

    @property
    def loads(self) -> int:
        return int(self.loaded_for.sum())


def warmed(replica: Replica, trace: Trace, warm: Iterable[int]) -> tuple[Cache, Cache]:
    """Device and host as earlier reads have left them."""
    device, host = Cache(replica.device_bytes), Cache(replica.host_bytes)
    sizes = (trace.document_tokens * replica.token_bytes).tolist()
    for document in warm:
        for cache in (device, host):
            if not cache.touch(document) and sizes[document] <= cache.capacity:
                cache.put(document, sizes[document])
    return device, host


def serve(replica: Replica, trace: Trace, *, warm: Iterable[int] = (), until: float = math.inf) -> Served:
    """Serve a trace to its end, or until a step would begin at or after `until`, in seconds.

    warm  documents that were read before, in order

    Raises RequestError or CapacityError before it begins.
    """
    replica.check(trace)
    return _Loop(replica, trace, warm).run(until)


@dataclass(slots=True)
class _Reader:
    """An agent before its first token: tokens in its own pages, how many it needs there, and those of a shared document."""

    agent: int
    computed: int
    wanted: int
    shared: int


class _Loop:
    """The state of `serve`."""

    def __init__(self, replica: Replica, trace: Trace, warm: Iterable[int]) -> None:
        self.replica = replica
        self.shared, self.copies = replica.policy == "shared", replica.policy == "copies"
        self.device, self.host = warmed(replica, trace, warm)
        self.arrival: list[float] = trace.arrival.tolist()
        self.document: list[int] = trace.document.tolist()
        self.tokens: list[int] = trace.document_tokens.tolist()
        self.question: list[int] = trace.question.tolist()
        self.answer: list[int] = trace.answer.tolist()
        count = len(self.arrival)
        self.first, self.end = [math.nan] * count, [math.nan] * count
        self.found, self.loaded_for = [0] * count, [False] * count
        self.coming = 0
        self.slots = replica.slots
        self.waiting: deque[int] = deque()
        """Agents that need nothing but rows, and a slot unless they have one."""
        self.no_slot: deque[int] = deque()
        """Of policy copies: agents that wait for one."""
        self.holds: dict[int, int] = defaultdict(int)
        """Agents, and loads, that need a document to stay."""
        self.wanted: dict[int, list[int]] = {}
        """Agents that wait for a document."""
        self.loads: deque[int] = deque()
        self.loading: int | None = None
        self.load_end = math.inf
        self.disk_loads = 0
        self.present = self.queued = 0
        self.last = self.agent_seconds = self.queue_seconds = 0.0

        self.step = 0
        self.extending: list[_Reader] = []
        self.ends: defaultdict[int, list[int]] = defaultdict(list)
        """Agents by the step that gives them their last token."""
        self.decode = self.decode_shared = self.decode_own = 0
        """Agents that answer; tokens of their shared documents; tokens in their own pages."""
        self.active: dict[int, int] = {}
        """Agents in steps, by shared document."""
        self.active_tokens = 0

    # -- between steps ---------------------------------------------------------------------------------------------

    def _count(self, now: float) -> None:
        self.agent_seconds += self.present * (now - self.last)
        self.queue_seconds += self.queued * (now - self.last)
        self.last = now

    def _advance(self, now: float) -> None:
        """All arrivals and ends of loads up to now, in their order."""
        count, arrival = len(self.arrival), self.arrival
        while True:
            coming = arrival[self.coming] if self.coming < count else math.inf
            if self.load_end <= now and self.load_end <= coming:
                self._loaded(self.load_end)
            elif coming <= now:
                self._arrive(coming)
            else:
                return

    def _arrive(self, now: float) -> None:
        i = self.coming
        self.coming += 1
        self._count(now)
        self.found[i] = self.queued
        self.present += 1
        self.queued += 1
        if self.copies:
            self.no_slot.append(i)
            self._give_slots(now)
        elif not self.shared:
            self.waiting.append(i)
        else:
            document = self.document[i]
            self.holds[document] += 1
            self.host.touch(document)
            if document in self.wanted:
                self.wanted[document].append(i)
            elif self.device.touch(document):
                self.waiting.append(i)
            else:
                self.wanted[document] = [i]
                self.loaded_for[i] = True
                self.loads.append(document)
                self._load(now)

    def _give_slots(self, now: float) -> None:
        while self.slots and self.no_slot:
            self.slots -= 1
            self.loads.append(self.no_slot.popleft())
        self._load(now)

    def _load(self, now: float) -> None:
        """Begin the next load, if the link is free and the device has room."""
        if self.loading is not None or not self.loads:
            return
        head = self.loads[0]
        document = head if self.shared else self.document[head]
        size = self.tokens[document] * self.replica.token_bytes
        if self.shared and not self.device.put(document, size, self.holds):
            return
        self.loads.popleft()
        self.loading = head
        if not self.shared:
            self.loaded_for[head] = True
        if self.host.touch(document):
            self.load_end = now + size / self.replica.host_bytes_per_s
        else:
            self.disk_loads += 1
            if size <= self.host.capacity:
                self.host.put(document, size)
            self.load_end = now + size / self.replica.disk_bytes_per_s

    def _loaded(self, now: float) -> None:
        assert self.loading is not None
        if self.shared:
            self.device.touch(self.loading)
            self.waiting.extend(self.wanted.pop(self.loading))
        else:
            self.waiting.append(self.loading)
        self.loading, self.load_end = None, math.inf
        self._load(now)

    def _release(self, ended: Sequence[int], now: float) -> None:
        """Slots and documents of agents that have their answers."""
        self._count(now)
        for i in ended:
            self.end[i] = now
            self.present -= 1
            self.slots += 1
            if self.shared:
                document = self.document[i]
                self.holds[document] -= 1
                if not self.holds[document]:
                    del self.holds[document]
        if self.copies:
            self._give_slots(now)
        else:
            self._load(now)

    # -- steps -----------------------------------------------------------------------------------------------------

    def run(self, until: float) -> Served:
        seconds = self.replica.seconds
        busy = now = 0.0
        step_ends: list[float] = []
        step_busy: list[float] = []
        step_rows: list[int] = []
        while True:
            self._advance(now)
            if not (self.decode or self.extending or self.waiting):
                coming = self.arrival[self.coming] if self.coming < len(self.arrival) else math.inf
                now = min(coming, self.load_end)
                if now >= until or now == math.inf:
                    break
                continue
            if now >= until:
                break
            self.step += 1
            self.decode_own += self.decode
            extend, row_tokens, own_tokens = self._extend(now)
            row_tokens, own_tokens = row_tokens + self.decode_shared, own_tokens + self.decode_own
            took = seconds(self.decode, extend, row_tokens, self.active_tokens, own_tokens)
            step_rows.append(self.decode)
            busy += took
            now += took
            step_ends.append(now)
            step_busy.append(busy)
            self._advance(now)
            if self.extending:
                self._begin_answers(now)
            if self.step in self.ends:
                self._end_answers(now)
        self._count(min(now, until) if now != math.inf else self.last)
        return Served(
            first=np.array(self.first),
            end=np.array(self.end),
            queued=np.array(self.found),
            steps=self.step,
            busy_s=busy,
            step_ends=np.array(step_ends),
            step_busy=np.array(step_busy),
            step_rows=np.array(step_rows),
            agent_seconds=self.agent_seconds,
            queue_seconds=self.queue_seconds,
            loaded_for=np.array(self.loaded_for, dtype=bool),
            disk_loads=self.disk_loads,
            end_s=self.last,
        )

    def _extend(self, now: float) -> tuple[int, int, int]:
        """(rows, row_tokens, suffix_tokens) of all that are being extended in this step, those admitted now included."""
        chunk, budget = self.replica.chunk, self.replica.max_extend
        for reader in self.extending:
            left = reader.wanted - reader.computed
            budget -= min(chunk, left) if left > 1 else 0
        if self.waiting and (self.slots or self.copies):
            self._count(now)
            self._admit(budget)
        extend = row_tokens = own_tokens = 0
        for reader in self.extending:
            rows = min(chunk, reader.wanted - reader.computed)
            extend += rows
            row_tokens += rows * (reader.shared + reader.computed)
            reader.computed += rows
            own_tokens += reader.computed
        return extend, row_tokens, own_tokens

    def _admit(self, budget: int) -> None:
        """Those who wait, in their order, as far as slots and so many extend rows allow."""
        chunk, shared, copies = self.replica.chunk, self.shared, self.copies
        while self.waiting and (self.slots or copies):
            i = self.waiting[0]
            length = self.tokens[self.document[i]]
            computed = length if copies else 0
            wanted = self.question[i] + (0 if shared else length)
            if wanted - computed > 1:
                rows = min(chunk, wanted - computed)
                if rows > budget:
                    return
                budget -= rows
            self.waiting.popleft()
            self.queued -= 1
            if not copies:
                self.slots -= 1
            if shared:
                self._use(i, 1)
            self.extending.append(_Reader(i, computed, wanted, length if shared else 0))

    def _use(self, i: int, more: int) -> None:
        """One agent more, or less, in steps over its shared document."""
        document = self.document[i]
        agents = self.active.pop(document, 0)
        if not agents:
            self.active_tokens += self.tokens[document]
        if agents + more:
            self.active[document] = agents + more
        else:
            self.active_tokens -= self.tokens[document]

    def _begin_answers(self, now: float) -> None:
        """The first token of all whose last chunk this step was."""
        still = []
        for reader in self.extending:
            if reader.computed < reader.wanted:
                still.append(reader)
                continue
            self.first[reader.agent] = now
            self.ends[self.step + self.answer[reader.agent] - 1].append(reader.agent)
            self.decode += 1
            self.decode_own += reader.wanted
            self.decode_shared += reader.shared
        self.extending = still

    def _end_answers(self, now: float) -> None:
        """The last token of all whom this step gave it."""
        ended = self.ends.pop(self.step)
        for i in ended:
            length = self.tokens[self.document[i]]
            self.decode -= 1
            self.decode_own -= self.question[i] + self.answer[i] - 1 + (0 if self.shared else length)
            if self.shared:
                self.decode_shared -= length
                self._use(i, -1)
        self._release(ended, now)
