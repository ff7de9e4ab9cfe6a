"""The roof of arithmetic: fused multiply-adds on registers alone, as many at once as a core can have under way.

Compiled where it is measured, by the compiler that builds csrc/, for the width of one instruction set. Twelve sums a thread:
more than the eight that two units of four cycles need, and with both factors they fit the sixteen registers of AVX2.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS = 12
LANES = {"avx2": 8, "avx512": 16, "avx512bf16": 16}
FLAGS = {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f"], "avx512bf16": ["-mavx512f"]}
STEPS = 6_000_000
"""Of each thread and run: some 10 to 30 ms."""

SOURCE = """
typedef float Vector __attribute__((vector_size(4 * LANES)));

extern "C" float multiply_add(long steps, float factor, float more) {
    Vector sum[SUMS], f = Vector{} + factor, m = Vector{} + more;
    for (int i = 0; i < SUMS; ++i) sum[i] = Vector{} + float(i);
    for (long n = 0; n < steps; ++n) {
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; ++i) sum[i] = sum[i] * f + m;
    }
    float all = 0;
    for (int i = 0; i < SUMS; ++i)
        for (int lane = 0; lane < LANES; ++lane) all += sum[i][lane];
    return all;
}
"""


class FmaPeak:
    """run() keeps `threads` threads at it; `flop` is what one run does. NotImplementedError where it cannot be built."""

    def __init__(self, instruction_set: str, threads: int) -> None:
        if instruction_set not in LANES:
            raise NotImplementedError(f"no loop for {instruction_set}")
        lanes = LANES[instruction_set]
        self.flop = 2.0 * lanes * SUMS * STEPS * threads
        self.loop = build(lanes, FLAGS[instruction_set])
        self.threads, self.pool = threads, ThreadPoolExecutor(threads)

    def run(self) -> None:
        # ctypes lets the GIL go.
        for done in [self.pool.submit(self.loop, STEPS, 0.5, 1.0) for _ in range(self.threads)]:
            done.result()


def build(lanes: int, flags: list[str]) -> Callable[[int, float, float], float]:
    """multiply_add(steps, factor, more): the sum of all lanes at the end."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise NotImplementedError(f"{compiler[0]} is not in PATH")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "fma.cpp"), Path(folder, "fma.so")
        source.write_text(SOURCE)
        options = ["-O2", "-ffp-contract=fast", "-shared", "-fPIC", *flags, f"-DLANES={lanes}", f"-DSUMS={SUMS}"]
        done = subprocess.run([*compiler, *options, source, "-o", library], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotImplementedError(f"{compiler[0]}: {done.stderr.strip()[:200]}")
        function = ctypes.CDLL(str(library)).multiply_add
    function.argtypes, function.restype = [ctypes.c_long, ctypes.c_float, ctypes.c_float], ctypes.c_float
    return function  # type: ignore[no-any-return]
