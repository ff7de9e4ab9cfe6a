"""What padding rows to a bucket of the rounding class costs in the linear layers, against a product of just those rows.

    python bench/bench_linear.py [--quick] [--models SmolLM2-135M] [--samples 15] [--out bench/results/NAME | --here]

A step's rows are padded to a bucket (kvkern/linear.py), so that a row's bits do not follow its neighbours. Of each model's
distinct layers, weights drawn at random, a forward through one decoder layer's linear layers is timed with n rows and with
the bucket that holds n, in turns; rows above the largest bucket go in several forwards. The classes are measured first, as an
engine does it when it starts, and kept with the seconds that it took.

    linear   model=SmolLM2-135M dtype=bfloat16 rows=33 bucket=64 | <ms> ms in the bucket, <ms> ms with its own rows | <n>x
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from harness import Bench, shown
from torch import nn

from kvkern.linear import RoundingClass, measure

# hidden size, width of queries, of keys, of the MLP
MODELS = {
    "SmolLM2-135M": (576, 576, 192, 1536),
    "Qwen3-0.6B": (1024, 2048, 1024, 3072),
    "Qwen3-4B": (2560, 4096, 1024, 9728),
}
DTYPES = ("float32", "bfloat16")
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 33, 48, 64, 65, 96, 128, 129, 192, 256, 257, 384, 512, 640, 1024)
LEAST_TURNS = 3
QUICK = (1, 16, 33, 64, 256)


class Layer(nn.Module):
    """The linear layers of one decoder layer, one after another, each on rows of its own width."""

    def __init__(self, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        super().__init__()
        hidden, queries, keys, middle = sizes
        shapes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
        shapes += [(middle, hidden), (middle, hidden), (hidden, middle)]
        self.linears = nn.ModuleList(nn.Linear(k, n, bias=False, dtype=dtype) for n, k in shapes)

    def run(self, inputs: dict[int, torch.Tensor], rows: int) -> None:
        for linear in self.linears:
            linear(inputs[linear.in_features][:rows])


def forwards(rounding: RoundingClass, rows: int) -> list[int]:
    """The buckets that so many rows take, one a forward."""
    whole, rest = divmod(rows, rounding.max_rows)
    return [rounding.max_rows] * whole + ([rounding.rows_for(rest)] if rest else [])


def cell(bench: Bench, layer: Layer, rounding: RoundingClass, rows: int) -> dict[str, Any]:
    """Seconds of a layer with these rows alone and in their buckets, in turns."""
    buckets = forwards(rounding, rows)
    dtype = layer.linears[0].weight.dtype
    widest = max(rows, *buckets)
    inputs = {k: torch.randn(widest, k).to(dtype) for k in {linear.in_features for linear in layer.linears}}
    seconds: dict[str, list[float]] = {"bucket": [], "free": []}
    began = time.monotonic()
    for turn in range(1 + bench.options.samples):
        if turn > LEAST_TURNS and time.monotonic() - began > bench.options.cell_seconds:
            break
        for name, parts in (("bucket", buckets), ("free", [rows])):
            started = time.perf_counter()
            for part in parts:
                layer.run(inputs, part)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    return {"bucket": buckets, "ratio": medians["bucket"] / medians["free"], "seconds": seconds}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help=f"rows {QUICK} of SmolLM2-135M alone")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cell-seconds", type=float, default=2.0, help=f"after these a cell has {LEAST_TURNS} turns")
    parser.add_argument("--threads", type=int, default=None, help="by default torch's own number")


@torch.no_grad()
def main() -> None:
    bench = Bench.start("linear", __doc__ or "", extra=options)
    if bench.options.threads:
        torch.set_num_threads(bench.options.threads)
    bench.resume()
    torch.manual_seed(0)
    for model in list(MODELS)[:1] if bench.options.quick else bench.options.models:
        for dtype in DTYPES:
            layer = Layer(MODELS[model], getattr(torch, dtype))
            rounding = measure(layer)
            for rows in QUICK if bench.options.quick else ROWS:
                shape = {"model": model, "dtype": dtype, "rows": rows}
                if bench.has(shape):
                    continue
                found = cell(bench, layer, rounding.layers, rows)
                found |= {"buckets": list(rounding.layers.buckets), "outside": rounding.layers.outside}
                bench.keep(shape, found | {"measuring_seconds": rounding.seconds})
                medians = {name: statistics.median(samples) for name, samples in found["seconds"].items()}
                print(
                    f"linear   {shown(shape)} bucket={'+'.join(map(str, found['bucket']))} | "
                    f"{medians['bucket'] * 1e3:.3f} ms in the bucket, {medians['free'] * 1e3:.3f} ms with its own rows | "
                    f"{found['ratio']:.2f}x",
                    flush=True,
                )
            bench.save()
    bench.finish()


if __name__ == "__main__":
    main()
