"""A PREDICTION from disassembled main loops: cycles by unit, and the share of the tensor peak or of the memory rate.

python -m bench.static_model                   for the H100           --gpu "A100" ...   --json   the same as JSON
python -m bench.static_model --rows FILE       from rows of bench/compile_report.py --json, without compiling

A loop is counted by unit, for one tile of one block on one multiprocessor. Work of different units either runs one after
another (their sum: a loop that waits for each product before it goes on) or at the same time (the largest alone). The
rates are those of the vendors and of the literature; clocks under load, latencies, the cache and conflicts are not modelled.
Where bench/results/ has a measurement of the same GPU and shape, that is shown in the prediction's place.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.compile_report import rows_of

ROOT = Path(__file__).resolve().parent.parent
SUBCORES = 4
MUFU_CYCLES = 8
"""Of a warp's special function instruction: 4 lanes a cycle on each sub-core."""
SHARED_BYTES_A_CYCLE = 128
LATENCY = 800e-9
"""Seconds from asking memory to having it, under load: an assumption."""


@dataclass(frozen=True)
class Gpu:
    """Peak rates. flop_a_cycle: of one multiprocessor's tensor cores, 16-bit operands without sparsity."""

    name: str
    arch: int
    processors: int
    clock: float
    flop_a_cycle: int
    bytes_a_second: float
    shared_bytes: int
    registers: int = 65_536

    @property
    def flop_a_second(self) -> float:
        return self.processors * self.clock * self.flop_a_cycle


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 108, 1.41e9, 2048, 2.0e12, 167_936),
        Gpu("H100", 90, 132, 1.83e9, 4096, 3.35e12, 233_472),
        Gpu("H200", 90, 132, 1.83e9, 4096, 4.8e12, 233_472),
        Gpu("B200", 100, 148, 1.85e9, 8192, 8.0e12, 233_472),
    )
}

HEADS, G, HEAD_DIM = 8, 4, 128
SHAPES = [(B, P, S) for B in (1, 16, 64, 256, 1024, 4096) for P in (2048, 32768, 131072) for S in (64, 256, 512)]


@dataclass(frozen=True)
class Cycles:
    """Of one tile of one block, by unit."""

    tensor: float
    special: float
    issue: float
    shared: float

    @property
    def overlapped(self) -> float:
        return max(self.tensor, self.special, self.issue, self.shared)

    @property
    def serial(self) -> float:
        """One unit after another; shared memory feeds the tensor cores while they run."""
        return max(self.tensor, self.shared) + self.special + self.issue


def product_cost(name: str, tile: dict[str, int], head_dim: int, of_tile: int) -> tuple[float, float]:
    """Floating point operations and bytes from shared memory of one tensor core instruction, per warp that issues it.

    of_tile: how many such instructions the tile's loop has, for those that do not say their shape.
    """
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        m, n, k = map(int, match.groups())
        operands = n * k * 2 + (m * k * 2 if name.endswith("A shared") else 0)
        return 2 * m * n * k / 4, operands / 4  # four warps issue one instruction together
    if match := re.match(r"HMMA\.(\d{2})(\d{1})(\d{2})", name):
        m, n, k = map(int, match.groups())
        return 2 * m * n * k, 0  # its operands are registers; what loads them is counted by itself
    if name.startswith("UTCHMMA"):
        flop = 4 * tile["BLOCK_M"] * tile["BLOCK_N"] * head_dim / of_tile
        return flop / tile["num_warps"], 2 * tile["BLOCK_N"] * head_dim * 2 / of_tile / tile["num_warps"]
    raise ValueError(f"no rate is known for {name}")


def cycles(row: dict[str, Any], gpu: Gpu) -> Cycles:
    """Count the main loop of a row of the compile report."""
    tile, loop, warps = row["tile"], row["loop"], row["tile"]["num_warps"]
    flop, shared = 0.0, 0.0
    for name, count in row["products"].items():
        one = product_cost(name, tile, row["head_dim"], sum(row["products"].values()))
        flop, shared = flop + count * one[0], shared + count * one[1]
    shared += 512 * sum(loop[name] for name in ("LDS", "STS", "LDSM", "STSM"))
    shared = shared * warps + 2 * tile["BLOCK_N"] * row["head_dim"] * 2  # and the copies of keys and values into it
    return Cycles(
        tensor=flop * warps / gpu.flop_a_cycle,
        special=loop["MUFU"] * MUFU_CYCLES * warps / SUBCORES,
        issue=row["instructions_per_tile"] * warps / SUBCORES,
        shared=shared / SHARED_BYTES_A_CYCLE,
    )


def tensor_share(row: dict[str, Any], gpu: Gpu) -> float:
    """Predicted share of the tensor peak, while nothing but the main loop runs."""
    found = cycles(row, gpu)
    # A loop that lets a product go on while it does something else has a wait that leaves one under way.
    together = any(groups > 0 for groups in row["product_waits"])
    return found.tensor / (found.overlapped if together else found.serial)


def memory_share(row: dict[str, Any], gpu: Gpu) -> float:
    """Predicted share of the memory rate, from the bytes that all resident blocks have under way (Little's law)."""
    tile = row["tile"]
    tile_bytes = 2 * tile["BLOCK_N"] * row["head_dim"] * 2
    under_way = (max(row["copy_waits"], default=0) / 2 + 1) * tile_bytes
    threads = 32 * tile["num_warps"]
    blocks = min(
        gpu.shared_bytes // (row["shared_bytes"] + 1024),
        gpu.registers // (math.ceil(row["registers"] / 8) * 8 * threads),
        2048 // threads,
    )
    needed = gpu.bytes_a_second / gpu.processors * LATENCY
    fed = blocks * under_way / needed
    # Nor faster than the loop's instructions can be issued.
    issued = tile_bytes / (row["instructions_per_tile"] * tile["num_warps"] / SUBCORES / gpu.clock)
    return min(1.0, fed, issued * gpu.processors / gpu.bytes_a_second)


