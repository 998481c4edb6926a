"""Atomic writes, locks between processes, and disk errors in one line."""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from node.models.errors import ModelError

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total), from the working thread. An exception ends the work, which is cleaned up.

A total of 0 means unknown; an empty stage, from who began the work, that all stages are over."""

_READ_BYTES = 4 << 20
_LOCK_POLL_S = 0.1


MIN_FREE_BYTES: Final = 64 << 20
"""Left free by what peers send: a node stores its history, too."""


def ignore_progress(stage: str, done: int, total: int) -> None:
    """Ignore progress."""


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn an OSError into a ModelError: what failed, why, and what to do."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:  # the last where the user's files are limited
            raise ModelError(f"{what}: the disk is full; free some space, or set METASWARM_CACHE_DIR") from error
        raise ModelError(f"{what}: {where}{error.strerror or error}") from error


@contextmanager
def ending(progress: Progress) -> Iterator[Progress]:
    """Report at the end of the block that all stages are over, also those that failed."""
    try:
        yield progress
    finally:
        progress("", 0, 0)


def disk_fault(folder: Path) -> str | None:
    """Return what is wrong with the disk of a data directory, which may not exist yet: whether it is full."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free >= MIN_FREE_BYTES:
        return None
    return f"the disk of {folder} is full ({free >> 20} MiB free), no history can be stored: free some"


def check_space(folder: Path, needed: int, *, reserve: int = 0, evictable: int = 0) -> None:
    """Raise ModelError unless a disk has so many bytes free, and a reserve beyond them. Raises OSError.

    `evictable`: bytes that are deleted before the space is used, and so count as free.
    """
    free = max(0, shutil.disk_usage(folder).free + evictable - reserve)
    if free < needed:
        beyond = f" beyond the reserve of {reserve >> 20} MiB" if reserve else ""
        raise ModelError(
            f"the package needs {needed >> 20} MiB, and {free >> 20} MiB are free{beyond} in {folder}: free some "
            "space, or set METASWARM_CACHE_DIR to another disk"
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content atomically, also under a crash. Other users may read it, as the umask allows."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def flush_directory(path: Path) -> None:
    """Flush the entries of a directory to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock_file(path: Path, while_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock between processes and threads, which ends with its process.

    `while_waiting` is called ten times a second until the lock is acquired; raising gives up.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not try_lock(handle):
            while_waiting()
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool:
    """Lock an open file exclusively, unless it is locked elsewhere; return whether that worked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_unused(path: Path, *, delete: bool = False) -> bool:
    """Return whether a file is not locked; `delete` it then."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        found = try_lock(handle)
        if found and delete:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)
    return found


def sha256_of(path: Path, on_bytes: Callable[[int], None] = lambda _count: None) -> str:
    """Return a file's sha256 in hexadecimal digits; `on_bytes` is called with the size of each piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            on_bytes(len(piece))
    return digest.hexdigest()


def part_of(path: Path) -> Path:
    """Return the path of an incomplete file while it is fetched."""
    return path.with_name(f".{path.name}.part")


def size_of(path: Path) -> int | None:
    """Return a file's size, or None where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
