"""A bounded cache of folders on disk: what was built once, by the name that says all it depends on."""

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
"""Of the disk, which stays free whatever the limit allows."""
_STAGING = ".building-"
_BUILT_WITHIN_S = 3600.0
"""A folder that nothing was put into for so long is nobody's any more: whoever built it was killed."""


@dataclass(frozen=True, slots=True)
class FolderCache:
    """Folders in a directory that several processes use at once; the longest unused go when `limit_bytes` is passed."""

    directory: Path
    limit_bytes: int = LIMIT_BYTES

    def folder(self, name: str, build: Callable[[Path], None]) -> Path:
        """Return the folder of that name, built by `build` (which gets an empty one) if it is not there.

        What is built elsewhere at the same time is the same, and whoever is later takes it. Raises OSError.
        """
        wanted = self.directory / name
        if not wanted.is_dir():
            self.directory.mkdir(parents=True, exist_ok=True)
            staged = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.directory))
            try:
                build(staged)
                with suppress(OSError):
                    staged.rename(wanted)  # fails where the other one is there by now
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        os.utime(wanted)
        self._shrink(wanted)
        return wanted

    def drop(self, name: str) -> None:
        """Forget a folder, which turned out to be damaged."""
        shutil.rmtree(self.directory / name, ignore_errors=True)

    def _shrink(self, used: Path) -> None:
        """Remove the longest unused folders but for `used`. Files that a process has open live on until it ends."""
        others = sorted((path for path in self.directory.iterdir() if path != used), key=_used_s, reverse=True)
        abandoned_s = time.time() - _BUILT_WITHIN_S
        disk = shutil.disk_usage(self.directory)
        limit = min(self.limit_bytes, _bytes_of([used, *others]) + disk.free - int(disk.total * _FREE_SHARE))
        taken = _bytes_of([used])
        for path in others:
            if path.name.startswith(_STAGING):
                if _used_s(path) < abandoned_s:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            taken += _bytes_of([path])
            if taken > limit:
                shutil.rmtree(path, ignore_errors=True)


def _used_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _bytes_of(folders: list[Path]) -> int:
    total = 0
    for folder in folders:
        with suppress(OSError):  # another process may be removing it
            for file in folder.rglob("*"):
                total += file.stat().st_size
    return total
