import pytest

from protocol.blobs import (
    BlobAnswer,
    BlobBusy,
    BlobData,
    BlobFound,
    BlobInitiator,
    BlobMissing,
    BlobRequest,
    BlobResponder,
)
from protocol.canonical import Value, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.framing import FrameType, encode_chunks, encode_frame
from protocol.limits import MAX_BLOB_BYTES

SHA256 = "0123456789abcdef" * 4
REQUEST = BlobRequest(sha256=SHA256, offset=10, length=100)


def control(value: Value) -> bytes:
    return encode_frame(FrameType.CONTROL, encode(value))


def asked() -> BlobInitiator:
    initiator = BlobInitiator()
    initiator.request(REQUEST)
    return initiator


def test_fetches_a_file_in_ranges_over_one_stream() -> None:
    file = bytes(range(256)) * 10
    initiator, responder = BlobInitiator(), BlobResponder()
    fetched = bytearray()
    while len(fetched) < len(file):
        request = BlobRequest(sha256=SHA256, offset=len(fetched), length=1000)
        [received] = responder.receive_data(initiator.request(request))
        assert received == request
        part = file[received.offset :][: received.available(len(file))]
        answer = BlobFound(size=len(file), length=len(part))
        assert initiator.receive_data(responder.answer(answer)) == [answer]
        assert not initiator.idle
        for start in range(0, len(part), 300):
            for frame in responder.send_data(part[start : start + 300]):
                for event in initiator.receive_data(frame):
                    assert isinstance(event, BlobData)
                    fetched += event.data
        assert initiator.idle
    assert fetched == file
    assert initiator.receive_data(b"") == []
    assert responder.receive_data(b"") == []


@pytest.mark.parametrize(
    "answer", [BlobMissing(), BlobBusy(), BlobFound(size=10, length=0), BlobFound(size=5, length=0)]
)
def test_answer_without_payload_completes_the_request(answer: BlobAnswer) -> None:
    initiator, responder = BlobInitiator(), BlobResponder()
    responder.receive_data(initiator.request(REQUEST))
    assert initiator.receive_data(responder.answer(answer)) == [answer]
    assert initiator.idle
    assert responder.receive_data(initiator.request(REQUEST)) == [REQUEST]


@pytest.mark.parametrize(("size", "available"), [(0, 0), (10, 0), (11, 1), (109, 99), (110, 100), (1 << 36, 100)])
def test_range_is_truncated_at_the_end_of_the_file(size: int, available: int) -> None:
    assert REQUEST.available(size) == available


@pytest.mark.parametrize(
    ("sha256", "offset", "length"),
    [
        (SHA256[1:], 0, 1),
        (SHA256.upper(), 0, 1),
        (SHA256 + "\n", 0, 1),
        (SHA256, -1, 1),
        (SHA256, MAX_BLOB_BYTES + 1, 1),
        (SHA256, 0, 0),
        (SHA256, 0, MAX_BLOB_BYTES + 1),
    ],
)
def test_rejects_requests_out_of_bounds_at_both_ends(sha256: str, offset: int, length: int) -> None:
    with pytest.raises(LocalProtocolError, match=r"get (sha256|offset|length) is"):
        BlobInitiator().request(BlobRequest(sha256=sha256, offset=offset, length=length))
    with pytest.raises(RemoteProtocolError):
        BlobResponder().receive_data(control({"type": "get", "sha256": sha256, "offset": offset, "length": length}))


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"type": "put", "sha256": SHA256, "offset": 0, "length": 1},
        {"type": "get", "sha256": SHA256, "offset": 0},
        {"type": "get", "sha256": SHA256, "offset": True, "length": 1},
        {"type": "get", "sha256": SHA256, "offset": 0.0, "length": 1},
        {"type": "get", "sha256": bytes(32), "offset": 0, "length": 1},
        {"type": "get", "sha256": SHA256, "offset": 0, "length": 1, "more": 1},
    ],
)
def test_responder_rejects_malformed_requests(value: Value) -> None:
    with pytest.raises(RemoteProtocolError):
        BlobResponder().receive_data(control(value))


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"type": "gone"},
        {"type": "missing", "size": 1},
        {"type": "found", "size": 110},
        {"type": "found", "size": 110, "length": 99},
        {"type": "found", "size": 110, "length": 101},
        {"type": "found", "size": 50, "length": 100},
        {"type": "found", "size": -1, "length": -1},
        {"type": "found", "size": MAX_BLOB_BYTES + 1, "length": 100},
    ],
)
def test_initiator_rejects_malformed_answers(value: Value) -> None:
    initiator = asked()
    with pytest.raises(RemoteProtocolError):
        initiator.receive_data(control(value))
    with pytest.raises(RemoteProtocolError, match="broke the protocol"):
        initiator.receive_data(control({"type": "missing"}))
    with pytest.raises(LocalProtocolError):
        initiator.request(REQUEST)


