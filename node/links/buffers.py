"""Memory limits of job links: frames that wait to be sent, and frames that have arrived in part."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

import trio

from node.util.signal import Signal

OUTBOX_BYTES: Final = 4 << 20
"""Encoded frames of one link that wait for the network before a sender has to wait."""

OUTBOXES_BYTES: Final = 24 << 20
"""The same of all links together; beyond it a link takes a step only while it has nothing else to send."""

PARTIAL_BYTES: Final = 16 << 20
"""Incomplete frames of all links together; beyond it the links that have been silent longest are broken."""

PACKET_BYTES: Final = 64 << 10
"""Pieces are joined up to this size: a send costs far more than a copy."""

Piece = bytes | bytearray | memoryview


class Breakable(Protocol):
    """A link that can be ended to free its memory."""

    def end(self, why: str) -> None:
        """Break the link."""


class LinkBuffers:
    """What all links of a node buffer together."""

    def __init__(self) -> None:
        self.outgoing_bytes = 0
        self.partial_bytes = 0
        self._partial: dict[Breakable, int] = {}

    def add_outgoing(self, count: int) -> None:
        """Count bytes that wait to be sent; less than 0: that were sent or dropped."""
        self.outgoing_bytes += count

    def update_partial(self, link: Breakable, partial_bytes: int) -> None:
        """Record how much of an incomplete frame a link holds that has just received data.

        Beyond the limit the links that were silent longest break: identities cost nothing, so a per-peer share does not
        tell a flood from many honest peers, but an honest peer in the middle of a frame goes on with it.
        """
        self.forget(link)
        self.partial_bytes += partial_bytes
        if partial_bytes:
            self._partial[link] = partial_bytes  # behind all others
        while self.partial_bytes > PARTIAL_BYTES:
            stalest = next(iter(self._partial))
            self.forget(stalest)
            stalest.end("incomplete frames exceed their memory limit")

    def forget(self, link: Breakable) -> None:
        """Release what a link holds of an incomplete frame."""
        self.partial_bytes -= self._partial.pop(link, 0)


class SendQueue:
    """Encoded frames of one link in the order of sending, bounded by its own and by the shared limit.

    Control messages overtake the pieces of the last step but its first: a Close need not wait behind megabytes of rows.
    """

    def __init__(self, buffers: LinkBuffers) -> None:
        self.filled = Signal()
        self.accepted_bytes = 0
        """All bytes that were ever put in."""
        self._buffers = buffers
        self._pieces: deque[Piece] = deque()
        self._chunks: deque[Piece] = deque()
        """Those of the last step that may be overtaken: they come behind."""
        self._bytes = 0
        self.room = trio.lowlevel.ParkingLot()
        """Where senders wait until something was sent, or the link is broken."""

    @property
    def is_full(self) -> bool:
        """Whether senders have to wait."""
        return self._bytes > OUTBOX_BYTES

    def has_room(self, payload_bytes: int) -> bool:
        """Whether a step may be put in: an empty queue always takes one."""
        if not self._bytes:
            return True
        return not self.is_full and self._buffers.outgoing_bytes + payload_bytes <= OUTBOXES_BYTES

    def put(self, pieces: Sequence[Piece]) -> None:
        """Append the pieces of a step, whether or not there is room."""
        self._pieces += (*self._chunks, *pieces[:1])
        self._chunks = deque(pieces[1:])
        self._accept(pieces)

    def put_control(self, pieces: Sequence[Piece], *, overtakes: bool) -> None:
        """Append a control message, whether or not there is room. `overtakes`: the last step, all but its beginning."""
        (self._pieces if overtakes else self._chunks or self._pieces).extend(pieces)
        self._accept(pieces)

    def _accept(self, pieces: Iterable[Piece]) -> None:
        size = sum(map(len, pieces))
        self._count(size)
        self.accepted_bytes += size
        self.filled.set()

    def take(self) -> Piece | None:
        """Remove and return what is to be sent next: one piece, or the small ones that fit into a packet together."""
        pieces: list[Piece] = []
        size = 0
        while (source := self._pieces or self._chunks) and (not pieces or size + len(source[0]) <= PACKET_BYTES):
            pieces.append(source.popleft())
            size += len(pieces[-1])
        if not pieces:
            return None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def on_sent(self, count: int) -> None:
        """Release the bytes of what was taken, and wake senders."""
        self._count(-count)
        self.room.unpark_all()

    def clear(self) -> None:
        """Drop everything: the link is gone."""
        self._count(-self._bytes)
        self._pieces.clear()
        self._chunks.clear()

    def _count(self, change: int) -> None:
        self._bytes += change
        self._buffers.add_outgoing(change)
