"""(m, l, acc): attention over a run of keys as it goes; the only place where softmax is written for Triton.

    m    [rows] fp32            running maximum of the scores, base 2
    l    [rows] fp32            sum of 2^(score - m)
    acc  [rows, head_dim] fp32  sum of 2^(score - m) v, not divided by l

Scores are q.k * sm_scale * log2(e), so that exp2, the hardware's own, is the only exponential. Every kernel starts, steps,
folds and finishes by these four functions, and every launch passes ROUNDING: the same values in the same order then give
the same bits in each of them.
"""

import triton
import triton.language as tl

ROUNDING = {"enable_fp_fusion": False}
"""Launch options that affect bits: a product and a sum become one rounding only where tl.fma says so, never where the
compiler likes."""

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def pivot(m):
    # A state that has seen no key has m = -inf; a finite pivot keeps -inf - -inf (NaN) out of exp2.
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def start(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The state before any key."""
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return m, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@triton.jit
def step(m, l, acc, scores, v):
    """Go on with a tile of keys. scores [rows, keys] fp32, base 2, -inf where masked; v [keys, head_dim], 0 where masked."""
    m_new = tl.maximum(m, tl.max(scores, 1))
    at = pivot(m_new)
    p = tl.exp2(scores - at[:, None])
    alpha = tl.exp2(m - at)

    l = tl.fma(l, alpha, tl.sum(p, 1))
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l, acc


@triton.jit
def fold(m, l, acc, m_next, l_next, acc_next):
    """State of [a, b) and state of [b, c) -> state of [a, c). Always left to right: order is part of the result."""
    m_new = tl.maximum(m, m_next)
    at = pivot(m_new)
    a, b = tl.exp2(m - at), tl.exp2(m_next - at)
    # The fma is written out: left to the compiler, one call site may contract and another not.
    return m_new, tl.fma(l, a, l_next * b), tl.fma(acc, a[:, None], acc_next * b[:, None])


@triton.jit
def finish(m, l, acc):
    """(o, lse): o fp32, lse natural logarithm; 0 and -inf where no key was seen."""
    # Compared with 0 alone, so that NaN stays NaN.
    unseen = l == 0
    divisor = tl.where(unseen, 1.0, l)
    # A tile of keys that a row does not see leaves its state as it is, but for -0.0 that becomes 0.0; + 0.0 makes all
    # zeros alike, so that the output cannot tell how many such tiles there were.
    o = tl.where(unseen[:, None], 0.0, acc / divisor[:, None]) + 0.0
    return o, tl.where(unseen, float("-inf"), (m + tl.log2(divisor)) * LN2)


@triton.jit
def load(
    m_ptr,
    l_ptr,
    acc_ptr,
    first,
    count,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """State of `count` rows from row `first` (64 bits) on; the rows after them are empty states."""
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None] & (dims < HEAD_DIM)[None, :]
    m = tl.load(m_ptr + first + rows, mask=rows < count, other=float("-inf"))
    l = tl.load(l_ptr + first + rows, mask=rows < count, other=0.0)
    # One 64-bit base and 32-bit offsets: 64-bit offsets for each row spill beside K1's accumulator.
    acc = tl.load(acc_ptr + first * HEAD_DIM + (rows[:, None] * HEAD_DIM + dims[None, :]), mask=inside, other=0.0)
    return m, l, acc


@triton.jit
def store(
    m_ptr,
    l_ptr,
    acc_ptr,
    first,
    count,
    m,
    l,
    acc,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`count` rows of a state to row `first` (64 bits) on."""
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(m_ptr + first + rows, m, mask=rows < count)
    tl.store(l_ptr + first + rows, l, mask=rows < count)
    tl.store(acc_ptr + first * HEAD_DIM + (rows[:, None] * HEAD_DIM + dims[None, :]), acc, mask=inside)
