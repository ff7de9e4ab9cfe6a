"""bench/simulate.py: queues against closed forms, two simulators against each other, the scheduler against the engine's own."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model, tiny_tokenizer

from kvkern.errors import CapacityError, RequestError

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import simulate as sim
import step_model
from replica import POLICIES, Cache, Replica, Served, Trace, serve
from replica_exact import serve_exact
from step_model import StepModel, by_arithmetic, fit, nonnegative_least_squares
from workload import Inputs, Machine, Prices, Sampling, Source, Workload, parted

STEPS = StepModel(0.01, 1e-3, 5e-4, 1e-6, 1e-5, 2e-5)
SMALL = Inputs(
    Workload(agents=4000, period_s=400.0, documents=40, document_tokens=200, document_spread=0.5, answer_tokens=10),
    Machine(
        parameters=1e6,
        token_bytes=1e3,
        memory_bytes=5e6,
        reserve_bytes=0.0,
        host_bytes=3e6,
        host_bytes_per_s=4e6,
        disk_bytes_per_s=2e6,
        max_agents=8,
    ),
    Prices(),
    Sampling(groups=8, windows=20, sampled_agents=8000),
)
"""A replica of some agents a second, with caches that are too small."""


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def trace_of(rng: np.random.Generator, arrival: np.ndarray, *, documents: int = 1, longest: int = 1) -> Trace:
    """Random documents of 10 to 300 tokens; questions and answers up to `longest`."""
    count = len(arrival)
    lengths = rng.integers(10, 300, size=documents)
    sizes = rng.integers(1, longest + 1, size=(2, count))
    return Trace(arrival, rng.integers(documents, size=count), *sizes, lengths)


# -- one server against the formulas -----------------------------------------------------------------------------------


def one_server(seed: int, load: float, count: int, service: Callable[..., float]) -> tuple[Trace, Served]:
    """A step answers one agent: a queue of one server whose mean service is 1 s."""
    rng = rng_of(seed)
    trace = trace_of(rng, np.cumsum(rng.exponential(1 / load, count)))
    return trace, serve(Replica("shared", service, slots=1), trace, warm=[0])


def deterministic(seconds: float = 1.0) -> StepModel:
    return StepModel(seconds)


def load_of(trace: Trace, mean: float = 1.0) -> float:
    """As drawn: arrivals a second times the mean service that they were promised."""
    return len(trace.arrival) / trace.arrival[-1] * mean


def assert_waits(trace: Trace, served: Served, wanted: float) -> None:
    """Mean seconds before service, of agents whose own service is by their step."""
    service = served.busy_s / len(trace.arrival)
    wait = float((served.end - trace.arrival).mean()) - service
    assert wait == pytest.approx(wanted, rel=0.05), f"mean wait {wait:.4f} s, formula {wanted:.4f} s"


FORMULAS = [(0.5, 200_000), pytest.param(0.8, 3_000_000, marks=pytest.mark.full)]
"""Loads, and so many agents that 5 % are more than five standard deviations of the mean."""


@pytest.mark.parametrize(("load", "count"), FORMULAS)
def test_a_queue_of_exponential_services_is_that_of_m_m_1(seed, load, count):
    drawn = rng_of(seed + 1).exponential(1.0, count)
    services = iter(drawn.tolist())
    trace, served = one_server(seed, load, count, lambda *features: next(services))
    mean = float(drawn.mean())
    load = load_of(trace, mean)
    assert_waits(trace, served, load / (1 - load) * mean)


@pytest.mark.parametrize(("load", "count"), FORMULAS)
def test_a_queue_of_equal_services_is_that_of_m_d_1(seed, load, count):
    trace, served = one_server(seed, load, count // 2, deterministic())
    load = load_of(trace)
    wait = load / (2 * (1 - load))
    assert_waits(trace, served, wait)
    # Little's law, by two ways that do not meet: the integral over time, and what each agent found when it came.
    assert served.queue_seconds / served.end_s == pytest.approx(load * wait, rel=0.05)
    assert served.queued.mean() == pytest.approx(load * wait, rel=0.05)


def test_control_a_simulator_with_a_wrong_service_time_fails_the_formula(seed):
    trace, served = one_server(seed, 0.5, 20_000, deterministic(1.1))
    load = load_of(trace)
    with pytest.raises(AssertionError, match="mean wait"):
        assert_waits(trace, served, load / (2 * (1 - load)))


def test_capacity_of_one_server_is_its_rate(seed):
    source = Source(Workload(documents=1, question_tokens=1, answer_tokens=1, answer_spread=0), 0)
    sized = sim.size(source, Replica("shared", deterministic(0.02), slots=1), load=0.7, seed=seed % 1000)
    assert sized.capacity == pytest.approx(50, rel=0.25)  # six standard deviations of what one drawn trace gives


# -- what holds of every run -------------------------------------------------------------------------------------------


@st.composite
def cases(draw: Any) -> tuple[Replica, Trace]:
    """A replica with tight limits, and some agents."""
    rng = rng_of(draw(st.integers(0, 2**32 - 1)))
    arrival = np.cumsum(rng.exponential(1 / draw(st.sampled_from([1, 10, 100])), draw(st.integers(1, 40))))
    trace = trace_of(rng, arrival, documents=draw(st.integers(1, 6)), longest=draw(st.sampled_from([1, 30])))
    return Replica(
        draw(st.sampled_from(POLICIES)),
        STEPS,
        slots=draw(st.integers(1, 8)),
        max_extend=40,
        chunk=draw(st.integers(1, 40)),
        token_bytes=10.0,
        device_bytes=draw(st.sampled_from([3000.0, 6000.0, math.inf])),
        host_bytes=draw(st.sampled_from([0.0, 4000.0, math.inf])),
        host_bytes_per_s=20_000.0,
        disk_bytes_per_s=5_000.0,
    ), trace


@given(cases())
@settings(max_examples=30, deadline=None)
def test_the_loop_and_the_processes_of_simpy_agree_on_every_agent(case):
    replica, trace = case
    served = serve(replica, trace)
    first, end, loads = serve_exact(replica, trace)
    np.testing.assert_allclose(served.first, first, rtol=1e-9)
    np.testing.assert_allclose(served.end, end, rtol=1e-9)
    assert served.loads == loads


def test_control_the_processes_see_another_chunk(seed):
    rng = rng_of(seed)
    trace = trace_of(rng, np.cumsum(rng.exponential(0.01, 30)), documents=3, longest=30)
    replica = Replica("prefill", STEPS, slots=4, max_extend=40, chunk=40)
    first, _, _ = serve_exact(replace(replica, chunk=39), trace)
    assert not np.allclose(serve(replica, trace).first, first, rtol=1e-9)


@given(cases(), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_every_agent_is_served_once_or_still_there(case, share):
    replica, trace = case
    count, whole = len(trace.arrival), serve(replica, trace)
    assert (trace.arrival < whole.first).all() and (whole.first <= whole.end).all()
    # A decode row for every token but the first, and the seconds that agents were there are those until their answers.
    assert whole.step_rows.sum() == (trace.answer - 1).sum()
    assert whole.agent_seconds == pytest.approx((whole.end - trace.arrival).sum())
    # The queue holds an agent until its first step, which ends no later than its first token.
    assert whole.queue_seconds <= (whole.first - trace.arrival).sum() * (1 + 1e-9)
    assert whole.busy_s <= whole.end_s * (1 + 1e-9)

    cut = serve(replica, trace, until=share * whole.end_s)
    done = np.isfinite(cut.end)
    assert np.array_equal(cut.end[done], whole.end[done])
    assert (whole.end[~done] >= share * whole.end_s * (1 - 1e-9)).all() and done.sum() + (~done).sum() == count


def test_a_cache_without_end_misses_each_document_once(seed):
    rng = rng_of(seed)
    trace = trace_of(rng, np.cumsum(rng.exponential(0.01, 3000)), documents=400, longest=3)
    served = serve(Replica("shared", STEPS, max_extend=64, disk_bytes_per_s=1e6), trace)
    assert served.loads == served.disk_loads == len(np.unique(trace.document))
    # One that is there already is not loaded at all.
    assert serve(Replica("shared", STEPS, max_extend=64), trace, warm=range(400)).loads == 0
    copied = serve(Replica("copies", STEPS, max_extend=64, disk_bytes_per_s=1e6), trace)
    assert copied.loads == 3000 and copied.disk_loads == len(np.unique(trace.document))


@given(
    st.integers(0, 30),
    st.lists(st.tuples(st.integers(0, 7), st.sets(st.integers(0, 7), max_size=3)), max_size=60),
)
@settings(max_examples=60, deadline=None)
def test_the_cache_is_a_naive_lru_by_bytes(capacity, reads):
    cache, naive = Cache(capacity), []
    sizes = [1, 2, 3, 5, 8, 13, 21, 34]
    for document, held in reads:
        there = document in naive
        assert cache.touch(document) == there
        if there:
            naive.remove(document)
            naive.append(document)
            continue
        after = list(naive)
        while sum(sizes[d] for d in after) + sizes[document] > capacity and any(d not in held for d in after):
            after.remove(next(d for d in after if d not in held))
        fits = sum(sizes[d] for d in after) + sizes[document] <= capacity
        assert cache.put(document, sizes[document], held) == fits
        naive = [*after, document] if fits else naive
        assert list(cache) == naive and cache.used == sum(sizes[d] for d in naive) <= capacity


def test_the_past_of_a_window_is_the_order_of_last_reads(seed):
    """Against reads that are drawn one by one: how often each document is among the two last ones."""
    source, rng, rounds = Source(Workload(documents=5, zipf=1.0), 0), rng_of(seed), 4000
    drawn, read = np.zeros(5), np.zeros(5)
    for _ in range(rounds):
        drawn[source.past(rng, math.inf)[-2:]] += 1
        reads = source.documents(rng, 60)[::-1]
        _, places = np.unique(reads, return_index=True)
        read[reads[np.sort(places)[:2]]] += 1
    # Five standard deviations of the difference of two frequencies.
    assert np.abs(drawn - read).max() < 5 * math.sqrt(rounds / 2)


# -- arrivals ----------------------------------------------------------------------------------------------------------


def chi_square(counts: np.ndarray, wanted: np.ndarray) -> float:
    """Deviations from the mean of a chi-square of so many counts, in its standard deviations."""
    return float((((counts - wanted) ** 2 / wanted).sum() - len(counts)) / math.sqrt(2 * len(counts)))


def test_arrivals_follow_the_wave_and_a_constant_rate_does_not(seed):
    workload, rng = Workload(agents=2e6, period_s=1000.0, wave=0.6), rng_of(seed)
    arrival = Source(workload, 0).poisson(rng, 0.0, 1000.0, 20)
    counts, edges = np.histogram(arrival, bins=50, range=(0, 1000))
    times = (edges[:-1, None] + np.linspace(0.01, 19.99, 200)).mean(axis=1)
    assert (np.diff(arrival) >= 0).all()
    assert chi_square(counts, workload.rate(times) / 20 * 20) < 6
    assert workload.rate(np.array([500.0]))[0] == pytest.approx(workload.peak)
    flat = Source(replace(workload, wave=0.0), 0).poisson(rng, 0.0, 1000.0, 20)
    counts, _ = np.histogram(flat, bins=50, range=(0, 1000))
    assert chi_square(counts, workload.rate(times) / 20 * 20) > 100


def test_documents_are_asked_by_their_popularity_in_every_pool(seed):
    workload, rng, count = Workload(documents=30, zipf=1.1), rng_of(seed), 50_000
    popularity, shares = workload.popularity(), []
    pools = parted(popularity, 3)
    for pool in range(3):
        source = Source(workload, 0, pool=pool, pools=3)
        counts = np.bincount(source.documents(rng, count), minlength=30)
        mine = pools == pool
        assert counts[~mine].sum() == 0 and set(source.past(rng, math.inf)) == set(np.flatnonzero(mine))
        assert chi_square(counts[mine], count * popularity[mine] / popularity[mine].sum()) < 10
        shares.append(source.share)
    assert sum(shares) == pytest.approx(1) and max(shares) < 0.4


# -- the sample and the whole ------------------------------------------------------------------------------------------


APART = {
    "first_mean_s": 0.15,
    "answer_mean_s": 0.15,
    "answer_p50_s": 0.15,
    "queue_mean": 0.5,
    "hit_rate": 0.05,
    "disk_share": 0.2,
    "utilisation": 0.12,
}
"""How far two draws of SMALL may be apart, of the value: five standard deviations of such differences, or more."""


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What is too far apart."""
    pairs = {name: (a["estimates"][name]["value"], b["estimates"][name]["value"]) for name in APART}
    return [name for name, (one, other) in pairs.items() if not abs(one - other) <= APART[name] * abs(other)]


