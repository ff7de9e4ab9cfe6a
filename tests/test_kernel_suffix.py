"""K2 alone: segments on one worker or many, what it reads of the page table, what it writes of padding, what it launches.

A kernel with a mistake is the kernel's own source with one line changed: a control then shows which line a test holds.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import test_triton
import torch
from test_triton import LAYER, NOWHERE, Agent, Case, Result, assert_same, check, documents
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import INTERPRETING, interpreted, repair

from kvkern.geometry import PAGE
from kvkern.pages import PagePool
from kvkern.plan import AgentRows, Plan, PlanTensors

if INTERPRETING:
    from triton.runtime import interpreter

    from kvkern.kernels import suffix

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETING:
        repair(monkeypatch)


def larger(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.full)


def use(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **options: Any) -> None:
    """Let Case.run call this module's K2, with these options."""
    monkeypatch.setattr(test_triton, "suffix_attention", functools.partial(module.suffix_attention, **options))


def mistaken(tmp_path: Path, *changes: tuple[str, str]) -> ModuleType:
    """kvkern.kernels.suffix with these lines of its source changed."""
    source = Path(suffix.__file__).read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{source.count(old)} times in suffix.py: {old}"
        source = source.replace(old, new)
    path = tmp_path / "mistaken_suffix.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("mistaken_suffix", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- workers -----------------------------------------------------------------------------------------------------------


def assert_counters_are_zero(module: ModuleType) -> None:
    assert module._counters.zeros
    for zeros in module._counters.zeros.values():
        assert not zeros.any()


