"""Scheduler: no page is lost whatever happens, the oldest always advances, and a step keeps its limits and its cuts."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvkern import scheduler as scheduler_module
from kvkern.errors import CapacityError, RequestError
from kvkern.geometry import PAGE, Geometry
from kvkern.pages import PagePool
from kvkern.scheduler import EXTEND_CHUNK, FINISHED, RUNNING, WAITING, Scheduler, Sequence

GEOMETRY = Geometry(1, 1, 1, 16, torch.float32)


def make(num_pages=8, slots=4, max_rows=64, max_extend_tokens=64, max_agents=4, **options) -> Scheduler:
    pool = PagePool(GEOMETRY, num_pages, slots=slots, debug=True)
    return Scheduler(pool, max_rows=max_rows, max_extend_tokens=max_extend_tokens, max_agents=max_agents, **options)


def ask(scheduler, prompt, new, id=None) -> Sequence:
    sequence = Sequence(id, list(range(prompt)), new)
    scheduler.submit(sequence)
    return sequence


def forward(scheduler, step):
    """What an engine does with a step: the plan counts its rows, the next token is taken, who has enough is finished."""
    for sequence, rows in step:
        if sequence.state == RUNNING:
            scheduler.pool.advance(sequence.slot, rows)
    scheduler.commit(step)
    for sequence, _ in step:
        if sequence.state == RUNNING and sequence.remaining == 0:
            if len(sequence.tokens) - sequence.num_prompt < sequence.max_new_tokens:
                sequence.tokens.append(1000)
            if len(sequence.tokens) - sequence.num_prompt >= sequence.max_new_tokens:
                scheduler.finish(sequence)


def drain(scheduler, steps=10_000) -> list[list[tuple[object, int]]]:
    taken = []
    while scheduler.unfinished:
        step = scheduler.next_step()
        assert step, "a step in which nothing advances"
        taken.append([(s.id, rows) for s, rows in step])
        assert len(taken) < steps
        forward(scheduler, step)
    assert scheduler.pool.free_pages == scheduler.pool.num_pages
    assert scheduler.pool.free_slots == scheduler.pool.slots
    return taken


class Life(RuleBasedStateMachine):
    """Requests come, run, are cancelled at any moment, finish early or late; the pool is too small for all of them."""

    @initialize(
        num_pages=st.integers(1, 12),
        slots=st.integers(1, 6),
        max_rows=st.integers(1, 40),
        max_extend_tokens=st.integers(1, 40),
        max_agents=st.integers(1, 6),
    )
    def start(self, **options):
        self.scheduler = make(**options)
        self.pool = self.scheduler.pool
        self.all: list[Sequence] = []
        self.pending = None

    @rule(prompt=st.integers(1, 60), new=st.integers(0, 60))
    def submit(self, prompt, new):
        pages = -(-(prompt + max(new - 1, 0)) // PAGE)
        sequence = Sequence(len(self.all), list(range(prompt)), new)
        if pages > self.pool.num_pages:
            with pytest.raises(CapacityError, match=r"^pages of one agent: found \d+ for"):
                self.scheduler.submit(sequence)
            assert sequence not in self.scheduler.waiting
        else:
            self.scheduler.submit(sequence)
            self.all.append(sequence)

    @rule(data=st.data(), between=st.booleans())
    def step(self, data, between):
        """With `between`, a request is cancelled after the step was made and before it is counted."""
        unfinished = [s for s in self.all if s.state != FINISHED]
        before = {s: (s.computed, s.state) for s in unfinished}
        step = self.scheduler.next_step()
        self.check_step(step, unfinished, before)
        if between and step:
            self.scheduler.cancel(data.draw(st.sampled_from([s for s, _ in step])))
        forward(self.scheduler, step)

    def check_step(self, step, unfinished, before):
        s = self.scheduler
        assert bool(step) == bool(unfinished)
        assert len({sequence for sequence, _ in step}) == len(step)
        assert sum(rows for _, rows in step) <= s.max_rows
        assert sum(rows for q, rows in step if q.remaining > 1) <= s.max_extend_tokens
        if unfinished:
            oldest = min(unfinished, key=lambda q: q.arrival)
            assert oldest in [q for q, _ in step] and oldest.state == RUNNING
            # Nobody older loses its pages to somebody younger: who ran and still runs is older than who was preempted.
            lost = [q.arrival for q in unfinished if before[q][1] == RUNNING and q.state == WAITING]
            assert all(q.arrival < min(lost) for q in s.running if before[q][1] == RUNNING) if lost else True
        assert [q for q, _ in step] == s.running, "everyone who runs advances, in order of arrival"
        for q, rows in step:
            assert q.state == RUNNING and 1 <= rows <= min(s.chunk, q.remaining)
            assert (q.computed + rows) % s.chunk == 0 or rows == q.remaining
            assert self.pool.pages_needed(q.slot, rows) == 0
            assert q.computed == (before[q][0] if before[q][1] == RUNNING else 0)

    @rule(data=st.data())
    def cancel(self, data):
        if self.all:
            self.scheduler.cancel(data.draw(st.sampled_from(self.all)))

    @rule(data=st.data())
    def finish_early(self, data):
        if self.scheduler.running:
            self.scheduler.finish(data.draw(st.sampled_from(self.scheduler.running)))

    @invariant()
    def books_are_right(self):
        s = self.scheduler
        tables = [self.pool.table(q.slot) for q in s.running]
        held = [page for table in tables for page in table]
        assert len(held) == len(set(held)) == self.pool.num_pages - self.pool.free_pages
        assert len({q.slot for q in s.running}) == len(s.running) == self.pool.slots - self.pool.free_slots
        assert len(s.running) <= s.max_agents
        assert all(q.state == RUNNING and self.pool.length(q.slot) == q.computed for q in s.running)
        assert all(q.state == WAITING and q.slot is None and q.computed == 0 for q in s.waiting)
        assert set(s.running) | set(s.waiting) == {q for q in self.all if q.state != FINISHED}
        order = [q.arrival for q in s.running + s.waiting]
        assert order == sorted(order), "service in order of arrival"

    def teardown(self):
        if hasattr(self, "scheduler"):
            drain(self.scheduler)


Life.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase


# -- one by one --------------------------------------------------------------------------------------------------------


def test_decode_rows_and_extend_rows_share_a_step_within_its_limits():
    s = make(num_pages=40, slots=8, max_agents=8, max_rows=40, max_extend_tokens=32)
    old = ask(s, 5, 9)
    forward(s, s.next_step())
    first, second, third = (ask(s, prompt, 9) for prompt in (20, 20, 12))
    # 20 + 12 extend rows fit; but nobody overtakes, and the chunk of `second` waits whole.
    assert s.next_step() == [(old, 1), (first, 20)]
    assert second.state == third.state == WAITING
    forward(s, [(old, 1), (first, 20)])
    assert s.next_step() == [(old, 1), (first, 1), (second, 20), (third, 12)]


def test_chunks_end_at_fixed_places_of_the_suffix():
    s = make(num_pages=20, max_rows=512, max_extend_tokens=512)
    ask(s, 2 * EXTEND_CHUNK + 7, 2)
    assert drain(s) == [[(None, EXTEND_CHUNK)], [(None, EXTEND_CHUNK)], [(None, 7)], [(None, 1)]]


def test_a_resumed_sequence_is_cut_where_it_was():
    s = make(num_pages=9, max_rows=512, max_extend_tokens=512, max_chunk=32)
    ask(s, 15, 30, "old")
    young = ask(s, 84, 30, "young")
    rows = [row for step in drain(s) for name, row in step if name == "young"]
    assert young.preemptions == 1
    again = rows.index(32, 3)
    tokens = 84 + again - 3 + 1  # the question, a token from its last chunk, and one from each decode row
    assert rows[:3] == [32, 32, 20] and rows[3:again] == [1] * (again - 3)
    assert rows[again : again + 4] == [32, 32, 32, tokens - 96] and set(rows[again + 4 :]) == {1}


def test_limits_smaller_than_a_chunk_make_the_chunk_smaller():
    assert make(max_extend_tokens=1).chunk == 1
    assert make(max_rows=5).chunk == 5
    assert make(max_chunk=7).chunk == 7
    s = make(max_extend_tokens=1)
    ask(s, 4, 2)
    assert drain(s) == [[(None, 1)]] * 5


def test_when_pages_run_out_the_youngest_gives_up_its_own_and_goes_back_by_arrival():
    s = make(num_pages=4, slots=3, max_agents=3)
    a, b, c = (ask(s, 15, 20, name) for name in "abc")
    forward(s, s.next_step())
    d = ask(s, 3, 2, "d")
    forward(s, s.next_step())  # a, b and c write token 16: the last of their first page
    assert s.next_step() == [(a, 1), (b, 1)], "one page is free for a; c gives up its own, and b takes it"
    assert c.state == WAITING and c.computed == 0 and c.slot is None and c.preemptions == 1
    assert s.waiting == [c, d], "the preempted comes before those who arrived later"
    assert len(c.tokens) == 17, "what it has generated stays"


def test_the_youngest_gives_way_itself_rather_than_an_older_one():
    s = make(num_pages=3, slots=2, max_agents=2)
    a, b = ask(s, 14, 30), ask(s, 16, 30)
    forward(s, s.next_step())
    assert s.next_step() == [(a, 1), (b, 1)], "b takes the last page"
    forward(s, [(a, 1), (b, 1)])
    forward(s, s.next_step())
    assert s.next_step() == [(a, 1)] and b.state == WAITING and a.state == RUNNING


def test_a_sequence_alone_can_use_the_pool_to_its_last_token():
    s = make(num_pages=3, slots=2, max_agents=2)
    fits = ask(s, 8, 41)  # 8 + 41 - 1 = 48 tokens: three pages, since the last one is never attended to
    other = ask(s, 8, 41)
    with pytest.raises(
        CapacityError, match=r"^pages of one agent: found 4 for 8 suffix tokens and 42 new ones, needed at most 3"
    ):
        ask(s, 8, 42)
    drain(s)
    assert len(fits.tokens) == len(other.tokens) == 49 and fits.preemptions == 0 and other.preemptions > 0


def test_max_pages_per_slot_bounds_a_sequence_too():
    pool = PagePool(GEOMETRY, 8, slots=2, max_pages_per_slot=2)
    s = Scheduler(pool, max_rows=8, max_extend_tokens=8, max_agents=2)
    with pytest.raises(CapacityError, match="needed at most 2"):
        ask(s, 33, 1)


def test_admission_leaves_room_for_those_who_run():
    s = make(num_pages=3, slots=3, max_agents=3)
    a, b, c = (ask(s, 10, 4) for _ in range(3))
    assert [q for q, _ in s.next_step()] == [a, b] and c.state == WAITING


def test_a_full_queue_refuses_the_next_and_keeps_the_others():
    s = make(max_queue=2, max_agents=1)
    kept = [ask(s, 3, 2), ask(s, 3, 2)]
    with pytest.raises(CapacityError, match=r"^queue: found 2 waiting, needed fewer than 2"):
        ask(s, 3, 2)
    s.next_step()
    kept.append(ask(s, 3, 2))
    assert s.running + s.waiting == kept


def test_a_preempted_sequence_returns_to_a_full_queue():
    s = make(num_pages=4, slots=2, max_agents=2, max_queue=1)
    for _ in range(2):
        ask(s, 15, 20)
        forward(s, s.next_step())
    ask(s, 15, 20)
    while len(s.waiting) == 1:
        forward(s, s.next_step())
    assert len(s.waiting) == 2 and s.waiting[0].preemptions == 1
    drain(s)


class Interrupted:
    """Ctrl-C at the nth line that a function of the scheduler comes to."""

    def __init__(self, n: int, *names: str) -> None:
        self.left, self.names = n, names

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename != scheduler_module.__file__ or frame.f_code.co_name not in self.names:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def test_ctrl_c_between_any_two_lines_loses_no_page_and_no_sequence():
    lines = 0
    while True:
        # Five pages: each of three grows into a second one, and takes that of a younger.
        scheduler = make(num_pages=5, slots=3, max_agents=3)
        sequences = [ask(scheduler, 15, 4, id=n) for n in range(4)]
        before = sys.gettrace()
        sys.settrace(Interrupted(lines + 1, "admit", "preempt", "next_step"))
        try:
            while scheduler.unfinished:
                forward(scheduler, scheduler.next_step())
        except KeyboardInterrupt:
            lines += 1
        else:
            break
        finally:
            sys.settrace(before)
        for sequence in sequences:
            scheduler.cancel(sequence)
        assert not scheduler.waiting and not scheduler.running and not scheduler.unfinished, lines
        assert (scheduler.pool.free_pages, scheduler.pool.free_slots) == (5, 3), lines
    assert lines > 100 and sum(sequence.preemptions for sequence in sequences) > 0


def test_no_tokens_and_a_second_submission_are_refused():
    s = make()
    with pytest.raises(RequestError, match=r"^request: found no tokens"):
        ask(s, 0, 3)
    sequence = ask(s, 1, 3)
    with pytest.raises(RequestError, match=r"^request: found one that is waiting"):
        s.submit(sequence)
    s.cancel(sequence)
    with pytest.raises(RequestError, match=r"^request: found one that is finished"):
        s.submit(sequence)


@pytest.mark.parametrize("name", ["max_rows", "max_extend_tokens", "max_agents", "max_chunk"])
def test_limits_below_one_are_refused_by_name(name):
    with pytest.raises(RequestError, match=f"^{name}: found 0"):
        make(**{name: 0})


def test_the_scheduler_touches_no_tensor():
    tree = ast.parse(Path(scheduler_module.__file__).read_text())
    names = {n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not any(name.split(".")[0] in ("torch", "numpy") or name == "kvkern.pages" for name in names if name)
