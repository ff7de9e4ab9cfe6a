"""The cpu backend: K1, K2 and the fold in C++ (csrc/attention_impl.h), behind the four functions of `plain`.

Here shapes, dtypes and devices are checked, and outputs made; csrc checks every index that it follows. All functions take
`instruction_set`, a name in `_C.instruction_sets()`; left out, it is that of KVKERN_ISA, or the best that runs here. "avx2"
and "avx512" have the same bits, "avx512bf16" too but for bf16, whose products it takes in pairs; "portable" on x86-64 multiplies
and adds in two roundings, so its bits differ.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from kvkern import _C, plain
from kvkern.errors import BackendError, DeviceError, DtypeError, ShapeError
from kvkern.geometry import SUFFIX_SEGMENT
from kvkern.plain import State

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
LOG2E = math.log2(math.e)

append = plain.append
append_fused = plain.append_fused


def instruction_set() -> str:
    """The name of the instruction set in use: the one that KVKERN_ISA forces, or the best that runs here.

    Raises BackendError where KVKERN_ISA names one that is unknown or that this CPU lacks. An empty value forces none.
    """
    runs_here = _C.instruction_sets()
    name = forced_instruction_set()
    if name is None:
        return runs_here[0]
    if name not in runs_here:
        raise BackendError(
            "KVKERN_ISA",
            found=name,
            needed=f"one that runs here: {', '.join(runs_here)}",
            do=f"unset it for {runs_here[0]}, the best here",
        )
    return name


def forced_instruction_set() -> str | None:
    """What KVKERN_ISA says, unchecked."""
    return os.environ.get("KVKERN_ISA") or None


_default = instruction_set  # where an argument has that name


def prefix_attention(
    q: Tensor,
    node_table: Tensor,
    items: Tensor,
    path_table: Tensor,
    *,
    num_kv_heads: int,
    layer: int,
    sm_scale: float,
    instruction_set: str = "",
) -> State:
    """Every row against the segments of its path's nodes, no mask.

    q [T, num_qo_heads, head_dim], any strides but the last, which is 1. Returns m, l [S, num_kv_heads, T * G] and acc
    [S, num_kv_heads, T * G, head_dim], fp32; packed row = token * G + g. Slots that no work item fills are left as they come.
    Raises ShapeError, DtypeError or DeviceError naming the argument, IndexError for an item outside its tables.
    """
    shape = _shape(q, num_kv_heads)
    _table("node_table", node_table, torch.int64, 4)
    _table("items", items, torch.int32, 6)
    _table("path_table", path_table, torch.int32)
    rows, _, group, head_dim = shape
    states = (path_table.shape[1], num_kv_heads, rows * group)
    m, l = (torch.empty(states, dtype=torch.float32) for _ in range(2))
    acc = torch.empty((*states, head_dim), dtype=torch.float32)
    _C.prefix_attention(
        q.data_ptr(),
        node_table.data_ptr(),
        items.data_ptr(),
        (m.data_ptr(), l.data_ptr(), acc.data_ptr()),
        dtype=DTYPES[q.dtype],
        shape=shape,
        q_strides=_strides(q),
        scale=sm_scale * LOG2E,
        num_nodes=node_table.shape[0],
        num_items=items.shape[0],
        num_states=path_table.shape[1],
        layer=layer,
        threads=torch.get_num_threads(),
        instruction_set=instruction_set or _default(),
    )
    return State(m, l, acc)


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
    instruction_set: str = "",
) -> tuple[Tensor, Tensor]:
    """Fold the states of each row's path, go on causally over its agent's pages, and finish.

    q [T, num_qo_heads, head_dim]; pages [num_pages, num_kv_heads, 16, head_dim] by strides. Returns o like q, contiguous, and
    lse [T, num_qo_heads] fp32, natural logarithm; 0 and -inf for padding rows and where nothing is seen, NaN where a row's
    own q, k or v is. Raises as `prefix_attention`; IndexError too for a page or a length that does not exist.
    """
    num_pages, num_kv_heads, page_tokens, _ = _pages(q, k_pages, v_pages)
    shape = _shape(q, num_kv_heads)
    rows, _, group, head_dim = shape
    slots = page_table.shape[0]
    _table("page_table", page_table, torch.int32, contiguous=False)
    _table("suffix_tiles", suffix_tiles, torch.int32, 4)
    _table("path_table", path_table, torch.int32)
    _vector("seq_lens", seq_lens, torch.int32, (slots,))
    _vector("row_slot", row_slot, torch.int32, (rows,))
    _vector("row_back", row_back, torch.int32, (rows,))
    states = (path_table.shape[1], num_kv_heads, rows * group)
    for name, part, needed in (("m", state.m, states), ("l", state.l, states), ("acc", state.acc, (*states, head_dim))):
        _vector(f"state.{name}", part, torch.float32, needed)

    o = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float32)
    _C.suffix_attention(
        q.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        page_table.data_ptr(),
        seq_lens.data_ptr(),
        row_slot.data_ptr(),
        row_back.data_ptr(),
        suffix_tiles.data_ptr(),
        path_table.data_ptr(),
        (state.m.data_ptr(), state.l.data_ptr(), state.acc.data_ptr()),
        o.data_ptr(),
        lse.data_ptr(),
        dtype=DTYPES[q.dtype],
        shape=shape,
        q_strides=_strides(q),
        k_page_strides=_strides(k_pages),
        v_page_strides=_strides(v_pages),
        scale=sm_scale * LOG2E,
        num_pages=num_pages,
        page_tokens=page_tokens,
        slots=slots,
        table_width=page_table.shape[1],
        table_stride=page_table.stride(0),
        num_tiles=suffix_tiles.shape[0],
        num_paths=path_table.shape[0],
        num_states=path_table.shape[1],
        segment=SUFFIX_SEGMENT,
        threads=torch.get_num_threads(),
        instruction_set=instruction_set or _default(),
    )
    return o, lse


def merge(a: State, b: State, *, instruction_set: str = "") -> State:
    """The fold alone, on states of any shape: m, l [...], acc [..., head_dim]."""
    if not a.acc.dim():
        raise ShapeError("a.acc", found="a single number", needed="[..., head_dim]", do="take the states of K1")
    for side, state in (("a", a), ("b", b)):
        for name, part, needed in (
            ("m", state.m, a.m.shape),
            ("l", state.l, a.m.shape),
            ("acc", state.acc, (*a.m.shape, a.acc.shape[-1])),
        ):
            _vector(f"{side}.{name}", part, torch.float32, needed, contiguous=False)
    first, second = (State(*(part.contiguous() for part in state)) for state in (a, b))
    out = State(*(torch.empty_like(part) for part in first))
    sides = [(s.m.data_ptr(), s.l.data_ptr(), s.acc.data_ptr()) for s in (first, second, out)]
    _C.fold(*sides, rows=out.m.numel(), head_dim=out.acc.shape[-1], instruction_set=instruction_set or _default())
    return out


# -- checks ------------------------------------------------------------------------------------------------------------


def _shape(q: Tensor, num_kv_heads: int) -> tuple[int, int, int, int]:
    """(rows, num_kv_heads, G, head_dim) of queries that csrc can take."""
    _number("q", q)
    if num_kv_heads < 1:
        raise ShapeError("num_kv_heads", found=num_kv_heads, needed="1 or more", do="take that of the prefix")
    if q.dim() != 3 or not q.shape[1] or q.shape[1] % num_kv_heads or q.shape[2] % 16 or not q.shape[2]:
        raise ShapeError(
            "q",
            found=list(q.shape),
            needed=f"[rows, a multiple of {num_kv_heads} heads, a multiple of 16]",
            do="make queries and keys of one model",
        )
    rows, num_qo_heads, head_dim = q.shape
    return rows, num_kv_heads, num_qo_heads // num_kv_heads, head_dim


def _pages(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> tuple[int, int, int, int]:
    """(pages, num_kv_heads, tokens of a page, head_dim) of pages that fit the queries."""
    _number("q", q)
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.dim() != 4 or pages.shape != k_pages.shape or pages.shape[3] != q.shape[-1] or 0 in pages.shape[1:]:
            raise ShapeError(
                name,
                found=list(pages.shape),
                needed=f"[num_pages, num_kv_heads, page tokens, {q.shape[-1]}], k and v alike",
                do="take the pages of a PagePool",
            )
        if pages.dtype != q.dtype:
            raise DtypeError(name, found=pages.dtype, needed=f"{q.dtype} as q", do="make the pool in the model's dtype")
        _number(name, pages)
    num_pages, num_kv_heads, page_tokens, head_dim = k_pages.shape
    return num_pages, num_kv_heads, page_tokens, head_dim


def _number(name: str, tensor: Tensor) -> None:
    """Numbers in a dtype of the kernels, on the CPU, elements of a head side by side."""
    if tensor.dtype not in DTYPES:
        raise DtypeError(name, found=tensor.dtype, needed="float32, float16 or bfloat16", do="convert it")
    _on_cpu(name, tensor)
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ShapeError(f"{name}.stride(-1)", found=tensor.stride(-1), needed=1, do=f"pass {name}.contiguous()")


def _table(name: str, tensor: Tensor, dtype: torch.dtype, width: int | None = None, *, contiguous: bool = True) -> None:
    """A table of two dimensions whose entries of a row lie side by side."""
    if tensor.dim() != 2 or width not in (None, tensor.shape[1]):
        raise ShapeError(name, found=list(tensor.shape), needed=f"[rows, {width or 'any'}]", do="take that of a Plan")
    _vector(name, tensor, dtype, tuple(tensor.shape), contiguous=contiguous)
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        raise ShapeError(f"{name}.stride(-1)", found=tensor.stride(1), needed=1, do=f"pass {name}.contiguous()")


def _vector(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | torch.Size, *, contiguous: bool = True
) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(name, found=list(tensor.shape), needed=list(shape), do="make state, pages and plan fit")
    if tensor.dtype != dtype:
        raise DtypeError(name, found=tensor.dtype, needed=dtype, do="take it as Plan, PagePool and K1 make it")
    _on_cpu(name, tensor)
    if contiguous and not tensor.is_contiguous():
        raise ShapeError(f"{name}.stride()", found=list(tensor.stride()), needed="contiguous", do="copy it")


def _on_cpu(name: str, tensor: Tensor) -> None:
    if not tensor.is_cpu:
        raise DeviceError(name, found=tensor.device, needed="cpu", do="move all of them to the CPU")


def _strides(tensor: Tensor) -> list[int]:
    """In bytes, but for the last, which is 1 element."""
    return [n * tensor.element_size() for n in tensor.stride()[:-1]]