@pytest.mark.parametrize("dtype", ["bfloat16", larger("float32")])
@interpreted
def test_segments_on_any_number_of_workers_give_the_same_bits(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 64 tokens, so that there are many: agents of one to five, some with several rows in a tile."""
    monkeypatch.setattr(suffix, "SUFFIX_SEGMENT", 64)
    lengths = [(1, 1), (64, 1), (65, 3), (200, 5), (257, 2)]
    agents = [Agent((0,) if i % 3 else (), length, rows) for i, (length, rows) in enumerate(lengths)]
    case = Case(documents(20), agents, G=3, dtype=getattr(torch, dtype))
    use(monkeypatch, suffix, workers=1)
    one = case.run()
    check(case, one)
    for workers in (2, 3, 7):
        use(monkeypatch, suffix, workers=workers)
        assert_same(case.run(), one, range(len(agents)))
        assert_counters_are_zero(suffix)


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        ((1025, 2049), "bfloat16"),
        larger((1023, 1024), "float32"),
        larger((2047, 2048, 3073), "bfloat16"),
    ],
)
@interpreted
def test_segments_of_1024_tokens_on_workers_give_the_same_bits(
    lengths: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(documents(20), [Agent((0,), n, 2) for n in lengths], dtype=getattr(torch, dtype))
    use(monkeypatch, suffix, workers=1)
    one = case.run()
    check(case, one)
    for workers in (2, 3, 4):
        use(monkeypatch, suffix, workers=workers)
        assert_same(case.run(), one, range(len(lengths)))


@interpreted
def test_the_launcher_takes_the_workers_that_idle_multiprocessors_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    launch = interpreter.GridExecutor.__call__

    def watch(self: Any, *args: Any, **options: Any) -> None:
        if "SPLIT" in options:
            taken.append(options["SPLIT"])
        launch(self, *args, **options)

    monkeypatch.setattr(suffix, "SUFFIX_SEGMENT", 64)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watch)
    case = Case(documents(5), [Agent((0,), 150)])
    one = case.run()
    monkeypatch.setattr(suffix, "multiprocessors", lambda _: 132)
    assert_same(case.run(), one, [0])
    assert taken == [False, True]

    segments = suffix.SUFFIX_SEGMENT
    workers = suffix._workers
    assert workers(segments, 1, 132) == 1
    assert workers(segments + 1, 1, 132) == 2
    assert workers(32 * segments, 8, 132) == 16
    assert workers(32 * segments, 66, 132) == 2
    assert workers(32 * segments, 67, 132) == workers(32 * segments, 1000, 132) == workers(0, 0, 132) == 1


@interpreted
def test_control_a_later_worker_that_folds_its_own_segments_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake: segments 2 and 3 in one state, before 0 and 1 are known. The fold is not associative."""
    ahead = mistaken(
        tmp_path,
        (
            "            at = place + tl.cast(seg, tl.int64) * stride_state\n"
            "            store(m_part_ptr, l_part_ptr, acc_part_ptr, at, count, m, l, acc, HEAD_DIM, BLOCK_M, BLOCK_D)\n",
            "            at = place + tl.cast(seg_begin, tl.int64) * stride_state\n"
            "            m_total, l_total, acc_total = fold(m_total, l_total, acc_total, m, l, acc)\n"
            "            store(m_part_ptr, l_part_ptr, acc_part_ptr, at, count, m_total, l_total, acc_total, HEAD_DIM, BLOCK_M, BLOCK_D)\n",
        ),
        ("for seg in range(run, segments):", "for seg in range(run, segments, run):"),
    )
    case = Case(documents(20), [Agent((0,), 250, 2), Agent((), 256, 2)])
    for module in (suffix, ahead):
        monkeypatch.setattr(module, "SUFFIX_SEGMENT", 64)
    one = case.run()
    use(monkeypatch, ahead, workers=2)
    wrong = case.run()
    check(case, wrong)
    with pytest.raises(AssertionError, match=r"o\[0\]: \d+ of 256 differ, first at"):
        assert_same(wrong, one, range(2))
    # A worker a segment has nothing to fold ahead.
    use(monkeypatch, ahead, workers=4)
    assert_same(case.run(), one, range(2))


@interpreted
def test_control_a_counter_that_is_not_reset_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = mistaken(tmp_path, ("                tl.store(arrived_ptr, 0)\n", ""))
    monkeypatch.setattr(once, "SUFFIX_SEGMENT", 64)
    use(monkeypatch, once, workers=2)
    case = Case(documents(20), [Agent((0,), 100)])
    check(case, case.run())
    with pytest.raises(AssertionError):
        assert_counters_are_zero(once)


@interpreted
def test_streams_and_captured_launches_have_counters_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = suffix._Counters()
    cpu, stream, capturing = torch.device("cpu"), 1, False

    class Device:
        type = "cuda"

    class Stream:
        def __init__(self) -> None:
            self.cuda_stream = stream

        def synchronize(self) -> None:
            assert not capturing

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, dtype, device: zeros(size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(suffix, "COUNTERS", 2048)

    def places(*parts: Tensor) -> list[range]:
        return [range(part.storage_offset(), part.storage_offset() + part.shape[0]) for part in parts]

    gpu: Any = Device()
    capturing = True
    first = counters.get(gpu, 1)  # before any other launch
    capturing = False
    one, again = counters.get(gpu, 7), counters.get(gpu, 256)
    assert one is again
    stream = 2
    two = counters.get(gpu, 7)
    capturing = True
    three, four = counters.get(gpu, 300), counters.get(gpu, 3000)
    assert [len(part) for part in (first, three, four)] == [1, 300, 3000]
    memory = [part.untyped_storage().data_ptr() for part in (first, three, four, one)]
    assert len(set(memory)) == 4 and memory[-1] == two.untyped_storage().data_ptr()
    capturing = False
    taken = places(one, two)
    assert sum(map(len, taken)) == len(set().union(*taken)) == 2 * 256
    assert counters.get(gpu, 2048) is None
    assert counters.get(cpu, 1).shape == (256,)


@interpreted
def test_a_launch_without_counters_has_one_worker_and_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(documents(20), [Agent((0,), 100)])
    one = case.run()
    monkeypatch.setattr(suffix._counters, "get", lambda *_: None)
    use(monkeypatch, suffix, workers=3)
    assert_same(case.run(), one, [0])


# -- the page table ----------------------------------------------------------------------------------------------------


class _TableReads:
    """The entries of a page table that kernels load, as flat indices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.table: Tensor | None = None
        self.entries: set[int] = set()
        load = interpreter.InterpreterBuilder.create_masked_load

        def watch(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            if self.table is not None:
                at = (ptrs.data[mask.data].astype(np.int64) - self.table.data_ptr()) // 4
                # Not beyond it: another tensor may lie there. No agent has the table's last rows, so a read too far shows.
                self.entries.update(at[(at >= 0) & (at < self.table.numel())].tolist())
            return load(builder, ptrs, mask, *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watch)


def table_reads(case: Case, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> set[tuple[int, int]]:
    """(slot, entry) of the page table that K2 loads in a step of these agents."""
    reads = _TableReads(monkeypatch)
    width = 1

    def suffix_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *rest: Any, **options: Any) -> Any:
        nonlocal width
        width = table.shape[1]
        reads.table = table
        out = module.suffix_attention(q, k, v, table, *rest, **options)
        reads.table = None
        return out

    monkeypatch.setattr(test_triton, "suffix_attention", suffix_attention)
    case.run()
    return {divmod(entry, width) for entry in reads.entries}


@interpreted
def test_no_entry_past_the_length_is_read_and_every_one_before_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (1, 16, 17, 64, 65, 130)
    # The reads are told apart by their number.
    monkeypatch.delenv("KVKERN_DEBUG", raising=False)
    case = Case([], [Agent((), n) for n in lengths])
    # Slots are handed out in order.
    expected = {(slot, entry) for slot, n in enumerate(lengths) for entry in range(-(-n // PAGE))}
    assert table_reads(case, monkeypatch, suffix) == expected


@interpreted
def test_control_page_ids_loaded_ahead_without_a_mask_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmasked = mistaken(
        tmp_path, ("table_ptr + keys // PAGE, mask=keys < longest, other=0)", "table_ptr + keys // PAGE)")
    )
    case = Case([], [Agent((), 64)])
    assert len(table_reads(case, monkeypatch, suffix)) == 4
    assert len(table_reads(case, monkeypatch, unmasked)) > 4


@interpreted
def test_control_page_ids_of_the_tile_before_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = mistaken(
        tmp_path, ("page = page_ids(table_ptr, first + BLOCK_N, longest", "page = page_ids(table_ptr, first, longest")
    )
    case = Case([], [Agent((), 130)])
    check(case, case.run())
    use(monkeypatch, stale)
    with pytest.raises(AssertionError, match=r"error|not close"):
        check(case, case.run())


# -- debug mode --------------------------------------------------------------------------------------------------------


@pytest.fixture
def asserting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As KVKERN_DEBUG=1; the interpreter leaves assertions out unless its own options say so."""
    if INTERPRETING:
        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
        monkeypatch.setenv("KVKERN_DEBUG", "1")


def corrupt(case: Case, field: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    """A step in which K2 alone is given a wrong value of one table."""
    right = suffix.suffix_attention

    def suffix_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        row_slot: Tensor,
        row_back: Tensor,
        tiles: Tensor,
        *rest: Any,
        **options: Any,
    ) -> Any:
        page_table, seq_lens, tiles = page_table.clone(), seq_lens.clone(), tiles.clone()
        slot = int(tiles[0, 0])
        if field == "page_table":
            page_table[slot, 1] = random.choice([-1, k.shape[0], NOWHERE])
        elif field == "seq_lens":
            seq_lens[slot] = random.choice([-1, page_table.shape[1] * PAGE + 1])
        elif field == "suffix_tiles: slot":
            tiles[0, 0] = random.choice([-1, page_table.shape[0]])
        elif field == "suffix_tiles: rows outside":
            tiles[0, 1:3] = random.choice([torch.tensor([-1, 0]), torch.tensor([q.shape[1], q.shape[1] + 1])])
        elif field == "suffix_tiles: more rows":
            tiles[0, 1:3] = torch.tensor([0, q.shape[1]])
        elif field == "suffix_tiles: path":
            tiles[0, 3] = random.choice([-1, rest[0].shape[0]])
        else:
            assert field == "nothing"
        return right(q, k, v, page_table, seq_lens, row_slot, row_back, tiles, *rest, **options)

    monkeypatch.setattr(test_triton, "suffix_attention", suffix_attention)
    return case.run()


@pytest.mark.parametrize(
    "field",
    [
        "page_table",
        "seq_lens",
        "suffix_tiles: slot",
        "suffix_tiles: rows outside",
        "suffix_tiles: more rows",
        "suffix_tiles: path",
    ],
)
@interpreted
def test_debug_mode_stops_at_a_table_that_is_out_of_range(
    field: str, asserting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries past the length are out of range in every case here, and are not what it stops at."""
    case = Case(documents(9), [Agent((0,), 30, 9)], dtype=torch.bfloat16)
    with pytest.raises(interpreter.InterpreterError, match=field):
        corrupt(case, field, monkeypatch)


@interpreted
def test_debug_mode_lets_a_right_step_pass(asserting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(documents(9), [Agent((0,), 30, 9), Agent((), 16)], dtype=torch.bfloat16)
    check(case, corrupt(case, "nothing", monkeypatch))


@interpreted
def test_without_debug_mode_it_does_not_stop(asserting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more rows than a tile has, a program leaves the others out: wrong, but nothing that is not its own."""
    monkeypatch.delenv("KVKERN_DEBUG")
    corrupt(Case([], [Agent((), 9, 9)]), "suffix_tiles: more rows", monkeypatch)


def compiled() -> dict[str, dict[str, int]]:
    """How often K2 waits for the kernel before it, asserts and counts arrivals, by what it is compiled with."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        env |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        child = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    found: dict[str, dict[str, int]] = json.loads(child.stdout.splitlines()[-1])
    return found


COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvkern.kernels.suffix import suffix_kernel

sizes = dict(G=1, HEAD_DIM=16, PAGE=16, SEGMENT=1024, RUN=64, BLOCK_M=16, BLOCK_N=16, BLOCK_D=16)
words = {"griddepcontrol.wait": 0, "assertfail": 0, "atom.global": 0}

def kind(name):
    if name.isupper():
        return "constexpr"
    if name in ("q_ptr", "o_ptr", "k_pages_ptr", "v_pages_ptr"):
        return "*bf16"
    if name.startswith(("m_", "l_", "acc_", "lse_")):
        return "*fp32"
    return "fp32" if name == "qk_scale" else "*i32" if name.endswith("_ptr") else "i32"

found = {}
for on in (None, "SPLIT", "DEBUG", "PDL"):
    flags = {flag: flag == on for flag in ("SPLIT", "DEBUG", "PDL")}
    source = ASTSource(suffix_kernel, {name: kind(name) for name in suffix_kernel.arg_names}, sizes | flags)
    options = {"num_stages": 2, "debug": flags["DEBUG"], "launch_pdl": flags["PDL"]}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    found[str(on)] = {word: ptx.count(word) for word in words}
print(json.dumps(found))
"""


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_waits_assertions_and_arrivals_are_compiled_only_where_asked_for() -> None:
    found = compiled()
    for flag, word in (("PDL", "griddepcontrol.wait"), ("DEBUG", "assertfail"), ("SPLIT", "atom.global")):
        assert [on for on, counts in found.items() if counts[word]] == [flag], found


# -- padding, launches -------------------------------------------------------------------------------------------------


def empty_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(math.nan if kw.get("dtype") else 0))


def scatter_padding(tensors: PlanTensors) -> PlanTensors:
    """Rows 1, 64 and 66 of an agent become padding too, beside those at the end."""
    tensors.row_slot[[1, 64, 66]] = -1
    return tensors


@pytest.mark.parametrize(("G", "head_dim", "dtype"), [(3, 80, "float32"), larger(1, 64, "bfloat16")])
@interpreted
def test_padding_rows_are_written_wherever_they_are(
    G: int, head_dim: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case([], [Agent((), 70, 70)], G=G, head_dim=head_dim, dtype=getattr(torch, dtype))
    expected = case.run()[0]
    empty_is_nan(monkeypatch)
    result = test_triton._run_with_shifted_mask(_Bucket(case, 150), scatter_padding)
    padding = torch.zeros(70, dtype=torch.bool)
    padding[[1, 64, 66]] = True
    for (o, lse), here in ((result[-1], torch.ones(80, dtype=torch.bool)), (result[0], padding)):
        assert bool((o[here] == 0).all()) and bool((lse[here] == -math.inf).all())
    for part, other in zip(result[0], expected, strict=True):
        test_triton.assert_same_bits(part[~padding], other[~padding], "rows")


class _Bucket:
    def __init__(self, case: Case, rows: int) -> None:
        self.case, self.rows = case, rows

    def run(self, **options: Any) -> Result:
        return self.case.run(bucket=self.rows, **options)


@interpreted
def test_control_padding_that_no_program_writes_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = mistaken(tmp_path, ("triton.cdiv(rows, RUN)", "rows // RUN"))
    case = Case([], [Agent((), 3, 3)])
    empty_is_nan(monkeypatch)
    assert bool((case.run(bucket=70)[-1][0] == 0).all())
    use(monkeypatch, short)
    o, _ = case.run(bucket=70)[-1]
    assert bool((o[:61] == 0).all()) and bool(o[61:].isnan().all())


def launches_and_fills(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Names of the kernels that are launched, and of the torch operators that write memory or read it."""
    launched: list[str] = []
    operators: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not func.is_view and func is not torch.ops.aten.empty.memory_format:
                operators.append(str(func))
            return func(*args, **(kwargs or {}))

    with monkeypatch.context() as context:
        # The interpreter's own launch copies its arguments, which are operators too.
        context.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn.__name__))
        with Watch():
            call()
    return launched, operators


@pytest.mark.parametrize("workers", [None, 3])
@interpreted
def test_a_layer_is_three_launches_and_no_fill(workers: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(documents(5), [Agent((0,), 3, 2)])
    pool = PagePool(case.geometry, 2, slots=1)
    slot = pool.acquire_slot()
    pool.reserve(slot, 2)
    plan = Plan.make(pool, [AgentRows(slot, case.nodes[0], 2)], bucket=7)
    plan.begin()
    t, agent = plan.tensors, case.agents[0]
    pages = (pool.k_pages(LAYER), pool.v_pages(LAYER), pool.page_table, pool.seq_lens, t.row_slot, t.row_back)
    q, k, v = (torch.cat([x[:2], x[:1].expand(5, -1, -1)]) for x in (agent.q, agent.k, agent.v))

    def layer() -> None:
        packed = test_triton.append(q, k, v, *pages)
        state = test_triton.prefix_attention(
            packed, t.node_table, t.items, t.path_table, num_kv_heads=1, layer=LAYER, sm_scale=1.0
        )
        suffix.suffix_attention(packed, *pages, t.suffix_tiles, t.path_table, state, sm_scale=1.0, workers=workers)

    if workers:
        # A device's counters are filled once.
        suffix._counters.get(q.device, 1)
    launched, operators = launches_and_fills(layer, monkeypatch)
    assert len(launched) == 3 and launched[-1] == "suffix_kernel", launched
    assert operators == []

    monkeypatch.setattr(suffix.torch, "empty", torch.zeros)
    launched, operators = launches_and_fills(layer, monkeypatch)
    assert len(launched) == 3 and operators != []


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("G", [1, 2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.full
@interpreted
def test_these_shapes_agree_with_fp64(G: int, head_dim: int) -> None:
    dtype = random.choice([torch.float32, torch.float16, torch.bfloat16])
    case = Case(documents(9), [Agent((0,), 66, 2), Agent((), 17)], G=G, head_dim=head_dim, dtype=dtype)
    check(case, case.run())


@pytest.mark.parametrize(
    ("G", "head_dim", "dtype"), [(5, 128, "float16"), (6, 80, "float16"), (16, 64, "float32"), (2, 128, "bfloat16")]
)
@interpreted
def test_some_of_these_shapes_agree_with_fp64(G: int, head_dim: int, dtype: str) -> None:
    case = Case(documents(9), [Agent((0,), 66, 2), Agent((), 17)], G=G, head_dim=head_dim, dtype=getattr(torch, dtype))
    check(case, case.run())
