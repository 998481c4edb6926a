import math
import struct

import pytest

from protocol.limits import MAX_VOCABULARY
from protocol.tensors import (
    DType,
    Tensor,
    drawn_tokens,
    join,
    logprobs_from_tensor,
    tensor_from_tokens,
    tokens_from_tensor,
)


def test_rows_are_split_and_joined() -> None:
    tensor = Tensor(DType.FLOAT16, (3, 2), bytes(range(12)))
    assert (tensor.rows, tensor.row_bytes) == (3, 4)
    assert tensor.cut(1, 2) == Tensor(DType.FLOAT16, (1, 2), bytes([4, 5, 6, 7]))
    assert tensor.cut(1, 1).rows == 0
    assert join([tensor.cut(0, 1), tensor.cut(1, 3)]) == tensor
    assert join([tensor]) is tensor


def test_split_is_a_view() -> None:
    data = bytearray(8)
    row = Tensor(DType.INT8, (2, 4), data).cut(1, 2)
    data[4] = 7
    assert bytes(row.data) == b"\x07\0\0\0"


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1), (0, 4)])
def test_rejects_rows_out_of_range(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not inside"):
        Tensor(DType.INT8, (3,), b"abc").cut(start, stop)


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [(DType.FLOAT32, (2, 3), 23), (DType.INT8, (), 1), (DType.INT8, (-1, -1), 1), (DType.BFLOAT16, (1,), 1)],
)
def test_rejects_tensor_of_wrong_size(dtype: DType, shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        Tensor(dtype, shape, bytes(size))


def test_rejects_joining_tensors_of_different_dtypes() -> None:
    row = Tensor(DType.INT8, (1, 2), b"ab")
    for other in (Tensor(DType.INT8, (1, 3), b"abc"), Tensor(DType.FLOAT16, (1, 2), b"abcd")):
        with pytest.raises(ValueError, match="joined"):
            join([row, other])


def test_token_ids_are_little_endian_i32() -> None:
    tokens = [0, 1, 258, 49151, (1 << 31) - 1]
    tensor = tensor_from_tokens(tokens)
    assert bytes(tensor.data[8:12]) == b"\x02\x01\0\0"
    assert tokens_from_tensor(tensor) == tokens
    assert tokens_from_tensor(tensor.cut(1, 3)) == [1, 258]
    assert tokens_from_tensor(tensor_from_tokens([])) == []
    with pytest.raises(ValueError, match="token ids"):
        tokens_from_tensor(Tensor(DType.INT32, (1, 1), bytes(4)))


def test_block_int8_row_has_a_scale_per_32_elements() -> None:
    tensor = Tensor(DType.BLOCK_INT8, (2, 40), bytes(range(88)))
    assert tensor.row_bytes == 40 + 2 * 2
    assert bytes(tensor.cut(1, 2).data) == bytes(range(44, 88))
    with pytest.raises(ValueError, match="88 bytes"):
        Tensor(DType.BLOCK_INT8, (2, 40), bytes(80))


def test_log_probabilities_travel_as_rows_of_pairs() -> None:
    rows = ((7.0, -0.25, 3.0, -0.5), (float(MAX_VOCABULARY - 1), 0.0, 1.0, -9999.0))
    tensor = Tensor(DType.FLOAT32, (2, 4), struct.pack("<8f", *rows[0], *rows[1]))
    assert logprobs_from_tensor(tensor) == [(7, -0.25, ((3, -0.5),)), (MAX_VOCABULARY - 1, 0.0, ((1, -9999.0),))]
    assert drawn_tokens(tensor) == [7, MAX_VOCABULARY - 1]
    assert drawn_tokens(tensor_from_tokens([4, 2])) == [4, 2]


@pytest.mark.parametrize(
    "row",
    [
        *((bad, -1.0) for bad in (1.5, -1.0, float(MAX_VOCABULARY), math.nan)),
        *((1.0, bad) for bad in (math.nan, 0.5, -math.inf)),
        (1.0, -1.0, 2.0),
    ],
)
def test_refuses_rows_that_are_not_log_probabilities(row: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"token id|logarithm|pairs"):
        logprobs_from_tensor(Tensor(DType.FLOAT32, (1, len(row)), struct.pack(f"<{len(row)}f", *row)))
