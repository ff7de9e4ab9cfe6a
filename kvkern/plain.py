"""The torch backend: the four functions of the contract on any device, in GEMMs of fixed row shapes.

A GEMM's rounding may follow its number of rows, and an element-wise exp2 may treat the tail of a buffer by another routine;
in a call of one shape neither knows which rows lie beside it. So every call here has a shape that follows from geometry
alone: 64 packed rows against at most 1,024 keys of a prefix, 16 rows against 64 keys of a suffix; missing rows are zeros.
Scores, states and sums are fp32 whatever the dtype of K and V.

The fold is written as two products and a sum, each rounded, since torch has no fused multiply-add: as explicit, and as
independent of the compiler, as the fma of the kernels.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvkern import cpu
from kvkern.geometry import PAGE, SUFFIX_SEGMENT, next_power_of_2
from kvkern.plan import CONTINUES, STARTS

ROW_TILE = 64
KEY_TILE = 1024
SUFFIX_ROWS = 16
SUFFIX_KEYS = 64
EXP2_PIECE = 65_536
"""Elements of one exp2. Torch cuts a larger call between more threads than two, at places that need be no multiple of a
vector; the few elements before a cut then go through another routine, and with them some rows' bits."""
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


class State(NamedTuple):
    """Attention over a run of keys: running maximum (base 2), sum, and unnormalised accumulator, all fp32."""

    m: Tensor
    l: Tensor
    acc: Tensor


def _pivot(m: Tensor) -> Tensor:
    # A state that has seen no key has m = -inf; a finite pivot keeps -inf - -inf (NaN) out of exp2.
    return m.masked_fill(m == -math.inf, 0.0)


def fold(a: State, b: State) -> State:
    """State of [a, b) and state of [b, c) -> state of [a, c). Always left to right: order is part of the result."""
    m = torch.maximum(a.m, b.m)
    pivot = _pivot(m)
    alpha, beta = torch.exp2(a.m - pivot), torch.exp2(b.m - pivot)
    return State(m, a.l * alpha + b.l * beta, a.acc * alpha[..., None] + b.acc * beta[..., None])


def step(state: State | None, scores: Tensor, v: Tensor) -> State:
    """Go on with a tile of keys. scores [..., rows, keys] fp32, base 2, -inf where masked, overwritten; v [..., keys, head_dim]."""
    m = scores.amax(-1)
    if state is not None:
        m = torch.maximum(m, state.m)
    pivot = _pivot(m)
    p = scores.sub_(pivot[..., None])
    for piece in p.view(-1).split(EXP2_PIECE):  # type: ignore[no-untyped-call]
        piece.exp2_()
    total, acc = p.sum(-1), torch.matmul(p, v)
    if state is None:
        return State(m, total, acc)
    alpha = torch.exp2(state.m - pivot)
    return State(m, state.l * alpha + total, state.acc * alpha[..., None] + acc)


def finish(state: State) -> tuple[Tensor, Tensor]:
    """(o, lse): o fp32, lse natural logarithm; 0 and -inf where no key was seen."""
    # Compared with 0 alone, so that NaN stays NaN.
    unseen = state.l == 0
    o = torch.where(unseen[..., None], 0.0, state.acc / state.l[..., None])
    return o, torch.where(unseen, -math.inf, (state.m + torch.log2(state.l)) * LN2)


def empty(*shape: int, head_dim: int, device: torch.device) -> State:
    """The state before any key."""
    m = torch.full(shape, -math.inf, device=device)
    return State(m, torch.zeros(shape, device=device), torch.zeros((*shape, head_dim), device=device))


def _where(rows: Tensor, a: State, b: State) -> State:
    """State a in these rows (bool [rows]), b in the others."""
    if bool(rows.all()):
        return a
    return State(*(torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(a, b, strict=True)))