@pytest.mark.parametrize("pools", [2, pytest.param(1, marks=pytest.mark.full)])
def test_the_sample_says_what_the_whole_says(seed, pools):
    small = replace(SMALL, sampling=replace(SMALL.sampling, seed=seed), machine=replace(SMALL.machine, pools=pools))
    sampled = sim.simulate("shared", small, STEPS, replicas=2)
    whole = sim.simulate("shared", small, STEPS, replicas=2, everything=True)
    assert whole["agents_simulated"] == pytest.approx(4000, abs=400)
    assert whole["estimates"]["first_mean_s"]["error"] is None
    assert differences(sampled, whole) == []
    # Control: of a rate twice as high the same check says so.
    busier = replace(small, workload=replace(small.workload, agents=8000))
    assert "utilisation" in differences(sampled, sim.simulate("shared", busier, STEPS, replicas=2, everything=True))


def test_the_error_that_is_stated_is_that_of_the_mean(seed):
    """Of two pools with other means: that they differ is no error, since both are sampled."""
    rng, stated, means = rng_of(seed), [], []
    for _ in range(60):
        windows = []
        for group in range(8):
            first = rng.exponential(1.0, 50) + group % 2
            windows.append(sim.Window(group, first, first, np.zeros(50), 0, 0.0, 0.0, 0.0))
        found = sim.estimate(windows, pools=2)["first_mean_s"]
        stated.append(found["error"])
        means.append(found["value"])
    true = 1 / math.sqrt(400)
    assert np.sqrt(np.mean(np.square(stated))) == pytest.approx(true, rel=0.25)
    assert np.mean(means) == pytest.approx(1.5, abs=5 * true / math.sqrt(60))
    # Control: by the spread of all groups it would be several times as large.
    apart = sim.estimate(windows, pools=1)["first_mean_s"]["error"]
    assert apart > 2 * true