def test_rejects_unsolicited_frames() -> None:
    found = control({"type": "found", "size": 1000, "length": 100})
    with pytest.raises(RemoteProtocolError, match="unexpected CONTROL frame"):
        BlobInitiator().receive_data(found)
    with pytest.raises(RemoteProtocolError, match="unexpected CHUNK frame"):
        asked().receive_data(b"".join(encode_chunks(b"x")))
    with pytest.raises(RemoteProtocolError, match="unexpected STEP frame"):
        asked().receive_data(encode_frame(FrameType.STEP, bytes(10)))
    with pytest.raises(RemoteProtocolError, match="more bytes came"):
        asked().receive_data(found + b"".join(encode_chunks(bytes(101))))
    with pytest.raises(RemoteProtocolError, match="unexpected CONTROL frame"):
        asked().receive_data(found + found)
    with pytest.raises(RemoteProtocolError, match="unexpected CHUNK frame"):
        asked().receive_data(found + b"".join(encode_chunks(bytes(100)) + encode_chunks(b"x")))


def test_rejects_truncated_streams() -> None:
    found = control({"type": "found", "size": 1000, "length": 100})
    for received in (b"", found, found + b"".join(encode_chunks(bytes(99))), found[:3]):
        initiator = asked()
        if received:
            initiator.receive_data(received)
        with pytest.raises(RemoteProtocolError, match="ended before"):
            initiator.receive_data(b"")
    responder = BlobResponder()
    responder.receive_data(found[:3])
    with pytest.raises(RemoteProtocolError, match="ended inside"):
        responder.receive_data(b"")


def test_responder_accepts_one_request_at_a_time() -> None:
    responder = BlobResponder()
    get = BlobInitiator().request(REQUEST)
    with pytest.raises(RemoteProtocolError, match="awaits its answer"):
        responder.receive_data(get + get)
    with pytest.raises(RemoteProtocolError, match="broke the protocol"):
        responder.receive_data(get)


def test_responder_sends_only_the_announced_range() -> None:
    responder = BlobResponder()
    with pytest.raises(LocalProtocolError):
        responder.answer(BlobMissing())
    responder.receive_data(BlobInitiator().request(REQUEST))
    with pytest.raises(LocalProtocolError):
        responder.answer(BlobFound(size=1000, length=99))
    with pytest.raises(LocalProtocolError):
        responder.send_data(b"x")
    responder.answer(BlobFound(size=1000, length=100))
    with pytest.raises(LocalProtocolError):
        responder.send_data(bytes(101))
    with pytest.raises(LocalProtocolError):
        responder.answer(BlobMissing())
    assert responder.send_data(bytes(100)) == encode_chunks(bytes(100))
    with pytest.raises(LocalProtocolError):
        asked().request(REQUEST)


def test_responder_refuses_to_announce_another_range() -> None:
    responder = BlobResponder()
    responder.receive_data(BlobInitiator().request(REQUEST))
    with pytest.raises(LocalProtocolError, match="2 bytes of 1 are not the requested range"):
        responder.answer(BlobFound(size=1, length=2))
    with pytest.raises(LocalProtocolError, match="found size is"):
        responder.answer(BlobFound(size=MAX_BLOB_BYTES + 1, length=100))
