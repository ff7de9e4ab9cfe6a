"""One layer's decode step, B agents over one prefix of P tokens and suffixes of S, in a committed order of priority.

    python bench/bench_layer.py [--quick] [--all | --aims] [--device cpu] [--seconds 180] [--samples 15] [--here | --out FOLDER]

After each cell layer.json is written; a cell that it holds is skipped, so a run can be cut off and taken up again. No cell
begins after --seconds, and none takes more turns after --cell-seconds. A cell that fails is kept with the reason, and run
again next time. The result of every entry is checked against fp64 on sampled rows before it has a time: a wrong kvkern ends
the script, a wrong peer has a reason. Before each timed run a buffer displaces the L2 cache, on the CPU all caches.

An entry that breaks the CUDA context, or ends the process, is kept under `crashed` {shape, entry, reason}; the script ends with
status 75, and run again goes on without that entry in that cell, and without one that crashed in two cells in all. Where it was
kvkern, the cell has failed, and is not begun again. To try once more, take the key out of the file.

Entries of a cell, timed in turns:
  kvkern        append, prefix and suffix through `shared_prefix_attention`; of suffixes of 0 tokens, the prefix alone
  kvkern_eager  the same, launched from Python each time (CUDA)
  K0, K1, K2    append, prefix and suffix, each alone: out of cold caches, so their sum is not kvkern (CUDA, or --kernels)
  gemm          the prefix's two matrix products, scores kept in memory: a roof, not attention
  and the peers of peers.py
On CUDA every entry but kvkern_eager is replayed from a CUDA graph, so that nobody's launches from Python are timed; the field
eager names those that cannot be captured.
The rates of one square matrix product (gemm_share) and of a copy (copy_share), in the cell's dtype: once a run, and on the CPU,
whose neighbours come and go, in turns with the entries, beside multiply-adds on registers alone (k1_fma_share, by the best; not of products
of bf16 pairs). A copy's bytes are those read and those written; the bytes of kvkern,
K1 and K2 are the K and V that they have to read. All of them have torch.get_num_threads() threads.

On the CPU a cell is of one geometry, dtype and instruction set (KVKERN_ISA=avx2 forces one; its cells stand in the same file).
--quick, the default there: 64 agents x 2048 and 1 agent x 8192, in fp32 and bf16. --aims: the cells that README's table of aims
is made of. --all: those, then every other. An entry that takes more than its share of --cell-seconds has fewer samples, one that
is slower yet has that of its check alone; cells and peers that would take many times as long are not begun, with the reason.
--threads-gain: K1 of 1 agent over 32,768 tokens with 1 and 2 threads in turns, kept in the file beside the cells.

Fields: shape, backend, isa, geometry, dtype, agents, prefix, suffix, ms, gflops, gbs, gemm_share, copy_share, ratio_<entry> (how
many times as long as kvkern), k1_ms, k1_gflops, k1_gemm_share, k1_fma_share, k1_gbs, k1_copy_share, k2_ms, k2_gbs, k2_copy_share (of
K1 and K2 alone), spread (of each entry: largest less smallest sample, by the median), seconds (every sample), flop, bytes, reasons (of what
has no time), roofs, commit.

    layer    B=64 P=2048 S=64 heads=[32, 8, 128] dtype=bfloat16 backend=None | <ms> ms (<spread> %) |
             <n> GFLOP/s = <n> % of GEMM <n> GB/s = <n> % of copy | <n>x <entry>
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peers
import torch
from fma_peak import FmaPeak
from harness import CASE, CRASHED, WHOLE, Bench, Broken, Crashed, WrongResult, gate, reason, shown
from peers import Case
from torch import Tensor

import kvkern
from kvkern import backends, cpu, native

AGENTS, PREFIXES, SUFFIXES = (1024, 64, 4096, 1, 256, 16), (32768, 8192, 2048, 131072, 512), (256, 64, 512)
CELLS = [(b, p, s) for s in SUFFIXES for p in PREFIXES for b in AGENTS]
"""On CUDA first the suffix of 256 tokens with every prefix and batch, the long prefix and the large batch before the others."""
QUICK = [(64, 2048, 64), (1, 8192, 64)]
TINY = [(3, 100, 20)]
DTYPES = ("bfloat16", "float16", "float32")

CPU_AGENTS, CPU_PREFIXES, CPU_SUFFIXES = (1, 4, 16, 64, 256, 1024), (512, 2048, 8192, 32768), (0, 64, 512)
CPU_HEADS = ((32, 8, 128), (9, 3, 64), (16, 8, 128), (40, 8, 128))
CPU_DTYPES = ("float32", "bfloat16")
CPU_AIMS = [
    *((64, 2048, 0), (1, 32768, 0), (64, 512, 64), (256, 2048, 0), (64, 8192, 0), (4, 32768, 0), (256, 512, 64)),
    *((64, 512, 512), (1024, 2048, 0), (1, 2048, 0), (4, 2048, 0), (16, 2048, 0), (1024, 512, 64), (256, 8192, 0)),
    *((64, 32768, 0), (256, 512, 512), (1024, 8192, 0), (256, 32768, 0), (1024, 512, 512), (1024, 32768, 0)),
]
"""K1 at 64 agents and more over 2,048 tokens and more, and at 1 and 4 over 32,768; K2 at 64 and more; and K1 by agents for a
figure. What takes seconds a run comes last."""
CPU_AIMS_HEADS = CPU_HEADS[:2]

LEAST_TURNS = 3
ROOF_SECONDS = 5.0
"""A large product that would take longer is measured on a smaller one; the file keeps the size."""
OURS = ("kvkern", "kvkern_eager", "K0", "K1", "K2")
LONGEST = 0.25
"""Part of a CPU cell's seconds that one run of kvkern may take by the rate of the product."""
FAILURES = (RuntimeError, MemoryError, NotImplementedError, ImportError, kvkern.KvkernError)


