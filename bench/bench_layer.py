"""One layer's attention, B agents over one prefix of P tokens and suffixes of S, in a committed order of priority.

    python bench/bench_layer.py [--quick] [--device cpu] [--seconds 180] [--samples 15] [--out bench/results/NAME]

After each cell the file layer.json is written; a cell that it holds is skipped, so a run can be cut off and taken up again.
No cell begins after --seconds. A cell that fails is kept with the reason in place of times. Sampled rows are checked in fp64
before any time. Before each timed run a buffer is written that displaces the L2 cache.
Entries, timed in turns: kvkern (append, prefix, suffix) and gemm (the prefix's two matrix products: a roof, not attention).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from harness import Bench, gate, machine

import kvkern
from kvkern.checks.assertions import plain_attention
from kvkern.geometry import PAGE
from kvkern.kernels.oracle import attend_fp64

AGENTS, PREFIXES, SUFFIXES = (1024, 64, 4096, 1, 256, 16), (32768, 8192, 2048, 131072, 512), (256, 64, 512)
CELLS = [(b, p, s) for s in SUFFIXES for p in PREFIXES for b in AGENTS]
"""First the suffix of 256 tokens with every prefix and batch, the long prefix and the large batch before the others."""
QUICK = [(64, 2048, 64), (1, 8192, 64)]
FLUSH = 128 << 20


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="two cells alone")
    parser.add_argument("--cell", type=int, nargs=3, default=None, metavar=("B", "P", "S"), help="this cell alone")
    parser.add_argument("--heads", type=int, nargs=3, default=(32, 8, 128), metavar=("QO", "KV", "D"))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=180.0, help="no cell begins after these")


def measure(bench: Bench, cell: tuple[int, int, int], flush: torch.Tensor) -> dict[str, Any]:
    """Check sampled rows of the cell, then time its entries in turns; seconds of every run, and the work."""
    agents, prefix_tokens, suffix_tokens = cell
    num_qo_heads, num_kv_heads, head_dim = bench.options.heads
    device, dtype = bench.device, getattr(torch, bench.options.dtype)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype)

    geometry = kvkern.Geometry(1, num_qo_heads, num_kv_heads, head_dim, dtype)
    prefix = kvkern.SharedPrefix(geometry, torch.arange(prefix_tokens), device=device)
    prefix.block()[0, :, :, :prefix_tokens] = normal(2, num_kv_heads, prefix_tokens, head_dim)
    prefix.publish()
    pages = -(-suffix_tokens // PAGE)
    pool = kvkern.PagePool(geometry, agents * pages, slots=agents, device=device)
    pool.pages.normal_()
    for _ in range(agents):
        slot = pool.acquire_slot()
        pool.reserve(slot, suffix_tokens)
        pool.advance(slot, suffix_tokens - 1)
        pool.seq_lens[slot] = suffix_tokens - 1
    plan = kvkern.Plan.make(pool, [kvkern.AgentRows(slot, prefix, 1) for slot in range(agents)])
    plan.begin()
    q, k, v = (normal(agents, heads, head_dim) for heads in (num_qo_heads, num_kv_heads, num_kv_heads))

    def ours() -> torch.Tensor:
        return kvkern.shared_prefix_attention(q, k, v, plan, pool, layer=0, backend=bench.options.backend)

    o = ours()
    for agent in {0, agents // 2, agents - 1}:
        table = pool.page_table[agent, :pages].long()
        whole = [
            torch.cat([shared.transpose(0, 1), own[table].transpose(1, 2).flatten(0, 1)[:suffix_tokens]])
            for shared, own in ((prefix.key(0), pool.k_pages(0)), (prefix.value(0), pool.v_pages(0)))
        ]
        row = q[agent, None]
        reference, _ = attend_fp64(row.cpu(), whole[0].cpu(), whole[1].cpu())
        gate(o[agent, None], reference, plain_attention(row, whole[0], whole[1], None).o)

    packed = q.view(agents, num_kv_heads, -1, head_dim).transpose(0, 1).reshape(num_kv_heads, -1, head_dim)

    def gemm() -> torch.Tensor:
        return torch.bmm(torch.bmm(packed, prefix.key(0).transpose(1, 2)), prefix.value(0))

    runs, reasons = {"kvkern": ours, "gemm": gemm}, {}
    try:
        gemm()
    except RuntimeError as error:
        del runs["gemm"]
        reasons["gemm"] = f"{type(error).__name__}: {error}"[:300]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(2 + bench.options.samples):
        for name, run in runs.items():
            flush.zero_()
            taken = bench.once(run)
            if turn >= 2:
                seconds[name].append(taken)
    tokens = prefix_tokens + suffix_tokens
    moved = 2.0 * num_kv_heads * head_dim * dtype.itemsize * (prefix_tokens + agents * suffix_tokens)
    flop = 4.0 * agents * num_qo_heads * head_dim * tokens
    return {"seconds": seconds, "flop": flop, "bytes": moved, "reasons": reasons}


def main() -> None:
    bench, began = Bench.start("layer", __doc__, extra=options), time.monotonic()
    chosen = bench.options
    path: Path | None = chosen.out / "layer.json" if chosen.out else None
    if path is not None and path.exists():
        bench.results = json.loads(path.read_text())["results"]
    torch.seed()
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=bench.device)
    quick = chosen.quick or bench.device.type == "cpu"
    for cell in [tuple(chosen.cell)] if chosen.cell else QUICK if quick else CELLS:
        shape = dict(zip("BPS", cell, strict=True)) | {"heads": list(chosen.heads), "dtype": chosen.dtype}
        shape["backend"] = chosen.backend
        if any(result["shape"] == shape for result in bench.results):
            continue
        if time.monotonic() - began > chosen.seconds:
            break
        try:
            found = measure(bench, cell, flush)
        except (RuntimeError, MemoryError, kvkern.KvkernError) as error:
            bench.results.append({"shape": shape, "reason": f"{type(error).__name__}: {error}"[:300]})
            print("layer", shape, "no time:", type(error).__name__, flush=True)
        else:
            bench.add(shape, found["seconds"], flop=found["flop"], bytes_moved=found["bytes"])
            bench.results[-1]["reasons"] = found["reasons"]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            content = {"bench": "layer", "machine": machine(bench.device), "results": bench.results}
            partial.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(partial, path)


if __name__ == "__main__":
    main()
