"""The .kv file: a published prefix on disk, the allocation itself, verified before it serves.

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

A file is written under a temporary name in the same folder, synced, renamed, and the folder synced: it is there whole or not
at all, and an older file of that name stays until then. A writer holds a lock on its temporary file, .kvkern-*.tmp, which the
system drops with the process: what a killed one left is found unlocked, and removed, by the next save into that folder. Bytes
stream a row of one head at a time, packed ones a layer's K or V at a time on each of a few threads, so that neither saving nor
loading holds a second copy.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvkern import cpu, packing
from kvkern.errors import CapacityError, IdentityError, KvkernError, RequestError, StoreError
from kvkern.geometry import Geometry, num_segments, pad_tokens, segment_tokens
from kvkern.identity import FORMAT, LAYOUT, Identity, canonical, short, tensor_bytes, tokens_digest
from kvkern.prefix import SharedPrefix

PACKED_FORMAT = 2
"""Version of a file whose KV is packed; that of a plain one is identity.FORMAT."""

ALIGNMENT = 4096
"""kv starts at a multiple of this many bytes, so that it can be mapped."""

MAX_HEADER = 64 << 20
"""Bytes of header that are read at most; 1,000 layers of 16 segments have 3 MiB."""

THREADS = 4
"""Planes (one layer's K or V) that are hashed, packed or unpacked at a time."""

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

TEMPORARY, ENDING = ".kvkern-", ".tmp"
"""How the name of a file that is being written begins and ends."""

OPENING = b'{"__metadata__":{"kvkern":'
"""The header's first bytes: canonical JSON begins so. Another file is no damaged .kv file, and copying it again helps nobody."""

AGAIN = "copy the file again from where it came, or publish the document again"

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


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
        return self.kv_offset + _stored_bytes(self.identity.geometry, self.tokens, self.frames)


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
        frames = Frames(compress, _plane_bytes(prefix.geometry, prefix.tokens), zeros, zeros)
    target = _target(path)
    sums = [value % (1 << 64) for value in prefix.sums.flatten().tolist()]
    blank = _header_bytes(identity, ["0" * 64] * len(sums), sums, provenance, frames)
    if len(blank) > MAX_HEADER:
        raise RequestError(
            "provenance",
            found=f"a header of {len(blank):,} bytes",
            needed=f"at most {MAX_HEADER:,}",
            do="make it shorter",
        )
    _remove_orphans(target.parent)
    try:
        with _temporary(target.parent) as (fd, temporary):
            if frames is None:
                kv = _write_kv(prefix, fd, len(blank), sums, progress)
            else:
                kv, frames = _write_frames(prefix, frames, fd, len(blank), sums, progress)
            stored = _stored_bytes(prefix.geometry, prefix.tokens, frames)
            _write(fd, tensor_bytes(prefix.token_ids), len(blank) + stored)
            # Digests have one length, so the header that was left out has the size of the one that is known now.
            header = _header_bytes(identity, kv, sums, provenance, frames)
            assert len(header) == len(blank)
            _write(fd, memoryview(header), 0)
            os.fsync(fd)
            os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _system_error(target, error, "free space or choose another folder, and save again") from None


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


def _target(path: str | os.PathLike[str]) -> Path:
    try:
        target = Path(os.path.realpath(path))  # a link stays; what it points to is replaced
        missing, special = not target.parent.is_dir(), target.exists() and not target.is_file()
    except (OSError, ValueError) as error:
        raise _system_error(Path(path), error, "name a file in a folder") from None
    if missing:
        raise StoreError("path", found=f"no folder {target.parent}", needed="a folder", do="create it")
    if special:
        raise StoreError("path", found=f"{target}, no regular file", needed="a file name", do="name a file in a folder")
    return target


def _header_bytes(
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

    text = outer(_stored_bytes(geometry, tokens, frames))
    # A header's place is left out before its frames are known: it has room for the widest.
    widest = text if frames is None else outer(frames.most_bytes)
    size = -(-(8 + len(widest)) // ALIGNMENT) * ALIGNMENT - 8
    return size.to_bytes(8, "little") + text.ljust(size)


def _write_kv(prefix: SharedPrefix, fd: int, offset: int, sums: list[int], progress: Progress | None) -> list[str]:
    """The digests of what was written."""
    block, heads = prefix.block(), prefix.geometry.num_kv_heads
    row_bytes = _row_bytes(prefix.geometry, prefix.tokens)

    def put(layer: int, which: int) -> Iterator[memoryview]:
        for head in range(heads):
            written = tensor_bytes(block[layer, which, head].cpu())
            _write(fd, written, offset + ((layer * 2 + which) * heads + head) * row_bytes)
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
            _write(fd, memoryview(slot), offset)
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


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- temporary files: a name, and a lock for as long as its writer lives ------------------------------------------------


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[tuple[int, Path]]:
    """(descriptor, path) of a new file to write; gone afterwards under this name, whatever happens."""
    while True:
        path = folder / f"{TEMPORARY}{secrets.token_hex(8)}{ENDING}"
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            # Between open and lock it looks like an orphan, and another save may have taken it for one.
            if _lock(fd) is not False and _names(path, fd):
                yield fd, path
                return
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            os.close(fd)


def _remove_orphans(folder: Path) -> None:
    """Temporary files whose writer is gone; those of other users, and what cannot be locked here, stay."""
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(folder) if name.startswith(TEMPORARY) and name.endswith(ENDING)]
        for path in (folder / name for name in names):
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if stat.S_ISREG(os.fstat(fd).st_mode) and _lock(fd) and _names(path, fd):
                        path.unlink()
                finally:
                    os.close(fd)


def _lock(fd: int) -> bool | None:
    """Whether the file is ours alone from now on, until it is closed; None on a file system that has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _names(path: Path, fd: int) -> bool:
    """Whether the file still has this name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    return False


# -- the walk over all blocks, the same for writing, reading and verifying ---------------------------------------------


def _walk(geometry: Geometry, tokens: int, rows: Rows, progress: Progress | None) -> Iterator[tuple[Block, str, int]]:
    """(block, SHA-256, 64-bit sum) of every (layer, K or V, segment) in order; planes are hashed on several threads.

    rows  moves the rows of one (layer, 0 for K or 1 for V), [padded tokens, head_dim] a head, to or from the file; gives the
          bytes of one after another, which stay as they are until the next is asked for
    """
    heads, row_bytes = geometry.num_kv_heads, _row_bytes(geometry, tokens)
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


def _hex(values: Iterable[int]) -> list[str]:
    """16 digits each, so that the size of a header does not depend on them."""
    return [f"{value:016x}" for value in values]


def _words(plane: Tensor) -> NDArray[np.uint16]:
    """The bit patterns of 16-bit numbers on the CPU: a view."""
    return plane.view(torch.int16).numpy().view(np.uint16)


def _row_bytes(geometry: Geometry, tokens: int) -> int:
    return pad_tokens(tokens) * geometry.head_dim * geometry.dtype.itemsize


def _kv_bytes(geometry: Geometry, tokens: int) -> int:
    return geometry.layers * 2 * geometry.num_kv_heads * _row_bytes(geometry, tokens)


def _plane_bytes(geometry: Geometry, tokens: int) -> int:
    """Of one layer's K or V, without the padding."""
    return geometry.num_kv_heads * tokens * geometry.head_dim * geometry.dtype.itemsize


def _stored_bytes(geometry: Geometry, tokens: int, frames: Frames | None) -> int:
    """What the KV takes in the file."""
    return _kv_bytes(geometry, tokens) if frames is None else sum(frames.slots)


# -- reading -----------------------------------------------------------------------------------------------------------


def inspect(path: str | os.PathLike[str]) -> Header:
    """Read and verify the header, and nothing else. Raises StoreError."""
    with _open(path) as (fd, name):
        return _read_header(fd, name, Path(path))


def verify(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Header:
    """Read the whole file and verify every digest; needs neither a model nor memory for the KV.

    Raises StoreError, and UnsupportedError for packed KV without the package that unpacks it.
    """
    with _open(path) as (fd, name):
        header = _read_header(fd, name, Path(path))
        _read_token_ids(fd, name, header)
        geometry = header.identity.geometry
        shape, row_bytes = geometry.block_shape(header.tokens)[2:], _row_bytes(geometry, header.tokens)

        def get(layer: int, which: int) -> Iterator[memoryview]:
            if header.frames is not None:
                room = torch.zeros(shape, dtype=geometry.dtype)
                _read_frame(fd, name, header, layer, which, room)
                yield from map(tensor_bytes, room)
            else:
                for region, offset in _places(header, layer, which):
                    yield _read(fd, name, region, offset, row_bytes)

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
    with _open(path) as (fd, name):
        header = _read_header(fd, name, Path(path))
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
                found=f"no {_kv_bytes(geometry, header.tokens):,} bytes on {device}: {type(error).__name__}",
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
    row_bytes = _row_bytes(geometry, tokens)
    if mmap:
        try:
            shape = geometry.block_shape(tokens)
            prefix.adopt(*cpu.map_file(header.path, header.kv_offset, shape, geometry.dtype))
        except OSError as error:
            raise _system_error(header.path, error, "load it without mmap") from None
        except RequestError as error:
            raise StoreError("size", found=f"{error.found} in {name}", needed=error.needed, do=AGAIN) from None
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
                yield _read_into(fd, name, region, offset, tensor_bytes(to))
            else:
                data = _read(fd, name, region, offset, row_bytes)
                to.copy_(torch.frombuffer(data, dtype=geometry.dtype).view(to.shape))
                yield data

    _check_blocks(header, name, get, progress)


def _places(header: Header, layer: int, which: int) -> Iterator[tuple[str, int]]:
    """(region, byte of the file) of the rows of a layer's K or V in a plain file."""
    heads, row_bytes = header.identity.geometry.num_kv_heads, _row_bytes(header.identity.geometry, header.tokens)
    for row in range((layer * 2 + which) * heads, (layer * 2 + which + 1) * heads):
        yield f"kv[layer {layer}, {'KV'[which]}]", header.kv_offset + row * row_bytes


def _read_frame(fd: int, name: str, header: Header, layer: int, which: int, room: Tensor) -> None:
    """Unpack a layer's K or V to where it belongs, [num_kv_heads, padded tokens, head_dim] on the CPU; the padding stays."""
    assert header.frames is not None
    index, slots, region = layer * 2 + which, header.frames.slots, f"frame of kv[layer {layer}, {'KV'[which]}]"
    slot = _read(fd, name, region, header.kv_offset + sum(slots[:index]), slots[index])
    found, needed = _sum(slot), header.frames.sums[index]
    if found != needed:
        raise _damaged(region, f"a sum of {found:016x} in {name}", f"{needed:016x} as in its header")
    try:
        packing.unpack(slot[: header.frames.lengths[index]], _words(room)[:, : header.tokens])
    except StoreError as error:
        raise _damaged(region, f"{error.found} in {name}", error.needed) from None


def _check_blocks(header: Header, name: str, get: Rows, progress: Progress | None) -> None:
    known = zip(header.kv, header.sums, strict=True)
    for block, digest, total in _walk(header.identity.geometry, header.tokens, get, progress):
        region, (needed, needed_sum) = _region(*block), next(known)
        if digest != needed:
            raise StoreError(
                region,
                found=f"a SHA-256 of {short(digest)} in {name}",
                needed=f"{short(needed)} as in its header",
                do=AGAIN,
            )
        if total != needed_sum:
            raise StoreError(
                f"metadata.sums, {region}",
                found=f"{needed_sum:016x} in {name}",
                needed=f"{total:016x}, the sum of that block",
                do=AGAIN,
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
            do=AGAIN,
        )


def _read_token_ids(fd: int, name: str, header: Header) -> Tensor:
    data = _read(fd, name, "token_ids", header.kv_end, 8 * header.tokens)
    token_ids = torch.frombuffer(data, dtype=torch.int64)
    if tokens_digest(token_ids) != header.identity.token_ids:
        raise StoreError(
            "token_ids",
            found=f"a SHA-256 of {short(tokens_digest(token_ids))} in {name}",
            needed=f"{short(header.identity.token_ids)} as in its header",
            do=AGAIN,
        )
    return token_ids


# -- the header --------------------------------------------------------------------------------------------------------


def _read_header(fd: int, name: str, path: Path) -> Header:
    size = os.fstat(fd).st_size
    if size < 8:
        raise _foreign(f"{size} bytes in {name}", field="size")
    start = bytes(_read(fd, name, "header", 0, min(size, 8 + len(OPENING))))
    length = int.from_bytes(start[:8], "little")
    # One of the two is left where a single byte is damaged.
    if (8 + length) % ALIGNMENT and b"kvkern" not in start:
        raise _foreign(f"no header of a .kv file in {name}")
    if length > min(MAX_HEADER, size - 8) or (8 + length) % ALIGNMENT:
        needed = f"at most {min(MAX_HEADER, size - 8):,}, and {ALIGNMENT} with the 8 before it or a multiple"
        raise _damaged("header", f"a length of {length:,} bytes in {name}", needed)
    given = bytes(_read(fd, name, "header", 8, length))
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
        raise _damaged("header", f"bytes in {name} that do not follow from its metadata", "the canonical header")
    needed_size = header.kv_end + 8 * header.tokens
    if size != needed_size:
        raise _damaged("size", f"{size:,} bytes in {name}", f"{needed_size:,} as its header says")
    return header


def _metadata(given: bytes, name: str) -> dict[str, Any]:
    try:
        outer = json.loads(given)
        text = outer["__metadata__"]["kvkern"]
    except (KeyError, TypeError):
        found = f"a header without the metadata key kvkern in {name}"
        # Ours names kvkern more than once, so where a byte of the key is damaged another is left.
        raise (_damaged("header", found, "a .kv file") if b"kvkern" in given else _foreign(found)) from None
    except (ValueError, RecursionError):
        raise _damaged("header", f"no JSON in {name}", "a .kv file") from None
    try:
        metadata = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise _damaged("metadata", f"no JSON object in {name}", "what kvkern wrote")
    return metadata


def _parse(metadata: dict[str, Any], name: str, path: Path, kv_offset: int, size: int) -> Header:
    rest = {key: value for key, value in metadata.items() if key != "sha256"}
    try:
        digest = hashlib.sha256(canonical(rest).encode()).hexdigest()
    except (ValueError, RecursionError):
        digest = "no canonical JSON"
    if metadata.get("sha256") != digest:
        raise _damaged("metadata", f"a SHA-256 of {short(digest)} in {name}", "the one that is written in it")
    try:
        identity = Identity.from_dict(metadata["identity"])
        if identity.layout != LAYOUT:
            raise IdentityError("layout", found=identity.layout, needed=f"{LAYOUT} as this kvkern reads", do=AGAIN)
        if identity.tokens < 1:
            raise IdentityError("tokens", found=identity.tokens, needed="at least 1", do=AGAIN)
        blocks = identity.geometry.layers * 2 * num_segments(identity.tokens)
        kv, sums = metadata["kv"], metadata["sums"]
        if not (len(kv) == len(sums) == blocks and all(isinstance(d, str) and len(d) == 64 for d in kv)):
            raise _damaged("metadata.kv", f"{len(kv)} digests and {len(sums)} sums in {name}", f"{blocks} of each")
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
        raise _damaged(f"metadata.identity.{error.field}", f"{error.found} in {name}", error.needed) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # The digest is right, so this was written so: not a damaged file, a foreign one.
        if isinstance(error, KvkernError):
            raise
        raise _damaged("metadata", f"fields of another kind in {name}", "what kvkern wrote") from None


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
        raise _damaged("metadata.packing", found, packing.names(packing.DTYPES))
    lengths, sums = (tuple(int(value, 16) for value in given[key]) for key in ("lengths", "sums"))
    planes, size = geometry.layers * 2, _plane_bytes(geometry, identity.tokens)
    if not len(lengths) == len(sums) == planes:
        found = f"{len(lengths)} lengths and {len(sums)} sums in {name}"
        raise _damaged("metadata.packing.lengths", found, f"{planes} of each")
    for n, length in enumerate(lengths):
        if not 1 <= length <= packing.max_length(size):
            needed = f"1 to {packing.max_length(size):,} for {size:,} bytes"
            raise _damaged(f"metadata.packing.lengths[{n}]", f"{length:,} bytes in {name}", needed)
    return Frames(given["form"], size, lengths, sums)


def _canonical_header(header: Header) -> bytes:
    return _header_bytes(header.identity, list(header.kv), list(header.sums), header.provenance, header.frames)


# -- files -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """(descriptor, name for errors) of a regular file. Any error of the system becomes a StoreError."""
    name = Path(path).name
    try:
        # Not blocking: opening a pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise _system_error(Path(path), error, "name a .kv file that can be read") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StoreError("path", found=f"{path}, no regular file", needed="a .kv file", do="name a file")
        yield fd, name
    finally:
        os.close(fd)


def _read(fd: int, name: str, region: str, offset: int, size: int) -> memoryview:
    return _read_into(fd, name, region, offset, memoryview(bytearray(size)))


def _read_into(fd: int, name: str, region: str, offset: int, into: memoryview) -> memoryview:
    done = 0
    while done < len(into):
        try:
            count = os.preadv(fd, [into[done:]], offset + done)
        except OSError as error:
            raise _system_error(Path(name), error, AGAIN) from None
        if count == 0:
            raise _damaged(region, f"the end of {name} at byte {offset + done:,}", f"{offset + len(into):,} bytes")
        done += count
    return into


def _damaged(field: str, found: str, needed: str) -> StoreError:
    return StoreError(field, found=found, needed=needed, do=AGAIN)


def _foreign(found: str, *, field: str = "header") -> StoreError:
    return StoreError(field, found=found, needed="a .kv file", do="name a file that kvkern publish wrote")


def _system_error(path: Path, error: OSError | ValueError, do: str) -> StoreError:
    reason = getattr(error, "strerror", None) or error
    return StoreError("path", found=f"{reason} at {path}", needed="a file that can be used", do=do)
