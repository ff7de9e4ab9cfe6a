"""Rounding classes: the numbers of rows under which a row of this model keeps its bits, as measured, and tried again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from kvkern.checks.assertions import assert_same_bits
from kvkern.checks.subject import Subject
from kvkern.linear import Rounding, RoundingClass, measure

Record = Callable[[str, object], None]

FEW_ROWS = (1, 2, 3)
"""Buckets that no engine uses; a GEMM of so few rows often goes through another routine."""


class Layer(NamedTuple):
    name: str
    module: Any
    shape: tuple[int, ...]
    is_head: bool


def layers(model: Any) -> Iterator[Layer]:
    """One module for every distinct linear layer and norm, with the shape of one of its rows."""
    config, head = model.config, model.get_output_embeddings()
    seen = set()
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", torch.empty(0))
        if isinstance(module, nn.Linear):
            shape: tuple[int, ...] = (module.in_features,)
        elif type(module).__name__.endswith("Norm") and weight.dim() == 1:
            size = weight.numel()
            shape = (size,) if size == config.hidden_size else (config.num_attention_heads, size)
        else:
            continue
        key = (type(module), tuple(weight.shape), module is head)
        if key not in seen:
            seen.add(key)
            yield Layer(f"{type(module).__name__} {name}", module, shape, module is head)


@torch.inference_mode()
def assert_one_class(layer: Layer, buckets: RoundingClass, dtype: torch.dtype, device: torch.device) -> None:
    """Fresh rows have the same bits in each bucket, at random places among each other: as many as the largest bucket holds."""
    count = buckets.max_rows
    rows = torch.randn(count, *layer.shape).to(device, dtype)
    first = layer.module(rows[None])[0]
    for bucket in buckets.buckets:
        places = torch.randperm(-(-count // bucket) * bucket, device=device) % count
        outputs = torch.cat([layer.module(part[None])[0] for part in rows[places].split(bucket)])
        assert_same_bits(outputs, first[places], f"{layer.name}, {bucket} rows against {count}")


def assert_classes_hold(subject: Subject, rounding: Rounding) -> None:
    for layer in layers(subject.model):
        assert_one_class(layer, rounding.head if layer.is_head else rounding.layers, subject.dtype, subject.device)


def words(name: str, found: RoundingClass) -> str:
    outside = "".join(f"; not {n}: {why}" for n, why in found.outside.items())
    return f"{name} {', '.join(map(str, found.buckets))}: one class{outside}"


def test_classes_hold(subject: Subject, record_property: Record) -> None:
    """rounding: fresh rows have the same bits in every bucket of the measured class"""
    rounding = measure(subject.model)
    record_property("detail", words("rows", rounding.layers))
    record_property("detail", words("rows of lm_head", rounding.head))
    assert_classes_hold(subject, rounding)


def test_buckets_outside(subject: Subject, record_property: Record) -> None:
    """rounding: buckets outside the class are found and named"""
    usual = measure(subject.model)
    inside = usual.layers.buckets
    few = measure(subject.model, buckets=(*FEW_ROWS, *inside[:4]), head_buckets=usual.head.buckets[:1])
    outside = {**usual.layers.outside, **few.layers.outside}
    if not outside:
        pytest.skip(f"none is outside: {FEW_ROWS[0]} to {inside[-1]} rows round alike here")
    for rows, why in sorted(outside.items()):
        record_property("detail", f"not {rows}: {why}")
        named = (*usual.probes, *few.probes)
        assert any(why.startswith(probe) for probe in named), f"{rows} rows: {why!r} names no module of the model"


class FollowsRows(nn.Linear):
    """A layer whose rounding follows the number of rows, as a GEMM's may: below 8 rows it sums in two halves."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] >= 8:
            return super().forward(x)
        half = self.in_features // 2
        return x[..., :half] @ self.weight[:, :half].T + x[..., half:] @ self.weight[:, half:].T


@contextmanager
def with_a_layer_that_follows_rows(model: Any) -> Iterator[None]:
    """In the place of the model's first linear layer, with its weight."""
    head = model.get_output_embeddings()
    name, right = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)
    parent = model.get_submodule(name.rpartition(".")[0])
    with torch.device("meta"):
        wrong = FollowsRows(right.in_features, right.out_features, bias=False)
    wrong.weight = right.weight
    setattr(parent, name.rpartition(".")[2], wrong)
    try:
        yield
    finally:
        setattr(parent, name.rpartition(".")[2], right)


def test_control_a_layer_that_follows_rows(subject: Subject) -> None:
    """control: a layer whose rounding follows the number of rows is named, and caught"""
    usual = measure(subject.model)
    with with_a_layer_that_follows_rows(subject.model):
        found = measure(subject.model, buckets=(4, 16, 32), head_buckets=usual.head.buckets[:1]).layers
        assert "FollowsRows" in found.outside.get(4, ""), f"4 rows are not reported: {found}"
        wrong = Rounding(**{**vars(usual), "layers": RoundingClass((4, 16, 32), {})})
        with pytest.raises(AssertionError, match=r"FollowsRows .*, 4 rows against 32: \d+ of \d+ differ, first at"):
            assert_classes_hold(subject, wrong)
