"""The GGUF header: metadata and tensor locations. Reads no tensor data and trusts no number in it.

A model may be split over several files (NAME-00001-of-00003.gguf). `read_gguf` takes any one of them, finds the others
beside it and returns all as one, or names the missing or foreign part.
"""

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from node.models.byte_source import ByteSource, open_sequential

Value = bool | int | float | str | list[Any]
"""A metadata value; lists hold such values again."""

ValueType = tuple[GGUFValueType, ...]
"""A metadata value's type in the file; for an array, ARRAY and the type of its elements."""

_MAGIC: Final = b"GGUF"
_OLD_MAGICS: Final = frozenset({b"lmgg", b"tjgg", b"fmgg", b"algg"})
_VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
_MAX_DIMENSIONS: Final = 4
SCALARS: Final[Mapping[GGUFValueType, str]] = {
    GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.UINT16: "<H", GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i", GGUFValueType.FLOAT32: "<f", GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q", GGUFValueType.INT64: "<q", GGUFValueType.FLOAT64: "<d",
}  # fmt: skip
"""How values of a type are packed."""
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
_MAX_PARTS: Final = 1000


class GgufError(ValueError):
    """The file cannot be read as a GGUF model. The message is one line for the user."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's place in its file. `shape` has the slowest dimension first, as in torch.

    `source`: where the file's bytes are when the one at `path` has only its header.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    path: Path
    offset: int
    size_bytes: int
    source: ByteSource | None = None


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model's metadata, its tensors by name, and the files that they are in, in order."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    paths: tuple[Path, ...]
    types: Mapping[str, ValueType]
    """Of the metadata: llama.cpp refuses a value of the right size and another type."""

    @property
    def name(self) -> str:
        """The name of the first file."""
        return self.paths[0].name

    @property
    def architecture(self) -> str:
        """The architecture's name in llama.cpp."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Value | None = None) -> Value | None:
        """Return a value of the architecture's namespace."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer of the architecture's namespace, of a list its only value; raise GgufError."""
        value = self.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None:
            raise GgufError(f"{self.name} lacks the key {self.architecture}.{key}")
        if type(value) is not int or value <= 0:
            raise self.unsupported(key)
        return value

    def number(self, key: str, default: float) -> float:
        """Return a finite number of the architecture's namespace; raise GgufError."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.unsupported(key)
        return float(value)

    def unsupported(self, key: str) -> GgufError:
        """Return the error for a value of the architecture's namespace that cannot be kept."""
        kind = "a RoPE scaling " if key.startswith("rope.") else ""
        return GgufError(
            f"{self.name} has {self.architecture}.{key} = {shorten(self.get(key))}, {kind}which is not supported here "
            "and would change the model's answers: import its safetensors checkpoint"
        )


