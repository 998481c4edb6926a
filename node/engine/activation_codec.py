"""Wire codecs of hidden states: fp32, bf16, and int8 in blocks with a scale. numpy only, for the fake engine."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from node.engine.interface import BadRows, EngineError
from protocol.tensors import BLOCK_ELEMENTS, DType, Tensor

MAX_MAGNITUDE = 1e18
"""Far above real hidden states. Norms square them, which overflows f32 for much larger ones."""

_MAX_BITS = {DType.FLOAT16: 0x7BFF, DType.BFLOAT16: int(np.array([MAX_MAGNITUDE], np.float32).view(np.uint32)[0] >> 16)}
"""The largest valid number of each codec, sign aside."""

Rows = npt.NDArray[np.float32]
"""Hidden states, (rows, hidden size)."""


def encode_rows(rows: Rows, activations: str) -> Tensor:
    """Encode hidden states with a session's codec. Raises EngineError for an unknown codec."""
    if activations not in _ENCODERS:
        raise EngineError(f"unknown wire codec for activations: {activations!r}")
    return _ENCODERS[activations](np.ascontiguousarray(rows, np.float32))


def check_rows(rows: Rows) -> None:
    """Raise BadRows unless every element is finite, and small enough to be squared."""
    if rows.size and not (rows.max() <= MAX_MAGNITUDE and rows.min() >= -MAX_MAGNITUDE):  # also false for NaN
        raise BadRows(f"hidden states that are not finite, or beyond {MAX_MAGNITUDE:g}")


def check_tensor(tensor: Tensor) -> None:
    """Raise BadRows unless the hidden states in a tensor of any codec pass `check_rows`; nothing is decoded."""
    if tensor.dtype is DType.FLOAT32:
        check_rows(np.frombuffer(tensor.data, np.float32))
        return
    if tensor.dtype is DType.BLOCK_INT8:  # finite where the scales are
        data = np.frombuffer(tensor.data, np.uint8).reshape(tensor.rows, tensor.row_bytes)
        bits = np.ascontiguousarray(data[:, : tensor.row_bytes - tensor.shape[1]]).view(np.uint16)
    else:
        bits = np.frombuffer(tensor.data, np.uint16)
    # Without the sign, floats are in the order of their bits.
    most = _MAX_BITS[DType.BFLOAT16 if tensor.dtype is DType.BFLOAT16 else DType.FLOAT16]
    if bits.size and (bits & 0x7FFF).max() > most:
        raise BadRows(f"hidden states that are not finite, or beyond {MAX_MAGNITUDE:g}")


def check_tokens(tensor: Tensor, vocabulary_size: int) -> None:
    """Raise BadRows unless the token ids in a tensor (i32, one dimension) are in the vocabulary."""
    tokens = np.frombuffer(tensor.data, np.int32)
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocabulary_size):
        raise BadRows(f"a token id is not below {vocabulary_size}")


def decode_rows(tensor: Tensor) -> Rows:
    """Return the hidden states in a tensor of any codec, as an array of its own."""
    return _DECODERS[tensor.dtype](tensor)


def _encode_fp32(rows: Rows) -> Tensor:
    return Tensor(DType.FLOAT32, rows.shape, rows.data.cast("B"))


def _encode_bf16(rows: Rows) -> Tensor:
    bits = rows.view(np.uint32)
    # Round to nearest, ties to even: the addend carries into the upper half.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(rows), 0x7FC0, rounded)
    return Tensor(DType.BFLOAT16, rows.shape, rounded.astype(np.uint16).data.cast("B"))


def _encode_int8(rows: Rows) -> Tensor:
    count, width = rows.shape
    blocks = -(-width // BLOCK_ELEMENTS)
    padded = np.zeros((count, blocks * BLOCK_ELEMENTS), np.float32)
    padded[:, :width] = rows
    padded = padded.reshape(count, blocks, BLOCK_ELEMENTS)
    largest = np.abs(padded).max(axis=2)
    scales = np.minimum(largest / 127, np.finfo(np.float16).max).astype(np.float16)
    # By the scale as it is sent, which is rounded; a block whose scale rounds to zero becomes zero.
    divisors = np.where(scales > 0, scales.astype(np.float32), np.inf)[:, :, None]
    elements = np.clip(np.rint(padded / divisors), -127, 127).astype(np.int8).reshape(count, -1)[:, :width]
    data = np.concatenate([scales.view(np.uint8).reshape(count, -1), elements.view(np.uint8)], axis=1)
    return Tensor(DType.BLOCK_INT8, rows.shape, data.tobytes())


def _decode_int8(tensor: Tensor) -> Rows:
    count, width = tensor.shape
    data = np.frombuffer(tensor.data, np.uint8).reshape(count, tensor.row_bytes)
    split = tensor.row_bytes - width
    scales = np.ascontiguousarray(data[:, :split]).view(np.float16).astype(np.float32)
    elements = np.ascontiguousarray(data[:, split:]).view(np.int8).astype(np.float32)
    return elements * np.repeat(scales, BLOCK_ELEMENTS, axis=1)[:, :width]


def _decode_float(element: type[np.floating[Any]], tensor: Tensor) -> Rows:
    return np.frombuffer(tensor.data, element).reshape(tensor.shape).astype(np.float32)


def _decode_bf16(tensor: Tensor) -> Rows:
    bits = np.frombuffer(tensor.data, np.uint16).reshape(tensor.shape).astype(np.uint32) << 16
    return bits.view(np.float32)


_ENCODERS: Mapping[str, Callable[[Rows], Tensor]] = {"fp32": _encode_fp32, "bf16": _encode_bf16, "int8": _encode_int8}
_DECODERS: Mapping[DType, Callable[[Tensor], Rows]] = {
    DType.FLOAT32: partial(_decode_float, np.float32),
    DType.FLOAT16: partial(_decode_float, np.float16),
    DType.BFLOAT16: _decode_bf16,
    DType.BLOCK_INT8: _decode_int8,
}
