"""K1 and K2 in other forms than the launchers': tiles, warps, stages, changes of the source, and cuts of a prefix. For CUDA.

    python bench/forms.py [--only K1 K2 cuts] [--forms WORD ...] [--compile 12] [--samples 15] [--seconds 90] [--out bench/results/NAME]

Each form runs on the operands of one layer's step; its state, or its output, is compared with the default form's before it
has a time: `same_bits`, and `error`, the largest difference relative to the largest value, which ends a form above 1 %. A
time is a quarter of that of a CUDA graph of four launches. With NVIDIA's library for it, clock and power are read while K1's
forms run for 0.3 s.

--compile N: N processes first compile all forms, into Triton's cache.

Fields of forms.json: shape (kernel, form, B, P, S, heads, dtype), ms, tflops or gbs, same_bits, error, spread, seconds,
clock_mhz, watts;
and for comparison the forms `cudnn` (torch's operator, all rows of a kv head
as one block of queries), `gemm` (8192 cubed) and `copy` (1 GB).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from bench_layer import Roofs, buffers, spread
from harness import Bench, shown
from peers import Case, aten
from torch import Tensor

import kvkern
from kvkern import backends
from kvkern.kernels import prefix, prefix_hopper, suffix, tiles
from kvkern.plan import AgentRows, Plan

LAUNCHES = 4
HEADS = {128: (32, 8, 128), 64: (9, 3, 64)}
K1_SHAPES = [(1024, 32768, 64, 128), (512, 8192, 64, 128), (1, 32768, 64, 128), (1024, 8192, 64, 64)]
K2_SHAPES = [(1024, 2048, 256, 128), (64, 2048, 512, 128), (1024, 2048, 64, 128), (1024, 2048, 256, 64)]
CUT_SHAPES = [(256, 32768, 64, 128), (64, 32768, 64, 128), (768, 32768, 64, 128), (16, 8192, 64, 128)]
CUTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Form:
    """options: of a launch, in place of the default's; edits: of the kernel's source, old text and new."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    edits: tuple[tuple[str, str], ...] = ()
    hopper: bool = False


def tile(m: int, n: int, warps: int, stages: int, **more: Any) -> Form:
    name = f"{m}x{n} w{warps} s{stages}" + "".join(f" {key}={value}" for key, value in more.items())
    return Form(name, {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages, **more})


K1_FORMS = [
    Form("plain"),
    Form("hopper", hopper=True),
    Form("hopper, 64 keys", edits=(("STAGES = 64, 128, 2", "STAGES = 64, 64, 4"),), hopper=True),
    Form("hopper, 4 stages", edits=(("STAGES = 64, 128, 2", "STAGES = 64, 128, 4"),), hopper=True),
    Form("hopper, waits of 0", edits=(("warpgroup_mma_wait(1, deps=(s,))", "warpgroup_mma_wait(0, deps=(s,))"),), hopper=True),
    tile(64, 128, 4, 2),
    tile(128, 64, 8, 2),
    tile(128, 64, 8, 3),
    tile(128, 64, 8, 4),
    tile(64, 64, 4, 3),
    tile(128, 128, 8, 2, DESCRIPTORS=False),
    tile(128, 64, 4, 3),
]  # fmt: skip
CARRIED = "            page = page_ids(table_ptr, first + BLOCK_N, longest, PAGE, BLOCK_N)\n"
LOADED = "            written = keys < longest\n"
K2_FORMS = [
    Form("default"),
    Form(
        "page ids loaded where they are used",
        edits=((CARRIED, ""), (LOADED, LOADED + CARRIED.replace("first + BLOCK_N", "first"))),
    ),
    *(tile(16, n, w, s) for n, w, s in ((64, 4, 2), (64, 4, 4), (32, 4, 3), (32, 4, 5), (32, 2, 4), (64, 2, 3), (128, 4, 3))),
    *(tile(16, n, w, s) for n, w, s in ((64, 8, 3), (16, 1, 4), (32, 1, 4), (128, 8, 2))),
]  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=("K1", "K2", "cuts"), default=["K1", "K2", "cuts"])
    parser.add_argument("--forms", nargs="+", default=None, help="forms whose name holds one of these words alone")
    parser.add_argument("--compile", type=int, default=0, help="processes that compile all forms first")
    parser.add_argument("--part", type=int, nargs=2, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=90.0, help="no form begins after these")
    parser.add_argument("--tiny", action="store_true", help="small shapes: to see that all of it runs")


