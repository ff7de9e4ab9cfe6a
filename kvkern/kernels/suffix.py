"""K2, suffix attention: fold the states that K1 left along each row's path, go on causally over the agent's pages, finish.

    total = fold of the path's states; then the suffix's keys 0 .. seq_len - 1 - row_back; o = acc / l, lse = ln(2^m l)

grid          (suffix tiles * workers + runs of RUN rows, kv heads)
suffix_tiles  int32 (slot, row begin, row end, path): rows of one agent, tokens * G of them packed, at most BLOCK_M
path_table    int32 [paths, S]: 1 = this state slot starts a node, 2 = continues it, 0 = no more
pages         [num_pages, num_kv_heads, 16, head_dim] by strides (page, head, token), through page_table[slot]
q             [num_kv_heads, T, G, head_dim], contiguous
states        m, l [S, num_kv_heads, T * G], acc [S, num_kv_heads, T * G, head_dim], fp32
o, lse        [T, num_qo_heads, head_dim] of q's dtype, [T, num_qo_heads] fp32, natural logarithm

The fold: a node's states left to right, then the nodes along the path, the first one as it is. The suffix's first 1,024
tokens go on from that total; each later 1,024 start afresh and are folded in order. A row that ends before its tile does
sees whole tiles masked, which leave its state as it is.

Workers: each takes a run of the tile's segments. The first folds as it goes; the others leave each segment's own state in
`m_part`, `l_part`, `acc_part`, laid out as the states with a segment for a slot, because the fold is not associative. The
last to arrive folds them in order, so that the bits are those of one worker.

Rows of slot -1 are padding; whatever tiles there are, the programs after them write 0 and -inf there.

Bound by reading the agent's pages, each once for G query heads. The page ids of the next tile are loaded in this one and
carried: loaded where they are used, they would leave one tile in flight instead of two, which takes 2 to 28 % more on an H100.
"""

import math
from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvkern.geometry import PAGE, SUFFIX_SEGMENT, next_power_of_2
from kvkern.kernels.state import ROUNDING, finish, fold, load, start, step, store
from kvkern.kernels.tiles import arch_of, on, switches, tiles
from kvkern.plain import State
from kvkern.plan import multiprocessors

LOG2E = math.log2(math.e)

RUN = 64
"""Rows that one program looks through for padding."""

COUNTERS = 1 << 18
"""Arrival counters of a device, 1 MB of them."""


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


