"""Writes the files of a package, or those of some blocks, from parts that know their bytes.

A model's id is over the hashes of all its files. With the manifest at hand only the wanted parts are read, and must
have the hashes that it states; without it every part is read once, and those that are not wanted are only hashed.
"""

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from node.models.errors import ContentError, ModelError
from node.models.files import Progress, check_space, disk_errors, size_of, write_atomically
from node.models.manifest import FileEntry, Manifest
from node.models.safetensors_file import TensorSource, Written, size_of_file, write_file
from node.util.text import format_size
from protocol.identity import BlockRange

UNKNOWN_SHA256: Final = "0" * 64
"""In the manifest of a package that has not been read yet."""


class Part(Protocol):
    """A file of a package that can be written, or only hashed."""

    @property
    def size_bytes(self) -> int:
        """Return the size of the file."""

    def write(self, path: Path | None, on_bytes: Callable[[int], None]) -> Written:
        """Write the file, flushed to the disk, or only hash it if `path` is None.

        `on_bytes` is called with the size of each piece. Raises OSError, and ValueError when a source is too short.
        """


@dataclass(frozen=True, slots=True)
class SafetensorsPart:
    """A safetensors file of tensors that lie elsewhere."""

    tensors: Mapping[str, TensorSource]

    @property
    def size_bytes(self) -> int:
        """Return the size of the file."""
        return size_of_file(self.tensors)

    def write(self, path: Path | None, on_bytes: Callable[[int], None]) -> Written:
        """Write or hash the file."""
        return write_file(path, self.tensors, on_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What of a model is written.

    `blocks`: only what these need. `manifest`: of the very model, if it is known. `present`: the names of the files
    that need not be written. `journal`: a file for the hashes of finished parts, so that an interrupted import into the
    same folder can be continued. `stage`: of the progress. `note` is called with a line for the user.
    """

    blocks: BlockRange | None = None
    manifest: Manifest | None = None
    present: Collection[str] = ()
    journal: Path | None = None
    stage: str = "split"
    note: Callable[[str], None] = lambda _line: None


WHOLE: Final = Selection()


def write_parts(
    source: object, unhashed: Manifest, parts: Mapping[str, Part], target: Path, progress: Progress, wanted: Selection
) -> Manifest:
    """Write the wanted parts into a folder, where the tokenizer's files are already; return the whole manifest.

    `unhashed`: the manifest without the hashes of the parts. Parts that an earlier, interrupted call has finished are
    not read again. Raises ModelError.
    """
    fault = wanted.blocks and unhashed.cuts.fault(wanted.blocks)
    if fault:
        raise ModelError(f"{source}: {fault}")
    known = {} if wanted.manifest is None else _compare(source, unhashed, wanted.manifest)
    names = _names(unhashed, wanted)
    journal = _Journal(wanted.journal)
    to_write = {name for name in names if not journal.has(name, target, known.get(name))}
    to_read = [name for name in parts if name in to_write or not (name in known or journal.entry(name))]
    total, done = sum(parts[name].size_bytes for name in to_read), 0
    if wanted.blocks is not None and any(name not in names for name in to_read):
        kept = sum(parts[name].size_bytes for name in names)
        wanted.note(
            f"the manifest of {source} is not here, and a model's id is over all of its files: {format_size(total)} "
            f"are read once, and blocks {wanted.blocks} kept ({format_size(kept)}); with --manifest only these are read"
        )

    def count(read: int) -> None:
        nonlocal done
        done += read
        progress(wanted.stage, done, total)

    entries: dict[str, FileEntry] = {name: entry for name in parts if (entry := known.get(name) or journal.entry(name))}
    with disk_errors("cannot write the package"):
        check_space(target, sum(parts[name].size_bytes for name in to_write))
        for name in to_read:
            try:
                written = parts[name].write(target / name if name in to_write else None, count)
            except ValueError as error:
                raise ModelError(f"{source}: {error}") from None
            entry = FileEntry(name, written.size_bytes, written.sha256)
            if known.get(name, entry) != entry:
                raise ContentError(f"{source} is not the model of the manifest: its {name} has another content")
            journal.add(entry)
            entries[name] = entry
    return _hashed(unhashed, entries)


def _names(unhashed: Manifest, wanted: Selection) -> frozenset[str]:
    """Return the names of the parts to write."""
    files = unhashed.weight_files if wanted.blocks is None else unhashed.files_for(wanted.blocks)
    return frozenset(file.name for file in files).difference(wanted.present)


def _compare(source: object, unhashed: Manifest, manifest: Manifest) -> dict[str, FileEntry]:
    """Return the weight files of the manifest by name; raise ModelError when it is of another model."""
    stated = {file.name: file for file in manifest.weight_files}
    sizes = {file.name: file.size_bytes for file in unhashed.weight_files}
    if sizes != {name: file.size_bytes for name, file in stated.items()} or (
        _hashed(unhashed, stated).data != manifest.data
    ):
        raise ModelError(
            f"{source} is not model {manifest.model_id[:12]}, whose manifest is given: its config, tokenizer or sizes "
            "differ"
        )
    return stated


def _hashed(unhashed: Manifest, entries: Mapping[str, FileEntry]) -> Manifest:
    """Return the manifest with these weight files."""

    def entry(file: FileEntry) -> FileEntry:
        return entries.get(file.name, file)

    return replace(
        unhashed,
        common=None if unhashed.common is None else entry(unhashed.common),
        embed=entry(unhashed.embed),
        head=entry(unhashed.head),
        blocks=tuple(map(entry, unhashed.blocks)),
    )


class _Journal:
    """The finished parts of an import, which another one continues after an interruption."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, FileEntry] = {}
        if path is None or not path.exists():
            return
        with suppress(OSError, ValueError, AttributeError):  # a damaged one is as good as none
            stored = json.loads(path.read_bytes())
            self._entries = {name: FileEntry(name, size, sha256) for name, (size, sha256) in stored.items()}

    def entry(self, name: str) -> FileEntry | None:
        """Return a finished part, which may have been only hashed."""
        return self._entries.get(name)

    def has(self, name: str, folder: Path, expected: FileEntry | None) -> bool:
        """Return whether a part has been written, as it should be where that is known."""
        entry = self._entries.get(name)
        return entry is not None and entry == (expected or entry) and size_of(folder / name) == entry.size_bytes

    def add(self, entry: FileEntry) -> None:
        """Record a part that is written and flushed."""
        if self._path is None:
            return
        self._entries[entry.name] = entry
        stored = {name: (entry.size_bytes, entry.sha256) for name, entry in self._entries.items()}
        write_atomically(self._path, json.dumps(stored).encode())