# -- one form ----------------------------------------------------------------------------------------------------------


def edited(module: ModuleType, form: Form) -> ModuleType:
    """The kernel's module with the form's changes of its source, from a file, since Triton reads the source of its kernels."""
    if not form.edits:
        return module
    assert module.__file__ is not None
    text = Path(module.__file__).read_text(encoding="utf-8")
    for old, new in form.edits:
        if text.count(old) != 1:
            raise RuntimeError(f"{form.name}: {text.count(old)} places in {module.__name__} with {old!r}, needed 1")
        text = text.replace(old, new)
    name = "form_" + "".join(c if c.isalnum() else "_" for c in f"{module.__name__}_{form.name}")
    folder = Path(tempfile.gettempdir()) / "kvkern-forms"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@contextlib.contextmanager
def changed(module: Any, **values: Any) -> Iterator[None]:
    held = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in held.items():
            setattr(module, name, value)


@dataclass
class Step:
    """A case, cut into walks, with the packed queries that K0 leaves."""

    case: Case
    plan: Plan
    queries: Tensor

    @classmethod
    def make(cls, B: int, P: int, S: int, head_dim: int, device: torch.device, walks: int | None = None) -> Step:
        geometry = kvkern.Geometry(1, *HEADS[head_dim], torch.bfloat16)
        case = Case.make(geometry, B, P, S, device=device, backend="triton")
        plan = case.plan
        if walks is not None:
            agents = [AgentRows(slot, case.prefix, 1) for slot in range(B)]
            plan = Plan.make(case.pool, agents, workers_per_node=walks)
        run, pool, t = backends.choose("triton", device), case.pool, plan.tensors
        pages = pool.k_pages(0), pool.v_pages(0)
        queries = run.append(case.q, case.k, case.v, *pages, pool.page_table, pool.seq_lens, t.row_slot, t.row_back)
        return cls(case, plan, queries)

    def k1(self, form: Form) -> Callable[[], Any]:
        t, g = self.plan.tensors, self.case.geometry
        common: dict[str, Any] = {"layer": 0, "sm_scale": g.head_dim**-0.5}
        if form.hopper:
            run = edited(prefix_hopper, form).prefix_attention_hopper
            return lambda: run(self.queries, t.node_table, t.items, t.path_table, **common)
        module: Any = edited(prefix, form)
        usual = module.forms

        def forms(*of: Any) -> dict[str, dict[str, Any]]:
            return {name: known | form.options for name, known in usual(*of).items()}

        def call() -> Any:
            with changed(module, forms=forms, _hopper=module._hopper if form.name == "default" else lambda q: None):
                return module.prefix_attention(
                    self.queries, t.node_table, t.items, t.path_table, num_kv_heads=g.num_kv_heads, **common
                )

        return call

    def k2(self, form: Form, state: Any) -> Callable[[], Any]:
        t, g, pool, module = self.plan.tensors, self.case.geometry, self.case.pool, edited(suffix, form)
        pages = pool.k_pages(0), pool.v_pages(0)
        places = pool.page_table, pool.seq_lens, t.row_slot, t.row_back, t.suffix_tiles, t.path_table

        def chosen(*of: Any) -> Any:
            known = tiles.tiles(*of)
            return tiles.Tiles(known.prefix, tiles.Tile(**(known.suffix.options() | form.options)), known.prefix_small)

        def call() -> Any:
            with changed(module, tiles=chosen):
                return module.suffix_attention(self.queries, *pages, *places, state, sm_scale=g.head_dim**-0.5)

        return call


def replayed(run: Callable[[], Any]) -> Callable[[], None]:
    """Four launches in a CUDA graph."""
    run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(LAUNCHES):
            run()
    return captured.replay