class TooLong(RuntimeError):
    """What would take too much of the time that there is."""


class Cell(NamedTuple):
    """One row of the file, but for the instruction set."""

    heads: tuple[int, int, int]
    dtype: str
    agents: int
    prefix: int
    suffix: int

    @property
    def geometry(self) -> kvkern.Geometry:
        return kvkern.Geometry(1, *self.heads, getattr(torch, self.dtype))

    @property
    def flop(self) -> float:
        num_qo_heads, _, head_dim = self.heads
        return 4.0 * self.agents * num_qo_heads * head_dim * (self.prefix + self.suffix)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="two cells alone; the default on the CPU")
    parser.add_argument("--all", action="store_true", help="all cells on the CPU too, those of the aims first")
    parser.add_argument("--aims", action="store_true", help="on the CPU the cells that the aims name")
    parser.add_argument("--tiny", action="store_true", help="a small cell and small roofs: to see that all of it runs")
    parser.add_argument("--cell", type=int, nargs=3, default=None, metavar=("B", "P", "S"), help="this cell alone")
    parser.add_argument(
        "--heads", type=int, nargs=3, default=None, metavar=("QO", "KV", "D"), help="by default 32 8 128, and others"
    )
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="by default bfloat16, on the CPU float32 too")
    parser.add_argument("--seconds", type=float, default=180.0, help="no cell begins after these")
    parser.add_argument(
        "--cell-seconds",
        type=float,
        default=None,
        help=f"after these a cell has {LEAST_TURNS} turns; by default 30, on the CPU 8",
    )
    parser.add_argument(
        "--kernels", action="store_true", help="K0, K1 and K2 alone, on the CPU too; --all and --aims have them"
    )
    parser.add_argument("--threads-gain", action="store_true", help="on the CPU, K1 with 1 and 2 threads in turns")
    parser.add_argument(
        "--peers", nargs="*", default=None, help="these peers alone; none of them: --peers with no name"
    )


