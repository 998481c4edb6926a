"""Dials known peers: to keep enough connections, and to learn which announced peers are real.

Identities and claimed addresses cost nothing. So dials are limited per second and per address range, with backoff by
peer and by range.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import structlog
import trio
from cachetools import LRUCache

from node.network.interface import Network, NetworkError
from node.network.relay_client import RELAYS
from node.swarm.directory import Directory, PeerEntry
from node.util.backoff import backoff_s
from protocol.announcements import Verdict
from protocol.identity import ModelId, PeerId

TARGET_CONNECTIONS = 12
"""Connections that this node keeps by itself; enough for gossip and the DHT to hold together."""

KEPT_CONNECTIONS = 64
"""With more connections, one that was dialled only to see whether the peer is real is closed again."""

ROUND_S = 1.0
DIALS_PER_ROUND = 6
DIALS_PER_PLACE = 2
"""Dials of one round to peers in one public address range or at one private address."""

DIALS_AT_ONCE = 12
DIAL_TIMEOUT_S = 10.0
RELAY_SEARCH_S = 10.0
"""Time between two dials of a private node that has fewer relays than it wants."""

MAX_RELAY_SEARCH_S = 3600.0
"""The search is half as frequent for each connection to a dialled relay that gave no reservation without limits (yet):
these are kept. This is its longest interval."""

DIALS_PER_JOB = 16
"""Unreached peers that are dialled at once for a job without a route."""

PEER_BACKOFF_S = (2.0, 600.0)
RANGE_BACKOFF_S = (0.5, 60.0)
"""Backoff of a public address range."""

HOST_BACKOFF_S = (0.5, 4.0)
"""Backoff of a private address or a name: a whole swarm may live there."""

MAX_FAILURES = 4096

_logger = structlog.get_logger(__name__)


class _Failures(NamedTuple):
    in_a_row: int
    retry_at_s: float


class Backoff:
    """Exponential backoff by key. Bounded: the least recently used key is evicted."""

    def __init__(self, jitter: random.Random) -> None:
        self._jitter = jitter
        self._failures: LRUCache[str, _Failures] = LRUCache(MAX_FAILURES)

    def is_ready(self, key: str, now_s: float) -> bool:
        """Return whether a key may be tried now."""
        failures = self._failures.get(key)
        return failures is None or now_s >= failures.retry_at_s

    def failed(self, key: str, now_s: float, bounds_s: tuple[float, float]) -> None:
        """Back off for a time between the bounds, longer after each failure in a row."""
        count = self._failures[key].in_a_row + 1 if key in self._failures else 1
        self._failures[key] = _Failures(count, now_s + backoff_s(count, bounds_s, self._jitter))

    def succeeded(self, key: str) -> None:
        """Reset a key."""
        self._failures.pop(key, None)


@dataclass(slots=True, eq=False)
class _Dial:
    """A dial under way. `answered`: None until it has ended, and where the task that dialled was cancelled."""

    keep: bool
    answered: bool | None = None
    ended: trio.Event = field(default_factory=trio.Event)


class Dialler:
    """Dials for one node, within bounds."""

    def __init__(self, network: Network, directory: Directory, jitter: random.Random) -> None:
        self._network = network
        self._directory = directory
        self._jitter = jitter
        self._backoff = Backoff(jitter)
        self._dialling: dict[PeerId, _Dial] = {}
        self._next_search_s = -math.inf
        self._kept: set[PeerId] = set()
        """Peers that were dialled for a reservation."""

    async def run(self) -> None:
        """Keep connections to some peers and dial the unreached ones, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                for entry in self._due():
                    nursery.start_soon(self.reach, entry)
                for entry in self._relays_due(trio.current_time()):
                    nursery.start_soon(partial(self.reach, entry, keep=True))
                await trio.sleep(ROUND_S)

    def _due(self) -> list[PeerEntry]:
        """Return the peers to dial in this round: unreached ones, and a reached one if connections are few."""
        connected = set(self._network.connected_peers())
        unreached = self._directory.unreached()
        wanted: list[PeerEntry] = []
        if len(connected) < TARGET_CONNECTIONS:
            own = self._network.peer_id
            wanted = [each for each in self._directory.reached() if each.peer not in connected and each.peer != own]
            self._jitter.shuffle(wanted)
            wanted = wanted[:1]
        return [*self._ready(wanted, 1), *self._ready(unreached, DIALS_PER_ROUND)]

    def _relays_due(self, now_s: float) -> list[PeerEntry]:
        """Return a relay to dial where this node is private and lacks one: reservations take a connection of ours.

        If possible in another range than the relays that it has.
        """
        known = self._network.reachability
        if known.verdict is not Verdict.PRIVATE or len(known.relays) >= RELAYS or now_s < self._next_search_s:
            return []
        connected = set(self._network.connected_peers())
        self._kept &= connected
        relays = [each for each in self._directory.entries() if self._directory.is_relay(each.peer)]
        held = set[str]().union(*(each.ranges for each in relays if each.peer in known.relays))
        free = [each for each in relays if each.peer not in connected and each.peer != self._network.peer_id]
        chosen = self._ready([each for each in free if held.isdisjoint(each.ranges)], 1) or self._ready(free, 1)
        if chosen:
            of_no_use = len(self._kept.difference(known.relays))
            self._next_search_s = now_s + min(RELAY_SEARCH_S * 2.0**of_no_use, MAX_RELAY_SEARCH_S)
        return chosen

    def _ready(self, entries: Sequence[PeerEntry], limit: int) -> list[PeerEntry]:
        """Return some of the peers that may be dialled now, from as many places as possible."""
        now_s = trio.current_time()
        limit = min(limit, DIALS_AT_ONCE - len(self._dialling))
        places: dict[str, list[PeerEntry]] = {}
        for entry in entries:
            if entry.multiaddrs and entry.peer not in self._dialling and self._may_dial(entry, now_s):
                places.setdefault(entry.place, []).append(entry)
        chosen: list[PeerEntry] = []
        turns = list(places.values())
        self._jitter.shuffle(turns)
        for _ in range(DIALS_PER_PLACE):
            for turn in turns:
                if turn and len(chosen) < limit:
                    chosen.append(turn.pop(self._jitter.randrange(len(turn))))
        return chosen

    def _may_dial(self, entry: PeerEntry, now_s: float) -> bool:
        return self._backoff.is_ready(entry.peer, now_s) and self._backoff.is_ready(entry.place, now_s)

    async def reach(self, entry: PeerEntry, *, keep: bool = False) -> bool:
        """Dial a peer; record and return whether it answered. `keep` the connection, however many there are.

        While it is being dialled already, that dial is waited for.
        """
        while (dial := self._dialling.get(entry.peer)) is not None:
            dial.keep |= keep
            await dial.ended.wait()
            if dial.answered is not None:
                return dial.answered
        was_connected = entry.peer in self._network.connected_peers()
        dial = self._dialling[entry.peer] = _Dial(keep)
        try:
            answered = dial.answered = await self._dial(entry)
        finally:
            del self._dialling[entry.peer]
            dial.ended.set()
        # From here on no caller waits for this dial, or has its connection kept.
        if answered and not was_connected:
            if dial.keep:
                self._kept.add(entry.peer)
            elif len(self._network.connected_peers()) > KEPT_CONNECTIONS:
                await self._network.disconnect(entry.peer)
        return answered

    async def _dial(self, entry: PeerEntry) -> bool:
        peer, place = entry.peer, entry.place
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                await self._network.ping(peer)
        except (NetworkError, trio.TooSlowError) as error:
            now_s = trio.current_time()
            self._backoff.failed(peer, now_s, PEER_BACKOFF_S)
            self._backoff.failed(place, now_s, RANGE_BACKOFF_S if entry.ranges else HOST_BACKOFF_S)
            self._directory.on_dialled(peer, False)
            _logger.debug("peer not reached", peer=peer, addresses=entry.multiaddrs[:4], reason=str(error))
            return False
        self._backoff.succeeded(peer)
        self._backoff.succeeded(place)
        self._directory.on_dialled(peer, True)
        return True

    async def reach_servers(self, model: ModelId, is_enough: Callable[[], bool]) -> None:
        """Dial unreached peers that announce spans of a model, until the reached ones are enough."""
        now_s = trio.current_time()
        serving = [each for each in self._directory.unreached() if any(span.model == model for span in each.spans)]
        ready = [each for each in serving if self._backoff.is_ready(each.peer, now_s)]
        self._jitter.shuffle(ready)
        async with trio.open_nursery() as nursery:

            async def reach(entry: PeerEntry) -> None:
                if await self.reach(entry) and is_enough():
                    nursery.cancel_scope.cancel()

            for entry in ready[:DIALS_PER_JOB]:
                nursery.start_soon(reach, entry)
