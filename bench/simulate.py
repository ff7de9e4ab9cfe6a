"""80 million agents by simulation: what each way of giving them their document costs, and how long they wait.

    python bench/simulate.py [--agents 80000000] [--steps FILE] [--json out.json]     simulate; every input has an option
    python bench/simulate.py --measure [--steps FILE]                                 fit a model of steps to the real engine

Agents arrive as a Poisson process with a daily wave, ask about documents of a Zipf popularity, and are sent to replicas at
random. A replica is that of replica.py. Policies: prefill (every agent computes its document), copies (every agent loads a
copy of its KV), shared (one copy a replica), ship (the KV goes to the user, whose own machine answers: egress, no queue).
For each policy so many replicas are taken, and paid for the whole period, that the wave's peak needs --load of what they can
serve; a replica's capacity is found by bisection, as the highest rate at which its queue does not grow.

Sampled: a Poisson process that is split at random gives independent Poisson processes, so any replica stands for all of
them. --groups replicas are drawn, and of each a window of time, at a random place, in every one of --windows equal parts of
the period; a window begins with the cache as past reads leave it (drawn) and a time to settle that is not counted. Each
number is that of all windows together, its error (+-) one standard error by the spread over groups. --whole simulates every
replica for the whole period instead. Too few replicas for the peak are refused where sampled, since windows carry no backlog
to each other. With --pools replicas are parted into pools, each with documents of its own, so that each has fewer to keep.

Without --steps a step's time is by arithmetic from data sheets and an assumed --efficiency, and the result says so: nothing of
it is measured. Prices are assumptions too. --measure lets SmolLM2 answer on this machine, fits on batches of 16, 128 and 512
agents, and compares the makespan that the simulator predicts for 64, 256 and 1,024 with the engine's. With --steps FILE of such
a run a replica is that machine: the file's sizes of model and memory, an hour of it at an assumed price (--gpu-hour), and users
whose own machines are as fast, take the place of the defaults; options override them.

                                  prefill      copies      shared      ship
    replicas                          <n>         <n>         <n>         0
    $ per million agents              <n>         <n>         <n>       <n>
    time to first token, p99, s  <n> +- <n>  <n> +- <n>  <n> +- <n>     <n>

    judge  1024 agents, document of 512, question of 16: predicted <n> s, measured <n> s, <n> %
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from replica import POLICIES, Replica, Served, Trace, serve
from step_model import Run, StepModel, fit, measure, runs
from workload import Inputs, Machine, Prices, Sampling, Source, Workload

from kvkern import console
from kvkern.errors import KvkernError, RequestError

MONTH_S = 30 * 86400.0

CPU_HOUR, CPU_RESERVE = 0.10, 2e9
"""Of a CPU that was measured: dollars for an hour, assumed for two cores, and bytes that are kept for other things."""

JUDGED_TIMES, JUDGED_S = 3, 30.0
"""A run that judges is measured so often, or until it took so many seconds in all."""

SIZES = ("use", "agents", "document", "question", "answer", "copies")
"""What tells runs apart."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Progress = Callable[[int, int], Any]
"""Called with (windows done, windows in all)."""


# -- how many replicas -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sized:
    """capacity: agents a second that one replica can serve; settle_s: three times the longest answer at the chosen load."""

    capacity: float
    settle_s: float


def size(source: Source, replica: Replica, *, load: float, seed: int) -> Sized:
    """By bisection. A rate can be served if, when the last of many agents comes, few are there beside those that could run."""
    count = 1000 + 20 * replica.slots

    def run(rate: float) -> tuple[bool, float]:
        rng = np.random.default_rng([seed, 2])
        past = source.past(rng, math.inf)
        trace = source.trace(rng, np.cumsum(rng.exponential(1 / rate, count)))
        served = serve(replica, trace, warm=past)
        there = int((served.end > trace.arrival[-1]).sum())
        return there <= replica.slots + count / 50, float((served.end - trace.arrival).max())

    low, high = 1.0, 1.0
    while run(high)[0]:
        low, high = high, 2 * high
        if high > 1e12:
            raise RequestError("steps", found="steps that take no time", needed="seconds above 0", do="measure again")
    while low == high or not run(low)[0]:
        low, high = low / 2, low
    for _ in range(6):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if run(middle)[0] else (low, middle)
    return Sized(low, 3 * run(low * load)[1])


