"""The presence protocol: a new peer receives the swarm's heartbeats at once, instead of in minutes by gossip alone.

The initiator opens a stream and sends nothing; the responder sends the latest heartbeats that it received, as their
peers signed them, and ends the stream. The initiator verifies each.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from protocol.errors import RemoteProtocolError
from protocol.framing import FrameReader, FrameType, encode_frame
from protocol.history import decode_batch, take_batch
from protocol.limits import MAX_PRESENT

PROTOCOL_ID: Final = "/metaswarm/presence/1.0.0"


def encode_present(heartbeats: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the frames of an answer: batches of envelopes in the format of gossip."""
    waiting = deque(heartbeats)
    while waiting:
        yield encode_frame(FrameType.CONTROL, take_batch(waiting))


class PresenceReader:
    """Reads an answer."""

    def __init__(self) -> None:
        self._reader = FrameReader()
        self._count = 0

    def receive_data(self, data: bytes) -> list[bytes]:
        """Return the envelopes that the data completes, not verified; b"" is the end of the stream.

        Raises RemoteProtocolError for an invalid answer, and for one that is too long.
        """
        if not data and not self._reader.at_boundary:
            raise RemoteProtocolError("the stream ended inside a frame")
        envelopes: list[bytes] = []
        for frame in self._reader.receive_data(data):
            if frame.type is not FrameType.CONTROL:
                raise RemoteProtocolError(f"unexpected {frame.type.name} frame on a presence stream")
            envelopes += decode_batch(bytes(frame.body))
        self._count += len(envelopes)
        if self._count > MAX_PRESENT:
            raise RemoteProtocolError(f"more than {MAX_PRESENT} heartbeats on a presence stream")
        return envelopes
