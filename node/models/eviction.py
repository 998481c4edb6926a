"""A bound on what files from peers take on the disk: those used least recently go, never what somebody uses.

What the user imported is the user's and is never deleted. A package that was begun with a peer's manifest carries a
mark. Whoever serves a file, and whoever fetches one, holds a lock on it, in whatever process; so the cache can be
shared.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from node.models.errors import ModelError
from node.models.files import disk_errors, part_of
from node.models.manifest import FileEntry
from node.models.store import FETCHED_MARK, ModelStore, Package


class _Cached(NamedTuple):
    """A weight file, or the beginning of one; sorts by when it was used last."""

    used_s: float
    path: Path
    size_bytes: int


GIBIBYTE: Final = 1 << 30


def make_room(
    store: ModelStore, package: Package, wanted: Sequence[FileEntry], limit_bytes: int | None
) -> tuple[Path, ...]:
    """Delete what was not used for longest, until the wanted files fit within the limit; return what was deleted.

    Raises ModelError where they cannot, before anything is deleted in vain.
    """
    if limit_bytes is None or not (package.path / FETCHED_MARK).exists():
        return ()
    kept = {package.path_of(file) for file in wanted} | {part_of(package.path_of(file)) for file in wanted}
    needed = sum(file.size_bytes for file in wanted)
    with disk_errors("cannot make room in the cache"):
        others = sorted(cached for cached in _fetched_files(store) if cached.path not in kept)
        taken = sum(cached.size_bytes for cached in others)
        chosen: list[Path] = []
        for cached in others:
            if taken + needed <= limit_bytes:
                break
            if _is_unused(cached.path):
                taken -= cached.size_bytes
                chosen.append(cached.path)
        if taken + needed > limit_bytes:
            raise ModelError(
                f"the cache may take {limit_bytes / GIBIBYTE:.2f} GiB, and {needed / GIBIBYTE:.2f} GiB are needed "
                f"beside {taken / GIBIBYTE:.2f} GiB in use: raise --cache-limit, or serve fewer blocks"
            )
        # What somebody began to use just now stays: for once the cache is a little larger.
        return tuple(path for path in chosen if _is_unused(path, delete=True))


@contextmanager
def in_use(package: Package, files: Iterable[FileEntry]) -> Iterator[None]:
    """Keep files from being deleted to make room, inside the block, and note that they were used now."""
    with ExitStack() as stack:
        with disk_errors(f"cannot open the files of model {package.model_id[:12]}"):
            for file in files:
                path = package.path_of(file)
                handle = os.open(path, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                with suppress(PermissionError):  # another user's, or a read-only cache
                    os.utime(path)
        yield


def _fetched_files(store: ModelStore) -> Iterator[_Cached]:
    """Yield the weight files that came from peers, and beginnings of such."""
    for package in store.list():
        if not (package.path / FETCHED_MARK).exists():
            continue
        for file in package.manifest.weight_files:
            for path in (package.path_of(file), part_of(package.path_of(file))):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    yield _Cached(status.st_mtime, path, status.st_size)


def _is_unused(path: Path, *, delete: bool = False) -> bool:
    """Say whether nobody has locked a file, and delete it then if that is asked for."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if delete:
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
