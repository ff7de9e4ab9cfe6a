"""Rounding classes: the numbers of rows under which a row of the model's arithmetic keeps its bits.

A GEMM's rounding may follow its number of rows, but in a GEMM of one shape a row's bits follow neither its position nor the
rows beside it. So forwards are padded to buckets of rows, and only to buckets of one class: those in which the same row
comes out with the same bits, at every position, of every distinct linear layer, norm, activation and rotary embedding. (An
element-wise loop is no safer than a GEMM: the tail of a thread's share may go through another routine.) Nothing of this is
known beforehand, so it is measured, with the model's own weights, at this number of threads, on this device.

The output projection has a class of its own: it sees only the rows whose next token is wanted, and costs the most.
"""

from __future__ import annotations

import hashlib
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvkern.errors import CapacityError, RequestError, UnsupportedError

BUCKETS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""At most half as many rows again as are wanted, from 8 on: a linear layer's time follows its rows from some 16 on."""
HEAD_BUCKETS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Fewer for the output projection: it alone is most of the work, and with 128 rows a GEMM is as fast per row as with 512."""
GPU_BUCKETS = (*BUCKETS, 768, 1024)
"""On a GPU, for both: a forward of few rows takes the time to read the weights, so each one more costs as much again."""


@dataclass(frozen=True)
class RoundingClass:
    """Buckets of rows in which a row has the same bits.

    buckets  ascending, at least one
    outside  measured buckets that do not belong, each with the reason
    """

    buckets: tuple[int, ...]
    outside: dict[int, str]

    @property
    def max_rows(self) -> int:
        return self.buckets[-1]

    def rows_for(self, rows: int) -> int:
        """The smallest bucket that holds so many rows. Raises CapacityError above max_rows: use several forwards."""
        if rows < 1:
            raise RequestError("rows", found=rows, needed="at least 1", do="run no forward without rows")
        for bucket in self.buckets:
            if bucket >= rows:
                return bucket
        raise CapacityError("rows", found=rows, needed=f"at most {self.max_rows}", do="use several forwards")


@dataclass(frozen=True)
class Rounding:
    """What was measured of a model.

    layers   class of everything between the embedding and the output projection
    head     class of the output projection; that of the layers if the model has none
    device, dtype, threads  where it holds
    probes   distinct modules that were compared
    seconds  that the measurement took
    """

    layers: RoundingClass
    head: RoundingClass
    device: str
    dtype: str
    threads: int
    probes: tuple[str, ...]
    seconds: float

    def describe(self) -> dict[str, Any]:
        """The same in plain words, for `kvkern env --json`."""
        return {
            "row_buckets": list(self.layers.buckets),
            "head_row_buckets": list(self.head.buckets),
            "outside": {str(n): why for n, why in self.layers.outside.items()},
            "head_outside": {str(n): why for n, why in self.head.outside.items()},
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "modules": list(self.probes),
            "seconds": round(self.seconds, 3),
        }


def measure(
    model: nn.Module, *, buckets: Sequence[int] | None = None, head_buckets: Sequence[int] | None = None
) -> Rounding:
    """The largest classes of buckets of a transformers model, as it is: its weights, device, dtype and this thread count.

    The class of most buckets, so that few rows are padded little; on a GPU the one that goes up to most rows, so that a step
    of many agents takes few forwards.

    Measured once for each set of distinct modules, then remembered: a second engine over such a model is quick.
    Raises UnsupportedError for a mixture of experts, whose rows meet in GEMMs of a size that follows the batch, and for a
    model in which a row's bits depend on its position under every bucket.
    """
    _refuse_experts(model)
    parameter = next(model.parameters())
    on_gpu = parameter.device.type == "cuda"
    buckets = (GPU_BUCKETS if on_gpu else BUCKETS) if buckets is None else buckets
    head_buckets = (GPU_BUCKETS if on_gpu else HEAD_BUCKETS) if head_buckets is None else head_buckets
    for name, values in (("buckets", buckets), ("head_buckets", head_buckets)):
        if not values or min(values) < 1:
            raise RequestError(
                name, found=list(values), needed="at least one number of rows, each 1 or more", do=f"leave {name} out"
            )
    return _measure(
        _Case(
            keys=tuple(probe.key for probe in _probes(model)),
            buckets=tuple(sorted(set(buckets))),
            head_buckets=tuple(sorted(set(head_buckets))),
            device=_device_name(parameter.device),
            most_rows=on_gpu,
            dtype=str(parameter.dtype).removeprefix("torch."),
            settings=(torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled),
            model=weakref.ref(model),
        )
    )


@dataclass(frozen=True)
class _Case:
    """All that a measurement depends on; the model itself only lends its weights, and may be collected."""

    keys: tuple[Hashable, ...]
    buckets: tuple[int, ...]
    head_buckets: tuple[int, ...]
    device: str
    most_rows: bool
    dtype: str
    settings: tuple[Hashable, ...]
    model: Callable[[], nn.Module | None] = field(compare=False)


@lru_cache(maxsize=32)
def _measure(case: _Case) -> Rounding:
    started = time.perf_counter()
    model = case.model()
    assert model is not None
    probes = list(_probes(model))
    layers = _largest([p for p in probes if not p.is_head], case.buckets, most_rows=case.most_rows)
    heads = [p for p in probes if p.is_head]
    return Rounding(
        layers=layers,
        head=_largest(heads, case.head_buckets, most_rows=case.most_rows) if heads else layers,
        device=case.device,
        dtype=case.dtype,
        threads=torch.get_num_threads(),
        probes=tuple(p.name for p in probes),
        seconds=time.perf_counter() - started,
    )


# -- what is compared --------------------------------------------------------------------------------------------------


class _Probe(NamedTuple):
    """One module: `inputs(rows, generator)` draws so many rows, `run` takes them as [1, rows, ...]."""

    key: Hashable
    name: str
    inputs: Callable[[int, torch.Generator], Tensor]
    run: Callable[[Tensor], tuple[Tensor, ...]]
    is_head: bool = False


def _probes(model: nn.Module) -> Iterator[_Probe]:
    """One probe for every distinct module."""
    seen: set[Hashable] = set()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        for probe in _probes_of(module, model, is_head=module is head):
            if probe.key not in seen:
                seen.add(probe.key)
                yield probe


def _probes_of(module: Any, model: Any, *, is_head: bool) -> Iterator[_Probe]:
    kind, name = type(module), type(module).__name__
    parameter = next(module.parameters(), next(model.parameters()))
    device = parameter.device
    dtype = parameter.dtype if parameter.is_floating_point() else model.dtype

    def normal(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
        return lambda rows, generator: torch.randn((rows, *shape), generator=generator).to(device, dtype)

    def positions(rows: int, generator: torch.Generator) -> Tensor:
        return torch.randint(1, 4096, (rows,), generator=generator).to(device)

    def one(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return lambda x: (call(x),)

    if isinstance(module, nn.Linear):
        n, k, bias = module.out_features, module.in_features, module.bias is not None
        label = f"{name} {n} x {k}{' with bias' if bias else ''}"
        yield _Probe((kind, n, k, bias, dtype, is_head), label, normal(k), one(module), is_head)
    elif name.endswith("Norm") and parameter.dim() == 1:
        size, config = parameter.numel(), model.config
        # A norm of heads sees [rows, heads, head_dim], one of the hidden state [rows, hidden].
        heads = () if size == config.hidden_size else (config.num_attention_heads, config.num_key_value_heads)
        shapes: list[tuple[int, ...]] = [(h, size) for h in heads]
        for shape in shapes or [(size,)]:
            yield _Probe((kind, shape, dtype), f"{name} {' x '.join(map(str, shape))}", normal(*shape), one(module))
    elif name.endswith("RotaryEmbedding"):
        hidden = torch.empty(0, device=device, dtype=dtype)
        yield _Probe((kind, dtype), name, positions, lambda x: tuple(module(hidden, x)))
    elif callable(getattr(module, "act_fn", None)) and isinstance(getattr(module, "gate_proj", None), nn.Linear):
        act, size = module.act_fn, module.gate_proj.out_features
        yield _Probe((type(act), size, dtype), f"{type(act).__name__} {size}", normal(size), one(act))


def _refuse_experts(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        count = getattr(config, name, None)
        if isinstance(count, int) and count > 1:
            raise UnsupportedError(
                f"model.config.{name}",
                found=count,
                needed="a model without a mixture of experts",
                do="use a dense model: how many rows an expert gets follows the batch, and so would the rounding",
            )


def _device_name(device: torch.device) -> str:
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


# -- the comparison ----------------------------------------------------------------------------------------------------


def _largest(probes: Sequence[_Probe], buckets: Sequence[int], *, most_rows: bool) -> RoundingClass:
    """The largest set of buckets that agree on every probe; of two, the one that goes up to more rows.

    most_rows  the set that goes up to most rows, however many buckets it has
    """
    outside: dict[int, str] = {}
    classes: dict[tuple[str, ...], list[int]] = {}
    signatures: dict[int, tuple[str, ...]] = {}
    for bucket in buckets:
        signature = []
        for probe in probes:
            digest = _row_digest(probe, bucket)
            if digest is None:
                outside[bucket] = f"{probe.name}: a row's bits depend on its position"
                break
            signature.append(digest)
        else:
            signatures[bucket] = tuple(signature)
            classes.setdefault(signatures[bucket], []).append(bucket)
    if not classes:
        raise UnsupportedError(
            "rounding class",
            found="; ".join(f"{n} rows: {why}" for n, why in outside.items()),
            needed="a number of rows in which a row's bits do not depend on its position",
            do="try another number of threads (torch.set_num_threads)",
        )
    best, members = max(classes.items(), key=lambda c: c[1][-1] if most_rows else (len(c[1]), c[1][-1]))
    for bucket, other in signatures.items():
        if other != best:
            name = next(p.name for p, a, b in zip(probes, other, best, strict=True) if a != b)
            outside[bucket] = f"{name}: other bits than with {members[-1]} rows"
    return RoundingClass(tuple(members), dict(sorted(outside.items())))


@torch.inference_mode()
def _row_digest(probe: _Probe, bucket: int) -> str | None:
    """Digest of the probe's row in this bucket; None if it differs between positions.

    The row stands at the first and last position and at three of four between, among rows that differ with the bucket.
    """
    row = probe.inputs(1, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(bucket)
    inputs = probe.inputs(bucket, generator)
    own = torch.rand(bucket, generator=generator) < 0.75
    own[0] = own[-1] = True
    inputs[own.to(inputs.device)] = row
    digest = hashlib.sha256()
    for output in probe.run(inputs[None]):
        rows = output[0][own.to(output.device)].contiguous().view(torch.uint8)
        if not torch.equal(rows, rows[:1].expand_as(rows)):
            return None
        digest.update(rows[0].cpu().numpy().tobytes())
    return digest.hexdigest()
