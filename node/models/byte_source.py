"""Where a file's bytes are read from: this disk, or a server (`node.models.http_file`).

Importers know tensors as ranges of a source, so the same code copies them out of a local checkpoint and out of a hub
repository, of which they read only what they need.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, Protocol

PIECE_BYTES: Final = 1 << 20
"""The most that is in memory of a range that is copied."""


class ByteSource(Protocol):
    """A file of a known size, read by ranges."""

    @property
    def name(self) -> str:
        """Return the file's name, for messages."""

    @property
    def size_bytes(self) -> int:
        """Return the file's size."""

    def stream(self, offset: int, size: int) -> Iterator[bytes]:
        """Yield exactly `size` bytes from `offset` on, in pieces of at most PIECE_BYTES.

        Raises ValueError when the file is shorter, OSError for a fault of the disk, ModelError for one of a server.
        """


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file on this disk. It is open only while a range is read."""

    path: Path
    size_bytes: int

    @classmethod
    def of(cls, path: Path) -> "LocalFile":
        """Return the file at a path, with its size. Raises OSError."""
        return cls(path, path.stat().st_size)

    @property
    def name(self) -> str:
        """Return the file's name."""
        return self.path.name

    def stream(self, offset: int, size: int) -> Iterator[bytes]:
        """Yield the bytes of a range."""
        with self.path.open("rb") as file:
            file.seek(offset)
            while size:
                piece = file.read(min(size, PIECE_BYTES))
                if not piece:
                    raise ValueError(f"{self.name} became shorter while it was read")
                yield piece
                size -= len(piece)


class Range(NamedTuple):
    """Some of a source's bytes."""

    source: ByteSource
    offset: int
    size_bytes: int


def read(source: ByteSource, offset: int, size: int) -> bytes:
    """Return a range of a source in one piece; for headers and other small parts."""
    return b"".join(source.stream(offset, size))


def stream_ranges(ranges: Iterable[Range]) -> Iterator[bytes]:
    """Yield the bytes of ranges one after another.

    Ranges that follow each other in their file are read as one: a server is asked once for a block of many tensors.
    """
    run: Range | None = None
    for part in ranges:
        if run is not None and part.source is run.source and part.offset == run.offset + run.size_bytes:
            run = run._replace(size_bytes=run.size_bytes + part.size_bytes)
            continue
        if run is not None:
            yield from run.source.stream(run.offset, run.size_bytes)
        run = part
    if run is not None:
        yield from run.source.stream(run.offset, run.size_bytes)


def open_sequential(source: ByteSource, on_bytes: Callable[[bytes], object] = lambda _piece: None) -> BinaryIO:
    """Return a source as a file that is read from its beginning, without seeking, in ranges of PIECE_BYTES.

    It is for headers, whose length shows while they are read. `on_bytes` is called with each range in turn.
    """
    return io.BufferedReader(_Sequential(source, on_bytes), PIECE_BYTES)


class _Sequential(io.RawIOBase):
    """Reads a source from its beginning, a range at a time."""

    def __init__(self, source: ByteSource, on_bytes: Callable[[bytes], object]) -> None:
        super().__init__()
        self._source = source
        self._on_bytes = on_bytes
        self._position = 0

    def readable(self) -> bool:
        """Return whether it can be read."""
        return True

    def tell(self) -> int:
        """Return how far it was read."""
        return self._position

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        """Read the next range."""
        size = min(len(buffer), PIECE_BYTES, self._source.size_bytes - self._position)
        piece = read(self._source, self._position, size) if size else b""
        buffer[: len(piece)] = piece
        self._position += len(piece)
        self._on_bytes(piece)
        return len(piece)
