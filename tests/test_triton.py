"""The Triton kernels in the interpreter: numerics against fp64, bits, poison, and the controls that must fail.

Every node of a step, its slots, pages and work items come from the same Plan and PagePool that the engine uses. Pages are
NaN until written, unused page-table entries are out of range, fresh outputs are NaN between guard bands.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import INTERPRETING, interpreted, repair

from kvkern import plain
from kvkern.attention import attend
from kvkern.geometry import PAGE, Geometry
from kvkern.kernels.oracle import attend_fp64
from kvkern.pages import PagePool
from kvkern.plain import State
from kvkern.plan import AgentRows, Plan, PlanTensors
from kvkern.prefix import SharedPrefix

if INTERPRETING:
    from kvkern.kernels.append import append
    from kvkern.kernels.merge import merge
    from kvkern.kernels.prefix import prefix_attention
    from kvkern.kernels.suffix import suffix_attention

LAYERS, LAYER = 2, 1
GUARD = 64
NOWHERE = 2**31 - 1


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETING:
        repair(monkeypatch)


# -- a step of attention -----------------------------------------------------------------------------------------------


@dataclass
class Agent:
    """path: nodes from the root down, as indices into Case.nodes; suffix tokens with this step's rows, and those rows."""

    path: tuple[int, ...]
    length: int
    rows: int = 1
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)


Result = dict[int, tuple[Tensor, Tensor]]


