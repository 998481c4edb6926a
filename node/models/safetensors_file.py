"""The safetensors format, read and written by copying bytes: 8 bytes of header length, a JSON header, raw tensors.

Splitting a checkpoint is a matter of which bytes go where, so it needs neither torch nor the memory for a tensor, and
its output depends on names and bytes alone: the same tensors give the same file, however the source was sharded.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

from node.models.byte_source import ByteSource, Range, read, stream_ranges

_LENGTH_BYTES: Final = 8
_ALIGNMENT: Final = 8
_MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where a tensor's bytes lie: `size_bytes` from `offset` of a file."""

    file: ByteSource
    offset: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]


def read_header(file: ByteSource) -> dict[str, TensorSource]:
    """Return the tensors of a file by name; raise ValueError for a damaged or foreign file.

    Offsets and sizes are checked against each other, the shapes and the file, so that a copy cannot run astray.
    """
    size = file.size_bytes
    length = int.from_bytes(read(file, 0, min(size, _LENGTH_BYTES)), "little")
    if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
        raise ValueError("its header is longer than the file: cut short, or not a safetensors file")
    try:
        header = json.loads(read(file, _LENGTH_BYTES, length), object_pairs_hook=_unique)
    except _TwiceError:
        raise
    except (ValueError, RecursionError):
        raise ValueError("its header is not JSON: damaged, or not a safetensors file") from None
    if not isinstance(header, dict) or not header:
        raise ValueError("its header names no tensors")
    start = _LENGTH_BYTES + length
    header.pop("__metadata__", None)
    return {str(name): _tensor(file, str(name), info, start) for name, info in header.items()}


def merge_headers(headers: Iterable[Mapping[str, TensorSource]]) -> dict[str, TensorSource]:
    """Return the tensors of all shards of a checkpoint; raise ValueError for a name that stands in two of them."""
    merged: dict[str, TensorSource] = {}
    for header in headers:
        for name, tensor in header.items():
            if name in merged:
                raise ValueError(f"tensor {name!r} is in {merged[name].file.name} and in {tensor.file.name}")
            merged[name] = tensor
    return merged


class Written(NamedTuple):
    """The size of a file, and the sha256 of its content."""

    size_bytes: int
    sha256: str


def write_file(path: Path | None, tensors: Mapping[str, TensorSource], on_bytes: Callable[[int], None]) -> Written:
    """Write tensors, copied from wherever they lie, as one file flushed to the disk; return its size and sha256.

    The order is by falling element size, then name, so that every tensor is aligned. `on_bytes` is called with the
    size of each piece. Without a path the file is only hashed. Raises OSError, and ValueError when a source file is
    shorter than its header said.
    """
    names = _in_order(tensors)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") if path else nullcontext() as file:
        header = _header({name: tensors[name] for name in names})
        ranges = (Range(tensor.file, tensor.offset, tensor.size_bytes) for tensor in map(tensors.__getitem__, names))
        for piece in chain((header,), stream_ranges(ranges)):
            digest.update(piece)
            size += len(piece)
            if file is not None:
                file.write(piece)
            on_bytes(len(piece))
        if file is not None:
            file.flush()
            os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def size_of_file(tensors: Mapping[str, TensorSource]) -> int:
    """Return the size of the file that `write_file` makes of tensors."""
    header = _header({name: tensors[name] for name in _in_order(tensors)})
    return len(header) + sum(tensor.size_bytes for tensor in tensors.values())


def _in_order(tensors: Mapping[str, TensorSource]) -> list[str]:
    return sorted(tensors, key=lambda name: (-_BITS[tensors[name].dtype], name))


def same_bytes(first: TensorSource, second: TensorSource) -> bool:
    """Return whether two tensors are equal in type, shape and every byte."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    one, other = (it.file.stream(it.offset, it.size_bytes) for it in (first, second))
    return all(piece == its_equal for piece, its_equal in zip(one, other, strict=True))


class _TwiceError(ValueError):
    """A header names a tensor twice."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        twice = max(Counter(name for name, _ in pairs).items(), key=lambda item: item[1])[0]
        raise _TwiceError(f"its header has {twice[:80]!r} twice")
    return members


def _tensor(file: ByteSource, name: str, info: object, start: int) -> TensorSource:
    match info:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            numbers = (*shape, begin, end)
        case _:
            dtype, shape, begin, end, numbers = "", [], 0, 0, ()
    if dtype not in _BITS or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"its header does not describe tensor {name[:80]!r} in a known way")
    if end - begin != math.prod(shape) * _BITS[dtype] // 8 or start + end > file.size_bytes:
        raise ValueError(f"tensor {name[:80]!r} does not fit its shape or the file: damaged or cut short")
    return TensorSource(file, start + begin, end - begin, dtype, tuple(shape))


def _header(tensors: Mapping[str, TensorSource]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.size_bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
