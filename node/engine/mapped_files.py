"""Files of weights, mapped into memory: what is not used is not read, and all processes share the pages."""

import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import _TYPES

from node.models.byte_source import LocalFile
from node.models.safetensors_file import TensorSource, read_header


class MappedFile:
    """A safetensors file whose tensors are views of it."""

    def __init__(self, path: Path) -> None:
        """Map a file. Raises OSError, and ValueError where it is damaged."""
        self._sources = read_header(LocalFile.of(path))
        with path.open("rb") as file:
            # A private mapping, as torch has no tensors that cannot be written to. Nobody writes to these.
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors by name. Raises ValueError for a type that torch lacks."""
        for name, source in self._sources.items():
            yield name, self._tensor(name, source)

    def drop_pages(self) -> None:
        """Give the memory back to the operating system; what is used after that is read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)

    def _tensor(self, name: str, source: TensorSource) -> torch.Tensor:
        dtype = _TYPES.get(source.dtype)
        if dtype is None:
            raise ValueError(f"tensor {name[:80]!r} has the type {source.dtype}, which is not supported")
        if not source.size_bytes:
            return torch.empty(source.shape, dtype=dtype)
        memory, offset = self._memory, source.offset
        if offset % dtype.itemsize:  # in files of others
            return torch.frombuffer(bytearray(memory[offset : offset + source.size_bytes]), dtype=dtype).view(
                source.shape
            )
        count = source.size_bytes // dtype.itemsize
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(source.shape)
