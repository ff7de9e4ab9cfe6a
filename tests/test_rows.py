"""Row kernels of the CPU: against torch's own steps, bits over rows, threads and instruction sets, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor
from torch.nn import functional

from kvkern import _C, plain, rows
from kvkern.errors import DtypeError, ShapeError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS = _C.instruction_sets()
EPS = 1e-5
STEP = {torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def strided(n: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, size + 16).to(dtype)[:, 8 : size + 8]


def close(found: Tensor, expected: Tensor) -> None:
    """In 16 bits four half steps, relative to each element; in fp32 also what two orders of a sum may differ by."""
    error = (found.double() - expected.double()).abs()
    assert (error <= STEP[found.dtype] * expected.double().abs() + 1e-30).all(), f"error {error.max()}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 64, 577])
def test_norm_and_gate_are_those_of_transformers(isa: str, dtype: torch.dtype, size: int) -> None:
    x, other, weight = strided(5, size, dtype), strided(5, size, dtype), torch.rand(size).to(dtype) + 0.5
    both = x + other
    found, total = rows.rms_norm(x, weight, EPS, residual=other, isa=isa)
    assert_same_bits(total, both, "sum")
    close(found, plain._norm(both, weight, EPS))
    close(rows.rms_norm(x, weight, EPS, isa=isa)[0], plain._norm(x, weight, EPS))
    wide = x * 8
    close(rows.silu_mul(wide, other, isa=isa), functional.silu(wide) * other)
    with pytest.raises(AssertionError, match="error"):
        close(rows.silu_mul(wide, other, isa=isa), wide * other)


@pytest.mark.parametrize("isa", ISAS)
def test_silu_holds_at_the_ends(isa: str) -> None:
    x = torch.tensor([[-math.inf, -1e30, -100.0, -88.0, -0.0, 0.0, 88.0, 1e30, math.inf, math.nan]])
    found, expected = rows.silu_mul(x, torch.ones_like(x), isa=isa), functional.silu(x.double()).float()
    assert found[0, 0].isnan() and found[0, -1].isnan()
    torch.testing.assert_close(found[0, 1:-1], expected[0, 1:-1], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_among_any_on_any_threads_and_nan_stays_in_its_own(dtype: torch.dtype) -> None:
    x, up, weight = strided(130, 576, dtype), strided(130, 576, dtype), torch.rand(576).to(dtype)
    x[7] = math.nan
    alone = [
        (rows.rms_norm(r, weight, EPS, residual=u)[0], rows.silu_mul(r, u))
        for r, u in zip(x.split(1), up.split(1), strict=True)
    ]
    was = torch.get_num_threads()
    try:
        for n, threads in ((1, 1), (9, 2), (64, 2), (130, 1), (130, 4)):
            torch.set_num_threads(threads)
            norm, gate = rows.rms_norm(x[:n], weight, EPS, residual=up[:n])[0], rows.silu_mul(x[:n], up[:n])
            for i in (i for i in range(n) if i != 7):
                assert_same_bits(norm[i : i + 1], alone[i][0], f"norm[{i}]")
                assert_same_bits(gate[i : i + 1], alone[i][1], f"gate[{i}]")
        with pytest.raises(AssertionError):
            assert_same_bits(norm[1:2], alone[2][0], "norm[1]")
    finally:
        torch.set_num_threads(was)


@pytest.mark.parametrize("isa", ISAS)
def test_any_number_of_rows_up_to_130_on_1_2_and_4_threads_gives_each_row_its_bits(isa: str) -> None:
    x, up = (torch.randn(130, 77) for _ in range(2))
    weight, was = torch.rand(77), torch.get_num_threads()

    def run(n: int) -> tuple[Tensor, ...]:
        return *rows.rms_norm(x[:n], weight, EPS, residual=up[:n], isa=isa), rows.silu_mul(x[:n], up[:n], isa=isa)

    try:
        torch.set_num_threads(1)
        whole = run(130)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for n in range(1, 131):
                for name, found, expected in zip(("norm", "sum", "gate"), run(n), whole, strict=True):
                    assert_same_bits(found, expected[:n], f"{name} of {n} rows")
    finally:
        torch.set_num_threads(was)


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_with_fma_agree_in_every_bit(dtype: torch.dtype) -> None:
    x, up, weight = strided(9, 577, dtype), strided(9, 577, dtype), torch.rand(577).to(dtype)
    found = {
        isa: (rows.rms_norm(x, weight, EPS, isa=isa)[0], rows.silu_mul(x * 8, up, isa=isa))
        for isa in ISAS
        if isa != "portable"
    }
    for isa, parts in found.items():
        for name, part, expected in zip(("norm", "gate"), parts, next(iter(found.values())), strict=True):
            assert_same_bits(part, expected, f"{name} with {isa}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_append_fused_is_that_of_plain(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    q, k, v = torch.randn(5, 8, head_dim).to(dtype).split((4, 2, 2), dim=1)
    cos, sin = torch.randn(5, head_dim).to(dtype), torch.randn(5, head_dim).to(dtype)
    weight = torch.rand(head_dim).to(dtype) + 0.5
    places = [
        torch.tensor(t, dtype=torch.int32)
        for t in ([[4, 2], [1, -7], [3, 0]], [17, 3, 19], [2, 0, 0, -1, 2], [1, 1, 0, 0, 0])
    ]

    def pages() -> list[Tensor]:
        return [torch.zeros(5, 16, 2, head_dim, dtype=dtype).transpose(1, 2) for _ in range(2)]

    for norm in (None, weight):
        mine, theirs = pages(), pages()
        found = rows.append_fused(q, k, v, norm, norm, cos, sin, *mine, *places, q_eps=EPS, k_eps=EPS, isa=isa)
        turned = [plain._rope(x if norm is None else plain._norm(x, norm, EPS), cos, sin) for x in (q, k)]
        plain.append(turned[0], turned[1], v, *theirs, *places)
        for got, expected in zip((found, *mine), (turned[0], *theirs), strict=True):
            if norm is None:
                assert_same_bits(got, expected, "turned")
            else:
                torch.testing.assert_close(got, expected, rtol=STEP[dtype], atol=4 * STEP[dtype])
    before = [t.clone() for t in mine]
    with pytest.raises(IndexError, match="page of row 1"):
        bad = torch.tensor([[4, 2], [1, -7], [3, 0]], dtype=torch.int32).fill_(5)
        bad[2] = torch.tensor([3, 0])
        rows.append_fused(q, k, v, None, None, cos, sin, *mine, bad, *places[1:], q_eps=EPS, k_eps=EPS, isa=isa)
    assert all(torch.equal(a, b) for a, b in zip(mine, before, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(4, 16)
    for bad, kind in ((x[0], ShapeError), (x.double(), DtypeError), (x.t()[:4], ShapeError)):
        with pytest.raises(kind):
            rows.silu_mul(bad, x)
        with pytest.raises(kind):
            rows.rms_norm(bad, torch.ones(16), EPS)
    for address in (0, x.data_ptr() + 1):
        with pytest.raises(ValueError, match="gate: needed"):
            _C.silu_mul(address, x.data_ptr(), x.data_ptr(), 0, (4, 16), (64, 64), 1)
    with pytest.raises(ValueError, match="strides"):
        _C.silu_mul(x.data_ptr(), x.data_ptr(), x.data_ptr(), 0, (4, 16), (63, 64), 1)
