"""The kernels compiled for GPUs that are not there, held to gates: registers, spills, and what stands in the main loop.

Absolute gates hold under any Triton. The golden table has a column for each Triton that the project is tested with: growth
beyond its allowance fails, and so do other layouts, which mean other bits. Each gate has a control that trips it. What is
compiled are the launches that the launchers make (bench/compile_report.py). Speed cannot be seen this way.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from bench import compile_report as report  # noqa: E402

GOLDEN = Path(__file__).with_name("golden_compile.json")

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""Shared memory that one block may have."""

TENSOR_MEMORY = 512
"""Columns that a block may have; asked for more, the compiler makes a kernel that only traps."""

PRODUCT = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""The tensor core instruction that K1 must come to; K2's 16 rows are HMMA everywhere."""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@functools.cache
def rows(arch: int, core: bool = True) -> dict[str, dict[str, Any]]:
    """What each variant came to, by its name; the core ones with their controls."""
    return {f"{row['kernel']} {row['variant']}": row for row in report.rows_of(arch, core, controls=core)}


def held(arch: int, core: bool = True) -> list[dict[str, Any]]:
    return [row for row in rows(arch, core).values() if not row["control"]]


def tripped(row: dict[str, Any]) -> set[str]:
    """Names of the absolute gates that this row does not pass."""
    if "error" in row:
        return {f"does not compile: {row['error']}"}
    arch, kernel, loop = row["arch"], row["kernel"], row["loop"]
    half = "fp32" not in row["variant"]
    found = {
        "shared memory": row["shared_bytes"] > SHARED_BYTES[arch],
        "tensor memory": row["tensor_memory"] > TENSOR_MEMORY,
        "empty": row["instructions"] <= 50,
        # An operation that says how it rounds (.rn) stays as it is; one that does not may become part of an fma.
        "free arithmetic": kernel in ("prefix", "suffix", "merge") and row["ptx"]["free"] > 0,
        "local memory in the loop": half and loop["LDL"] + loop["STL"] > 0,
    }
    if (half and arch == 80) or kernel in ("append", "merge"):
        found["spills"] = row["spills"] > 0 or row["stack_bytes"] > 0
    if half and kernel in ("prefix", "suffix"):
        product = PRODUCT[arch] if kernel == "prefix" else "HMMA"
        found["tensor cores"] = loop[product] < 4
        # By 16 bytes a thread, or by TMA. An address from the node table brings no alignment of its own.
        found["wide copies"] = loop["LDGSTS.128"] == 0 and loop["UTMALDG"] == 0
        found["products wait for each other"] = len(row["product_waits"]) > 2
        if loop["LDGSTS.128"] and (kernel == "suffix" or arch == 80):
            # How many groups of copies are still under way where the loop waits for the oldest.
            found["one buffer"] = max(row["copy_waits"], default=0) == 0
    return {name for name, is_wrong in found.items() if is_wrong}


def grown(row: dict[str, Any], column: dict[str, Any]) -> set[str]:
    """How this row is worse than, or other than, its Triton's column of the golden table."""
    if report.key(row) not in column:
        return {"not in the golden table"}
    now, then = report.golden(row), column[report.key(row)]
    found = {
        "layouts": now["fingerprint"] != then["fingerprint"] or now["warps_per_cta"] != then["warps_per_cta"],
        "registers": now["registers"] > then["registers"] + 8,
        "spills": now["spills"] > then["spills"] or now["stack_bytes"] > then["stack_bytes"],
        "shared memory": now["shared_bytes"] > then["shared_bytes"],
        "tensor memory": now["tensor_memory"] > then["tensor_memory"],
        "instructions": now["instructions"] > 1.04 * then["instructions"],
        "instructions of a tile": now["instructions_per_tile"] > 1.04 * then["instructions_per_tile"],
        "memory in the loop": any(now["loop"][name] > then["loop"][name] for name in then["loop"]),
    }
    return {name for name, is_wrong in found.items() if is_wrong}


