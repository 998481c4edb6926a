"""Announces this node's capabilities to the swarm, and collects those of other peers.

The signed record is stored in the DHT under the peer's id, and gossiped, so that most peers never have to look it up.
A newcomer looks up the peers that it meets.
"""

import dataclasses
import random
import time
from collections.abc import Callable, Iterable
from typing import Final

import structlog
import trio
from cachetools import LRUCache

from node.identity import Identity
from node.network.interface import Network, NetworkError
from node.swarm.dht_records import RecordKinds
from node.swarm.publisher_limits import PublisherLimits
from node.swarm.sequence_numbers import SequenceNumbers
from node.util.elapsed import Elapsed
from node.util.token_bucket import Allowance
from protocol.capabilities import CAPABILITY_KIND, CAPABILITY_TOPIC, Capabilities, CapabilityRecord, capability_key
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.identity import PeerId
from protocol.records import seal, verify_dht_record, verify_record

RECORD_LIFETIME_S: Final = 1800
RECORD_REFRESH_S: Final = 600

RETRY_S: Final = 10.0
"""Pause after a put of our record failed."""

GRADUAL_INTERVAL_S: Final = 300.0
"""Shortest interval between announcements of values that always change: free memory and links."""

WITHDRAWAL_TIMEOUT_S: Final = 2.0

PER_PUBLISHER: Final = Allowance(0.2, 20)
"""Gossiped records of one peer."""

OF_ALL: Final = Allowance(50, 500)
"""Gossiped records of all together; what is lost is looked up."""

MAX_KNOWN: Final = 1024
"""Peers whose records are cached; the least recently used one is evicted."""

LOOKUPS: Final = 8
"""Concurrent lookups."""

LOOKUP_TIMEOUT_S: Final = 10.0
LOOKUP_AGAIN_S: Final = 60.0
"""Pause before a peer without a record is looked up again."""

_logger = structlog.get_logger(__name__)


