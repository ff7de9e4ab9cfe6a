"""K1 alone: its forms and their bits, what its launcher chooses and refuses, debug mode, and what is compiled where.

The forms of sm_90 run in the interpreter by giving the launcher that architecture: descriptors and tiles are then those.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_triton import Agent, Case, Result, assert_same, check, crowd, documents
from triton_interpreter import INTERPRETING, interpreted, repair

from kvkern.errors import BackendError
from kvkern.plan import PlanTensors

if INTERPRETING:
    from triton.runtime import _allocation, interpreter

    from kvkern.kernels import prefix, tiles

ROOT = Path(__file__).resolve().parent.parent

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETING:
        repair(monkeypatch)


def larger(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.full)


@contextlib.contextmanager
def form(**constants: int) -> Iterator[None]:
    """Every launch within takes this form."""
    with pytest.MonkeyPatch.context() as patch:
        whole = {"num_warps": 8, "num_stages": 2, "BLOCK_M": 128, "BLOCK_N": 128, "DESCRIPTORS": False} | constants
        patch.setattr(prefix, "forms", lambda *_: {"large": whole, "small": whole})
        yield


def run(case: Case, **constants: int) -> Result:
    with form(**constants):
        return case.run()


def small_case(dtype: str, G: int, head_dim: int, tokens: int = 1100) -> Case:
    """A walk with a tail, of two segments unless `tokens` says less; a node below it, one key, a whole tile; 15 rows: from G = 5 on
    two tiles of 64.
    """
    nodes = [(tokens, None), (33, 0), (1, None), (128, None)]
    agents = [Agent((0,), 3, 3), Agent((0, 1), 9, 8), Agent((2,), 2, 2), Agent((3,), 1), Agent((), 1)]
    return Case(nodes, agents, G=G, head_dim=head_dim, num_kv_heads=1 + (G < 4), dtype=getattr(torch, dtype))


# -- forms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "G", "head_dim", "tokens"),
    [
        ("bfloat16", 3, 80, 130),
        larger("bfloat16", 4, 128, 1100),
        larger("float16", 7, 64, 1100),
    ],
)
@interpreted
def test_descriptors_and_pointers_give_the_same_bits_and_agree_with_fp64(
    dtype: str, G: int, head_dim: int, tokens: int
) -> None:
    case = small_case(dtype, G, head_dim, tokens)
    by_pointer = run(case)
    check(case, by_pointer)
    assert_same(run(case, DESCRIPTORS=True), by_pointer, range(5))


@pytest.mark.parametrize(("dtype", "G", "head_dim"), [("bfloat16", 5, 64), larger("float16", 16, 64)])
@interpreted
def test_tiles_of_64_and_128_rows_give_the_same_bits(dtype: str, G: int, head_dim: int) -> None:
    case = small_case(dtype, G, head_dim)
    assert_same(run(case, BLOCK_M=64, num_warps=4, DESCRIPTORS=True), run(case, DESCRIPTORS=True), range(5))


@interpreted
def test_control_tiles_of_64_keys_are_caught() -> None:
    case = Case(documents(300), [Agent((0,), 4, 4)], G=4, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"(o|lse)\[0\]: \d+ of \d+ differ, first at"):
        assert_same(run(case, BLOCK_N=64), run(case), [0])


class _Seen(dict[str, Any]):
    """Forms that note which one a launch takes."""

    def __init__(self, forms: dict[str, Any], seen: list[str]) -> None:
        super().__init__(forms)
        self.seen = seen

    def __getitem__(self, name: str) -> Any:
        self.seen.append(name)
        return super().__getitem__(name)


@interpreted
def test_a_row_has_the_same_bits_alone_in_the_small_form_and_among_others_in_the_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    real = prefix.forms
    monkeypatch.setattr(prefix, "arch_of", lambda _: 90)
    monkeypatch.setattr(prefix, "forms", lambda *of: _Seen(real(*of), seen))
    case = crowd(torch.bfloat16)
    among = case.run()
    for i in (0, 13):
        assert_same(case.run([i]), among, [i])
    assert seen == ["large", "small", "small"]
    assert real(64, 3, torch.bfloat16, 90)["small"]["BLOCK_M"] == 64


@pytest.mark.parametrize(("rows", "name"), [(16, "small"), (17, "large")])
@interpreted
def test_the_small_form_serves_up_to_64_packed_rows(rows: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = prefix.forms
    monkeypatch.setattr(prefix, "forms", lambda *of: _Seen(real(*of), seen))
    Case(documents(5), [Agent((0,), rows, rows)], G=4, dtype=torch.bfloat16).run()
    assert seen == [name]


@interpreted
def test_forms_of_every_architecture_keep_the_keys_of_a_tile() -> None:
    """Tiles of other rows are the same bits, tiles of other keys are not: the forms may differ in the former alone."""
    for arch in (80, 86, 90, 100, 120):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for head_dim in (64, 80, 128, 256):
                made = prefix.forms(head_dim, 4, dtype, arch)
                large, small = made["large"], made["small"]
                assert large["BLOCK_N"] == small["BLOCK_N"]
                assert large["BLOCK_M"] // large["num_warps"] == small["BLOCK_M"] // small["num_warps"]
                assert large["DESCRIPTORS"] is small["DESCRIPTORS"] is (arch >= 90 and dtype != torch.float32)


# -- the launcher ------------------------------------------------------------------------------------------------------


@interpreted
def test_a_users_allocator_is_back_in_place_after_a_launch() -> None:
    def allocator(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        raise AssertionError("the user's")

    token = _allocation._allocator.set(allocator)
    try:
        with tiles.scratch(torch.device("cpu")):
            made = _allocation._allocator.get()(512, 128, None)
            assert isinstance(made, torch.Tensor) and made.numel() == 512
        assert _allocation._allocator.get() is allocator
        with pytest.raises(KeyError), tiles.scratch(torch.device("cpu")):
            raise KeyError
        assert _allocation._allocator.get() is allocator
    finally:
        _allocation._allocator.reset(token)


@interpreted
def test_the_kernel_that_the_environment_names_runs_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(documents(5), [Agent((0,), 2)])
    expected = case.run()
    asked: list[tuple[Any, ...]] = []
    stand_in = ModuleType("kvkern.kernels.prefix_hopper")
    reasons: list[str | None] = [None, "compute capability 8.0 is not 9.0", None, "sm_80"]

    def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        asked.append((device, dtype, head_dim))
        return reasons.pop(0)

    def attention(q: Any, node_table: Any, items: Any, path_table: Any, *, layer: int, sm_scale: float) -> Any:
        asked.append((layer, sm_scale))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KVKERN_PREFIX", "plain")
            return prefix.prefix_attention(
                q, node_table, items, path_table, num_kv_heads=1, layer=layer, sm_scale=sm_scale
            )

    vars(stand_in).update(why_not=why_not, prefix_attention_hopper=attention)
    monkeypatch.setitem(sys.modules, "kvkern.kernels.prefix_hopper", stand_in)
    monkeypatch.setenv("KVKERN_PREFIX", "hopper")
    assert_same(case.run(), expected, [0])
    assert asked == [(torch.device("cpu"), torch.float32, 64), (1, case.sm_scale)]
    asked[1:] = []
    with pytest.raises(BackendError, match=r"^KVKERN_PREFIX: found hopper: compute capability 8.0 is not 9.0"):
        case.run()
    for other in ("", "Hopper", "gluon"):
        monkeypatch.setenv("KVKERN_PREFIX", other)
        with pytest.raises(BackendError, match=rf"^KVKERN_PREFIX: found {other}, needed plain, hopper"):
            case.run()
    assert len(asked) == 2
    monkeypatch.setenv("KVKERN_PREFIX", "plain")
    assert_same(case.run(), expected, [0])
    assert len(asked) == 2

    # Unasked: where the step is one for it, and it serves.
    monkeypatch.delenv("KVKERN_PREFIX")
    assert_same(case.run(), expected, [0])
    assert len(asked) == 2
    monkeypatch.setattr(prefix, "_large", lambda _: True)
    assert_same(case.run(), expected, [0])
    assert asked[2:] == [(torch.device("cpu"), torch.float32, 64), (1, case.sm_scale)]
    assert_same(case.run(), expected, [0])
    assert asked[4:] == [(torch.device("cpu"), torch.float32, 64)]


@interpreted
def test_a_gpu_before_sm_80_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    tiles.arch_of.cache_clear()
    with pytest.raises(BackendError, match=r"^backend: found triton on cuda:0, compute capability 7.5, needed"):
        tiles.arch_of(torch.device("cuda", 0))
    capability = (8, 0)
    assert tiles.arch_of(torch.device("cuda", 0)) == 80
    tiles.arch_of.cache_clear()


@interpreted
def test_switches_are_off_unless_asked_for_and_dependent_launch_is_for_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    off = {"DEBUG": False, "PDL": False}
    monkeypatch.delenv("KVKERN_DEBUG", raising=False)
    assert tiles.switches(cpu) == tiles.switches(cuda) == off
    for name in ("KVKERN_DEBUG", "KVKERN_PDL"):
        monkeypatch.setenv(name, "0")
    assert tiles.switches(cuda) == off
    monkeypatch.setenv("KVKERN_PDL", "1")
    for arch, on in ((80, False), (90, True), (100, True)):
        monkeypatch.setattr(tiles, "arch_of", lambda _, arch=arch: arch)
        assert tiles.switches(cuda) == (off | {"PDL": True, "launch_pdl": True} if on else off)
        assert tiles.switches(cpu) == off
    monkeypatch.setenv("KVKERN_DEBUG", "1")
    assert tiles.switches(cpu) == off | {"DEBUG": True, "debug": True}


# -- debug mode --------------------------------------------------------------------------------------------------------


@pytest.fixture
def asserting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As KVKERN_DEBUG=1; the interpreter leaves assertions out unless its own options say so."""
    if INTERPRETING:
        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
        monkeypatch.setenv("KVKERN_DEBUG", "1")


