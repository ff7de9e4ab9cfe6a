"""PagePool against plain lists: no page lost or held twice, a shared page copied before it is written, freed ones poisoned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvkern.errors import CapacityError, RequestError
from kvkern.geometry import PAGE, Geometry
from kvkern.pages import PagePool

GEOMETRY = Geometry(2, 2, 1, 16, torch.float32)


class Pool(RuleBasedStateMachine):
    """Every token that is written gets a number of its own; the oracle keeps the numbers of each slot in a list."""

    @initialize(num_pages=st.integers(1, 8), slots=st.integers(1, 5), width=st.none() | st.integers(1, 6))
    def start(self, num_pages, slots, width):
        self.pool = PagePool(GEOMETRY, num_pages, slots=slots, max_pages_per_slot=width, debug=True)
        self.width = min(width or num_pages, num_pages)
        self.tokens: dict[int, list[float]] = {}
        self.loose: list[int] = []
        self.written = 0.0

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.tokens)))

    def owners(self, page):
        return sum(page in self.pool.table(slot) for slot in self.tokens) + self.loose.count(page)

    def snapshot(self):
        p = self.pool
        tables = {slot: (p.table(slot), p.length(slot)) for slot in self.tokens}
        references = [p.references(page) for page in range(p.num_pages)]
        tensors = [t.clone() for t in (p.pages.nan_to_num(nan=-1.0), p.page_table, p.seq_lens)]
        return tables, p.free_pages, p.free_slots, references, tensors

    def refused(self, error, message, call):
        before = self.snapshot()
        with pytest.raises(error, match=message):
            call()
        after = self.snapshot()
        assert before[:4] == after[:4]
        assert all(map(torch.equal, before[4], after[4])), "a call that raises changes nothing"

    # -- slots

    @rule()
    def acquire(self):
        if len(self.tokens) == self.pool.slots:
            self.refused(CapacityError, "^slots: found 0 free", self.pool.acquire_slot)
        else:
            slot = self.pool.acquire_slot()
            assert slot not in self.tokens and 0 <= slot < self.pool.slots
            self.tokens[slot] = []

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data):
        slot = self.pick(data)
        self.pool.release_slot(slot)
        del self.tokens[slot]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data):
        source = self.pick(data)
        if len(self.tokens) == self.pool.slots:
            self.refused(CapacityError, "^slots: found 0 free", lambda: self.pool.fork(source))
        else:
            slot = self.pool.fork(source)
            self.tokens[slot] = list(self.tokens[source])
            assert self.pool.table(slot) == self.pool.table(source)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), tokens=st.integers(0, 40), write=st.booleans())
    def reserve(self, data, tokens, write):
        """Pages to write to: those that are missing, and a copy of each that somebody else reads."""
        slot = self.pick(data)
        table, length = self.pool.table(slot), len(self.tokens[slot])
        touched = range(length // PAGE, -(-(length + tokens) // PAGE)) if tokens else range(0)
        needed = sum(i >= len(table) or self.owners(table[i]) > 1 for i in touched)
        if length + tokens > self.width * PAGE:
            self.refused(CapacityError, "^pages of one agent: found", lambda: self.pool.reserve(slot, tokens))
            return
        assert self.pool.pages_needed(slot, tokens) == needed
        if needed > self.pool.free_pages:
            self.refused(CapacityError, r"^pages: found \d+ free", lambda: self.pool.reserve(slot, tokens))
            return
        self.pool.reserve(slot, tokens)
        assert self.pool.pages_needed(slot, tokens) == 0
        if write:
            self.write(slot, tokens)

    def write(self, slot, tokens):
        for _ in range(tokens):
            at = len(self.tokens[slot])
            self.written += 1
            page = int(self.pool.page_table[slot, at // PAGE])
            self.pool.k_pages(1)[page, :, at % PAGE] = self.written
            self.pool.v_pages(0)[page, :, at % PAGE] = -self.written
            self.tokens[slot].append(self.written)
        self.pool.advance(slot, tokens)
        self.pool.seq_lens[slot] += tokens  # as Plan.begin does

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), share=st.floats(0, 1))
    def truncate(self, data, share):
        slot = self.pick(data)
        length = len(self.tokens[slot])
        self.refused(RequestError, "^tokens: found", lambda: self.pool.truncate(slot, length + 1))
        keep = round(share * length)
        self.pool.truncate(slot, keep)
        del self.tokens[slot][keep:]
        assert len(self.pool.table(slot)) == -(-keep // PAGE)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def advance_beyond_the_pages(self, data):
        slot = self.pick(data)
        room = len(self.pool.table(slot)) * PAGE - len(self.tokens[slot])
        self.refused(CapacityError, "^pages of the slot: found", lambda: self.pool.advance(slot, room + 1))

    # -- pages

    @rule(n=st.integers(0, 5))
    def alloc(self, n):
        if n > self.pool.free_pages:
            self.refused(CapacityError, f"^pages: found .* free, needed {n}", lambda: self.pool.alloc(n))
        else:
            taken = self.pool.alloc(n)
            assert len(set(taken)) == n and all(self.owners(page) == 0 for page in taken)
            self.loose += taken

    @precondition(lambda self: self.loose)
    @rule(data=st.data())
    def share(self, data):
        page = data.draw(st.sampled_from(self.loose))
        self.pool.share([page, page])
        self.loose += [page, page]

    @precondition(lambda self: self.loose)
    @rule(data=st.data())
    def free(self, data):
        pages = data.draw(st.lists(st.sampled_from(range(len(self.loose))), unique=True))
        self.pool.free([self.loose[i] for i in pages])
        self.loose = [page for i, page in enumerate(self.loose) if i not in pages]

    @rule(data=st.data())
    def free_once_too_often(self, data):
        page = data.draw(st.integers(0, self.pool.num_pages - 1))
        times = self.owners(page) + 1
        self.refused(RequestError, f"^page: found {page},", lambda: self.pool.free([page] * times))
        if times == 1:
            self.refused(RequestError, f"^page: found {page},", lambda: self.pool.share([page]))

    # -- what holds always

    @invariant()
    def references_are_counted(self):
        p = self.pool
        counts = [self.owners(page) for page in range(p.num_pages)]
        assert counts == [p.references(page) for page in range(p.num_pages)]
        assert p.free_pages == counts.count(0)
        assert p.free_slots == p.slots - len(self.tokens)

    @invariant()
    def every_slot_reads_what_was_written_to_it(self):
        p = self.pool
        for slot, tokens in self.tokens.items():
            assert p.length(slot) == len(tokens) == int(p.seq_lens[slot])
            table = p.table(slot)
            assert p.page_table[slot, : len(table)].tolist() == table
            assert len(table) * PAGE >= len(tokens)
            if tokens:
                at = torch.arange(len(tokens))
                pages = p.page_table[slot, at // PAGE].long()
                expected = torch.tensor(tokens)[:, None, None].expand(-1, 1, 16)
                assert torch.equal(p.k_pages(1)[pages, :, at % PAGE], expected)
                assert torch.equal(p.v_pages(0)[pages, :, at % PAGE], -expected)

    @invariant()
    def free_pages_are_poisoned(self):
        free = [page for page in range(self.pool.num_pages) if self.pool.references(page) == 0]
        assert self.pool.pages[:, :, free].isnan().all()


Pool.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestPool = Pool.TestCase


# -- one by one --------------------------------------------------------------------------------------------------------


def filled(tokens: int, **options) -> tuple[PagePool, int]:
    pool = PagePool(GEOMETRY, 8, slots=4, debug=True, **options)
    slot = pool.acquire_slot()
    pool.reserve(slot, tokens)
    pool.pages[:, :, pool.table(slot)] = 1.0
    pool.advance(slot, tokens)
    return pool, slot


def test_a_fork_shares_whole_pages_and_copies_the_partly_filled_one_when_it_is_written():
    pool, slot = filled(20)
    other = pool.fork(slot)
    assert pool.free_pages == 6
    pool.reserve(other, 1)
    mine, copied = pool.table(slot), pool.table(other)
    assert mine[0] == copied[0] and mine[1] != copied[1]
    assert torch.equal(pool.pages[:, :, mine[1]], pool.pages[:, :, copied[1]])
    assert pool.pages_needed(slot, 1) == 0, "the first owner has its page to itself again"


def test_control_without_the_copy_the_other_slot_would_read_the_write():
    pool, slot = filled(20)
    other = pool.fork(slot)
    page = pool.table(other)[1]  # the mistake: no reserve before the write
    pool.pages[:, :, page, :, 4] = 7.0
    assert (pool.pages[:, :, pool.table(slot)[1], :, 4] == 7.0).all()


def test_pages_that_are_reserved_ahead_and_shared_are_copied_only_when_they_are_written():
    pool, slot = filled(16)
    pool.reserve(slot, 48)
    other = pool.fork(slot)
    assert pool.pages_needed(other, 1) == 1
    pool.reserve(other, 1)
    assert pool.table(other)[2:] == pool.table(slot)[2:]


def test_layers_and_k_and_v_do_not_meet():
    pool = PagePool(GEOMETRY, 2, slots=1, debug=True)
    for layer in range(2):
        pool.k_pages(layer).fill_(layer)
        pool.v_pages(layer).fill_(10 + layer)
    assert [pool.k_pages(n).unique().item() for n in range(2)] == [0, 1]
    assert [pool.v_pages(n).unique().item() for n in range(2)] == [10, 11]
    assert pool.k_pages(0).shape == (2, 1, PAGE, 16)


def test_without_debug_a_freed_page_keeps_its_bytes():
    pool = PagePool(GEOMETRY, 2, slots=1)
    pages = pool.alloc(1)
    pool.pages[:, :, pages] = 5.0
    pool.free(pages)
    assert (pool.pages[:, :, pages] == 5.0).all()


@pytest.mark.parametrize("name", ["num_pages", "slots"])
def test_a_pool_of_nothing_is_refused_by_name(name):
    with pytest.raises(CapacityError, match=f"^{name}: found 0"):
        PagePool(GEOMETRY, **{"num_pages": 1, "slots": 1, name: 0})


@pytest.mark.parametrize("call", ["release_slot", "length", "table", "fork"])
def test_a_slot_that_is_not_held_is_refused(call):
    pool = PagePool(GEOMETRY, 2, slots=2)
    slot = pool.acquire_slot()
    pool.release_slot(slot)
    for bad in (slot, -1, 2):
        with pytest.raises(RequestError, match=f"^slot: found {bad}, needed a slot that is held"):
            getattr(pool, call)(bad)


def test_a_page_that_is_not_in_the_pool_is_refused():
    pool = PagePool(GEOMETRY, 2, slots=1)
    for bad in (-1, 2):
        with pytest.raises(RequestError, match=f"^page: found {bad},"):
            pool.free([bad])
