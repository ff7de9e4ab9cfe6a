"""K2, suffix attention: fold the states that K1 left along each row's path, go on causally over the agent's pages, finish.

    total = fold of the path's states; then the suffix's keys 0 .. seq_len - 1 - row_back; o = acc / l, lse = ln(2^m l)

grid          (suffix tiles, kv heads)
suffix_tiles  int32 (slot, row begin, row end, path): rows of one agent, tokens * G of them packed, at most BLOCK_M
path_table    int32 [paths, S]: 1 = this state slot starts a node, 2 = continues it, 0 = no more
pages         [num_pages, num_kv_heads, 16, head_dim] by strides (page, head, token), through page_table[slot]
q             [num_kv_heads, T, G, head_dim], contiguous
states        m, l [S, num_kv_heads, T * G], acc [S, num_kv_heads, T * G, head_dim], fp32
o, lse        [T, num_qo_heads, head_dim] of q's dtype, [T, num_qo_heads] fp32, natural logarithm

The fold: a node's states left to right, then the nodes along the path, the first one as it is. The suffix's first 1,024
tokens go on from that total; each later 1,024 start afresh and are folded in order. A row that ends before its tile does
sees whole tiles masked, which leave its state as it is.

Bound by reading the agent's pages, each once for G query heads. Untuned and not measured: page ids are loaded in the loop,
which lets the compiler keep one tile in flight where carrying them would keep two; no split of a long suffix over programs.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvkern.geometry import PAGE, SUFFIX_SEGMENT, next_power_of_2
from kvkern.kernels.state import ROUNDING, finish, fold, load, start, step
from kvkern.kernels.tiles import arch_of, on, tiles
from kvkern.plain import State

LOG2E = math.log2(math.e)


@triton.jit
def path_state(
    path_ptr,
    num_states,
    m_ptr,
    l_ptr,
    acc_ptr,
    first,
    stride_state,
    count,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The path's states in one: within a node over its segments, then along the path over its nodes."""
    m, l, acc = start(BLOCK_M, BLOCK_D)
    m_node, l_node, acc_node = start(BLOCK_M, BLOCK_D)
    nodes = 0
    for slot in range(num_states):
        flag = tl.load(path_ptr + slot)
        if flag > 0:
            place = first + tl.cast(slot, tl.int64) * stride_state
            m_new, l_new, acc_new = load(m_ptr, l_ptr, acc_ptr, place, count, HEAD_DIM, BLOCK_M, BLOCK_D)
            if flag == 2:
                m_node, l_node, acc_node = fold(m_node, l_node, acc_node, m_new, l_new, acc_new)
            else:
                m, l, acc = add_node(nodes, m, l, acc, m_node, l_node, acc_node)
                m_node, l_node, acc_node = m_new, l_new, acc_new
                nodes += 1
    return add_node(nodes, m, l, acc, m_node, l_node, acc_node)


@triton.jit
def add_node(nodes, m, l, acc, m_node, l_node, acc_node):
    """The total with the last of `nodes` nodes; the first one is the total as it is, not folded with an empty state."""
    if nodes == 1:
        m, l, acc = m_node, l_node, acc_node
    elif nodes > 1:
        m, l, acc = fold(m, l, acc, m_node, l_node, acc_node)
    return m, l, acc


