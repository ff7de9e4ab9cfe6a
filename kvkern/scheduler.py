"""Scheduler: who has rows in the next step. A queue, admission by pages, bounded extend rows, preemption of the youngest.

It keeps books on the host and touches no tensor. A sequence is the suffix of one request: its question and what it has
answered so far. Waiting, it holds nothing; running, it holds a slot of the pool and pages for all tokens it has. Tokens
whose KV is not in pages yet are extended in chunks that end at multiples of `chunk`, counted from the suffix's own token 0;
the single newest token of a sequence is a decode row.

    step = scheduler.next_step()        [(sequence, rows)]; pages are reserved
    ... forward, which advances the pool's lengths (Plan.begin) ...
    scheduler.commit(step)              a sequence with nothing left to compute then takes its next token, or finishes

Every running sequence advances in every step unless it is preempted, and the oldest never is, so whoever waits gets its turn.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvkern.errors import CapacityError, RequestError
from kvkern.geometry import PAGE

EXTEND_CHUNK = 64
"""Suffix tokens in a chunk, where a limit is not smaller."""

HEADROOM = 8
"""One page for so many running sequences stays free at admission: two steps' growth, since each takes a page every 16. With
none, the newest would be preempted in the very next step, and its extend rows lost."""

WAITING, RUNNING, FINISHED = "waiting", "running", "finished"


class Pool(Protocol):
    """What the scheduler asks of a PagePool."""

    num_pages: int
    slots: int
    max_pages_per_slot: int

    @property
    def free_pages(self) -> int: ...
    @property
    def free_slots(self) -> int: ...
    def acquire_slot(self) -> int: ...
    def release_slot(self, slot: int) -> None: ...
    def reserve(self, slot: int, tokens: int) -> None: ...
    def pages_needed(self, slot: int, tokens: int) -> int: ...


@dataclass(eq=False)
class Sequence:
    """The suffix of one request.

    id              the caller's name for it
    tokens          suffix token ids so far: the question, then what was generated; the caller appends
    max_new_tokens  tokens it may generate
    node            leaf of its path of prefixes; the caller's own, never looked at here
    num_prompt      tokens of the question
    computed        leading tokens whose KV is in pages
    slot            of the pool, while it runs
    arrival         number of its submission: order of service, and of age
    state           "waiting", "running" or "finished"
    preemptions     times it lost its pages
    """

    id: Any
    tokens: list[int]
    max_new_tokens: int
    node: Any = None
    num_prompt: int = field(init=False)
    computed: int = field(default=0, init=False)
    slot: int | None = field(default=None, init=False)
    arrival: int = field(default=-1, init=False)
    state: str = field(default="new", init=False)
    preemptions: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.tokens) - self.computed


Step = list[tuple[Sequence, int]]


class Scheduler:
    """Decides the rows of each step.

    pool               where slots and pages come from
    max_rows           rows in one step, decode and extend together
    max_extend_tokens  extend rows in one step
    max_agents         sequences that run at once; at most the pool's slots and max_rows
    max_queue          sequences that may wait; None: any number
    max_chunk          rows that one sequence brings to a step at most (a forward may hold fewer rows than a step)
    """

    def __init__(
        self,
        pool: Pool,
        *,
        max_rows: int,
        max_extend_tokens: int,
        max_agents: int,
        max_queue: int | None = None,
        max_chunk: int = EXTEND_CHUNK,
    ) -> None:
        limits = {
            "max_rows": max_rows,
            "max_extend_tokens": max_extend_tokens,
            "max_agents": max_agents,
            "max_chunk": max_chunk,
        }
        for name, value in limits.items():
            if value < 1:
                raise RequestError(name, found=value, needed="at least 1", do=f"give a larger {name}")
        self.pool = pool
        self.max_rows = max_rows
        self.max_extend_tokens = max_extend_tokens
        self.max_agents = min(max_agents, pool.slots, max_rows)
        self.max_queue = max_queue
        # A function of the engine's limits, never of the batch: a resumed sequence is cut where it was.
        self.chunk = min(max_chunk, max_extend_tokens, max_rows)
        self.waiting: list[Sequence] = []
        """In arrival order."""
        self.running: list[Sequence] = []
        """In arrival order."""
        self._arrivals = 0

    @property
    def unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    # -- coming and going ------------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue.

        Raises RequestError for one without tokens or submitted before, CapacityError for a full queue, or for a sequence
        that the pool could not hold to its end even alone; then nothing has changed.
        """
        if sequence.state != "new" or not sequence.tokens:
            found = "no tokens" if not sequence.tokens else f"one that is {sequence.state}"
            raise RequestError(
                "request", found=found, needed="a new one with at least one token", do="submit each question once"
            )
        # The last new token is never attended to, so it needs no page.
        tokens = len(sequence.tokens) + max(sequence.max_new_tokens - 1, 0)
        pages, most = -(-tokens // PAGE), min(self.pool.num_pages, self.pool.max_pages_per_slot)
        if pages > most:
            raise CapacityError(
                "pages of one agent",
                found=f"{pages} for {len(sequence.tokens)} suffix tokens and {sequence.max_new_tokens} new ones",
                needed=f"at most {most}",
                do="ask for fewer new tokens, or give the pool more pages",
            )
        if self.max_queue is not None and len(self.waiting) >= self.max_queue:
            raise CapacityError(
                "queue",
                found=f"{len(self.waiting)} waiting",
                needed=f"fewer than {self.max_queue}",
                do="submit again when some have finished",
            )
        sequence.arrival, sequence.state = self._arrivals, WAITING
        self._arrivals += 1
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Give back all that the sequence holds, in whatever state it is; once more does nothing.

        It looks where the sequence is, and not at its state: Ctrl-C may come while it is on its way from one queue to the other.
        """
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        if sequence.slot is not None:
            self._release(sequence)
        sequence.state = FINISHED

    def cancel(self, sequence: Sequence) -> None:
        """The same as finish: a sequence that goes away, running or not, leaves nothing behind."""
        self.finish(sequence)

    # -- a step ----------------------------------------------------------------------------------------------------

    def next_step(self) -> Step:
        """The rows of the next step, with pages reserved; empty only if nothing is unfinished.

        Everyone who runs advances: by a decode row, or by the next chunk of an extend. Then those who wait are admitted in
        the order of their arrival, as far as rows, extend rows, slots and pages allow.
        """
        step: Step = []
        for sequence in tuple(self.running):
            # Those before it in arrival order are served; only those after it can be preempted for it.
            if sequence.state == RUNNING and self._reserve(sequence, self._next_rows(sequence)):
                step.append((sequence, self._next_rows(sequence)))
        rows_left = self.max_rows - sum(rows for _, rows in step)
        extend_left = self.max_extend_tokens - sum(rows for sequence, rows in step if sequence.remaining > 1)
        # Who was admitted needs no more rows in a later step than in its first, so the limits hold for all who run.
        assert rows_left >= 0 and extend_left >= 0

        while self.waiting:
            sequence = self.waiting[0]
            rows = self._next_rows(sequence)
            extend = rows if sequence.remaining > 1 else 0
            # A chunk that does not fit whole waits: cuts stay at their fixed places.
            if rows > rows_left or extend > extend_left or not self.admit(sequence):
                break
            step.append((sequence, rows))
            rows_left, extend_left = rows_left - rows, extend_left - extend
        return step

    def commit(self, step: Step) -> None:
        """Count the rows of a step that has been computed. Sequences that went away meanwhile are passed over."""
        for sequence, rows in step:
            if sequence.state == RUNNING:
                sequence.computed += rows

    def admit(self, sequence: Sequence) -> bool:
        """Let the head of the queue run, with pages for all tokens it has; False while there is no room.

        No room: max_agents are running, no slot is free, or admission would leave less than one free page for every 8
        running sequences. Admission never preempts, and nobody overtakes the head of the queue, so the order of arrival
        is the order of service.
        """
        headroom = -(-len(self.running) // HEADROOM)
        pages = -(-len(sequence.tokens) // PAGE)
        if len(self.running) >= self.max_agents or not self.pool.free_slots or self.pool.free_pages < pages + headroom:
            return False
        sequence.slot = self.pool.acquire_slot()
        self.pool.reserve(sequence.slot, len(sequence.tokens))
        self.waiting.remove(sequence)
        sequence.state = RUNNING
        insort(self.running, sequence, key=lambda s: s.arrival)
        return True

    def preempt(self) -> Sequence:
        """Take slot and pages from the youngest running sequence, and put it back into the queue by its arrival.

        Its tokens stay; when it is admitted again they are extended, in the same chunks. That costs its suffix alone,
        since the document is shared, and changes no bit, since a row's bits do not depend on the batch.
        """
        sequence = self.running.pop()
        self._release(sequence)
        sequence.computed, sequence.state = 0, WAITING
        sequence.preemptions += 1
        insort(self.waiting, sequence, key=lambda s: s.arrival)
        return sequence

    def _reserve(self, sequence: Sequence, rows: int) -> bool:
        """Pages for the next rows, if need be those of younger sequences; False if the sequence had to give up its own."""
        assert sequence.slot is not None
        needed = self.pool.pages_needed(sequence.slot, rows)
        while needed > self.pool.free_pages and len(self.running) > 1:
            if self.preempt() is sequence:
                return False
        self.pool.reserve(sequence.slot, rows)
        return True

    def _next_rows(self, sequence: Sequence) -> int:
        """Rows up to the next fixed cut, or to the end."""
        assert sequence.remaining > 0, "a sequence with nothing to compute takes its next token or finishes"
        return min(self.chunk - sequence.computed % self.chunk, sequence.remaining)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.pool.release_slot(sequence.slot)
        sequence.slot = None
