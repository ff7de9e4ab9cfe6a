"""Plan against a reading of its tensors row by row: who attends to which segment, in which order, whatever the tree is."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvkern import plan
from kvkern.errors import CapacityError, DeviceError, DtypeError, ReadOnlyError, RequestError, ShapeError
from kvkern.geometry import PAGE, Geometry, num_segments
from kvkern.pages import PagePool
from kvkern.plan import AgentRows, Plan
from kvkern.prefix import SharedPrefix

LENGTHS = (1, 128, 1024, 1025, 2049, 3073, 17000)  # 1, 1, 1, 2, 3, 4 and 15 segments
GEOMETRIES = {group: Geometry(1, group, 1, 16, torch.float32) for group in (1, 2, 3, 8, 16, 20)}


def node(geometry=GEOMETRIES[2], tokens=1, parent=None):
    return SharedPrefix(geometry, torch.zeros(tokens, dtype=torch.int64), parent=parent).publish()


def pool_of(geometry=GEOMETRIES[2], slots=64):
    pool = PagePool(geometry, 4 * slots, slots=slots)
    return pool, [pool.acquire_slot() for _ in range(slots)]


# -- the oracle: the tensors read row by row ---------------------------------------------------------------------------


def segments_of(leaf):
    """What an agent must fold, in order: every segment of every node from the root down."""
    return [(id(n), s) for n in (leaf.path() if leaf else ()) for s in range(num_segments(n.tokens))]


def program(plan, row, agent):
    """The states that one row folds, in the order of its path: (flag, what was walked into that state)."""
    address = {n.block().data_ptr(): id(n) for n in (agent.node.path() if agent.node else ())}
    t = plan.tensors
    slots = {}
    for number, begin, end, first, last, state in t.items.tolist():
        if begin <= row < end:
            at = address[int(t.node_table[number, 0])]
            walked = [(at, s) for s in range(first, last)]
            for i, part in enumerate([walked] if first == 0 else [[w] for w in walked]):
                assert state + i not in slots, "two states in one place"
                slots[state + i] = part
    (path,) = [path for _, begin, end, path in t.suffix_tiles.tolist() if begin <= row < end]
    flags = t.path_table[path].tolist()
    used = [flag for flag in flags if flag]
    assert flags == used + [0] * (len(flags) - len(used)), "nothing follows a 0"
    assert sorted(slots) == list(range(len(used))), "the path names exactly the states of its rows"
    return [(flag, slots[i]) for i, flag in enumerate(used)]


def check(plan, pool, agents, bucket=None):
    t = plan.tensors
    total = sum(a.rows for a in agents)
    assert plan.rows == len(t.row_slot) == len(t.row_back) == (bucket or total)
    assert (
        all(len(table) >= 2 for table in (t.suffix_tiles, t.path_table, t.node_table, t.items))
        and t.path_table.shape[1] >= 2
    )
    assert {x.dtype for x in t} == {torch.int32, torch.int64} and t.node_table.dtype == torch.int64

    # Rows: each agent's side by side, in the order of `order`, counted down to its last; then padding.
    assert sorted(plan.order) == list(range(len(agents)))
    expected = [(agents[i].slot, back) for i in plan.order for back in range(agents[i].rows - 1, -1, -1)]
    rows = list(zip(t.row_slot.tolist(), t.row_back.tolist(), strict=True))
    assert rows[:total] == expected and all(slot == -1 for slot, _ in rows[total:])
    assert list(plan.qo_indptr) == [0] + [sum(agents[i].rows for i in plan.order[: n + 1]) for n in range(len(agents))]
    assert [rows[r] for r in plan.last_rows] == [(a.slot, 0) for a in agents]

    # Tiles: every row once, of one agent, no wider than a worker.
    tiles = [tile for tile in t.suffix_tiles.tolist() if tile[1] < tile[2]]
    assert sorted(r for _, begin, end, _ in tiles for r in range(begin, end)) == list(range(total))
    widest = max(1, 16 // (1 << (pool.geometry.G - 1).bit_length()))
    for slot, begin, end, _ in tiles:
        assert end - begin <= widest and {rows[r][0] for r in range(begin, end)} == {slot}

    # Nodes: address, tokens, padded tokens, segment; no padding row in any item.
    nodes = {n.block().data_ptr(): n for a in agents for n in (a.node.path() if a.node else ())}
    table = [row for row in t.node_table.tolist() if any(row)]
    assert sorted(row[0] for row in table) == sorted(nodes), "each node once"
    for address, tokens, padded, segment in table:
        n = nodes[address]
        assert (tokens, padded, segment) == (n.tokens, n.padded_tokens, n.segment_tokens)
    assert all(end <= total for _, _, end, _, _, _ in t.items.tolist())

    # Depth first: a node's rows are one run, and for every run of segments its items cover it without a gap.
    for number, row in enumerate(table):
        cut = [item for item in t.items.tolist() if item[0] == number and item[1] < item[2]]
        runs = {joined([tuple(item[1:3]) for item in cut if item[3] == first]) for first in {item[3] for item in cut}}
        below = [
            r for i in plan.order for r in rows_of(plan, i) if agents[i].node and nodes[row[0]] in agents[i].node.path()
        ]
        assert runs == {(below[0], below[-1] + 1)} and len(below) == below[-1] + 1 - below[0]

    # Coverage: every row folds every segment of its path once, in order; a node starts exactly once.
    for i, agent in enumerate(agents):
        for r in rows_of(plan, i):
            folded = program(plan, r, agent)
            assert [w for _, walked in folded for w in walked] == segments_of(agent.node)
            for flag, walked in folded:
                assert len({at for at, _ in walked}) == 1 and flag == (1 if walked[0][1] == 0 else 2)


def joined(ranges):
    """(first, last) of ranges that follow one another; an assertion where they overlap or leave a gap."""
    ranges = sorted(ranges)
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    return ranges[0][0], ranges[-1][1]


def rows_of(plan, i):
    n = plan.order.index(i)
    return range(plan.qo_indptr[n], plan.qo_indptr[n + 1])


@st.composite
def cases(draw):
    """A forest of up to three levels, agents anywhere in it or without a prefix, in any order."""
    geometry = GEOMETRIES[draw(st.sampled_from(sorted(GEOMETRIES)))]
    lengths = st.sampled_from(LENGTHS)
    nodes = [node(geometry, draw(lengths)) for _ in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(0, 4))):
        parent = draw(st.sampled_from([n for n in nodes if len(n.path()) < 3]))
        nodes.append(node(geometry, draw(lengths), parent))
    pool, slots = pool_of(geometry, 12)
    chosen = draw(st.lists(st.tuples(st.none() | st.sampled_from(nodes), st.integers(1, 35)), min_size=1, max_size=12))
    slots = draw(st.permutations(slots))
    agents = [AgentRows(slot, leaf, rows) for slot, (leaf, rows) in zip(slots, chosen, strict=False)]
    return pool, agents, draw(st.integers(1, 20)), draw(st.none() | st.integers(0, 40)), nodes


@given(case=cases())
@settings(max_examples=120, deadline=None)
def test_every_row_folds_every_segment_of_its_path_once_and_in_order(case):
    pool, agents, workers, padding, _ = case
    bucket = None if padding is None else sum(a.rows for a in agents) + padding
    check(Plan.make(pool, agents, bucket=bucket, workers_per_node=workers), pool, agents, bucket)


@given(case=cases(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_permutation_of_agents_changes_no_row_and_no_work(case, seed):
    pool, agents, workers, _, _ = case
    order = random.Random(seed).sample(range(len(agents)), len(agents))
    one = Plan.make(pool, agents, workers_per_node=workers)
    two = Plan.make(pool, [agents[i] for i in order], workers_per_node=workers)
    for n, i in enumerate(order):
        for r, s in zip(rows_of(one, i), rows_of(two, n), strict=True):
            assert program(one, r, agents[i]) == program(two, s, agents[i])
            assert one.tensors.row_back[r] == two.tensors.row_back[s]

    def work(plan):
        table = plan.tensors.node_table[:, 0].tolist()
        return Counter(
            (table[n], end - begin, *rest) for n, begin, end, *rest in plan.tensors.items.tolist() if begin < end
        )

    assert work(one) == work(two)


@given(case=cases(), workers=st.integers(2, 20))
@settings(max_examples=60, deadline=None)
def test_more_workers_move_segments_but_not_their_order(case, workers):
    pool, agents, _, _, _ = case
    one, many = Plan.make(pool, agents), Plan.make(pool, agents, workers_per_node=workers)
    for i, agent in enumerate(agents):
        r = rows_of(one, i)[0]
        alone, split = program(one, r, agent), program(many, r, agent)
        assert [w for _, walked in alone for w in walked] == [w for _, walked in split for w in walked]
        assert all(flag == 1 for flag, _ in alone), "one worker folds a whole node as it walks"
        assert all(len(walked) == 1 for flag, walked in split if flag == 2), "a later worker leaves each segment apart"
    items = [item for item in many.tensors.items.tolist() if item[1] < item[2]]
    assert all(count == 1 for count in Counter((n, begin, first) for n, begin, _, first, _, _ in items).values())
    runs = {(n, first) for n, _, _, first, _, _ in items}
    assert max(Counter(n for n, _ in runs).values(), default=0) <= workers


@given(case=cases(), processors=st.sampled_from([2, 16, 132, 1000]))
@settings(max_examples=60, deadline=None)
def test_a_gpu_has_as_many_walks_as_it_has_use_for_and_the_same_folds(case, processors):
    pool, agents, _, padding, _ = case
    bucket = None if padding is None else sum(a.rows for a in agents) + padding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "multiprocessors", lambda _: processors)
        check(Plan.make(pool, agents, bucket=bucket), pool, agents, bucket)


@pytest.mark.parametrize(
    ("agents", "tokens", "walks"),
    [(1, 32768, 16), (32, 32768, 16), (64, 32768, 8), (256, 32768, 2), (512, 32768, 1), (1024, 32768, 1), (1, 1024, 1)],
)
def test_a_long_prefix_of_few_agents_is_cut_for_all_multiprocessors(monkeypatch, agents, tokens, walks):
    """132 multiprocessors, 8 kv heads of 4 query heads: 16 multiprocessors a head, 32 agents a row tile."""
    monkeypatch.setattr(plan, "multiprocessors", lambda _: 132)
    geometry = Geometry(1, 32, 8, 16, torch.float32)
    pool, slots = pool_of(geometry, agents)
    leaf = node(geometry, tokens)
    items = Plan.make(pool, [AgentRows(slot, leaf, 1) for slot in slots]).tensors.items.tolist()
    assert len({item[3] for item in items if item[1] < item[2]}) == walks


@pytest.mark.parametrize(
    ("table", "column"), [("items", 2), ("items", 3), ("items", 4), ("items", 5), ("path_table", 0)]
)
def test_control_a_changed_entry_is_caught(table, column):
    pool, slots = pool_of()
    deep = node(tokens=3073, parent=node(tokens=2049))
    agents = [AgentRows(slots[n], deep, 3) for n in range(3)]
    plan = Plan.make(pool, agents, workers_per_node=2)
    check(plan, pool, agents)
    getattr(plan.tensors, table)[0, column] += 1
    with pytest.raises(AssertionError):
        check(plan, pool, agents)


# -- a tree and agents that come and go --------------------------------------------------------------------------------


class Steps(RuleBasedStateMachine):
    """Steps over a growing tree. The oracle: a list a slot of the numbers that were written to it, and a path of leaves.

    Each row writes its number where the plan says that its token lies, as K0 does, so a row in the wrong place is read back.
    """

    @initialize(group=st.sampled_from(sorted(GEOMETRIES)), num_pages=st.integers(4, 40), slots=st.integers(1, 6))
    def start(self, group, num_pages, slots):
        self.geometry = GEOMETRIES[group]
        self.pool = PagePool(self.geometry, num_pages, slots=slots, debug=True)
        self.nodes: list[SharedPrefix] = []
        self.leaves: dict[int, SharedPrefix | None] = {}
        self.tokens: dict[int, list[float]] = {}
        self.plan: tuple[Plan, list[AgentRows], int | None] | None = None
        self.written = 0.0

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.tokens)))

    # -- the tree

    @precondition(lambda self: len(self.nodes) < 8)
    @rule(data=st.data(), tokens=st.sampled_from(LENGTHS[:-1]))
    def publish(self, data, tokens):
        parent = data.draw(st.none() | st.sampled_from(self.nodes)) if self.nodes else None
        self.nodes.append(node(self.geometry, tokens, parent))

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def release(self, data):
        """By its owner: what lies below goes on, who hangs there may not; a plan in flight keeps its block."""
        gone = data.draw(st.sampled_from(self.nodes))
        if any(leaf is gone for leaf in self.leaves.values()):
            return
        gone.release()
        self.nodes.remove(gone)
        if gone.released and self.tokens:
            agents = [AgentRows(self.pick(data), gone, 1)]
            with pytest.raises(ReadOnlyError, match=r"^prefix: found <SharedPrefix .* released>"):
                Plan.make(self.pool, agents)

    # -- agents

    @precondition(lambda self: self.pool.free_slots)
    @rule(data=st.data())
    def join(self, data):
        slot = self.pool.acquire_slot()
        self.tokens[slot] = []
        self.leaves[slot] = data.draw(st.none() | st.sampled_from(self.nodes)) if self.nodes else None

    @precondition(lambda self: self.tokens and self.pool.free_slots)
    @rule(data=st.data())
    def fork(self, data):
        source = self.pick(data)
        slot = self.pool.fork(source)
        self.tokens[slot], self.leaves[slot] = list(self.tokens[source]), self.leaves[source]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def leave(self, data):
        slot = self.pick(data)
        self.pool.release_slot(slot)
        del self.tokens[slot], self.leaves[slot]
        self.plan = None

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), share=st.floats(0, 1))
    def truncate(self, data, share):
        slot = self.pick(data)
        keep = round(share * len(self.tokens[slot]))
        self.pool.truncate(slot, keep)
        del self.tokens[slot][keep:]

    # -- steps

    @precondition(lambda self: self.tokens)
    @rule(
        data=st.data(),
        rows=st.sampled_from([1, 2, 20]),
        padding=st.none() | st.integers(0, 9),
        workers=st.integers(1, 5),
    )
    def step(self, data, rows, padding, workers):
        """Decode and extend rows of some agents, or of all, in any order."""
        slots = data.draw(st.lists(st.sampled_from(sorted(self.tokens)), min_size=1, unique=True))
        agents = [AgentRows(slot, self.leaves[slot], data.draw(st.integers(1, rows))) for slot in slots]
        bucket = None if padding is None else sum(agent.rows for agent in agents) + padding
        plan = Plan.make(self.pool, agents, bucket=bucket, workers_per_node=workers)
        check(plan, self.pool, agents, bucket)
        assert not plan.begun
        self.plan = plan, agents, bucket
        self.run()

    @precondition(lambda self: self.plan is not None)
    @rule(times=st.integers(1, 3))
    def same_plan_again(self, times):
        """Lengths grow on the device; the plan's own tensors stay as they are."""
        plan, agents, bucket = self.plan
        before = [tensor.clone() for tensor in plan.tensors]
        for _ in range(times):
            self.run()
        assert all(map(torch.equal, plan.tensors, before))
        # The block of a node that was released since is the plan's alone; its address names no node any more.
        if not any(n.released for agent in agents if agent.node for n in agent.node.path()):
            check(plan, self.pool, agents, bucket)

    def run(self):
        plan, agents, _ = self.plan
        lengths = self.pool.seq_lens.clone()
        room = {slot: len(self.pool.table(slot)) * PAGE - len(self.tokens[slot]) for slot in self.tokens}
        if any(agent.rows > room[agent.slot] for agent in agents):
            with pytest.raises(CapacityError, match=r"^pages of the slot: found \d+ for \d+ tokens"):
                plan.begin()
            assert torch.equal(self.pool.seq_lens, lengths), "a begin that raises counts nothing"
            assert all(self.pool.length(slot) == len(tokens) for slot, tokens in self.tokens.items())
        for agent in agents:
            try:
                self.pool.reserve(agent.slot, agent.rows)
            except CapacityError:
                return  # the engine would preempt
        plan.begin()
        assert plan.begun
        self.append(plan, agents)

    def append(self, plan, agents):
        """What K0 does: each row's number to where its token lies, by nothing but the tensors of plan and pool."""
        pool, t = self.pool, plan.tensors
        numbers = self.written + 1 + torch.arange(plan.rows)
        self.written += plan.rows
        real = t.row_slot >= 0
        slots = t.row_slot[real].long()
        positions = (pool.seq_lens[slots] - 1 - t.row_back[real]).long()
        pages = pool.page_table[slots, positions // PAGE].long()
        assert len({*zip(pages.tolist(), (positions % PAGE).tolist(), strict=True)}) == len(slots), "a place for each"
        assert all(pool.references(page) == 1 for page in pages.tolist()), "nobody else reads what is written"
        pool.pages[:, :, pages, :, positions % PAGE] = numbers[real, None, None, None, None].float()
        for i, agent in enumerate(agents):
            rows = rows_of(plan, i)
            assert plan.last_rows[i] == rows[-1]
            self.tokens[agent.slot] += numbers[rows[0] : rows[-1] + 1].tolist()

    # -- what holds always

    @invariant()
    def lengths_on_the_device_are_the_oracles(self):
        for slot, tokens in self.tokens.items():
            assert int(self.pool.seq_lens[slot]) == self.pool.length(slot) == len(tokens)

    @invariant()
    def every_agent_reads_its_own_tokens_in_order(self):
        for slot, tokens in self.tokens.items():
            at = torch.arange(len(tokens))
            read = self.pool.pages[0, 1, self.pool.page_table[slot, at // PAGE].long(), 0, at % PAGE, 3]
            assert read.tolist() == tokens


class LongSteps(Steps):
    """The same for longer."""


Steps.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestSteps = Steps.TestCase
LongSteps.TestCase.settings = settings(max_examples=500, stateful_step_count=40, deadline=None)
TestLongSteps = pytest.mark.full(LongSteps.TestCase)


def tampered(**changes):
    """A machine whose plans have other tensors than they should."""

    class Tampered(Steps):
        def append(self, plan, agents):
            for name, change in changes.items():
                change(getattr(plan.tensors, name))
            super().append(plan, agents)

    return Tampered


class ForgottenBegin(Steps):
    """The mistake: a step is run without counting its rows on the device, as without a second begin."""

    def append(self, plan, agents):
        self.pool.seq_lens.index_add_(0, plan._slots, -plan._counts)
        super().append(plan, agents)


MISTAKES = {
    "rows in another order": tampered(row_back=lambda t: t.copy_(t.flip(0))),
    "a row of another agent": tampered(row_slot=lambda t: t.copy_(t.roll(1))),
    "a begin is missing": ForgottenBegin,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_control_a_step_with_a_mistake_is_caught(mistake):
    quick = settings(
        max_examples=5000,
        stateful_step_count=25,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    with pytest.raises((AssertionError, IndexError)):
        run_state_machine_as_test(MISTAKES[mistake], settings=quick)


# -- one by one --------------------------------------------------------------------------------------------------------


def test_siblings_use_the_same_places_and_their_rows_lie_side_by_side():
    pool, slots = pool_of()
    root = node(tokens=1025)
    left, right = node(tokens=2049, parent=root), node(tokens=1, parent=root)
    agents = [AgentRows(slots[i], leaf, 1) for i, leaf in enumerate((left, right, left, None, root, right))]
    plan = Plan.make(pool, agents, workers_per_node=3)
    assert [agents[i].node for i in plan.order] == [None, root, left, left, right, right]
    by_path = {tuple(flags) for flags in plan.tensors.path_table.tolist()}
    assert by_path == {(0, 0, 0, 0, 0), (1, 2, 0, 0, 0), (1, 2, 1, 2, 2), (1, 2, 1, 0, 0)}


@pytest.mark.parametrize(("group", "rows", "expected"), [(3, 100, [42, 42, 16]), (8, 16, [16]), (20, 13, [6, 6, 1])])
def test_an_item_has_at_most_128_packed_rows(group, rows, expected):
    pool, slots = pool_of(GEOMETRIES[group])
    leaf = node(GEOMETRIES[group])
    plan = Plan.make(pool, [AgentRows(slots[0], leaf, rows)])
    assert [end - begin for _, begin, end, *_ in plan.tensors.items.tolist() if begin < end] == expected


def test_agents_without_a_prefix_need_no_item():
    pool, slots = pool_of()
    plan = Plan.make(pool, [AgentRows(slots[0], None, 2)])
    assert not plan.tensors.items.any() and not plan.tensors.node_table.any() and not plan.tensors.path_table.any()


def test_expects_is_what_a_call_must_bring():
    pool, slots = pool_of()
    plan = Plan.make(pool, [AgentRows(slots[0], None, 2)], bucket=4)
    assert plan.expects == (4, 2, 1, 16, torch.float32, torch.device("cpu"))


def test_a_plan_in_flight_keeps_the_blocks_of_a_prefix_that_is_released():
    pool, slots = pool_of()
    prefix = node(tokens=7)
    plan = Plan.make(pool, [AgentRows(slots[0], prefix, 1)])
    prefix.release()
    assert [b.data_ptr() for b in plan._blocks] == [plan.tensors.node_table[0, 0].item()]


def test_begin_counts_the_rows_on_host_and_device_once():
    pool, slots = pool_of()
    plan = Plan.make(pool, [AgentRows(slots[0], None, 3), AgentRows(slots[1], None, 1)], bucket=8)
    for slot, rows in ((slots[0], 3), (slots[1], 1)):
        pool.reserve(slot, 2 * rows)
    plan.begin()
    plan.begin()
    assert [pool.length(s) for s in slots[:3]] == [6, 2, 0]
    assert [int(pool.seq_lens[s]) for s in slots[:3]] == [6, 2, 0]


def test_begin_without_pages_counts_nothing():
    pool, slots = pool_of()
    pool.reserve(slots[0], 3)
    plan = Plan.make(pool, [AgentRows(slots[0], None, 3), AgentRows(slots[1], None, 1)])
    with pytest.raises(CapacityError, match=r"^pages of the slot: found 0 for 1 tokens"):
        plan.begin()
    assert pool.length(slots[0]) == 0 and not pool.seq_lens.any()


# -- what is refused ---------------------------------------------------------------------------------------------------


def released():
    prefix = node()
    prefix.release()
    return prefix


BAD = {
    "none": (lambda s: [], RequestError, "agents: found none"),
    "twice": (lambda s: [AgentRows(s[0], None, 1)] * 2, RequestError, r"agents\.slot: found \d+ twice"),
    "no rows": (lambda s: [AgentRows(s[0], None, 0)], RequestError, r"agents\.rows: found 0"),
    "no slot": (lambda s: [AgentRows(99, None, 1)], RequestError, "slot: found 99"),
    "released": (lambda s: [AgentRows(s[0], released(), 1)], ReadOnlyError, "prefix: found <SharedPrefix .* released>"),
    "filling": (
        lambda s: [AgentRows(s[0], SharedPrefix(GEOMETRIES[2], torch.zeros(1, dtype=torch.int64)), 1)],
        ReadOnlyError,
        "prefix: found <SharedPrefix .* filling>",
    ),
    "other model": (
        lambda s: [AgentRows(s[0], node(GEOMETRIES[1]), 1)],
        ShapeError,
        r"prefix: found Geometry\(.*num_qo_heads=1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_planned_is_refused_by_name(name):
    agents, error, message = BAD[name]
    pool, slots = pool_of()
    with pytest.raises(error, match=f"^{message}"):
        Plan.make(pool, agents(slots))


def test_a_prefix_on_another_device_is_refused():
    pool, slots = pool_of()
    prefix = SharedPrefix(GEOMETRIES[2], torch.zeros(1, dtype=torch.int64), device="meta")
    prefix._sums = torch.zeros(1)  # published, as far as a plan can see: a block without memory has no sum
    with pytest.raises(DeviceError, match=r"^prefix: found Geometry.* on meta, needed .* on cpu as in the pool"):
        Plan.make(pool, [AgentRows(slots[0], prefix, 1)])


@pytest.mark.parametrize(
    ("change", "error", "field"),
    [
        (lambda pages: pages.new_zeros(1, 2, 4, 1, 32, 16), ShapeError, "pages"),
        (lambda pages: pages[:, :, :3], ShapeError, "pages"),
        (lambda pages: pages[:, 0], ShapeError, "pages"),
        (lambda pages: torch.stack([pages, pages], dim=-1)[..., 0], ShapeError, r"pages\.stride\(-1\)"),
        (lambda pages: pages.half(), DtypeError, "pages"),
        (lambda pages: pages.to("meta"), DeviceError, "pages"),
    ],
    ids=["of 32 tokens", "too few", "keys alone", "stride", "dtype", "device"],
)
def test_pages_that_the_kernels_cannot_count_in_are_refused(change, error, field):
    pool, slots = pool_of(slots=1)
    agents = [AgentRows(slots[0], None, 1)]
    pages = pool.pages
    pool.pages = change(pages)
    with pytest.raises(error, match=f"^{field}: found "):
        Plan.make(pool, agents)
    pool.pages = pages.transpose(3, 4).contiguous().transpose(3, 4)
    Plan.make(pool, agents)  # a control: any strides but the last


def test_a_bucket_that_is_too_small_and_no_workers_are_refused():
    pool, slots = pool_of()
    agents = [AgentRows(slots[0], None, 5)]
    with pytest.raises(CapacityError, match=r"^bucket: found 4 rows, needed at least 5"):
        Plan.make(pool, agents, bucket=4)
    with pytest.raises(RequestError, match=r"^workers_per_node: found 0"):
        Plan.make(pool, agents, workers_per_node=0)