def test_a_seed_gives_the_same_again_and_another_gives_another():
    def run(seed: int) -> dict[str, Any]:
        sampling = replace(SMALL.sampling, seed=seed, groups=2, windows=2, sampled_agents=400)
        return sim.simulate("prefill", replace(SMALL, sampling=sampling), STEPS)

    assert run(1) == run(1)
    assert run(1)["estimates"] != run(2)["estimates"]


# -- dollars -----------------------------------------------------------------------------------------------------------


def test_dollars_are_hours_and_bytes_times_their_prices():
    few = replace(SMALL, sampling=replace(SMALL.sampling, sampled_agents=500, windows=4))
    kept = {p: sim.simulate(p, few, STEPS, replicas=None if p == "ship" else 6) for p in ("shared", "prefill", "ship")}
    workload, prices = SMALL.workload, SMALL.prices
    lengths = workload.lengths(SMALL.sampling.seed)
    a_read = float((workload.popularity() * lengths).sum()) * 1e3
    for policy, found in kept.items():
        hours = 0 if policy == "ship" else 6 * workload.period_s / 3600
        assert found["gpu_hours"] == pytest.approx(hours + found["publish_gpu_hours"])
        assert found["dollars"]["gpu"] == pytest.approx(found["gpu_hours"] * prices.gpu_hour)
    assert kept["ship"]["egress_bytes"] == pytest.approx(4000 * a_read)
    assert kept["ship"]["dollars"]["egress"] == pytest.approx(4000 * a_read / 1e9 * 0.09)
    assert kept["prefill"]["publish_gpu_hours"] == kept["prefill"]["dollars"]["storage"] == 0
    published = sum(STEPS.prefill_seconds(int(tokens), 2048) for tokens in lengths)
    assert kept["shared"]["publish_gpu_hours"] == pytest.approx(published / 3600, rel=0.01)
    # No user waits for another: the seconds are those of the bytes.
    assert kept["ship"]["estimates"]["first_mean_s"]["value"] == pytest.approx(a_read / 12.5e6 + 0.296, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "change", "part", "factor"),
    [
        ("prices", {"gpu_hour": 6.0}, "gpu", 2),
        ("prices", {"egress_gb": 0.18}, "egress", 2),
        ("prices", {"storage_gb_month": 0.046}, "storage", 2),
        ("workload", {"agents": 8000}, "egress", 2),
        ("machine", {"token_bytes": 2e3}, "egress", 2),
    ],
)
def test_a_price_changes_its_own_part_by_its_own_factor(kind, change, part, factor):
    before = sim.simulate("ship", SMALL, STEPS)["dollars"]
    changed = replace(SMALL, **{kind: replace(getattr(SMALL, kind), **change)})
    after = sim.simulate("ship", changed, STEPS)["dollars"]
    assert after[part] == pytest.approx(factor * before[part]) and after["total"] != before["total"]


