"""K1, prefix attention: every row against the segments of its path's nodes; no mask, a prefix is visible to all.

    state[s] = softmax state of q K^T * sm_scale over V, for the keys of one segment, or of a walk of segments

grid        (row tiles of an item, work items, kv heads): an item has at most plan.PREFIX_BLOCK_M packed rows, or one token
q           [num_kv_heads, T, G, head_dim], contiguous: packed row r of a kv head is token r // G, query head r % G of its group
node_table  int64 (address, P, padded P, tokens in a segment): K and V lie at [layer, 2, num_kv_heads, padded P, head_dim]
items       int32 (node, row begin, row end, segment begin, segment end, state)
states      m, l [S, num_kv_heads, T * G], acc [S, num_kv_heads, T * G, head_dim], fp32

A walk from segment 0 folds as it goes and leaves one state in slot `state`, where it also keeps its total between segments:
registers have no room for it, and 128 rows move 128 KB there where the segment's keys and values move 512. A later walk
leaves each segment's own state in a slot of its own, since the fold is not associative.

Bound by the tensor cores from about 50 agents of 4 query heads a kv head, by reading K and V below (both by arithmetic).
Untuned: loads are pointers, not TMA, and nothing was measured.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvkern.geometry import next_power_of_2
from kvkern.kernels.state import ROUNDING, fold, load, start, step, store
from kvkern.kernels.tiles import arch_of, on, tiles
from kvkern.plain import State
from kvkern.plan import PREFIX_BLOCK_M

LOG2E = math.log2(math.e)


@triton.jit
def load_tile(ptr, dims, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr):
    """[keys, head_dim] of contiguous keys from `ptr`; the block is padded, so a tile is always whole."""
    keys = tl.arange(0, BLOCK_N)
    ptrs = ptr + keys[:, None] * HEAD_DIM + dims[None, :]
    # A mask that is always true would still be code.
    if dims.shape[0] == HEAD_DIM:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=["packed_rows", "layer"])
def prefix_kernel(
    q_ptr,
    node_table_ptr,
    items_ptr,
    m_ptr,
    l_ptr,
    acc_ptr,
    packed_rows,
    layer,
    qk_scale,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, num_kv_heads = tl.program_id(2), tl.num_programs(2)
    item_ptr = items_ptr + tl.program_id(1) * 6
    row_begin = tl.load(item_ptr + 1) * G + tl.program_id(0) * BLOCK_M
    row_end = tl.load(item_ptr + 2) * G
    if row_begin >= row_end:
        return
    seg_begin, seg_end = tl.load(item_ptr + 3), tl.load(item_ptr + 4)
    state = tl.load(item_ptr + 5)

    # The node's keys and values of this layer and head.
    node_ptr = node_table_ptr + tl.load(item_ptr).to(tl.int64) * 4
    tokens, padded = tl.load(node_ptr + 1).to(tl.int32), tl.load(node_ptr + 2)
    segment = tl.load(node_ptr + 3).to(tl.int32)
    # The compiler cannot see that an address from memory is aligned; untold, it loads element by element.
    block_ptr = tl.multiple_of(tl.load(node_ptr).to(tl.pointer_type(q_ptr.dtype.element_ty)), 16)
    layer = tl.cast(layer, tl.int64)
    k_ptr = block_ptr + ((2 * layer) * num_kv_heads + head) * padded * HEAD_DIM
    v_ptr = block_ptr + ((2 * layer + 1) * num_kv_heads + head) * padded * HEAD_DIM

    # q [rows, head_dim]
    rows = row_begin + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    in_item = rows < row_end
    first_ptr = q_ptr + (head.to(tl.int64) * packed_rows + row_begin) * HEAD_DIM
    offsets = tl.arange(0, BLOCK_M)[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(first_ptr + offsets, mask=in_item[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)

    for seg in range(seg_begin, seg_end):
        begin = seg * segment
        end = tl.minimum(begin + segment, tokens)
        whole = begin + (end - begin) // BLOCK_N * BLOCK_N
        m, l, acc = start(BLOCK_M, BLOCK_D)
        for first in range(begin, whole, BLOCK_N):
            offset = tl.cast(first, tl.int64) * HEAD_DIM
            k = load_tile(k_ptr + offset, dims, HEAD_DIM, BLOCK_N)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
            v = load_tile(v_ptr + offset, dims, HEAD_DIM, BLOCK_N)
            m, l, acc = step(m, l, acc, scores, v)
        # The last tile apart: its pad keys are zeros, and a score of 0 is not "unseen".
        if whole < end:
            offset = whole.to(tl.int64) * HEAD_DIM
            k = load_tile(k_ptr + offset, dims, HEAD_DIM, BLOCK_N)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
            scores = tl.where((whole + tl.arange(0, BLOCK_N) < end)[None, :], scores, float("-inf"))
            v = load_tile(v_ptr + offset, dims, HEAD_DIM, BLOCK_N)
            m, l, acc = step(m, l, acc, scores, v)

        slot = tl.where(seg_begin == 0, state, state + seg - seg_begin)
        place = (slot.to(tl.int64) * num_kv_heads + head) * packed_rows + row_begin
        count = row_end - row_begin
        if seg_begin == 0 and seg > 0:
            # What other threads of this program stored for the segment before is visible only after a barrier.
            tl.debug_barrier()
            m_total, l_total, acc_total = load(m_ptr, l_ptr, acc_ptr, place, count, HEAD_DIM, BLOCK_M, BLOCK_D)
            m, l, acc = fold(m_total, l_total, acc_total, m, l, acc)
            tl.debug_barrier()
        store(m_ptr, l_ptr, acc_ptr, place, count, m, l, acc, HEAD_DIM, BLOCK_M, BLOCK_D)


def prefix_attention(
    q: Tensor,
    node_table: Tensor,
    items: Tensor,
    path_table: Tensor,
    *,
    num_kv_heads: int,
    layer: int,
    sm_scale: float,
) -> State:
    """Every row against the segments of its path's nodes, no mask.

    q [num_kv_heads, T, G, head_dim], as `append` packs it. Returns m, l [S, num_kv_heads, T * G] and acc
    [S, num_kv_heads, T * G, head_dim], fp32; packed row = token * G + g. Slots that no work item fills are left as they come.
    """
    _, rows, G, head_dim = q.shape
    shape = (path_table.shape[1], num_kv_heads, rows * G)
    m = torch.empty(shape, dtype=torch.float32, device=q.device)
    l = torch.empty(shape, dtype=torch.float32, device=q.device)
    acc = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    tile = tiles(head_dim, G, q.dtype, arch_of(q.device)).prefix
    grid = (triton.cdiv(max(PREFIX_BLOCK_M, G), tile.BLOCK_M), items.shape[0], num_kv_heads)
    with on(q.device):
        prefix_kernel[grid](
            q,
            node_table,
            items,
            m,
            l,
            acc,
            rows * G,
            layer,
            sm_scale * LOG2E,
            G=G,
            HEAD_DIM=head_dim,
            BLOCK_D=next_power_of_2(head_dim),
            **tile.options(),
            **ROUNDING,
        )
    return State(m, l, acc)
