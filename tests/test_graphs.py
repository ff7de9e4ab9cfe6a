"""Decode steps that are replayed: the same tokens and logits, whoever comes and goes; nothing outlives its plan; no request fails.

There is no graph without a GPU: a stand-in records the call, and its replay calls again and writes into the same output.
`test_gpu.py` has the real one.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from models import QUESTIONS, TEXT, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kvkern
from kvkern import engine as module
from kvkern import graphs
from kvkern.engine import Engine
from kvkern.errors import BackendError, DeviceError
from kvkern.geometry import PAGE
from kvkern.graphs import CudaCapture, PlanForward, StepGraph, capture_on
from kvkern.identity import model_geometry
from kvkern.linear import RoundingClass


class StandIn:
    """A capture where there is no device. Its output is NaN until it is replayed, and `fails` may keep it from capturing.

    replays   weak references to the replays that were given out
    replayed  how many ran
    """

    def __init__(self, fails: Callable[[int], None] = lambda capture: None) -> None:
        self.fails = fails
        self.replays: list[weakref.ref[Any]] = []
        self.replayed = 0

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.fails(len(self.replays))
        output = torch.full_like(call(), float("nan"))

        def replay() -> None:
            self.replayed += 1
            output.copy_(call())

        self.replays.append(weakref.ref(replay))
        return output, replay

    @property
    def alive(self) -> int:
        return sum(replay() is not None for replay in self.replays)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def doc(model: Any, tokenizer: Any) -> Iterator[kvkern.Document]:
    with kvkern.publish(model, tokenizer, TEXT) as doc:
        yield doc


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn()
    monkeypatch.setattr(module, "capture_on", lambda device, backend: found)
    return found


def made(model: Any, tokenizer: Any, *, pages: int = 64, **options: Any) -> tuple[Engine, list[Tensor]]:
    """An engine, and the logits of all its forwards."""
    memory_bytes = pages * PAGE * model_geometry(model).token_bytes()
    engine = Engine(model, tokenizer, memory_bytes=memory_bytes, debug=True, **options)
    run, logits = engine.graphs.run, []

    def kept(*args: Any, **kwargs: Any) -> Tensor:
        found = run(*args, **kwargs)
        logits.append(found.clone())
        return found

    engine.graphs.run = kept  # type: ignore[method-assign]
    return engine, logits


def submit(engine: Engine, doc: kvkern.Document, *questions: str, new: int = 8) -> list[Any]:
    return [engine.submit(doc, question, max_new_tokens=new, eos_token_id=[]) for question in questions]


def finish(engine: Engine, requests: list[Any]) -> list[tuple[str, tuple[int, ...]]]:
    while engine.scheduler.unfinished:
        engine.step()
    return [(request.answer.finish_reason, request.answer.token_ids) for request in requests]


def come_and_go(engine: Engine, doc: kvkern.Document, after: Callable[[], None] = lambda: None) -> Any:
    """Agents that join, end, are cancelled, and lose their pages to others."""
    requests = submit(engine, doc, *QUESTIONS[:3], new=24)
    requests += submit(engine, doc, QUESTIONS[4], new=9)
    for step in range(16):
        if step == 6:
            requests += submit(engine, doc, QUESTIONS[6], QUESTIONS[7], new=20)
        if step == 12:
            engine.cancel(requests[1])
        engine.step()
        after()
    return finish(engine, requests), sum(request.suffix.preemptions for request in requests)


# -- the same answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("invariant", [True, False])
def test_tokens_and_logits_have_the_same_bits_with_graphs(model, tokenizer, doc, stand_in, invariant):
    plain, expected = made(model, tokenizer, pages=11, invariant=invariant)
    engine, logits = made(model, tokenizer, pages=11, invariant=invariant, graphs=True)
    answers, preemptions = come_and_go(plain, doc)
    assert come_and_go(engine, doc) == (answers, preemptions) and preemptions
    assert {reason for reason, _ in answers} == {"length", "cancelled"}
    for step, (one, other) in enumerate(zip(expected, logits, strict=True)):
        assert_same_bits(other, one, f"logits of forward {step}")
    assert len(stand_in.replays) > 3 and stand_in.replayed > 12
    assert (engine.describe()["graphs"], engine.describe()["graphs_why"]) == (True, "wanted")


def test_a_step_of_several_forwards_has_a_graph_for_each(model, tokenizer, doc, stand_in, monkeypatch):
    measured = module.measure(model)
    only = RoundingClass((4,), {8: "for this test"})
    monkeypatch.setattr(module, "measure", lambda _: type(measured)(**{**vars(measured), "layers": only, "head": only}))
    (plain, _), (engine, _) = made(model, tokenizer), made(model, tokenizer, graphs=True)
    # As long questions, so that all begin to decode in one step.
    questions = ["Why?", "Who?", "How?", "Now?", "And?", "Yes?"]
    expected = finish(plain, submit(plain, doc, *questions))
    requests = submit(engine, doc, *questions)
    alive = 0
    while engine.scheduler.unfinished:
        engine.step()
        alive = max(alive, stand_in.alive)
    assert finish(engine, requests) == expected and alive == 2


def test_a_document_released_under_a_graph_stays_for_it(model, tokenizer, doc, stand_in):
    plain, _ = made(model, tokenizer)
    expected = finish(plain, submit(plain, doc, *QUESTIONS[:2]))
    lost = kvkern.publish(model, tokenizer, TEXT)
    engine, _ = made(model, tokenizer, graphs=True)
    requests = submit(engine, lost, *QUESTIONS[:2])
    while not stand_in.replayed:
        engine.step()
    block = weakref.ref(lost.block().untyped_storage())
    while not lost.released:
        lost.release()
    assert finish(engine, requests) == expected and not stand_in.alive
    gc.collect()
    assert block() is None


def test_weights_that_are_exchanged_under_a_graph_stay_for_it(tokenizer, stand_in):
    model = tiny_model()
    with kvkern.publish(model, tokenizer, TEXT) as doc:
        engine, _ = made(model, tokenizer, graphs=True)
        requests = submit(engine, doc, *QUESTIONS[:2])
        while not stand_in.replayed:
            engine.step()
        (graph,) = [planned.graph for planned in engine._plans.values()]
        weight = model.model.layers[0].self_attn.q_norm.weight
        before = weight.data_ptr()
        weight.data = weight.data.clone()
        assert weight.data_ptr() != before
        assert graph is not None and before in {held.data_ptr() for held in graph.weights}
        finish(engine, requests)


@pytest.mark.parametrize("stale", [0, 1], ids=["ids", "positions"])
def test_control_an_input_that_is_not_filled_again_is_caught(model, tokenizer, doc, stand_in, monkeypatch, stale):
    def run(self: StepGraph, inputs: Any) -> Tensor:
        for n, (own, given) in enumerate(zip(self.inputs, inputs, strict=True)):
            if n != stale:
                own.copy_(given)
        self._replay()
        return self.logits

    monkeypatch.setattr(StepGraph, "run", run)
    (plain, expected), (engine, logits) = made(model, tokenizer), made(model, tokenizer, graphs=True)
    for one in (plain, engine):
        finish(one, submit(one, doc, *QUESTIONS[:2]))
    assert len(logits) == len(expected)
    with pytest.raises(AssertionError, match="differ"):
        for step, (one, other) in enumerate(zip(expected, logits, strict=True)):
            assert_same_bits(other, one, f"logits of forward {step}")


# -- what is captured, and how long it lives -----------------------------------------------------------------------------


def test_a_plans_second_decode_step_is_captured_and_extends_never(model, tokenizer, doc, stand_in):
    engine, _ = made(model, tokenizer, graphs=True, max_extend_tokens=4)
    submit(engine, doc, "Why is that so?", new=5)
    counts = []
    while engine.scheduler.unfinished:
        (sequence,) = engine.scheduler.running or engine.scheduler.waiting
        extend = sequence.remaining > 1
        engine.step()
        counts.append((extend, len(stand_in.replays), stand_in.replayed))
    extends = sum(extend for extend, *_ in counts)
    assert extends > 1 and counts[:extends] == [(True, 0, 0)] * extends
    assert counts[extends:] == [(False, 0, 0), (False, 1, 1), (False, 1, 2), (False, 1, 3)]


def test_the_last_row_of_a_cut_is_no_decode_row(model, tokenizer, doc, stand_in):
    """Chunks of one token bring the same rows as decode steps, on the same plan, and want no logits."""
    (plain, _), (engine, _) = (made(model, tokenizer, max_extend_tokens=1, graphs=g) for g in (False, True))
    expected = finish(plain, submit(plain, doc, "Why so?", new=4))
    requests = submit(engine, doc, "Why so?", new=4)
    while requests[0].suffix.remaining > 1 or not requests[0].suffix.computed:
        engine.step()
        assert not stand_in.replays
    assert finish(engine, requests) == expected and stand_in.replayed


def test_no_graph_outlives_its_plan(model, tokenizer, doc, stand_in):
    engine, _ = made(model, tokenizer, pages=11, graphs=True)

    def after() -> None:
        planned = list(engine._plans.values())
        assert stand_in.alive == sum(p.graph is not None for p in planned) <= len(planned) <= 1

    come_and_go(engine, doc, after)
    assert len(stand_in.replays) > 3 and not stand_in.alive and not engine._plans


def test_an_engine_with_graphs_dies_with_its_last_reference(model, tokenizer, doc, stand_in):
    engine, _ = made(model, tokenizer, graphs=True)
    del engine.graphs.run  # the wrapper of this test
    requests = submit(engine, doc, *QUESTIONS[:2], new=30)
    while not stand_in.replayed:
        engine.step()
    for request in requests:
        assert request.answer is None
    weak = weakref.ref(engine)
    del engine
    assert weak() is None and not stand_in.alive
    for _ in requests:
        doc.release()


# -- what goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 2])
def test_a_capture_that_fails_is_the_last_and_no_request_sees_it(model, tokenizer, doc, stand_in, which):
    captures = []

    def fails(capture: int) -> None:
        captures.append(capture)
        if capture == which:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    stand_in.fails = fails
    (plain, _), (engine, _) = made(model, tokenizer), made(model, tokenizer, graphs=True)
    assert come_and_go(engine, doc) == come_and_go(plain, doc)
    assert captures == list(range(which + 1))
    assert engine.describe()["graphs"] is False
    assert engine.describe()["graphs_why"] == (
        "a capture failed: RuntimeError: operation not permitted when stream is capturing"
    )


def test_another_error_in_a_capture_is_one_of_the_step(model, tokenizer, doc, stand_in):
    def fails(capture: int) -> None:
        if capture == 0 and not raised:
            raised.append(True)
            raise KeyboardInterrupt

    raised: list[bool] = []
    stand_in.fails = fails
    (plain, _), (engine, _) = made(model, tokenizer), made(model, tokenizer, graphs=True)
    expected = finish(plain, submit(plain, doc, *QUESTIONS[:3]))
    requests = submit(engine, doc, *QUESTIONS[:3])
    with pytest.raises(KeyboardInterrupt):
        finish(engine, requests)
    assert finish(engine, requests) == expected
    assert engine.describe()["graphs"] is True and stand_in.replayed


def test_graphs_are_refused_where_there_are_none_and_off_by_default(model, tokenizer):
    with pytest.raises(DeviceError, match="graphs: found True on cpu, needed a CUDA device"):
        Engine(model, tokenizer, graphs=True)
    with pytest.raises(BackendError, match="graphs: found True with the torch backend"):
        capture_on(torch.device("cuda"), "torch")
    assert isinstance(capture_on(torch.device("cuda"), "triton"), CudaCapture)
    said = Engine(model, tokenizer).describe()
    assert (said["graphs"], said["graphs_why"]) == (False, "not wanted")


class Asked(AssertionError):
    pass


class AsksNothing(TorchDispatchMode):
    """Raises where the host waits for what a device has computed, which a capture forbids."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in {"_local_scalar_dense", "nonzero", "equal", "unique2", "masked_select"}:
            raise Asked(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
def test_a_models_forward_asks_the_device_nothing(model, tokenizer, doc, fused):
    engine, _ = made(model, tokenizer, fused=fused)
    rows = _asking_nothing(engine)
    assert [reason for reason, _ in finish(engine, submit(engine, doc, *QUESTIONS[:2], new=4))] == ["length"] * 2
    assert len(rows) >= 4


def test_control_a_rope_that_follows_the_longest_position_is_caught(tokenizer):
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model(rope_parameters=scaled)
    with kvkern.publish(model, tokenizer, TEXT) as doc:
        engine, _ = made(model, tokenizer)
        _asking_nothing(engine)
        requests = submit(engine, doc, "Why?")
        with pytest.raises(Asked):
            engine.step()
        engine.cancel(requests[0])


def _asking_nothing(engine: Engine) -> list[int]:
    """Let the engine's forwards run under AsksNothing; the rows of those that did."""
    plan, rows = engine._plan, []

    def watched(*args: Any) -> PlanForward:
        planned = plan(*args)
        forward = planned.forward

        def run(*inputs: Tensor) -> Tensor:
            rows.append(planned.plan.rows)
            with AsksNothing():
                return forward(*inputs)

        planned.forward = run
        return planned

    engine._plan = watched  # type: ignore[method-assign]
    return rows


# -- the benchmark -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "bench"))
    argv = [
        "bench_engine",
        "--tiny",
        "--device",
        "cpu",
        "--samples",
        "3",
        "--agents",
        "2",
        "--documents",
        "40",
        "--graphs",
        "--out",
    ]
    monkeypatch.setattr(sys, "argv", [*argv, str(tmp_path)])
    with torch.random.fork_rng():
        script = importlib.import_module("bench_engine")

        def run() -> dict[str, Any]:
            script.main()
            found: dict[str, Any] = json.loads((tmp_path / "engine.json").read_text())
            return found

        yield run
    for name in ("bench_engine", "harness"):
        del sys.modules[name]


def test_the_benchmark_times_replays_alone(bench, stand_in):
    (result,) = bench()["results"]
    assert result["shape"]["graphs"] is True and len(result["seconds"]["decode"]) == 3
    assert len(stand_in.replays) == 2  # one of its check, one of the cell


def test_the_benchmark_has_no_time_for_an_engine_that_gave_graphs_up(bench, stand_in):
    def fails(capture: int) -> None:
        if capture:
            raise RuntimeError("out of memory")

    stand_in.fails = fails
    (failed,) = bench()["failed"]
    assert failed["reason"] == "RuntimeError: no graphs: a capture failed: RuntimeError: out of memory"


def test_control_a_benchmark_of_graphs_that_are_not_replayed_ends(bench, monkeypatch):
    monkeypatch.setattr(module, "capture_on", lambda *_: lambda call: (call(), lambda: None))
    with pytest.raises(SystemExit, match="other tokens with graphs than without"):
        bench()


# -- the real capture, as far as it goes without a device ----------------------------------------------------------------


class FakeCuda:
    """torch.cuda's part in a capture: which stream is current, and which graphs hold the pool. Breaks a capture as torch does:
    `torch.cuda.graph` then leaves its stream current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = "the caller's"
        self.made: list[Any] = []
        self.captures: list[tuple[Any, ...]] = []
        self.streams = iter(["side", "another"])
        for name in ("CUDAGraph", "Stream", "graph_pool_handle", "device", "stream", "graph"):
            monkeypatch.setattr(graphs.torch.cuda, name, getattr(self, f"_{name}"))

    def _CUDAGraph(self) -> Any:
        replays: list[int] = []
        graph = type("Graph", (), {"replays": replays, "replay": lambda self: replays.append(1)})()
        self.made.append(weakref.ref(graph))
        return graph

    def _Stream(self) -> str:
        return next(self.streams)

    def _graph_pool_handle(self) -> tuple[int, int]:
        return (0, 7)

    @contextmanager
    def _device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def _stream(self, stream: str) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def _graph(self, graph: Any, *, pool: Any, stream: str, capture_error_mode: str) -> Iterator[None]:
        holders = sum(made() is not None for made in self.made) - 1
        assert holders or not self.captures, "use_count > 0 INTERNAL ASSERT FAILED"
        self.captures.append((pool, stream, capture_error_mode))
        before, self.current = self.current, stream
        yield
        self.current = before


def test_captures_share_a_pool_that_lasts_and_bring_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    capture = CudaCapture(torch.device("cpu"))
    assert not cuda.captures
    seen = []
    for value in (1, 2, 3):
        result, replay = capture(lambda value=value: seen.append(cuda.current) or torch.tensor(value))
        assert result == value and cuda.current == "the caller's"
        replay()
        assert replay.__self__.replays == [1]
        del replay  # the graph dies before the next one is captured
    assert seen == ["side"] * 3
    assert cuda.captures == [((0, 7), "side", "thread_local")] * 4  # the first one holds the pool
    assert [made() is not None for made in cuda.made] == [True, False, False, False]

    def broken() -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture(broken)
    assert cuda.current == "the caller's"
    assert capture(partial(torch.tensor, 4))[0] == 4


def test_control_a_pool_that_nothing_holds_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    capture = CudaCapture(torch.device("cpu"))
    capture(partial(torch.tensor, 1))
    capture._anchor = "nothing"
    with pytest.raises(AssertionError, match="use_count"):
        capture(partial(torch.tensor, 2))
