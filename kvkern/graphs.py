"""Decode steps from CUDA graphs: what the host launched one by one for a plan's rows, it launches again all at once.

A decode step of few agents is bound by the host, which launches some twenty kernels a layer. They are the same in every step
of one plan but for what they read: tokens and positions, which are copied to where the graph reads them, and lengths and page
tables, which the pool writes in place. All else that it has addresses of, it holds: the plan with its tables, blocks and pool,
by the forward that was captured, and the weights of that time. It lives and dies with its plan, in a `PlanForward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kvkern.errors import BackendError, DeviceError
from kvkern.plan import Plan

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""ids and positions int64 [1, rows], rows whose logits are wanted int64 [n] -> logits [n, vocab_size]."""

Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Takes a call and gives back where its result lies, and a replay: the call again, on what its tensors then hold."""


@dataclass(eq=False)
class PlanForward:
    """The forward of one plan's rows, begun before each run.

    decodes  runs so far of decode rows alone, whose wanted rows follow from the plan
    graph    that of such a run, once there is one
    """

    plan: Plan
    forward: Forward
    decodes: int = 0
    graph: StepGraph | None = None


class StepGraph:
    """A captured forward with inputs of its own; the logits of a run are overwritten by the next."""

    def __init__(
        self, forward: Forward, inputs: Sequence[Tensor], capture: Capture, weights: Iterable[Tensor] = ()
    ) -> None:
        # Held, since the graph has the addresses: a parameter that is given other data would free those that it had.
        self.forward, self.weights = forward, [weight.detach() for weight in weights]
        self.inputs = [given.clone() for given in inputs]
        self.logits, self._replay = capture(partial(forward, *self.inputs))

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self._replay()
        return self.logits


class Graphs:
    """An engine's graphs: whether decode steps of its model are replayed, and why; capture None: they are not.

    The first decode step of a plan runs kernel by kernel, which compiles and loads what it launches; the second is captured. A
    capture that fails is the last one: the engine goes on without graphs.
    """

    def __init__(self, model: nn.Module, capture: Capture | None) -> None:
        self.model, self.capture = model, capture
        self.why = "not wanted" if capture is None else "wanted"

    def run(self, step: PlanForward, inputs: Sequence[Tensor], *, decode: bool) -> Tensor:
        """Logits of a begun plan's rows. decode: each agent brings one row, and its logits are wanted."""
        if decode and self.capture is not None:
            step.decodes += 1
            if step.decodes > 1 and step.graph is None:
                try:
                    weights = chain(self.model.parameters(), self.model.buffers())
                    step.graph = StepGraph(step.forward, inputs, self.capture, weights)
                except RuntimeError as error:
                    self.capture = None
                    self.why = f"a capture failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if step.graph is not None:
                return step.graph.run(inputs)
        return step.forward(*inputs)


class CudaCapture:
    """`Capture` on a CUDA device, on a stream of its own.

    All captures share one pool of memory, so that a graph's intermediate results take the place of a dead one's: of two graphs
    one must have been replayed, and its logits read, before the other is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = None
        self.pool: Any = None
        self._anchor: object = None

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        if self._anchor is None:
            with torch.cuda.device(self.device):
                self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            # torch takes no graph into a pool whose graphs have all died: this one stays.
            self._anchor = self._record(partial(torch.zeros, 1, device=self.device))
        return self._record(call)

    def _record(self, call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # The outer stream context brings the caller's stream back, which torch.cuda.graph leaves changed if a capture fails.
        # Of this thread alone: what others do meanwhile must not fail for a capture here.
        with (
            torch.cuda.device(self.device),
            torch.cuda.stream(self.stream),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = call()
        return result, graph.replay


def capture_on(device: torch.device, backend: str) -> Capture:
    """How forwards are captured on this device. Raises DeviceError or BackendError where they cannot be."""
    if device.type != "cuda":
        raise DeviceError("graphs", found=f"True on {device}", needed="a CUDA device", do="leave graphs out here")
    if backend != "triton":
        raise BackendError(
            "graphs",
            found=f"True with the {backend} backend",
            needed="the triton backend, which asks the device nothing within a step",
            do="leave graphs or the backend out",
        )
    return CudaCapture(device)