def walked() -> Case:
    """Items (node, rows, segments, state): (0, 0:3, 0:1, 0), (0, 0:3, 1:2, 1), (0, 0:3, 2:3, 2) with three workers."""
    return Case(documents(2100), [Agent((0,), 3, 3)], dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("item", "column", "value", "match"),
    [
        (0, 0, 2**20, "node"),
        (0, 0, -1, "node"),
        (0, 1, -1, "rows"),
        (0, 1, 4, "rows"),
        (0, 2, 4, "rows"),
        (0, 3, -1, "segments"),
        (0, 3, 2, "segments"),
        (2, 4, 4, "segments"),
        (0, 5, -1, "state"),
        (2, 5, 2**20, "state"),
    ],
)
@interpreted
def test_debug_mode_stops_at_a_work_item_that_is_out_of_range(
    item: int, column: int, value: int, match: str, asserting: None
) -> None:
    def change(tensors: PlanTensors) -> PlanTensors:
        assert tensors.items[:3].tolist() == [[0, 0, 3, 0, 1, 0], [0, 0, 3, 1, 2, 1], [0, 0, 3, 2, 3, 2]]
        tensors.items[item, column] = value
        return tensors

    with pytest.raises(Exception, match=f"work item: {match}"):
        walked().run(workers=3, change=change)


