"""Which files of a folder were hashed and found right, so that a start need not hash gigabytes again."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from node.models.files import Progress, sha256_of
from node.models.manifest import FileEntry

RECORD_FILE: Final = ".verified.jsonl"


class FileStamp(NamedTuple):
    """What changes when a file is replaced or written to."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """Return a file's stamp. Raises OSError."""
        status = path.stat()
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


_NEVER: Final = FileStamp(0, 0, 0)
"""Of no file."""


class VerificationRecord:
    """The files of one folder that had the right hash, with the stamp that each had then; another stamp: unverified.

    A hint and no proof: a disk that flips a bit, or a program that restores the modification time, is not noticed by
    it. JSON lines, of which a file's last one counts: several processes append to them without a lock, and a line that
    a crash cut short costs one more hash.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / RECORD_FILE

    def stamps(self) -> Mapping[str, FileStamp]:
        """Return the stamps of the verified files by name; a record that cannot be read has none."""
        stamps: dict[str, FileStamp] = {}
        try:
            lines = self._path.read_bytes().splitlines()
        except OSError:
            return {}
        for line in lines:
            with suppress(ValueError, TypeError):
                name, *stamp = json.loads(line)
                stamps[name] = FileStamp(*stamp)
        return stamps

    def find_corrupt(self, files: Sequence[FileEntry], progress: Progress, *, rehash: bool) -> frozenset[str]:
        """Hash those files that are not verified, or all of them, and record them; return the names of the corrupt.

        Raises OSError.
        """
        known = self.stamps()
        stamps = {file.name: FileStamp.of(self._folder / file.name) for file in files}
        unknown = [file for file in files if rehash or known.get(file.name) != stamps[file.name]]
        total, done = sum(file.size_bytes for file in unknown), 0

        def count(read: int) -> None:
            nonlocal done
            done += read
            progress("verify", done, total)

        corrupt = frozenset(f.name for f in unknown if sha256_of(self._folder / f.name, count) != f.sha256)
        found = {file.name: None if file.name in corrupt else stamps[file.name] for file in unknown}
        self.add({name: stamp for name, stamp in found.items() if stamp is None or known.get(name) != stamp})
        return corrupt

    def add(self, stamps: Mapping[str, FileStamp | None]) -> None:
        """Record files with the stamps that they had before they were hashed; None for one that was wrong.

        A folder that cannot be written to has no record, which costs time only.
        """
        if not stamps:
            return
        lines = [json.dumps([name, *(stamp or _NEVER)]) for name, stamp in stamps.items()]
        with suppress(OSError):
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                # In one write, and after the end of a line that a crash may have cut short.
                os.write(handle, "\n".join(["", *lines, ""]).encode())
            finally:
                os.close(handle)
