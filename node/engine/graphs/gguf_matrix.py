"""Matrices of GGUF files as graphs take them: the file's own numbers and scales, in another order.

Nothing is rounded again: the elements are those that llama.cpp widens, to the bit. Types of 4 bits stay so; those of 5
and 6 take a byte, as the operator knows no others. Where a file counts its numbers from 0, they are counted from the
middle here, so that what the operator rounds has no mean, and the offsets are moved by as much: of Q4_K and Q5_K, whose
offsets have more digits, in the precision of f32.
"""

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from node.engine.graphs.matrix import Bytes, Floats, Quantisation, QuantisedRows
from node.models.gguf_file import GgufTensor

_Type = GGMLQuantizationType
_Split = tuple[npt.NDArray[Any], Floats, Floats | None]
"""Of blocks as the file has them: numbers (blocks, parts, inputs of a part), scales and offsets (blocks, parts)."""

_HALVES: Final = np.array([0, 4], np.uint8)[:, None]
_BYTE_CENTRE: Final = 128


def _half(column: Bytes) -> Floats:
    """Return numbers in f16 as f32."""
    return np.ascontiguousarray(column).view(np.float16).astype(np.float32)


def _nibbles(column: Bytes, group: int) -> Bytes:
    """Return the low nibbles of each group of bytes, then its high ones."""
    halves: Bytes = (column.reshape(len(column), -1, 1, group) >> _HALVES) & np.uint8(15)
    return halves.reshape(len(column), -1)


def _fifth_bits(column: Bytes) -> Bytes:
    bits: Bytes = np.unpackbits(column, axis=1, bitorder="little") << np.uint8(4)
    return bits


def _whole(numbers: npt.NDArray[Any], scales: Floats, offsets: Floats | None = None) -> _Split:
    return numbers[:, None], scales, offsets


def _q4_0(raw: Bytes) -> _Split:
    return _whole(_nibbles(raw[:, 2:], 16), _half(raw[:, :2]))


def _q4_1(raw: Bytes) -> _Split:
    scales = _half(raw[:, :2])
    return _whole(_nibbles(raw[:, 4:], 16), scales, _half(raw[:, 2:4]) + 8 * scales)


def _q5_0(raw: Bytes) -> _Split:
    numbers = _nibbles(raw[:, 6:], 16) | _fifth_bits(raw[:, 2:6])
    return _whole(numbers + np.uint8(_BYTE_CENTRE - 16), _half(raw[:, :2]))


def _q5_1(raw: Bytes) -> _Split:
    numbers = _nibbles(raw[:, 8:], 16) | _fifth_bits(raw[:, 4:8])
    scales = _half(raw[:, :2])
    return _whole(numbers + np.uint8(_BYTE_CENTRE - 16), scales, _half(raw[:, 2:4]) + 16 * scales)


def _q8_0(raw: Bytes) -> _Split:
    return _whole(raw[:, 2:] ^ np.uint8(_BYTE_CENTRE), _half(raw[:, :2]))


