"""Hidden states on the wire: what comes back, and how far from what was sent."""

import numpy as np
import pytest

from node.engine.activation_codec import MAX_MAGNITUDE, check_tensor, check_tokens, decode_rows, encode_rows
from node.engine.interface import BadRows, EngineError
from protocol.tensors import BLOCK_ELEMENTS, DType, Tensor, join, tensor_from_tokens


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


def test_int8_codec_handles_zeros_and_huge_elements() -> None:
    rows = np.zeros((2, 40), np.float32)
    rows[1, 3], rows[1, 35] = 8e6, 1e-30
    back = decode_rows(encode_rows(rows, "int8"))
    assert np.all(np.isfinite(back))
    assert back[1, 3] == pytest.approx(8e6, rel=0.01)


def test_a_codec_that_is_not_known_is_refused() -> None:
    with pytest.raises(EngineError, match="unknown wire codec"):
        encode_rows(np.zeros((1, 4), np.float32), "int3")


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "fp16"])
@pytest.mark.parametrize("width", [1, 32, 33, 576])
def test_non_finite_hidden_states_are_detected_anywhere(codec: str, width: int) -> None:
    generator = np.random.default_rng(width)
    for attempt in range(20):
        rows = (generator.standard_normal((3, width)) * 10.0 ** generator.integers(-6, 4)).astype(np.float32)
        check_tensor(encoded(rows, codec))
        bad = rows.copy()
        bad[generator.integers(3), generator.integers(width)] = (np.nan, np.inf, -np.inf)[attempt % 3]
        with pytest.raises(BadRows, match="not finite"), np.errstate(invalid="ignore"):
            check_tensor(encoded(bad, codec))
    if codec in {"fp32", "bf16"}:
        check_tensor(encoded(np.full((1, width), -0.99 * MAX_MAGNITUDE, np.float32), codec))
        with pytest.raises(BadRows, match="beyond 1e"):
            check_tensor(encoded(np.full((1, width), -1.02 * MAX_MAGNITUDE, np.float32), codec))


def encoded(rows: np.ndarray, codec: str) -> Tensor:
    """Return rows as a peer might send them that does not care what they are."""
    if codec == "fp16":
        return Tensor(DType.FLOAT16, rows.shape, rows.astype(np.float16).tobytes())
    if codec == "int8":
        count, width = rows.shape
        scales = np.pad(rows, ((0, 0), (0, -width % BLOCK_ELEMENTS))).reshape(count, -1, BLOCK_ELEMENTS)[:, :, :]
        scales = scales.sum(axis=2).astype(np.float16)
        data = np.concatenate([scales.view(np.uint8), np.ones((count, width), np.uint8)], axis=1)
        return Tensor(DType.BLOCK_INT8, rows.shape, data.tobytes())
    return encode_rows(rows, codec)


def test_tokens_are_those_of_the_model() -> None:
    check_tokens(tensor_from_tokens([0, 96]), 97)
    for tokens in ([97], [5, 1 << 21], [-1, 3]):
        with pytest.raises(BadRows, match="not below 97"):
            check_tokens(tensor_from_tokens(tokens), 97)