@triton.jit
def page_ids(table_ptr, first, longest, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pages of the keys from `first` on. Entries past the length may hold anything: none of them becomes an index."""
    keys = first + tl.arange(0, BLOCK_N)
    return tl.load(table_ptr + keys // PAGE, mask=keys < longest, other=0)


@triton.jit
def write_padding(
    o_ptr,
    lse_ptr,
    row_slot_ptr,
    first,
    num_rows,
    head,
    num_kv_heads,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RUN: tl.constexpr,
):
    """0 and -inf where a row of `first` .. first + RUN - 1 has slot -1."""
    dims = tl.arange(0, BLOCK_D)
    for begin in range(first * G, tl.minimum(first + RUN, num_rows) * G, BLOCK_M):
        rows = begin + tl.arange(0, BLOCK_M)
        tokens = rows // G
        mine = tokens < tl.minimum(first + RUN, num_rows)
        padding = mine & (tl.load(row_slot_ptr + tokens, mask=mine, other=0) < 0)
        out = tokens.to(tl.int64) * (num_kv_heads * G) + head * G + rows % G
        o_ptrs = o_ptr + out[:, None] * HEAD_DIM + dims[None, :]
        zeros = tl.zeros([BLOCK_M, BLOCK_D], o_ptr.dtype.element_ty)
        tl.store(o_ptrs, zeros, mask=padding[:, None] & (dims < HEAD_DIM)[None, :])
        tl.store(lse_ptr + out, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=padding)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_tiles",
        "workers",
        "num_states",
        "num_paths",
        "num_slots",
        "num_pages",
        "capacity",
    ]
)
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
    m_part_ptr,
    l_part_ptr,
    acc_part_ptr,
    arrived_ptr,
    o_ptr,
    lse_ptr,
    stride_kp,
    stride_kh,
    stride_kt,
    stride_vp,
    stride_vh,
    stride_vt,
    stride_table,
    num_rows,
    num_tiles,
    workers,
    num_states,
    num_paths,
    num_slots,
    num_pages,
    capacity,
    qk_scale,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SEGMENT: tl.constexpr,
    RUN: tl.constexpr,
    SPLIT: tl.constexpr,
    DEBUG: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    tile, worker = tl.program_id(0), 0
    if SPLIT:
        tile, worker = tile // workers, tile % workers
    if tile >= num_tiles:
        first = (tl.program_id(0) - num_tiles * workers) * RUN
        if PDL:
            # The output's memory may have been that of something which K1 still reads.
            tl.extra.cuda.gdc_wait()
        write_padding(
            o_ptr, lse_ptr, row_slot_ptr, first, num_rows, head, num_kv_heads, G, HEAD_DIM, BLOCK_M, BLOCK_D, RUN
        )
        return
    tile_ptr = tiles_ptr + tile * 4
    slot = tl.load(tile_ptr).to(tl.int64)
    row_begin, row_end = tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    if row_begin >= row_end:
        return
    path = tl.load(tile_ptr + 3).to(tl.int64)
    if DEBUG:
        tl.device_assert((row_begin >= 0) & (row_end <= num_rows), "suffix_tiles: rows outside the step")
        tl.device_assert((row_end - row_begin) * G <= BLOCK_M, "suffix_tiles: more rows than a tile has")
        tl.device_assert((slot >= 0) & (slot < num_slots), "suffix_tiles: slot out of range")
        tl.device_assert((path >= 0) & (path < num_paths), "suffix_tiles: path out of range")

    # Packed rows, each with the number of suffix tokens it sees; the tile's last token sees most.
    rows = row_begin * G + tl.arange(0, BLOCK_M)
    in_tile = rows < row_end * G
    tokens, heads = rows // G, head * G + rows % G
    dims = tl.arange(0, BLOCK_D)
    inside = in_tile[:, None] & (dims < HEAD_DIM)[None, :]
    seq_len = tl.load(seq_lens_ptr + slot)
    lengths = seq_len - tl.load(row_back_ptr + tokens, mask=in_tile, other=0)
    longest = seq_len - tl.load(row_back_ptr + row_end - 1)
    if DEBUG:
        tl.device_assert((seq_len >= 0) & (seq_len <= capacity), "seq_lens: longer than the page table")
    table_ptr = page_table_ptr + slot * stride_table
    k_ptr = k_pages_ptr + head.to(tl.int64) * stride_kh
    v_ptr = v_pages_ptr + head.to(tl.int64) * stride_vh

    # This worker's segments.
    segments = tl.cdiv(tl.maximum(longest, 0), SEGMENT)
    run, seg_begin, seg_end, later = segments, 0, segments, False
    if SPLIT:
        later = worker > 0
        run = tl.maximum(tl.cdiv(segments, workers), 1)
        seg_begin, seg_end = worker * run, tl.minimum((worker + 1) * run, segments)
        if later & (seg_begin >= segments):
            return
    # Tables were there before K0. K1 lets this kernel start only after its own wait, so K0 is done; K1's states, and all
    # that is written below, whose memory K1 may still read as something else, are K1's until here. A program that returned
    # above has not waited, but one that looks for padding always does, so this launch never ends before K1.
    if PDL:
        tl.extra.cuda.gdc_wait()

    # q [rows, head_dim]
    packed_rows = num_rows * G
    q_ptrs = q_ptr + (head.to(tl.int64) * packed_rows + rows)[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptrs, mask=inside, other=0.0)
    token = (tl.arange(0, BLOCK_N) % PAGE).to(tl.int64)
    page = page_ids(table_ptr, seg_begin * SEGMENT, longest, PAGE, BLOCK_N)

    stride_state = num_kv_heads.to(tl.int64) * packed_rows
    place = head.to(tl.int64) * packed_rows + row_begin * G
    count = (row_end - row_begin) * G
    m_total, l_total, acc_total = start(BLOCK_M, BLOCK_D)
    if not later:
        path_ptr = path_table_ptr + path * num_states
        m_total, l_total, acc_total = path_state(
            path_ptr, num_states, m_ptr, l_ptr, acc_ptr, place, stride_state, count, HEAD_DIM, BLOCK_M, BLOCK_D
        )

    # A key tile begins with a page, so a key's place in its page is the same in every tile.
    token = (tl.arange(0, BLOCK_N) % PAGE).to(tl.int64)
    for seg in range(seg_begin, seg_end):
        m, l, acc = start(BLOCK_M, BLOCK_D)
        if seg == 0:
            m, l, acc = m_total, l_total, acc_total
        for first in range(seg * SEGMENT, tl.minimum((seg + 1) * SEGMENT, longest), BLOCK_N):
            # Tokens past the length may hold anything: no product with them.
            keys = first + tl.arange(0, BLOCK_N)
            written = keys < longest
            if DEBUG:
                tl.device_assert((page >= 0) & (page < num_pages), "page_table: page out of range", mask=written)
            here = written[:, None] & (dims < HEAD_DIM)[None, :]
            k_ptrs = k_ptr + (page.to(tl.int64) * stride_kp + token * stride_kt)[:, None] + dims[None, :]
            v_ptrs = v_ptr + (page.to(tl.int64) * stride_vp + token * stride_vt)[:, None] + dims[None, :]
            page = page_ids(table_ptr, first + BLOCK_N, longest, PAGE, BLOCK_N)
            scores = tl.dot(q, tl.trans(tl.load(k_ptrs, mask=here, other=0.0)), input_precision="ieee") * qk_scale
            scores = tl.where(keys[None, :] < lengths[:, None], scores, float("-inf"))
            m, l, acc = step(m, l, acc, scores, tl.load(v_ptrs, mask=here, other=0.0))
        if later:
            at = place + tl.cast(seg, tl.int64) * stride_state
            store(m_part_ptr, l_part_ptr, acc_part_ptr, at, count, m, l, acc, HEAD_DIM, BLOCK_M, BLOCK_D)
        elif seg == 0:
            m_total, l_total, acc_total = m, l, acc
        else:
            m_total, l_total, acc_total = fold(m_total, l_total, acc_total, m, l, acc)

    if SPLIT:
        arrived_ptr += tile * num_kv_heads + head
        if run < segments:
            if not later:
                store(
                    m_part_ptr,
                    l_part_ptr,
                    acc_part_ptr,
                    place,
                    count,
                    m_total,
                    l_total,
                    acc_total,
                    HEAD_DIM,
                    BLOCK_M,
                    BLOCK_D,
                )
            # One thread arrives for its program. The barrier puts the stores of the others before its release; who arrives
            # last acquires what every worker released, and the barrier after it hands that to the other threads.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
            tl.debug_barrier()
            last = arrived == tl.cdiv(segments, run) - 1
            if last:
                # Nobody else comes to this counter: zero again for the next launch.
                tl.store(arrived_ptr, 0)
                m_total, l_total, acc_total = load(
                    m_part_ptr, l_part_ptr, acc_part_ptr, place, count, HEAD_DIM, BLOCK_M, BLOCK_D
                )
                for seg in range(run, segments):
                    at = place + tl.cast(seg, tl.int64) * stride_state
                    m, l, acc = load(m_part_ptr, l_part_ptr, acc_part_ptr, at, count, HEAD_DIM, BLOCK_M, BLOCK_D)
                    m_total, l_total, acc_total = fold(m_total, l_total, acc_total, m, l, acc)
            in_tile = in_tile & last
            inside = inside & last

    o, lse = finish(m_total, l_total, acc_total)
    live = in_tile & (tl.load(row_slot_ptr + tokens, mask=in_tile, other=-1) >= 0)
    out = tokens.to(tl.int64) * (num_kv_heads * G) + heads
    o_ptrs = o_ptr + out[:, None] * HEAD_DIM + dims[None, :]
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=inside & live[:, None])
    tl.store(lse_ptr + out, lse, mask=live)


class _Counters:
    """Zeros that every launch leaves as zeros, so that none has to fill them.

    Each stream has its own, since launches of two streams may run at once. A launch that a graph captures has some in the
    graph's memory, filled by each replay: they go when the graph goes.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.zeros: dict[torch.device, Tensor] = {}
        self.taken: dict[torch.device, int] = {}
        self.of_stream: dict[tuple[torch.device, int], Tensor] = {}

    def get(self, device: torch.device, count: int) -> Tensor | None:
        """`count` counters for a launch on the current stream, or None where there are no more."""
        stream = 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return torch.zeros(count, dtype=torch.int32, device=device)
            stream = torch.cuda.current_stream(device).cuda_stream
        with self.lock:
            mine = self.of_stream.get((device, stream))
            if mine is not None and mine.shape[0] >= count:
                return mine
            if device not in self.zeros:
                self.zeros[device], self.taken[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device), 0
                if device.type == "cuda":
                    # Other streams will use them too.
                    torch.cuda.current_stream(device).synchronize()
            size = next_power_of_2(max(count, 256))
            begin = self.taken[device]
            if begin + size > COUNTERS:
                return None
            self.taken[device] += size
            counters = self.of_stream[device, stream] = self.zeros[device][begin : begin + size]
            return counters


_counters = _Counters()


def _workers(capacity: int, programs: int, processors: int) -> int:
    """Workers for each tile and head: as many as there are multiprocessors for them, and segments in a full suffix.

    It may follow the batch, since the bits do not follow it.
    """
    return max(1, min(triton.cdiv(capacity, SUFFIX_SEGMENT), processors // max(1, programs)))


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
    workers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Fold the states of each row's path, go on causally over its agent's pages, and finish.

    q [num_kv_heads, T, G, head_dim], as `append` packs it. Returns o [T, num_kv_heads * G, head_dim] of q's dtype and lse
    [T, num_kv_heads * G] fp32, natural logarithm; 0 and -inf for padding rows.

    workers: programs among which a tile's segments are shared out, with the same bits whatever their number; None: by the
    segments that the page table has room for, and the multiprocessors that tiles and heads leave idle.
    """
    num_kv_heads, rows, G, head_dim = q.shape
    num_qo_heads, num_tiles = num_kv_heads * G, suffix_tiles.shape[0]
    capacity = page_table.shape[1] * PAGE
    # Not filled: the kernel writes the padding rows too.
    o = torch.empty((rows, num_qo_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, num_qo_heads), dtype=torch.float32, device=q.device)
    tile = tiles(head_dim, G, q.dtype, arch_of(q.device)).suffix
    with on(q.device):
        if workers is None:
            workers = _workers(capacity, num_tiles * num_kv_heads, multiprocessors(q.device))
        arrived = _counters.get(q.device, num_tiles * num_kv_heads) if workers > 1 else None
        # One worker never uses these, but its code is compiled with them all the same.
        part: tuple[Tensor, ...] = tuple(state)
        if arrived is None:
            workers = 1
        else:
            shape = (triton.cdiv(capacity, SUFFIX_SEGMENT), num_kv_heads, rows * G)
            part = tuple(
                torch.empty(size, dtype=torch.float32, device=q.device) for size in (shape, shape, (*shape, head_dim))
            )
        grid = (num_tiles * workers + triton.cdiv(rows, RUN), num_kv_heads)
        suffix_kernel[grid](
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
            *part,
            arrived,
            o,
            lse,
            *k_pages.stride()[:3],
            *v_pages.stride()[:3],
            page_table.stride(0),
            rows,
            num_tiles,
            workers,
            path_table.shape[1],
            path_table.shape[0],
            page_table.shape[0],
            k_pages.shape[0],
            capacity,
            sm_scale * LOG2E,
            G=G,
            HEAD_DIM=head_dim,
            PAGE=PAGE,
            SEGMENT=SUFFIX_SEGMENT,
            RUN=RUN,
            SPLIT=workers > 1,
            BLOCK_D=next_power_of_2(head_dim),
            **tile.options(),
            **switches(q.device),
            **ROUNDING,
        )
    return o, lse
