"""Tensors in, pointers and sizes out: the way into csrc/ (kvkern._C), which knows no torch.

Three things lie there: K0 append on the CPU, memory that can be protected for good, and the 64-bit sum of a block. The
sum's form for other devices stands here in torch and gives the same number.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from kvkern import _C
from kvkern.errors import DeviceError, DtypeError, RequestError, ShapeError

GOLDEN = 0x9E3779B97F4A7C15  # as in csrc/blocksum.h
WORD = 8


# -- K0 ----------------------------------------------------------------------------------------------------------------


def append(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    row_slot: Tensor,
    row_back: Tensor,
) -> None:
    """Copy the rows of k and v to the suffix pages of their slots; rows of slot -1 write nothing.

    k, v              [rows, num_kv_heads, head_dim], any dtype, any strides but the last, which is 1
    k_pages, v_pages  [num_pages, num_kv_heads, page tokens, head_dim], same dtype, any strides but the last; written
    page_table        int32 [slots, pages], page of each 16 tokens; rows any distance apart, entries side by side
    seq_lens          int32 [slots], suffix tokens with this step's rows counted
    row_slot          int32 [rows], slot of the row, or -1
    row_back          int32 [rows], rows of the same slot after this one in this step

    Raises ShapeError, DtypeError or DeviceError that names the argument, and IndexError for a row whose slot, position
    or page does not exist. Nothing is written then.
    """
    numbers = {"k": k, "v": v, "k_pages": k_pages, "v_pages": v_pages}
    places = {"page_table": page_table, "seq_lens": seq_lens, "row_slot": row_slot, "row_back": row_back}
    _check_append(numbers, places)
    rows, num_kv_heads, head_dim = k.shape
    size = k.element_size()
    _C.append(
        k.data_ptr(),
        v.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        page_table.data_ptr(),
        seq_lens.data_ptr(),
        row_slot.data_ptr(),
        row_back.data_ptr(),
        rows=rows,
        num_kv_heads=num_kv_heads,
        row_bytes=head_dim * size,
        k_strides=[n * size for n in k.stride()[:2]],
        v_strides=[n * size for n in v.stride()[:2]],
        k_page_strides=[n * size for n in k_pages.stride()[:3]],
        v_page_strides=[n * size for n in v_pages.stride()[:3]],
        num_pages=k_pages.shape[0],
        page_tokens=k_pages.shape[2],
        slots=page_table.shape[0],
        table_width=page_table.shape[1],
        table_stride=page_table.stride(0),
    )


def _check_append(numbers: dict[str, Tensor], places: dict[str, Tensor]) -> None:
    k, k_pages, page_table = numbers["k"], numbers["k_pages"], places["page_table"]
    if k.dim() != 3 or k_pages.dim() != 4 or page_table.dim() != 2:
        raise ShapeError(
            "k, k_pages, page_table",
            found=[list(t.shape) for t in (k, k_pages, page_table)],
            needed="3, 4 and 2 dimensions",
            do="pass [rows, heads, head_dim], [pages, heads, page tokens, head_dim] and [slots, pages]",
        )
    rows, num_kv_heads, head_dim = k.shape
    num_pages, _, page_tokens, _ = k_pages.shape
    slots = page_table.shape[0]
    if page_tokens == 0:
        raise ShapeError("k_pages", found="pages of 0 tokens", needed="1 or more", do="take the pages of a PagePool")
    pages_shape = (num_pages, num_kv_heads, page_tokens, head_dim)
    _check_tensors(numbers, k.dtype, {"v": k.shape, "k_pages": pages_shape, "v_pages": pages_shape})
    _check_tensors(places, torch.int32, {"seq_lens": (slots,), "row_slot": (rows,), "row_back": (rows,)})


def _check_tensors(tensors: dict[str, Tensor], dtype: torch.dtype, shapes: dict[str, tuple[int, ...]]) -> None:
    for field, tensor in tensors.items():
        shape = shapes.get(field)
        if shape is not None and tensor.shape != shape:
            raise ShapeError(field, found=list(tensor.shape), needed=list(shape), do="make k, v, pages and plan fit")
        if tensor.dtype != dtype:
            raise DtypeError(field, found=tensor.dtype, needed=dtype, do="k and v are like the pages, places are int32")
        if not tensor.is_cpu:
            raise DeviceError(field, found=tensor.device, needed="cpu", do="move all of them to the CPU")
        stride = tensor.stride()[-1]
        if stride != 1 and tensor.shape[-1] > 1:
            raise ShapeError(field, found=f"a last stride of {stride}", needed="1", do="call .contiguous() on it")


# -- protected memory --------------------------------------------------------------------------------------------------


def map_tensor(shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, _C.Mapping]:
    """Zeros in a mapping of their own, writable until `mapping.protect()`; then a write is SIGSEGV.

    The tensor keeps the mapping alive, and the memory goes back to the system with the last of them.
    Raises ShapeError for no elements, OSError where there is no memory to be had.
    """
    mapping = _C.Mapping(_size_bytes(shape, dtype))
    return _wrap(mapping, shape, dtype), mapping


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """Advise huge pages for a CPU tensor that has not been written yet, and return it. Rows read anywhere in it then miss the
    processor's page tables less often. Advice only: where there are none, nothing changes."""
    if tensor.is_cpu:
        _C.prefer_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return tensor