def cells(chosen: argparse.Namespace, *, cuda: bool) -> list[Cell]:
    """What is to be measured, in order."""
    if cuda:
        plain = [tuple(chosen.cell)] if chosen.cell else TINY if chosen.tiny else QUICK if chosen.quick else CELLS
        heads = tuple(chosen.heads or CPU_HEADS[0])
        return [Cell(heads, chosen.dtype or "bfloat16", *cell) for cell in plain]  # type: ignore[arg-type]
    dtypes = (chosen.dtype,) if chosen.dtype else CPU_DTYPES
    heads_of = [tuple(chosen.heads)] if chosen.heads else None

    def product(sizes: Iterable[tuple[int, int, int]], by_default: Iterable[tuple[int, ...]]) -> list[Cell]:
        return [Cell(h, d, *size) for size in sizes for h in heads_of or by_default for d in dtypes]  # type: ignore[arg-type]

    if chosen.cell or chosen.tiny:
        return product([tuple(chosen.cell)] if chosen.cell else TINY, CPU_HEADS[:1])
    found = product(QUICK, CPU_HEADS[:1])
    if not (chosen.all or chosen.aims) or chosen.quick:
        return found
    found += product(CPU_AIMS, CPU_AIMS_HEADS)
    if chosen.all:
        found += product(CPU_AIMS, CPU_HEADS)
        others = product(itertools.product(CPU_AGENTS, CPU_PREFIXES, CPU_SUFFIXES), CPU_HEADS)
        found += sorted(others, key=lambda cell: cell.flop)
    return list(dict.fromkeys(found))


def isa(bench: Bench) -> str | None:
    """The instruction set that csrc's kernels run in, where they are what is measured."""
    if backends.choose(bench.options.backend, bench.device).name != "cpu":
        return None
    return native.instruction_set()


# -- roofs -------------------------------------------------------------------------------------------------------------


class Roofs:
    """A square matrix product in one dtype, a copy, and multiply-adds on registers of one instruction set."""

    def __init__(self, bench: Bench, dtype: str, buffers: tuple[Tensor, Tensor], fma: FmaPeak | None) -> None:
        self.fma = fma
        self.bench, number = bench, getattr(torch, dtype)
        n = 256 if bench.options.tiny else 8192 if bench.device.type == "cuda" else 2048
        small = torch.randn(512, 512, device=bench.device).to(number)
        if (
            n > 512
            and min(bench.once(lambda: torch.mm(small, small)) for _ in range(3)) * (n / 512) ** 3 > ROOF_SECONDS
        ):
            n = 512  # a CPU without products in 16 bits
        self.a, self.b = (torch.randn(n, n, device=bench.device).to(number) for _ in range(2))
        self.source, self.target = buffers

    def runs(self) -> dict[str, Callable[[], Any]]:
        runs = {
            "gemm": lambda: torch.mm(self.a, self.b),
            "copy": lambda: self.target.copy_(self.source),
        }
        return runs | ({} if self.fma is None else {"fma": self.fma.run})

    def rates(self, seconds: dict[str, list[float]]) -> dict[str, Any]:
        """Of samples of each: FLOP/s, and bytes read and written in a second."""
        n, size = self.a.shape[0], self.source.numel()
        gemm, copy = (statistics.median(seconds[name]) for name in ("gemm", "copy"))
        return {
            "gemm_flop_per_s": 2 * n**3 / gemm,
            "gemm_size": n,
            "copy_bytes_per_s": 2 * size / copy,
            "copy_bytes": size,
            "copy_counts": "bytes read and bytes written",
            # A peak is the best sample.
            **({} if self.fma is None else {"fma_flop_per_s": self.fma.flop / min(seconds["fma"])}),
        }

    def once(self) -> dict[str, Any]:
        """The rates, each of five samples in a row; the first run of each warms."""
        seconds = {name: [self.bench.once(run) for _ in range(6)][1:] for name, run in self.runs().items()}
        return self.rates(seconds)


