"""K0, append: scatter this step's K and V to the suffix pages of their agents, and pack Q by kv head.

    position = seq_lens[slot] - 1 - row_back          seq_lens counts this step's rows already
    pages[page_table[slot, position // 16], :, position % 16] = row
    packed[h, t, g] = q[t, h * G + g]

grid     (rows), one program a row, all heads
q        [T, num_qo_heads, head_dim], k and v [T or 0, num_kv_heads, head_dim]; any strides but the last, which is 1
packed   [num_kv_heads, T, G, head_dim], contiguous: K1 and K2 find the rows of a kv head side by side, as TMA needs them
pages    [num_pages, num_kv_heads, 16, head_dim] by strides (page, head, token)

`append_fused` does the same to what the projections give: q and k first pass their norm and RoPE, all of it in fp32 and rounded
once, so that its error in 16 bits is below that of steps that each round.

    y = x * rsqrt(mean(x ** 2) + eps) * weight        over a head, the norm of Qwen3
    out = y * cos + rotate_half(y) * sin              cos and sin [T, head_dim], halves as transformers has them

Bound by its launch: a row moves 4 KB for 8 heads of 128 in 16 bit. A row of slot -1 writes nothing. Speed not measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvkern.geometry import PAGE, next_power_of_2
from kvkern.kernels.state import ROUNDING
from kvkern.kernels.tiles import on, switches


@triton.jit
def after_the_kernel_before(PDL: tl.constexpr):
    """With programmatic dependent launch: wait for the kernel ahead, and let K1 begin, which waits for this one in its turn."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def place_of(
    row,
    slot,
    page_table_ptr,
    seq_lens_ptr,
    row_back_ptr,
    stride_table,
    num_slots,
    num_pages,
    capacity,
    PAGE: tl.constexpr,
    DEBUG: tl.constexpr,
):
    """Page and token in it (64 bits) of a row of this slot."""
    if DEBUG:
        tl.device_assert(slot < num_slots, "row_slot: slot out of range")
    position = tl.load(seq_lens_ptr + slot) - 1 - tl.load(row_back_ptr + row)
    if DEBUG:
        tl.device_assert((position >= 0) & (position < capacity), "row_back: a position outside the page table")
    page = tl.load(page_table_ptr + slot * stride_table + position // PAGE).to(tl.int64)
    if DEBUG:
        tl.device_assert((page >= 0) & (page < num_pages), "page_table: page out of range")
    return page, (position % PAGE).to(tl.int64)


@triton.jit(do_not_specialize=["rows", "kv_rows", "num_slots", "num_pages", "capacity"])
def append_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    packed_ptr,
    k_pages_ptr,
    v_pages_ptr,
    page_table_ptr,
    seq_lens_ptr,
    row_slot_ptr,
    row_back_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_kp,
    stride_kph,
    stride_kpt,
    stride_vp,
    stride_vph,
    stride_vpt,
    stride_table,
    rows,
    kv_rows,
    num_slots,
    num_pages,
    capacity,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEBUG: tl.constexpr,
    PDL: tl.constexpr,
):
    after_the_kernel_before(PDL)
    row = tl.program_id(0).to(tl.int64)

    # [query heads, head_dim]
    heads = tl.arange(0, BLOCK_Q).to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    inside = (heads < HEADS * G) & (dims < HEAD_DIM)
    q = tl.load(q_ptr + row * stride_qt + heads * stride_qh + dims, mask=inside)
    packed = ((heads // G * rows + row) * G + heads % G) * HEAD_DIM
    tl.store(packed_ptr + packed + dims, q, mask=inside)

    if row >= kv_rows:
        return
    slot = tl.load(row_slot_ptr + row).to(tl.int64)
    if slot < 0:
        return
    page, token = place_of(
        row, slot, page_table_ptr, seq_lens_ptr, row_back_ptr, stride_table, num_slots, num_pages, capacity, PAGE, DEBUG
    )

    # [heads, head_dim]
    heads = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    inside = (heads < HEADS) & (dims < HEAD_DIM)
    k = tl.load(k_ptr + row * stride_kt + heads * stride_kh + dims, mask=inside)
    v = tl.load(v_ptr + row * stride_vt + heads * stride_vh + dims, mask=inside)

    tl.store(k_pages_ptr + page * stride_kp + heads * stride_kph + token * stride_kpt + dims, k, mask=inside)
    tl.store(v_pages_ptr + page * stride_vp + heads * stride_vph + token * stride_vpt + dims, v, mask=inside)


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    row_slot: Tensor,
    row_back: Tensor,
) -> Tensor:
    """Scatter k and v, [T, num_kv_heads, head_dim] or no rows at all, to their agents' pages; rows with slot -1 write nothing.

    Returns q, [T, num_qo_heads, head_dim], packed as [num_kv_heads, T, G, head_dim].
    """
    rows, num_qo_heads, head_dim = q.shape
    kv_rows, heads, _ = k.shape
    G = num_qo_heads // heads
    packed = torch.empty((heads, rows, G, head_dim), dtype=q.dtype, device=q.device)
    with on(q.device):
        append_kernel[(rows,)](
            q,
            k,
            v,
            packed,
            k_pages,
            v_pages,
            page_table,
            seq_lens,
            row_slot,
            row_back,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *k_pages.stride()[:3],
            *v_pages.stride()[:3],
            page_table.stride(0),
            rows,
            kv_rows,
            page_table.shape[0],
            k_pages.shape[0],
            page_table.shape[1] * PAGE,
            G=G,
            HEADS=heads,
            HEAD_DIM=head_dim,
            PAGE=PAGE,
            BLOCK_Q=next_power_of_2(num_qo_heads),
            BLOCK_H=next_power_of_2(heads),
            BLOCK_D=next_power_of_2(head_dim),
            num_warps=4,
            **switches(q.device),
            **ROUNDING,
        )
    return packed


@triton.jit
def norm_rope(x_ptr, weight_ptr, cos_ptr, sin_ptr, heads, stride_h, eps, inside, HEAD_DIM: tl.constexpr, dims):
    """Heads of one row, [heads, head_dim], normed and turned, in fp32."""
    HALF: tl.constexpr = HEAD_DIM // 2
    valid = dims < HEAD_DIM
    # rotate_half by a second load of the same lines: a shuffle between the lanes of a padded head is no cheaper.
    partner = tl.where(dims < HALF, dims + HALF, dims - HALF)
    x = tl.load(x_ptr + heads * stride_h + dims, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + heads * stride_h + partner, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + dims, mask=valid, other=0.0).to(tl.float32)
    weight_other = tl.load(weight_ptr + partner, mask=valid, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + dims, mask=valid, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + dims, mask=valid, other=0.0).to(tl.float32)

    scale = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
    y = x * scale * weight
    y_other = other * scale * weight_other
    return tl.fma(y, cos, tl.where(dims < HALF, -y_other, y_other) * sin)


@triton.jit(do_not_specialize=["rows", "q_eps", "k_eps", "num_slots", "num_pages", "capacity"])
def append_fused_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    packed_ptr,
    k_pages_ptr,
    v_pages_ptr,
    page_table_ptr,
    seq_lens_ptr,
    row_slot_ptr,
    row_back_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ct,
    stride_st,
    stride_kp,
    stride_kph,
    stride_kpt,
    stride_vp,
    stride_vph,
    stride_vpt,
    stride_table,
    rows,
    q_eps,
    k_eps,
    num_slots,
    num_pages,
    capacity,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEBUG: tl.constexpr,
    PDL: tl.constexpr,
):
    after_the_kernel_before(PDL)
    row = tl.program_id(0).to(tl.int64)
    cos_ptr += row * stride_ct
    sin_ptr += row * stride_st

    # [query heads, head_dim]
    heads = tl.arange(0, BLOCK_Q).to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    inside = (heads < HEADS * G) & (dims < HEAD_DIM)
    q = norm_rope(
        q_ptr + row * stride_qt, q_norm_ptr, cos_ptr, sin_ptr, heads, stride_qh, q_eps, inside, HEAD_DIM, dims
    )
    packed = ((heads // G * rows + row) * G + heads % G) * HEAD_DIM
    tl.store(packed_ptr + packed + dims, q.to(packed_ptr.dtype.element_ty), mask=inside)

    slot = tl.load(row_slot_ptr + row).to(tl.int64)
    if slot < 0:
        return
    page, token = place_of(
        row, slot, page_table_ptr, seq_lens_ptr, row_back_ptr, stride_table, num_slots, num_pages, capacity, PAGE, DEBUG
    )

    # [heads, head_dim]
    heads = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    inside = (heads < HEADS) & (dims < HEAD_DIM)
    k = norm_rope(
        k_ptr + row * stride_kt, k_norm_ptr, cos_ptr, sin_ptr, heads, stride_kh, k_eps, inside, HEAD_DIM, dims
    )
    v = tl.load(v_ptr + row * stride_vt + heads * stride_vh + dims, mask=inside)
    k_page, v_page = k_pages_ptr + page * stride_kp, v_pages_ptr + page * stride_vp
    tl.store(k_page + heads * stride_kph + token * stride_kpt + dims, k.to(k_pages_ptr.dtype.element_ty), mask=inside)
    tl.store(v_page + heads * stride_vph + token * stride_vpt + dims, v, mask=inside)


def append_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    row_slot: Tensor,
    row_back: Tensor,
    *,
    q_eps: float,
    k_eps: float,
) -> Tensor:
    """`append` of q and k as the projections give them: norm of each head by weights [head_dim], RoPE by cos and sin
    [T, head_dim], then scatter and pack, in one launch.

    Returns q packed as [num_kv_heads, T, G, head_dim].
    """
    rows, num_qo_heads, head_dim = q.shape
    heads = k.shape[1]
    G = num_qo_heads // heads
    packed = torch.empty((heads, rows, G, head_dim), dtype=q.dtype, device=q.device)
    with on(q.device):
        append_fused_kernel[(rows,)](
            q,
            k,
            v,
            q_norm,
            k_norm,
            cos,
            sin,
            packed,
            k_pages,
            v_pages,
            page_table,
            seq_lens,
            row_slot,
            row_back,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            cos.stride(0),
            sin.stride(0),
            *k_pages.stride()[:3],
            *v_pages.stride()[:3],
            page_table.stride(0),
            rows,
            q_eps,
            k_eps,
            page_table.shape[0],
            k_pages.shape[0],
            page_table.shape[1] * PAGE,
            G=G,
            HEADS=heads,
            HEAD_DIM=head_dim,
            PAGE=PAGE,
            BLOCK_Q=next_power_of_2(num_qo_heads),
            BLOCK_H=next_power_of_2(heads),
            BLOCK_D=next_power_of_2(head_dim),
            num_warps=4,
            **switches(q.device),
            **ROUNDING,
        )
    return packed
