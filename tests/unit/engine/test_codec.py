"""Hidden states on the wire: what comes back, and how far from what was sent."""

import numpy as np
import pytest

from node.engine.codec import decode_rows, encode_rows
from node.engine.interface import EngineError
from protocol.tensors import BLOCK_ELEMENTS, DType, join


@pytest.mark.parametrize("width", [1, 31, 32, 40, 576])
def test_int8_is_as_near_as_its_blocks_allow(width: int) -> None:
    generator = np.random.default_rng(width)
    rows = (generator.standard_normal((5, width)) * 10.0 ** generator.integers(-3, 4, (5, width))).astype(np.float32)
    tensor = encode_rows(rows, "int8")
    assert tensor.dtype is DType.BLOCK_INT8
    assert len(tensor.data) == 5 * (width + 2 * -(-width // BLOCK_ELEMENTS))
    back = decode_rows(tensor)
    for start in range(0, width, BLOCK_ELEMENTS):
        block, again = rows[:, start : start + BLOCK_ELEMENTS], back[:, start : start + BLOCK_ELEMENTS]
        assert np.all(np.abs(block - again) <= np.abs(block).max(axis=1, keepdims=True) / 127 * 0.6)
    # Rows are cut out and joined as bytes.
    assert np.array_equal(decode_rows(join([tensor.cut(3, 5), tensor.cut(0, 3)])), np.roll(back, 2, axis=0))


def test_int8_bears_rows_of_zeros_and_huge_elements() -> None:
    rows = np.zeros((2, 40), np.float32)
    rows[1, 3], rows[1, 35] = 8e6, 1e-30
    back = decode_rows(encode_rows(rows, "int8"))
    assert np.all(np.isfinite(back))
    assert back[1, 3] == pytest.approx(8e6, rel=0.01)


def test_a_codec_that_is_not_known_is_refused() -> None:
    with pytest.raises(EngineError, match="no codec"):
        encode_rows(np.zeros((1, 4), np.float32), "int3")