def column() -> dict[str, Any]:
    """The installed Triton's column; without one the comparison is skipped by name, and never passed."""
    import triton

    table = json.loads(GOLDEN.read_text(encoding="utf-8"))
    if triton.__version__ not in table:
        pytest.skip(
            f"golden_compile.json has no column for triton {triton.__version__}"
            "; do: python -m bench.compile_report --write-golden tests/golden_compile.json"
        )
    return table[triton.__version__]


@pytest.mark.parametrize("arch", report.ARCHES)
def test_every_gate_holds(arch: int) -> None:
    wrong = {report.key(row): sorted(tripped(row)) for row in held(arch) if tripped(row)}
    assert len(held(arch)) >= 4
    assert wrong == {}


@pytest.mark.parametrize("arch", report.ARCHES)
def test_nothing_has_grown_and_no_layout_has_changed(arch: int) -> None:
    golden = column()
    wrong = {report.key(row): sorted(grown(row, golden)) for row in held(arch) if grown(row, golden)}
    assert wrong == {}


@pytest.mark.full
@pytest.mark.parametrize("arch", report.ARCHES)
def test_every_variant_passes_and_has_not_grown(arch: int) -> None:
    wrong = {report.key(row): sorted(tripped(row)) for row in held(arch, core=False) if tripped(row)}
    assert len(held(arch, core=False)) > 12
    assert wrong == {}
    golden = column()
    known = [row for row in held(arch, core=False) if report.key(row) in golden]
    wrong = {report.key(row): sorted(grown(row, golden)) for row in known if grown(row, golden)}
    assert wrong == {}
    assert [report.key(row) for row in held(arch, core=False) if row not in known] == [], "not in the golden table"


@pytest.mark.parametrize("arch", report.ARCHES)
def test_the_fold_is_fused_where_it_says_so(arch: int) -> None:
    """One fma for l and one for each element of acc that a thread holds."""
    row = rows(arch)["merge fp32 D128"]
    assert row["ptx"]["rounded"] > 0
    assert row["ptx"]["fused"] == 1 + 16 * row["head_dim"] // (32 * row["tile"]["num_warps"])


@pytest.mark.parametrize(
    ("arch", "control", "gate"),
    [
        (80, "suffix table in the loop", "one buffer"),
        (80, "suffix maxnreg=64", "spills"),
        (80, "merge enable_fp_fusion", "free arithmetic"),
    ],
)
def test_control_a_gate_is_tripped(arch: int, control: str, gate: str) -> None:
    row = rows(arch)[control]
    assert row["control"]
    assert gate in tripped(row), tripped(row)


def test_control_products_that_wait_for_each_other_are_caught() -> None:
    """Short of registers the compiler serialises K1's products: each has a wait of its own, or nothing is made at all."""
    starved = tripped(rows(90)["prefix maxnreg=128"])
    assert "products wait for each other" in starved or any("serialized" in name for name in starved), starved
    row = rows(90)["prefix bf16 D128 G4"]
    assert "products wait for each other" in tripped(row | {"product_waits": [0] * 12})


def test_control_other_tiles_have_other_layouts() -> None:
    plain, other = rows(90)["prefix bf16 D128 G4"], rows(90)["prefix BLOCK_N=64"]
    assert other["fingerprint"] != plain["fingerprint"]
    assert "layouts" in grown(plain | {"fingerprint": other["fingerprint"]}, {report.key(plain): report.golden(plain)})


@pytest.mark.parametrize(
    ("field", "more", "gate"),
    [
        ("registers", 9, "registers"),
        ("spills", 1, "spills"),
        ("stack_bytes", 8, "spills"),
        ("shared_bytes", 16, "shared memory"),
        ("tensor_memory", 1, "tensor memory"),
        ("instructions", 0.05, "instructions"),
        ("instructions_per_tile", 0.05, "instructions of a tile"),
        ("LDL", 1, "memory in the loop"),
        ("STL", 1, "memory in the loop"),
        ("LDS", 1, "memory in the loop"),
    ],
)
def test_control_growth_is_caught_and_the_allowance_is_not(field: str, more: float, gate: str) -> None:
    row = rows(90)["prefix bf16 D128 G4"]
    golden = {report.key(row): copy.deepcopy(report.golden(row))}
    assert grown(row, golden) == set()
    larger = copy.deepcopy(row)
    at = larger["loop"] if field in larger["loop"] else larger
    at[field] += more if more >= 1 else int(more * at[field]) + 1
    assert grown(larger, golden) == {gate}
    if field == "registers":
        assert grown(row | {"registers": row["registers"] + 8}, golden) == set()