def test_a_document_prefilled_is_the_sum_of_its_chunks():
    model = StepModel(1.0, decode=100.0, extend=0.1, row_tokens=0.01, suffix_tokens=0.001)
    # 5 rows, then 5 after 5, then 2 after 10.
    assert model.prefill_seconds(12, 5) == pytest.approx(3 + 1.2 + 0.01 * (25 + 20) + 0.001 * (5 + 10 + 12))


# -- the model of steps ------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_least_squares_without_negative_weights_meets_its_conditions(seed, columns):
    rng = rng_of(seed)
    design, wanted = rng.normal(size=(20, columns)), rng.normal(size=20)
    x = nonnegative_least_squares(design, wanted)
    slope = design.T @ (design @ x - wanted)
    assert (x >= 0).all() and (slope[x == 0] >= -1e-6).all() and np.abs(slope[x > 0]).max(initial=0) < 1e-6


def samples_of(model: StepModel, seed: int, count: int = 200) -> list[dict[str, float]]:
    rng, samples = rng_of(seed), []
    for _ in range(count):
        decode, extend, prefix, own = (int(rng.integers(1, top)) for top in (500, 256, 4000, 9000))
        rows = decode + extend
        sample = {"rows": rows, "extend_rows": extend, "prefix": prefix, "suffix_tokens": own}
        samples.append(sample | {"seconds": model(decode, extend, rows * prefix, prefix, own)})
    return samples


