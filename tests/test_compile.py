"""The Triton kernels compiled for GPUs that are not there: registers, stack, shared memory and the instructions that matter.

Each architecture is compiled by a child process without TRITON_INTERPRET, since Triton reads that when a kernel is
decorated; this file, run as a program with an architecture, is that child. Speed cannot be seen this way.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""Shared memory that one block may have."""

MMA = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""The tensor core instruction that K1 must come to; K2's 16 rows are HMMA everywhere."""

HEAD_DIM, G = 128, 4
MERGE_WARPS = 4

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@functools.cache
def compiled(arch: int) -> dict[str, dict[str, Any]]:
    """What each kernel came to, by name."""
    with tempfile.TemporaryDirectory() as cache:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        child = subprocess.run(
            [sys.executable, __file__, str(arch)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
    assert child.returncode == 0, child.stderr
    found: dict[str, dict[str, Any]] = json.loads(child.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["append", "prefix", "suffix", "merge"])
def test_a_kernel_compiles_and_fits(arch: int, kernel: str) -> None:
    found = compiled(arch)[kernel]
    print(arch, kernel, found)
    assert found["shared_bytes"] <= SHARED_BYTES[arch]
    assert found["instructions"] > 50
    if arch < 100:
        assert found["stack_bytes"] == 0
        assert found["counts"]["LDL"] == found["counts"]["STL"] == 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_attention_runs_on_tensor_cores_fed_by_wide_asynchronous_copies(arch: int) -> None:
    found = compiled(arch)
    for kernel, instruction in (("prefix", MMA[arch]), ("suffix", "HMMA")):
        counts = found[kernel]["counts"]
        assert counts[instruction] >= 16, counts
        # Keys and values by 16 bytes a thread. An address from the node table brings no alignment of its own: without
        # the hint in K1 this count is 0.
        assert counts["LDGSTS.128"] >= 16, counts


def test_control_a_kernel_short_of_registers_is_caught() -> None:
    found = compiled(80)["suffix with 64 registers"]
    assert found["stack_bytes"] > 0 and found["counts"]["STL"] > 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_product_and_sum_may_be_fused_but_those_written_so(arch: int) -> None:
    """In PTX an operation that says how it rounds (.rn) stays as it is; one that does not may become part of an fma."""
    for kernel in ("prefix", "suffix", "merge"):
        ptx = compiled(arch)[kernel]["ptx"]
        assert ptx["rounded"] > 0 and ptx["free"] == 0, (kernel, ptx)


def test_control_a_launch_that_leaves_fusing_to_the_compiler_is_caught() -> None:
    assert compiled(80)["merge with fusion"]["ptx"]["free"] > 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_fold_is_fused_where_it_says_so(arch: int) -> None:
    """One fma for l and one for each element of acc that a thread holds."""
    from kvkern.kernels.merge import BLOCK_M

    assert compiled(arch)["merge"]["ptx"]["fused"] == 1 + BLOCK_M * HEAD_DIM // (32 * MERGE_WARPS)


# -- the child ---------------------------------------------------------------------------------------------------------


def main(arch: int) -> None:
    import torch

    from kvkern.geometry import PAGE, SUFFIX_SEGMENT
    from kvkern.kernels import append, merge, prefix, suffix
    from kvkern.kernels.tiles import tiles

    chosen = tiles(HEAD_DIM, G, torch.bfloat16, arch)
    dims = {"HEAD_DIM": HEAD_DIM, "BLOCK_D": HEAD_DIM}
    pages = {"PAGE": PAGE}
    heads = {"HEADS": 8, "BLOCK_H": 8, "G": G, "BLOCK_Q": 8 * G}
    jobs: dict[str, tuple[Any, dict[str, int], dict[str, int]]] = {
        "append": (append.append_kernel, dims | pages | heads, {"num_warps": 4}),
        "prefix": (prefix.prefix_kernel, dims | {"G": G}, chosen.prefix.options()),
        "suffix": (
            suffix.suffix_kernel,
            dims | pages | {"G": G, "SEGMENT": SUFFIX_SEGMENT},
            chosen.suffix.options(),
        ),
        "merge": (merge.merge_kernel, dims | {"BLOCK_M": merge.BLOCK_M}, {"num_warps": MERGE_WARPS}),
    }
    if arch == 80:
        kernel, constants, options = jobs["suffix"]
        jobs["suffix with 64 registers"] = (kernel, constants, options | {"maxnreg": 64})
        kernel, constants, options = jobs["merge"]
        jobs["merge with fusion"] = (kernel, constants, options | {"enable_fp_fusion": True})
    print(json.dumps({name: compile_one(*job, arch) for name, job in jobs.items()}))


def compile_one(kernel: Any, constants: dict[str, int], options: dict[str, int], arch: int) -> dict[str, Any]:
    """Compile as a launch on aligned tensors would, and read the binary back."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kvkern.kernels.state import ROUNDING

    constants = constants | {name: value for name, value in options.items() if name.startswith("BLOCK")}
    options = ROUNDING | {name: value for name, value in options.items() if not name.startswith("BLOCK")}
    signature = {name: kind(name) for name in kernel.arg_names}
    # Pointers and strides of ordinary tensors are multiples of 16; what is named in do_not_specialize never says so.
    aligned = [n for n, name in enumerate(kernel.arg_names) if name.endswith("_ptr") or name.startswith("stride_")]
    attributes = {(n,): [["tt.divisibility", 16]] for n in aligned if kernel.arg_names[n] != "stride_table"}
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tools / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers is not None, usage
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    bases = [name.split(".")[0] for name in names]
    counts = {name: bases.count(name) for name in ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "LDL", "STL")}
    counts["LDGSTS.128"] = sum(name.startswith("LDGSTS") and name.endswith(".128") for name in names)
    ptx = binary.asm["ptx"]
    return {
        "registers": int(numbers[1]),
        "stack_bytes": int(numbers[2]),
        "shared_bytes": binary.metadata.shared,
        "instructions": len(names),
        "counts": counts,
        "ptx": {
            "rounded": len(re.findall(r"\b(?:mul|add|sub)\.rn\.f32\b", ptx)),
            "free": len(re.findall(r"\b(?:mul|add|sub)\.f32\b", ptx)),
            "fused": len(re.findall(r"\bfma\.rn\.f32", ptx)),
        },
    }


def kind(name: str) -> str:
    """Type of a kernel's argument, by its name."""
    if name.isupper() or name.startswith(("BLOCK_", "HEAD_")):
        return "constexpr"
    if name == "qk_scale":
        return "fp32"
    if not name.endswith("_ptr"):
        return "i32"
    if name == "node_table_ptr":
        return "*i64"
    if name in ("q_ptr", "k_ptr", "v_ptr", "k_pages_ptr", "v_pages_ptr", "o_ptr"):
        return "*bf16"
    return "*fp32" if name.startswith(("m_", "l_", "acc_", "lse_")) else "*i32"


if __name__ == "__main__":
    main(int(sys.argv[1]))
