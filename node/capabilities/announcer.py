"""Tells the swarm what this node is capable of, and learns it of others.

The signed record stands in the DHT, where anybody finds it who knows a peer's id, and is gossiped, so that most never
have to look. Who joined later looks up those that it meets.
"""

import dataclasses
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

import structlog
import trio

from node.identity import Identity
from node.network.interface import Network, NetworkError
from node.swarm.dht_records import RecordKinds
from protocol.capabilities import (
    CAPABILITY_KIND,
    CAPABILITY_TOPIC,
    Capabilities,
    CapabilityRecord,
    Links,
    Memory,
    capability_key,
)
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.identity import PeerId
from protocol.records import seal, unseal, unseal_from_dht

RECORD_LIFETIME_S: Final = 1800
RECORD_REFRESH_S: Final = 600

RETRY_S: Final = 10.0
"""Pause after the network did not take our record."""

GRADUAL_INTERVAL_S: Final = 300.0
"""What changes all the time, as free memory and links do, is told at most so often."""

WITHDRAWAL_TIMEOUT_S: Final = 2.0

MAX_KNOWN: Final = 1024
"""Peers whose records are remembered; the one not heard of for longest makes room."""

LOOKUPS: Final = 8
"""Peers that are looked up at a time."""

LOOKUP_TIMEOUT_S: Final = 10.0
LOOKUP_AGAIN_S: Final = 60.0
"""A peer that had no record is looked up again after this."""

_logger = structlog.get_logger(__name__)