def test_a_fit_finds_the_weights_that_made_the_samples(seed):
    found = fit(samples_of(STEPS, seed))
    for name in ("constant", *step_model.FEATURES):
        assert getattr(found, name) == pytest.approx(getattr(STEPS, name), rel=1e-4), name
    # Where a weight would be below zero it is zero.
    assert fit(samples_of(replace(STEPS, suffix_tokens=-1e-7), seed)).suffix_tokens == 0


def test_a_fit_to_steps_with_outliers_keeps_their_sum(seed):
    rng = rng_of(seed)
    # Mean 1; one in ten is three times as slow as the others.
    slow = np.where(rng.random(4000) < 0.1, 3.0, 1.0) / 1.2
    samples = [s | {"seconds": s["seconds"] * f} for s, f in zip(samples_of(STEPS, seed, 4000), slow, strict=True)]
    model = fit(samples)
    predicted = sum(model(*step_model._features(i, sample)) for i, sample in enumerate(samples))
    assert predicted == pytest.approx(sum(sample["seconds"] for sample in samples), rel=0.02)


def test_samples_that_cannot_be_fitted_are_refused(seed):
    samples = samples_of(STEPS, seed, 10)
    with pytest.raises(RequestError, match=r"^samples: found 3, needed at least 6"):
        fit(samples[:3])
    with pytest.raises(RequestError, match=r"^samples\[4\]: found no prefix"):
        fit([*samples[:4], {k: v for k, v in samples[4].items() if k != "prefix"}, *samples[5:]])
    for bad in ({"seconds": 0.0}, {"seconds": math.nan}, {"rows": -1}):
        with pytest.raises(RequestError, match=r"^samples: found a negative"):
            fit([*samples, samples[0] | bad])