def map_file(
    path: str | os.PathLike[str], offset: int, shape: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, _C.Mapping]:
    """A tensor over a file's bytes from `offset`, a multiple of 4096, read-only from the start.

    A file that is cut short underneath ends the process with SIGBUS at the next read; one that is rewritten may change
    the tensor. Raises ShapeError for no elements, RequestError for a range that the file does not have, OSError for a
    file that cannot be opened or mapped.
    """
    size = _size_bytes(shape, dtype)
    try:
        mapping = _C.Mapping.map_file(os.fsencode(path), offset, size)
    except ValueError as error:
        raise RequestError(
            "file range",
            found=str(error),
            needed=f"{size:,} bytes from offset {offset:,}, a multiple of 4096",
            do="check the header",
        ) from None
    return _wrap(mapping, shape, dtype), mapping


def _size_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    if any(n < 1 for n in shape):
        raise ShapeError("shape", found=list(shape), needed="1 or more in each dimension", do="map what has elements")
    return math.prod(shape) * dtype.itemsize


def _wrap(mapping: _C.Mapping, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    with warnings.catch_warnings():
        # torch has no read-only tensors and warns of a read-only buffer: here the pages themselves refuse a write.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=dtype).view(tuple(shape))


# -- the sum of a block ------------------------------------------------------------------------------------------------


def block_sum(block: Tensor, *, start_word: int = 0) -> int:
    """Sum over the block's 8-byte little-endian words w_i of w_i * ((i * GOLDEN) | 1), as an integer in [0, 2**64).

    block       any shape, strides, dtype and device; a multiple of 8 bytes; read as if contiguous, where it lies
    start_word  index of its first word, for a block that is summed in parts

    A changed word always changes the sum. The same number on every device. Raises ShapeError for a part of a word.
    """
    size_bytes = block.numel() * block.element_size()
    if size_bytes % WORD:
        raise ShapeError(
            "block", found=f"{size_bytes} bytes", needed=f"a multiple of {WORD}", do="sum whole rows of a padded block"
        )
    if block.device.type != "cpu":
        return block_sum_torch(block, start_word=start_word)
    return _block_sum_cpu(block, start_word) % (1 << 64)


def _block_sum_cpu(block: Tensor, start_word: int) -> int:
    if block.is_contiguous():
        return _C.block_sum(block.data_ptr(), block.numel() * block.element_size(), start_word % (1 << 64))
    part_bytes = block[0].numel() * block.element_size()
    if block.stride(-1) != 1 or part_bytes % WORD:
        return _block_sum_cpu(block.contiguous(), start_word)
    # A view of heads or layers is contiguous further in: no copy of the block.
    words = part_bytes // WORD
    return sum(_block_sum_cpu(part, start_word + i * words) for i, part in enumerate(block))


def block_sums(blocks: Sequence[tuple[Tensor, int]]) -> list[int]:
    """`block_sum` of each (block, start word); what lies on a GPU is read back at once, not block by block."""
    if any(block.device.type == "cpu" for block, _ in blocks):
        return [block_sum(block, start_word=start_word) for block, start_word in blocks]
    sums = [_sum_where_it_lies(block, start_word) for block, start_word in blocks]
    return [value % (1 << 64) for value in torch.stack(sums).tolist()] if sums else []


def block_sum_torch(block: Tensor, *, start_word: int = 0) -> int:
    """`block_sum` in torch's int64, which wraps as the sum needs it, on the block's own device."""
    return int(_sum_where_it_lies(block, start_word).item()) % (1 << 64)


def _sum_where_it_lies(block: Tensor, start_word: int) -> Tensor:
    words = block.contiguous().flatten().view(torch.int64)
    # An index of 2**63 or more has the same 64 bits as a negative one.
    first = (start_word + (1 << 63)) % (1 << 64) - (1 << 63)
    factor = torch.arange(words.numel(), dtype=torch.int64, device=words.device).add_(first)
    return factor.mul_(GOLDEN - (1 << 64)).bitwise_or_(1).mul_(words).sum()
