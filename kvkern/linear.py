"""Rounding classes: the numbers of rows under which a row of the model's arithmetic keeps its bits.

A GEMM's rounding may follow its number of rows, but in a GEMM of one shape a row's bits follow neither its position nor the
rows beside it. So forwards are padded to buckets of rows, and only to buckets of one class: those in which the same row
comes out with the same bits, at every position, of every distinct linear layer, norm, activation and rotary embedding. (An
element-wise loop is no safer than a GEMM: the tail of a thread's share may go through another routine.) Nothing of this is
known beforehand, so it is measured, with the model's own weights, at this number of threads, on this device.

A result that is rounded to 16 bits hides nearly all of what another order of summation changes in fp32: of a bf16 layer's outputs 1
in 6,000 shows it. So the rows of a linear layer are such that some outputs nearly cancel, where 1 in 25 does.

The output projection has a class of its own: it sees only the rows whose next token is wanted, and costs the most.
"""

from __future__ import annotations

import hashlib
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
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

VALUES = {2: 2**17, 4: 2**14, 8: 2**14}
"""Outputs of a module that are compared, by the bytes of one, if its rows are random."""
NEARLY_ZERO, IN_A_ROW = 4096, 256
"""Outputs of a linear layer that nearly cancel, and of them in one row at most."""
MIN_ROWS = 16
"""That are compared: a row has others beside it."""


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
    """One module: `inputs(rows, generator)` draws so many rows, `run` takes them as [1, rows, ...].

    cancelling  outputs of a row that nearly cancel; 0 where rows are simply random
    """

    key: Hashable
    name: str
    inputs: Callable[[int, torch.Generator], Tensor]
    run: Callable[[Tensor], tuple[Tensor, ...]]
    is_head: bool = False
    cancelling: int = 0


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
        weight = module.weight  # of a quantized layer it may be anything
        known = (
            type(weight) is nn.Parameter and weight.shape == (n, k) and weight.dtype == dtype and dtype.itemsize == 2
        )
        some = min(n, k // 2, IN_A_ROW) if known else 0
        inputs = partial(_nearly_cancelling, module, some) if some else normal(k)
        yield _Probe((kind, n, k, bias, dtype, is_head), label, inputs, one(module), is_head, some)
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
    given = [_rows(probe) for probe in probes]
    outside: dict[int, str] = {}
    classes: dict[tuple[str, ...], list[int]] = {}
    signatures: dict[int, tuple[str, ...]] = {}
    for bucket in buckets:
        signature = []
        for probe, rows in zip(probes, given, strict=True):
            digest = _digest(probe, rows, bucket)
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
def _digest(probe: _Probe, rows: Tensor, bucket: int) -> str | None:
    """Digest of what the probe makes of these rows in forwards of so many; None if a row's bits differ between places.

    Twice, in two random orders; where there are more places than rows, rows stand at several of them.
    """
    places = -(-len(rows) // bucket) * bucket
    generator = torch.Generator().manual_seed(bucket)
    first: list[Tensor] = []
    for _ in range(2):
        order = (torch.randperm(places, generator=generator) % len(rows)).to(rows.device)
        forwards = [probe.run(chunk[None]) for chunk in rows[order].split(bucket)]
        found = [torch.cat([output[0] for output in outputs]) for outputs in zip(*forwards, strict=True)]
        if not first:
            first = [output.new_empty((len(rows), *output.shape[1:])).index_copy_(0, order, output) for output in found]
        for output, needed in zip(found, first, strict=True):
            if not torch.equal(output.view(torch.uint8), needed[order].view(torch.uint8)):
                return None
    digest = hashlib.sha256()
    for output in first:
        digest.update(output.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _rows(probe: _Probe) -> Tensor:
    """What the probe is given, the same for every bucket."""
    generator = torch.Generator().manual_seed(0)
    outputs = probe.run(probe.inputs(1, generator)[None])
    values = sum(output.numel() for output in outputs)
    if probe.cancelling:
        wanted = -(-NEARLY_ZERO // probe.cancelling)
    else:
        wanted = -(-VALUES[outputs[0].element_size()] // values)
    return probe.inputs(max(MIN_ROWS, wanted), generator)


def _nearly_cancelling(layer: nn.Linear, some: int, rows: int, generator: torch.Generator) -> Tensor:
    """Random rows, so many random outputs of each are zero but for the row's own rounding to 16 bits.

    Where terms of the usual size sum up to nearly nothing, the rounding of their sums is as large as that of the result.
    """
    found = torch.randn((rows, layer.in_features), generator=generator)
    for row in found:
        which = torch.randperm(layer.out_features, generator=generator)[:some].to(layer.weight.device)
        basis, r = torch.linalg.qr(layer.weight[which].float().cpu().T)
        row -= basis @ (row @ basis)
        if layer.bias is not None:
            bias = layer.bias[which].float().cpu()
            against = torch.linalg.solve_triangular(r.T, bias[:, None], upper=False)[:, 0]
            # Where rows of the weight depend on each other it is huge or NaN, which would show nothing.
            if against.norm() <= layer.in_features**0.5:
                row -= basis @ against
    return found.to(layer.weight)