# -- windows -----------------------------------------------------------------------------------------------------------


@dataclass
class Window:
    """What one window of one replica gave.

    first, answer, queued, loads  of the agents that came within it, in seconds and numbers
    busy, rows                    share of its time in steps, and decode rows of a step
    disk_share                    of all loads of its replica, those that settle it included
    """

    group: int
    first: np.ndarray
    answer: np.ndarray
    queued: np.ndarray
    loads: int
    disk_share: float
    busy: float
    rows: float


def observe(group: int, trace: Trace, served: Served, begin: float, end: float) -> Window:
    """Counts of [begin, end). Busy seconds are those of steps within it, and what it cuts of others."""
    counted = (trace.arrival >= begin) & (trace.arrival < end)
    starts = served.step_ends - np.diff(served.step_busy, prepend=0.0)
    within = np.maximum(np.minimum(served.step_ends, end) - np.maximum(starts, begin), 0)
    steps = within > 0
    return Window(
        group=group,
        first=(served.first - trace.arrival)[counted],
        answer=(served.end - trace.arrival)[counted],
        queued=served.queued[counted],
        loads=int(served.loaded_for[counted].sum()),
        disk_share=served.disk_loads / max(1, served.loads),
        busy=float(within.sum()) / (end - begin),
        rows=float(served.step_rows[steps].mean()) if steps.any() else 0.0,
    )


def sample(
    sources: Sequence[Source], replica: Replica, replicas: int, settle_s: float, sampling: Sampling, progress: Progress
) -> tuple[list[Window], int]:
    """Windows of all groups, and the agents that were simulated in them, those that settle a window included.

    sources   one of each pool; groups are replicas of them by turns
    replicas  in a pool
    """
    period, windows = sources[0].workload.period_s, []
    stratum = period / sampling.windows
    rate = sum(source.rate(replicas) for source in sources) / len(sources)
    length = sampling.sampled_agents / (sampling.groups * sampling.windows * rate)
    length = min(max(length, settle_s), stratum)
    simulated = 0
    for group in range(sampling.groups):
        source = sources[group % len(sources)]
        for part in range(sampling.windows):
            rng = np.random.default_rng([sampling.seed, 3, group, part])
            begin = (part + rng.random()) * stratum
            # Time 0 of the replica is where the window begins to settle; after it others still come, and hold up its last.
            zero = begin - settle_s
            trace = source.trace(rng, source.poisson(rng, zero, begin + length + settle_s, replicas) - zero)
            served = serve(replica, trace, warm=source.past(rng, source.rate(replicas) * period))
            windows.append(observe(group, trace, served, settle_s, settle_s + length))
            simulated += len(trace.arrival)
            progress(len(windows), sampling.groups * sampling.windows)
    return windows, simulated


def whole(
    sources: Sequence[Source], replica: Replica, replicas: int, sampling: Sampling, progress: Progress
) -> tuple[list[Window], int]:
    """Every replica for the whole period; as `sample`."""
    windows, period = [], sources[0].workload.period_s
    for group in range(replicas * len(sources)):
        source = sources[group % len(sources)]
        rng = np.random.default_rng([sampling.seed, 4, group])
        trace = source.trace(rng, source.poisson(rng, 0.0, period, replicas))
        served = serve(replica, trace, warm=source.past(rng, source.rate(replicas) * period))
        windows.append(observe(group, trace, served, 0.0, max(period, served.end_s)))
        # What is left of the last agents after the period is work of the period.
        windows[-1].busy = served.busy_s / period
        progress(group + 1, replicas * len(sources))
    return windows, sum(len(window.first) for window in windows)


Estimate = dict[str, Any]
"""{"value": number, "error": one standard error, or None where there is none}."""


