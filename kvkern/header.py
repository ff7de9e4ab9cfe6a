"""What precedes the KV in a .kv file: its format, and all that is known of a file before a byte of KV is read.

A .kv file is one safetensors file; any reader of safetensors opens it:

    8 bytes        length N of the header, little-endian
    N bytes        header: JSON, then spaces, so that 8 + N is a multiple of 4096
    kv             [layers, 2, num_kv_heads, P padded to 128, head_dim], K before V, padding zeros: byte for byte the
                   allocation that kernels read; it can be mapped
    token_ids      int64 [P]

The header's JSON is canonical (sorted keys, no spaces, ASCII). Beside the two tensors it holds `__metadata__`, whose one key
`kvkern` is itself canonical JSON:

    format         identity.FORMAT; a reader refuses every other
    identity       Identity, field by field; its `token_ids` is also the digest of the tensor token_ids
    kv             SHA-256 of every (layer, K or V, segment) in that order: of the bytes of its tokens, head after head. A
                   segment is geometry.segment_tokens(P) tokens, the last one with the padding
    sums           64-bit sums of the same blocks (csrc/blocksum.h), 16 hex digits each: what SharedPrefix.check recomputes
    provenance     who made it, when and with what: not compared
    sha256         of the canonical JSON of all the above

A reader holds the file to its own canonical form: from the metadata follow all other bytes of the header and the size of
the file, so no byte can change unseen. Nothing is unpickled or run.

KV in bfloat16 may be packed without loss (`save(..., compress="planes-zstd-1")`). Identity, digests and sums are those of the
unpacked block, so they are the same in both forms, and what is read is verified by the same SHA-256. The file differs in this:

    format         PACKED_FORMAT, which a reader that knows only plain files refuses by name
    packing        in the metadata: {form, lengths, sums}, of the frames: bytes of each, and the 64-bit sum of its slot, 16 hex digits
    frames         uint8 [n], in the place of kv: a frame (packing.pack) for every (layer, K or V) in that order, of its real
                   tokens, without the padding. Each lies in a slot of packing.slot_bytes, filled up with zeros, one slot after
                   another: where a frame lies follows from the lengths before it
    N              has room for the numbers of the widest frames, so that it is known before they are
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kvkern import packing
from kvkern.errors import IdentityError, KvkernError, StoreError
from kvkern.files import AGAIN, damaged, foreign, read
from kvkern.geometry import Geometry, num_segments, pad_tokens
from kvkern.identity import FORMAT, LAYOUT, Identity, canonical, short

PACKED_FORMAT = 2
"""Version of a file whose KV is packed; that of a plain one is identity.FORMAT."""

ALIGNMENT = 4096
"""kv starts at a multiple of this many bytes, so that it can be mapped."""

MAX_HEADER = 64 << 20
"""Bytes of header that are read at most; 1,000 layers of 16 segments have 3 MiB."""

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

OPENING = b'{"__metadata__":{"kvkern":'
"""The header's first bytes: canonical JSON begins so. Another file is no damaged .kv file, and copying it again helps nobody."""


@dataclass(frozen=True)
class Frames:
    """Where the frames of a packed file lie, one for every (layer, K or V).

    form     packing.FORM
    size     bytes that each unpacks to: [num_kv_heads, tokens, head_dim] words
    lengths  bytes of each
    sums     64-bit sum of each one's slot
    """

    form: str
    size: int
    lengths: tuple[int, ...]
    sums: tuple[int, ...]

    @cached_property
    def slots(self) -> list[int]:
        """Bytes that each takes in the file."""
        return [packing.slot_bytes(length, self.size) for length in self.lengths]

    @property
    def most_bytes(self) -> int:
        """What all of them may take at most."""
        return len(self.lengths) * packing.slot_bytes(packing.max_length(self.size), self.size)

    def to_dict(self) -> dict[str, Any]:
        return {"form": self.form, "lengths": _hex(self.lengths), "sums": _hex(self.sums)}


@dataclass(frozen=True)
class Header:
    """What is known of a .kv file from its header.

    path        the file
    identity    what its KV was made with
    provenance  who made it, when and with what: JSON values
    kv          SHA-256 of every (layer, K or V, segment)
    sums        64-bit sums of the same blocks
    kv_offset   byte of the file where kv, or the first frame, begins
    size_bytes  of the whole file
    frames      of a file whose KV is packed, or None
    """

    path: Path
    identity: Identity
    provenance: Mapping[str, Any]
    kv: tuple[str, ...]
    sums: tuple[int, ...]
    kv_offset: int
    size_bytes: int
    frames: Frames | None = None

    @property
    def tokens(self) -> int:
        return self.identity.tokens

    @property
    def segments(self) -> int:
        """Segments of one layer's K or V."""
        return num_segments(self.tokens)

    @property
    def kv_end(self) -> int:
        """Byte of the file after its KV, where the token ids begin."""
        return self.kv_offset + stored_size(self.identity.geometry, self.tokens, self.frames)


