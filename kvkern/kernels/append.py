"""K0, append: scatter this step's K and V to the suffix pages of their agents, and pack Q by kv head.

    position = seq_lens[slot] - 1 - row_back          seq_lens counts this step's rows already
    pages[page_table[slot, position // 16], :, position % 16] = row
    packed[h, t, g] = q[t, h * G + g]

grid     (rows), one program a row, all heads
q        [T, num_qo_heads, head_dim], k and v [T or 0, num_kv_heads, head_dim]; any strides but the last, which is 1
packed   [num_kv_heads, T, G, head_dim], contiguous: K1 and K2 find the rows of a kv head side by side, as TMA needs them
pages    [num_pages, num_kv_heads, 16, head_dim] by strides (page, head, token)

Bound by its launch: a row moves 4 KB for 8 heads of 128 in 16 bit. A row of slot -1 writes nothing. Speed not measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvkern.geometry import PAGE, next_power_of_2
from kvkern.kernels.tiles import on


@triton.jit(do_not_specialize=["rows", "kv_rows"])
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
    G: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
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
    position = tl.load(seq_lens_ptr + slot) - 1 - tl.load(row_back_ptr + row)
    page = tl.load(page_table_ptr + slot * stride_table + position // PAGE).to(tl.int64)
    token = (position % PAGE).to(tl.int64)

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
            G=G,
            HEADS=heads,
            HEAD_DIM=head_dim,
            PAGE=PAGE,
            BLOCK_Q=next_power_of_2(num_qo_heads),
            BLOCK_H=next_power_of_2(heads),
            BLOCK_D=next_power_of_2(head_dim),
            num_warps=4,
        )
    return packed