# -- K0 ----------------------------------------------------------------------------------------------------------------


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

    Returns q, [T, num_qo_heads, head_dim], as the backend's other functions take it: here as it came.
    """
    if not k.shape[0]:
        return q
    if k.device.type == "cpu":
        cpu.append(k, v, k_pages, v_pages, page_table, seq_lens, row_slot, row_back)
        return q
    rows = (row_slot >= 0).nonzero().squeeze(1)
    slot = row_slot[rows].long()
    position = (seq_lens[slot] - 1 - row_back[rows]).long()
    page = page_table[slot, position // PAGE].long()
    k_pages[page, :, position % PAGE] = k[rows]
    v_pages[page, :, position % PAGE] = v[rows]
    return q


def append_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
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
    """`append` of q and k as the projections give them: norm of each head by weights [head_dim], then RoPE by cos and sin
    [T, head_dim], rounded where transformers' Qwen3 rounds. Returns q as `append` does."""
    if q_norm is not None:
        q = _norm(q, q_norm, q_eps)
    if k_norm is not None:
        k = _norm(k, k_norm, k_eps)
    q, k = _rope(q, cos, sin), _rope(k, cos, sin)
    return append(q, k, v, k_pages, v_pages, page_table, seq_lens, row_slot, row_back)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


# -- K1 ----------------------------------------------------------------------------------------------------------------


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

    q [T, num_qo_heads, head_dim]. Returns m, l [S, num_kv_heads, T * G] and acc [S, num_kv_heads, T * G, head_dim]; packed
    row = token * G + g. Slots that no work item fills are left as they come.
    Bound by the GEMM: 64 rows against 1,024 keys run at about its speed on a CPU.
    """
    rows, num_qo_heads, head_dim = q.shape
    group = num_qo_heads // num_kv_heads
    packed = _pack(q, num_kv_heads, sm_scale)
    shape = (path_table.shape[1], num_kv_heads, rows * group)
    out = State(
        q.new_empty(shape, dtype=torch.float32),
        q.new_empty(shape, dtype=torch.float32),
        q.new_empty((*shape, head_dim), dtype=torch.float32),
    )
    nodes = node_table.tolist()
    for node, row_begin, row_end, seg_begin, seg_end, state in items.tolist():
        if row_begin == row_end:
            continue
        address, tokens, padded, segment = nodes[node]
        size = num_kv_heads * padded * head_dim * q.element_size()
        keys, values = (
            block_at(address + (2 * layer + which) * size, (num_kv_heads, padded, head_dim), q.dtype, q.device)
            for which in range(2)
        )
        span = range(row_begin * group, row_end * group, ROW_TILE)
        for head in range(num_kv_heads):
            for seg in range(seg_begin, seg_end):
                begin, end = seg * segment, min((seg + 1) * segment, padded)
                k, v = keys[head, begin:end].float(), values[head, begin:end].float()
                slot = state if seg_begin == 0 else state + seg - seg_begin
                for first in span:
                    last = min(first + ROW_TILE, row_end * group)
                    new = _walk(_tile(packed[head, first:last]), k, v, tokens - begin)
                    n = last - first
                    place = State(*(part[slot, head, first:last] for part in out))
                    if seg_begin == 0 and seg > 0:
                        new = fold(_tile_state(place), new)
                    for part, value in zip(place, new, strict=True):
                        part.copy_(value[:n])
    return out


def _walk(q: Tensor, k: Tensor, v: Tensor, valid: int) -> State:
    """A fresh state of one segment: q [64, head_dim] against k, v [keys, head_dim], of which `valid` are tokens."""
    state = None
    for first in range(0, k.shape[0], KEY_TILE):
        tile = slice(first, first + KEY_TILE)
        scores = torch.mm(q, k[tile].t())
        if valid - first < scores.shape[1]:
            scores[:, max(0, valid - first) :] = -math.inf
        state = step(state, scores, v[tile])
    assert state is not None
    return state


def _pack(q: Tensor, num_kv_heads: int, sm_scale: float) -> Tensor:
    """[T, num_qo_heads, head_dim] -> [num_kv_heads, T * G, head_dim], fp32, times sm_scale * log2(e)."""
    rows, _, head_dim = q.shape
    heads = q.reshape(rows, num_kv_heads, -1, head_dim).transpose(0, 1).float()
    return (heads * (sm_scale * LOG2E)).reshape(num_kv_heads, -1, head_dim)


def _tile(rows: Tensor) -> Tensor:
    """Rows, padded with zeros to the one tile shape."""
    if rows.shape[0] == ROW_TILE:
        return rows
    tile = rows.new_zeros((ROW_TILE, *rows.shape[1:]))
    tile[: rows.shape[0]] = rows
    return tile


def _tile_state(state: State) -> State:
    return State(*(_tile(part) for part in state))


def block_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor that lies at an address of the node table. The Plan keeps its memory alive."""
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=dtype).view(shape)
    memory = _DeviceMemory(address, size)
    return torch.as_tensor(memory, device=device).view(dtype).view(shape)