def fma_peak(measured_in: str | None) -> FmaPeak | None:
    """None, with the reason on the terminal, where there is none to be had."""
    if measured_in is None:
        return None
    try:
        return FmaPeak(measured_in, torch.get_num_threads())
    except NotImplementedError as error:
        print(f"layer    no peak of multiply-adds: {error}", flush=True)
        return None


def buffers(bench: Bench) -> tuple[Tensor, Tensor]:
    """From where to where bytes are copied; on the CPU in memory of the prefix's kind, in huge pages if there are any."""
    size = 1 << 20 if bench.options.tiny else 1 << 30 if bench.device.type == "cuda" else 256 << 20
    if bench.device.type == "cpu":
        source, target = (cpu.map_tensor((size,), torch.uint8)[0].fill_(1) for _ in range(2))
        return source, target
    source = torch.ones(size, dtype=torch.uint8, device=bench.device)
    return source, torch.empty_like(source)


def largest_cache() -> int:
    """Bytes of the largest cache of a core, 0 where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 10, "M": 20}
    return max((int(size[:-1]) << units[size[-1]] for size in sizes if size[-1:] in units), default=0)


class Flush:
    """Displaces what the caches hold, before each timed run."""

    def __init__(self, bench: Bench) -> None:
        cuda = bench.device.type == "cuda"
        size = 1 << 20 if bench.options.tiny else 128 << 20 if cuda else 2 * max(largest_cache(), 32 << 20)
        self.buffer = torch.empty(size, dtype=torch.uint8, device=bench.device) if cuda else None
        self.words = None if cuda else np.ones(size // 4, dtype=np.float32)

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()
        if self.words is not None:
            # Read, so that no dirty lines are left to be written back within the time; and by one thread, so that every entry
            # finds the pool's threads asleep, and none of them at the end of the entry before.
            self.words.sum()


# -- one cell ----------------------------------------------------------------------------------------------------------


def check(case: Case, o: Tensor) -> None:
    """Raise WrongResult where a sampled row is not what fp64 gives."""
    for sample in case.samples:
        gate(o[sample.agent, None, sample.heads], sample.reference, sample.plain)


def graph(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` in a CUDA graph; the output is that of the capture, filled by each replay."""
    run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        o = run()

    def replay() -> Any:
        captured.replay()
        return o

    return replay


def kernels(case: Case) -> dict[str, Callable[[], Any]]:
    """The three functions of the backend, each on what the one before it left; K0 where there is a suffix to append to.

    What a function needs of the others is made in its first call, hence not in the time.
    """
    run, pool, t = backends.choose(case.backend, case.device), case.pool, case.plan.tensors
    pages = pool.k_pages(0), pool.v_pages(0)
    places = pool.page_table, pool.seq_lens, t.row_slot, t.row_back
    heads, sm_scale = case.geometry.num_kv_heads, case.geometry.head_dim**-0.5
    appended = case.agents if case.suffix_tokens else 0

    def append() -> Tensor:
        return run.append(case.q, case.k[:appended], case.v[:appended], *pages, *places)

    queries = functools.cache(append)

    def prefix() -> Any:
        return run.prefix_attention(
            queries(), t.node_table, t.items, t.path_table, num_kv_heads=heads, layer=0, sm_scale=sm_scale
        )

    state = functools.cache(prefix)

    def suffix() -> Any:
        return run.suffix_attention(
            queries(), *pages, *places, t.suffix_tiles, t.path_table, state(), sm_scale=sm_scale
        )

    return ({"K0": append} if appended else {}) | {"K1": prefix, "K2": suffix}


