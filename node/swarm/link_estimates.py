"""Estimates of the links between any two peers, from their announced neighbours and from our own pings."""

from collections.abc import Callable

from protocol.capabilities import Links, Neighbour
from protocol.identity import PeerId
from selector.routing import Link

HANDLING_S = 0.003
"""Handling time of a message at both ends, besides its transfer."""

UNKNOWN_ROUND_TRIP_S = 0.02
UNKNOWN_BYTES_PER_S = 50e6


class LinkEstimates:
    """Estimates of links. A route contains hops between other peers, which only these can measure."""

    def __init__(
        self,
        own_peer: PeerId,
        round_trip_s: Callable[[PeerId], float | None],
        links_of: Callable[[PeerId], Links | None],
    ) -> None:
        """`round_trip_s`: to a peer, pinged from here; `links_of`: the links that a peer announces."""
        self._own_peer = own_peer
        self._round_trip_s = round_trip_s
        self._links_of = links_of

    def between(self, sender: str, receiver: str) -> Link:
        """Return the link from one peer to another."""
        a, b = PeerId(sender), PeerId(receiver)
        if a == b:
            return Link(HANDLING_S, 1e9)
        there, back = self._announced(a, b), self._announced(b, a)
        rates = (there and there.upload_bytes_per_s, back and back.download_bytes_per_s)
        known = [rate for rate in rates if rate]
        return Link(self._round_trip(a, b, there, back) + HANDLING_S, min(known, default=UNKNOWN_BYTES_PER_S))

    def _round_trip(self, a: PeerId, b: PeerId, there: Neighbour | None, back: Neighbour | None) -> float:
        if self._own_peer in {a, b}:
            ours_s = self._round_trip_s(b if a == self._own_peer else a)
            if ours_s is not None:
                return ours_s
        for announced in (there, back):
            if announced is not None and announced.round_trip_s is not None:
                return announced.round_trip_s
        # Two peers far from here may be close to each other; without data the greater distance is the estimate.
        known = [s for peer in (a, b) if (s := self._round_trip_s(peer)) is not None]
        return max(known, default=UNKNOWN_ROUND_TRIP_S)

    def _announced(self, peer: PeerId, of: PeerId) -> Neighbour | None:
        links = self._links_of(peer)
        return next((n for n in links.neighbours if n.peer == of), None) if links is not None else None