class _DeviceMemory:
    """An address as the CUDA array interface, which torch reads without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


# -- K2 ----------------------------------------------------------------------------------------------------------------


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

    q [T, num_qo_heads, head_dim]; pages [num_pages, num_kv_heads, 16, head_dim] by strides. Returns o like q and
    lse [T, num_qo_heads] fp32, natural logarithm; 0 and -inf for padding rows.
    Bound by gathering pages: each row takes its own copy of its keys.
    """
    rows, num_qo_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[1]
    group = num_qo_heads // num_kv_heads
    o = q.new_zeros((rows, num_qo_heads, head_dim))
    lse = q.new_full((rows, num_qo_heads), -math.inf, dtype=torch.float32)
    slots = row_slot.long()
    lengths = torch.where(slots >= 0, seq_lens[slots.clamp(min=0)] - row_back, 0).long()
    paths = _row_paths(suffix_tiles, rows)
    packed = _pack(q, num_kv_heads, sm_scale).view(num_kv_heads, rows, group, head_dim).transpose(0, 1)
    states = State(*(part.view(*part.shape[:2], rows, group, *part.shape[3:]).transpose(1, 2) for part in state))
    for first in range(0, rows, SUFFIX_ROWS):
        last = min(first + SUFFIX_ROWS, rows)
        chunk = _Chunk(slots[first:last], lengths[first:last], packed[first:last])
        if not int(chunk.lengths.max()) and not bool((slots[first:last] >= 0).any()):
            continue
        total = _path_state(states, path_table, paths[first:last], first, last, chunk)
        total = _suffix(chunk, total, k_pages, v_pages, page_table)
        o_chunk, lse_chunk = finish(total)
        n = last - first
        o[first:last] = o_chunk[:n, :, :group].reshape(n, num_qo_heads, head_dim).to(q.dtype)
        lse[first:last] = lse_chunk[:n, :, :group].reshape(n, num_qo_heads)
    padding = slots < 0
    o[padding] = 0
    lse[padding] = -math.inf
    return o, lse


class _Chunk:
    """16 rows in the one shape of the suffix GEMMs: q [16, num_kv_heads, padded G, head_dim]; missing rows have length 0."""

    def __init__(self, slots: Tensor, lengths: Tensor, q: Tensor) -> None:
        n, num_kv_heads, group, head_dim = q.shape
        # With G rows padded to a power of two the batched GEMM takes whole register tiles and no remainder loop; with two
        # at least, what is element-wise over the chunk has a multiple of 32 elements, two of the widest vectors.
        self.q = q.new_zeros((SUFFIX_ROWS, num_kv_heads, next_power_of_2(max(2, group)), head_dim))
        self.q[:n, :, :group] = q
        self.lengths = lengths.new_zeros(SUFFIX_ROWS)
        self.lengths[:n] = lengths
        self.slots = slots.new_zeros(SUFFIX_ROWS)
        self.slots[:n] = slots.clamp(min=0)


def _row_paths(suffix_tiles: Tensor, rows: int) -> Tensor:
    """Path of each row; -1 for rows that no tile holds."""
    paths = torch.full((rows,), -1, dtype=torch.int64)
    for _, begin, end, path in suffix_tiles.tolist():
        paths[begin:end] = path
    return paths.to(suffix_tiles.device)


