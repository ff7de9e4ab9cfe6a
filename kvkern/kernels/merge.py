"""K3, merge: the fold alone, state of [a, b) and state of [b, c) -> state of [a, c).

grid    (row blocks)
states  m, l [...], acc [..., head_dim], fp32; all leading dimensions are rows

The fold's oracle, and what an overlapped schedule would use. Bound by memory: three accumulators move for four operations an
element. Speed not measured.
"""

import torch
import triton
import triton.language as tl

from kvkern.geometry import next_power_of_2
from kvkern.kernels.state import ROUNDING, fold, load, store
from kvkern.kernels.tiles import on
from kvkern.plain import State

BLOCK_M = 16


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    m_a_ptr,
    l_a_ptr,
    acc_a_ptr,
    m_b_ptr,
    l_b_ptr,
    acc_b_ptr,
    m_ptr,
    l_ptr,
    acc_ptr,
    rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    count = rows - first
    m_a, l_a, acc_a = load(m_a_ptr, l_a_ptr, acc_a_ptr, first, count, HEAD_DIM, BLOCK_M, BLOCK_D)
    m_b, l_b, acc_b = load(m_b_ptr, l_b_ptr, acc_b_ptr, first, count, HEAD_DIM, BLOCK_M, BLOCK_D)
    m, l, acc = fold(m_a, l_a, acc_a, m_b, l_b, acc_b)
    store(m_ptr, l_ptr, acc_ptr, first, count, m, l, acc, HEAD_DIM, BLOCK_M, BLOCK_D)


def merge(a: State, b: State) -> State:
    """The fold alone, on states of any shape: m, l [...], acc [..., head_dim]."""
    a, b = (State(*(part.contiguous() for part in state)) for state in (a, b))
    out = State(*(torch.empty_like(part) for part in a))
    rows, head_dim = a.m.numel(), a.acc.shape[-1]
    if rows == 0:
        return out
    with on(a.m.device):
        merge_kernel[(triton.cdiv(rows, BLOCK_M),)](
            *a,
            *b,
            *out,
            rows,
            HEAD_DIM=head_dim,
            BLOCK_M=BLOCK_M,
            BLOCK_D=next_power_of_2(head_dim),
            num_warps=4,
            **ROUNDING,
        )
    return out