def _summary(windows: Sequence[Window]) -> dict[str, float]:
    """The numbers of some windows together. NaN where no agent came."""
    first, answer, queued = (np.concatenate([getattr(w, n) for w in windows]) for n in ("first", "answer", "queued"))
    summary = {"utilisation": float(np.mean([w.busy for w in windows]))}
    summary["decode_rows_per_step"] = float(np.mean([w.rows for w in windows]))
    if not len(first):
        names = ("first_mean_s", "first_p50_s", "first_p99_s", "answer_mean_s", "answer_p50_s", "answer_p99_s")
        return summary | dict.fromkeys((*names, "queue_mean", "queue_p99", "hit_rate", "disk_share"), math.nan)
    for name, seconds in (("first", first), ("answer", answer)):
        summary[f"{name}_mean_s"] = float(seconds.mean())
        summary[f"{name}_p50_s"], summary[f"{name}_p99_s"] = np.quantile(seconds, [0.5, 0.99]).tolist()
    loads = [w.loads for w in windows]
    summary["queue_mean"], summary["queue_p99"] = float(queued.mean()), float(np.quantile(queued, 0.99))
    summary["hit_rate"] = 1 - sum(loads) / len(first)
    summary["disk_share"] = float(np.average([w.disk_share for w in windows], weights=np.maximum(loads, 1e-9)))
    return summary


def estimate(windows: Sequence[Window], *, pools: int | None) -> dict[str, Estimate]:
    """Each number of all windows together, and its standard error by the spread of groups of one pool.

    pools  group g is of pool g % pools, two groups of each at least; None: nothing was sampled, so there is no error
    """
    pooled = _summary(windows)
    errors: dict[str, float | None] = dict.fromkeys(pooled)
    if pools is not None:
        groups = range(max(w.group for w in windows) + 1)
        each = [_summary([w for w in windows if w.group == g]) for g in groups]
        for name in pooled:
            values = np.array([summary[name] for summary in each])
            apart = [values[pool::pools] - values[pool::pools].mean() for pool in range(pools)]
            variance = float((np.concatenate(apart) ** 2).sum()) / (len(each) - pools)
            errors[name] = math.sqrt(variance / len(each))
    # Of a period without agents much is not known, and JSON has no NaN.
    known = {name: None if math.isnan(value) else value for name, value in pooled.items()}
    return {name: {"value": known[name], "error": errors[name] if known[name] is not None else None} for name in pooled}


# -- policies ----------------------------------------------------------------------------------------------------------


NOTHING = {
    "prefill": ("hit_rate", "disk_share"),
    "copies": ("hit_rate",),
    "shared": (),
    "ship": ("queue_mean", "queue_p99", "hit_rate", "disk_share", "utilisation", "decode_rows_per_step"),
}
"""What a policy does not have."""


def distinct(workload: Workload) -> np.ndarray:
    """Chance of each document to be asked about in the period."""
    return -np.expm1(-workload.agents * workload.popularity())


