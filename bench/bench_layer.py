"""One layer's decode step, B agents over one prefix of P tokens and suffixes of S, in a committed order of priority.

    python bench/bench_layer.py [--quick] [--device cpu] [--seconds 180] [--samples 15] [--out bench/results/NAME]

After each cell layer.json is written; a cell that it holds is skipped, so a run can be cut off and taken up again. No cell
begins after --seconds, and none takes more turns after --cell-seconds. A cell that fails is kept with the reason, and run
again next time. The result of every entry is checked against fp64 on sampled rows before it has a time: a wrong kvkern ends
the script, a wrong peer has a reason. Before each timed run a buffer is written that displaces the L2 cache.

Entries of a cell, timed in turns:
  kvkern        append, prefix and suffix through `shared_prefix_attention`
  kvkern_graph  the same, replayed from a CUDA graph (CUDA)
  K0, K1, K2    append, prefix and suffix, each alone: out of cold caches, so their sum is not kvkern (CUDA, or --kernels)
  gemm          the prefix's two matrix products, scores kept in memory: a roof, not attention
  and the peers of peers.py
Once a run: the rate of one square matrix product (gemm_share) and of a copy (copy_share), in the cell's dtype.

Fields: shape, backend, geometry, dtype, agents, prefix, suffix, ms, gflops, gbs, gemm_share, copy_share, ratio_<entry> (how many
times as long as kvkern), seconds (every sample), flop, bytes, reasons (of what has no time), roofs, commit.

    layer    B=64 P=2048 S=64 heads=[32, 8, 128] dtype=bfloat16 backend=None | <ms> ms (<spread> %) |
             <n> GFLOP/s = <n> % of GEMM <n> GB/s = <n> % of copy | <n>x <entry>
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import peers
import torch
from harness import Bench, WrongResult, gate, reason, shown
from peers import Case
from torch import Tensor

import kvkern
from kvkern import backends

AGENTS, PREFIXES, SUFFIXES = (1024, 64, 4096, 1, 256, 16), (32768, 8192, 2048, 131072, 512), (256, 64, 512)
CELLS = [(b, p, s) for s in SUFFIXES for p in PREFIXES for b in AGENTS]
"""First the suffix of 256 tokens with every prefix and batch, the long prefix and the large batch before the others."""
QUICK = [(64, 2048, 64), (1, 8192, 64)]
TINY = [(3, 100, 20)]
DTYPES = ("bfloat16", "float16", "float32")
LEAST_TURNS = 3
ROOF_SECONDS = 5.0
"""A large product that would take longer is measured on a smaller one; the file keeps the size."""
FAILURES = (RuntimeError, MemoryError, NotImplementedError, ImportError, kvkern.KvkernError)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="two cells alone; the default on the CPU")
    parser.add_argument("--all", action="store_true", help="all cells on the CPU too")
    parser.add_argument("--tiny", action="store_true", help="a small cell and small roofs: to see that all of it runs")
    parser.add_argument("--cell", type=int, nargs=3, default=None, metavar=("B", "P", "S"), help="this cell alone")
    parser.add_argument("--heads", type=int, nargs=3, default=(32, 8, 128), metavar=("QO", "KV", "D"))
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="by default bfloat16, and float32 on the CPU")
    parser.add_argument("--seconds", type=float, default=180.0, help="no cell begins after these")
    parser.add_argument("--cell-seconds", type=float, default=30.0, help=f"after these a cell has {LEAST_TURNS} turns")
    parser.add_argument("--kernels", action="store_true", help="K0, K1 and K2 alone, on the CPU too")
    parser.add_argument(
        "--peers", nargs="*", default=None, help="these peers alone; none of them: --peers with no name"
    )


def roofs(bench: Bench) -> dict[str, float]:
    """Rates of this run: a square matrix product in FLOP/s, and a copy, bytes read and written in a second."""
    dtype, large = getattr(torch, bench.options.dtype), bench.device.type == "cuda"
    n, size = (256, 1 << 20) if bench.options.tiny else (8192, 1 << 30) if large else (2048, 256 << 20)
    small = torch.randn(512, 512, device=bench.device).to(dtype)
    if n > 512 and min(bench.once(lambda: torch.mm(small, small)) for _ in range(3)) * (n / 512) ** 3 > ROOF_SECONDS:
        n = 512  # a CPU without products in 16 bits
    a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    # The first run of each warms.
    gemm = statistics.median([bench.once(lambda: torch.mm(a, b)) for _ in range(6)][1:])
    copy = statistics.median([bench.once(lambda: target.copy_(source)) for _ in range(6)][1:])
    return {"gemm_flop_per_s": 2 * n**3 / gemm, "gemm_size": n, "copy_bytes_per_s": 2 * size / copy, "copy_bytes": size}


def check(case: Case, o: Tensor) -> None:
    """Raise WrongResult where a sampled row is not what fp64 gives."""
    for agent, (reference, plain) in case.samples.items():
        gate(o[agent, None], reference, plain)


def graph(case: Case) -> Callable[[], Tensor]:
    """kvkern in a CUDA graph; the output is that of the capture, filled by each replay."""
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        o = case.kvkern()

    def run() -> Tensor:
        captured.replay()
        return o

    return run


def kernels(case: Case) -> dict[str, Callable[[], Any]]:
    """The three functions of the backend, each on what the one before it left."""
    run, pool, t = backends.choose(case.backend, case.device), case.pool, case.plan.tensors
    pages = pool.k_pages(0), pool.v_pages(0)
    places = pool.page_table, pool.seq_lens, t.row_slot, t.row_back
    heads, sm_scale = case.geometry.num_kv_heads, case.geometry.head_dim**-0.5

    def append() -> Tensor:
        return run.append(case.q, case.k, case.v, *pages, *places)

    queries = append()

    def prefix() -> Any:
        return run.prefix_attention(
            queries, t.node_table, t.items, t.path_table, num_kv_heads=heads, layer=0, sm_scale=sm_scale
        )

    state = prefix()

    def suffix() -> Any:
        return run.suffix_attention(queries, *pages, *places, t.suffix_tiles, t.path_table, state, sm_scale=sm_scale)

    return {"K0": append, "K1": prefix, "K2": suffix}


def gemm(case: Case) -> Callable[[], Tensor]:
    keys, values = case.prefix_kv
    case.room(case.packed.numel() // case.geometry.head_dim * case.prefix_tokens * case.geometry.dtype.itemsize)
    return lambda: torch.bmm(torch.bmm(case.packed, keys.transpose(1, 2)), values)


def entries(bench: Bench, case: Case) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What is timed, each result checked, and why the others are not."""
    check(case, case.kvkern())
    runs: dict[str, Callable[[], Any]] = {"kvkern": case.kvkern}
    reasons: dict[str, str] = {}
    cuda, chosen = case.device.type == "cuda", bench.options.peers

    def add(name: str, prepare: Callable[[], Callable[[], Tensor]], *, checked: bool = True) -> None:
        try:
            run = prepare()
            o = run()
            if checked:
                check(case, o)
            runs[name] = run
        except (*FAILURES, WrongResult) as error:
            reasons[name] = reason(error)
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()

    if cuda:
        add("kvkern_graph", lambda: graph(case))
    if cuda or bench.options.kernels:
        runs |= kernels(case)
    add("gemm", lambda: gemm(case), checked=False)
    for peer in peers.PEERS:
        if chosen is not None and peer.name not in chosen:
            continue
        unavailable = peer.available(case)
        if unavailable is None:
            add(peer.name, lambda peer=peer: peer.prepare(case))  # type: ignore[misc]
        else:
            reasons[peer.name] = unavailable
    return runs, reasons