# -- writing -----------------------------------------------------------------------------------------------------------


def header_bytes(
    identity: Identity, kv: list[str], sums: list[int], provenance: Mapping[str, Any], frames: Frames | None
) -> bytes:
    """Length and header, a multiple of 4096 bytes: all that precedes kv."""
    geometry, tokens = identity.geometry, identity.tokens
    metadata: dict[str, Any] = {
        "format": FORMAT if frames is None else PACKED_FORMAT,
        "identity": identity.to_dict(),
        "kv": kv,
        "sums": _hex(sums),
        "provenance": provenance,
        **({} if frames is None else {"packing": frames.to_dict()}),
    }
    metadata["sha256"] = hashlib.sha256(canonical(metadata).encode()).hexdigest()
    inner = {"kvkern": canonical(metadata)}

    def outer(end: int) -> bytes:
        if frames is None:
            block = {"dtype": DTYPES[geometry.dtype], "shape": list(geometry.block_shape(tokens))}
        else:
            block = {"dtype": "U8", "shape": [end]}
        return canonical(
            {
                "__metadata__": inner,
                "kv" if frames is None else "frames": {**block, "data_offsets": [0, end]},
                "token_ids": {"dtype": "I64", "shape": [tokens], "data_offsets": [end, end + 8 * tokens]},
            }
        ).encode()

    text = outer(stored_size(geometry, tokens, frames))
    # A header's place is left out before its frames are known: it has room for the widest.
    widest = text if frames is None else outer(frames.most_bytes)
    size = -(-(8 + len(widest)) // ALIGNMENT) * ALIGNMENT - 8
    return size.to_bytes(8, "little") + text.ljust(size)


def _hex(values: Iterable[int]) -> list[str]:
    """16 digits each, so that the size of a header does not depend on them."""
    return [f"{value:016x}" for value in values]


# -- sizes in bytes ----------------------------------------------------------------------------------------------------


def row_size(geometry: Geometry, tokens: int) -> int:
    """Of one head's K or V in one layer, with the padding."""
    return pad_tokens(tokens) * geometry.head_dim * geometry.dtype.itemsize


def kv_size(geometry: Geometry, tokens: int) -> int:
    """Of the whole block."""
    return geometry.layers * 2 * geometry.num_kv_heads * row_size(geometry, tokens)


def plane_size(geometry: Geometry, tokens: int) -> int:
    """Of one layer's K or V, without the padding."""
    return geometry.num_kv_heads * tokens * geometry.head_dim * geometry.dtype.itemsize


def stored_size(geometry: Geometry, tokens: int, frames: Frames | None) -> int:
    """What the KV takes in the file."""
    return kv_size(geometry, tokens) if frames is None else sum(frames.slots)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_header(fd: int, name: str, path: Path) -> Header:
    """Read and verify the header, and that the file has the size it says. Raises StoreError."""
    size = os.fstat(fd).st_size
    if size < 8:
        raise foreign(f"{size} bytes in {name}", field="size")
    start = bytes(read(fd, name, "header", 0, min(size, 8 + len(OPENING))))
    length = int.from_bytes(start[:8], "little")
    # One of the two is left where a single byte is damaged.
    if (8 + length) % ALIGNMENT and b"kvkern" not in start:
        raise foreign(f"no header of a .kv file in {name}")
    if length > min(MAX_HEADER, size - 8) or (8 + length) % ALIGNMENT:
        needed = f"at most {min(MAX_HEADER, size - 8):,}, and {ALIGNMENT} with the 8 before it or a multiple"
        raise damaged("header", f"a length of {length:,} bytes in {name}", needed)
    given = bytes(read(fd, name, "header", 8, length))
    metadata = _metadata(given, name)

    format_ = metadata.get("format")
    if format_ not in (FORMAT, PACKED_FORMAT):
        raise StoreError(
            "metadata.format",
            found=f"{format_} in {name}",
            needed=f"{FORMAT} or {PACKED_FORMAT} as this kvkern reads",
            do="read it with the kvkern that wrote it, or publish the document again",
        )
    header = _parse(metadata, name, path, 8 + length, size)
    if _canonical_header(header) != length.to_bytes(8, "little") + given:
        raise damaged("header", f"bytes in {name} that do not follow from its metadata", "the canonical header")
    needed_size = header.kv_end + 8 * header.tokens
    if size != needed_size:
        raise damaged("size", f"{size:,} bytes in {name}", f"{needed_size:,} as its header says")
    return header


def _metadata(given: bytes, name: str) -> dict[str, Any]:
    try:
        outer = json.loads(given)
        text = outer["__metadata__"]["kvkern"]
    except (KeyError, TypeError):
        found = f"a header without the metadata key kvkern in {name}"
        # Ours names kvkern more than once, so where a byte of the key is damaged another is left.
        raise (damaged("header", found, "a .kv file") if b"kvkern" in given else foreign(found)) from None
    except (ValueError, RecursionError):
        raise damaged("header", f"no JSON in {name}", "a .kv file") from None
    try:
        metadata = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise damaged("metadata", f"no JSON object in {name}", "what kvkern wrote")
    return metadata


def _parse(metadata: dict[str, Any], name: str, path: Path, kv_offset: int, size: int) -> Header:
    rest = {key: value for key, value in metadata.items() if key != "sha256"}
    try:
        digest = hashlib.sha256(canonical(rest).encode()).hexdigest()
    except (ValueError, RecursionError):
        digest = "no canonical JSON"
    if metadata.get("sha256") != digest:
        raise damaged("metadata", f"a SHA-256 of {short(digest)} in {name}", "the one that is written in it")
    try:
        identity = Identity.from_dict(metadata["identity"])
        if identity.layout != LAYOUT:
            raise IdentityError("layout", found=identity.layout, needed=f"{LAYOUT} as this kvkern reads", do=AGAIN)
        if identity.tokens < 1:
            raise IdentityError("tokens", found=identity.tokens, needed="at least 1", do=AGAIN)
        blocks = identity.geometry.layers * 2 * num_segments(identity.tokens)
        kv, sums = metadata["kv"], metadata["sums"]
        if not (len(kv) == len(sums) == blocks and all(isinstance(d, str) and len(d) == 64 for d in kv)):
            raise damaged("metadata.kv", f"{len(kv)} digests and {len(sums)} sums in {name}", f"{blocks} of each")
        return Header(
            path=path,
            identity=identity,
            provenance=dict(metadata["provenance"]),
            kv=tuple(kv),
            sums=tuple(int(value, 16) for value in sums),
            kv_offset=kv_offset,
            size_bytes=size,
            frames=_parse_frames(metadata["packing"], identity, name) if metadata["format"] == PACKED_FORMAT else None,
        )
    except IdentityError as error:
        raise damaged(f"metadata.identity.{error.field}", f"{error.found} in {name}", error.needed) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # The digest is right, so this was written so: not a damaged file, a foreign one.
        if isinstance(error, KvkernError):
            raise
        raise damaged("metadata", f"fields of another kind in {name}", "what kvkern wrote") from None


def _parse_frames(given: dict[str, Any], identity: Identity, name: str) -> Frames:
    """Frames of plausible lengths, so that no more is read than they can be, nor more unpacked than their file allows."""
    if given["form"] != packing.FORM:
        raise StoreError(
            "metadata.packing.form",
            found=f"{given['form']} in {name}",
            needed=f"{packing.FORM} as this kvkern reads",
            do="read it with the kvkern that wrote it, or publish the document again",
        )
    geometry = identity.geometry
    if geometry.dtype not in packing.DTYPES:
        found = f"packed KV in {packing.names([geometry.dtype])} in {name}"
        raise damaged("metadata.packing", found, packing.names(packing.DTYPES))
    lengths, sums = (tuple(int(value, 16) for value in given[key]) for key in ("lengths", "sums"))
    planes, size = geometry.layers * 2, plane_size(geometry, identity.tokens)
    if not len(lengths) == len(sums) == planes:
        found = f"{len(lengths)} lengths and {len(sums)} sums in {name}"
        raise damaged("metadata.packing.lengths", found, f"{planes} of each")
    for n, length in enumerate(lengths):
        if not 1 <= length <= packing.max_length(size):
            needed = f"1 to {packing.max_length(size):,} for {size:,} bytes"
            raise damaged(f"metadata.packing.lengths[{n}]", f"{length:,} bytes in {name}", needed)
    return Frames(given["form"], size, lengths, sums)


def _canonical_header(header: Header) -> bytes:
    return header_bytes(header.identity, list(header.kv), list(header.sums), header.provenance, header.frames)