def shorten(value: object) -> str:
    """Return a metadata value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def read_gguf(path: Path, sources: Mapping[Path, ByteSource] = MappingProxyType({})) -> GgufModel:
    """Return the model in a file and the other parts of its split. Raises GgufError and OSError.

    `sources`: where the bytes of files are that have only their headers here (see `copy_header`).
    """
    metadata, types, tensors = _read_header(path)
    count = _integer(metadata, "split.count", path)
    paths: tuple[Path, ...] = (path,)
    if count > 1:
        paths = _parts_beside(path, _integer(metadata, "split.no", path) + 1, count)
        metadata, types, tensors = _join(paths)
    if not isinstance(metadata.get("general.architecture"), str):
        raise GgufError(f"{paths[0].name} does not name its architecture (general.architecture): not a model")
    if sources:
        tensors = {name: replace(tensor, source=sources[tensor.path]) for name, tensor in tensors.items()}
    return GgufModel(metadata, tensors, paths, types)


def copy_header(source: ByteSource, path: Path) -> None:
    """Write the header of a file that is elsewhere into a new one of the same size, which has no other bytes.

    Its size on the disk is that of the header. Raises GgufError, OSError, and ModelError for a fault of a server.
    """
    with path.open("wb") as copy, open_sequential(source, copy.write) as file:
        _parse_header(path, file, source.size_bytes)
        copy.truncate(source.size_bytes)


def _parts_beside(path: Path, number: int, count: int) -> tuple[Path, ...]:
    """Return the paths of all parts of the split that a file is one part of."""
    this = f"{path.name} is part {number} of {count} (split.count = {count})"
    name = _PART_NAME.fullmatch(path.name)
    if count > _MAX_PARTS:
        raise GgufError(f"{this}: more than {_MAX_PARTS} parts are not supported")
    if name is None or (int(name["number"]), int(name["count"])) != (number, count):
        wanted = f"NAME-{number:05d}-of-{count:05d}.gguf"
        raise GgufError(f"{this} but not named {wanted}, by which its other parts would be found: rename it")
    paths = [
        path.with_name(f"{name['stem']}-{part:05d}-of-{count:05d}{name['suffix']}") for part in range(1, count + 1)
    ]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise GgufError(f"{this}, and {missing[0]}{more} is not beside it: put all parts into one folder")
    return tuple(paths)


_Header = tuple[dict[str, Value], dict[str, ValueType], dict[str, GgufTensor]]


def _join(paths: tuple[Path, ...]) -> _Header:
    """Return the metadata of the first part and the tensors of all; raise GgufError if they are not of one split."""
    metadata: dict[str, Value] = {}
    types: dict[str, ValueType] = {}
    tensors: dict[str, GgufTensor] = {}
    for number, path in enumerate(paths):
        of_part, types_of_part, more = _read_header(path)
        metadata, types = metadata or of_part, types or types_of_part
        for key, wanted in (
            ("split.no", number),
            ("split.count", len(paths)),
            ("split.tensors.count", metadata.get("split.tensors.count")),
            ("general.architecture", of_part.get("general.architecture") and metadata.get("general.architecture")),
        ):
            if of_part.get(key) != wanted:
                raise GgufError(
                    f"{path.name} is not a part of the same split as {paths[0].name}: its {key} is "
                    f"{of_part.get(key)}, not {wanted}"
                )
        for name in more.keys() & tensors.keys():
            raise GgufError(f"tensor {name!r} is in {tensors[name].path.name} and in {path.name}")
        tensors |= more
    total = metadata.get("split.tensors.count")
    if total is not None and total != len(tensors):
        raise GgufError(f"the parts of {paths[0].name} have {len(tensors)} tensors, not {total} (split.tensors.count)")
    return metadata, types, tensors


def _integer(metadata: Mapping[str, Value], key: str, path: Path) -> int:
    value = metadata.get(key, 0)
    if type(value) is not int or value < 0:
        raise GgufError(f"{path.name} is damaged: its {key} is {str(value)[:40]}")
    return value


def _read_header(path: Path) -> _Header:
    with path.open("rb") as file:
        return _parse_header(path, file, path.stat().st_size)


def _parse_header(path: Path, file: BinaryIO, size: int) -> _Header:
    _check_magic(path, file.read(8), size)
    reader = _Reader(file, path.name, size)
    tensor_count, key_count = reader.number("<Q"), reader.number("<Q")
    metadata: dict[str, Value] = {}
    types: dict[str, ValueType] = {}
    for _ in range(reader.plausible(key_count, 12)):
        key = reader.string()
        if key in metadata:
            raise GgufError(f"{path.name} is damaged: it has the key {key[:80]!r} twice")
        types[key], metadata[key] = reader.value()
    infos = [reader.tensor_info() for _ in range(reader.plausible(tensor_count, 24))]
    position = file.tell()
    alignment = _integer(metadata, "general.alignment", path) or DEFAULT_ALIGNMENT
    start = position + -position % alignment
    return metadata, types, _place(path, infos, start, alignment, size)


def _check_magic(path: Path, beginning: bytes, size: int) -> None:
    magic, version = beginning[:4], int.from_bytes(beginning[4:8], "little")
    if magic in _OLD_MAGICS:
        raise GgufError(f"{path.name} is in a format older than GGUF ({magic[::-1].decode()}): convert the model again")
    if magic != _MAGIC:
        reason = f"it starts with {magic!r}" if size else "it is empty"
        raise GgufError(f"{path.name} is not a GGUF file: {reason}")
    if len(beginning) < 8:
        raise GgufError(f"{path.name} is cut short: it has only {size} bytes")
    if version in _VERSIONS:
        return
    if version & 0xFFFF == 0 and version:
        raise GgufError(
            f"{path.name} is a big-endian GGUF file, which is not supported: convert it with gguf-convert-endian"
        )
    age = "too old" if version < min(_VERSIONS) else "unknown here"
    raise GgufError(f"{path.name} is GGUF version {version}, which is {age}: versions 2 and 3 are supported")


def _place(
    path: Path, infos: Iterable[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, file_size: int
) -> dict[str, GgufTensor]:
    """Check where each tensor lies, against its shape, its neighbours and the file."""
    tensors: dict[str, GgufTensor] = {}
    for name, shape, type_number, offset in infos:
        shown = f"tensor {name[:80]!r} of {path.name}"
        if name in tensors:
            raise GgufError(f"{path.name} has the tensor {name[:80]!r} twice")
        try:
            kind = GGMLQuantizationType(type_number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise GgufError(f"{shown} is of type {type_number}, which is unknown here") from None
        if not shape or 0 in shape or shape[-1] % block or offset % alignment:
            raise GgufError(f"{shown} is damaged: shape {list(shape)} in {kind.name} at offset {offset}")
        size = math.prod(shape) // block * block_bytes
        tensors[name] = GgufTensor(name, shape, kind, path, start + offset, size)
    end = max((tensor.offset + tensor.size_bytes for tensor in tensors.values()), default=0)
    if end > file_size:
        raise GgufError(f"{path.name} is cut short: it has {file_size} bytes, and its header describes {end}")
    in_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for one, other in pairwise(in_order):
        if one.offset + one.size_bytes > other.offset:
            raise GgufError(f"{path.name} is damaged: tensors {one.name[:80]!r} and {other.name[:80]!r} overlap")
    return tensors


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the values of a header, never more than the file has."""

    _file: BinaryIO
    _name: str
    _size: int

    def number(self, layout: str) -> int:
        value = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        assert isinstance(value, int)
        return value

    def plausible(self, count: int, least_bytes: int) -> int:
        """Return a count of items of at least `least_bytes` each, if the file can hold them."""
        if count * least_bytes > self._size - self._file.tell():
            raise self._cut_short()
        return count

    def string(self) -> str:
        return self._take(self.number("<Q")).decode("utf-8", errors="replace")

    def value(self) -> tuple[ValueType, Value]:
        """Return a value after its type."""
        kind = self._type()
        if kind is not GGUFValueType.ARRAY:
            return (kind,), self._scalar(kind)
        element, count = self._type(), self.number("<Q")
        if element is GGUFValueType.ARRAY:
            raise GgufError(f"{self._name} is damaged: its metadata have an array of arrays")
        if element is GGUFValueType.STRING:
            return (kind, element), [self.string() for _ in range(self.plausible(count, 8))]
        layout = SCALARS[element]
        data = self._take(self.plausible(count, struct.calcsize(layout)) * struct.calcsize(layout))
        return (kind, element), [item for (item,) in struct.iter_unpack(layout, data)]

    def _type(self) -> GGUFValueType:
        number = self.number("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise GgufError(f"{self._name} is damaged: its metadata have a value of type {number}") from None

    def _scalar(self, kind: GGUFValueType) -> Value:
        if kind is GGUFValueType.STRING:
            return self.string()
        value: bool | int | float = struct.unpack(SCALARS[kind], self._take(struct.calcsize(SCALARS[kind])))[0]
        return value

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.string(), self.number("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise GgufError(f"{self._name} is damaged: tensor {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        return name, shape, self.number("<I"), self.number("<Q")

    def _take(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise self._cut_short()
        return self._file.read(count)

    def _cut_short(self) -> GgufError:
        return GgufError(f"{self._name} is cut short or damaged: its header goes on beyond its {self._size} bytes")
