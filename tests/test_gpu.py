"""The Triton kernels on a CUDA device: against fp64, and bit for bit alone and among others. `bench/gpu_run.sh` runs these first."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_bits

import kvkern
from kvkern.kernels.oracle import attend_fp64

SHAPES = [
    # agents, rows, prefix tokens, suffix tokens, kv heads, G, head_dim
    (1, 1, 1, 1, 1, 1, 64),
    (5, 1, 127, 33, 2, 3, 64),
    (7, 2, 1025, 17, 2, 4, 128),
    (3, 1, 4097, 1100, 1, 7, 80),
    (64, 1, 2049, 65, 2, 8, 128),
    (130, 1, 300, 48, 2, 2, 128),
]


def operands(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    agents, rows, prefix_tokens, suffix_tokens, num_kv_heads, group, head_dim = shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size).to(dtype).to(device)

    q = normal(agents, rows, num_kv_heads * group, head_dim)
    k_prefix, v_prefix = normal(prefix_tokens, num_kv_heads, head_dim), normal(prefix_tokens, num_kv_heads, head_dim)
    k_suffix, v_suffix = (normal(agents, suffix_tokens, num_kv_heads, head_dim) for _ in range(2))
    lengths = torch.randint(min(rows, suffix_tokens), suffix_tokens + 1, (agents,), device=device)
    for agent, length in enumerate(lengths.tolist()):
        k_suffix[agent, length:] = v_suffix[agent, length:] = float("nan")
    return q, k_prefix, v_prefix, k_suffix, v_suffix, lengths


def check_against_fp64(shape: tuple[int, ...], dtype: torch.dtype, device: str, backend: str) -> None:
    q, k_prefix, v_prefix, k_suffix, v_suffix, lengths = operands(shape, dtype, device)
    o, lse = kvkern.attend(q, k_prefix, v_prefix, k_suffix, v_suffix, lengths, None, True, backend=backend)
    assert o.isfinite().all() and lse.isfinite().all()
    for agent, length in enumerate(lengths.tolist()):
        k, v = (torch.cat([p, s[agent, :length]]) for p, s in ((k_prefix, k_suffix), (v_prefix, v_suffix)))
        expected, expected_lse = attend_fp64(q[agent].cpu(), k.cpu(), v.cpu())
        plain = _plain(q[agent], k, v)
        error, allowed = (o[agent].cpu() - expected).abs(), (plain.cpu() - expected).abs()
        floor = 1e-5 if dtype == torch.float32 else 0.0
        assert error.max() <= max(2 * allowed.max(), floor), (agent, error.max(), allowed.max())
        assert error.mean() <= max(1.5 * allowed.mean(), floor), (agent, error.mean(), allowed.mean())
        torch.testing.assert_close(lse[agent].double().cpu(), expected_lse, rtol=1e-4, atol=1e-4)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The computation as plain torch does it in this dtype."""
    rows, group = q.shape[0], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("rhd,thd->hrt", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(rows, k.shape[0], dtype=torch.bool, device=q.device).triu(k.shape[0] - rows + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.einsum("hrt,thd->rhd", weights, v)


def check_alone_and_among(device: str, backend: str, workers: int) -> None:
    q, k_prefix, v_prefix, k_suffix, v_suffix, lengths = operands((64, 1, 5000, 70, 2, 4, 128), torch.bfloat16, device)
    together = kvkern.attend(
        q, k_prefix, v_prefix, k_suffix, v_suffix, lengths, backend=backend, workers_per_node=workers
    )
    for agent in (0, 17, 63):
        one = slice(agent, agent + 1)
        alone = kvkern.attend(q[one], k_prefix, v_prefix, k_suffix[one], v_suffix[one], lengths[one], backend=backend)
        assert_same_bits(alone[0], together[agent], f"o[{agent}]")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend_agrees_with_fp64_on_the_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_against_fp64(shape, dtype, "cuda", "triton")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("workers", [1, 3])
def test_a_row_has_the_same_bits_alone_and_among_64_on_the_gpu(workers: int) -> None:
    check_alone_and_among("cuda", "triton", workers)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_these_checks_hold_for_the_backends_of_this_machine(backend: str) -> None:
    """What is skipped without a GPU has at least run: the same checks, where they can."""
    for shape in SHAPES[:4]:
        for dtype in (torch.float32, torch.bfloat16):
            check_against_fp64(shape, dtype, "cpu", backend)
    check_alone_and_among("cpu", backend, 3)


def test_control_a_wrong_result_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kvkern.attend

    def wrong(q: torch.Tensor, *args: object, **options: object) -> object:
        return right(q * 1.01, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(kvkern, "attend", wrong)
    with pytest.raises(AssertionError):
        check_against_fp64(SHAPES[1], torch.float32, "cpu", "cpu")
