"""Published prefixes as .kv files: the allocation itself on disk (its format: header.py), verified before it serves.

A file is there whole or not at all (files.py). Every byte of KV is hashed on its way, in both directions, by one walk over the
same blocks: what is written is what was published, and what serves is what was written. Bytes stream a row of one head at a
time, packed ones a layer's K or V at a time on each of a few threads, so that neither saving nor loading holds a second copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvkern import cpu, files, packing
from kvkern.errors import CapacityError, IdentityError, RequestError, StoreError
from kvkern.geometry import Geometry, num_segments, segment_tokens
from kvkern.header import (
    MAX_HEADER,
    Frames,
    Header,
    header_bytes,
    kv_size,
    plane_size,
    read_header,
    row_size,
    stored_size,
)
from kvkern.identity import Identity, canonical, short, tensor_bytes, tokens_digest
from kvkern.prefix import SharedPrefix

THREADS = 4
"""Planes (one layer's K or V) that are hashed, packed or unpacked at a time."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

Make = Callable[[Geometry, Tensor, Header], SharedPrefix]

Block = tuple[int, int, int]
"""(layer, 0 for K or 1 for V, segment)."""

Rows = Callable[[int, int], Iterator[memoryview]]
"""(layer, 0 for K or 1 for V) -> the bytes of its rows, head after head."""


# -- writing -----------------------------------------------------------------------------------------------------------


def save(
    prefix: SharedPrefix,
    path: str | os.PathLike[str],
    *,
    compress: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a published prefix as a .kv file, whole or not at all; an older file of that name is replaced by it.

    compress  packing.FORM, "planes-zstd-1": pack KV in bfloat16 without loss. By default the block as it is, which can be mapped
    progress  called with (bytes of KV done, bytes of KV in all)

    Raises RequestError for a prefix without identity or provenance that is no JSON, or another form of packing, StoreError
    for a path that cannot be written, a full disk, or a block that changed in memory since it was published, ReadOnlyError for
    a released prefix, UnsupportedError for a dtype that is not packed, or without the package that packs.
    """
    identity, provenance = _savable(prefix)
    frames = None
    if compress is not None:
        packing.check(compress, prefix.geometry.dtype)
        zeros = (0,) * (prefix.geometry.layers * 2)
        frames = Frames(compress, plane_size(prefix.geometry, prefix.tokens), zeros, zeros)
    target = files.target_of(path)
    sums = [value % (1 << 64) for value in prefix.sums.flatten().tolist()]
    blank = header_bytes(identity, ["0" * 64] * len(sums), sums, provenance, frames)
    if len(blank) > MAX_HEADER:
        raise RequestError(
            "provenance",
            found=f"a header of {len(blank):,} bytes",
            needed=f"at most {MAX_HEADER:,}",
            do="make it shorter",
        )
    files.remove_orphans(target.parent)
    try:
        with files.temporary(target.parent) as (fd, temporary):
            if frames is None:
                kv = _write_kv(prefix, fd, len(blank), sums, progress)
            else:
                kv, frames = _write_frames(prefix, frames, fd, len(blank), sums, progress)
            stored = stored_size(prefix.geometry, prefix.tokens, frames)
            files.write(fd, tensor_bytes(prefix.token_ids), len(blank) + stored)
            # Digests have one length, so the header that was left out has the size of the one that is known now.
            header = header_bytes(identity, kv, sums, provenance, frames)
            assert len(header) == len(blank)
            files.write(fd, memoryview(header), 0)
            os.fsync(fd)
            os.replace(temporary, target)
        files.sync_folder(target.parent)
    except OSError as error:
        raise files.system_error(target, error, "free space or choose another folder, and save again") from None


def _savable(prefix: SharedPrefix) -> tuple[Identity, dict[str, Any]]:
    prefix.block()
    identity = prefix.identity
    if not prefix.published or not isinstance(identity, Identity):
        raise RequestError(
            "prefix.identity",
            found="none" if prefix.published else "a prefix that is still being filled",
            needed="a prefix that was published with its Identity",
            do="publish it with kvkern.publish",
        )
    needed = (prefix.geometry, prefix.tokens, tokens_digest(prefix.token_ids), prefix.position)
    if (identity.geometry, identity.tokens, identity.token_ids, identity.position) != needed:
        raise RequestError(
            "prefix.identity",
            found=f"{identity.tokens} tokens at {identity.position}, {identity.geometry}",
            needed=f"this prefix's own {prefix.tokens} tokens at {prefix.position}, {prefix.geometry}",
            do="publish it with Identity.of its own token ids and parent",
        )
    provenance: dict[str, Any] = {"created": datetime.now(UTC).isoformat(timespec="seconds")}
    for package in ("kvkern", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            provenance[package] = version(package)
    provenance.update(prefix.provenance)
    for name, value in provenance.items():
        try:
            canonical({name: value})
        except (TypeError, ValueError):
            raise RequestError(
                f"provenance.{name}", found=type(value).__name__, needed="a JSON value", do="make it a text"
            ) from None
    return identity, provenance


def _write_kv(prefix: SharedPrefix, fd: int, offset: int, sums: list[int], progress: Progress | None) -> list[str]:
    """The digests of what was written."""
    block, heads = prefix.block(), prefix.geometry.num_kv_heads
    row_bytes = row_size(prefix.geometry, prefix.tokens)

    def put(layer: int, which: int) -> Iterator[memoryview]:
        for head in range(heads):
            written = tensor_bytes(block[layer, which, head].cpu())
            files.write(fd, written, offset + ((layer * 2 + which) * heads + head) * row_bytes)
            yield written

    return [digest for _, _, digest in _unchanged(prefix, sums, put, progress)]


def _write_frames(
    prefix: SharedPrefix, blank: Frames, fd: int, offset: int, sums: list[int], progress: Progress | None
) -> tuple[list[str], Frames]:
    """The digests of what was packed, and its frames."""
    block, tokens, packed = prefix.block(), prefix.tokens, dict[tuple[int, int], bytes]()

    def put(layer: int, which: int) -> Iterator[memoryview]:
        plane = block[layer, which].cpu()
        words = _words(plane)
        if words[:, tokens:].any():
            raise StoreError(
                f"kv[layer {layer}, {'KV'[which]}]",
                found="padding that is not zeros",
                needed="zeros, which are not packed",
                do="publish the document again",
            )
        packed[layer, which] = packing.pack(words[:, :tokens])
        for own in plane:
            yield tensor_bytes(own)

    digests, lengths, slot_sums = [], [], []
    for layer, which, digest in _unchanged(prefix, sums, put, progress):
        digests.append(digest)
        if (layer, which) in packed:  # else a later segment of the plane
            frame = packed.pop((layer, which))
            slot = bytearray(packing.slot_bytes(len(frame), blank.size))
            slot[: len(frame)] = frame
            files.write(fd, memoryview(slot), offset)
            offset += len(slot)
            lengths.append(len(frame))
            slot_sums.append(_sum(slot))
    return digests, Frames(blank.form, blank.size, tuple(lengths), tuple(slot_sums))


def _unchanged(
    prefix: SharedPrefix, sums: list[int], rows: Rows, progress: Progress | None
) -> Iterator[tuple[int, int, str]]:
    """(layer, 0 for K or 1 for V, SHA-256) of every block, which has the sum that it was published with."""
    known = iter(sums)
    for (layer, which, segment), digest, total in _walk(prefix.geometry, prefix.tokens, rows, progress):
        if total != next(known):
            raise StoreError(
                _region(layer, which, segment),
                found="a block in memory that changed since it was published",
                needed="the sum it was published with",
                do="publish the document again; if it comes back, the memory is at fault",
            )
        yield layer, which, digest


# -- the walk over all blocks, the same for writing, reading and verifying ---------------------------------------------


def _walk(geometry: Geometry, tokens: int, rows: Rows, progress: Progress | None) -> Iterator[tuple[Block, str, int]]:
    """(block, SHA-256, 64-bit sum) of every (layer, K or V, segment) in order; planes are hashed on several threads.

    rows  moves the rows of one (layer, 0 for K or 1 for V), [padded tokens, head_dim] a head, to or from the file; gives the
          bytes of one after another, which stay as they are until the next is asked for
    """
    heads, row_bytes = geometry.num_kv_heads, row_size(geometry, tokens)
    step = segment_tokens(tokens) * geometry.head_dim * geometry.dtype.itemsize
    planes = [(layer, which) for layer in range(geometry.layers) for which in range(2)]
    left = iter(planes)

    def digest(layer: int, which: int) -> list[tuple[Block, str, int]]:
        hashers = [hashlib.sha256() for _ in range(num_segments(tokens))]
        sums = [0] * len(hashers)
        for head, data in enumerate(rows(layer, which)):
            for segment, hasher in enumerate(hashers):
                part = data[segment * step : (segment + 1) * step]
                hasher.update(part)
                sums[segment] += _sum(part, start_word=head * len(part) // cpu.WORD)
        return [
            ((layer, which, segment), hasher.hexdigest(), sums[segment] % (1 << 64))
            for segment, hasher in enumerate(hashers)
        ]

    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    ahead: deque[Future[list[tuple[Block, str, int]]]] = deque()
    try:
        for done in range(1, len(planes) + 1):
            # What waits to be taken is bounded: a frame may lie behind it.
            for plane in islice(left, THREADS + 1 - len(ahead)):
                ahead.append(pool.submit(digest, *plane))
            yield from ahead.popleft().result()
            if progress is not None:
                progress(done * heads * row_bytes, len(planes) * heads * row_bytes)
    finally:
        # After an error or Ctrl-C no plane is begun, and none is under way when the file is closed.
        pool.shutdown(wait=True, cancel_futures=True)


def _region(layer: int, which: int, segment: int) -> str:
    return f"kv[layer {layer}, {'KV'[which]}, segment {segment}]"


def _sum(data: memoryview | bytearray, *, start_word: int = 0) -> int:
    return cpu.block_sum(torch.frombuffer(data, dtype=torch.uint8), start_word=start_word)


def _words(plane: Tensor) -> NDArray[np.uint16]:
    """The bit patterns of 16-bit numbers on the CPU: a view."""
    return plane.view(torch.int16).numpy().view(np.uint16)


# -- reading -----------------------------------------------------------------------------------------------------------


def inspect(path: str | os.PathLike[str]) -> Header:
    """Read and verify the header, and nothing else. Raises StoreError."""
    with files.open_file(path) as (fd, name):
        return read_header(fd, name, Path(path))


def verify(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Header:
    """Read the whole file and verify every digest; needs neither a model nor memory for the KV.

    Raises StoreError, and UnsupportedError for packed KV without the package that unpacks it.
    """
    with files.open_file(path) as (fd, name):
        header = read_header(fd, name, Path(path))
        _read_token_ids(fd, name, header)
        geometry = header.identity.geometry
        shape, row_bytes = geometry.block_shape(header.tokens)[2:], row_size(geometry, header.tokens)

        def get(layer: int, which: int) -> Iterator[memoryview]:
            if header.frames is not None:
                room = torch.zeros(shape, dtype=geometry.dtype)
                _read_frame(fd, name, header, layer, which, room)
                yield from map(tensor_bytes, room)
            else:
                for region, offset in _places(header, layer, which):
                    yield files.read(fd, name, region, offset, row_bytes)

        _check_blocks(header, name, get, progress)
        return header


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    check: Callable[[Identity, str], None] | None = None,
    parent: SharedPrefix | None = None,
    mmap: bool = False,
    progress: Progress | None = None,
    make: Make | None = None,
) -> SharedPrefix:
    """Read a .kv file into a published prefix: header, identity, then every digest on the way in. A failure leaves nothing.

    device    where the block is to lie
    check     called with the file's identity and name before a byte of KV is read; raises to refuse it (identity.match)
    parent    the published prefix that the file continues; its identity must be the one the file was made below
    mmap      serve from a read-only mapping of the file (CPU only) after a pass over all digests, instead of a copy. The
              mapping is shared between processes and costs no memory of its own, but it is the file: one that is rewritten
              in place changes the KV unseen (until `check()` of the prefix), one that is cut short ends the process with
              SIGBUS. Replacing it by rename, as `save` does, or deleting it changes nothing for those who have it mapped
    progress  called with (bytes done, bytes in all)
    make      (geometry, token ids, Header) -> an unpublished prefix to fill, where it is to be more than a SharedPrefix

    Packed KV is unpacked on the way, a layer's K or V at a time on each of a few threads, to where it belongs.

    Raises StoreError naming the region that is damaged, IdentityError naming the field that differs, RequestError for mmap on
    another device than the CPU or of packed KV, UnsupportedError for packed KV without the package that unpacks it.
    """
    device = torch.device(device)
    if mmap and device.type != "cpu":
        raise RequestError(
            "mmap", found=f"device {device}", needed="cpu", do="leave mmap out: the block is copied anyway"
        )
    with files.open_file(path) as (fd, name):
        header = read_header(fd, name, Path(path))
        if header.frames is not None:
            packing.check(header.frames.form)
            if mmap:
                raise RequestError(
                    "mmap",
                    found=f"KV packed as {header.frames.form} in {name}",
                    needed="a plain .kv file",
                    do="load it without mmap, or load it and save it again without compress",
                )
        _check_parent(header.identity, parent, name)
        if check is not None:
            check(header.identity, name)
        token_ids = _read_token_ids(fd, name, header)
        geometry = header.identity.geometry
        try:
            if make is None:
                prefix = SharedPrefix(geometry, token_ids, device=device, parent=parent)
            else:
                prefix = make(geometry, token_ids, header)
        except (OSError, torch.OutOfMemoryError) as error:
            raise CapacityError(
                "memory",
                found=f"no {kv_size(geometry, header.tokens):,} bytes on {device}: {type(error).__name__}",
                needed="memory for the whole prefix",
                do="free memory" + ("" if header.frames else ", or on the CPU load it with mmap=True"),
            ) from None
        try:
            _fill(prefix, fd, name, header, mmap, progress)
            prefix.publish(identity=header.identity, provenance=header.provenance)
            _check_sums(prefix, header)
        except BaseException:
            prefix.release()
            raise
        return prefix


def _fill(prefix: SharedPrefix, fd: int, name: str, header: Header, mmap: bool, progress: Progress | None) -> None:
    geometry, tokens = prefix.geometry, prefix.tokens
    row_bytes = row_size(geometry, tokens)
    if mmap:
        try:
            shape = geometry.block_shape(tokens)
            prefix.adopt(*cpu.map_file(header.path, header.kv_offset, shape, geometry.dtype))
        except OSError as error:
            raise files.system_error(header.path, error, "load it without mmap") from None
        except RequestError as error:
            raise StoreError("size", found=f"{error.found} in {name}", needed=error.needed, do=files.AGAIN) from None
    block = prefix.block()

    def get(layer: int, which: int) -> Iterator[memoryview]:
        plane = block[layer, which]
        if header.frames is not None:
            # On the CPU hashed where it lies, as below.
            room = plane if plane.device.type == "cpu" else torch.zeros(plane.shape, dtype=geometry.dtype)
            _read_frame(fd, name, header, layer, which, room)
            yield from map(tensor_bytes, room)
            if room is not plane:
                plane.copy_(room)
            return
        for to, (region, offset) in zip(plane, _places(header, layer, which), strict=True):
            if mmap:
                yield tensor_bytes(to)
            elif to.device.type == "cpu":
                # Hashed where it lies: what is verified is what will be read.
                yield files.read_into(fd, name, region, offset, tensor_bytes(to))
            else:
                data = files.read(fd, name, region, offset, row_bytes)
                to.copy_(torch.frombuffer(data, dtype=geometry.dtype).view(to.shape))
                yield data

    _check_blocks(header, name, get, progress)


def _places(header: Header, layer: int, which: int) -> Iterator[tuple[str, int]]:
    """(region, byte of the file) of the rows of a layer's K or V in a plain file."""
    heads, row_bytes = header.identity.geometry.num_kv_heads, row_size(header.identity.geometry, header.tokens)
    for row in range((layer * 2 + which) * heads, (layer * 2 + which + 1) * heads):
        yield f"kv[layer {layer}, {'KV'[which]}]", header.kv_offset + row * row_bytes


def _read_frame(fd: int, name: str, header: Header, layer: int, which: int, room: Tensor) -> None:
    """Unpack a layer's K or V to where it belongs, [num_kv_heads, padded tokens, head_dim] on the CPU; the padding stays."""
    assert header.frames is not None
    index, slots, region = layer * 2 + which, header.frames.slots, f"frame of kv[layer {layer}, {'KV'[which]}]"
    slot = files.read(fd, name, region, header.kv_offset + sum(slots[:index]), slots[index])
    found, needed = _sum(slot), header.frames.sums[index]
    if found != needed:
        raise files.damaged(region, f"a sum of {found:016x} in {name}", f"{needed:016x} as in its header")
    try:
        packing.unpack(slot[: header.frames.lengths[index]], _words(room)[:, : header.tokens])
    except StoreError as error:
        raise files.damaged(region, f"{error.found} in {name}", error.needed) from None


def _check_blocks(header: Header, name: str, get: Rows, progress: Progress | None) -> None:
    known = zip(header.kv, header.sums, strict=True)
    for block, digest, total in _walk(header.identity.geometry, header.tokens, get, progress):
        region, (needed, needed_sum) = _region(*block), next(known)
        if digest != needed:
            raise StoreError(
                region,
                found=f"a SHA-256 of {short(digest)} in {name}",
                needed=f"{short(needed)} as in its header",
                do=files.AGAIN,
            )
        if total != needed_sum:
            raise StoreError(
                f"metadata.sums, {region}",
                found=f"{needed_sum:016x} in {name}",
                needed=f"{total:016x}, the sum of that block",
                do=files.AGAIN,
            )


def _check_sums(prefix: SharedPrefix, header: Header) -> None:
    """What lies on the device now is what was read. On the CPU the digests were taken there; elsewhere after a copy."""
    found = [value % (1 << 64) for value in prefix.sums.flatten().tolist()]
    for (layer, which, segment, _), a, b in zip(prefix.blocks(), found, header.sums, strict=True):
        if a != b:
            raise StoreError(
                _region(layer, which, segment),
                found=f"a sum of {a:016x} on {prefix.device}",
                needed=f"{b:016x} as in the file",
                do="load it again; if it comes back, the device's memory is at fault",
            )


def _check_parent(identity: Identity, parent: SharedPrefix | None, name: str) -> None:
    """A path is of one piece: the file's ancestors are the parent given, token for token and weight for weight."""
    given = None
    if parent is not None and isinstance(parent.identity, Identity):
        given = parent.identity.digest()
    if identity.ancestors != given:
        raise IdentityError(
            "ancestors",
            found=f"{short(identity.ancestors)} in {name}",
            needed="none, as no parent is given" if parent is None else f"{short(given)} as of the parent given",
            do="load the prefix that it continues first, and give it as parent"
            if identity.ancestors is not None
            else "load it without a parent",
        )
    position = 0 if parent is None else parent.end
    if identity.position != position:
        raise IdentityError(
            "position",
            found=f"{identity.position} in {name}",
            needed=f"{position} as the parent given ends",
            do=files.AGAIN,
        )


def _read_token_ids(fd: int, name: str, header: Header) -> Tensor:
    data = files.read(fd, name, "token_ids", header.kv_end, 8 * header.tokens)
    token_ids = torch.frombuffer(data, dtype=torch.int64)
    if tokens_digest(token_ids) != header.identity.token_ids:
        raise StoreError(
            "token_ids",
            found=f"a SHA-256 of {short(tokens_digest(token_ids))} in {name}",
            needed=f"{short(header.identity.token_ids)} as in its header",
            do=files.AGAIN,
        )
    return token_ids