class CapabilityAnnouncer:
    """Keeps this node's record current, and remembers those of others."""

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
        """`capabilities`: ours, None while nothing is known yet. `peers`: those whose records are worth looking up."""
        self._network = network
        self._identity = identity
        self._capabilities = capabilities
        self._peers = peers
        self._jitter = jitter
        self._wall_clock = wall_clock
        self._sequence = 0
        self._told: Capabilities | None = None
        self._told_at_s = 0.0
        self._told_anybody = False
        self._refresh_at_s = 0.0
        self._not_before_s = 0.0
        self._withdrawn = False
        self._known: OrderedDict[PeerId, CapabilityRecord] = OrderedDict()
        self._looked_up_at_s: dict[PeerId, float] = {}
        records.register(CAPABILITY_KIND, self._validate_record)
        network.join_topic(CAPABILITY_TOPIC, self._validate_gossip)

    def known(self, peer: PeerId) -> Capabilities | None:
        """Return what a peer, ourselves included, last said of itself as far as we heard; None once it has expired."""
        record = self._known.get(peer)
        return record.capabilities if record is not None and record.expires_at_s > self._wall_clock() else None

    async def lookup(self, peer: PeerId) -> Capabilities | None:
        """Ask the DHT what a peer says of itself; None where it says nothing, or has withdrawn what it said.

        Raises NetworkError.
        """
        key = capability_key(peer)
        data = await self._network.get_record(key)
        if data is not None:
            try:
                self._hear(unseal_from_dht(CapabilityRecord, key, data, self._wall_clock()))
            except RemoteProtocolError as error:
                _logger.debug("capability record of no use", peer=peer, reason=str(error))
        return self.known(peer)

    async def run(self) -> None:
        """Announce, refresh and learn until cancelled; the network must be running."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            nursery.start_soon(self._keep_announced)
            nursery.start_soon(self._keep_learning)

    async def withdraw(self) -> None:
        """Take back what we said, before the network closes: nobody should count on this node any more.

        What is just being said is overtaken as well: the withdrawal has the higher sequence number.
        """
        self._withdrawn = True
        if self._sequence:
            with trio.move_on_after(WITHDRAWAL_TIMEOUT_S, shield=True):
                await self._say(None)

    # What others say

    def _validate_record(self, key: str, data: bytes) -> bool:
        unseal_from_dht(CapabilityRecord, key, data, self._wall_clock())
        return True

    def _validate_gossip(self, source: PeerId, data: bytes) -> bool:
        return unseal(CapabilityRecord, data, self._wall_clock()).peer == source

    async def _listen(self) -> None:
        async with self._network.subscribe(CAPABILITY_TOPIC) as messages:
            async for message in messages:
                try:
                    self._hear(unseal(CapabilityRecord, message.data, self._wall_clock()))
                except RemoteProtocolError:
                    continue  # it was valid when the validator saw it, and has expired since

    def _hear(self, record: CapabilityRecord) -> None:
        """Remember a verified record, unless a later one is known; a withdrawal too, or older ones would undo it."""
        known = self._known.get(record.peer)
        if known is None or record.sequence > known.sequence:
            self._known[record.peer] = record
        self._known.move_to_end(record.peer)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    async def _keep_learning(self) -> None:
        """Look up the peers that we have heard nothing of: they said it before we came."""
        while True:
            now_s = trio.current_time()
            peers = set(self._peers()) - {self._network.peer_id}
            # Who is gone is forgotten here, so that this grows no larger than what `peers` says.
            tried = {peer: at_s for peer, at_s in self._looked_up_at_s.items() if peer in peers}
            unknown = [peer for peer in peers if self.known(peer) is None]
            due = sorted(peer for peer in unknown if now_s - tried.get(peer, -LOOKUP_AGAIN_S) >= LOOKUP_AGAIN_S)
            self._looked_up_at_s = tried | dict.fromkeys(due[:LOOKUPS], now_s)
            async with trio.open_nursery() as nursery:
                for peer in due[:LOOKUPS]:
                    nursery.start_soon(self._learn, peer)
            if len(due) <= LOOKUPS:
                await trio.sleep(1)

    async def _learn(self, peer: PeerId) -> None:
        try:
            with trio.move_on_after(LOOKUP_TIMEOUT_S):
                await self.lookup(peer)
        except NetworkError as error:
            _logger.debug("capabilities not looked up", peer=peer, reason=str(error))

    # What we say

    async def _keep_announced(self) -> None:
        while True:
            capabilities = self._capabilities()
            if capabilities is not None and not self._withdrawn and self._is_due(capabilities):
                await self._say(capabilities)
            await trio.sleep(1)

    def _is_due(self, capabilities: Capabilities) -> bool:
        now_s = trio.current_time()
        if now_s < self._not_before_s:
            return False
        if self._told is None or now_s >= self._refresh_at_s or _differ(self._told, capabilities):
            return True
        # The first peers that we meet have not heard of us: a record put among nobody is with nobody.
        if not self._told_anybody and self._network.connected_peers():
            return True
        return now_s - self._told_at_s >= GRADUAL_INTERVAL_S and _drifted(self._told, capabilities)

    async def _say(self, capabilities: Capabilities | None) -> None:
        now_s = trio.current_time()
        told_anybody = bool(self._network.connected_peers())
        try:
            await self._put(capabilities)
        except (NetworkError, LocalProtocolError) as error:
            # Local: what the system says of this hardware has no place in a record. We serve all the same.
            pause_s = RETRY_S if isinstance(error, NetworkError) else RECORD_REFRESH_S
            self._not_before_s = now_s + pause_s * self._jitter.uniform(0.8, 1.2)
            _logger.info("capabilities not announced", reason=str(error))
        else:
            self._told, self._told_at_s, self._told_anybody = capabilities, now_s, told_anybody
            self._refresh_at_s = now_s + RECORD_REFRESH_S * self._jitter.uniform(0.8, 1.0)

    async def _put(self, capabilities: Capabilities | None) -> None:
        wall_s = self._wall_clock()
        # A restarted node continues above what it said before, without having to remember it.
        self._sequence = max(self._sequence + 1, int(wall_s * 1000))
        record = CapabilityRecord(
            peer=self._network.peer_id,
            sequence=self._sequence,
            issued_at_s=int(wall_s),
            expires_at_s=int(wall_s) + RECORD_LIFETIME_S,
            capabilities=capabilities,
        )
        envelope = seal(record, self._identity.private_key)
        self._hear(record)
        await self._network.put_record(capability_key(record.peer), envelope)
        await self._network.publish(CAPABILITY_TOPIC, envelope)


def _differ(told: Capabilities, now: Capabilities) -> bool:
    """Return whether anything but what changes all the time is different."""
    return told != dataclasses.replace(now, links=told.links, memory=_with_available(now, told.memory.available_bytes))


def _with_available(capabilities: Capabilities, available_bytes: int) -> Memory:
    return dataclasses.replace(capabilities.memory, available_bytes=available_bytes)


def _drifted(told: Capabilities, now: Capabilities) -> bool:
    """Return whether what changes all the time has changed enough to be worth telling."""
    freed = abs(told.memory.available_bytes - now.memory.available_bytes)
    return freed > now.memory.total_bytes // 4 or _links_drifted(told.links, now.links)


def _links_drifted(told: Links, now: Links) -> bool:
    before = {neighbour.peer: neighbour for neighbour in told.neighbours}
    return (
        before.keys() != {neighbour.peer for neighbour in now.neighbours}
        or _apart(told.upload_bytes_per_s, now.upload_bytes_per_s)
        or _apart(told.download_bytes_per_s, now.download_bytes_per_s)
        or any(_apart(before[neighbour.peer].round_trip_s, neighbour.round_trip_s) for neighbour in now.neighbours)
    )


def _apart(told: float | None, now: float | None) -> bool:
    if told is None or now is None:
        return told is not now
    return max(told, now) > 1.5 * min(told, now)
