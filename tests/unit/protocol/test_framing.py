import tracemalloc

import pytest

from protocol.errors import RemoteProtocolError
from protocol.framing import (
    PREFIX_BYTES,
    Frame,
    FrameReader,
    FrameType,
    encode_chunks,
    encode_frame,
    encode_step,
    split_step,
)
from protocol.limits import MAX_CONTROL_BYTES, MAX_FRAME_BYTES


def test_frame_consists_of_length_type_and_body() -> None:
    assert encode_frame(FrameType.CONTROL, b"ab", memoryview(b"c")).hex() == "0000000301616263"
    assert FrameReader().receive_data(bytes.fromhex("0000000301616263")) == [
        Frame(FrameType.CONTROL, memoryview(b"abc"))
    ]


def test_reads_frames_from_any_fragmentation() -> None:
    data = encode_frame(FrameType.CONTROL, b"abc") + encode_frame(FrameType.CHUNK, b"defgh")
    reader = FrameReader()
    frames = []
    for index in range(len(data)):
        assert reader.at_boundary is (index in {0, 8})
        frames += reader.receive_data(data[index : index + 1])
    assert reader.at_boundary
    assert [(frame.type, bytes(frame.body)) for frame in frames] == [
        (FrameType.CONTROL, b"abc"),
        (FrameType.CHUNK, b"defgh"),
    ]
    assert reader.receive_data(data + data[:6]) == [*frames, *[]]
    assert not reader.at_boundary


@pytest.mark.parametrize(
    "prefix",
    [
        "0000000100",  # no such types
        "0000000104",
        "00000001ff",
        "0000000001",  # too short
        "0000000402",
        "0000000003",
        "0001000101",  # too long
        "0010000102",
        "0010000103",
        "ffffffff03",
    ],
)
def test_rejects_invalid_prefix_before_the_body_arrives(prefix: str) -> None:
    reader = FrameReader()
    assert reader.receive_data(bytes.fromhex(prefix)[:-1]) == []
    with pytest.raises(RemoteProtocolError, match=r"frame"):
        reader.receive_data(bytes.fromhex(prefix)[-1:])


def test_bounds_the_frame_body() -> None:
    for frame_type, longest in (
        (FrameType.CONTROL, MAX_CONTROL_BYTES),
        (FrameType.STEP, MAX_FRAME_BYTES),
        (FrameType.CHUNK, MAX_FRAME_BYTES),
    ):
        [frame] = FrameReader().receive_data(encode_frame(frame_type, bytes(longest)))
        assert len(frame.body) == longest
        with pytest.raises(ValueError, match="frame of"):
            encode_frame(frame_type, bytes(longest + 1))
    with pytest.raises(ValueError, match="frame of 0 bytes"):
        encode_frame(FrameType.CHUNK)


def test_announced_body_allocates_no_memory_before_it_arrives() -> None:
    readers = [FrameReader() for _ in range(100)]
    prefix = encode_frame(FrameType.CHUNK, bytes(MAX_FRAME_BYTES))[: PREFIX_BYTES + 1]
    tracemalloc.start()
    for reader in readers:
        reader.receive_data(prefix)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_chunks_fit_one_write_each() -> None:
    payload = bytes(range(256)) * (3 * 4096 + 1)
    pieces = encode_step(b"header", payload)
    assert all(len(piece) <= MAX_FRAME_BYTES for piece in pieces)
    frames = FrameReader().receive_data(b"".join(pieces))
    assert [frame.type for frame in frames] == [FrameType.STEP] + [FrameType.CHUNK] * (len(pieces) - 1)
    header, first = split_step(frames[0].body)
    assert bytes(header) == b"header"
    assert b"".join([first, *(frame.body for frame in frames[1:])]) == payload
    assert b"".join(frame.body for frame in FrameReader().receive_data(b"".join(encode_chunks(payload)))) == payload
    assert encode_chunks(b"") == []


@pytest.mark.parametrize("length", [0, 6, 100, 0xFFFFFFFF])
def test_rejects_step_header_beyond_its_frame(length: int) -> None:
    with pytest.raises(RemoteProtocolError, match="step header"):
        split_step(memoryview(length.to_bytes(4, "big") + b"abcde"))


def test_bounds_the_step_header() -> None:
    body = (MAX_CONTROL_BYTES + 1).to_bytes(4, "big") + bytes(2 * MAX_CONTROL_BYTES)
    with pytest.raises(RemoteProtocolError, match="step header"):
        split_step(memoryview(body))
