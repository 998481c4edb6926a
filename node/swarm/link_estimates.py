"""Estimates of the links between any two peers, from their announced neighbours and from our own pings.

The one place that says whether two peers can reach each other at all: a link that cannot be has an infinite round trip.
Planner, placement, `status` and `doctor` ask here.
"""

import math
from collections.abc import Callable
from typing import Final

from node.swarm.directory import Directory
from protocol.capabilities import Links, Neighbour
from protocol.identity import PeerId
from selector.reachability import is_relayed
from selector.routing import UNKNOWN_BYTES_PER_S, Link

HANDLING_S = 0.003
"""Handling time of a message at both ends, besides its transfer."""

UNKNOWN_ROUND_TRIP_S = 0.02


NO_LINK: Final = Link(math.inf, UNKNOWN_BYTES_PER_S, is_round_trip_known=False, is_rate_known=False)
"""Between peers of which the one cannot open a stream to the other."""


class LinkEstimates:
    """Estimates of links. A route contains hops between other peers, which only these can measure."""

    def __init__(
        self,
        directory: Directory,
        own_peer: PeerId,
        round_trip_s: Callable[[PeerId], float | None],
        links_of: Callable[[PeerId], Links | None],
        relay_to: Callable[[PeerId], PeerId | None] = lambda peer: None,
    ) -> None:
        """`round_trip_s`: to a peer, pinged from here. `links_of`: the links that a peer announces.

        `relay_to`: the relay through which a peer is connected to this node.
        """
        self._directory = directory
        self._own_peer = own_peer
        self._round_trip_s = round_trip_s
        self._links_of = links_of
        self._relay_to = relay_to

    def between(self, sender: str, receiver: str) -> Link:
        """Return the link from one peer to another."""
        a, b = PeerId(sender), PeerId(receiver)
        if a == b:
            return Link(HANDLING_S, 1e9)
        there, back = self._announced(a, b), self._announced(b, a)
        if there is None and back is None and not self._directory.can_open(a, b):
            return NO_LINK
        link = self._unrelayed(a, b)
        relay = self._relay_between(a, b)
        if relay is None:
            return link
        bytes_per_s = min(link.bytes_per_s, self._directory.relay_rate(relay))
        if self._measured_s(a, b, there, back) is not None:
            # What was measured through the circuit contains both its ways.
            return link._replace(bytes_per_s=bytes_per_s)
        legs = (self._unrelayed(a, relay), self._unrelayed(relay, b))
        return Link(
            sum(leg.round_trip_s for leg in legs),
            min(bytes_per_s, *(leg.bytes_per_s for leg in legs)),
            is_round_trip_known=all(leg.is_round_trip_known for leg in legs),
            is_rate_known=all(leg.is_rate_known for leg in legs),
        )

    def _unrelayed(self, a: PeerId, b: PeerId) -> Link:
        """Return the link as measured, else estimated, whatever relays the peers claim to have."""
        there, back = self._announced(a, b), self._announced(b, a)
        rates = (there and there.upload_bytes_per_s, back and back.download_bytes_per_s)
        known = [rate for rate in rates if rate]
        measured_s = self._measured_s(a, b, there, back)
        round_trip_s = self._estimated_s(a, b) if measured_s is None else measured_s
        return Link(
            round_trip_s + HANDLING_S,
            min(known, default=UNKNOWN_BYTES_PER_S),
            is_round_trip_known=measured_s is not None,
            is_rate_known=bool(known),
        )

    def _relay_between(self, a: PeerId, b: PeerId) -> PeerId | None:
        """Return the relay that two peers need, or have; the nearest to us of several."""
        if self._own_peer in {a, b}:
            return self._relay_to(b if a == self._own_peer else a)
        a_is, b_is = self._directory.location_of(a), self._directory.location_of(b)
        if not is_relayed(a_is, b_is):
            return None
        claimed = (tuple(filter(self._directory.is_relay, map(PeerId, each.relays))) for each in (b_is, a_is))
        relays = next(filter(None, claimed), ())
        return min(relays, key=lambda relay: self._round_trip_s(relay) or math.inf, default=None)

    def _measured_s(self, a: PeerId, b: PeerId, there: Neighbour | None, back: Neighbour | None) -> float | None:
        if self._own_peer in {a, b}:
            ours_s = self._round_trip_s(b if a == self._own_peer else a)
            if ours_s is not None:
                return ours_s
        for announced in (there, back):
            if announced is not None and announced.round_trip_s is not None:
                return announced.round_trip_s
        return None

    def _estimated_s(self, a: PeerId, b: PeerId) -> float:
        # Two peers far from here may be close to each other; without data the greater distance is the estimate.
        known = [s for peer in (a, b) if (s := self._round_trip_s(peer)) is not None]
        return max(known, default=UNKNOWN_ROUND_TRIP_S)

    def _announced(self, peer: PeerId, of: PeerId) -> Neighbour | None:
        links = self._links_of(peer)
        return next((n for n in links.neighbours if n.peer == of), None) if links is not None else None