def measure(bench: Bench, cell: tuple[int, int, int], flush: Tensor, rates: dict[str, float]) -> dict[str, Any]:
    """Check every entry of the cell, then time them in turns."""
    chosen, began = bench.options, time.monotonic()
    agents, prefix_tokens, suffix_tokens = cell
    geometry = kvkern.Geometry(1, *chosen.heads, getattr(torch, chosen.dtype))
    case = Case.make(geometry, agents, prefix_tokens, suffix_tokens, device=bench.device, backend=chosen.backend)
    runs, reasons = entries(bench, case)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(1 + chosen.samples):
        if turn > LEAST_TURNS and time.monotonic() - began > chosen.cell_seconds:
            break
        for name, run in list(runs.items()):
            flush.zero_()
            taken = bench.once(run)
            # The first turn warms. A peer that takes a tenth of the cell's time there has no other.
            slow = name != "kvkern" and turn == 0 and taken > chosen.cell_seconds / 10
            if turn or slow:
                seconds[name].append(taken)
            if slow:
                del runs[name]

    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    ours = medians.pop("kvkern")
    flop = 4.0 * agents * geometry.num_qo_heads * geometry.head_dim * (prefix_tokens + suffix_tokens)
    moved = float(geometry.token_bytes() * (prefix_tokens + agents * suffix_tokens))
    return {
        "backend": backends.choose(chosen.backend, bench.device).name,
        "geometry": f"{geometry.num_qo_heads}/{geometry.num_kv_heads}x{geometry.head_dim}",
        "dtype": chosen.dtype,
        "agents": agents,
        "prefix": prefix_tokens,
        "suffix": suffix_tokens,
        "ms": ours * 1e3,
        "gflops": flop / ours / 1e9,
        "gbs": moved / ours / 1e9,
        "gemm_share": flop / ours / rates["gemm_flop_per_s"],
        "copy_share": moved / ours / rates["copy_bytes_per_s"],
        **{f"ratio_{name}": median / ours for name, median in medians.items()},
        "seconds": seconds,
        "flop": flop,
        "bytes": moved,
        "reasons": reasons,
        "roofs": rates,
    }