def test_a_step_by_arithmetic_is_bytes_and_products_over_what_is_reached():
    machine = Machine()
    model = machine.steps()
    assert model.constant == pytest.approx(8.04e9 / 3.35e12 / 0.5)
    assert model(2, 3, 0, 0, 0) - model.constant == pytest.approx(5 * 2 * 4.02e9 / 989e12 / 0.5)
    assert model.suffix_tokens == model.prefix_tokens == pytest.approx(147456 / 3.35e12 / 0.5)
    assert "not measured" in model.source
    with pytest.raises(RequestError, match=r"^efficiency: found 0"):
        by_arithmetic(
            parameters=1,
            weights_bytes=1,
            token_bytes=1,
            attention_flop=1,
            flop_per_s=1,
            bytes_per_s=1,
            efficiency=0,
        )


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(("agents", "max_extend", "question"), [(9, 40, 16), (5, 70, 130), (4, 8, 1)])
def test_the_simulator_takes_the_steps_that_the_engine_takes(agents, max_extend, question, copies):
    planned = step_model.Run("judge", agents, document=100, question=question, answer=5, copies=copies)
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))  # which must end no answer
    found = step_model.measure(model, tiny_tokenizer(), planned, max_extend_tokens=max_extend)
    seen: list[tuple[float, ...]] = []

    def seconds(*features: float) -> float:
        seen.append(features)
        return 1.0

    predicted = sim.makespan(found, seconds)
    wanted = [(*step_model._features(0, sample),) for sample in found["steps"]]
    assert seen == wanted and predicted == len(wanted) and found["preemptions"] == 0
    assert sum(sample["rows"] for sample in found["steps"]) == agents * (question + 5 - 1)


def test_a_makespan_is_judged_by_its_relative_error():
    run = {"use": "judge", "agents": 4, "document": 10, "question": 2, "answer": 3, "copies": False}
    run |= {"slots": 4, "max_extend": 64, "chunk": 64, "makespan_s": 2.0}
    # Three steps: questions of all, then two tokens each.
    (judged,) = sim.judge([run], StepModel(1.0))
    assert judged["predicted_s"] == pytest.approx(3.0) and judged["error"] == pytest.approx(0.5)
    # Of a run that was repeated the median counts, and another size is another line.
    again = [run | {"makespan_s": seconds} for seconds in (2.5, 30.0)]
    first, second = sim.judge([run, *again, run | {"agents": 2}], StepModel(1.0))
    assert first["measured_s"] == 2.5 and first["error"] == pytest.approx(0.2) and first["runs"] == 3
    assert second["agents"] == 2 and second["runs"] == 1


# -- the command -------------------------------------------------------------------------------------------------------

TINY = ["--agents", "3000", "--period-s", "3600", "--documents", "5", "--sampled-agents", "300", "--windows", "3"]
TINY += ["--max-agents", "8"]


def test_the_command_writes_inputs_versions_and_results(tmp_path, capsys):
    path, steps = tmp_path / "out.json", tmp_path / "steps.json"
    steps.write_text(
        json.dumps({"model_of_steps": STEPS.fields() | {"source": "a test"}, "model": "tiny", "machine": {}})
    )
    assert sim.main([*TINY, "--groups", "2", "--steps", str(steps), "--json", str(path)]) == 0
    out, content = capsys.readouterr().out, json.loads(path.read_text())
    assert [r["policy"] for r in content["results"]] == ["prefill", "copies", "shared", "ship"]
    assert content["inputs"]["sampling"]["seed"] == 0 and content["inputs"]["workload"]["agents"] == 3000
    assert (
        content["measured_on"] == {"machine": {}, "model": "tiny", "dtype": None}
        and {"kvkern", "numpy"} <= content["versions"].keys()
    )
    assert "time to first token, p99, s" in out and "3,000 agents; a step: a test" in out
    assert "queue_mean" not in content["results"][3]["estimates"] and "hit_rate" in content["results"][2]["estimates"]
    for result in content["results"]:
        assert result["estimates"]["answer_p99_s"]["value"] >= result["estimates"]["answer_p50_s"]["value"] > 0


def test_a_period_in_which_nobody_comes_is_written_without_nan(tmp_path, capsys):
    path = tmp_path / "out.json"
    argv = [*TINY, "--agents", "1e-6", "--whole", "--policies", "shared", "--json", str(path)]
    assert sim.main(argv) == 0 and "NaN" not in path.read_text()
    (result,) = json.loads(path.read_text())["results"]
    assert result["estimates"]["first_p99_s"] == {"value": None, "error": None} and result["replicas"] == 1


