"""The answer on a presence stream: whatever its pieces, and what it may not be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import RemoteProtocolError
from protocol.framing import FrameType, encode_frame
from protocol.history import encode_batch
from protocol.limits import MAX_PRESENT
from protocol.presence import PresenceReader, encode_present


@given(st.lists(st.binary(min_size=1, max_size=900), max_size=300), st.integers(1, 5000))
def test_reads_presence_answer_from_any_fragmentation(envelopes: list[bytes], cut: int) -> None:
    data = b"".join(encode_present(envelopes))
    reader = PresenceReader()
    heard = [
        envelope for start in range(0, len(data), cut) for envelope in reader.receive_data(data[start : start + cut])
    ]
    assert heard == envelopes
    assert reader.receive_data(b"") == []


def test_rejects_truncated_presence_answer() -> None:
    reader = PresenceReader()
    reader.receive_data(b"".join(encode_present([b"a", b"b"]))[:-1])
    with pytest.raises(RemoteProtocolError, match="inside a frame"):
        reader.receive_data(b"")


def test_bounds_the_heartbeats_of_an_answer() -> None:
    batch = encode_frame(FrameType.CONTROL, encode_batch([b"x"] * 100))
    reader = PresenceReader()
    for _ in range(MAX_PRESENT // 100):
        reader.receive_data(batch)
    with pytest.raises(RemoteProtocolError, match="more than 10000 heartbeats"):
        reader.receive_data(batch)


def test_rejects_other_frame_types() -> None:
    with pytest.raises(RemoteProtocolError, match="CHUNK"):
        PresenceReader().receive_data(encode_frame(FrameType.CHUNK, b"x"))
