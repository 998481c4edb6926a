"""Eviction: weight files from peers are deleted, least recently used first, to keep the cache within a limit.

So are whole packages that requests had fetched and that never got any weights, once there are many of them. Imported
models are never evicted: a package begun with a peer's manifest carries a mark. A process that serves or fetches a file
holds a lock on it, so processes can share the cache.
"""

import errno
import fcntl
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

from node.models.catalogue import CATALOGUE
from node.models.errors import ModelError
from node.models.files import disk_errors, is_unused, part_of
from node.models.manifest import FileEntry
from node.models.store import FETCHED_MARK, ModelInUseError, ModelStore, Package, UnknownModelError
from protocol.identity import ModelId

GIBIBYTE: Final = 1 << 30

LOCK_TRIES: Final = 100
LOCK_PAUSE_S: Final = 0.01
"""Between tries: a check whether a file is in use locks it for much less."""

MAX_WITHOUT_WEIGHTS: Final = 64
"""Packages from peers that have a manifest, perhaps a tokenizer, and no weights: each request may add one."""

RECENT_S: Final = 600.0
"""Those that were used within this time are not evicted: another process may have them open."""


class _Cached(NamedTuple):
    """A weight file, or an incomplete one; sorts by its last use."""

    used_s: float
    path: Path
    size_bytes: int


class Eviction(NamedTuple):
    """What is to be deleted, least recently used first, and what the cache holds then, with the wanted files."""

    chosen: Sequence[Path]
    freed_bytes: int
    needed_bytes: int
    taken_bytes: int
    """By other files from peers."""


def plan_eviction(
    store: ModelStore, wanted: Iterable[tuple[Package, FileEntry]], limit_bytes: int | None
) -> Eviction | None:
    """Choose the least recently used files that make room within the limit, all unused ones if they are too few.

    Returns None where nothing that is wanted counts against a limit. Raises OSError and ModelError.
    """
    counted = [(package, file) for package, file in wanted if (package.path / FETCHED_MARK).exists()]
    if limit_bytes is None or not counted:
        return None
    paths = {package.path_of(file) for package, file in counted}
    kept = paths | {part_of(path) for path in paths}
    needed = sum(file.size_bytes for _, file in counted)
    others = sorted(cached for cached in _fetched_files(store) if cached.path not in kept)
    held = taken = sum(cached.size_bytes for cached in others)
    chosen: list[Path] = []
    for cached in others:
        if taken + needed <= limit_bytes:
            break
        if is_unused(cached.path):
            taken -= cached.size_bytes
            chosen.append(cached.path)
    return Eviction(chosen, held - taken, needed, taken)


def evict_for(
    store: ModelStore, package: Package, wanted: Sequence[FileEntry], limit_bytes: int | None
) -> tuple[Path, ...]:
    """Delete the least recently used files, until the wanted ones fit within the limit; return what was deleted.

    Raises ModelError where they cannot fit, before anything is deleted in vain.
    """
    with disk_errors("cannot make room in the cache"):
        plan = plan_eviction(store, ((package, file) for file in wanted), limit_bytes)
        if limit_bytes is None or plan is None:
            return ()
        if plan.taken_bytes + plan.needed_bytes > limit_bytes:
            raise ModelError(
                f"the cache is limited to {limit_bytes / GIBIBYTE:.2f} GiB, and {plan.needed_bytes / GIBIBYTE:.2f} GiB "
                f"are needed beside {plan.taken_bytes / GIBIBYTE:.2f} GiB in use: raise --cache-limit, or serve fewer "
                "blocks"
            )
        # A file that has just come into use stays: the cache exceeds its limit a little.
        return tuple(path for path in plan.chosen if is_unused(path, delete=True))


def evict_packages(store: ModelStore, kept: Collection[ModelId], room: int) -> tuple[ModelId, ...]:
    """Remove packages without weights, least recently used first, until so many more may be added; return which.

    Models of the catalogue, named ones, and `kept` stay. Raises ModelError where there is no room.
    """
    stay = {*kept, *store.names().values(), *(entry.model_id for entry in CATALOGUE.values())}
    with disk_errors("cannot make room in the cache"):
        found = sorted(found for found in _without_weights(store) if found[1] not in stay)
    excess = max(0, len(found) + room - MAX_WITHOUT_WEIGHTS)
    oldest_s = time.time() - RECENT_S
    evicted: list[ModelId] = []
    for used_s, model in found:
        if len(evicted) < excess and used_s < oldest_s:
            with suppress(UnknownModelError, ModelInUseError):  # another process was faster
                store.remove(model)
                evicted.append(model)
    if len(evicted) < excess:
        raise ModelError(f"{len(found)} models of peers were asked for within minutes: try again later")
    return tuple(evicted)


def mark_used(store: ModelStore, model: ModelId) -> None:
    """Mark a package from peers as used now."""
    with suppress(ModelError, OSError):
        os.utime(store.get(model).path / FETCHED_MARK)


def _without_weights(store: ModelStore) -> Iterator[tuple[float, ModelId]]:
    """Yield the packages that came from peers and hold nothing of their weights, with their last use."""
    for package in store.list():
        paths = map(package.path_of, package.manifest.weight_files)
        with suppress(FileNotFoundError):  # imported, or just evicted by another process
            used_s = (package.path / FETCHED_MARK).stat().st_mtime
            if not any(path.exists() or part_of(path).exists() for path in paths):
                yield used_s, package.model_id


@contextmanager
def in_use(package: Package, files: Iterable[FileEntry]) -> Iterator[None]:
    """Protect files from eviction inside the block, and mark them as used now. Raises ModelError."""
    with ExitStack() as stack:
        with disk_errors(f"cannot open the files of model {package.model_id[:12]}"):
            for file in files:
                path = package.path_of(file)
                handle = os.open(path, os.O_RDONLY)
                stack.callback(os.close, handle)
                _share(handle, path)
                with suppress(PermissionError):  # another user's, or a read-only cache
                    # Its modification time stays: by that it is known to be unchanged.
                    os.utime(path, ns=(time.time_ns(), os.fstat(handle).st_mtime_ns))
        yield


def _share(handle: int, path: Path) -> None:
    """Lock an open file against eviction. Raises OSError: where another has it for long, or has deleted it."""
    for _ in range(LOCK_TRIES):
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            break
        time.sleep(LOCK_PAUSE_S)
    else:
        raise BlockingIOError(errno.EWOULDBLOCK, "another process has locked it", str(path))
    if os.fstat(handle).st_nlink == 0:
        raise FileNotFoundError(errno.ENOENT, "another process has just evicted it", str(path))


def _fetched_files(store: ModelStore) -> Iterator[_Cached]:
    packages = (package for package in store.list() if (package.path / FETCHED_MARK).exists())
    paths = (package.path_of(file) for package in packages for file in package.manifest.weight_files)
    for path in chain.from_iterable((path, part_of(path)) for path in paths):
        with suppress(FileNotFoundError):
            status = path.stat()
            yield _Cached(max(status.st_atime, status.st_mtime), path, status.st_size)
