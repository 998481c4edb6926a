"""Dials that others' sessions cause: a peer that an Open names may claim to be anywhere, also in this node's LAN."""

import random
from typing import Final

import trio
from cachetools import LRUCache

from node.network.interface import Network
from node.swarm.dialling import Backoff
from node.util.token_bucket import Allowance, TokenBucket
from protocol.identity import PeerId

PER_OPENER: Final = Allowance(per_s=0.5, burst=32)
"""Dials for one coordinator. Its routes need one for each pair of stages that has no connection yet."""

IN_ALL: Final = Allowance(per_s=4.0, burst=128)

BACKOFF_S: Final = (0.5, 600.0)
"""Backoff of a peer that was not reached."""


class DialsForOthers:
    """Decides whether this node dials a peer for another's session."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._backoff = Backoff(random.Random())
        self._timeouts = Backoff(random.Random())
        """By opener and peer: an opener that can delay a dial keeps the peer from no other one's sessions."""
        self._in_all: TokenBucket | None = None
        self._by_opener: LRUCache[PeerId, TokenBucket] = LRUCache(1024)

    def permit(self, peer: PeerId, opener: PeerId) -> bool:
        """Return whether a peer may be reached for an opener's session: without a dial always, else within bounds."""
        own = self._network.peer_id
        if opener == own or peer in {own, opener} or peer in self._network.connected_peers():
            return True
        now_s = trio.current_time()
        if not (self._backoff.is_ready(peer, now_s) and self._timeouts.is_ready(f"{opener} {peer}", now_s)):
            return False
        bucket = self._by_opener.setdefault(opener, PER_OPENER.bucket(now_s))
        self._in_all = self._in_all or IN_ALL.bucket(now_s)
        return bucket.take(1, now_s) and self._in_all.take(1, now_s)

    def reached(self, peer: PeerId, opener: PeerId) -> None:
        """Record that a peer was reached for an opener's session."""
        self._backoff.succeeded(peer)
        self._timeouts.succeeded(f"{opener} {peer}")

    def failed(self, peer: PeerId) -> None:
        """Record that it was not: for a while it is not dialled again, longer each time.

        Not while no peer is connected: then it is this node that has no network.
        """
        if self._network.connected_peers():
            self._backoff.failed(peer, trio.current_time(), BACKOFF_S)

    def timed_out(self, peer: PeerId, opener: PeerId) -> None:
        """Record that a dial took too long: for a while the peer is not dialled again for this opener."""
        self._timeouts.failed(f"{opener} {peer}", trio.current_time(), BACKOFF_S)