class Sensors:
    """Clock and power of the GPU while something runs; nothing where NVIDIA's library is missing."""

    nvml: Any

    def __init__(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            self.gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
            self.nvml = pynvml
        except Exception:  # whatever that library raises
            self.nvml = None

    def read(self) -> tuple[float, float]:
        clock = self.nvml.nvmlDeviceGetClockInfo(self.gpu, self.nvml.NVML_CLOCK_SM)
        return float(clock), self.nvml.nvmlDeviceGetPowerUsage(self.gpu) / 1e3

    def during(self, run: Callable[[], Any], seconds: float) -> dict[str, float]:
        if self.nvml is None:
            return {}
        over, seen = threading.Event(), []  # type: ignore[var-annotated]

        def watch() -> None:
            while not over.wait(0.01):
                seen.append(self.read())

        thread = threading.Thread(target=watch)
        began = time.monotonic()
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        thread.start()
        while time.monotonic() - began < seconds:
            run()
            torch.cuda.synchronize()
        over.set()
        thread.join()
        late = seen[len(seen) // 2 :]
        if not late:
            return {}
        return {"clock_mhz": statistics.median(c for c, _ in late), "watts": statistics.median(w for _, w in late)}


def compared(found: Any, expected: Any, slots: int) -> tuple[bool, float]:
    """Whether all bits are the same, and the largest difference relative to the largest value, of states or outputs.

    slots: those of a state that are filled.
    """
    if len(found) == 3:
        found, expected = ([part[:slots] for part in state] for state in (found, expected))
    pairs = list(zip(found, expected, strict=True))
    same = all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)
    if len(pairs) == 3:  # states: (m, l, acc) of another tile may have another m
        (m, l, acc), (m_of, l_of, acc_of) = found, expected
        pairs = [(acc / l[..., None], acc_of / l_of[..., None]), (m + torch.log2(l), m_of + torch.log2(l_of))]
    worst = max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)
    return same, worst


# -- all of it ---------------------------------------------------------------------------------------------------------


def shape_of(kernel: str, form: str, B: int, P: int, S: int, head_dim: int) -> dict[str, Any]:
    return {"kernel": kernel, "form": form, "B": B, "P": P, "S": S, "heads": list(HEADS[head_dim]), "dtype": "bfloat16"}


class Runner:
    def __init__(self, bench: Bench) -> None:
        self.bench, self.began, self.sensors = bench, time.monotonic(), Sensors()

    @property
    def over(self) -> bool:
        return time.monotonic() - self.began > self.bench.options.seconds

    def keep(
        self, shape: dict[str, Any], run: Callable[[], Any], amount: dict[str, float], *, watch: bool, **more: Any
    ) -> None:
        """Time `run` and keep it; amount: FLOP or bytes of a launch, by the unit that they are shown in."""
        replay = replayed(run)
        seconds = [s / LAUNCHES for s in self.bench.time(replay)]
        median = statistics.median(seconds)
        rates = {unit: value / median / (1e12 if unit == "tflops" else 1e9) for unit, value in amount.items()}
        sensed = self.sensors.during(replay, 0.3) if watch else {}
        self.bench.keep(
            shape, {"ms": median * 1e3, **rates, **more, **sensed, "spread": spread(seconds), "seconds": seconds}
        )
        told = {**rates, **more, **sensed}
        words = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items())
        print(f"forms    {shown(shape)} | {median * 1e6:.1f} us ({100 * spread(seconds):.0f} %) | {words}", flush=True)

    def form(
        self,
        shape: dict[str, Any],
        run: Callable[[], Callable[[], Any]],
        expected: Any,
        amount: dict[str, float],
        slots: int,
    ) -> None:
        words = self.bench.options.forms
        if self.bench.has(shape) or self.over or (words and not any(word in shape["form"] for word in words)):
            return
        try:
            call = run()
            same, error = compared(call(), expected, slots)
            if not error < 0.01:
                raise RuntimeError(f"wrong result: error {error:.3g}")
            self.keep(shape, call, amount, watch=shape["kernel"] == "K1", same_bits=same, error=error)
        except Exception as error:  # a form that does not compile or fit is a result too
            self.bench.fail(shape, error)


def prefix_flop(step: Step) -> float:
    g = step.case.geometry
    return 4.0 * step.case.agents * g.num_qo_heads * g.head_dim * step.case.prefix_tokens


def cudnn(case: Case) -> Callable[[], Tensor]:
    operator, rows = aten("_scaled_dot_product_cudnn_attention"), case.packed[None]
    keys, values = (part[None].contiguous() for part in case.prefix_kv)
    return lambda: operator(rows, keys, values, None, True)[0]


def k1_forms(runner: Runner, shapes: list[tuple[int, int, int, int]]) -> None:
    for B, P, S, head_dim in shapes:
        step = Step.make(B, P, S, head_dim, runner.bench.device)
        amount = {"tflops": prefix_flop(step)} if B > 1 else {"gbs": float(step.case.geometry.token_bytes() * P)}
        slots = int((step.plan.tensors.path_table[0] > 0).sum())
        with changed(prefix, SMALL_ROWS=0):
            expected = step.k1(Form("plain"))()
            for form in K1_FORMS:
                shape = shape_of("K1", form.name, B, P, S, head_dim)
                runner.form(shape, functools.partial(step.k1, form), expected, amount, slots)
        if not runner.over:
            with contextlib.suppress(RuntimeError):
                runner.keep(shape_of("K1", "cudnn", B, P, S, head_dim), cudnn(step.case), amount, watch=True)
        runner.bench.save()
        torch.cuda.empty_cache()


