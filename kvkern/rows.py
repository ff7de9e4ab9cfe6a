"""What a layer does to single rows on the CPU, in C++ (csrc/rows_impl.h): norm, RoPE and append in one, norm, SiLU.

Rounded to the dtype where transformers' modules round. A row's bits follow neither the rows beside it nor threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvkern import _C
from kvkern.errors import DeviceError, DtypeError, ShapeError
from kvkern.native import DTYPES, instruction_set


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
    isa: str = "",
) -> Tensor:
    """As `plain.append_fused`; q_norm and k_norm None for a model without such norms. Returns q, contiguous.

    Raises ShapeError, DtypeError or DeviceError naming the argument, and IndexError for a row whose slot, position or page
    does not exist. Nothing is written then.
    """
    if q.dim() != 3 or k.dim() != 3 or k_pages.dim() != 4 or page_table.dim() != 2:
        raise ShapeError(
            "q, k, k_pages, page_table",
            found=[list(t.shape) for t in (q, k, k_pages, page_table)],
            needed="3, 3, 4 and 2 dimensions",
            do="pass [rows, heads, head_dim] twice, [pages, heads, page tokens, head_dim] and [slots, pages]",
        )
    if q.dtype not in DTYPES:
        raise DtypeError("q", found=q.dtype, needed="float32, float16 or bfloat16", do="convert it")
    rows, heads, head_dim = q.shape
    kv_heads, num_pages, tokens, slots = k.shape[1], k_pages.shape[0], k_pages.shape[2], page_table.shape[0]
    for name, count in (("heads of q", heads), ("heads of k", kv_heads), ("page tokens of k_pages", tokens)):
        if not count:
            raise ShapeError(name, found=0, needed="1 or more", do="bring rows and pages of one model")
    if head_dim % 2 or not head_dim:
        raise ShapeError("head_dim", found=head_dim, needed="an even number", do="bring heads that RoPE can turn")
    pages = (num_pages, kv_heads, tokens, head_dim)
    for name, part, shape in (
        ("q", q, q.shape),
        ("k", k, (rows, kv_heads, head_dim)),
        ("v", v, (rows, kv_heads, head_dim)),
        ("cos", cos, (rows, head_dim)),
        ("sin", sin, (rows, head_dim)),
        ("k_pages", k_pages, pages),
        ("v_pages", v_pages, pages),
        ("q_norm", q_norm, (head_dim,)),
        ("k_norm", k_norm, (head_dim,)),
    ):
        if part is not None:
            _check(name, part, q.dtype, shape)
    _check("page_table", page_table, torch.int32, page_table.shape)
    for name, part, length in (
        ("seq_lens", seq_lens, slots),
        ("row_slot", row_slot, rows),
        ("row_back", row_back, rows),
    ):
        _check(name, part, torch.int32, (length,))
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype)
    size = q.element_size()
    _C.append_fused(
        (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()),
        (_address(q_norm), _address(k_norm), cos.data_ptr(), sin.data_ptr()),
        (k_pages.data_ptr(), v_pages.data_ptr()),
        (page_table.data_ptr(), seq_lens.data_ptr(), row_slot.data_ptr(), row_back.data_ptr()),
        DTYPES[q.dtype],
        (rows, heads, kv_heads, head_dim),
        [n * size for part in (q, k, v) for n in part.stride()[:2]],
        [cos.stride(0) * size, sin.stride(0) * size],
        [n * size for part in (k_pages, v_pages) for n in part.stride()[:3]],
        (slots, page_table.shape[1], page_table.stride(0), num_pages, tokens),
        (q_eps, k_eps),
        torch.get_num_threads(),
        isa or instruction_set(),
    )
    return out


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, isa: str = ""
) -> tuple[Tensor, Tensor]:
    """RMS norm of x + residual, [rows, size] each, by weight [size]; returns it and the sum, which is x without a residual.

    Raises ShapeError, DtypeError or DeviceError naming the argument.
    """
    rows, size = _matrix("x", x)
    _check("weight", weight, x.dtype, (size,))
    if residual is not None:
        _check("residual", residual, x.dtype, (rows, size))
    out = torch.empty((rows, size), dtype=x.dtype)
    total = None if residual is None else torch.empty_like(out)
    bytes_of = x.element_size()
    _C.rms_norm(
        x.data_ptr(),
        _address(residual),
        weight.data_ptr(),
        out.data_ptr(),
        _address(total),
        DTYPES[x.dtype],
        (rows, size),
        (x.stride(0) * bytes_of, 0 if residual is None else residual.stride(0) * bytes_of),
        eps,
        torch.get_num_threads(),
        isa or instruction_set(),
    )
    return out, x if total is None else total


def silu_mul(gate: Tensor, up: Tensor, *, isa: str = "") -> Tensor:
    """silu(gate) * up, [rows, size] each. Raises as `rms_norm`."""
    rows, size = _matrix("gate", gate)
    _check("up", up, gate.dtype, (rows, size))
    out = torch.empty((rows, size), dtype=gate.dtype)
    strides = (gate.stride(0) * gate.element_size(), up.stride(0) * up.element_size())
    threads = torch.get_num_threads()
    _C.silu_mul(
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        DTYPES[gate.dtype],
        (rows, size),
        strides,
        threads,
        isa or instruction_set(),
    )
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or not tensor.numel() else tensor.data_ptr()


def _matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2 or not tensor.shape[1]:
        raise ShapeError(name, found=list(tensor.shape), needed="[rows, 1 or more]", do="pass rows")
    if tensor.dtype not in DTYPES:
        raise DtypeError(name, found=tensor.dtype, needed="float32, float16 or bfloat16", do="convert it")
    _check(name, tensor, tensor.dtype, tensor.shape)
    return tensor.shape[0], tensor.shape[1]


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | torch.Size) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(
            name, found=list(tensor.shape), needed=list(shape), do="bring rows, pages and plan of one model"
        )
    if tensor.dtype != dtype:
        raise DtypeError(name, found=tensor.dtype, needed=dtype, do="convert it")
    if not tensor.is_cpu:
        raise DeviceError(name, found=tensor.device, needed="cpu", do="move all of them to the CPU")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ShapeError(f"{name}.stride(-1)", found=tensor.stride(-1), needed=1, do=f"pass {name}.contiguous()")