def simulate(
    policy: str,
    inputs: Inputs,
    seconds: StepModel,
    *,
    replicas: int | None = None,
    everything: bool = False,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """One policy: hours, dollars, waiting. JSON-ready; estimates are {"value", "error"}.

    replicas    of all pools together, a multiple of their number; None: as many as the peak needs
    everything  all replicas for the whole period, instead of a sample

    Raises RequestError for fewer replicas than the peak needs, unless all is simulated, and for pools that do not divide
    replicas and groups; CapacityError where memory holds no agent or no document.
    """
    workload, machine, prices = inputs.workload, inputs.machine, inputs.prices
    lengths, hours = workload.lengths(inputs.sampling.seed), workload.period_s / 3600
    asked = distinct(workload)
    found: dict[str, Any] = {"policy": policy, "documents_asked": float(asked.sum())}
    published = egress = kept = 0.0
    if policy != "prefill":
        # Each document that is asked about is computed once, and kept.
        sizes, of = np.unique(lengths, return_inverse=True)
        each = np.array([seconds.prefill_seconds(int(tokens), machine.prefill_chunk) for tokens in sizes])
        published = float((asked * each[of]).sum()) / 3600
        kept = float((asked * lengths).sum()) * machine.token_bytes
    if policy == "ship":
        found |= {"replicas": 0, "agents_simulated": int(inputs.sampling.sampled_agents)}
        found["estimates"] = _ship(inputs)
        busy: Estimate = {"value": published, "error": None}
        egress = workload.agents * float((workload.popularity() * lengths).sum()) * machine.token_bytes
        gpu = published
    else:
        found |= _serve_all(policy, inputs, seconds, replicas, everything, progress)
        gpu = found["replicas"] * hours
        busy = {
            name: None if share is None else share * gpu for name, share in found["estimates"]["utilisation"].items()
        }
        busy["value"] += published
        gpu += published
    for name in NOTHING[policy]:
        del found["estimates"][name]
    dollars = {
        "gpu": gpu * prices.gpu_hour,
        "egress": egress / 1e9 * prices.egress_gb,
        "storage": kept / 1e9 * prices.storage_gb_month * workload.period_s / MONTH_S,
    }
    found |= {"gpu_hours": gpu, "busy_gpu_hours": busy, "publish_gpu_hours": published, "egress_bytes": egress}
    total = sum(dollars.values())
    return found | {"dollars": dollars | {"total": total, "per_million_agents": total / workload.agents * 1e6}}


def _serve_all(
    policy: str, inputs: Inputs, seconds: StepModel, replicas: int | None, everything: bool, progress: Progress
) -> dict[str, Any]:
    """A policy that has replicas: how many, and what was seen of them."""
    workload, machine, sampling, pools = inputs.workload, inputs.machine, inputs.sampling, inputs.machine.pools
    for name, given, least in (("groups", sampling.groups, 2), ("replicas", replicas, 1)):
        if given is not None and (given < least * pools or given % pools) and not (everything and name == "groups"):
            needed = f"a multiple of {pools} pools, at least {least * pools}"
            raise RequestError(name, found=given, needed=needed, do="give another number")
    sources = [Source(workload, sampling.seed, pool=pool, pools=pools) for pool in range(pools)]
    replica = machine.replica(policy, workload, seconds)
    sized = size(sources[0], replica, load=machine.load, seed=sampling.seed)
    # All pools are alike, so the one that is asked most decides.
    a_pool = workload.peak * max(source.share for source in sources) / sized.capacity
    count = math.ceil(a_pool / machine.load) if replicas is None else replicas // pools
    if count < a_pool and not everything:
        needed = f"at least {math.ceil(a_pool) * pools} for the peak of {policy}"
        do = "give more, or simulate all of it (--whole)"
        raise RequestError("replicas", found=count * pools, needed=needed, do=do)
    if everything:
        windows, simulated = whole(sources, replica, count, sampling, progress)
    else:
        windows, simulated = sample(sources, replica, count, sized.settle_s, sampling, progress)
    return {
        "replicas": count * pools,
        "slots": replica.slots,
        "device_bytes_for_documents": replica.device_bytes if policy == "shared" else 0,
        "capacity_per_replica": sized.capacity,
        "settle_s": sized.settle_s,
        "agents_simulated": simulated,
        "agents_counted": sum(len(window.first) for window in windows),
        "estimates": estimate(windows, pools=None if everything else pools),
    }


def _ship(inputs: Inputs) -> dict[str, Estimate]:
    """Users download, then answer by themselves: nobody waits for anybody, so agents are drawn and need no queue."""
    prices, groups, windows = inputs.prices, inputs.sampling.groups, []
    source = Source(inputs.workload, inputs.sampling.seed)
    for group in range(groups):
        rng = np.random.default_rng([inputs.sampling.seed, 5, group])
        trace = source.trace(rng, np.zeros(max(1, int(inputs.sampling.sampled_agents / groups))))
        sent = source.lengths[trace.document] * inputs.machine.token_bytes
        first = sent / prices.user_bytes_per_s + prices.user_step_s
        answer = first + (trace.answer - 1) * prices.user_step_s
        windows.append(Window(group, first, answer, np.zeros(len(first)), len(first), 0.0, 0.0, 1.0))
    return estimate(windows, pools=1)


# -- the command -------------------------------------------------------------------------------------------------------

LINES: tuple[tuple[str, str, str], ...] = (
    ("time to first token, p50", "first_p50_s", "s"),
    ("time to first token, p99", "first_p99_s", "s"),
    ("time to the answer, p50", "answer_p50_s", "s"),
    ("time to the answer, p99", "answer_p99_s", "s"),
    ("queue, mean", "queue_mean", ""),
    ("queue, p99", "queue_p99", ""),
    ("hit rate", "hit_rate", ""),
    ("share of loads from disk", "disk_share", ""),
    ("decode rows in a step", "decode_rows_per_step", ""),
    ("share of time in steps", "utilisation", ""),
)


def shown(estimated: Estimate) -> str:
    """A value and its error."""
    value, error = estimated["value"], estimated["error"]
    if value is None:
        return "-"
    return (f"{value:,.0f}" if value >= 1000 else f"{value:.4g}") + (f" +- {error:.1g}" if error else "")


def table(results: Sequence[dict[str, Any]]) -> Any:
    """A rich table: policies side by side."""
    from rich.table import Table

    grid = Table("", *(r["policy"] for r in results), box=None, pad_edge=False)
    for column in grid.columns[1:]:
        column.justify = "right"
    for name in ("replicas", "gpu_hours", "busy_gpu_hours", "publish_gpu_hours"):
        row = (r[name] if isinstance(r[name], dict) else {"value": r[name], "error": None} for r in results)
        grid.add_row(name.replace("_", " "), *map(shown, row))
    for name in ("gpu", "egress", "storage", "total", "per_million_agents"):
        grid.add_row(f"$ {name.replace('_', ' ')}", *(f"{r['dollars'][name]:,.2f}" for r in results))
    grid.add_row("egress, bytes", *(f"{r['egress_bytes']:.4g}" for r in results))
    for name, key, unit in LINES:
        row = (r["estimates"].get(key, {"value": None, "error": None}) for r in results)
        grid.add_row(name + (f", {unit}" if unit else ""), *map(shown, row))
    grid.add_row("agents simulated", *(f"{r['agents_simulated']:,}" for r in results))
    return grid


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=[*POLICIES, "ship"], choices=[*POLICIES, "ship"])
    parser.add_argument("--replicas", type=int, default=None, help="of every policy; by default what the peak needs")
    parser.add_argument("--whole", action="store_true", help="every replica for the whole period: for small cases")
    parser.add_argument("--steps", type=Path, default=None, help="what --measure has written; with it, written to")
    parser.add_argument("--json", type=Path, default=None, help="file for inputs and results")
    for kind in (Workload, Machine, Prices, Sampling):
        group = parser.add_argument_group(kind.__doc__.rstrip("."))
        for one in dataclasses.fields(kind):
            text = f"{one.metadata['help']} (default: {one.default:,.12g})"
            to = int if isinstance(one.default, int) else float
            group.add_argument("--" + one.name.replace("_", "-"), type=to, default=one.default, help=text)
    group = parser.add_argument_group("--measure")
    group.add_argument("--measure", action="store_true", help="fit to the engine on this machine, and judge")
    group.add_argument("--model", default=None, help="folder of a checkpoint; the demo's own by default")
    group.add_argument(
        "--dtype", default=None, choices=("float32", "bfloat16", "float16"), help="as bench_document.py's"
    )
    group.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for one thread where others work too")
    group.add_argument("--fit-agents", type=int, nargs="+", default=[16, 128, 512])
    group.add_argument("--judge-agents", type=int, nargs="+", default=[64, 256, 1024])
    group.add_argument("--measure-document", type=int, default=512, help="tokens (default: 512)")
    group.add_argument("--measure-answer", type=int, default=16, help="tokens (default: 16)")
    return parser


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with those of a measured machine as defaults where --steps names one."""
    parser = options()
    chosen = parser.parse_args(argv)
    if chosen.steps is None or chosen.measure:
        return chosen
    _, content = read_steps(chosen.steps)
    parser.set_defaults(**content.get("inputs", {}))
    return parser.parse_args(argv)


def _inputs(chosen: argparse.Namespace) -> Inputs:
    def of(kind: Any) -> Any:
        return kind(**{one.name: getattr(chosen, one.name) for one in dataclasses.fields(kind)})

    return Inputs(of(Workload), of(Machine), of(Prices), of(Sampling))


def read_steps(path: Path) -> tuple[StepModel, dict[str, Any]]:
    """The fitted model of a file that --measure has written, and the file. Raises RequestError for any other."""
    known = {one.name for kind in (Machine, Prices) for one in dataclasses.fields(kind)}
    try:
        content = json.loads(path.read_text())
        for name, value in content.get("inputs", {}).items():
            if name not in known or isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"inputs.{name}")
        return StepModel(**content["model_of_steps"]), content
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        needed = "a file that --measure has written"
        raise RequestError("steps", found=f"{path}: {error}", needed=needed, do="run with --measure first") from None


def versions() -> dict[str, str]:
    import importlib.metadata

    packages = {name: importlib.metadata.version(name) for name in ("kvkern", "numpy")}
    return {"python": platform.python_version(), **packages}


def write(path: Path, content: dict[str, Any]) -> None:
    """Whole, or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def makespan(run: dict[str, Any], seconds: StepModel) -> float:
    """What the simulator predicts for a measured run: all its agents ask at second 0, and copies are there."""
    count = run["agents"]
    policy = "copies" if run["copies"] else "shared"
    replica = Replica(policy, seconds, slots=run["slots"], max_extend=run["max_extend"], chunk=run["chunk"])
    zeros = np.zeros(count)
    sizes = (np.full(count, run[name]) for name in ("question", "answer"))
    return serve(replica, Trace(zeros, zeros.astype(int), *sizes, np.array([run["document"]])), warm=[0]).end_s


