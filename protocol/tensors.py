"""Tensors between peers and between processes: a dtype, a shape and raw little-endian bytes.

The node never computes on them; only the engine converts them to torch tensors. Splitting a batch into rows and joining
rows into a batch are slicing of bytes.
"""

import enum
import math
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from protocol.limits import MAX_VOCABULARY


class DType(enum.StrEnum):
    """Element types that may travel."""

    FLOAT32 = "f32"
    FLOAT16 = "f16"
    BFLOAT16 = "bf16"
    INT32 = "i32"
    INT8 = "i8"
    BLOCK_INT8 = "q8"
    """A row consists of blocks of BLOCK_ELEMENTS, the last one shorter: first the blocks' scales, each an f16, then the
    elements, each an int8. The value of an element is itself times the scale of its block."""

    def row_bytes(self, *dimensions: int) -> int:
        """Return the bytes of one row, given the dimensions after the first."""
        elements = math.prod(dimensions)
        if self is DType.BLOCK_INT8:
            return elements + 2 * -(-elements // BLOCK_ELEMENTS)
        return elements * _ITEMSIZE[self]


BLOCK_ELEMENTS: Final = 32
"""Elements that share a scale."""

_ITEMSIZE = {DType.FLOAT32: 4, DType.FLOAT16: 2, DType.BFLOAT16: 2, DType.INT32: 4, DType.INT8: 1}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A dense, row-major tensor whose first dimension counts rows.

    `shape` is `(rows,)` for token ids (i32) and `(rows, width)` for hidden states. `data` is not copied.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    def __post_init__(self) -> None:
        """Raise ValueError unless the number of bytes agrees with dtype and shape."""
        expected = math.prod(self.shape[:1]) * self.dtype.row_bytes(*self.shape[1:])
        if not self.shape or min(self.shape) < 0 or len(self.data) != expected:
            raise ValueError(f"a tensor of {self.dtype}{list(self.shape)} has {expected} bytes, not {len(self.data)}")

    @property
    def rows(self) -> int:
        """The first dimension."""
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.row_bytes(*self.shape[1:])

    def cut(self, start: int, stop: int) -> "Tensor":
        """Return rows `start` to `stop` as a view of the same bytes."""
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"rows {start} to {stop} are not inside a tensor of {self.rows} rows")
        view = memoryview(self.data)[start * self.row_bytes : stop * self.row_bytes]
        return Tensor(self.dtype, (stop - start, *self.shape[1:]), view)


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Return the rows of all tensors, in order, as one tensor. They must agree in dtype and width."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    if any(tensor.dtype != first.dtype or tensor.shape[1:] != first.shape[1:] for tensor in tensors):
        raise ValueError("tensors of different dtypes or widths cannot be joined")
    return Tensor(first.dtype, (sum(t.rows for t in tensors), *first.shape[1:]), b"".join(t.data for t in tensors))


def tensor_from_tokens(tokens: Sequence[int]) -> Tensor:
    """Return token ids as a tensor of i32 with shape (len(tokens),)."""
    return Tensor(DType.INT32, (len(tokens),), b"".join(token.to_bytes(4, "little", signed=True) for token in tokens))


def tokens_from_tensor(tensor: Tensor) -> list[int]:
    """Return the token ids of a tensor of i32 with one dimension; raise ValueError for any other tensor."""
    if tensor.dtype is not DType.INT32 or len(tensor.shape) != 1:
        raise ValueError(f"token ids are i32 with one dimension, not {tensor.dtype}{list(tensor.shape)}")
    return memoryview(tensor.data).cast("B").cast("i").tolist() if tensor.rows else []


class Pooling(enum.StrEnum):
    """How the rows of a prompt become its embedding."""

    MEAN = "mean"
    """The mean of all rows."""
    LAST = "last"
    """The row of the last token."""


class TokenLogprobs(NamedTuple):
    """A drawn token with the natural logarithm of its probability, and those of the likeliest tokens."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


def logprobs_from_tensor(tensor: Tensor) -> list[TokenLogprobs]:
    """Return tokens with log probabilities, a row of f32 for each; raise ValueError for any other tensor.

    A row has pairs of a token id and a logarithm: first the token drawn, then the likeliest.
    """
    if tensor.dtype is not DType.FLOAT32 or len(tensor.shape) != 2 or tensor.shape[1] % 2 or not tensor.shape[1]:
        raise ValueError(f"log probabilities are f32 with pairs, not {tensor.dtype}{list(tensor.shape)}")
    found = []
    for row in struct.iter_unpack(f"<{tensor.shape[1]}f", tensor.data):
        ids, logprobs = row[::2], row[1::2]
        if not all(0 <= each < MAX_VOCABULARY and each == int(each) for each in ids):  # no NaN is
            raise ValueError(f"a token id is not an integer from 0 to {MAX_VOCABULARY - 1}")
        if not all(-math.inf < each <= 0 for each in logprobs):
            raise ValueError("the logarithm of a probability is not finite or above 0")
        (first, *others) = zip(map(int, ids), logprobs, strict=True)
        found.append(TokenLogprobs(*first, tuple(others)))
    return found


def embedding_from_tensor(tensor: Tensor) -> "array[float]":
    """Return an embedding, one row of f32; raise ValueError for any other tensor, and for what is not finite."""
    if tensor.dtype is not DType.FLOAT32 or len(tensor.shape) != 2 or tensor.rows != 1:
        raise ValueError(f"an embedding is one row of f32, not {tensor.dtype}{list(tensor.shape)}")
    embedding = array("f", bytes(tensor.data))
    if sys.byteorder == "big":
        embedding.byteswap()
    if not all(map(math.isfinite, embedding)):
        raise ValueError("an element of an embedding is not finite")
    return embedding


def drawn_tokens(tensor: Tensor) -> list[int]:
    """Return the tokens that a last stage has drawn, with or without log probabilities. Raises ValueError."""
    if tensor.dtype is DType.FLOAT32:
        return [each.token for each in logprobs_from_tensor(tensor)]
    return tokens_from_tensor(tensor)
