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
From sm_90 on, K and V come by tensor descriptors that each program makes from the node table's
addresses (256 B of memory a program); before, and for fp32, by pointers.

On sm_90, in 16 bits, a step of more than SMALL_ROWS packed rows runs the kernel of prefix_hopper, which has the same bits.
KVKERN_PREFIX=plain or =hopper chooses one for all, KVKERN_DEBUG=1 checks work items, KVKERN_PDL=1 is in tiles; both of these
are of the plain kernel.
"""

import importlib
import math
import os
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvkern.errors import BackendError
from kvkern.geometry import next_power_of_2
from kvkern.kernels.state import ROUNDING, fold, load, start, step, store
from kvkern.kernels.tiles import arch_of, debug, dependent_launch, descriptors, on, scratch, switches, tiles
from kvkern.plain import State
from kvkern.plan import PREFIX_BLOCK_M

LOG2E = math.log2(math.e)

SMALL_ROWS = 64
"""Packed rows of a step up to which the small form serves: no item can have more, and half of a large tile would be empty."""


@triton.jit
def source(
    ptr, padded, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """What load_tile reads keys from: a descriptor of [padded, head_dim], or the pointer as it is."""
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(ptr, [padded.to(tl.int32), HEAD_DIM], [HEAD_DIM, 1], [BLOCK_N, BLOCK_D])
    else:
        return ptr


@triton.jit
def load_tile(
    keys_of,
    first,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """[keys, head_dim] of contiguous keys from key `first` on; the block is padded, so a tile is always whole."""
    if DESCRIPTORS:
        return keys_of.load([first, 0])
    else:
        keys, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        ptrs = keys_of + tl.cast(first, tl.int64) * HEAD_DIM + (keys[:, None] * HEAD_DIM + dims[None, :])
        # A mask that is always true would still be code.
        if BLOCK_D == HEAD_DIM:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def check_item(item_ptr, node_table_ptr, rows, nodes, states):
    """Debug mode: an item names a node, rows, segments of that node, and slots that are there."""
    node, state = tl.load(item_ptr), tl.load(item_ptr + 5)
    begin, end = tl.load(item_ptr + 1), tl.load(item_ptr + 2)
    seg_begin, seg_end = tl.load(item_ptr + 3), tl.load(item_ptr + 4)
    tl.device_assert((node >= 0) & (node < nodes), "work item: node")
    tl.device_assert((begin >= 0) & (begin <= end) & (end <= rows), "work item: rows")
    node_ptr = node_table_ptr + node.to(tl.int64) * 4
    # max: a table's row of zeros has segments of no token, and may have no item that walks any.
    segments = tl.cdiv(tl.load(node_ptr + 1), tl.maximum(tl.load(node_ptr + 3), 1))
    tl.device_assert((seg_begin >= 0) & (seg_begin <= seg_end) & (seg_end <= segments), "work item: segments")
    last = tl.where(seg_begin == 0, state, state + tl.maximum(seg_end - seg_begin - 1, 0))
    tl.device_assert((state >= 0) & (last < states), "work item: state")


@triton.jit(do_not_specialize=["packed_rows", "layer", "nodes", "states"])
def prefix_kernel(
    q_ptr,
    node_table_ptr,
    items_ptr,
    m_ptr,
    l_ptr,
    acc_ptr,
    packed_rows,
    layer,
    nodes,
    states,
    qk_scale,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr = False,
    DEBUG: tl.constexpr = False,
    PDL: tl.constexpr = False,
):
    head, num_kv_heads = tl.program_id(2), tl.num_programs(2)
    item_ptr = items_ptr + tl.program_id(1) * 6
    row_begin = tl.load(item_ptr + 1) * G + tl.program_id(0) * BLOCK_M
    row_end = tl.load(item_ptr + 2) * G
    node = tl.load(item_ptr)
    seg_begin, seg_end = tl.load(item_ptr + 3), tl.load(item_ptr + 4)
    if PDL:
        # Before any return: a launch that ended without waiting would let the next one run ahead of the one before. The
        # next waits in turn for the whole of this one, so it may start as soon as all of these programs have.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if DEBUG:
        check_item(item_ptr, node_table_ptr, packed_rows // G, nodes, states)
    if row_begin >= row_end:
        return

    # The node's keys and values of this layer and head.
    node_ptr = node_table_ptr + node.to(tl.int64) * 4
    tokens, padded = tl.load(node_ptr + 1).to(tl.int32), tl.load(node_ptr + 2)
    segment = tl.load(node_ptr + 3).to(tl.int32)
    # The compiler cannot see that an address from memory is aligned; untold, it loads element by element.
    block_ptr = tl.multiple_of(tl.load(node_ptr).to(tl.pointer_type(q_ptr.dtype.element_ty)), 16)
    layer = tl.cast(layer, tl.int64)
    k_ptr = block_ptr + ((2 * layer) * num_kv_heads + head) * padded * HEAD_DIM
    v_ptr = block_ptr + ((2 * layer + 1) * num_kv_heads + head) * padded * HEAD_DIM
    k_of = source(k_ptr, padded, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
    v_of = source(v_ptr, padded, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)

    # q [rows, head_dim]
    rows = row_begin + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    in_item = rows < row_end
    first_ptr = q_ptr + (head.to(tl.int64) * packed_rows + row_begin) * HEAD_DIM
    offsets = tl.arange(0, BLOCK_M)[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(first_ptr + offsets, mask=in_item[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)

    # Addresses and masks of the store, computed ahead of the loop, would spill (8 to 208 B of stack).
    for seg in tl.range(seg_begin, seg_end, disable_licm=True):
        begin = seg * segment
        end = tl.minimum(begin + segment, tokens)
        whole = begin + (end - begin) // BLOCK_N * BLOCK_N
        m, l, acc = start(BLOCK_M, BLOCK_D)
        for first in range(begin, whole, BLOCK_N):
            k = load_tile(k_of, first, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
            v = load_tile(v_of, first, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
            m, l, acc = step(m, l, acc, scores, v)
        # The last tile apart: its pad keys are zeros, and a score of 0 is not "unseen".
        if whole < end:
            k = load_tile(k_of, whole, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
            scores = tl.where((whole + tl.arange(0, BLOCK_N) < end)[None, :], scores, float("-inf"))
            v = load_tile(v_of, whole, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
            m, l, acc = step(m, l, acc, scores, v)

        # Read again, so that nothing that only the store needs is kept in a register, or on the stack, all through the loop.
        row_begin = tl.load(item_ptr + 1) * G + tl.program_id(0) * BLOCK_M
        count = tl.load(item_ptr + 2) * G - row_begin
        slot = tl.where(seg_begin == 0, 0, seg - seg_begin) + tl.load(item_ptr + 5)
        place = (slot.to(tl.int64) * num_kv_heads + head) * packed_rows + row_begin
        if seg_begin == 0 and seg > 0:
            # What other threads of this program stored for the segment before is visible only after a barrier.
            tl.debug_barrier()
            m_total, l_total, acc_total = load(m_ptr, l_ptr, acc_ptr, place, count, HEAD_DIM, BLOCK_M, BLOCK_D)
            m, l, acc = fold(m_total, l_total, acc_total, m, l, acc)
            tl.debug_barrier()
        store(m_ptr, l_ptr, acc_ptr, place, count, m, l, acc, HEAD_DIM, BLOCK_M, BLOCK_D)


def forms(head_dim: int, G: int, dtype: torch.dtype, arch: int) -> dict[str, dict[str, int]]:
    """Every form of K1 that a launch may take on this architecture, by name: its constants and launch options."""
    chosen = tiles(head_dim, G, dtype, arch)
    small = chosen.prefix_small or chosen.prefix
    by = {"DESCRIPTORS": descriptors(dtype, arch)}
    return {"large": chosen.prefix.options() | by, "small": small.options() | by}


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
    hopper = _hopper(q)
    if hopper is not None:
        return hopper(q, node_table, items, path_table, layer=layer, sm_scale=sm_scale)
    _, rows, G, head_dim = q.shape
    shape = (path_table.shape[1], num_kv_heads, rows * G)
    m = torch.empty(shape, dtype=torch.float32, device=q.device)
    l = torch.empty(shape, dtype=torch.float32, device=q.device)
    acc = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    form = forms(head_dim, G, q.dtype, arch_of(q.device))["small" if rows * G <= SMALL_ROWS else "large"]
    grid = (triton.cdiv(max(PREFIX_BLOCK_M, G), form["BLOCK_M"]), items.shape[0], num_kv_heads)
    with on(q.device), scratch(q.device):
        prefix_kernel[grid](
            q,
            node_table,
            items,
            m,
            l,
            acc,
            rows * G,
            layer,
            node_table.shape[0],
            path_table.shape[1],
            sm_scale * LOG2E,
            G=G,
            HEAD_DIM=head_dim,
            BLOCK_D=next_power_of_2(head_dim),
            **form,
            **switches(q.device),
            **ROUNDING,
        )
    return State(m, l, acc)


def _hopper(q: Tensor) -> Callable[..., State] | None:
    """The kernel of prefix_hopper, where KVKERN_PREFIX or the step asks for it and it serves; None: the plain one."""
    choice = os.environ.get("KVKERN_PREFIX")
    if choice == "plain" or (choice is None and not _large(q)):
        return None
    if choice not in (None, "hopper"):
        raise BackendError(
            "KVKERN_PREFIX", found=choice, needed="plain, hopper, or no such variable", do="unset it: the step decides"
        )
    prefix_hopper = importlib.import_module("kvkern.kernels.prefix_hopper")
    reason = prefix_hopper.why_not(q.device, q.dtype, q.shape[-1])
    if reason is not None and choice is not None:
        raise BackendError("KVKERN_PREFIX", found=f"hopper: {reason}", needed="what that kernel serves", do="unset it")
    run: Callable[..., State] | None = prefix_hopper.prefix_attention_hopper if reason is None else None
    return run


def _large(q: Tensor) -> bool:
    """Whether a step on a GPU is one for the kernel of prefix_hopper, which knows no debug mode and no dependent launch."""
    _, rows, G, _ = q.shape
    return q.is_cuda and rows * G > SMALL_ROWS and G <= PREFIX_BLOCK_M and not (debug() or dependent_launch(q.device))
