"""A bounded LRU cache of folders on disk, by a name that covers all that their content depends on."""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LIMIT_BYTES: Final = 16 << 30
_FREE_SHARE = 0.1
"""Of the disk, which always stays free."""
_STAGING = ".building-"
_BUILT_WITHIN_S = 3600.0
"""An unfinished folder unchanged for so long is abandoned, unless a process holds it: a clock that is set, or a large
file in it that is still written, makes it look older."""
_handles: Final[dict[Path, int]] = {}
"""Of the folders that this process uses, with a shared lock on each until it exits."""


@dataclass(frozen=True, slots=True)
class FolderCache:
    """Folders in a directory that processes share; the least recently used are evicted beyond `limit_bytes`.

    Those that a process has got stay until it exits: without them its files would be built again, and take the space
    that they have twice.
    """

    directory: Path
    limit_bytes: int = LIMIT_BYTES

    def folder(self, name: str, build: Callable[[Path], None]) -> Path:
        """Return the folder of that name, built by `build` in an empty folder if it is missing.

        Of concurrent builds with the same name the first one is used. Raises OSError.
        """
        wanted = self.directory / name
        if not _hold(wanted):
            self.directory.mkdir(parents=True, exist_ok=True)
            staged = self.directory / f"{_STAGING}{secrets.token_hex(8)}"
            staged.mkdir()  # for other users as well, as the umask allows
            _hold(staged)
            try:
                build(staged)
                _flush(staged)
                with suppress(OSError):
                    staged.rename(wanted)  # fails where the other one is there by now
                    _handles[wanted] = _handles.pop(staged)
                    _flush_one(self.directory)
            finally:
                _release(staged)
                shutil.rmtree(staged, ignore_errors=True)
            if wanted not in _handles:
                _hold(wanted)
        with suppress(PermissionError):  # another user's
            os.utime(wanted)
        self._shrink(wanted)
        return wanted

    def drop(self, name: str) -> None:
        """Delete a damaged folder, which others may use: their open files live on until they exit."""
        _release(self.directory / name)
        shutil.rmtree(self.directory / name, ignore_errors=True)

    def drop_unused(self, prefix: str) -> int:
        """Delete the folders whose names begin so, but for those in use; return how many bytes that freed."""
        freed = 0
        for path in self._folders() if self.directory.is_dir() else ():
            if path.name.startswith(prefix):
                with _lock_unused(path) as is_unused:
                    if is_unused:
                        freed += folder_bytes(path)
                        shutil.rmtree(path, ignore_errors=True)
        return freed

    def make_room(self, needed_bytes: int) -> None:
        """Evict the least recently used folders until so much of the disk is free; none if all would not do."""
        folders = self._folders()  # which deletes abandoned builds
        missing = needed_bytes - shutil.disk_usage(self.directory).free
        with ExitStack() as locks:
            unused = []
            for path in reversed(folders):
                if missing > 0 and locks.enter_context(_lock_unused(path)):
                    missing -= folder_bytes(path)
                    unused.append(path)
            if missing <= 0:
                for path in unused:
                    shutil.rmtree(path, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Delete abandoned builds, and return the folders that are complete, the last used first."""
        complete = []
        for path in self.directory.iterdir():
            if not path.name.startswith(_STAGING):
                complete.append(path)
            elif _used_s(path) < time.time() - _BUILT_WITHIN_S:
                with _lock_unused(path) as is_unused:
                    if is_unused:
                        shutil.rmtree(path, ignore_errors=True)
        return sorted(complete, key=_used_s, reverse=True)

    def _shrink(self, used: Path) -> None:
        """Evict the least recently used folders but for `used`."""
        others = [path for path in self._folders() if path != used]
        disk = shutil.disk_usage(self.directory)
        limit = min(
            self.limit_bytes, sum(map(folder_bytes, [used, *others])) + disk.free - int(disk.total * _FREE_SHARE)
        )
        taken = folder_bytes(used)
        for path in others:
            taken += folder_bytes(path)
            if taken > limit:
                with _lock_unused(path) as is_unused:
                    if is_unused:
                        shutil.rmtree(path, ignore_errors=True)


def _hold(folder: Path) -> bool:
    """Lock a folder against eviction until this process exits; return whether it is there."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_SH)
    _release(folder)
    _handles[folder] = handle
    if folder.is_dir():
        return True
    _release(folder)  # it was evicted just now
    return False


def _release(folder: Path) -> None:
    if (handle := _handles.pop(folder, None)) is not None:
        os.close(handle)


@contextmanager
def _lock_unused(folder: Path) -> Iterator[bool]:
    """Lock a folder against use; yield whether no process uses it, so that it may be deleted."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # another process has deleted it
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_unused = True
        except OSError as error:  # others are of file systems without locks
            is_unused = not isinstance(error, BlockingIOError)
        yield is_unused
    finally:
        os.close(handle)


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
