"""The cpu backend: the contract of every backend on each instruction set, and what only this one can get wrong.

The claims about numbers and bits are those of test_attention and test_exact; they are collected here once more, for the
fixture `backend` of this module. The controls stand where the mistakes can be made: in a plan, in a table, in an order.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import numpy as np
import pytest
import test_attention
import test_exact
import torch
from helpers import assert_case_is_exact, assert_same_bits, assert_same_rows, attend, bits, fresh_memory_is_nan
from torch import Tensor

from kvkern import _C, backends, native
from kvkern.errors import BackendError, DeviceError, DtypeError, KvkernError, ShapeError
from kvkern.geometry import Geometry
from kvkern.kernels.oracle import attend_fp64
from kvkern.pages import PagePool
from kvkern.plain import State
from kvkern.plan import AgentRows, Plan, PlanTensors
from kvkern.prefix import SharedPrefix

INSTRUCTION_SETS = _C.instruction_sets()


@pytest.fixture(
    params=[
        isa if isa in (INSTRUCTION_SETS[0], "portable") else pytest.param(isa, marks=pytest.mark.full)
        for isa in INSTRUCTION_SETS
    ]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name that attend is given: "cpu", made to run on this instruction set; on those between the two ends in test-full.

    They are the same source, and test_native_bits takes all of them.
    """
    functions = [
        partial(f, instruction_set=request.param)
        for f in (native.prefix_attention, native.suffix_attention, native.merge)
    ]
    chosen = backends.Backend("cpu", f"the test of {request.param}", native.append, *functions)
    monkeypatch.setattr(backends, "choose", lambda name, device: chosen)
    return "cpu"


# -- the contract ------------------------------------------------------------------------------------------------------

CONTRACT = {
    test_attention: (
        "prefixes_of_any_length",
        "prefixes_whose_segments_are_longer_than_1024_tokens",
        "suffixes_of_any_length",
        "heads_of_any_shape",
        "steps_of_any_number_of_rows",
        "agents_may_bring_rows_up_to_the_edge_of_any_tile",
        "agents_may_bring_any_number_of_rows_up_to_300",
        "any_number_of_agents_up_to_300_decode_together",
        "a_case_of_any_shape_at_all",
        "a_scale_of_ones_own",
        "scores_as_large_as_a_model_makes_them_do_not_overflow",
        "trees_several_documents_and_agents_without_one_in_one_step",
        "every_level_of_a_path_is_seen_once",
        "extends_of_many_rows_beside_decode_rows",
        "rows_that_come_one_by_one_append_to_the_pages_they_left",
        "padding_rows_give_nothing_and_write_nothing",
        "a_nan_stays_one_and_in_its_own_row",
        "attend_on_plain_tensors",
        "attend_gives_0_and_minus_infinity_where_nothing_is_seen",
        "attend_has_the_bits_of_the_operator",
        "attend_where_nobody_has_a_suffix_is_attention_over_the_prefix",
        "attend_with_suffixes_of_any_length_none_included",
        "prefixes_whose_heads_and_layers_lie_more_than_2_to_the_31_elements_apart",
        "suffix_pages_of_which_something_lies_more_than_2_to_the_31_elements_apart",
    ),
    test_exact: (
        "a_row_has_the_same_bits_alone_and_among_64",
        "alone_and_among_others_whatever_the_heads",
        "alone_and_among_others_where_suffixes_cross_a_segment",
        "it_is_the_same_bits_beside_nobody_somebody_or_everybody",
        "padding_rows_change_no_bit",
        "rows_have_the_same_bits_one_at_a_time_and_all_at_once",
        "siblings_and_other_documents_change_no_bit",
        "control_segments_that_follow_the_batch_are_caught",
        "the_order_of_agents_changes_no_bit",
        "which_pages_and_slots_an_agent_has_changes_no_bit",
        "segments_on_one_worker_or_many_have_the_same_bits",
        "every_node_of_a_path_may_be_split",
        "control_a_later_worker_that_folds_as_it_walks_is_caught",
    ),
}
for module, names in CONTRACT.items():
    for name in names:
        globals()[f"test_{name}"] = getattr(module, f"test_{name}")


# -- one step, called below the operator -------------------------------------------------------------------------------