@interpreted
def test_debug_mode_lets_a_right_step_pass_with_the_same_bits(asserting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = walked()
    checked = case.run(workers=3)
    monkeypatch.delenv("KVKERN_DEBUG")
    assert_same(checked, case.run(), [0])


@interpreted
def test_without_debug_mode_it_does_not_stop(asserting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end beyond the step, of an item whose walk is empty: wrong, and harmless enough to run."""
    monkeypatch.delenv("KVKERN_DEBUG")

    def change(tensors: PlanTensors) -> PlanTensors:
        tensors.items[1, 2:5] = torch.tensor([4, 0, 0], dtype=torch.int32)
        return tensors

    walked().run(workers=3, change=change)
    monkeypatch.setenv("KVKERN_DEBUG", "1")
    with pytest.raises(Exception, match="work item: rows"):
        walked().run(workers=3, change=change)


# -- what is compiled --------------------------------------------------------------------------------------------------

CHILD = """
import json, re, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvkern.kernels.prefix import forms, prefix_kernel
from kvkern.kernels.state import ROUNDING

types = {"q_ptr": "*bf16", "node_table_ptr": "*i64", "items_ptr": "*i32", "qk_scale": "fp32"}
made = forms(64, 4, torch.bfloat16, 90)
flags = {"DEBUG": False, "PDL": False}
jobs = {
    "large": made["large"] | flags,
    "small": made["small"] | flags,
    "large with switches": made["large"] | {"DEBUG": True, "PDL": True, "debug": True, "launch_pdl": True},
    "half the rows by as many warps": made["large"] | flags | {"BLOCK_M": 64},
}
found = {}
for name, job in jobs.items():
    names = prefix_kernel.arg_names
    constants = {"G": 4, "HEAD_DIM": 64, "BLOCK_D": 64} | {n: v for n, v in job.items() if n.isupper()}
    kinds = {n: "constexpr" if n.isupper() else "*fp32" if n.endswith("_ptr") else "i32" for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
    options = ROUNDING | {n: v for n, v in job.items() if not n.isupper()}
    source = ASTSource(prefix_kernel, kinds | types, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = binary.asm["ptx"]
    layouts = re.findall(r"#ttg.nvidia_mma<.*?warpsPerCTA = (\\[[^]]*\\])", binary.asm["ttgir"])
    words = ("griddepcontrol.wait", "griddepcontrol.launch_dependents", "assertfail", "wgmma.mma_async", "cp.async.bulk.tensor")
    found[name] = {word: ptx.count(word) for word in words} | {"warps": sorted(set(layouts))}
print(json.dumps(found))
"""


@functools.cache
def compiled() -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as cache:
        file = Path(cache) / "child.py"
        file.write_text(CHILD)
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        child = subprocess.run(
            [sys.executable, file], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
    assert child.returncode == 0, child.stderr
    found: dict[str, dict[str, Any]] = json.loads(child.stdout.splitlines()[-1])
    return found


@pytest.mark.full
@needs_triton
def test_a_warp_has_sixteen_rows_and_every_key_of_a_tile_in_both_forms_of_sm_90() -> None:
    """Then a row's sum is cut in the same places: the small form may follow the batch."""
    found = compiled()
    assert found["large"]["warps"] == ["[8, 1]"] and found["small"]["warps"] == ["[4, 1]"]
    assert found["half the rows by as many warps"]["warps"] not in (["[8, 1]"], ["[4, 1]"])
    for name in ("large", "small"):
        assert found[name]["wgmma.mma_async"] > 0 and found[name]["cp.async.bulk.tensor"] > 0


@pytest.mark.full
@needs_triton
def test_checks_and_waits_are_compiled_only_where_asked_for() -> None:
    found = compiled()
    for word in ("griddepcontrol.wait", "griddepcontrol.launch_dependents", "assertfail"):
        assert found["large with switches"][word] > 0
        assert found["large"][word] == found["small"][word] == 0
