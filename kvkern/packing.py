"""KV in bfloat16, packed without loss: a plane (one layer's K or V) of words <-> one frame of bytes.

    words [num_kv_heads, tokens, head_dim] -> byte planes: the high byte of every word, then the low ones -> zstd, level 1

Sign and exponent of a number lie in its high byte and take few values; the mantissa, mostly in the low one, is close to noise:
apart from each other the high bytes shrink. This is the one form that is offered: `bench/compression.py` measures it beside
others, bit by bit, against the rule that a form pays if it saves 20 % or more and unpacks at more than 1 GB/s on one core.
float32 and float16 have more mantissa to an exponent and stay below 20 %, so their KV is not packed.

A frame is zstd's own and says how many bytes it unpacks to: that is compared with what is needed before any is allocated. What
it unpacks to is judged by whoever knows the digests. Nothing here knows of files; zstandard is imported where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvkern.cpu import WORD
from kvkern.errors import RequestError, StoreError, UnsupportedError

FORM = "planes-zstd-1"
"""The name of the form; another one gets another name."""

LEVEL = 1
"""Of zstd."""

DTYPES = (torch.bfloat16,)
"""Of KV that is packed: those for which it pays. They have 16 bits, and nothing else here depends on them."""

MAX_RATIO = 64
"""A frame takes at least 1/64 of the bytes that it unpacks to, filled up with zeros: no small file asks for much memory."""

Words = NDArray[Any]
"""Bit patterns, unsigned integers of any width and strides."""


def check(form: str, dtype: torch.dtype | None = None) -> None:
    """Refuse what is not packed: another form, KV of another dtype, or a machine without the package.

    Raises RequestError naming the form, UnsupportedError naming the dtype or the package.
    """
    if form != FORM:
        raise RequestError("compress", found=form, needed=FORM, do=f"give {FORM}, or leave it out")
    if dtype is not None and dtype not in DTYPES:
        raise UnsupportedError(
            "compress",
            found=f"KV in {names([dtype])}",
            needed=f"{names(DTYPES)}: of others less than 20 % is saved, which does not pay (bench/compression.py)",
            do=f"leave compress out, or publish the document with the model in {names(DTYPES)}",
        )
    library()


def names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def library() -> ModuleType:
    """zstandard. Raises UnsupportedError where it is not installed."""
    try:
        import zstandard
    except ImportError:
        raise UnsupportedError(
            "zstandard",
            found="not installed",
            needed=f"the package that packs and unpacks {FORM}",
            do="pip install 'kvkern[compress]'",
        ) from None
    return zstandard


# -- words <-> frame ---------------------------------------------------------------------------------------------------


def pack(words: NDArray[np.uint16]) -> bytes:
    """One frame of the words, [num_kv_heads, tokens, head_dim], any strides."""
    return compress(planes(words))


def unpack(frame: bytes | memoryview, words: NDArray[np.uint16]) -> None:
    """Fill words, of any strides, with what was packed. Raises StoreError naming the frame, as `decompress` does."""
    fill_planes(decompress(frame, words.nbytes), words)


def planes(words: Words) -> NDArray[np.uint8]:
    """[bytes of a word, *shape of words], the highest byte first."""
    size = words.itemsize
    return np.stack([(words >> words.dtype.type(8 * n)).astype(np.uint8) for n in reversed(range(size))])


def fill_planes(data: bytes, words: Words) -> None:
    """The inverse of `planes`, a head at a time, so that its words stay in the cache."""
    parts = np.frombuffer(data, np.uint8).reshape(words.itemsize, *words.shape)
    for head, own in enumerate(words):
        own[...] = parts[0, head]
        for part in parts[1:, head]:
            own <<= 8
            np.bitwise_or(own, part, out=own)


def compress(data: NDArray[Any], level: int = LEVEL) -> bytes:
    """One frame of zstd, of a contiguous array; it says how many bytes it unpacks to."""
    return library().ZstdCompressor(level=level).compress(data)


def decompress(frame: bytes | memoryview, size: int) -> bytes:
    """The bytes of a frame that has to hold `size` of them, no more and no fewer.

    Raises StoreError with the field "frame" for another size, which is seen before memory is asked for, for a frame that is
    cut short, damaged, or none, and for bytes behind it; UnsupportedError without zstandard.
    """
    zstandard = library()
    try:
        found = zstandard.frame_content_size(frame)
        if found != size:
            raise _wrong("no size in it" if found < 0 else f"a size of {found:,} bytes in it", f"{size:,} bytes")
        # A decompressor serves one thread at a time; a new one takes microseconds.
        data: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _wrong(f"what zstd does not read ({error})", f"a frame of {size:,} bytes") from None
    if len(data) != size:
        raise _wrong(f"{len(data):,} bytes", f"{size:,}")
    return data


def _wrong(found: str, needed: str) -> StoreError:
    return StoreError("frame", found=found, needed=needed, do="pack the words again")


# -- room in a file ----------------------------------------------------------------------------------------------------


def max_length(size: int) -> int:
    """Bytes of a frame of `size` bytes at most: what zstd promises for bytes that do not shrink."""
    return size + size // 256 + 64


def slot_bytes(length: int, size: int) -> int:
    """Bytes that a frame of `length` bytes takes in a file, where it unpacks to `size`: whole words, and not too few."""
    return -(-max(length, -(-size // MAX_RATIO)) // WORD) * WORD