def k2_forms(runner: Runner, shapes: list[tuple[int, int, int, int]]) -> None:
    for B, P, S, head_dim in shapes:
        step = Step.make(B, P, S, head_dim, runner.bench.device)
        amount = {"gbs": float(step.case.geometry.token_bytes() * B * S)}
        state = step.k1(Form("default"))()
        expected = step.k2(Form("default"), state)()
        for form in K2_FORMS:
            shape = shape_of("K2", form.name, B, P, S, head_dim)
            runner.form(shape, functools.partial(step.k2, form, state), expected, amount, 0)
        runner.bench.save()
        torch.cuda.empty_cache()


def cuts(runner: Runner, shapes: list[tuple[int, int, int, int]]) -> None:
    """K1 and K2 by the number of walks of the prefix: what _run in plan.py chooses by."""
    for B, P, S, head_dim in shapes:
        for walks in (*CUTS, None):
            if runner.over:
                return
            step = Step.make(B, P, S, head_dim, runner.bench.device, walks)
            run = step.k1(Form("default"))
            state, name = run(), "by default" if walks is None else f"{walks} walks"
            flop = {"tflops": prefix_flop(step)}
            runner.keep(shape_of("K1", name, B, P, S, head_dim), run, flop, watch=False)
            moved = {"gbs": float(step.case.geometry.token_bytes() * B * S)}
            runner.keep(shape_of("K2", name, B, P, S, head_dim), step.k2(Form("default"), state), moved, watch=False)
            del step, state
            torch.cuda.empty_cache()
        runner.bench.save()


def roofs(runner: Runner) -> None:
    held = Roofs(runner.bench, "bfloat16", buffers(runner.bench), None)
    n = held.a.shape[0]
    amounts = {"gemm": {"tflops": 2.0 * n**3}, "copy": {"gbs": 2.0 * held.source.numel()}}
    for name, run in held.runs().items():
        runner.keep({"kernel": "roof", "form": name}, run, amounts[name], watch=name == "gemm")


def compile_part(device: torch.device, part: int, parts: int) -> None:
    """Every parts-th form of each head_dim, once on small operands: what is left of it is in Triton's cache."""
    on = {"K1": ((64, 128), (64, 64)), "K2": ((64, 128), (256, 128), (256, 64))}
    forms = {"K1": K1_FORMS, "K2": K2_FORMS}
    todo = [(kind, form, *at) for kind in on for form in forms[kind] for at in on[kind]]
    steps: dict[tuple[int, int], Step] = {}
    for kind, form, S, head_dim in todo[part::parts]:
        with contextlib.suppress(Exception):
            step = steps.setdefault((S, head_dim), Step.make(20, 2048, S, head_dim, device))
            with changed(prefix, SMALL_ROWS=0):
                run = step.k1(form if kind == "K1" else Form("plain"))
                state = run()
            if kind == "K2":
                step.k2(form, state)()


def main() -> None:
    bench = Bench.start("forms", __doc__, extra=options)
    chosen = bench.options
    if bench.device.type != "cuda":
        raise SystemExit(f"--device: found {bench.device}, needed cuda\n  do: run this on a machine with a GPU")
    if chosen.part is not None:
        compile_part(bench.device, *chosen.part)
        return
    if chosen.compile:
        command = [sys.executable, __file__, "--device", str(bench.device)]
        parts = [subprocess.Popen([*command, "--part", str(n), str(chosen.compile)]) for n in range(chosen.compile)]
        for part in parts:
            part.wait()
    bench.resume()
    runner = Runner(bench)
    small = [(40, 2100, 64, 128)] if chosen.tiny else None
    if not bench.results:
        roofs(runner)
    if "K2" in chosen.only:
        k2_forms(runner, small or K2_SHAPES)
    if "K1" in chosen.only:
        k1_forms(runner, small or K1_SHAPES)
    if "cuts" in chosen.only:
        cuts(runner, small or CUT_SHAPES)
    bench.finish()


if __name__ == "__main__":
    main()
