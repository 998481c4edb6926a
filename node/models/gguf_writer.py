"""Write GGUF files whose bytes follow from their content alone, tensor by tensor, never a whole one in memory.

    GGUF · version · counts · metadata, each a key, a type and a value · each tensor's name, shape, type and offset
    · the tensors' bytes, each from a multiple of the alignment on

Tensors are copied as they are, in the quantisation that they have.
"""

import hashlib
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from node.models.gguf_file import DEFAULT_ALIGNMENT, SCALARS, GgufModel, GgufTensor, Value, ValueType
from node.models.safetensors_file import Written

_VERSION: Final = 3
_COPY_BYTES: Final = 1 << 20


class GgufValue(NamedTuple):
    """A metadata value and its type, which the file states: a reader may insist on it."""

    value: Value
    type: ValueType


U32: Final[ValueType] = (GGUFValueType.UINT32,)
STRING: Final[ValueType] = (GGUFValueType.STRING,)


@dataclass(frozen=True, slots=True)
class GgufData:
    """A tensor whose bytes are given. `shape` has the slowest dimension first, as in torch."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    data: bytes

    @property
    def size_bytes(self) -> int:
        """The size of its bytes."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class GgufZeros:
    """A tensor of zeros, which `assemble_gguf` leaves to a hole in the file: it takes no place on the disk."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def size_bytes(self) -> int:
        """The size of its bytes."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * block_bytes


AnyTensor = GgufTensor | GgufData | GgufZeros


def typed_metadata(model: GgufModel) -> dict[str, GgufValue]:
    """Return a model's metadata with their types, as they are written again."""
    return {key: GgufValue(value, model.types[key]) for key, value in model.metadata.items()}


def write_gguf(
    path: Path | None,
    metadata: Mapping[str, GgufValue],
    tensors: Sequence[AnyTensor],
    on_bytes: Callable[[int], None] = lambda _count: None,
) -> Written:
    """Write a file with tensors copied from where they are, in this order, flushed to the disk.

    Returns its size and its sha256. Without a path it is only hashed. `on_bytes` is called with the size of each piece.
    A tensor of another file gets another name by `dataclasses.replace`. Raises OSError, also where a source is shorter
    than it was.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb") if path else nullcontext() as file:
        for piece in _pieces(metadata, tensors):
            for data in [piece] if isinstance(piece, bytes) else _read(piece):
                digest.update(data)
                size += len(data)
                if file is not None:
                    file.write(data)
                on_bytes(len(data))
        if file is not None:
            file.flush()
            os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def size_of_gguf(metadata: Mapping[str, GgufValue], tensors: Sequence[AnyTensor]) -> int:
    """Return the size of the file that `write_gguf` makes."""
    return sum(len(it) if isinstance(it, bytes) else it.size_bytes for it in _pieces(metadata, tensors))


def is_gguf_of(path: Path, metadata: Mapping[str, GgufValue], tensors: Sequence[AnyTensor]) -> bool:
    """Return whether a file has the size, the metadata and the tensor table that it would be written with."""
    header = next(_pieces(metadata, tensors))
    assert isinstance(header, bytes)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return size == size_of_gguf(metadata, tensors) and file.read(len(header)) == header
    except FileNotFoundError:
        return False


def assemble_gguf(path: Path, metadata: Mapping[str, GgufValue], tensors: Sequence[AnyTensor]) -> None:
    """Write the same file as `write_gguf`, unhashed, with the tensors copied by the kernel. Raises OSError."""
    with path.open("wb") as file:
        for piece in _pieces(metadata, tensors):
            match piece:
                case GgufTensor():
                    _copy(piece, file)
                case GgufZeros():
                    file.seek(piece.size_bytes, os.SEEK_CUR)
                case _:
                    file.write(piece)
        file.truncate()


def _pieces(
    metadata: Mapping[str, GgufValue], tensors: Sequence[AnyTensor]
) -> Iterator[bytes | GgufTensor | GgufZeros]:
    """Return what a file consists of, in order."""
    alignment = DEFAULT_ALIGNMENT
    if (stated := metadata.get("general.alignment")) is not None:
        assert isinstance(stated.value, int)
        alignment = stated.value
    header = bytearray(b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, (value, kind) in metadata.items():
        header += _packed(key, (GGUFValueType.STRING,)) + b"".join(struct.pack("<I", part) for part in kind)
        header += _packed(value, kind)
    offset = 0
    for tensor in tensors:
        header += _packed(tensor.name, (GGUFValueType.STRING,)) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}QIQ", *reversed(tensor.shape), tensor.type, offset)
        offset += tensor.size_bytes + -tensor.size_bytes % alignment
    yield bytes(header) + bytes(-len(header) % alignment)
    for tensor in tensors:
        yield tensor.data if isinstance(tensor, GgufData) else tensor
        yield bytes(-tensor.size_bytes % alignment)


def _packed(value: Any, kind: ValueType) -> bytes:
    """Return a value's bytes, after its type."""
    match kind:
        case (GGUFValueType.STRING,):
            encoded: bytes = value.encode()
            return struct.pack("<Q", len(encoded)) + encoded
        case (GGUFValueType.ARRAY, GGUFValueType.STRING):
            return struct.pack("<Q", len(value)) + b"".join(_packed(item, kind[1:]) for item in value)
        case (GGUFValueType.ARRAY, element):
            return struct.pack(f"<Q{len(value)}{SCALARS[element][1:]}", len(value), *value)
        case _:
            return struct.pack(SCALARS[kind[0]], value)


def _read(tensor: GgufTensor | GgufZeros) -> Iterator[bytes]:
    if isinstance(tensor, GgufZeros):
        for start in range(0, tensor.size_bytes, _COPY_BYTES):
            yield bytes(min(_COPY_BYTES, tensor.size_bytes - start))
        return
    if tensor.source is not None:
        yield from tensor.source.stream(tensor.offset, tensor.size_bytes)
        return
    with tensor.path.open("rb") as source:
        source.seek(tensor.offset)
        left = tensor.size_bytes
        while left:
            data = source.read(min(left, _COPY_BYTES))
            if not data:
                raise _cut_short(tensor)
            left -= len(data)
            yield data


def _copy(tensor: GgufTensor, file: BinaryIO) -> None:
    """Copy a tensor without a detour through this process, where the system can."""
    if not hasattr(os, "copy_file_range"):
        file.writelines(_read(tensor))
        return
    file.flush()
    with tensor.path.open("rb") as source:
        offset, left = tensor.offset, tensor.size_bytes
        while left:
            try:
                copied = os.copy_file_range(source.fileno(), file.fileno(), left, offset)
            except OSError:  # not between these file systems
                copied = os.sendfile(file.fileno(), source.fileno(), offset, left)
            if not copied:
                raise _cut_short(tensor)
            offset, left = offset + copied, left - copied
    file.seek(0, os.SEEK_END)


def _cut_short(tensor: GgufTensor) -> OSError:
    return OSError(
        f"{tensor.path.name} is cut short: tensor {tensor.name!r} ends at {tensor.offset + tensor.size_bytes}"
    )