class Case:
    """Nodes (tokens, index of the parent or None) and agents with random values, to be run in any company."""

    def __init__(
        self,
        nodes: Sequence[tuple[int, int | None]],
        agents: Sequence[Agent],
        *,
        G: int = 2,
        num_kv_heads: int = 1,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
    ) -> None:
        self.geometry = Geometry(LAYERS, G * num_kv_heads, num_kv_heads, head_dim, dtype)
        self.agents = list(agents)
        self.sm_scale = head_dim**-0.5
        self.nodes: list[SharedPrefix] = []
        for tokens, parent in nodes:
            above = None if parent is None else self.nodes[parent]
            node = SharedPrefix(self.geometry, torch.arange(tokens), parent=above)
            node.block()[:, :, :, :tokens] = torch.randn(LAYERS, 2, num_kv_heads, tokens, head_dim).to(dtype)
            self.nodes.append(node.publish())
        for agent in self.agents:
            agent.q = (torch.randn(agent.rows, G * num_kv_heads, head_dim) * scale).to(dtype)
            agent.k, agent.v = torch.randn(2, agent.length, num_kv_heads, head_dim).to(dtype)

    def run(
        self,
        who: Sequence[int] | None = None,
        *,
        workers: int = 1,
        bucket: int | None = None,
        strided: bool = False,
        token_major: bool = False,
        change: Callable[[PlanTensors], PlanTensors] = lambda tensors: tensors,
        change_state: Callable[[State], State] = lambda state: state,
        pool_check: Callable[[PagePool, PagePool, Plan], None] | None = None,
    ) -> Result:
        """One step of these agents, all if None: o and lse of each, and of the padding rows under -1."""
        who = range(len(self.agents)) if who is None else who
        chosen = [self.agents[i] for i in who]
        g = self.geometry
        pages = sum(-(-agent.length // PAGE) for agent in chosen) + 3
        pool = PagePool(g, pages, slots=len(chosen) + 2, max_pages_per_slot=pages + 2, debug=True)
        if token_major:
            heads, head_dim = g.num_kv_heads, g.head_dim
            blank = torch.full((LAYERS, 2, pages, PAGE, heads, head_dim), math.nan, dtype=g.dtype)
            pool.pages = blank.transpose(3, 4)
        # Pages in any order.
        taken = pool.alloc(pages)
        random.shuffle(taken)
        pool.free(taken)
        pool.page_table.fill_(NOWHERE)
        rows = []
        for agent in chosen:
            slot, before = pool.acquire_slot(), agent.length - agent.rows
            pool.reserve(slot, agent.length)
            pool.advance(slot, before)
            pool.seq_lens[slot] = before
            for n, value in enumerate((agent.k, agent.v)):
                for token in range(before):
                    page = int(pool.page_table[slot, token // PAGE])
                    pool.pages[LAYER, n, page, :, token % PAGE] = value[token]
            rows.append(AgentRows(slot, self.nodes[agent.path[-1]] if agent.path else None, agent.rows))
        plan = Plan.make(pool, rows, bucket=bucket, workers_per_node=workers)
        plan.begin()
        q, k, v = self._pack([chosen[i] for i in plan.order], plan.rows, strided)
        tensors = change(plan.tensors)

        k_pages, v_pages = pool.k_pages(LAYER), pool.v_pages(LAYER)
        places = (pool.page_table, pool.seq_lens, tensors.row_slot, tensors.row_back)
        packed = append(q, k, v, k_pages, v_pages, *places)
        state = change_state(
            prefix_attention(
                packed,
                tensors.node_table,
                tensors.items,
                tensors.path_table,
                num_kv_heads=g.num_kv_heads,
                layer=LAYER,
                sm_scale=self.sm_scale,
            )
        )
        o, lse = suffix_attention(
            packed,
            k_pages,
            v_pages,
            *places,
            tensors.suffix_tiles,
            tensors.path_table,
            state,
            sm_scale=self.sm_scale,
        )
        assert o.shape == q.shape and o.dtype == q.dtype and o.is_contiguous()
        assert lse.shape == q.shape[:2] and lse.dtype == torch.float32
        result = {-1: (o[plan.qo_indptr[-1] :], lse[plan.qo_indptr[-1] :])}
        for n, i in enumerate(plan.order):
            here = slice(plan.qo_indptr[n], plan.qo_indptr[n + 1])
            result[who[i]] = o[here], lse[here]
        return result

    def _pack(self, agents: Sequence[Agent], rows: int, strided: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the step; padding rows are NaN; strided: as slices of one fused projection."""
        g = self.geometry
        heads = g.num_qo_heads + 2 * g.num_kv_heads
        qkv = torch.full((rows, heads, g.head_dim), math.nan, dtype=g.dtype)
        at = 0
        for agent in agents:
            new = (agent.q, agent.k[agent.length - agent.rows :], agent.v[agent.length - agent.rows :])
            qkv[at : at + agent.rows] = torch.cat(new, dim=1)
            at += agent.rows
        q, k, v = qkv.split((g.num_qo_heads, g.num_kv_heads, g.num_kv_heads), dim=1)
        return (q, k, v) if strided else (q.contiguous(), k.contiguous(), v.contiguous())

    def sequence(self, agent: Agent) -> tuple[Tensor, Tensor]:
        """K and V of all that the agent may see, [tokens, num_kv_heads, head_dim]."""
        nodes = [self.nodes[i] for i in agent.path]
        k = torch.cat([*(node.key(LAYER).transpose(0, 1) for node in nodes), agent.k])
        v = torch.cat([*(node.value(LAYER).transpose(0, 1) for node in nodes), agent.v])
        return k, v


def documents(*tokens: int) -> list[tuple[int, int | None]]:
    return [(n, None) for n in tokens]


def attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in the operands' own dtype throughout, as any model computes it without a kernel: the yardstick of error."""
    rows, num_qo_heads, head_dim = q.shape
    k, v = (part.repeat_interleave(num_qo_heads // k.shape[1], dim=1).transpose(0, 1) for part in (k, v))
    scores = torch.matmul(q.transpose(0, 1), k.transpose(1, 2)) * head_dim**-0.5
    seen = torch.ones(rows, k.shape[1], dtype=torch.bool).tril(k.shape[1] - rows)
    return torch.matmul(scores.masked_fill(~seen, -math.inf).softmax(-1), v).transpose(0, 1)


def check(case: Case, result: Result) -> None:
    """Every agent's rows against fp64: fp32 to 1e-5; else at most 2x (max) and 1.5x (mean) of the plain computation's error."""
    ours, theirs, size = [], [], 0.0
    for i, agent in enumerate(case.agents):
        k, v = case.sequence(agent)
        expected, lse = attend_fp64(agent.q, k, v, sm_scale=case.sm_scale)
        ours.append((result[i][0].double() - expected).abs().flatten())
        theirs.append((attend_plainly(agent.q, k, v).double() - expected).abs().flatten())
        size = max(size, float(expected.abs().max()))
        torch.testing.assert_close(result[i][1].double(), lse, rtol=1e-5, atol=1e-5)
    ours_all, theirs_all = torch.cat(ours), torch.cat(theirs)
    worst, mean = float(ours_all.max()), float(ours_all.mean())
    assert math.isfinite(worst)
    if case.geometry.dtype == torch.float32:
        assert worst <= 1e-5 * size, f"max error {worst}"
        return
    assert worst <= 2 * float(theirs_all.max()), f"max error {worst} against {float(theirs_all.max())}"
    assert mean <= 1.5 * float(theirs_all.mean()), f"mean error {mean} against {float(theirs_all.mean())}"


def assert_same(a: Result, b: Result, who: Sequence[int]) -> None:
    for i in who:
        assert_same_bits(a[i][0], b[i][0], f"o[{i}]")
        assert_same_bits(a[i][1], b[i][1], f"lse[{i}]")


# -- numerics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "G", "head_dim"),
    [
        ("bfloat16", 1, 64),
        ("bfloat16", 2, 80),
        ("bfloat16", 3, 128),
        ("bfloat16", 4, 128),
        ("bfloat16", 7, 64),
        ("bfloat16", 8, 80),
        ("float16", 4, 64),
        ("float32", 1, 128),
        ("float32", 3, 80),
        ("float32", 8, 64),
    ],
)
@interpreted
def test_five_documents_in_one_step_agree_with_fp64(dtype: str, G: int, head_dim: int) -> None:
    lengths = (1, 15, 16, 17, 33)
    agents = [Agent((node,), length) for node, length in enumerate(lengths)]
    agents += [Agent((node,), 33 - length + 1, rows=min(3, 34 - length)) for node, length in enumerate(lengths[:4])]
    case = Case(
        documents(1, 127, 128, 129, 1025), agents, G=G, head_dim=head_dim, dtype=getattr(torch, dtype), num_kv_heads=2
    )
    check(case, case.run())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@interpreted
def test_a_tree_of_three_levels_agrees_with_fp64(dtype: str) -> None:
    nodes = [(130, None), (40, 0), (1, 0), (257, 1)]
    agents = [Agent((0,), 5), Agent((0, 1), 18, 2), Agent((0, 1, 3), 1), Agent((0, 2), 16, 4), Agent((), 20, 7)]
    case = Case(nodes, agents, G=4, dtype=getattr(torch, dtype))
    check(case, case.run())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@interpreted
def test_a_suffix_of_two_and_three_segments_agrees_with_fp64(dtype: str) -> None:
    agents = [Agent((0,), 1030, 12), Agent((0,), 1024, 1), Agent((), 2049, 3)]
    case = Case(documents(5), agents, dtype=getattr(torch, dtype))
    check(case, case.run())


@interpreted
def test_one_agent_may_bring_more_rows_than_a_tile_of_the_prefix_holds() -> None:
    case = Case(documents(70), [Agent((0,), 30, 30), Agent((0,), 9, 9)], G=8, dtype=torch.bfloat16)
    check(case, case.run())


@interpreted
def test_the_public_function_runs_on_the_triton_backend() -> None:
    q, k_prefix, v_prefix = torch.randn(3, 2, 6, 80), torch.randn(150, 3, 80), torch.randn(150, 3, 80)
    k_suffix, v_suffix = torch.randn(2, 3, 20, 3, 80)
    seq_lens = torch.tensor([20, 2, 17], dtype=torch.int32)
    o, lse = attend(q, k_prefix, v_prefix, k_suffix, v_suffix, seq_lens, return_lse=True, backend="triton")
    for i, length in enumerate(seq_lens.tolist()):
        k, v = torch.cat([k_prefix, k_suffix[i, :length]]), torch.cat([v_prefix, v_suffix[i, :length]])
        expected, expected_lse = attend_fp64(q[i], k, v)
        torch.testing.assert_close(o[i].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[i].double(), expected_lse, rtol=1e-5, atol=1e-5)


@interpreted
def test_large_scores_neither_overflow_nor_lose_digits() -> None:
    case = Case(documents(129, 20), [Agent((0,), 17), Agent((1,), 33, 3)], scale=30.0)
    result = case.run()
    for i, agent in enumerate(case.agents):
        expected, lse = attend_fp64(agent.q, *case.sequence(agent))
        torch.testing.assert_close(result[i][0].double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result[i][1].double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mistake", ["a key too many", "a key too few", "a pad key of the prefix"])
@interpreted
def test_control_masks_off_by_one_are_caught(mistake: str) -> None:
    """An agent of three rows, so that a row's next key is in its pages."""
    case = Case(documents(127), [Agent((0,), 20, 3)], dtype=torch.bfloat16)
    check(case, case.run())

    def change(tensors: PlanTensors) -> PlanTensors:
        if mistake == "a pad key of the prefix":
            tensors.node_table[:, 1] += 1
        else:
            tensors.row_back[:-1] += 1 if mistake == "a key too few" else -1
        return tensors

    def shifted() -> Result:
        # K0 must still write to the right place, so only what K2 is given is shifted.
        return case.run(change=change) if mistake.startswith("a pad") else _run_with_shifted_mask(case, change)

    with pytest.raises(AssertionError, match=r"error|not close"):
        check(case, shifted())


def _run_with_shifted_mask(case: Case, change: Callable[[PlanTensors], PlanTensors]) -> Result:
    holder: list[PlanTensors] = []

    def keep(tensors: PlanTensors) -> PlanTensors:
        holder.append(tensors)
        return tensors

    def late(state: State) -> State:
        change(holder[0])
        return state

    return case.run(change=keep, change_state=late)


# -- K0 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("token_major", [False, True])
@interpreted
def test_append_writes_its_rows_and_no_other_byte(dtype: str, token_major: bool) -> None:
    g = Geometry(1, 6, 3, 80, getattr(torch, dtype))
    shape = (5, PAGE, 3, 80) if token_major else (5, 3, PAGE, 80)
    pages = [torch.randn(shape).to(g.dtype) for _ in range(2)]
    k_pages, v_pages = (p.transpose(1, 2) if token_major else p for p in pages)
    page_table = torch.tensor([[4, 2, NOWHERE], [1, NOWHERE, -7], [3, 0, NOWHERE]], dtype=torch.int32)
    seq_lens = torch.tensor([17, 3, 19], dtype=torch.int32)
    row_slot = torch.tensor([2, 0, 0, -1, 2], dtype=torch.int32)
    row_back = torch.tensor([1, 1, 0, 0, 0], dtype=torch.int32)
    kv = torch.randn(5, 2, 3, 80).to(g.dtype)
    k, v = kv[:, 0], kv[:, 1]

    expected = [p.clone() for p in (k_pages, v_pages)]
    for pool, rows in zip(expected, (k, v), strict=True):
        for row, (page, token) in {0: (0, 1), 1: (4, 15), 2: (2, 0), 4: (0, 2)}.items():
            pool[page, :, token] = rows[row]
    q = torch.randn(5, 2, 6, 80).to(g.dtype)[:, 1]
    packed = append(q, k, v, k_pages, v_pages, page_table, seq_lens, row_slot, row_back)
    assert_same_bits(k_pages, expected[0], "k")
    assert_same_bits(v_pages, expected[1], "v")
    assert_same_bits(packed, q.unflatten(1, (3, 2)).transpose(0, 1).contiguous(), "q")

    append(q, k[:0], v[:0], k_pages, v_pages, page_table, seq_lens, row_slot, row_back)
    assert_same_bits(k_pages, expected[0], "k")

    with pytest.raises(AssertionError, match=r"k: \d+ of 19200 differ"):
        append(q[:1], k[:1], v[:1], k_pages, v_pages, page_table, seq_lens, row_slot, row_back + 1)
        assert_same_bits(k_pages, expected[0], "k")


# -- K1 ----------------------------------------------------------------------------------------------------------------


@interpreted
def test_the_prefix_leaves_the_same_states_in_the_same_slots_as_the_plain_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slot by slot, so a walk folded where it may not be shows here; slots that no item fills stay as they came."""
    case = Case([(2100, None), (9, 0)], [Agent((0,), 1), Agent((0, 1), 1), Agent((), 1)], G=3)
    seen: list[PlanTensors] = []
    states: list[State] = []
    guarded = _Guarded(monkeypatch)
    case.run(
        workers=2,
        change=lambda tensors: seen.append(tensors) or tensors,  # type: ignore[func-returns-value]
        change_state=lambda state: states.append(state) or state,  # type: ignore[func-returns-value]
    )
    guarded.stop()
    tensors, state = seen[0], states[0]
    assert tensors.items[:3].tolist() == [[0, 1, 3, 0, 2, 0], [0, 1, 3, 2, 3, 1], [1, 2, 3, 0, 1, 2]]
    order = [case.agents[2], case.agents[0], case.agents[1]]
    q = torch.cat([agent.q for agent in order])
    expected = plain.prefix_attention(
        q, tensors.node_table, tensors.items, tensors.path_table, num_kv_heads=1, layer=LAYER, sm_scale=case.sm_scale
    )
    for slot, rows in ((0, slice(3, 9)), (1, slice(3, 9)), (2, slice(6, 9))):
        for part, other in zip(state, expected, strict=True):
            torch.testing.assert_close(part[slot, :, rows], other[slot, :, rows], rtol=1e-4, atol=1e-5)
    for slot, rows in ((0, slice(0, 3)), (1, slice(0, 3)), (2, slice(0, 6))):
        for part in state:
            assert part[slot, :, rows].isnan().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@interpreted
def test_a_node_walked_by_one_two_or_three_workers_gives_the_same_bits(dtype: str) -> None:
    nodes = [(2100, None), (1030, 0)]
    agents = [Agent((0,), 3), Agent((0, 1), 2), Agent((0, 1), 17, 2)]
    case = Case(nodes, agents, dtype=getattr(torch, dtype))
    one = case.run()
    for workers in (2, 3):
        assert_same(case.run(workers=workers), one, range(3))


@interpreted
def test_control_a_later_walk_that_folds_its_own_segments_is_caught() -> None:
    """The mistake: folding segments 1 and 2 before segment 0 is known. The fold is not associative."""
    case = Case(documents(2100), [Agent((0,), 3) for _ in range(4)])
    one = case.run()

    def change(tensors: PlanTensors) -> PlanTensors:
        assert tensors.path_table[0].tolist() == [1, 2, 2]
        return tensors._replace(path_table=torch.tensor([[1, 2, 0], [0, 0, 0]], dtype=torch.int32))

    def fold_ahead(state: State) -> State:
        ahead = merge(State(*(part[1] for part in state)), State(*(part[2] for part in state)))
        for part, value in zip(state, ahead, strict=True):
            part[1] = value
        return state

    with pytest.raises(AssertionError, match=r"o\[0\]: \d+ of 128 differ, first at"):
        assert_same(case.run(workers=3, change=change, change_state=fold_ahead), one, range(4))


# -- bits --------------------------------------------------------------------------------------------------------------


def crowd(dtype: torch.dtype, agents: int = 24) -> Case:
    """Two documents, a chapter, and agents of one or two rows; rows of many agents share a tile of the prefix."""
    nodes = [(1100, None), (33, 0), (129, None)]
    paths: list[tuple[int, ...]] = [(0,), (0, 1), (2,), ()]
    lengths = [1 + i * 7 % 37 for i in range(agents)]
    chosen = [Agent(paths[i % 4], length, min(length, 1 + i % 2)) for i, length in enumerate(lengths)]
    return Case(nodes, chosen, G=3, dtype=dtype)


@pytest.mark.parametrize(("dtype", "agents"), [("float32", 10), ("bfloat16", 24)])
@interpreted
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: str, agents: int) -> None:
    case = crowd(getattr(torch, dtype), agents)
    among = case.run(bucket=2 * agents)
    for i in (0, agents // 2 + 1, agents - 2, agents - 1):
        assert_same(case.run([i]), among, [i])


@interpreted
def test_agents_in_any_order_and_pages_in_any_place_give_the_same_bits() -> None:
    case = crowd(torch.bfloat16)
    order = random.sample(range(24), 24)
    assert_same(case.run(order, workers=2), case.run(), range(24))


@interpreted
def test_control_segments_that_follow_the_batch_are_caught() -> None:
    case = crowd(torch.float32)

    def change(tensors: PlanTensors) -> PlanTensors:
        tensors.node_table[0, 3] = 512
        tensors.items[0, 4] = 3
        return tensors

    with pytest.raises(AssertionError, match=r"o\[0\]: \d+ of 192 differ, first at"):
        assert_same(case.run([0], change=change), case.run([0, 1]), [0])


@interpreted
def test_a_row_has_the_same_bits_decoded_alone_and_in_a_chunk_over_a_tile_and_a_segment() -> None:
    """The chunk's last rows bring tiles, and a segment, that its first rows do not see."""
    for length, rows in ((66, 7), (1027, 8)):
        case = Case(documents(20), [Agent((0,), length, rows)], G=2)
        together = case.run()[0]
        whole = case.agents[0]
        for row in (0, rows - 4, rows - 1):
            one = Agent((0,), length - rows + 1 + row)
            one.q, one.k, one.v = whole.q[row : row + 1], whole.k[: one.length], whole.v[: one.length]
            case.agents = [one]
            alone = case.run()[0]
            assert_same_bits(alone[0][0], together[0][row], f"o[{row}]")
            assert_same_bits(alone[1][0], together[1][row], f"lse[{row}]")


@interpreted
def test_control_a_key_tile_that_follows_the_rows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvkern.kernels import suffix, tiles

    case = Case(documents(20), [Agent((0,), 66, 7), Agent((0,), 66, 1)])
    many, one = case.agents
    one.q, one.k, one.v = many.q[6:], many.k, many.v
    together = case.run()
    assert_same_bits(together[1][0][0], together[0][0][6], "o[6]")
    narrow = tiles.Tiles(tiles.Tile(16, 32, 4, 2), tiles.Tile(16, 16, 4, 2))
    monkeypatch.setattr(suffix, "tiles", lambda *_: narrow)
    with pytest.raises(AssertionError, match=r"o\[6\]: \d+ of 128 differ, first at"):
        assert_same_bits(case.run([1])[1][0][0], together[0][0][6], "o[6]")


@interpreted
def test_control_a_suffix_cut_elsewhere_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvkern.kernels import suffix

    case = Case(documents(20), [Agent((0,), 1100, 2)])
    right = case.run()
    assert_same(case.run(), right, [0])
    monkeypatch.setattr(suffix, "SUFFIX_SEGMENT", 512)
    with pytest.raises(AssertionError, match=r"o\[0\]: \d+ of 256 differ, first at"):
        assert_same(case.run(), right, [0])


# -- hostile surroundings ----------------------------------------------------------------------------------------------


class _Guarded:
    """torch.empty, zeros and full between guard bands; empty memory is NaN."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bands: list[Tensor] = []
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(torch, "empty", lambda shape, **kw: self.make(shape, math.nan, **kw))
        monkeypatch.setattr(torch, "zeros", lambda shape, **kw: self.make(shape, 0.0, **kw))
        monkeypatch.setattr(torch, "full", lambda shape, value, **kw: self.make(shape, value, **kw))

    def make(self, shape: tuple[int, ...], value: float, **options: Any) -> Tensor:
        if not isinstance(shape, tuple) or not options.get("dtype", torch.float32).is_floating_point:
            return torch.ones(shape, **options).mul_(int(value))
        size = math.prod(shape)
        whole = torch.ones(size + 2 * GUARD, **options) * 7
        whole[GUARD : GUARD + size] = value
        self.bands += [whole[:GUARD], whole[GUARD + size :]]
        return whole[GUARD : GUARD + size].view(shape)

    def stop(self) -> None:
        self.monkeypatch.undo()
        assert len(self.bands) >= 2
        for band in self.bands:
            assert (band == 7).all(), "a guard band was written"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@interpreted
def test_outputs_stay_within_their_memory_and_are_all_written(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agents = [Agent((0,), 17, 3), Agent((0, 1), 1)]
    case = Case([(130, None), (3, 0)], agents, G=3, head_dim=80, num_kv_heads=2, dtype=getattr(torch, dtype))
    expected = case.run(bucket=9)
    repair(monkeypatch)
    guarded = _Guarded(monkeypatch)
    result = case.run(bucket=9)
    guarded.stop()
    assert_same(result, expected, [0, 1, -1])


@interpreted
def test_padding_rows_are_zero_and_minus_infinity() -> None:
    case = Case(documents(40), [Agent((0,), 3, 2)], G=3, dtype=torch.bfloat16)
    result = case.run(bucket=6)
    check(case, result)
    o, lse = result[-1]
    assert o.shape[0] == 4 and bool((o == 0).all()) and bool((lse == -math.inf).all())


@interpreted
def test_a_query_that_is_nan_stays_nan_and_spoils_no_other_row() -> None:
    case = Case(documents(40), [Agent((0,), 5, 3), Agent((0,), 2)], G=2)
    expected = case.run()
    case.agents[0].q[1, 0, 7] = math.nan
    result = case.run()
    o, lse = result[0]
    assert bool(o[1, 0].isnan().all()) and bool(lse[1, 0].isnan())
    for row, head in ((0, 0), (0, 1), (1, 1), (2, 0), (2, 1)):
        assert_same_bits(o[row, head], expected[0][0][row, head], f"o[{row}, {head}]")
    assert_same(result, expected, [1])


@interpreted
def test_a_row_of_slot_minus_one_is_padding_even_within_a_tile() -> None:
    case = Case(documents(40), [Agent((0,), 3, 3)])

    def change(tensors: PlanTensors) -> PlanTensors:
        tensors.row_slot[0] = -1
        return tensors

    o, lse = _run_with_shifted_mask(case, change)[0]
    assert bool((o[0] == 0).all()) and bool((lse[0] == -math.inf).all()) and bool((o[1:] != 0).any())


@interpreted
def test_strided_queries_and_token_major_pages_give_the_same_bits() -> None:
    case = crowd(torch.bfloat16)
    who = [0, 1, 2, 3, 9]
    expected = case.run(who)
    assert_same(case.run(who, strided=True), expected, who)
    assert_same(case.run(who, token_major=True), expected, who)


@interpreted
def test_a_row_without_suffix_keys_has_its_prefix_alone_or_nothing() -> None:
    case = Case(documents(33), [Agent((0,), 1), Agent((), 1)])
    g = case.geometry
    pool = PagePool(g, 2, slots=2, debug=True)
    slots = [pool.acquire_slot(), pool.acquire_slot()]
    plan = Plan.make(pool, [AgentRows(slots[0], case.nodes[0], 1), AgentRows(slots[1], None, 1)])
    t = plan.tensors
    q = torch.cat([case.agents[i].q for i in plan.order]).unflatten(1, (1, -1)).transpose(0, 1)
    options = {"num_kv_heads": 1, "layer": LAYER, "sm_scale": case.sm_scale}
    state = prefix_attention(q, t.node_table, t.items, t.path_table, **options)
    pages = (pool.k_pages(LAYER), pool.v_pages(LAYER), pool.page_table, pool.seq_lens, t.row_slot, t.row_back)
    o, lse = suffix_attention(q, *pages, t.suffix_tiles, t.path_table, state, sm_scale=case.sm_scale)
    with_prefix, without = plan.last_rows
    k, v = case.nodes[0].key(LAYER), case.nodes[0].value(LAYER)
    expected, expected_lse = attend_fp64(case.agents[0].q, k.transpose(0, 1), v.transpose(0, 1))
    torch.testing.assert_close(o[with_prefix].double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[with_prefix].double(), expected_lse[0], rtol=1e-5, atol=1e-5)
    assert bool((o[without] == 0).all()) and bool((lse[without] == -math.inf).all())


@interpreted
def test_a_step_reads_no_tensor_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Tensor) -> None:
        raise AssertionError("tolist")

    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            return func(*args, **(kwargs or {}))

    case = Case(documents(5), [Agent((0,), 3, 2)])
    pool = PagePool(case.geometry, 2, slots=1)
    slot = pool.acquire_slot()
    pool.reserve(slot, 2)
    plan = Plan.make(pool, [AgentRows(slot, case.nodes[0], 2)])
    plan.begin()
    t, agent = plan.tensors, case.agents[0]
    pages = (pool.k_pages(LAYER), pool.v_pages(LAYER), pool.page_table, pool.seq_lens, t.row_slot, t.row_back)
    monkeypatch.setattr(Tensor, "tolist", refuse)
    with NoSync():
        q = append(agent.q, agent.k[:2], agent.v[:2], *pages)
        state = prefix_attention(q, t.node_table, t.items, t.path_table, num_kv_heads=1, layer=0, sm_scale=1.0)
        suffix_attention(q, *pages, t.suffix_tiles, t.path_table, merge(state, state), sm_scale=1.0)
    for read, match in ((t.items[0, 0].item, "_local_scalar_dense"), (t.items.tolist, "tolist")):
        with pytest.raises(AssertionError, match=match), NoSync():
            read()


# -- K3 ----------------------------------------------------------------------------------------------------------------


def some_state(*shape: int, head_dim: int) -> State:
    m = torch.randn(shape) * 20
    m[..., 0] = -math.inf
    seen = (m > -math.inf).float()
    return State(m, torch.rand(shape) * 9 * seen, torch.randn((*shape, head_dim)) * seen[..., None])


@interpreted
def test_merge_is_the_fold_and_an_empty_state_changes_nothing() -> None:
    a, b = some_state(3, 2, 7, head_dim=80), some_state(3, 2, 7, head_dim=80)
    a.m[0, 0, 1], b.m[0, 0, 1] = 3.0, 3.0
    for part, other in zip(merge(a, b), plain.merge(a, b), strict=True):
        torch.testing.assert_close(part, other, rtol=1e-6, atol=1e-6)
    empty = State(torch.full_like(a.m, -math.inf), torch.zeros_like(a.l), torch.zeros_like(a.acc))
    for left, right in ((a, empty), (empty, a)):
        for part, other in zip(merge(left, right), a, strict=True):
            assert torch.equal(part, other)


@interpreted
def test_control_another_grouping_of_the_fold_is_caught() -> None:
    a, b, c = (some_state(64, head_dim=64) for _ in range(3))
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert_same_bits(merge(merge(a, b), c).acc, left.acc, "acc")
    with pytest.raises(AssertionError, match=r"acc: \d+ of 4096 differ, first at"):
        assert_same_bits(left.acc, right.acc, "acc")
