"""Files whole or not at all, and the words for what is wrong with one.

A file is written under a temporary name in the same folder, synced, renamed, and the folder synced: it is there whole or not
at all, and an older file of that name stays until then. A writer holds a lock on its temporary file, .kvkern-*.tmp, which the
system drops with the process: what a killed one left is found unlocked, and removed, by the next save into that folder.

Any error of the system becomes a StoreError that names the path or the region. Nothing here knows what is in a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from kvkern.errors import StoreError

TEMPORARY, ENDING = ".kvkern-", ".tmp"
"""How the name of a file that is being written begins and ends."""

AGAIN = "copy the file again from where it came, or publish the document again"


# -- writing -----------------------------------------------------------------------------------------------------------


def target_of(path: str | os.PathLike[str]) -> Path:
    """The file that this path names or links to, in a folder that is there. Raises StoreError."""
    try:
        target = Path(os.path.realpath(path))  # a link stays; what it points to is replaced
        missing, special = not target.parent.is_dir(), target.exists() and not target.is_file()
    except (OSError, ValueError) as error:
        raise system_error(Path(path), error, "name a file in a folder") from None
    if missing:
        raise StoreError("path", found=f"no folder {target.parent}", needed="a folder", do="create it")
    if special:
        raise StoreError("path", found=f"{target}, no regular file", needed="a file name", do="name a file in a folder")
    return target


def write(fd: int, data: memoryview, offset: int) -> None:
    """All of it, however many calls that takes. Raises OSError."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def sync_folder(folder: Path) -> None:
    """So that what was renamed in it stays so."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- temporary files: a name, and a lock for as long as its writer lives ------------------------------------------------


@contextlib.contextmanager
def temporary(folder: Path) -> Iterator[tuple[int, Path]]:
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


def remove_orphans(folder: Path) -> None:
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


# -- reading -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """(descriptor, name for errors) of a regular file. Any error of the system becomes a StoreError."""
    name = Path(path).name
    try:
        # Not blocking: opening a pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise system_error(Path(path), error, "name a .kv file that can be read") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StoreError("path", found=f"{path}, no regular file", needed="a .kv file", do="name a file")
        yield fd, name
    finally:
        os.close(fd)


def read(fd: int, name: str, region: str, offset: int, size: int) -> memoryview:
    """So many bytes from there, in memory of their own."""
    return read_into(fd, name, region, offset, memoryview(bytearray(size)))


def read_into(fd: int, name: str, region: str, offset: int, into: memoryview) -> memoryview:
    """Fill `into` with the bytes from there, and give it back. Raises StoreError naming the region where the file ends before."""
    done = 0
    while done < len(into):
        try:
            count = os.preadv(fd, [into[done:]], offset + done)
        except OSError as error:
            raise system_error(Path(name), error, AGAIN) from None
        if count == 0:
            raise damaged(region, f"the end of {name} at byte {offset + done:,}", f"{offset + len(into):,} bytes")
        done += count
    return into


# -- errors ------------------------------------------------------------------------------------------------------------


def damaged(field: str, found: str, needed: str) -> StoreError:
    """A .kv file that is not as it was written."""
    return StoreError(field, found=found, needed=needed, do=AGAIN)


def foreign(found: str, *, field: str = "header") -> StoreError:
    """What never was a .kv file."""
    return StoreError(field, found=found, needed="a .kv file", do="name a file that kvkern publish wrote")


def system_error(path: Path, error: OSError | ValueError, do: str) -> StoreError:
    """What the system says of a path."""
    reason = getattr(error, "strerror", None) or error
    return StoreError("path", found=f"{reason} at {path}", needed="a file that can be used", do=do)
