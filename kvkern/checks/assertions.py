"""The bounds that results are held to, the same in `kvkern check` and in the suite: bit for bit, or FlashAttention's rule."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def bits(tensor: Tensor) -> Tensor:
    """The bits of each element, as an integer of its size: NaN equals itself, and 0.0 is not -0.0."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def assert_same_bits(a: Tensor, b: Tensor, name: str) -> None:
    """Same shape, dtype and bits. NaN is refused on either side, even where both have it."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{name}: {a.dtype} {[*a.shape]} against {b.dtype} {[*b.shape]}"
    for side in (a, b):
        nans = int(torch.isnan(side).sum())
        assert not nans, f"{name}: {nans} of {side.numel()} are NaN"
    _report(bits(a) != bits(b), a, b, name)


def assert_untouched(a: Tensor, b: Tensor, name: str) -> None:
    """Same bits, where NaN is what the buffer is full of."""
    _report(bits(a) != bits(b), a, b, name)


def _report(differ: Tensor, a: Tensor, b: Tensor, name: str) -> None:
    if differ.any():
        first = tuple(differ.nonzero()[0].tolist())
        x, y = a[first].item(), b[first].item()
        raise AssertionError(f"{name}: {int(differ.sum())} of {differ.numel()} differ, first at {first}: {x} != {y}")


def assert_exact(result: Tensor, reference: Tensor, plain: Tensor, name: str = "o") -> None:
    """FlashAttention's rule: the largest error is at most twice, the mean at most 1.5 times, that of a plain computation.

    result     what is judged
    reference  the same in fp64
    plain      the same by plain torch in the dtype of the inputs

    In fp32, whose plain computation is no measure for sums in another order: 1e-5 of the largest value. NaN never passes,
    and -inf is -inf or wrong.
    """
    assert result.shape == reference.shape, f"{name}: {[*result.shape]}, needed {[*reference.shape]}"
    assert reference.dtype == torch.float64
    assert not torch.isnan(result).any(), f"{name}: {int(torch.isnan(result).sum())} of {result.numel()} are NaN"
    finite = torch.isfinite(reference)
    assert torch.equal(torch.isfinite(result), finite), f"{name}: not finite elsewhere than the reference"
    assert torch.equal(result[~finite].double(), reference[~finite]), f"{name}: another infinity"
    if not finite.any():
        return
    error, plain_error = ((x.double() - reference)[finite].abs() for x in (result, plain))
    if plain.dtype == torch.float32:
        bound = 1e-5 * max(1.0, reference[finite].abs().max().item())
        assert error.max() <= bound, f"{name}: max error {error.max():.3e}, needed at most {bound:.3e}"
        return
    for kind, factor, found, needed in (
        ("max", 2.0, error.max(), plain_error.max()),
        ("mean", 1.5, error.mean(), plain_error.mean()),
    ):
        assert found <= factor * needed, f"{name}: {kind} error {found:.3e}, needed at most {factor} x {needed:.3e}"


class Out(NamedTuple):
    """One agent's rows: o [rows, num_qo_heads, head_dim], lse [rows, num_qo_heads]."""

    o: Tensor
    lse: Tensor


def plain_attention(q: Tensor, k: Tensor, v: Tensor, sm_scale: float | None = None) -> Out:
    """Softmax attention as one writes it, every intermediate in the dtype of q."""
    rows, num_qo_heads, head_dim = q.shape
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    group = num_qo_heads // k.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1).transpose(0, 1) for t in (k, v))
    scores = torch.matmul(q.transpose(0, 1) * scale, keys.transpose(1, 2))
    hidden = torch.ones(rows, k.shape[0], dtype=torch.bool, device=q.device).triu(k.shape[0] - rows + 1)
    scores = scores.masked_fill(hidden, -math.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    return Out(torch.matmul(weights, values).transpose(0, 1), torch.logsumexp(scores, dim=-1).transpose(0, 1))