def gemm(case: Case) -> Callable[[], Tensor]:
    keys, values = case.prefix_kv
    case.room(case.packed.numel() // case.geometry.head_dim * case.prefix_tokens * case.geometry.dtype.itemsize)
    return lambda: torch.bmm(torch.bmm(case.packed, keys.transpose(1, 2)), values)


@dataclass
class Entries:
    """What is timed, each result checked, and why the others are not.

    runs     by name
    reasons  of what has no time
    first    seconds of the first run of each, which was checked
    eager    why an entry on CUDA is not replayed from a graph
    now      the entry that is timed at the moment
    """

    runs: dict[str, Callable[[], Any]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    eager: dict[str, str] = field(default_factory=dict)
    now: str = CASE

    def graphed(self, name: str, run: Callable[[], Any]) -> Callable[[], Any]:
        """The entry replayed from a graph, or as it is where it cannot be captured."""
        try:
            return graph(run)
        except FAILURES as error:
            torch.cuda.synchronize()
            self.eager[name] = reason(error)
            return run


class Pace:
    """How many FLOP/s each entry reached where it was last measured, to tell what would take too long. For the CPU."""

    def __init__(self, cell_seconds: float) -> None:
        self.cell_seconds = cell_seconds
        self.reached: dict[tuple[Any, ...], float] = {}

    def admit(self, cell: Cell, name: str) -> None:
        """Raise TooLong for an entry that would take a whole cell's time for one run."""
        rate = self.reached.get((cell.heads, cell.dtype, name))
        if rate is not None and cell.flop / rate > self.cell_seconds:
            raise TooLong(
                f"about {cell.flop / rate:.0f} s a run by its rate in a smaller cell, of {self.cell_seconds:g} s for all"
            )

    def take_up(self, results: list[dict[str, Any]]) -> None:
        """Go on from what the file holds."""
        for row in results:
            shape = row["shape"]
            cell = Cell(tuple(shape["heads"]), shape["dtype"], shape["B"], shape["P"], shape["S"])
            self.note(cell, {name: statistics.median(samples) for name, samples in row["seconds"].items()})

    def note(self, cell: Cell, medians: dict[str, float]) -> None:
        for name, median in medians.items():
            self.reached[cell.heads, cell.dtype, name] = cell.flop / median


def entries(bench: Bench, shape: dict[str, Any], case: Case, admit: Callable[[str], None]) -> Entries:
    """Every entry that can run here, run once: kvkern, its kernels, the others. `admit` raises for one that would take too long."""
    found, cuda, chosen = Entries(), case.device.type == "cuda", bench.options
    left_out = bench.left_out(shape)

    def begin(name: str, prepare: Callable[[], Callable[[], Any]], checked: bool) -> None:
        with bench.trial(shape, name):
            run, outputs = prepare(), []
            if cuda and name != "kvkern_eager":
                run = found.graphed(name, run)
            found.first[name] = bench.once(lambda: outputs.append(run()))
            if checked:
                check(case, outputs[0])
        found.runs[name] = run

    def add(name: str, prepare: Callable[[], Callable[[], Any]], *, checked: bool = True) -> None:
        if name in left_out:
            found.reasons[name] = left_out[name]
            return
        try:
            if name not in OURS:
                admit(name)
            begin(name, prepare, checked)
        except (Exception, WrongResult) as error:  # whatever other libraries raise
            found.reasons[name] = reason(error)
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()

    begin("kvkern", lambda: case.kvkern, checked=True)
    if cuda:
        add("kvkern_eager", lambda: case.kvkern)
    if cuda or chosen.kernels or chosen.all or chosen.aims:
        before: str | None = None
        for name, run in kernels(case).items():
            if before is None or before in found.runs:
                add(name, lambda run=run: run, checked=False)  # type: ignore[misc]
                found.first.pop(name, None)  # what it needs was made in it
            else:
                found.reasons[name] = f"it needs what {before} leaves"
            before = name
    add("gemm", lambda: gemm(case), checked=False)
    for peer in peers.PEERS:
        if chosen.peers is not None and peer.name not in chosen.peers:
            continue
        unavailable = peer.available(case)
        if unavailable is None:
            add(peer.name, lambda peer=peer: peer.prepare(case))  # type: ignore[misc]
        else:
            found.reasons[peer.name] = unavailable
    return found


def turns(bench: Bench, found: Entries, flush: Flush, began: float) -> dict[str, list[float]]:
    """Seconds of every entry in turns, until the cell's time is over."""
    chosen, runs = bench.options, dict(found.runs)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(1 + chosen.samples):
        if turn > LEAST_TURNS and time.monotonic() - began > chosen.cell_seconds:
            break
        for name, run in list(runs.items()):
            found.now = name
            flush()
            taken = bench.once(run)
            # The first turn warms. A peer that takes a tenth of the cell's time there has no other.
            slow = name != "kvkern" and turn == 0 and taken > chosen.cell_seconds / 10
            if turn or slow:
                seconds[name].append(taken)
            if slow:
                del runs[name]
    return seconds


def shares(
    bench: Bench, runs: dict[str, Callable[[], Any]], first: dict[str, float], flush: Flush
) -> dict[str, list[float]]:
    """Seconds of every entry in turns, each entry as often as its share of the cell's time allows; for the CPU.

    kvkern, its kernels and the roofs at least LEAST_TURNS times. Another whose first run took its share has that as its sample.
    """
    chosen, share = bench.options, bench.options.cell_seconds / len(runs)
    needed = {"kvkern", "K0", "K1", "K2", "roof gemm", "roof copy", "roof fma"}
    seconds: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for name, run in runs.items():
        taken = first[name] if name in first else bench.once(run)
        if name not in needed and taken > share:
            seconds[name], counts[name] = [taken], 0
        else:
            least = LEAST_TURNS if name in needed else 1
            seconds[name], counts[name] = [], max(least, min(chosen.samples, int(share / max(taken, 1e-9))))
    last = max(counts.values())
    for turn in range(last):
        for name, run in runs.items():
            if (turn + 1) * counts[name] // last > turn * counts[name] // last:  # its runs spread over all turns
                flush()
                if name == "roof fma":
                    time.sleep(0.02)  # its threads are not those of torch's pool, which spin on both cores for a while
                seconds[name].append(bench.once(run))
    return seconds


def spread(samples: list[float]) -> float:
    return (max(samples) - min(samples)) / statistics.median(samples)


def measure(
    bench: Bench,
    cell: Cell,
    shape: dict[str, Any],
    flush: Flush,
    roofs: Roofs | None,
    rates: dict[str, Any],
    pace: Pace,
) -> dict[str, Any]:
    """Check every entry of the cell, then time them in turns. `rates` are the run's; by `roofs` they are taken anew."""
    chosen, began, on_cpu = bench.options, time.monotonic(), bench.device.type == "cpu"
    if on_cpu:
        seconds_a_run = cell.flop / rates["gemm_flop_per_s"]
        if seconds_a_run > LONGEST * chosen.cell_seconds:
            raise TooLong(
                f"{seconds_a_run:.1f} s a run by the rate of the product, of {chosen.cell_seconds:g} s for all"
            )
    geometry = cell.geometry
    case = Case.make(geometry, cell.agents, cell.prefix, cell.suffix, device=bench.device, backend=chosen.backend)
    found = entries(bench, shape, case, (lambda name: pace.admit(cell, name)) if on_cpu else lambda name: None)
    if roofs is not None:
        runs = found.runs | {f"roof {name}": run for name, run in roofs.runs().items()}
        seconds = shares(bench, runs, found.first, flush)
        samples = {name: seconds.pop(f"roof {name}") for name in roofs.runs()}
        rates = roofs.rates(samples) | {"seconds": samples, "threads": torch.get_num_threads()}
    else:
        try:
            seconds = turns(bench, found, flush, began)
        except FAILURES as error:
            bench.blame(shape, found.now, error)
            raise

    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    pace.note(cell, medians)
    ours = medians.pop("kvkern")
    moved = float(geometry.token_bytes() * (cell.prefix + cell.agents * cell.suffix))
    return {
        "backend": backends.choose(chosen.backend, bench.device).name,
        **({"isa": isa(bench)} if on_cpu else {}),
        "geometry": f"{geometry.num_qo_heads}/{geometry.num_kv_heads}x{geometry.head_dim}",
        "dtype": cell.dtype,
        "agents": cell.agents,
        "prefix": cell.prefix,
        "suffix": cell.suffix,
        "ms": ours * 1e3,
        "gflops": cell.flop / ours / 1e9,
        "gbs": moved / ours / 1e9,
        "gemm_share": cell.flop / ours / rates["gemm_flop_per_s"],
        "copy_share": moved / ours / rates["copy_bytes_per_s"],
        **{f"ratio_{name}": median / ours for name, median in medians.items()},
        **alone(cell, medians, rates, isa(bench) if on_cpu else None),
        "spread": {name: spread(samples) for name, samples in seconds.items()},
        "seconds": seconds,
        "flop": cell.flop,
        "bytes": moved,
        "reasons": found.reasons,
        **({"eager": found.eager} if found.eager else {}),
        "roofs": rates,
    }


def alone(cell: Cell, medians: dict[str, float], rates: dict[str, Any], measured_in: str | None) -> dict[str, float]:
    """Columns of K1 and K2 alone, where they have a time; of K2 where it has a suffix."""
    found, size = {}, cell.geometry.token_bytes()
    if "K1" in medians:
        k1, flop = medians["K1"], cell.flop * cell.prefix / (cell.prefix + cell.suffix)
        found |= {
            "k1_ms": k1 * 1e3,
            "k1_gflops": flop / k1 / 1e9,
            "k1_gemm_share": flop / k1 / rates["gemm_flop_per_s"],
            "k1_gbs": size * cell.prefix / k1 / 1e9,
            "k1_copy_share": size * cell.prefix / k1 / rates["copy_bytes_per_s"],
        }
        if "fma_flop_per_s" in rates and (cell.dtype == "float32" or measured_in != "avx512bf16"):
            found["k1_fma_share"] = flop / k1 / rates["fma_flop_per_s"]
    if "K2" in medians and cell.suffix:
        k2, moved = medians["K2"], size * cell.agents * cell.suffix
        found |= {
            "k2_ms": k2 * 1e3,
            "k2_gbs": moved / k2 / 1e9,
            "k2_copy_share": moved / k2 / rates["copy_bytes_per_s"],
        }
    return found


def line(shape: dict[str, Any], found: dict[str, Any]) -> str:
    ratios = "  ".join(f"{found[f'ratio_{name}']:.2f}x {name}" for name in found["seconds"] if name != "kvkern")
    return (
        f"layer    {shown(shape)} | {found['ms']:.3f} ms ({100 * found['spread']['kvkern']:.0f} %) | "
        f"{found['gflops']:.1f} GFLOP/s = {100 * found['gemm_share']:.0f} % of GEMM {found['gbs']:.1f} GB/s = "
        f"{100 * found['copy_share']:.0f} % of copy | {ratios}"
    )


# -- threads -----------------------------------------------------------------------------------------------------------


def threads_gain(bench: Bench, flush: Flush, prefix_tokens: int) -> None:
    """K1 of one agent with 1 and with 2 threads in turns, for each geometry and dtype of the aims that the file lacks."""
    chosen, kept = bench.options, bench.beside.setdefault("threads_gain", [])
    dtypes = (chosen.dtype,) if chosen.dtype else CPU_DTYPES
    threads = torch.get_num_threads()
    for heads, dtype in itertools.product([tuple(chosen.heads)] if chosen.heads else CPU_AIMS_HEADS, dtypes):
        cell = Cell(heads, dtype, 1, prefix_tokens, 0)  # type: ignore[arg-type]
        shape = {"B": 1, "P": prefix_tokens, "heads": list(heads), "dtype": dtype, "isa": isa(bench)}
        if any(held["shape"] == shape for held in kept):
            continue
        case = Case.make(cell.geometry, 1, prefix_tokens, 0, device=bench.device, backend=chosen.backend)
        check(case, case.kvkern())
        run, seconds = kernels(case)["K1"], {"1": [], "2": []}  # type: dict[str, list[float]]
        try:
            for _ in range(chosen.samples):
                for count, samples in seconds.items():
                    torch.set_num_threads(int(count))
                    flush()
                    samples.append(bench.once(run))
        finally:
            torch.set_num_threads(threads)
        one, two = (statistics.median(samples) for samples in seconds.values())
        kept.append({"shape": shape, "gain": one / two, "seconds": seconds})
        bench.save()
        print(
            f"threads  {shown(shape)} | K1 {one * 1e3:.2f} ms by 1, {two * 1e3:.2f} ms by 2 | {one / two:.2f}x",
            flush=True,
        )


# -- all of it ---------------------------------------------------------------------------------------------------------


def main() -> None:
    bench, began = Bench.start("layer", __doc__, extra=options), time.monotonic()
    chosen, on_cpu = bench.options, bench.device.type == "cpu"
    chosen.cell_seconds = chosen.cell_seconds or (8.0 if on_cpu else 30.0)
    bench.resume()
    bench.take_up_trial()
    torch.seed()
    measured_in, pace, forced = isa(bench), Pace(chosen.cell_seconds), os.environ.get("KVKERN_ISA")
    if measured_in is not None and forced and measured_in != forced:
        raise SystemExit(f"KVKERN_ISA: found {measured_in} in use, needed {forced}\n  do: name one of `kvkern env`")
    if on_cpu:
        pace.take_up(bench.results)

    flush = functools.cache(lambda: Flush(bench))
    pair = functools.cache(lambda: buffers(bench))
    peak = functools.cache(lambda: fma_peak(measured_in))
    roofs = functools.cache(lambda dtype: Roofs(bench, dtype, pair(), peak()))

    @functools.cache
    def rates(dtype: str) -> dict[str, Any]:
        found = roofs(dtype).once()
        if not on_cpu:  # once is enough there, and the memory is wanted
            roofs.cache_clear()
            pair.cache_clear()
        return found

    if chosen.threads_gain and on_cpu and chosen.seconds > 0:
        threads_gain(bench, flush(), 200 if chosen.tiny else 32768)
    shapes = {cell: shape_of(cell, chosen.backend, measured_in) for cell in cells(chosen, cuda=not on_cpu)}
    left = [cell for cell, shape in shapes.items() if not bench.has(shape)]
    if on_cpu:
        held = bench.beside.get("not_begun", [])
        bench.beside["not_begun"] = list(dict.fromkeys([*held, *(shown(shapes[cell]) for cell in left)]))
    for n, cell in enumerate(left):
        shape = shapes[cell]
        if time.monotonic() - began > chosen.seconds:
            print(f"layer    {len(left) - n} cells not begun: {chosen.seconds:g} s are over", flush=True)
            break
        try:
            for name, why in bench.left_out(shape).items():
                if name in WHOLE:
                    raise Broken(f"{name} {why}")
            roofs_here = roofs(cell.dtype) if on_cpu else None
            found = measure(bench, cell, shape, flush(), roofs_here, rates(cell.dtype), pace)
        except FAILURES as error:
            bench.blame(shape, CASE, error)
            bench.fail(shape, error)
        else:
            bench.keep(shape, found)
            print(line(shape, found), flush=True)
        if on_cpu:
            bench.beside["not_begun"].remove(shown(shape))
        bench.save()
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def shape_of(cell: Cell, backend: str | None, measured_in: str | None) -> dict[str, Any]:
    """What names the cell in the file."""
    shape: dict[str, Any] = {"B": cell.agents, "P": cell.prefix, "S": cell.suffix}
    shape |= {"heads": list(cell.heads), "dtype": cell.dtype, "backend": backend}
    return shape if measured_in is None else shape | {"isa": measured_in}


if __name__ == "__main__":
    try:
        main()
    except Crashed:
        # At once: what is freed on a broken device may abort the process, which would have another status.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(CRASHED)