def test_measure_fits_judges_and_writes_what_simulate_reads(tmp_path, capsys):
    folder, path = tmp_path / "model", tmp_path / "steps.json"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    argv = ["--measure", "--model", str(folder), "--steps", str(path), "--clock", "cpu", "--measure-answer", "3"]
    argv += ["--fit-agents", "2", "4", "--judge-agents", "3", "--measure-document", "70", "--dtype", "float32"]
    assert sim.main(argv) == 0
    out, content = capsys.readouterr().out, json.loads(path.read_text())
    assert "predicted" in out and "largest error where it was not fitted" in out
    used = [step for run in content["runs"] if run["use"] == "fit" for step in run["steps"]]
    assert content["model_of_steps"]["source"] == f"fitted to {len(used)} measured steps"
    assert [line["agents"] for line in content["judged"] if line["use"] == "judge"] == [3]
    model, _ = sim.read_steps(path)
    assert model == fit(used) and content["clock"] == "cpu" and content["dtype"] == "float32"
    # A replica is that machine, as far as no option says otherwise.
    geometry, inputs = tiny_model().config, content["inputs"]
    assert (
        inputs["token_bytes"] == 4 * 2 * geometry.num_hidden_layers * geometry.num_key_value_heads * geometry.head_dim
    )
    assert inputs["weight_bytes"] == 4 and inputs["host_bytes"] == 0 and inputs["memory_bytes"] > 1e9
    step = model(1, 0, 3774, 3774, 16 + 64)
    assert inputs["user_step_s"] == pytest.approx(step)
    chosen = sim._inputs(sim.parsed(["--steps", str(path), "--gpu-hour", "7", "--agents", "90"]))
    assert asdict(chosen.machine) == asdict(Machine()) | {k: inputs[k] for k in inputs if hasattr(Machine(), k)}
    assert chosen.prices == Prices(gpu_hour=7.0, user_step_s=inputs["user_step_s"]) and chosen.workload.agents == 90
    # A file is measured anew whatever it holds.
    assert sim.parsed(["--measure", "--steps", str(path)]).gpu_hour == Prices().gpu_hour


@pytest.mark.parametrize("inputs", [{"agents": 3}, {"gpu_hour": "3"}, {"gpu_hour": True}, [1], {"model": 1}])
def test_a_file_of_steps_sets_a_machine_and_prices_and_nothing_else(tmp_path, capsys, inputs):
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"model_of_steps": STEPS.fields(), "inputs": inputs}))
    assert sim.main([*TINY, "--policies", "shared", "--steps", str(path)]) == 1
    assert "Error: steps: found " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--agents", "0"], "agents"),
        (["--wave", "1"], "wave"),
        (["--load", "1"], "load"),
        (["--groups", "1"], "groups"),
        (["--memory-bytes", "1e9"], "memory_bytes"),
        (["--pools", "6"], "groups"),
        (["--pools", "2", "--groups", "2"], "groups"),
        (["--pools", "3", "--groups", "6", "--replicas", "4"], "replicas"),
        (["--agents", "1e7", "--replicas", "1"], "replicas"),
        (["--steps", "/nowhere.json"], "steps"),
    ],
)
def test_a_wrong_input_is_refused_by_its_name(capsys, argv, named):
    assert sim.main([*TINY, "--policies", "shared", *argv]) == 1
    refused = capsys.readouterr().err
    assert f"Error: {named}: found " in refused and "do: " in refused


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"slots": 0}, "slots"),
        ({"chunk": 300}, "chunk"),
        ({"policy": "none"}, "policy"),
        ({"device_bytes": 5.0}, "device_bytes"),
    ],
)
def test_a_replica_refuses_limits_by_their_names(change, named):
    trace = Trace(*(np.array([1]) for _ in range(4)), np.array([10]))._replace(document=np.array([0]))
    with pytest.raises((RequestError, CapacityError), match=f"^{named}: "):
        serve(replace(Replica("shared", STEPS), **change), trace)


@pytest.mark.parametrize("field", ["arrival", "document", "question", "answer"])
def test_a_trace_refuses_what_is_out_of_range(field):
    arrays = {"arrival": [0.0, 1.0], "document": [0, 0], "question": [1, 1], "answer": [1, 1], "document_tokens": [10]}
    arrays[field] = {"arrival": [1.0, 0.0], "document": [0, 1]}.get(field, [0, 1])
    trace = Trace(**{name: np.array(values) for name, values in arrays.items()})
    with pytest.raises(RequestError, match=rf"^trace\.{field}: "):
        serve(Replica("shared", STEPS), trace)
