"""K1 in Gluon, compiled for an sm_90 that is not there: registers, shared memory, and whether the softmax is overlapped.

This file, run as a program, is the child that compiles: without TRITON_INTERPRET, which Triton reads on decoration.
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
import torch

ROOT = Path(__file__).resolve().parent.parent
WAIT = "mbarrier.wait(k_full.index((tile + 1) % STAGES), ((tile + 1) // STAGES) & 1)\n"
"""The wait for the next K in the main loop, between the softmax and the wait for P V."""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@functools.cache
def compiled(variant: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        child = subprocess.run(
            [sys.executable, __file__, variant], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
    assert child.returncode == 0, child.stderr
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


@needs_triton
def test_it_fits_and_its_main_loops_do_not_spill() -> None:
    found = compiled("128")
    assert found["registers"] == 168 and found["shared_bytes"] <= 232_448
    # A few bytes outside the main loops.
    assert found["stack_bytes"] <= 16
    # Beside these two there are what idle warps hold and what the first warpgroup has before it gives some up.
    assert {24, 240} <= set(found["setmaxnreg"])
    assert len(found["loops"]) == 2
    assert all(loop["spills"] == 0 for loop in found["loops"])


@needs_triton
def test_the_softmax_lies_between_the_two_waits_of_a_main_loop() -> None:
    for loop in compiled("128")["loops"]:
        assert loop["waits"] == ["0x1", "0x0"] and loop["exponentials_between"] >= 60, loop


@needs_triton
def test_control_without_the_wait_for_the_next_tile_there_the_overlap_is_lost() -> None:
    loops = compiled("128 no boundary")["loops"]
    assert len(loops) == 2
    assert all(loop["exponentials_between"] < 60 for loop in loops), loops


@needs_triton
def test_anything_but_hopper_with_16_bits_is_refused() -> None:
    from kvkern.kernels.prefix_hopper import prefix_attention_hopper, unfit, why_not

    assert unfit(90, torch.bfloat16, 128) is None and unfit(90, torch.float16, 64) is None
    assert unfit(80, torch.bfloat16, 128) == "sm_80" and unfit(100, torch.bfloat16, 128) == "sm_100"
    assert unfit(90, torch.float32, 128) is not None and unfit(90, torch.bfloat16, 96) == "head_dim 96"
    assert why_not(torch.device("cpu"), torch.bfloat16, 128) is not None

    from kvkern.errors import UnsupportedError

    nothing = torch.zeros(2, 6, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="hopper"):
        q = torch.zeros(1, 2, 4, 128, dtype=torch.bfloat16)
        prefix_attention_hopper(q, nothing.long(), nothing, nothing, layer=0, sm_scale=1.0)


# -- the child ---------------------------------------------------------------------------------------------------------


def main(variant: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from kvkern.kernels.state import ROUNDING

    path = ROOT / "kvkern/kernels/prefix_hopper.py"
    text = path.read_text()
    if "no boundary" in variant:
        assert text.count(WAIT) == 1
        # Waited for before the softmax instead, so that no block boundary is left behind it.
        text = text.replace(WAIT, "pass\n").replace(
            "        m, l, alpha, p = softmax(m, l, s, qk_scale, left, LAST",
            f"        if not LAST:\n            {WAIT}        m, l, alpha, p = softmax(m, l, s, qk_scale, left, LAST",
        )
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "prefix_hopper_variant.py"
        copy.write_text(text)
        spec = importlib.util.spec_from_file_location("prefix_hopper_variant", copy)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = module.prefix_hopper_kernel
        aligned = {(n,): [["tt.divisibility", 16]] for n, a in enumerate(kernel.arg_names) if a.endswith("_ptr")}
        source = GluonASTSource(
            kernel, module.signature(torch.bfloat16), module.constants(4, int(variant.split()[0])), aligned
        )
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4} | ROUNDING)
        cubin = Path(folder) / "cubin"
        cubin.write_bytes(binary.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage, sass = (
            subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers is not None, usage
    found = {
        "registers": int(numbers[1]),
        "stack_bytes": int(numbers[2]),
        "shared_bytes": binary.metadata.shared,
        "setmaxnreg": sorted(
            {int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", binary.asm["ptx"])}
        ),
        "loops": main_loops(sass),
    }
    print(json.dumps(found))


def main_loops(sass: str) -> list[dict[str, Any]]:
    """The innermost loops that hold HGMMA: their waits in order, exponentials between the first two, and spills.

    A loop's branch back has a predicate; the one out of a wait's own loop, which ptxas puts at the end, has none.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    loops = []
    for at, text in code:
        target = re.match(r"@\S+ BRA (?:\S+, )?0x([0-9a-f]+)", text)
        if target is not None and int(target[1], 16) < at:
            body = [line for place, line in code if int(target[1], 16) <= place <= at]
            if any("HGMMA" in line for line in body):
                loops.append((int(target[1], 16), at, body))
    inner = [a for a in loops if not any(b is not a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    found = []
    for _, _, body in inner:
        waits = [n for n, line in enumerate(body) if "WARPGROUP.DEPBAR" in line]
        between = body[waits[0] : waits[1]] if len(waits) > 1 else []
        found.append(
            {
                "waits": [body[n].split(",")[-1].strip() for n in waits],
                "exponentials_between": sum("MUFU.EX2" in line for line in between),
                "spills": sum(bool(re.search(r"\b(?:LDL|STL)\b", line)) for line in body),
                "instructions": len(body),
            }
        )
    return found


if __name__ == "__main__":
    main(sys.argv[1])
