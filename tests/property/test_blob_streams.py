from hypothesis import given
from hypothesis import strategies as st

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
from protocol.errors import RemoteProtocolError
from protocol.limits import MAX_BLOB_BYTES
from tests.property.strategies import pieces

REQUESTS = st.builds(
    BlobRequest,
    sha256=st.binary(min_size=32, max_size=32).map(bytes.hex),
    offset=st.one_of(st.integers(0, 50), st.integers(0, MAX_BLOB_BYTES)),
    length=st.one_of(st.integers(1, 50), st.integers(1, MAX_BLOB_BYTES)),
)


@given(st.binary(max_size=100), st.lists(REQUESTS, max_size=4), st.data())
def test_blob_ranges_survive_any_fragmentation(file: bytes, requests: list[BlobRequest], data: st.DataObject) -> None:
    initiator, responder = BlobInitiator(), BlobResponder()
    for request in requests:
        heard = [
            part for piece in data.draw(pieces(initiator.request(request))) for part in responder.receive_data(piece)
        ]
        assert heard == [request]
        wanted = file[request.offset : request.offset + request.length]
        found = BlobFound(size=len(file), length=len(wanted))
        answers: list[BlobAnswer] = [BlobMissing(), BlobBusy(), found]
        answer = data.draw(st.sampled_from(answers))
        sent = responder.answer(answer)
        if isinstance(answer, BlobFound):
            for part in data.draw(pieces(wanted)):
                sent += b"".join(responder.send_data(part))
        first, *rest = [event for piece in data.draw(pieces(sent)) for event in initiator.receive_data(piece)]
        assert first == answer
        fetched = b"".join(event.data for event in rest if isinstance(event, BlobData))
        assert fetched == (wanted if isinstance(answer, BlobFound) else b"")
        assert initiator.idle


@given(st.binary(max_size=200), st.data())
def test_garbage_raises_only_remote_errors(garbage: bytes, data: st.DataObject) -> None:
    asked = BlobInitiator()
    asked.request(BlobRequest(sha256="00" * 32, offset=0, length=10))
    for receive in (asked.receive_data, BlobResponder().receive_data):
        try:
            for piece in [*data.draw(pieces(garbage)), b""]:
                receive(piece)
        except RemoteProtocolError:
            pass