def inputs_of(model: Any, seconds: StepModel, done: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a replica is made of where its steps are measured: the model's sizes, this machine's memory; prices stay assumed.

    done  the runs; a load is as fast as those of their copies, from the page cache, with every digest verified
    """
    import torch

    from kvkern.identity import model_geometry

    weights, geometry = list(model.parameters()), model_geometry(model)
    parameters, text, machine = sum(p.numel() for p in weights), Workload(), {}
    if weights[0].device.type == "cuda":
        machine["memory_bytes"] = float(torch.cuda.get_device_properties(weights[0].device).total_memory)
    else:
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        # What a CPU computes from and what it keeps documents in is the same memory.
        machine |= {"memory_bytes": memory, "reserve_bytes": CPU_RESERVE, "host_bytes": 0.0, "gpu_hour": CPU_HOUR}
    rates = [run["kv_bytes"] / second for run in done for second in run["load_s"]]
    document = text.document_tokens
    return machine | {
        "parameters": float(parameters),
        "weight_bytes": sum(p.numel() * p.element_size() for p in weights) / parameters,
        "token_bytes": float(geometry.token_bytes()),
        "attention_flop": 4.0 * geometry.layers * geometry.num_qo_heads * geometry.head_dim,
        "disk_bytes_per_s": statistics.median(rates),
        "user_step_s": seconds(1, 0, document, document, text.question_tokens + text.answer_tokens),
    }


def judge(measured: Iterable[dict[str, Any]], seconds: StepModel) -> list[dict[str, Any]]:
    """Predicted and measured makespan of each run, (predicted - measured) / measured; of a run that was repeated the median."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in measured:
        found.setdefault(tuple(run[name] for name in SIZES), []).append(run)
    judged = []
    for sizes, same in found.items():
        predicted, taken = makespan(same[0], seconds), statistics.median(run["makespan_s"] for run in same)
        times = {"predicted_s": predicted, "measured_s": taken, "error": predicted / taken - 1, "runs": len(same)}
        judged.append(dict(zip(SIZES, sizes, strict=True)) | times)
    return judged


def measured(chosen: argparse.Namespace) -> None:
    """--measure: run the engine, fit, judge, print, and write --steps."""
    import torch
    from bench_document import dtype_for
    from harness import machine

    from kvkern import opening
    from kvkern.demo_model import demo_model

    name, device = chosen.model or str(demo_model()), opening.device_of(None)
    dtype = chosen.dtype or dtype_for(device)
    model, tokenizer = opening.open_model(name, dtype, device)
    planned = runs(
        chosen.fit_agents, chosen.judge_agents, document=chosen.measure_document, answer=chosen.measure_answer
    )
    # The first engine over a model measures its rounding classes, and pays for what is lazy.
    measure(model, tokenizer, Run("warm", 4, 64, 16, 4), max_extend_tokens=chosen.max_extend)
    done = []
    for run in planned:
        limits = {"max_extend_tokens": chosen.max_extend, "seed": chosen.seed, "clock": CLOCKS[chosen.clock]}
        # A short run is told apart from its neighbours by little: one that judges is repeated.
        spent, times = 0.0, 0
        while times == 0 or (run.use == "judge" and times < JUDGED_TIMES and spent < JUDGED_S):
            done.append(measure(model, tokenizer, run, **limits))
            spent, times = spent + done[-1]["makespan_s"], times + 1
            console.note(f"{run.use:5s} {run.agents:5d} agents  {done[-1]['makespan_s']:8.2f} s")
    seconds = fit([step for run in done if run["use"] == "fit" for step in run["steps"]])
    judged = judge(done, seconds)
    console.say(console.table([(key, str(value)) for key, value in seconds.fields().items()]))
    for line in judged:
        console.say(
            f"{line['use']:5s} {line['agents']:5d} agents, {'copies' if line['copies'] else 'document'} of {line['document']}, "
            f"question of {line['question']}: "
            f"predicted {line['predicted_s']:.2f} s, measured {line['measured_s']:.2f} s, {100 * line['error']:+.1f} %"
        )
    worst = max(abs(line["error"]) for line in judged if line["use"] == "judge")
    console.say(f"largest error where it was not fitted: {100 * worst:.1f} % (aim: 10 %)")
    if chosen.steps is not None:
        content = {"machine": machine(device), "versions": versions(), "model": Path(name).name, "dtype": dtype}
        content |= {
            "clock": chosen.clock,
            "threads": torch.get_num_threads(),
            "inputs": inputs_of(model, seconds, done),
        }
        content |= {"seed": chosen.seed, "model_of_steps": seconds.fields(), "judged": judged, "runs": done}
        write(chosen.steps, content)


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """All policies that were chosen: inputs, versions, and a result for each."""
    inputs = _inputs(chosen)
    steps, beside = inputs.machine.steps(), None
    if chosen.steps is not None:
        steps, beside = read_steps(chosen.steps)
    started, results = time.monotonic(), []
    for policy in chosen.policies:
        with console.bar(policy) as progress:
            results.append(
                simulate(policy, inputs, steps, replicas=chosen.replicas, everything=chosen.whole, progress=progress)
            )
    return {
        "inputs": asdict(inputs) | {"replicas": chosen.replicas, "whole": chosen.whole},
        "model_of_steps": steps.fields(),
        "measured_on": beside and {key: beside.get(key) for key in ("machine", "model", "dtype")},
        "versions": versions(),
        "seconds": time.monotonic() - started,
        "results": results,
    }


def main(argv: Sequence[str] | None = None) -> int:
    try:
        chosen = parsed(argv)
        if chosen.measure:
            measured(chosen)
            return 0
        content = run(chosen)
    except KvkernError as error:
        console.note(console.error_text(error))
        return 1
    from rich.console import Console

    workload = content["inputs"]["workload"]
    Console(width=120).print(table(content["results"]))
    console.say(
        f"{workload['agents']:,.0f} agents; a step: {content['model_of_steps']['source']}; {content['seconds']:.1f} s"
    )
    if chosen.json is not None:
        write(chosen.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
