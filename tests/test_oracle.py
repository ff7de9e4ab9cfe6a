"""The oracle against softmax attention written out, one number at a time, in Python's own floats."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import bits

from kvkern.kernels.oracle import attend_fp64


def attention_by_hand(q, k, v, scale):
    """Row i of `rows` sees tokens 0 to tokens - rows + i; query head h reads kv head h // G."""
    rows, num_qo_heads, head_dim = q.shape
    tokens, num_kv_heads, _ = k.shape
    o = torch.zeros(rows, num_qo_heads, head_dim, dtype=torch.float64)
    lse = torch.full((rows, num_qo_heads), -math.inf, dtype=torch.float64)
    for i in range(rows):
        for h in range(num_qo_heads):
            head = h // (num_qo_heads // num_kv_heads)
            seen = range(tokens - rows + i + 1)
            if not seen:
                continue
            weights = [
                math.exp(scale * sum(float(q[i, h, d]) * float(k[t, head, d]) for d in range(head_dim))) for t in seen
            ]
            lse[i, h] = math.log(sum(weights))
            for d in range(head_dim):
                o[i, h, d] = sum(weights[t] * float(v[t, head, d]) for t in seen) / sum(weights)
    return o, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "tokens", "group", "sm_scale"),
    [(1, 1, 1, None), (1, 17, 3, None), (5, 5, 2, 0.3), (4, 21, 1, 1.0), (3, 1, 2, None), (2, 0, 2, None)],
)
def test_it_is_softmax_attention_written_out(rows, tokens, group, sm_scale, dtype):
    q = torch.randn(rows, 2 * group, 16).to(dtype)
    k, v = torch.randn(2, tokens, 2, 16).to(dtype)
    o, lse = attend_fp64(q, k, v, sm_scale=sm_scale)
    expected = attention_by_hand(q, k, v, 16**-0.5 if sm_scale is None else sm_scale)
    torch.testing.assert_close(o, expected[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, expected[1], rtol=1e-12, atol=1e-13)


def test_a_row_before_the_first_token_sees_nothing():
    o, lse = attend_fp64(torch.randn(3, 4, 16), *torch.randn(2, 1, 2, 16))
    assert not o[:2].any() and (lse[:2] == -math.inf).all()
    assert torch.isfinite(lse[2]).all()


def test_large_scores_do_not_overflow():
    q, k, v = torch.full((1, 1, 16), 1e3), torch.full((2, 1, 16), 1e3), torch.randn(2, 1, 16)
    o, lse = attend_fp64(q, k, v)
    torch.testing.assert_close(o[0, 0], v[:, 0].double().mean(0))
    assert lse.item() == pytest.approx(4e6 + math.log(2))


def test_it_changes_none_of_its_inputs():
    tensors = torch.randn(2, 4, 16), torch.randn(5, 2, 16), torch.randn(5, 2, 16)
    before = [t.clone() for t in tensors]
    attend_fp64(*tensors)
    assert all(torch.equal(bits(t), bits(b)) for t, b in zip(tensors, before, strict=True))
