"""Link rates, estimated passively from real traffic, and round trips."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from protocol.capabilities import MAX_NEIGHBOURS, Links, Neighbour
from protocol.figures import MAX_BYTES_PER_S, MAX_ROUND_TRIP_S, MIN_FIGURE
from protocol.identity import PeerId

MAX_PEERS: Final = 256
"""Peers whose links are stored; the one with the oldest traffic is evicted."""

MIN_TRANSFER_BYTES: Final = 64 << 10
"""Smaller transfers are ignored: they show the latency of a link, not its rate."""

MEMORY_BYTES: Final = 256 << 20
"""Scale of the exponential decay: a transfer this many bytes ago weighs 1/e in a rate."""


@dataclass(slots=True)
class _Rate:
    """Bytes per second, weighted by size and decayed: both sums decay alike."""

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
    round_trip_s: float | None = None


class TrafficMeter:
    """Estimates the links to the neighbours from transfers, beside the round trips that pings show.

    The seconds of a transfer run until its last byte is acknowledged: a send that returned has only filled buffers.
    `node.network` reports the transfers on its connections.
    """

    def __init__(self) -> None:
        self._links: dict[PeerId, _Link] = {}

    def sent(self, peer: PeerId, byte_count: int, seconds: float) -> None:
        """Record a transfer to a peer."""
        if byte_count >= MIN_TRANSFER_BYTES and seconds > 0:
            self._link(peer).sent.add(byte_count, seconds)

    def received(self, peer: PeerId, byte_count: int, seconds: float) -> None:
        """Record a transfer from a peer."""
        if byte_count >= MIN_TRANSFER_BYTES and seconds > 0:
            self._link(peer).received.add(byte_count, seconds)

    def round_trip(self, peer: PeerId, seconds: float) -> None:
        """Record the round trip to a peer as it is estimated now."""
        self._link(peer).round_trip_s = min(max(seconds, MIN_FIGURE), MAX_ROUND_TRIP_S)

    def links(self, connected: Collection[PeerId]) -> Links:
        """Return the estimates for the connected peers with the latest traffic, and the best rates to these.

        Those for others are dropped: no link to a former neighbour may be left, and one that comes back may have moved.
        """
        self._links = {peer: link for peer, link in self._links.items() if peer in connected}
        neighbours = [
            Neighbour(
                peer=peer,
                round_trip_s=link.round_trip_s,
                upload_bytes_per_s=link.sent.bytes_per_s,
                download_bytes_per_s=link.received.bytes_per_s,
            )
            for peer, link in reversed(self._links.items())
        ]
        return Links(
            upload_bytes_per_s=max(filter(None, (each.upload_bytes_per_s for each in neighbours)), default=None),
            download_bytes_per_s=max(filter(None, (each.download_bytes_per_s for each in neighbours)), default=None),
            neighbours=tuple(neighbours[:MAX_NEIGHBOURS]),
        )

    def _link(self, peer: PeerId) -> _Link:
        link = self._links[peer] = self._links.pop(peer, _Link())  # ordered by latest traffic
        if len(self._links) > MAX_PEERS:
            del self._links[next(iter(self._links))]
        return link