class CapabilityAnnouncer:
    """Keeps this node's record current, and caches those of other peers."""

    def __init__(
        self,
        *,
        network: Network,
        identity: Identity,
        records: RecordKinds,
        capabilities: Callable[[], Capabilities | None],
        peers: Callable[[], Iterable[PeerId]],
        jitter: random.Random,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`capabilities`: ours, None until they are probed. `peers`: the peers to look up."""
        self._network = network
        self._identity = identity
        self._capabilities = capabilities
        self._peers = peers
        self._jitter = jitter
        self._wall_clock = wall_clock
        self._numbers = SequenceNumbers(wall_clock)
        self._announced: Capabilities | None = None
        self._since_announced = Elapsed(wall_clock)
        self._had_neighbours = False
        self._refresh_s = 0.0
        self._not_before_s = 0.0
        self._withdrawn = False
        self._known: LRUCache[PeerId, CapabilityRecord] = LRUCache(MAX_KNOWN)
        self._looked_up_at_s: dict[PeerId, float] = {}
        self._limits = PublisherLimits(PER_PUBLISHER, OF_ALL)
        records.register(CAPABILITY_KIND, self._validate_record)
        network.join_topic(CAPABILITY_TOPIC, self._validate_gossip)

    def known(self, peer: PeerId) -> Capabilities | None:
        """Return the last known capabilities of a peer, or of ourselves; None once the record expired."""
        record = self._known.get(peer)
        return record.capabilities if record is not None and record.expires_at_s > self._wall_clock() else None

    async def lookup(self, peer: PeerId) -> Capabilities | None:
        """Look up the capabilities of a peer in the DHT; None without a record, or with a withdrawn one.

        Raises NetworkError.
        """
        key = capability_key(peer)
        data = await self._network.get_record(key)
        if data is not None:
            try:
                self._store(verify_dht_record(CapabilityRecord, key, data, self._wall_clock()))
            except RemoteProtocolError as error:
                _logger.debug("invalid capability record", peer=peer, reason=str(error))
        return self.known(peer)

    async def run(self) -> None:
        """Announce, refresh and collect until cancelled; the network must be running."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive_loop)
            nursery.start_soon(self._announce_loop)
            nursery.start_soon(self._lookup_loop)

    async def withdraw(self) -> None:
        """Withdraw our record before the network closes.

        Overtakes an announcement that is still under way by its higher sequence number.
        """
        self._withdrawn = True
        if self._numbers.last:
            with trio.move_on_after(WITHDRAWAL_TIMEOUT_S, shield=True):
                await self._announce(None)

    # Records of other peers

    def _validate_record(self, key: str, data: bytes) -> bool:
        verify_dht_record(CapabilityRecord, key, data, self._wall_clock())
        return True

    def _validate_gossip(self, source: PeerId, data: bytes) -> bool:
        """Return whether a record is delivered and forwarded: within the rate limits, valid, newer than the last."""
        if source == self._network.peer_id:
            return True
        if not self._limits.take(source, trio.current_time()):
            return False
        record = verify_record(CapabilityRecord, data, self._wall_clock())
        return record.peer == source and self._is_news(record)

    async def _receive_loop(self) -> None:
        async with self._network.subscribe(CAPABILITY_TOPIC) as messages:
            async for message in messages:
                try:
                    self._store(verify_record(CapabilityRecord, message.data, self._wall_clock()))
                except RemoteProtocolError:
                    continue  # expired since it was validated

    def _store(self, record: CapabilityRecord) -> None:
        """Cache a verified record unless a newer one is known; a withdrawal, too, which older records must not undo."""
        if self._is_news(record):
            self._known[record.peer] = record

    def _is_news(self, record: CapabilityRecord) -> bool:
        """Return whether a record is newer than the known one.

        What was issued after that expired is newer, whatever its number: the clock of its peer may have been set.
        """
        known = self._known.get(record.peer)
        return known is None or record.sequence > known.sequence or record.issued_at_s >= known.expires_at_s

    async def _lookup_loop(self) -> None:
        """Look up the peers whose records are unknown: they were gossiped before we joined."""
        while True:
            now_s = trio.current_time()
            peers = set(self._peers()) - {self._network.peer_id}
            # Bounded by the number of `peers`: the others are dropped.
            tried = {peer: at_s for peer, at_s in self._looked_up_at_s.items() if peer in peers}
            unknown = [peer for peer in peers if self.known(peer) is None]
            due = sorted(peer for peer in unknown if now_s - tried.get(peer, -LOOKUP_AGAIN_S) >= LOOKUP_AGAIN_S)
            self._looked_up_at_s = tried | dict.fromkeys(due[:LOOKUPS], now_s)
            async with trio.open_nursery() as nursery:
                for peer in due[:LOOKUPS]:
                    nursery.start_soon(self._look_up, peer)
            if len(due) <= LOOKUPS:
                await trio.sleep(1)

    async def _look_up(self, peer: PeerId) -> None:
        try:
            with trio.move_on_after(LOOKUP_TIMEOUT_S):
                await self.lookup(peer)
        except NetworkError as error:
            _logger.debug("capability lookup failed", peer=peer, reason=str(error))

    # Our record

    async def _announce_loop(self) -> None:
        while True:
            capabilities = self._capabilities()
            if capabilities is not None and not self._withdrawn and self._is_due(capabilities):
                await self._announce(capabilities)
            await trio.sleep(1)

    def _is_due(self, capabilities: Capabilities) -> bool:
        # A record that was put without any neighbour is stored nowhere else: put it again with the first ones. Those
        # that it was put to may be gone for long when others come: a machine that wakes up notices that they are late.
        if not (has_neighbours := bool(self._network.connected_peers())):
            self._had_neighbours = False
        if trio.current_time() < self._not_before_s:
            return False
        age_s = self._since_announced.seconds()
        if self._announced is None or age_s >= self._refresh_s or _differ(self._announced, capabilities):
            return True
        if has_neighbours and not self._had_neighbours:
            return True
        return age_s >= GRADUAL_INTERVAL_S and _drifted(self._announced, capabilities)

    async def _announce(self, capabilities: Capabilities | None) -> None:
        now_s = trio.current_time()
        had_neighbours = bool(self._network.connected_peers())
        wall_s = self._wall_clock()
        record = CapabilityRecord(
            peer=self._network.peer_id,
            sequence=next(self._numbers),
            issued_at_s=int(wall_s),
            expires_at_s=int(wall_s) + RECORD_LIFETIME_S,
            capabilities=capabilities,
        )
        try:
            envelope = seal(record, self._identity.private_key)
            self._store(record)
            await self._network.put_record(capability_key(record.peer), envelope)
            await self._network.publish(CAPABILITY_TOPIC, envelope)
        except (NetworkError, LocalProtocolError) as error:
            # LocalProtocolError: the probed values are invalid in a record. The node serves all the same.
            pause_s = RETRY_S if isinstance(error, NetworkError) else RECORD_REFRESH_S
            self._not_before_s = now_s + pause_s * self._jitter.uniform(0.8, 1.2)
            _logger.info("capabilities not announced", reason=str(error))
        else:
            self._announced, self._had_neighbours = capabilities, had_neighbours
            self._since_announced.restart()
            self._refresh_s = RECORD_REFRESH_S * self._jitter.uniform(0.8, 1.0)


def _differ(before: Capabilities, now: Capabilities) -> bool:
    """Return whether anything differs but free memory and links."""
    memory = dataclasses.replace(now.memory, available_bytes=before.memory.available_bytes)
    return before != dataclasses.replace(now, links=before.links, memory=memory)


def _drifted(before: Capabilities, now: Capabilities) -> bool:
    """Return whether free memory or links changed enough for an announcement."""
    freed = abs(before.memory.available_bytes - now.memory.available_bytes)
    known = {neighbour.peer: neighbour for neighbour in before.links.neighbours}
    neighbours = now.links.neighbours
    return (
        freed > now.memory.total_bytes // 4
        or known.keys() != {neighbour.peer for neighbour in neighbours}
        or _apart(before.links.upload_bytes_per_s, now.links.upload_bytes_per_s)
        or _apart(before.links.download_bytes_per_s, now.links.download_bytes_per_s)
        or any(_apart(known[neighbour.peer].round_trip_s, neighbour.round_trip_s) for neighbour in neighbours)
    )


def _apart(before: float | None, now: float | None) -> bool:
    if before is None or now is None:
        return before is not now
    return max(before, now) > 1.5 * min(before, now)
