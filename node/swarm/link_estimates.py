"""What the links between any two peers are like, from what each told of its neighbours and from our own pings."""

from collections.abc import Callable

from protocol.capabilities import Links, Neighbour
from protocol.identity import PeerId
from selector.routing import Link

HANDLING_S = 0.003
"""What a message costs both ends, besides its way."""

UNKNOWN_ROUND_TRIP_S = 0.02
UNKNOWN_BYTES_PER_S = 50e6


class LinkEstimates:
    """The best guess at each link. A route has hops between others, of which only they know."""

    def __init__(
        self,
        own_peer: PeerId,
        round_trip_s: Callable[[PeerId], float | None],
        links_of: Callable[[PeerId], Links | None],
    ) -> None:
        """`round_trip_s`: to a peer, as pinged from here; `links_of`: what a peer says of its neighbours."""
        self._own_peer = own_peer
        self._round_trip_s = round_trip_s
        self._links_of = links_of

    def between(self, sender: str, receiver: str) -> Link:
        """Return the link from one peer to another."""
        a, b = PeerId(sender), PeerId(receiver)
        if a == b:
            return Link(HANDLING_S, 1e9)
        there, back = self._told(a, b), self._told(b, a)
        rates = (there and there.upload_bytes_per_s, back and back.download_bytes_per_s)
        known = [rate for rate in rates if rate]
        return Link(self._round_trip(a, b, there, back) + HANDLING_S, min(known, default=UNKNOWN_BYTES_PER_S))

    def _round_trip(self, a: PeerId, b: PeerId, there: Neighbour | None, back: Neighbour | None) -> float:
        if self._own_peer in {a, b}:
            ours_s = self._round_trip_s(b if a == self._own_peer else a)
            if ours_s is not None:
                return ours_s
        for told in (there, back):
            if told is not None and told.round_trip_s is not None:
                return told.round_trip_s
        # Two that are far from here may be near to each other; that is not known, and the greater is a fair guess.
        known = [s for peer in (a, b) if (s := self._round_trip_s(peer)) is not None]
        return max(known, default=UNKNOWN_ROUND_TRIP_S)

    def _told(self, peer: PeerId, of: PeerId) -> Neighbour | None:
        links = self._links_of(peer)
        return next((n for n in links.neighbours if n.peer == of), None) if links is not None else None