def test_a_row_that_the_golden_table_lacks_is_not_passed() -> None:
    assert grown(rows(90)["prefix bf16 D128 G4"], {}) == {"not in the golden table"}


def test_the_loop_is_found_and_a_wait_out_of_line_is_none() -> None:
    lines = [
        "MOV R1, c[0x0][0x28]",
        "@P0 BRA 0x0080",  # a wait that did not succeed at once goes out of line
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "MUFU.EX2 R3, R3",
        "@P1 BRA 0x0010",
        "LDL R3, [R1]",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3",
        "@!P0 BRA 0x0020",
        "BRA 0x0080",
    ]
    code = report.instructions("\n".join(f"        /*{n * 16:04x}*/       {line} ;" for n, line in enumerate(lines)))
    assert [i.address for i in code] == [16 * n for n in range(len(lines))]
    loop = report.main_loop(code)
    assert [i.address // 16 for i in loop] == [1, 2, 3, 4, 5]
    assert report.waits(loop, "WARPGROUP") == [1]
    assert report.counts(loop)["EX2"] == 1 and report.counts(loop)["LDL"] == 0
    assert report.counts(code)["LDL"] == 1
    assert report.main_loop(code[:5] + code[6:]) == []


# -- launches of a layer -----------------------------------------------------------------------------------------------

LAYER = """
import json, sys
sys.argv[0] = "kvkern"  # without transformers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from bench.compile_report import recorded
from kvkern.attention import shared_prefix_attention
from kvkern.geometry import Geometry
from kvkern.pages import PagePool
from kvkern.plan import AgentRows, Plan

VIEWS = ("view", "reshape", "as_strided", "slice", "select", "unbind", "detach", "alias", "expand", "permute", "transpose",
         "unsqueeze", "squeeze", "_unsafe_view")
NOTHING = (*VIEWS, "empty", "empty_like", "empty_strided", "new_empty", "shared_prefix_attention")

class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if name not in NOTHING:
            self.ran.append(name)
        return op(*args, **(kwargs or {}))

pool = PagePool(Geometry(1, 8, 2, 64, torch.float16), 8, slots=2)
agents = []
for _ in range(2):
    slot = pool.acquire_slot()
    pool.reserve(slot, 4)
    agents.append(AgentRows(slot, None, 1))
plan = Plan.make(pool, agents)
plan.begin()
q, k = torch.zeros(2, 8, 64, dtype=torch.float16), torch.zeros(2, 2, 64, dtype=torch.float16)
with recorded() as launches:
    shared_prefix_attention(q, k, k, plan, pool, layer=0, backend="triton")
    launches.clear()
    with Seen() as layer:
        shared_prefix_attention(q, k, k, plan, pool, layer=0, backend="triton")
    with Seen() as control:
        shared_prefix_attention(q, k, k, plan, pool, layer=0, backend="triton")
        torch.zeros(1)
print(json.dumps([[launch.kernel.fn.__name__ for launch in launches], layer.ran, control.ran]))
"""


@functools.cache
def layer() -> list[list[str]]:
    """Kernels that the attention of a layer launches, twice; the tensor operations beside them; and those with a fill."""
    child = subprocess.run(
        [sys.executable, "-c", LAYER],
        # The launches are recorded, so nothing is interpreted; it lets the backend be chosen without a GPU.
        env=dict(os.environ) | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    found: list[list[str]] = json.loads(child.stdout.splitlines()[-1])
    return found


def test_a_layer_is_three_launches_and_nothing_is_filled() -> None:
    launches, others, _ = layer()
    assert [name.split("_")[0] for name in launches] == ["append", "prefix", "suffix"] * 2
    assert others == []


def test_control_a_fill_is_seen() -> None:
    assert layer()[2] != []
