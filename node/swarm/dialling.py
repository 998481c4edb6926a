"""Dials peers that were heard of: to keep enough connections, and to learn which of them exist at all.

Identities and claims of addresses cost nothing. So dials are few a second, few per address range at once, and whoever
did not answer is tried again later and later, as is its range.
"""

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import trio

from node.network.interface import Network, NetworkError
from node.swarm.directory import Directory, Presence
from protocol.identity import ModelId, PeerId

TARGET_CONNECTIONS = 12
"""Peers that this node keeps connections to by itself; enough for gossip and the DHT to hold together."""

KEPT_CONNECTIONS = 64
"""With so many connections a peer that was dialled only to see whether it exists is let go again."""

ROUND_S = 1.0
DIALS_PER_ROUND = 6
DIALS_PER_PLACE = 2
"""In one round, to peers in one public address range or at one private address."""

DIALS_AT_ONCE = 12
DIAL_TIMEOUT_S = 10.0
DIALS_PER_JOB = 16
"""Peers not reached yet that a job without a route may have dialled at once."""

PEER_BACKOFF_S = (2.0, 600.0)
"""Before a peer that did not answer is dialled again, doubled by each failure in a row, and the longest."""

RANGE_BACKOFF_S = (0.5, 60.0)
"""The same for a public address range in which nobody answered."""

HOST_BACKOFF_S = (0.5, 4.0)
"""The same for a private address or a name: a whole swarm may live there."""

MAX_REMEMBERED = 4096

_logger = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Failures:
    count: int
    retry_at_s: float


class Backoff:
    """Who is left alone until when. Bounded: the one that failed longest ago is forgotten first."""

    def __init__(self, jitter: random.Random) -> None:
        self._jitter = jitter
        self._failures: OrderedDict[str, _Failures] = OrderedDict()

    def is_ready(self, key: str, now_s: float) -> bool:
        """Return whether a key may be tried now."""
        failures = self._failures.get(key)
        return failures is None or now_s >= failures.retry_at_s

    def failed(self, key: str, now_s: float, bounds_s: tuple[float, float]) -> None:
        """Leave a key alone for the first of the bounds, doubled by each failure in a row up to the second."""
        count = self._failures[key].count + 1 if key in self._failures else 1
        pause_s = min(bounds_s[1], bounds_s[0] * 2.0 ** min(count - 1, 32))
        self._failures[key] = _Failures(count, now_s + pause_s * self._jitter.uniform(0.8, 1.2))
        self._failures.move_to_end(key)
        if len(self._failures) > MAX_REMEMBERED:
            self._failures.popitem(last=False)

    def succeeded(self, key: str) -> None:
        """Forget the failures of a key."""
        self._failures.pop(key, None)


class Dialler:
    """Dials for one node, within bounds."""

    def __init__(self, network: Network, directory: Directory, jitter: random.Random) -> None:
        self._network = network
        self._directory = directory
        self._jitter = jitter
        self._backoff = Backoff(jitter)
        self._dialling: set[PeerId] = set()

    async def run(self) -> None:
        """Keep connections to some peers and dial those that are not reached yet, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                for presence in self._due():
                    nursery.start_soon(self.reach, presence)
                await trio.sleep(ROUND_S)

    def _due(self) -> list[Presence]:
        """Return whom to dial in this round: one more to keep a connection to, if those are few, and the unreached."""
        connected = set(self._network.connected_peers())
        unreached = self._directory.unreached()
        wanted: list[Presence] = []
        if len(connected) < TARGET_CONNECTIONS:
            own = self._network.peer_id
            wanted = [each for each in self._directory.reached() if each.peer not in connected and each.peer != own]
            self._jitter.shuffle(wanted)
            wanted = wanted[:1]
        return [*self._ready(wanted, 1), *self._ready(unreached, DIALS_PER_ROUND)]

    def _ready(self, presences: Sequence[Presence], limit: int) -> list[Presence]:
        """Return some of the peers that may be dialled now, from as many places as possible."""
        now_s = trio.current_time()
        limit = min(limit, DIALS_AT_ONCE - len(self._dialling))
        places: dict[str, list[Presence]] = {}
        for presence in presences:
            if presence.multiaddrs and presence.peer not in self._dialling and self._may_dial(presence, now_s):
                places.setdefault(presence.place, []).append(presence)
        chosen: list[Presence] = []
        turns = list(places.values())
        self._jitter.shuffle(turns)
        for _ in range(DIALS_PER_PLACE):
            for turn in turns:
                if turn and len(chosen) < limit:
                    chosen.append(turn.pop(self._jitter.randrange(len(turn))))
        return chosen

    def _may_dial(self, presence: Presence, now_s: float) -> bool:
        return self._backoff.is_ready(presence.peer, now_s) and self._backoff.is_ready(presence.place, now_s)

    async def reach(self, presence: Presence) -> bool:
        """Dial a peer and note whether it is there."""
        peer, place = presence.peer, presence.place
        if peer in self._dialling:
            return False
        was_connected = peer in self._network.connected_peers()
        self._dialling.add(peer)
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                await self._network.ping(peer)
        except (NetworkError, trio.TooSlowError) as error:
            now_s = trio.current_time()
            self._backoff.failed(peer, now_s, PEER_BACKOFF_S)
            self._backoff.failed(place, now_s, RANGE_BACKOFF_S if presence.ranges else HOST_BACKOFF_S)
            self._directory.was_dialled(peer, False)
            _logger.debug("peer not reached", peer=peer, addresses=presence.multiaddrs[:4], reason=str(error))
            return False
        finally:
            self._dialling.discard(peer)
        self._backoff.succeeded(peer)
        self._backoff.succeeded(place)
        self._directory.was_dialled(peer, True)
        if not was_connected and len(self._network.connected_peers()) > KEPT_CONNECTIONS:
            await self._network.disconnect(peer)
        return True

    async def reach_servers(self, model: ModelId, is_enough: Callable[[], bool]) -> None:
        """Dial peers that say they serve a model and are not reached yet, until those that are suffice."""
        now_s = trio.current_time()
        said = [each for each in self._directory.unreached() if any(span.model == model for span in each.spans)]
        ready = [each for each in said if self._backoff.is_ready(each.peer, now_s)]
        self._jitter.shuffle(ready)
        async with trio.open_nursery() as nursery:

            async def reach(presence: Presence) -> None:
                if await self.reach(presence) and is_enough():
                    nursery.cancel_scope.cancel()

            for presence in ready[:DIALS_PER_JOB]:
                nursery.start_soon(reach, presence)