def _k_scales(raw: Bytes, middle: int) -> tuple[Floats, Floats]:
    """Return scales and offsets of the 8 parts of a block, whose multiples of 6 bits lie in 12 bytes."""
    low, high, mixed = (raw[:, start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate([low & 63, (mixed & 15) | (low >> 2 & 48)], axis=1)
    offsets = np.concatenate([high & 63, (mixed >> 4) | (high >> 2 & 48)], axis=1)
    widened = _half(raw[:, :2]) * scales.astype(np.float32)
    return widened, middle * widened - _half(raw[:, 2:4]) * offsets.astype(np.float32)


def _q4_k(raw: Bytes) -> _Split:
    return _nibbles(raw[:, 16:], 32).reshape(len(raw), 8, 32), *_k_scales(raw, 8)


def _q5_k(raw: Bytes) -> _Split:
    high = (raw[:, 16:48, None] >> np.arange(8, dtype=np.uint8) & 1).transpose(0, 2, 1) << 4
    numbers = (_nibbles(raw[:, 48:], 32).reshape(len(raw), 8, 32) | high) + np.uint8(_BYTE_CENTRE - 16)
    return numbers, *_k_scales(raw, 16)


def _q6_k(raw: Bytes) -> _Split:
    low = _nibbles(raw[:, :128], 64)
    high = raw[:, 128:192].reshape(len(raw), 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    numbers = (low | high.reshape(len(raw), 256) << 4) + np.uint8(_BYTE_CENTRE - 32)
    scales = raw[:, 192:208].view(np.int8).astype(np.float32) * _half(raw[:, 208:210])
    return numbers.reshape(len(raw), 16, 16), scales, None


_SPLITS: Final[Mapping[GGMLQuantizationType, tuple[Quantisation, Callable[[Bytes], _Split]]]] = {
    _Type.Q4_0: (Quantisation(4, 32), _q4_0),
    _Type.Q4_1: (Quantisation(4, 32, has_offsets=True), _q4_1),
    _Type.Q5_0: (Quantisation(8, 32), _q5_0),
    _Type.Q5_1: (Quantisation(8, 32, has_offsets=True), _q5_1),
    _Type.Q8_0: (Quantisation(8, 32), _q8_0),
    _Type.Q4_K: (Quantisation(4, 32, has_offsets=True), _q4_k),
    _Type.Q5_K: (Quantisation(8, 32, has_offsets=True), _q5_k),
    _Type.Q6_K: (Quantisation(8, 16), _q6_k),
}
_PLAIN: Final = frozenset({_Type.F32, _Type.F16, _Type.BF16})


def is_graph_type(kind: GGMLQuantizationType) -> bool:
    """Return whether matrices of a type can be kept as they are."""
    return kind in _SPLITS or kind in _PLAIN


def is_quantised(kind: GGMLQuantizationType) -> bool:
    """Return whether a type keeps several elements with a common scale."""
    return kind in _SPLITS


def graph_bytes(tensor: GgufTensor) -> int:
    """Return what a matrix takes in a graph."""
    found = _SPLITS.get(tensor.type)
    elements = tensor.shape[0] * tensor.shape[1]
    return int(elements * (found[0].element_bytes() if found else 4))


@dataclass(frozen=True, slots=True)
class GgufMatrix:
    """A matrix in a GGUF file, and its bias."""

    tensor: GgufTensor
    bias: Floats | None = None

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return self.tensor.shape[0]

    @property
    def inputs(self) -> int:
        """Columns of the matrix."""
        return self.tensor.shape[1]

    @property
    def quantisation(self) -> Quantisation | None:
        """How the file has it."""
        found = _SPLITS.get(self.tensor.type)
        return found[0] if found else None

    def columns(self, start: int, end: int) -> Floats:
        """Return some inputs of a matrix that is not quantised."""
        return plain_values(self.tensor)[:, start:end].T

    def rows(self, start: int, end: int) -> QuantisedRows:
        """Return some outputs of a quantised matrix."""
        _, split = _SPLITS[self.tensor.type]
        raw = _bytes_of(self.tensor).reshape(self.outputs, -1)[start:end]
        numbers, scales, offsets = split(raw.reshape(-1, GGML_QUANT_SIZES[self.tensor.type][1]))
        count = end - start
        return QuantisedRows(
            numbers.reshape(count, -1, numbers.shape[-1]),
            scales.reshape(count, -1),
            None if offsets is None else offsets.reshape(count, -1),
        )


def plain_values(tensor: GgufTensor) -> Floats:
    """Return a tensor that is not quantised as f32."""
    raw = _bytes_of(tensor)
    match tensor.type:
        case _Type.F32:
            values = raw.view(np.float32)
        case _Type.F16:
            values = raw.view(np.float16).astype(np.float32)
        case _:
            values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.reshape(tensor.shape)


def _bytes_of(tensor: GgufTensor) -> Bytes:
    """Return a tensor's bytes, mapped from its file for as long as they are used."""
    start = tensor.offset - tensor.offset % mmap.ALLOCATIONGRANULARITY
    with tensor.path.open("rb") as file:
        size = tensor.offset + tensor.size_bytes - start
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=start)
    return np.frombuffer(mapped, np.uint8, tensor.size_bytes, tensor.offset - start)