@triton.jit(do_not_specialize=["packed_rows", "num_states"])
def suffix_kernel(
    q_ptr,
    k_pages_ptr,
    v_pages_ptr,
    page_table_ptr,
    seq_lens_ptr,
    row_slot_ptr,
    row_back_ptr,
    tiles_ptr,
    path_table_ptr,
    m_ptr,
    l_ptr,
    acc_ptr,
    o_ptr,
    lse_ptr,
    stride_kp,
    stride_kh,
    stride_kt,
    stride_vp,
    stride_vh,
    stride_vt,
    stride_table,
    packed_rows,
    num_states,
    qk_scale,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    slot = tl.load(tile_ptr).to(tl.int64)
    row_begin, row_end = tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    if row_begin >= row_end:
        return
    path = tl.load(tile_ptr + 3).to(tl.int64)

    # Packed rows, each with the number of suffix tokens it sees; the tile's last token sees most.
    rows = row_begin * G + tl.arange(0, BLOCK_M)
    in_tile = rows < row_end * G
    tokens, heads = rows // G, head * G + rows % G
    dims = tl.arange(0, BLOCK_D)
    inside = in_tile[:, None] & (dims < HEAD_DIM)[None, :]
    seq_len = tl.load(seq_lens_ptr + slot)
    lengths = seq_len - tl.load(row_back_ptr + tokens, mask=in_tile, other=0)
    longest = seq_len - tl.load(row_back_ptr + row_end - 1)
    table_ptr = page_table_ptr + slot * stride_table
    k_ptr = k_pages_ptr + head.to(tl.int64) * stride_kh
    v_ptr = v_pages_ptr + head.to(tl.int64) * stride_vh

    # q [rows, head_dim]
    q_ptrs = q_ptr + (head.to(tl.int64) * packed_rows + rows)[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptrs, mask=inside, other=0.0)

    path_ptr = path_table_ptr + path * num_states
    stride_state = num_kv_heads.to(tl.int64) * packed_rows
    place = head.to(tl.int64) * packed_rows + row_begin * G
    count = (row_end - row_begin) * G
    m_total, l_total, acc_total = path_state(
        path_ptr, num_states, m_ptr, l_ptr, acc_ptr, place, stride_state, count, HEAD_DIM, BLOCK_M, BLOCK_D
    )

    for segment in range(0, longest, SEGMENT):
        m, l, acc = start(BLOCK_M, BLOCK_D)
        if segment == 0:
            m, l, acc = m_total, l_total, acc_total
        for first in range(segment, tl.minimum(segment + SEGMENT, longest), BLOCK_N):
            # Entries and tokens past the length may hold anything: no index from them, and no product with them.
            keys = first + tl.arange(0, BLOCK_N)
            written = keys < longest
            page = tl.load(table_ptr + keys // PAGE, mask=written, other=0).to(tl.int64)
            token = (keys % PAGE).to(tl.int64)
            here = written[:, None] & (dims < HEAD_DIM)[None, :]
            k_ptrs = k_ptr + (page * stride_kp + token * stride_kt)[:, None] + dims[None, :]
            scores = tl.dot(q, tl.trans(tl.load(k_ptrs, mask=here, other=0.0)), input_precision="ieee") * qk_scale
            scores = tl.where(keys[None, :] < lengths[:, None], scores, float("-inf"))
            v_ptrs = v_ptr + (page * stride_vp + token * stride_vt)[:, None] + dims[None, :]
            m, l, acc = step(m, l, acc, scores, tl.load(v_ptrs, mask=here, other=0.0))
        if segment == 0:
            m_total, l_total, acc_total = m, l, acc
        else:
            m_total, l_total, acc_total = fold(m_total, l_total, acc_total, m, l, acc)

    o, lse = finish(m_total, l_total, acc_total)
    live = in_tile & (tl.load(row_slot_ptr + tokens, mask=in_tile, other=-1) >= 0)
    out = tokens.to(tl.int64) * (num_kv_heads * G) + heads
    o_ptrs = o_ptr + out[:, None] * HEAD_DIM + dims[None, :]
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=inside & live[:, None])
    tl.store(lse_ptr + out, lse, mask=live)


def suffix_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    row_slot: Tensor,
    row_back: Tensor,
    suffix_tiles: Tensor,
    path_table: Tensor,
    state: State,
    *,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    """Fold the states of each row's path, go on causally over its agent's pages, and finish.

    q [num_kv_heads, T, G, head_dim], as `append` packs it. Returns o [T, num_kv_heads * G, head_dim] of q's dtype and lse
    [T, num_kv_heads * G] fp32, natural logarithm; 0 and -inf for padding rows.
    """
    num_kv_heads, rows, G, head_dim = q.shape
    num_qo_heads = num_kv_heads * G
    # No tile holds the padding rows, so their output is written here.
    o = torch.zeros((rows, num_qo_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.full((rows, num_qo_heads), -math.inf, dtype=torch.float32, device=q.device)
    tile = tiles(head_dim, G, q.dtype, arch_of(q.device)).suffix
    with on(q.device):
        suffix_kernel[(suffix_tiles.shape[0], num_kv_heads)](
            q,
            k_pages,
            v_pages,
            page_table,
            seq_lens,
            row_slot,
            row_back,
            suffix_tiles,
            path_table,
            *state,
            o,
            lse,
            *k_pages.stride()[:3],
            *v_pages.stride()[:3],
            page_table.stride(0),
            rows * G,
            path_table.shape[1],
            sm_scale * LOG2E,
            G=G,
            HEAD_DIM=head_dim,
            PAGE=PAGE,
            SEGMENT=SUFFIX_SEGMENT,
            BLOCK_D=next_power_of_2(head_dim),
            **tile.options(),
            **ROUNDING,
        )
    return o, lse
