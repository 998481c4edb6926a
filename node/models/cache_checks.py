"""Whether the cache folder can take what a node is to serve: for its start, and for the doctor."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from node.config import ServeSpec
from node.models.errors import ModelError
from node.models.eviction import plan_eviction
from node.models.files import MIN_FREE_BYTES, check_space, disk_errors, part_of, size_of
from node.models.manifest import FileEntry
from node.models.store import ModelStore, Package
from protocol.identity import ModelId


@dataclass(frozen=True, slots=True)
class CacheFaults:
    """What is wrong with the cache folder, each a line for the user or None."""

    unwritable: str | None
    is_needed: bool
    """Whether something that is to be served is still missing there."""
    full: str | None


def writing_fault(folder: Path) -> str | None:
    """Return why a folder cannot be written to, or be made."""
    existing = next(path for path in (folder, *folder.parents) if os.access(path, os.F_OK))
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return None
    fault = "not writable" if existing.is_dir() else "not a folder"
    purpose = "" if existing == folder else f", so {folder} cannot be made"
    return f"{existing} is {fault}{purpose}"


def missing_bytes(package: Package, files: Iterable[FileEntry]) -> int:
    """Return how much of the files is not here yet, not even as the beginning of a file. Raises OSError."""
    beginnings = ((file, size_of(part_of(package.path_of(file))) or 0) for file in files if not package.has(file))
    return sum(max(0, file.size_bytes - size) for file, size in beginnings)


def check_cache(cache_dir: Path, served: Iterable[ServeSpec], limit_bytes: int | None) -> CacheFaults:
    """Return what keeps the files of blocks to be served from coming into the cache, after eviction for its limit.

    Where the node chooses the blocks itself, there must be room for the smallest.
    """
    fault = writing_fault(cache_dir)
    store, lacking, is_needed = ModelStore(cache_dir), 0, False
    wanted: dict[tuple[ModelId, str], tuple[Package, FileEntry]] = {}
    for spec in dict.fromkeys(served):
        with suppress(ModelError, OSError):  # others tell of that
            package = store.find(store.resolve(spec.model))
            missing = () if package is None else package.missing(spec.blocks)
            is_needed |= package is None or bool(missing)
            if package is None:
                continue
            if spec.blocks is None:
                files = sorted(missing, key=lambda file: file.size_bytes)[:1]
            else:
                files = list(package.manifest.files_for(spec.blocks))
            new = {(package.model_id, file.name): (package, file) for file in files}
            lacking += missing_bytes(package, [new[key][1] for key in new.keys() - wanted.keys()])
            wanted |= new
    full = None
    if lacking and fault is None:
        try:
            with disk_errors("cannot tell how much space is free"):
                folder = next(path for path in (cache_dir, *cache_dir.parents) if path.exists())
                eviction = plan_eviction(store, wanted.values(), limit_bytes)
                evictable = 0 if eviction is None else eviction.freed_bytes
                check_space(folder, lacking, reserve=MIN_FREE_BYTES, evictable=evictable)
        except ModelError as error:
            full = f"cannot fetch what is to be served: {error}"
    advice = f"{fault}: no model can be fetched; choose another --cache-dir, or METASWARM_CACHE_DIR"
    return CacheFaults(unwritable=None if fault is None else advice, is_needed=is_needed, full=full)