def roofline(gpu: Gpu, B: int, P: int, S: int) -> float:
    """Seconds of one layer's attention where every unit runs at its peak: the prefix read once, each suffix once."""
    token_bytes = 2 * HEADS * HEAD_DIM * 2
    prefix = max(4 * B * G * HEADS * HEAD_DIM * P / gpu.flop_a_second, P * token_bytes / gpu.bytes_a_second)
    return prefix + B * S * token_bytes / gpu.bytes_a_second


def predicted(gpu: Gpu, prefix: dict[str, Any], suffix: dict[str, Any], B: int, P: int, S: int) -> float:
    """Seconds of K1 and K2 by the model: whole row tiles, and the predicted shares of the peaks."""
    token_bytes = 2 * HEADS * HEAD_DIM * 2
    rows = math.ceil(B * G / prefix["tile"]["BLOCK_M"]) * prefix["tile"]["BLOCK_M"]
    flop = 4 * rows * HEADS * HEAD_DIM * P
    first = max(flop / (gpu.flop_a_second * tensor_share(prefix, gpu)), P * token_bytes / gpu.bytes_a_second)
    return first + B * S * token_bytes / (gpu.bytes_a_second * memory_share(suffix, gpu))


def measured(gpu: str, B: int, P: int, S: int, results: Path = ROOT / "bench" / "results") -> float | None:
    """Median seconds of this shape in a file of `bench_layer` from the same GPU, if one has it."""
    for path in sorted(results.glob("*/*.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        if gpu not in (file.get("machine", {}).get("gpu") or "") or not isinstance(file.get("results"), list):
            continue
        for result in file["results"]:
            shape = result["shape"]
            model = f"{HEADS * G}/{HEADS}x{HEAD_DIM}", "bfloat16"
            if (result.get("geometry"), result.get("dtype")) == model and [shape[n] for n in "BPS"] == [B, P, S]:
                return statistics.median(result["seconds"]["kvkern"])
    return None


def model(gpu: Gpu, rows: list[dict[str, Any]], results: Path = ROOT / "bench" / "results") -> dict[str, Any]:
    """Loops by unit, and every shape with its roofline and what is predicted or was measured."""
    loops, chosen = [], {}
    for row in rows:
        if row["arch"] != gpu.arch or row["control"] or not row.get("products"):
            continue
        found = cycles(row, gpu)
        share = memory_share if row["kernel"] == "suffix" else tensor_share
        loops.append(
            {"kernel": row["kernel"], "variant": row["variant"], "triton": row["triton"], "cycles": vars(found)}
            | {"predicted_share": share(row, gpu), "of": "memory rate" if share is memory_share else "tensor peak"}
        )
        if row["variant"] == "bf16 D128 G4":
            chosen[row["kernel"]] = row
    shapes = []
    if {"prefix", "suffix"} <= set(chosen):
        for B, P, S in SHAPES:
            line = {"B": B, "P": P, "S": S, "roofline_seconds": roofline(gpu, B, P, S)}
            seconds = measured(gpu.name, B, P, S, results)
            if seconds is None:
                line |= {"seconds": predicted(gpu, chosen["prefix"], chosen["suffix"], B, P, S), "kind": "PREDICTION"}
            else:
                line |= {"seconds": seconds, "kind": "measured"}
            shapes.append(line)
    return {"gpu": gpu.name, "kind": "PREDICTION", "loops": loops, "shapes": shapes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--rows", type=Path, help="rows of bench/compile_report.py --json")
    options = parser.parse_args()
    gpu = GPUS[options.gpu]
    rows = rows_of(gpu.arch, core=True) if options.rows is None else json.loads(options.rows.read_text())
    made = model(gpu, rows)
    if options.json:
        print(json.dumps(made, indent=1))
        return 0
    print(f"PREDICTION for {gpu.name}: cycles of a tile of one block by unit, and the share of the peak that follows")
    print(f"{'kernel':7s} {'variant':22s} {'tensor':>7s} {'special':>7s} {'issue':>7s} {'shared':>7s}  predicted share")
    for loop in made["loops"]:
        by_unit = " ".join(f"{loop['cycles'][unit]:7.0f}" for unit in ("tensor", "special", "issue", "shared"))
        share = f"{100 * loop['predicted_share']:.0f} % of the {loop['of']}"
        print(f"{loop['kernel']:7s} {loop['variant']:22s} {by_unit}  {share}")
    print(f"\none layer, {HEADS} kv heads of {G} query heads, head_dim {HEAD_DIM}, bf16")
    print(f"{'B':>5s} {'P':>7s} {'S':>4s} {'roofline us':>12s} {'us':>10s}  of the roofline")
    for line in made["shapes"]:
        share = line["roofline_seconds"] / line["seconds"]
        print(
            f"{line['B']:5d} {line['P']:7d} {line['S']:4d} {line['roofline_seconds'] * 1e6:12.1f} "
            f"{line['seconds'] * 1e6:10.1f}  {share:.2f}  {line['kind']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
