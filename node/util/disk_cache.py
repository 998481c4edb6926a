"""A bounded LRU cache of folders on disk, by a name that covers all that their content depends on."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LIMIT_BYTES: Final = 16 << 30
_FREE_SHARE = 0.1
"""Of the disk, which always stays free."""
_STAGING = ".building-"
_BUILT_WITHIN_S = 3600.0
"""An unfinished folder unchanged for so long is abandoned: its process was killed."""


@dataclass(frozen=True, slots=True)
class FolderCache:
    """Folders in a directory that processes share; the least recently used are evicted beyond `limit_bytes`."""

    directory: Path
    limit_bytes: int = LIMIT_BYTES

    def folder(self, name: str, build: Callable[[Path], None]) -> Path:
        """Return the folder of that name, built by `build` in an empty folder if it is missing.

        Of concurrent builds with the same name the first one is used. Raises OSError.
        """
        wanted = self.directory / name
        if not wanted.is_dir():
            self.directory.mkdir(parents=True, exist_ok=True)
            staged = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.directory))
            try:
                build(staged)
                _flush(staged)
                with suppress(OSError):
                    staged.rename(wanted)  # fails where the other one is there by now
                    _flush_one(self.directory)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        os.utime(wanted)
        self._shrink(wanted)
        return wanted

    def drop(self, name: str) -> None:
        """Delete a damaged folder."""
        shutil.rmtree(self.directory / name, ignore_errors=True)

    def _shrink(self, used: Path) -> None:
        """Evict the least recently used folders but for `used`. Open files live on until their process exits."""
        others = sorted((path for path in self.directory.iterdir() if path != used), key=_used_s, reverse=True)
        abandoned_s = time.time() - _BUILT_WITHIN_S
        disk = shutil.disk_usage(self.directory)
        limit = min(
            self.limit_bytes, sum(map(folder_bytes, [used, *others])) + disk.free - int(disk.total * _FREE_SHARE)
        )
        taken = folder_bytes(used)
        for path in others:
            if path.name.startswith(_STAGING):
                if _used_s(path) < abandoned_s:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            taken += folder_bytes(path)
            if taken > limit:
                shutil.rmtree(path, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Flush files and their folder to the disk: else a power cut may leave files of zeros under their final name."""
    for path in (*folder.rglob("*"), folder):
        _flush_one(path)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _used_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def folder_bytes(folder: Path) -> int:
    """Bytes of the files under `folder`, of which another process may create and remove some meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):  # skips a folder that is gone when its turn comes
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_size
    return total