@dataclass
class Step:
    """Some agents with a document or without, their rows in packing order, ready for the functions of the backend."""

    plan: PlanTensors
    pool: PagePool
    node: SharedPrefix | None
    q: Tensor
    keep: Plan  # holds the memory of the tables

    @classmethod
    def make(
        cls,
        *,
        agents: int = 6,
        rows: int = 1,
        prefix_tokens: int = 300,
        suffix_tokens: int = 40,
        num_kv_heads: int = 2,
        G: int = 2,
        head_dim: int = 32,
        dtype: torch.dtype = torch.float32,
        workers_per_node: int = 1,
    ) -> Step:
        geometry = Geometry(1, num_kv_heads * G, num_kv_heads, head_dim, dtype)
        node = SharedPrefix(geometry, torch.arange(prefix_tokens))
        node.block()[:, :, :, :prefix_tokens].normal_()
        node.publish()
        pool = PagePool(geometry, agents * (suffix_tokens // 16 + 1), slots=agents)
        pool.pages.normal_()
        for slot in (pool.acquire_slot() for _ in range(agents)):
            pool.reserve(slot, suffix_tokens)
            pool.advance(slot, suffix_tokens - rows)
            pool.seq_lens[slot] = suffix_tokens - rows
        plan = Plan.make(pool, [AgentRows(i, node, rows) for i in range(agents)], workers_per_node=workers_per_node)
        plan.begin()
        q = torch.randn(agents * rows, num_kv_heads * G, head_dim).to(dtype)
        return cls(plan.tensors, pool, node, q, plan)

    def prefix(self, *, q: Tensor | None = None, instruction_set: str = "", **changed: Tensor) -> State:
        t = self.plan._replace(**changed)
        return native.prefix_attention(
            self.q if q is None else q,
            t.node_table,
            t.items,
            t.path_table,
            num_kv_heads=self.pool.geometry.num_kv_heads,
            layer=0,
            sm_scale=0.2,
            instruction_set=instruction_set,
        )

    def suffix(self, state: State, *, instruction_set: str = "", **changed: Tensor) -> tuple[Tensor, Tensor]:
        given = {
            "q": self.q,
            "k_pages": self.pool.k_pages(0),
            "v_pages": self.pool.v_pages(0),
            "page_table": self.pool.page_table,
            "seq_lens": self.pool.seq_lens,
            **self.plan._asdict(),
        } | changed
        del given["node_table"], given["items"]
        return native.suffix_attention(**given, state=state, sm_scale=0.2, instruction_set=instruction_set)

    def run(self, instruction_set: str = "") -> tuple[Tensor, Tensor]:
        return self.suffix(self.prefix(instruction_set=instruction_set), instruction_set=instruction_set)


def assert_same_states(a: State, b: State, name: str) -> None:
    for part, x, y in zip(State._fields, a, b, strict=True):
        assert_same_bits(x, y, f"{name}.{part}")


# -- exp2 --------------------------------------------------------------------------------------------------------------


def exp2(x: Tensor, instruction_set: str) -> Tensor:
    y = torch.full_like(x, math.nan)
    _C.exp2(x.data_ptr(), y.data_ptr(), x.numel(), instruction_set=instruction_set)
    return y


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_exp2_is_right_to_one_part_in_2_to_the_23(instruction_set):
    x = torch.cat([torch.empty(1_000_000).uniform_(-126, 1), torch.empty(500_000).uniform_(-1, 0.5)])
    right = torch.exp2(x.double())
    error = (exp2(x, instruction_set).double() - right).abs() / right
    assert error.max() <= 2**-23 and error.mean() <= 2**-25


@pytest.mark.full
def test_exp2_is_as_right_against_long_double_over_its_whole_range():
    """Every 211th float from -126 to 1, of both signs down to the smallest, so each binade has its share."""
    first, step = random.randrange(211), 211
    patterns = [
        np.arange(low + first, high, step, dtype=np.uint32) for low, high in ((0, 0x3F800000), (1 << 31, 0xC2FC0000))
    ]
    x = torch.from_numpy(np.concatenate(patterns).view(np.float32))
    right = np.exp2(x.numpy().astype(np.longdouble))
    for instruction_set in INSTRUCTION_SETS:
        error = np.abs(exp2(x, instruction_set).numpy() - right) / right
        bound = 0.8 if instruction_set == "portable" else 0.6  # without and with products that are not rounded
        assert error.max() <= bound * 2.0**-23, (instruction_set, float(error.max() * 2**23))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_exp2_where_it_has_no_choice(instruction_set):
    whole = torch.arange(-126.0, 128.0)
    assert_same_bits(exp2(whole, instruction_set), torch.exp2(whole.double()).float(), "exp2")
    below = torch.tensor([-126.51, -127.0, -149.0, -1000.0, -3.0e38, -math.inf])
    assert_same_bits(exp2(below, instruction_set), torch.zeros_like(below), "exp2 of what is too small")
    assert_same_bits(exp2(torch.tensor([0.0, -0.0]), instruction_set), torch.ones(2), "exp2(0)")
    nan = torch.tensor([0x7FC00000, 0x7F800001, -0x400000, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert exp2(nan, instruction_set).isnan().all()


def test_control_a_coarser_exp2_would_be_seen():
    x = torch.empty(100_000).uniform_(-126, 0)
    right = torch.exp2(x.double())
    error = (torch.exp2(x.half().float()).double() - right).abs() / right
    assert error.max() > 2**-23


# -- lanes, threads, processes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_has_the_same_bits_in_any_lane_of_any_group(backend, make_case, dtype, G):
    """From one lane of one vector to more than two groups: every width of the kernels, full and not."""
    case = make_case(rows=52, prefix_tokens=140, num_kv_heads=1, G=G, head_dim=32, dtype=dtype, layers=1)
    alone = [attend(backend, case.only(i))[0] for i in range(52)]
    for rows in (2, 4, 5, 8, 9, 12, 13, 16, 17, 24, 25, 33, 48, 49, 52):
        some = random.sample(range(52), rows)
        for i, out in zip(some, attend(backend, case.only(*some)), strict=True):
            assert_same_rows(alone[i], out, i)


@pytest.mark.parametrize("G", [16, 24, 25, 71])
def test_a_token_may_have_more_rows_than_a_group(backend, make_case, G):
    case = make_case(tree={"doc": (130, None)}, agents=[("doc", 20, 3)], num_kv_heads=1, G=G, head_dim=16)
    assert_case_is_exact(attend(backend, case), case)


@pytest.mark.parametrize("head_dim", [16, 48, 96, 256])
def test_any_head_dim_of_a_geometry(backend, make_case, head_dim):
    case = make_case(rows=5, prefix_tokens=150, suffix_tokens=[1, 20, 33, 64, 70], G=3, head_dim=head_dim)
    assert_case_is_exact(attend(backend, case), case)


def threads_alive() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
@pytest.mark.parametrize(("dtype", "workers_per_node"), [(torch.float32, 1), (torch.bfloat16, 2)])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_one_thread_and_seven_have_the_same_bits(instruction_set, dtype, workers_per_node):
    """Work for seven threads, so that there are seven: the pool keeps them."""
    step = Step.make(
        agents=120,
        rows=2,
        prefix_tokens=1100,
        suffix_tokens=60,
        G=3,
        head_dim=64,
        dtype=dtype,
        workers_per_node=workers_per_node,
    )
    with test_exact.threads(1):
        one = step.prefix(instruction_set=instruction_set)
        o, lse = step.suffix(one, instruction_set=instruction_set)
    for n in (2, 7):
        with test_exact.threads(n):
            many = step.prefix(instruction_set=instruction_set)
            o_many, lse_many = step.suffix(many, instruction_set=instruction_set)
        for name, a, b in (("m", one.m, many.m), ("l", one.l, many.l), ("acc", one.acc, many.acc)):
            assert_same_bits(a[:workers_per_node], b[:workers_per_node], name)
        assert_same_bits(o, o_many, "o")
        assert_same_bits(lse, lse_many, "lse")
    assert threads_alive() >= 7


def test_callers_at_the_same_time_get_what_they_get_alone():
    steps = [Step.make(agents=40, prefix_tokens=1100, G=3, head_dim=64) for _ in range(3)]
    right = [step.run() for step in steps]
    wrong: list[int] = []

    def ask(i: int) -> None:
        torch.set_num_threads(3)
        for _ in range(5):
            o, lse = steps[i].run()
            if not (torch.equal(bits(o), bits(right[i][0])) and torch.equal(bits(lse), bits(right[i][1]))):
                wrong.append(i)

    with test_exact.threads(3):
        askers = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
    assert not wrong


FORK = """
    import os, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    from helpers import bits
    from test_native import Step
    torch.set_num_threads(3)
    step = Step.make(agents=60, prefix_tokens=1100, G=3, head_dim=64)
    before = step.run()[0]
    child = os.fork()
    if child == 0:
        same = torch.equal(bits(step.suffix(step.prefix())[0]), bits(before))
        print("child", same, len(os.listdir("/proc/self/task")), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    print("parent", torch.equal(bits(step.run()[0]), bits(before)), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_a_forked_process_has_threads_of_its_own_and_ends():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORK), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    child, parent = done.stdout.split("\n")[:2]
    assert child.startswith("child True") and int(child.split()[2]) >= 3, done.stdout
    assert parent == "parent True"


def test_flushing_subnormals_in_the_caller_changes_no_bit():
    step = Step.make(agents=30, prefix_tokens=200)
    step.pool.pages[0, 1] *= 1e-39
    state = State(*(torch.zeros_like(part) for part in step.prefix()))
    state.m.fill_(-math.inf)
    o, lse = step.suffix(state)
    assert ((o != 0) & (o.abs() < 1.17e-38)).any(), "nothing was subnormal"
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        flushed = step.suffix(state)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(o, flushed[0], "o")
    assert_same_bits(lse, flushed[1], "lse")


# -- 16 bits -----------------------------------------------------------------------------------------------------------


def average(v: Tensor, instruction_sets: Sequence[str] = INSTRUCTION_SETS) -> Tensor:
    """Rows of one agent each, over two tokens whose keys are alike: the mean of v [2, rows, head_dim], exact but for its rounding."""
    _, rows, head_dim = v.shape
    geometry = Geometry(1, 1, 1, head_dim, v.dtype)
    pool = PagePool(geometry, rows, slots=rows)
    pool.pages.fill_(0)
    for slot in (pool.acquire_slot() for _ in range(rows)):
        pool.reserve(slot, 2)
        pool.advance(slot, 1)
        pool.seq_lens[slot] = 1
        pool.pages[0, 1, pool.table(slot)[0], 0, :2] = v[:, slot]
    plan = Plan.make(pool, [AgentRows(i, None, 1) for i in range(rows)])
    plan.begin()
    step = Step(plan.tensors, pool, None, torch.zeros(rows, 1, head_dim, dtype=v.dtype), plan)
    outs = [step.run(instruction_set)[0][:, 0] for instruction_set in instruction_sets]
    for other in outs[1:]:
        assert torch.equal(bits(other), bits(outs[0]))
    return outs[0]


def too_small(x: Tensor) -> Tensor:
    """In bf16, what has a subnormal difference from its neighbour: products of pairs take subnormals for 0."""
    return (x.dtype == torch.bfloat16) & (x.abs().float() < 2.0**-118)


def test_subnormals_of_bf16_count_as_0_where_it_is_multiplied_in_pairs_and_nowhere_else():
    x = torch.tensor([1, 5, 127, 128], dtype=torch.int16).view(torch.bfloat16).expand(2, 1, 4).repeat(1, 1, 4)
    for name in INSTRUCTION_SETS:
        expected = torch.where(x[0] < 2.0**-126, 0, x[0]) if name == "avx512bf16" else x[0]
        assert_same_bits(average(x, (name,)), expected, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_comes_back_as_it_went(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    # Of two the sum must be finite in fp32, where it is not infinite itself.
    lost = every.isnan() | (every == 0) | (every.isfinite() & (every.float().abs() >= 2.0**127)) | too_small(every)
    every = torch.where(lost, torch.zeros_like(every), every).view(256, 256)
    assert_same_bits(average(torch.stack([every, every])), every, "v")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_rounded_to_nearest_ties_to_even(dtype):
    one = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    one = torch.where(one.isfinite() & ~too_small(one), one, torch.zeros_like(one)).view(256, 256)
    # Neighbours have a tie between them; any other value has not.
    for two in (one.flatten().roll(1).view(256, 256), one.flatten()[torch.randperm(one.numel())].view(256, 256)):
        mean = ((one.float() + two.float()) / 2).to(dtype)
        assert_same_bits(average(torch.stack([one, two])) + 0.0, mean + 0.0, "mean")


# -- instruction sets --------------------------------------------------------------------------------------------------


def test_the_default_is_the_best_instruction_set():
    step = Step.make()
    assert_same_bits(step.run()[0], step.run(INSTRUCTION_SETS[0])[0], "o")
    assert INSTRUCTION_SETS[-1] == "portable"


def test_control_two_instruction_sets_are_two_pieces_of_code():
    if len(INSTRUCTION_SETS) == 1:
        pytest.skip("only the portable one runs here")
    step = Step.make(prefix_tokens=1500)
    a, b = (step.run(name)[0] for name in (INSTRUCTION_SETS[0], "portable"))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError, match=r"o: \d+ of \d+ differ"):
        assert_same_bits(a, b, "o")


def test_in_fp32_all_that_multiply_and_add_in_one_rounding_have_the_same_bits():
    step = Step.make(prefix_tokens=1500)
    fused = [step.run(name)[0] for name in INSTRUCTION_SETS if name != "portable"]
    for other in fused[1:]:
        assert_same_bits(other, fused[0], "o")


def test_an_instruction_set_that_does_not_run_here_is_refused():
    with pytest.raises(ValueError, match=r"instruction_set: found mmx, needed .*portable"):
        Step.make().prefix(instruction_set="mmx")


# -- the fold alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_merge_is_the_fold_of_the_kernels(instruction_set):
    whole = Step.make(agents=9, prefix_tokens=5000, G=3)
    slots = 5
    split = whole.plan.items.new_tensor([[0, 0, 9, seg, seg + 1, seg] for seg in range(slots)])
    table = whole.plan.path_table.new_tensor([[1, 2, 2, 2, 2]])
    apart = whole.prefix(items=split, path_table=table, instruction_set=instruction_set)
    parts = [State(*(part[slot] for part in apart)) for slot in range(slots)]
    merge = partial(native.merge, instruction_set=instruction_set)
    one = whole.prefix(instruction_set=instruction_set)
    assert_same_states(reduce(merge, parts), State(*(part[0] for part in one)), "fold")
    with pytest.raises(AssertionError, match=r"right\.l: \d+ of \d+ differ"):  # the control: another order
        right = reduce(lambda later, earlier: merge(earlier, later), parts[::-1])
        assert_same_states(right, State(*(part[0] for part in one)), "right")


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_what_has_seen_nothing_changes_nothing(instruction_set):
    state = State(torch.randn(3, 5), torch.rand(3, 5) + 1, torch.randn(3, 5, 7))
    empty = State(torch.full((3, 5), -math.inf), torch.zeros(3, 5), torch.zeros(3, 5, 7))
    assert_same_states(native.merge(state, empty, instruction_set=instruction_set), state, "right")
    assert_same_states(native.merge(empty, state, instruction_set=instruction_set), state, "left")
    assert_same_states(native.merge(empty, empty, instruction_set=instruction_set), empty, "both")
    merged = native.merge(State(*(part.transpose(0, 1) for part in state)), State(*(p.transpose(0, 1) for p in empty)))
    assert_same_states(merged, State(*(part.transpose(0, 1).contiguous() for part in state)), "strided")


# -- what is not touched, what is refused ------------------------------------------------------------------------------


def test_slots_that_no_item_fills_and_tables_are_left_alone():
    step = Step.make(prefix_tokens=100)
    before = [t.clone() for t in (*step.plan, step.pool.page_table, step.pool.seq_lens, step.pool.pages, step.q)]
    with fresh_memory_is_nan():
        state = step.prefix()
    assert state.m[1].isnan().all() and state.acc[1].isnan().all() and not state.acc[0].isnan().any()
    step.suffix(state)
    after = (*step.plan, step.pool.page_table, step.pool.seq_lens, step.pool.pages, step.q)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_rows_that_no_tile_holds_give_0_and_minus_infinity():
    step = Step.make(agents=4)
    tiles = step.plan.suffix_tiles.clone()
    tiles[1, 2] = tiles[1, 1]
    state = step.prefix()
    o, lse = step.suffix(state, suffix_tiles=tiles)
    right = step.suffix(state)
    assert_same_bits(o[1], torch.zeros_like(o[1]), "o[1]")
    assert (lse[1] == -math.inf).all()
    assert_same_bits(o[2:], right[0][2:], "o[2:]")
    slots = step.plan.row_slot.clone()
    slots[1] = -1
    assert_same_bits(step.suffix(state, row_slot=slots)[0], o, "o")


def test_control_a_length_off_by_one_is_caught():
    step = Step.make(agents=3, rows=5, suffix_tokens=30)
    state = step.prefix()
    o, _ = step.suffix(state)
    wrong, _ = step.suffix(state, row_back=step.plan.row_back + 1)
    with pytest.raises(AssertionError, match=r"o: \d+ of \d+ differ, first at \(0, 0, 0\)"):
        assert_same_bits(wrong, o, "o")
    k, v = (
        torch.cat([pages, pool[step.pool.table(1)].transpose(0, 1).flatten(1, 2)[:, :30]], dim=1).transpose(0, 1)
        for pages, pool in (
            (step.node.key(0), step.pool.k_pages(0)),
            (step.node.value(0), step.pool.v_pages(0)),
        )
    )
    reference, _ = attend_fp64(step.q[5:10], k, v, sm_scale=0.2)
    torch.testing.assert_close(o[5:10].double(), reference, rtol=1e-5, atol=1e-5)
    assert (wrong[5:10].double() - reference).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("table", "place", "value", "message"),
    [
        ("items", (0, 0), 2, "node of item 0: found 2, needed 0 to 1"),
        ("items", (0, 0), -1, "node of item 0: found -1"),
        ("items", (0, 0), 1, "tokens of node 1: found 0, needed 1 to 0"),
        ("items", (0, 1), -1, "row begin of item 0: found -1, needed 0 to 5"),
        ("items", (0, 2), 7, "row end of item 0: found 7, needed 0 to 6"),
        ("items", (0, 1), 2**31 - 1, "row begin of item 0: found 2147483647"),
        ("items", (0, 3), -1, "segment begin of item 0: found -1, needed 0 to 0"),
        ("items", (0, 3), 1, "segment begin of item 0: found 1, needed 0 to 0"),
        ("items", (0, 4), 2, "segment end of item 0: found 2, needed 1 to 1"),
        ("items", (0, 4), 0, "segment end of item 0: found 0, needed 1 to 1"),
        ("items", (0, 5), 2, "state of item 0: found 2, needed 0 to 1"),
        ("items", (0, 5), -1, "state of item 0: found -1"),
        ("node_table", (0, 0), 0, "address of node 0: found 0"),
        ("node_table", (0, 0), 4097, "address of node 0: found 4097"),
        ("node_table", (0, 1), 385, "tokens of node 0: found 385, needed 1 to 384"),
        ("node_table", (0, 3), 0, "tokens in a segment of node 0: found 0"),
    ],
)
def test_an_item_outside_its_tables_is_refused(table, place, value, message):
    step = Step.make()
    changed = getattr(step.plan, table).clone()
    changed[place] = value
    with pytest.raises(IndexError, match=message):
        step.prefix(**{table: changed})


@pytest.mark.parametrize(
    ("table", "place", "value", "message"),
    [
        ("suffix_tiles", (2, 0), 6, "slot of suffix tile 2: found 6, needed 0 to 5"),
        ("suffix_tiles", (2, 0), -1, "slot of suffix tile 2: found -1"),
        ("suffix_tiles", (2, 1), -1, "row begin of suffix tile 2: found -1"),
        ("suffix_tiles", (2, 2), 7, "row end of suffix tile 2: found 7, needed 2 to 6"),
        ("suffix_tiles", (2, 2), 1, "row end of suffix tile 2: found 1"),
        ("suffix_tiles", (2, 3), 2, "path of suffix tile 2: found 2, needed 0 to 1"),
        ("path_table", (0, 0), 2, "flag of path 0: found 2, needed 1 to 1"),
        ("path_table", (0, 1), 3, "flag of path 0: found 3, needed 1 to 2"),
        ("seq_lens", 3, 289, "suffix length of slot 3: found 289, needed 0 to 288"),
        ("page_table", (3, 1), 18, "page of slot 3: found 18, needed 0 to 17"),
        ("page_table", (3, 2), -1, "page of slot 3: found -1"),
    ],
)
def test_a_tile_outside_its_tables_is_refused(table, place, value, message):
    step = Step.make()
    changed = (
        getattr(step.pool, table, None) if table in ("seq_lens", "page_table") else getattr(step.plan, table)
    ).clone()
    changed[place] = value
    with pytest.raises(IndexError, match=message):
        step.suffix(step.prefix(), **{table: changed})


def test_a_page_past_the_length_is_no_index():
    step = Step.make()
    table = step.pool.page_table.clone()
    right = step.run()
    table[:, 3:] = 2**31 - 1
    assert_same_bits(step.suffix(step.prefix(), page_table=table)[0], right[0], "o")


@pytest.mark.parametrize(
    ("name", "change", "kind", "field"),
    [
        ("q", lambda t: t.double(), DtypeError, "q"),
        ("q", lambda t: t[:, :3], ShapeError, "q"),
        ("q", lambda t: t[0], ShapeError, "q"),
        ("q", lambda t: torch.stack([t, t], -1)[..., 0], ShapeError, "q.stride(-1)"),
        ("q", lambda t: t[:5], ShapeError, "row_slot"),
        ("k_pages", lambda t: t.half(), DtypeError, "k_pages"),
        ("k_pages", lambda t: t.to("meta"), DeviceError, "k_pages"),
        ("v_pages", lambda t: t[..., :16], ShapeError, "v_pages"),
        ("v_pages", lambda t: t[:, :1], ShapeError, "v_pages"),
        ("page_table", lambda t: t.long(), DtypeError, "page_table"),
        ("page_table", lambda t: t[0], ShapeError, "page_table"),
        ("seq_lens", lambda t: t[:2], ShapeError, "seq_lens"),
        ("row_slot", lambda t: t.long(), DtypeError, "row_slot"),
        ("row_back", lambda t: t[:1], ShapeError, "row_back"),
        ("suffix_tiles", lambda t: t[:, :3], ShapeError, "suffix_tiles"),
        ("suffix_tiles", lambda t: t.t().contiguous().t(), ShapeError, "suffix_tiles.stride()"),
        ("path_table", lambda t: t.long(), DtypeError, "path_table"),
        ("path_table", lambda t: t[:, :1].contiguous(), ShapeError, "state.m"),
        ("state", lambda s: s._replace(acc=s.acc[..., :16]), ShapeError, "state.acc"),
        ("state", lambda s: s._replace(l=s.l.double()), DtypeError, "state.l"),
    ],
)
def test_k2_refuses_by_name(name, change, kind, field):
    step = Step.make()
    given: dict[str, object] = {
        "q": step.q,
        "k_pages": step.pool.k_pages(0),
        "v_pages": step.pool.v_pages(0),
        "page_table": step.pool.page_table,
        "seq_lens": step.pool.seq_lens,
        "state": step.prefix(),
        **step.plan._asdict(),
    }
    changed = {name: change(given[name])}
    state = changed.pop("state", given["state"])
    with pytest.raises(KvkernError) as caught:
        step.suffix(state, **changed)
    assert type(caught.value) is kind and caught.value.field == field


@pytest.mark.parametrize(
    ("name", "change", "kind", "field"),
    [
        ("q", lambda t: t.int(), DtypeError, "q"),
        ("q", lambda t: t.to("meta"), DeviceError, "q"),
        ("q", lambda t: t[..., :8], ShapeError, "q"),
        ("items", lambda t: t[:, :5], ShapeError, "items"),
        ("items", lambda t: t.long(), DtypeError, "items"),
        ("node_table", lambda t: t.int(), DtypeError, "node_table"),
        ("node_table", lambda t: t.to("meta"), DeviceError, "node_table"),
        ("path_table", lambda t: t[0], ShapeError, "path_table"),
    ],
)
def test_k1_refuses_by_name(name, change, kind, field):
    step = Step.make()
    given = {"q": step.q, **step.plan._asdict()}
    with pytest.raises(KvkernError) as caught:
        step.prefix(**{name: change(given[name])})
    assert type(caught.value) is kind and caught.value.field == field


def test_merge_refuses_by_name():
    state = State(torch.zeros(3), torch.zeros(3), torch.zeros(3, 4))
    for field, other in (("b.acc", state._replace(acc=torch.zeros(3, 5))), ("b.l", state._replace(l=torch.zeros(2)))):
        with pytest.raises(ShapeError, match=field):
            native.merge(state, other)
    with pytest.raises(DtypeError, match=r"b\.m"):
        native.merge(state, state._replace(m=torch.zeros(3).double()))


# -- the choice --------------------------------------------------------------------------------------------------------


def test_it_is_the_default_on_the_cpu_and_torch_stays_a_name():
    assert backends.choose(None, "cpu").name == backends.choose("cpu", "cpu").name == "cpu"
    assert backends.choose("torch", "cpu").name == "torch"
    assert backends.choose(None, "meta").name == "torch"


def test_it_is_refused_on_another_device():
    with pytest.raises(BackendError, match="backend: found cpu on cuda, needed tensors on the CPU"):
        backends.choose("cpu", "cuda")
