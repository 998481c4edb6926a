"""What real traffic shows of the links to other peers. Nothing is sent to find out."""

import math
import statistics
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final

from protocol.capabilities import (
    MAX_BYTES_PER_S,
    MAX_NEIGHBOURS,
    MAX_ROUND_TRIP_S,
    MIN_FIGURE,
    Links,
    Neighbour,
)
from protocol.identity import PeerId

MAX_PEERS: Final = 256
"""Peers remembered; the one without traffic for longest makes room."""

MIN_TRANSFER_BYTES: Final = 64 << 10
"""A smaller transfer shows the latency of a link and not its rate."""

MEMORY_BYTES: Final = 256 << 20
"""What was transferred longer ago than this much hardly counts in a rate any more."""

ROUND_TRIPS: Final = 15
"""Latest round trips of which the median is taken."""


@dataclass(slots=True)
class _Rate:
    """Bytes per second over the recent past: both sums fade alike, so that a large transfer counts for more."""

    byte_count: float = 0.0
    seconds: float = 0.0

    def add(self, byte_count: int, seconds: float) -> None:
        kept = math.exp(-byte_count / MEMORY_BYTES)
        self.byte_count = self.byte_count * kept + byte_count
        self.seconds = self.seconds * kept + seconds

    @property
    def bytes_per_s(self) -> float | None:
        return min(MAX_BYTES_PER_S, self.byte_count / self.seconds) if self.seconds else None


@dataclass(slots=True)
class _Link:
    sent: _Rate = field(default_factory=_Rate)
    received: _Rate = field(default_factory=_Rate)
    round_trips_s: deque[float] = field(default_factory=lambda: deque(maxlen=ROUND_TRIPS))


class TrafficMeter:
    """Is told of transfers and round trips, and says what the links to the neighbours are like.

    The seconds of a transfer run until its last byte is known to have arrived at the far end: a send that returned has
    only filled buffers. `node.network` tells of what it sees on its connections.
    """

    def __init__(self) -> None:
        self._links: OrderedDict[PeerId, _Link] = OrderedDict()

    def sent(self, peer: PeerId, byte_count: int, seconds: float) -> None:
        """Note a transfer to a peer."""
        if byte_count >= MIN_TRANSFER_BYTES and seconds > 0:
            self._link(peer).sent.add(byte_count, seconds)

    def received(self, peer: PeerId, byte_count: int, seconds: float) -> None:
        """Note a transfer from a peer."""
        if byte_count >= MIN_TRANSFER_BYTES and seconds > 0:
            self._link(peer).received.add(byte_count, seconds)

    def round_trip(self, peer: PeerId, seconds: float) -> None:
        """Note the time from a question to its answer, both of them small."""
        self._link(peer).round_trips_s.append(min(max(seconds, MIN_FIGURE), MAX_ROUND_TRIP_S))

    def links(self) -> Links:
        """Return the figures: of the neighbours with the latest traffic, and the best rates of all."""
        neighbours = [_neighbour(peer, link) for peer, link in reversed(self._links.items())]
        return Links(
            upload_bytes_per_s=max((n.upload_bytes_per_s for n in neighbours if n.upload_bytes_per_s), default=None),
            download_bytes_per_s=max(
                (n.download_bytes_per_s for n in neighbours if n.download_bytes_per_s), default=None
            ),
            neighbours=tuple(neighbours[:MAX_NEIGHBOURS]),
        )

    def _link(self, peer: PeerId) -> _Link:
        link = self._links.setdefault(peer, _Link())
        self._links.move_to_end(peer)
        if len(self._links) > MAX_PEERS:
            self._links.popitem(last=False)
        return link


def _neighbour(peer: PeerId, link: _Link) -> Neighbour:
    return Neighbour(
        peer=peer,
        round_trip_s=statistics.median(link.round_trips_s) if link.round_trips_s else None,
        upload_bytes_per_s=link.sent.bytes_per_s,
        download_bytes_per_s=link.received.bytes_per_s,
    )
