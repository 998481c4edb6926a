"""Matrices as graphs take them: plain, or in blocks of a few bits with a scale each."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How the elements of a matrix are rounded: `block_inputs` of an output share a scale.

    An element is the scale times the distance of its number from the middle one, 8 or 128; plus, if `has_offsets`, an
    offset that the block shares, too.
    """

    bits: int
    block_inputs: int
    has_offsets: bool = False

    def blocks_of(self, inputs: int) -> int:
        """Return the number of blocks of an output."""
        return -(-inputs // self.block_inputs)

    def element_bytes(self) -> float:
        """Return the bytes of an element in memory: of a scale onnxruntime keeps a copy and a multiple, each in f32."""
        return self.bits / 8 + (16 if self.has_offsets else 12) / self.block_inputs


class QuantisedRows(NamedTuple):
    """Some outputs of a matrix: numbers u8 (outputs, blocks, block_inputs), one in each byte; scales (outputs, blocks).

    `offsets`: (outputs, blocks), if there are any.
    """

    numbers: Bytes
    scales: Floats
    offsets: Floats | None = None

    def widened(self, quantisation: Quantisation) -> Floats:
        """Return the elements, (outputs, blocks * block_inputs)."""
        elements = (self.numbers.astype(np.float64) - (1 << (quantisation.bits - 1))) * self.scales[..., None]
        if self.offsets is not None:
            elements += self.offsets[..., None]
        return elements.astype(np.float32).reshape(len(elements), -1)


class Matrix(Protocol):
    """A matrix of a model, (outputs, inputs), whose elements are read in pieces."""

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""

    @property
    def inputs(self) -> int:
        """Columns of the matrix."""

    @property
    def bias(self) -> Floats | None:
        """What is added to the product, (outputs,)."""

    @property
    def quantisation(self) -> Quantisation | None:
        """How it is rounded in the graph; None for f32."""

    def columns(self, start: int, end: int) -> Floats:
        """Return the elements of some inputs, transposed: (end - start, outputs)."""

    def rows(self, start: int, end: int) -> QuantisedRows:
        """Return some outputs of a matrix with a quantisation."""


@dataclass(frozen=True, slots=True)
class GraphBlock:
    """The weights of a block of the Llama family. `head_norms`: of queries and keys, where there are any."""

    norm: Floats
    queries: Matrix
    keys: Matrix
    values: Matrix
    head_norms: tuple[Floats, Floats] | None
    out: Matrix
    mlp_norm: Floats
    gate: Matrix
    up: Matrix
    down: Matrix


def packed_nibbles(numbers: Bytes) -> Bytes:
    """Return numbers of 4 bits (…, even count) two in a byte, the first one low."""
    packed: Bytes = numbers[..., 0::2] | numbers[..., 1::2] << np.uint8(4)
    return packed
