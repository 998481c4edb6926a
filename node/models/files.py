"""Files that are whole or not there, locks between processes, and the disk's faults in one clear line."""

import errno
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from node.models.errors import ModelError

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total), from whatever thread does the work. What it raises ends the work, which is cleaned up."""

_READ_BYTES = 4 << 20
_LOCK_POLL_S = 0.1


def ignore_progress(stage: str, done: int, total: int) -> None:
    """Take no interest in progress."""


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn the faults of a disk into a ModelError: what could not be done, why, and what helps."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:  # the last where the user's files are limited
            raise ModelError(f"{what}: the disk is full; free some space, or set METASWARM_CACHE_DIR") from error
        raise ModelError(f"{what}: {where}{error.strerror or error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content: after a crash it is either the old or the new one."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def flush_directory(path: Path) -> None:
    """Make the names in a directory survive a crash."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock_file(path: Path, while_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock between processes and threads. It ends with the process that holds it, crashed or not.

    `while_waiting` is called ten times a second as long as somebody else holds the lock; raising gives up.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                while_waiting()
                time.sleep(_LOCK_POLL_S)
            else:
                break
        yield
    finally:
        os.close(handle)


def sha256_of(path: Path, on_bytes: Callable[[int], None] = lambda _count: None) -> str:
    """Return a file's sha256 in hexadecimal digits; `on_bytes` is told the size of each piece read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            on_bytes(len(piece))
    return digest.hexdigest()


def part_of(path: Path) -> Path:
    """Return where the beginning of a file lies while it is fetched."""
    return path.with_name(f".{path.name}.part")


def size_of(path: Path) -> int | None:
    """Return a file's size, or None where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
