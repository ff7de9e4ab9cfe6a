"""K1 for Hopper, in Gluon: what `prefix` computes, by one producer warp and two consumer warpgroups.

    producer    K and V tiles by TMA into a ring of STAGES buffers each
    consumers   64 packed rows of a work item each; the softmax of tile n runs while the tensor cores do Q K^T of tile n + 1

A program is persistent: it takes work items one after another, and the ring's count of tiles goes on across items, so the
producer is ahead of the consumers by as many tiles as fit. Inputs, states, tiles of keys, and the order of every operation
on a row are those of `prefix`, hence its bits, as far as the tensor cores give a row the same bits in both.

An operation's rounding is written out as in `state`: a Gluon kernel cannot call a Triton function.

From a prefix's segment to its next the tensor cores do not drain: Q K^T of the one's first tile runs with P V of the other's
last. Bound by the tensor cores, and by power: on an H100 83 % of the rate of a large product at 1,024 agents over 32,768 tokens,
at 1.7 GHz of 1.98 and 620 to 700 W (bench/results/). Beside the GPU's tests its instructions for sm_90 are checked, and this source
is run by a stand-in for Gluon in numpy, under drawn orders; the stand-in knows no layouts, proxies or latencies.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from kvkern.errors import UnsupportedError
from kvkern.kernels.state import ROUNDING
from kvkern.kernels.tiles import arch_of, on, scratch
from kvkern.plain import State
from kvkern.plan import PREFIX_BLOCK_M

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError:
    gluon = None  # type: ignore[assignment]

LOG2E = math.log2(math.e)

BLOCK_M, BLOCK_N, STAGES = 64, 128, 2
"""Rows of a consumer, keys of a tile (as `tiles` has it for sm_90: it affects rounding), buffers of K and of V."""

HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)

if gluon is not None:

    @gluon.jit
    def work(items_ptr, node_table_ptr, index, num_items, G: gl.constexpr):
        """(node pointer, head, row begin, row end, segment begin, segment end, state) of a work item; no segments if no rows."""
        head = index // num_items
        item_ptr = items_ptr + (index % num_items) * 6
        row_begin, row_end = gl.load(item_ptr + 1) * G, gl.load(item_ptr + 2) * G
        seg_begin, seg_end = gl.load(item_ptr + 3), gl.load(item_ptr + 4)
        seg_end = gl.where(row_begin < row_end, seg_end, seg_begin)
        node_ptr = node_table_ptr + gl.load(item_ptr).to(gl.int64) * 4
        return node_ptr, head, row_begin, row_end, seg_begin, seg_end, gl.load(item_ptr + 5)

    @gluon.jit
    def produce(
        q_ptr,
        node_table_ptr,
        items_ptr,
        num_items,
        num_kv_heads,
        layer,
        k_ring,
        v_ring,
        k_full,
        k_free,
        v_full,
        v_free,
        G: gl.constexpr,
        HEAD_DIM: gl.constexpr,
        BLOCK_N: gl.constexpr,
        STAGES: gl.constexpr,
    ):
        tile = 0
        for index in range(gl.program_id(0), num_items * num_kv_heads, gl.num_programs(0)):
            node_ptr, head, _, _, seg_begin, seg_end, _ = work(items_ptr, node_table_ptr, index, num_items, G)
            tokens, padded = gl.load(node_ptr + 1).to(gl.int32), gl.load(node_ptr + 2)
            segment = gl.load(node_ptr + 3).to(gl.int32)
            block_ptr = gl.load(node_ptr).to(q_ptr.dtype)
            k_ptr = block_ptr + ((2 * layer.to(gl.int64)) * num_kv_heads + head) * padded * HEAD_DIM
            v_ptr = block_ptr + ((2 * layer.to(gl.int64) + 1) * num_kv_heads + head) * padded * HEAD_DIM

            # A descriptor lies in memory that the one of the item before lay in, and a copy under way still reads it.
            for back in gl.static_range(STAGES):
                last = tile - 1 - back
                mbarrier.wait(k_full.index(last % STAGES), (last // STAGES) & 1, pred=last >= 0)
                mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1, pred=last >= 0)
            keys = padded.to(gl.int32)
            k_desc = tma.make_tensor_descriptor(
                k_ptr, [keys, HEAD_DIM], [HEAD_DIM, 1], [BLOCK_N, HEAD_DIM], k_ring.layout
            )
            v_desc = tma.make_tensor_descriptor(
                v_ptr, [keys, HEAD_DIM], [HEAD_DIM, 1], [BLOCK_N, HEAD_DIM], v_ring.layout
            )

            for seg in range(seg_begin, seg_end):
                begin = seg * segment
                end = gl.minimum(begin + segment, tokens)
                for first in range(begin, end, BLOCK_N):
                    stage, phase = tile % STAGES, (tile // STAGES) & 1
                    mbarrier.wait(k_free.index(stage), phase ^ 1)
                    mbarrier.expect(k_full.index(stage), BLOCK_N * HEAD_DIM * 2)
                    tma.async_copy_global_to_shared(k_desc, [first, 0], k_full.index(stage), k_ring.index(stage))
                    mbarrier.wait(v_free.index(stage), phase ^ 1)
                    mbarrier.expect(v_full.index(stage), BLOCK_N * HEAD_DIM * 2)
                    tma.async_copy_global_to_shared(v_desc, [first, 0], v_full.index(stage), v_ring.index(stage))
                    tile += 1

    @gluon.jit
    def softmax(m, l, s, qk_scale, left, MASK: gl.constexpr, S_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr):
        """`state.step` up to the second product: m and l with this tile, alpha, p. Of the tile's keys the first `left` exist."""
        scores = s * qk_scale
        if MASK:
            keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
            scores = gl.where((keys < left)[None, :], scores, float("-inf"))
        m_new = gl.maximum(m, gl.max(scores, 1))
        at = gl.where(m_new == float("-inf"), 0.0, m_new)
        p = gl.exp2(scores - at[:, None])
        alpha = gl.exp2(m - at)
        return m_new, gl.fma(l, alpha, gl.sum(p, 1)), alpha, p

    @gluon.jit
    def overlapped(
        q_tile,
        k_ring,
        v_ring,
        k_full,
        k_free,
        v_full,
        v_free,
        m,
        l,
        acc,
        p,
        tile,
        qk_scale,
        left,
        more,
        FIRST: gl.constexpr,
        LAST: gl.constexpr,
        S_LAYOUT: gl.constexpr,
        O_LAYOUT: gl.constexpr,
        BLOCK_M: gl.constexpr,
        BLOCK_N: gl.constexpr,
        STAGES: gl.constexpr,
    ):
        """Q K^T of `tile` and P V of the tile before it, whose P is `p`; the softmax runs under P V.

        FIRST: `tile` begins a segment, whose m and l are given; acc is then that of the segment before, complete. LAST: it ends
        one. K of `tile` has been waited for, and that of the next is waited for in here, if there are `more` of the item.
        """
        stage, before = tile % STAGES, (tile - 1) % STAGES
        none = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=S_LAYOUT)
        s = warpgroup_mma(q_tile, k_ring.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        # Converted only now: the fp32 values cost nothing to carry, and this runs while Q K^T does.
        operand = gl.convert_layout(p.to(q_tile.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
        mbarrier.wait(v_full.index(before), ((tile - 1) // STAGES) & 1)
        acc = warpgroup_mma(operand, v_ring.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(k_free.index(stage))
        m, l, alpha, p = softmax(m, l, s, qk_scale, left, FIRST or LAST, S_LAYOUT, BLOCK_N)
        # A wait loop between the softmax and the wait for P V: without it ptxas moves the latter above the exponentials.
        mbarrier.wait(k_full.index((tile + 1) % STAGES), ((tile + 1) // STAGES) & 1, pred=more)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_free.index(before))
        if not FIRST:
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
        return m, l, acc, p

    @gluon.jit
    def consume(
        q_ptr,
        node_table_ptr,
        items_ptr,
        m_ptr,
        l_ptr,
        acc_ptr,
        packed_rows,
        num_items,
        num_kv_heads,
        qk_scale,
        q_tile,
        total,
        k_ring,
        v_ring,
        k_full,
        k_free,
        v_full,
        v_free,
        PART: gl.constexpr,
        G: gl.constexpr,
        HEAD_DIM: gl.constexpr,
        BLOCK_M: gl.constexpr,
        BLOCK_N: gl.constexpr,
        STAGES: gl.constexpr,
    ):
        S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
        O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
        S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
        O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
        Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])

        tile = 0
        for index in range(gl.program_id(0), num_items * num_kv_heads, gl.num_programs(0)):
            node_ptr, head, row_begin, row_end, seg_begin, seg_end, state = work(
                items_ptr, node_table_ptr, index, num_items, G
            )
            tokens, segment = gl.load(node_ptr + 1).to(gl.int32), gl.load(node_ptr + 3).to(gl.int32)
            row_begin += PART * BLOCK_M
            count = row_end - row_begin

            m = gl.full([BLOCK_M], float("-inf"), gl.float32, layout=S_ROWS)
            l = gl.zeros([BLOCK_M], gl.float32, layout=S_ROWS)
            p = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=S_LAYOUT)
            if seg_begin < seg_end:
                rows = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, Q_LAYOUT))
                dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, Q_LAYOUT))
                first_ptr = q_ptr + (head.to(gl.int64) * packed_rows + row_begin) * HEAD_DIM
                q = gl.load(
                    first_ptr + (rows[:, None] * HEAD_DIM + dims[None, :]), mask=(rows < count)[:, None], other=0.0
                )
                q_tile.store(q)
                fence_async_shared()

                # The item's first tile: no P V to overlap with.
                left = gl.minimum(segment, tokens - seg_begin * segment)
                stage = tile % STAGES
                mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
                none = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=S_LAYOUT)
                s = warpgroup_mma(q_tile, k_ring.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=(s,))
                mbarrier.arrive(k_free.index(stage))
                m, l, _, p = softmax(m, l, s, qk_scale, left, True, S_LAYOUT, BLOCK_N)
                more = (left > BLOCK_N) | (seg_begin + 1 < seg_end)
                mbarrier.wait(k_full.index((tile + 1) % STAGES), ((tile + 1) // STAGES) & 1, pred=more)
                tile += 1

            # Total of a walk from segment 0: m and l in registers, acc in shared memory, where each element is read by the
            # thread that wrote it. In its slot in global memory the fold would wait for the L2 at every segment's end.
            m_total = gl.full([BLOCK_M], float("-inf"), gl.float32, layout=S_ROWS)
            l_total = gl.zeros([BLOCK_M], gl.float32, layout=S_ROWS)
            for seg in range(seg_begin, seg_end):
                left = gl.minimum(segment, tokens - seg * segment)
                tiles = (left + BLOCK_N - 1) // BLOCK_N
                acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, layout=O_LAYOUT)
                for _ in range(1, tiles - 1):
                    m, l, acc, p = overlapped(
                        q_tile, k_ring, v_ring, k_full, k_free, v_full, v_free, m, l, acc, p,
                        tile, qk_scale, BLOCK_N, True, False, False, S_LAYOUT, O_LAYOUT, BLOCK_M, BLOCK_N, STAGES,
                    )  # fmt: skip
                    tile += 1
                # The last tile apart: its pad keys are zeros, and a score of 0 is not "unseen".
                if tiles > 1:
                    m, l, acc, p = overlapped(
                        q_tile, k_ring, v_ring, k_full, k_free, v_full, v_free, m, l, acc, p,
                        tile, qk_scale, left - (tiles - 1) * BLOCK_N, seg + 1 < seg_end, False, True, S_LAYOUT, O_LAYOUT,
                        BLOCK_M, BLOCK_N, STAGES,
                    )  # fmt: skip
                    tile += 1
                # P V of the last tile: with Q K^T of the next segment's first, or alone.
                m_done, l_done = m, l
                if seg + 1 < seg_end:
                    m = gl.full([BLOCK_M], float("-inf"), gl.float32, layout=S_ROWS)
                    l = gl.zeros([BLOCK_M], gl.float32, layout=S_ROWS)
                    coming = gl.minimum(segment, tokens - (seg + 1) * segment)
                    m, l, acc, p = overlapped(
                        q_tile, k_ring, v_ring, k_full, k_free, v_full, v_free, m, l, acc, p,
                        tile, qk_scale, coming, (coming > BLOCK_N) | (seg + 2 < seg_end), True, False, S_LAYOUT, O_LAYOUT,
                        BLOCK_M, BLOCK_N, STAGES,
                    )  # fmt: skip
                    tile += 1
                else:
                    stage = (tile - 1) % STAGES
                    operand = gl.convert_layout(p.to(q_tile.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
                    mbarrier.wait(v_full.index(stage), ((tile - 1) // STAGES) & 1)
                    acc = warpgroup_mma(operand, v_ring.index(stage), acc, is_async=True)
                    acc = warpgroup_mma_wait(0, deps=(acc,))
                    mbarrier.arrive(v_free.index(stage))

                # `state.fold`.
                if (seg_begin == 0) & (seg > 0):
                    m_new = gl.maximum(m_total, m_done)
                    at = gl.where(m_new == float("-inf"), 0.0, m_new)
                    a, b = gl.exp2(m_total - at), gl.exp2(m_done - at)
                    l_done = gl.fma(l_total, a, l_done * b)
                    acc = acc * gl.convert_layout(b, O_ROWS)[:, None]
                    acc = gl.fma(total.load(O_LAYOUT), gl.convert_layout(a, O_ROWS)[:, None], acc)
                    m_done = m_new
                m_total, l_total = m_done, l_done
                if (seg_begin == 0) & (seg + 1 < seg_end):
                    total.store(acc)
                else:
                    # `state.store`.
                    slot = gl.where(seg_begin == 0, state, state + seg - seg_begin)
                    place = (slot.to(gl.int64) * num_kv_heads + head) * packed_rows + row_begin
                    acc_rows = gl.arange(0, BLOCK_M, layout=O_ROWS)
                    acc_dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_LAYOUT))
                    acc_ptrs = acc_ptr + place * HEAD_DIM + (acc_rows[:, None] * HEAD_DIM + acc_dims[None, :])
                    inside = (acc_rows < count)[:, None] & (acc_dims < HEAD_DIM)[None, :]
                    gl.store(acc_ptrs, acc, mask=inside)
                    s_rows = gl.arange(0, BLOCK_M, layout=S_ROWS)
                    gl.store(m_ptr + place + s_rows, m_done, mask=s_rows < count)
                    gl.store(l_ptr + place + s_rows, l_done, mask=s_rows < count)

    @gluon.jit(do_not_specialize=["packed_rows", "num_items", "layer"])
    def prefix_hopper_kernel(
        q_ptr,
        node_table_ptr,
        items_ptr,
        m_ptr,
        l_ptr,
        acc_ptr,
        packed_rows,
        num_items,
        num_kv_heads,
        layer,
        qk_scale,
        G: gl.constexpr,
        HEAD_DIM: gl.constexpr,
        BLOCK_M: gl.constexpr,
        BLOCK_N: gl.constexpr,
        STAGES: gl.constexpr,
    ):
        DTYPE: gl.constexpr = q_ptr.dtype.element_ty
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        q_low = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], LAYOUT)
        q_high = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], LAYOUT)
        # 8 rows of 8 columns, which a warp stores and loads at once, lie in different banks.
        WIDE: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0])
        total_low = gl.allocate_shared_memory(gl.float32, [BLOCK_M, HEAD_DIM], WIDE)
        total_high = gl.allocate_shared_memory(gl.float32, [BLOCK_M, HEAD_DIM], WIDE)
        k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_DIM], LAYOUT)
        v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_DIM], LAYOUT)
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for n in gl.static_range(STAGES):
            mbarrier.init(k_full.index(n), count=1)
            mbarrier.init(k_free.index(n), count=2)
            mbarrier.init(v_full.index(n), count=1)
            mbarrier.init(v_free.index(n), count=2)
        fence_async_shared()

        gl.warp_specialize(
            [
                (consume, (
                    q_ptr, node_table_ptr, items_ptr, m_ptr, l_ptr, acc_ptr, packed_rows, num_items, num_kv_heads,
                    qk_scale, q_low, total_low, k_ring, v_ring, k_full, k_free, v_full, v_free,
                    0, G, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES,
                )),
                (consume, (
                    q_ptr, node_table_ptr, items_ptr, m_ptr, l_ptr, acc_ptr, packed_rows, num_items, num_kv_heads,
                    qk_scale, q_high, total_high, k_ring, v_ring, k_full, k_free, v_full, v_free,
                    1, G, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES,
                )),
                (produce, (
                    q_ptr, node_table_ptr, items_ptr, num_items, num_kv_heads, layer,
                    k_ring, v_ring, k_full, k_free, v_full, v_free,
                    G, HEAD_DIM, BLOCK_N, STAGES,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps this kernel from running there; None if nothing does."""
    if gluon is None:
        return f"triton {triton.__version__} without Gluon for Hopper"
    if device.type != "cuda":
        return f"device {device}"
    return unfit(arch_of(device), dtype, head_dim)


def unfit(arch: int, dtype: torch.dtype, head_dim: int) -> str | None:
    """What of architecture, dtype and head_dim this kernel was not made for; None if nothing."""
    if arch != 90:
        return f"sm_{arch}"
    if dtype not in DTYPES:
        return f"dtype {dtype}"
    return None if head_dim in HEAD_DIMS else f"head_dim {head_dim}"


def constants(G: int, head_dim: int) -> dict[str, int]:
    return {"G": G, "HEAD_DIM": head_dim, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "STAGES": STAGES}


def signature(dtype: torch.dtype) -> dict[str, str]:
    """Types of the kernel's arguments, as an ahead-of-time compile wants them."""
    kinds = {"q_ptr": "*fp16" if dtype == torch.float16 else "*bf16", "node_table_ptr": "*i64", "items_ptr": "*i32"}
    kinds |= {"m_ptr": "*fp32", "l_ptr": "*fp32", "acc_ptr": "*fp32", "qk_scale": "fp32"}
    return {n: kinds.get(n, "constexpr" if n.isupper() else "i32") for n in prefix_hopper_kernel.arg_names}


def prefix_attention_hopper(
    q: Tensor, node_table: Tensor, items: Tensor, path_table: Tensor, *, layer: int, sm_scale: float
) -> State:
    """`prefix.prefix_attention` on Hopper; q [num_kv_heads, T, G, head_dim]. Same states, same slots.

    Raises UnsupportedError for anything but sm_90, bf16 or fp16, head_dim 64 or 128, and at most 128 query heads a kv head.
    """
    num_kv_heads, rows, G, head_dim = q.shape
    reason = why_not(q.device, q.dtype, head_dim)
    if reason is None and G > PREFIX_BLOCK_M:
        reason = f"{G} query heads a kv head"
    if reason is not None:
        raise UnsupportedError(
            "prefix kernel",
            found=f"hopper with {reason}",
            needed="sm_90, bf16 or fp16, head_dim 64 or 128, at most 128 query heads a kv head, a triton with Gluon",
            do="use the plain Triton kernel",
        )
    shape = (path_table.shape[1], num_kv_heads, rows * G)
    m = torch.empty(shape, dtype=torch.float32, device=q.device)
    l = torch.empty(shape, dtype=torch.float32, device=q.device)
    acc = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    launch: Any = prefix_hopper_kernel[(min(programs, items.shape[0] * num_kv_heads),)]
    with on(q.device), scratch(q.device):
        launch(
            q, node_table, items, m, l, acc, rows * G, items.shape[0], num_kv_heads, layer, sm_scale * LOG2E,
            **constants(G, head_dim), num_warps=4, **ROUNDING,
        )  # fmt: skip
    return State(m, l, acc)