def line(shape: dict[str, Any], found: dict[str, Any]) -> str:
    ours = found["seconds"]["kvkern"]
    spread = 100 * (max(ours) - min(ours)) / statistics.median(ours)
    ratios = "  ".join(f"{found[f'ratio_{name}']:.2f}x {name}" for name in found["seconds"] if name != "kvkern")
    return (
        f"layer    {shown(shape)} | {found['ms']:.3f} ms ({spread:.0f} %) | {found['gflops']:.1f} GFLOP/s = "
        f"{100 * found['gemm_share']:.0f} % of GEMM {found['gbs']:.1f} GB/s = {100 * found['copy_share']:.0f} % of copy | {ratios}"
    )


def main() -> None:
    bench, began = Bench.start("layer", __doc__, extra=options), time.monotonic()
    chosen = bench.options
    chosen.dtype = chosen.dtype or ("bfloat16" if bench.device.type == "cuda" else "float32")
    bench.resume()
    torch.seed()
    quick = chosen.quick or (bench.device.type == "cpu" and not chosen.all)
    cells = [tuple(chosen.cell)] if chosen.cell else TINY if chosen.tiny else QUICK if quick else CELLS
    flush: Tensor | None = None
    for cell in cells:
        shape = dict(zip("BPS", cell, strict=True)) | {"heads": list(chosen.heads), "dtype": chosen.dtype}
        shape["backend"] = chosen.backend
        if bench.has(shape):
            continue
        if time.monotonic() - began > chosen.seconds:
            break
        if flush is None:
            flush = torch.empty(1 << 20 if chosen.tiny else 128 << 20, dtype=torch.uint8, device=bench.device)
            rates = roofs(bench)
        try:
            found = measure(bench, cell, flush, rates)
        except FAILURES as error:
            bench.fail(shape, error)
        else:
            bench.keep(shape, found)
            print(line(shape, found), flush=True)
        bench.save()
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