def _path_state(states: State, path_table: Tensor, paths: Tensor, first: int, last: int, chunk: _Chunk) -> State:
    """Fold each row's state slots: within a node over its segments, then along the path over its nodes."""
    width, num_kv_heads, padded_group, head_dim = chunk.q.shape
    group = states.m.shape[3]
    flags = path_table.new_zeros((width, path_table.shape[1]))
    flags[: last - first] = torch.where((paths >= 0)[:, None], path_table[paths.clamp(min=0)], 0)
    nothing = empty(width, num_kv_heads, padded_group, head_dim=head_dim, device=chunk.q.device)
    total, node = nothing, nothing
    any_node = any_total = flags[:, 0] < 0
    used = int((flags != 0).any(0).sum())
    for slot in range(used + 1):
        flag = flags[:, slot] if slot < used else torch.zeros_like(flags[:, 0])
        # A node is complete where another starts or the path ends: it goes into the total, the first one as it is.
        done = any_node & (flag != CONTINUES)
        if bool((done & any_total).any()):
            total = _where(done & any_total, fold(total, node), total)
        total = _where(done & ~any_total, node, total)
        any_total = any_total | done
        if slot == used:
            break
        new = State(*(part.clone() for part in nothing))
        for part, source in zip(new, states, strict=True):
            part[: last - first, :, :group] = source[slot, first:last]
        if bool((flag == CONTINUES).any()):
            node = _where(flag == CONTINUES, fold(node, new), node)
        node = _where(flag == STARTS, new, node)
        any_node = flag > 0
    return total


def _suffix(chunk: _Chunk, total: State, k_pages: Tensor, v_pages: Tensor, page_table: Tensor) -> State:
    """Go on over the pages: the first segment from the path's state, every later one from a fresh state, folded in order."""
    longest = int(chunk.lengths.max())
    for segment in range(0, longest, SUFFIX_SEGMENT):
        current = total if segment == 0 else empty(*total.m.shape, head_dim=total.acc.shape[-1], device=total.m.device)
        for first in range(segment, min(segment + SUFFIX_SEGMENT, longest), SUFFIX_KEYS):
            k, v, hidden = _gather(chunk, first, k_pages, v_pages, page_table)
            scores = torch.bmm(chunk.q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(*chunk.q.shape[:3], -1)
            scores.masked_fill_(hidden[:, None, None, :], -math.inf)
            new = _step_rows(current, scores, v)
            current = _where(chunk.lengths > first, new, current)
        if segment == 0:
            total = current
        else:
            total = _where(chunk.lengths > segment, fold(total, current), total)
    return total


def _step_rows(state: State, scores: Tensor, v: Tensor) -> State:
    """`step` with the product as one batch of GEMMs of one shape."""
    lead = scores.shape[:2]
    flat = State(*(part.flatten(0, 1) for part in state))
    new = step(flat, scores.flatten(0, 1), v.flatten(0, 1))
    return State(*(part.unflatten(0, lead) for part in new))  # type: ignore[no-untyped-call]


def _gather(
    chunk: _Chunk, first: int, k_pages: Tensor, v_pages: Tensor, page_table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """64 keys of every row's agent from token `first`: k, v [16, num_kv_heads, 64, head_dim] fp32, and which are hidden."""
    pages = torch.arange(first // PAGE, (first + SUFFIX_KEYS) // PAGE, device=page_table.device)
    inside = pages[None, :] * PAGE < chunk.lengths[:, None]
    column = pages.clamp(max=page_table.shape[1] - 1)
    # Entries past the length may hold anything, so they are never used as an index.
    ids = torch.where(inside, page_table[chunk.slots[:, None], column[None, :]], 0).long()
    tokens = torch.arange(first, first + SUFFIX_KEYS, device=page_table.device)
    hidden = tokens[None, :] >= chunk.lengths[:, None]
    k, v = (_select(pool, ids) for pool in (k_pages, v_pages))
    # What lies past the length may be NaN, and 0 * NaN is NaN.
    return k, v.masked_fill_(hidden[:, None, :, None], 0.0), hidden


def _select(pages: Tensor, ids: Tensor) -> Tensor:
    """Pages of every row side by side, a copy: [16, num_kv_heads, pages * 16, head_dim] fp32."""
    chosen = pages.index_select(0, ids.flatten()).unflatten(0, ids.shape)  # type: ignore[no-untyped-call]
    return chosen.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format).flatten(2, 3)


# -- K3 ----------------------------------------------------------------------------------------------------------------


def merge(a: State, b: State) -> State:
    """The fold alone, on states of any shape: m, l [...], acc [..., head_dim]."""
    return fold(a, b)
