"""Heartbeats: publishes our own by gossip, and enters those of other peers in the directory."""

import math
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import structlog
import trio

from node.identity import Identity
from node.network.interface import Network, NetworkError, PeerConnected
from node.swarm.clock_check import ClockCheck
from node.swarm.directory import LIFE_IN_INTERVALS, MAX_UNREACHED_PER_RELAY, AnnouncedPlacements, Directory
from node.swarm.presence import PresenceServer, query_presence
from node.swarm.publisher_limits import PublisherLimits
from node.swarm.sequence_numbers import SequenceNumbers
from node.util.signal import Signal
from node.util.token_bucket import Allowance, TokenBucket
from protocol.announcements import HEARTBEAT_TOPIC, Heartbeat, ServedSpan
from protocol.errors import LocalProtocolError, RemoteProtocolError, UntimelyError
from protocol.identity import PeerId
from protocol.limits import MAX_ADDRESSES, MAX_HEARTBEAT_INTERVAL_MS
from protocol.presence import PROTOCOL_ID
from protocol.records import issue_time, seal, verify_record

HEARTBEAT_INTERVAL_S = 2.5
"""Between a peer's heartbeats in a small swarm."""

HEARTBEATS_PER_S = 4
"""Of all peers together. Every peer verifies them all, at milliseconds each, so a large swarm has longer intervals."""

NEW_PEERS_PER_S = 2 * HEARTBEATS_PER_S
NEW_PEERS_BURST = 128
"""New unconnected peers accepted by gossip alone: an honest swarm has no more, and rejected ones are heard again."""

PER_PUBLISHER = Allowance(1.0, 10)
"""Of one peer, whose changes are announced at once."""

OF_UNREACHED = Allowance(25.0 * HEARTBEATS_PER_S, 100.0 * HEARTBEATS_PER_S)
"""Of all peers together that were not reached: a swarm that has just been started sends more than later."""

HEARTBEAT_LIFETIME_S = 60
"""Shortest validity of a heartbeat by the wall clocks of other peers, which may differ from ours."""

MAX_HEARTBEAT_LIFETIME_S = max(HEARTBEAT_LIFETIME_S, LIFE_IN_INTERVALS * MAX_HEARTBEAT_INTERVAL_MS // 1000)

NEIGHBOURS_QUERIED = 3
"""First neighbours that are sent a presence query; one alone may know as little as we do. A node that lost all its
connections is a newcomer again."""

NEIGHBOURS_TRIED = 16
"""Connections to which a query is sent until so many have answered: of those a few are none of the swarm's peers."""

INTERVAL_SLACK = 4
"""A peer may know more peers than we do, and so have longer intervals: by at most this factor."""

LEAST_LONGEST_INTERVAL_S = 10.0
"""Interval that every peer may announce, however small the swarm."""

TWIN_S = 600.0
"""For so long after the last heartbeat of another node with our key it counts as running."""

_logger = structlog.get_logger(__name__)


def heartbeat_interval_s(peers: int) -> float:
    """Return the heartbeat interval in a swarm of this size."""
    return min(MAX_HEARTBEAT_INTERVAL_MS / 1000, max(HEARTBEAT_INTERVAL_S, peers / HEARTBEATS_PER_S))


def no_placements() -> AnnouncedPlacements:
    """Return the announcement of a node that announces no placements."""
    return AnnouncedPlacements(0, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnServices:
    """What this node announces."""

    agent: str
    served_spans: Callable[[], tuple[ServedSpan, ...]]
    placements: Callable[[], AnnouncedPlacements] = no_placements


class Heartbeats:
    """The heartbeats that this node publishes and receives."""

    def __init__(
        self,
        network: Network,
        identity: Identity,
        directory: Directory,
        services: OwnServices,
        sequence: SequenceNumbers,
        jitter: random.Random,
        wall_clock: Callable[[], float],
    ) -> None:
        """Join the topic, and answer presence queries."""
        self._network = network
        self._identity = identity
        self._directory = directory
        self._services = services
        self._sequence = sequence
        self._jitter = jitter
        self._wall_clock = wall_clock
        self._started_s = wall_clock()
        self._sent = b""
        self._twin_heard_s = -math.inf
        self.clock = ClockCheck(network.connected_peers, wall_clock)
        self._new_peers = TokenBucket(NEW_PEERS_PER_S, NEW_PEERS_BURST, trio.current_time())
        self._limits = PublisherLimits(PER_PUBLISHER, OF_UNREACHED)
        self._changed = Signal()
        self._leaving = False
        network.join_topic(HEARTBEAT_TOPIC, self.validate)
        network.set_stream_handler(PROTOCOL_ID, PresenceServer(directory).handle)

    def announce(self) -> None:
        """Publish a heartbeat soon: what we serve has changed."""
        self._changed.set()

    def interval_ms(self) -> int:
        """Return our heartbeat interval."""
        return int(1000 * heartbeat_interval_s(len(self._directory.reached())))

    async def run(self) -> None:
        """Publish and expire until cancelled; the network must be running."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._heartbeat_loop)
            nursery.start_soon(self._expiry_loop)
            nursery.start_soon(self._query_first_neighbours)

    async def leave(self) -> None:
        """Announce the shutdown, so that others drop us at once instead of after missed heartbeats."""
        self._leaving = True
        with trio.CancelScope(deadline=trio.current_time() + 2, shield=True):
            await self._publish()
            # Gossip leaves at the network's own pace: the heartbeat must be out before the network closes.
            await trio.sleep(0.1)

    async def _heartbeat_loop(self) -> None:
        while True:
            await self._publish()
            with trio.move_on_after(self.interval_ms() / 1000 * self._jitter.uniform(0.8, 1.2)):
                await self._changed.wait()

    async def _publish(self) -> None:
        now_s = int(self._wall_clock())
        interval_ms = self.interval_ms()
        announced = no_placements() if self._leaving else self._services.placements()
        heartbeat = Heartbeat(
            peer=self._network.peer_id,
            sequence=next(self._sequence),
            issued_at_s=now_s,
            expires_at_s=now_s + max(HEARTBEAT_LIFETIME_S, LIFE_IN_INTERVALS * interval_ms // 1000),
            interval_ms=interval_ms,
            multiaddrs=self._network.multiaddrs[:MAX_ADDRESSES],
            agent=self._services.agent,
            spans=self._services.served_spans(),
            placements=announced.placements,
            placed_at_ms=announced.since_ms,
            leaving=self._leaving,
            reachability=self._network.reachability,
        )
        try:
            envelope = self._sent = seal(heartbeat, self._identity.private_key)
            self._directory.update(heartbeat, trio.current_time(), envelope)
            await self._network.publish(HEARTBEAT_TOPIC, envelope)
        except (NetworkError, LocalProtocolError) as error:
            _logger.debug("heartbeat not published", reason=str(error))

    async def _expiry_loop(self) -> None:
        while True:
            longest_s = max(LEAST_LONGEST_INTERVAL_S, INTERVAL_SLACK * self.interval_ms() / 1000)
            for peer in self._directory.expire(trio.current_time(), longest_s):
                _logger.info("peer expired: heartbeats overdue", peer=peer)
            self.clock.warn()
            await trio.sleep(1)

    # Heartbeats of others

    def validate(self, source: PeerId, data: bytes) -> bool:
        """Enter a gossiped heartbeat, and return whether to forward it: one that is newer, within the rate limits.

        Nothing reads the topic itself: that would verify every heartbeat twice.
        """
        if source == self._network.peer_id:
            if data != self._sent and self._limits.take(source, trio.current_time(), is_trusted=True):
                self._notice_twin(self._verify(data))
            return True
        is_connected = source in self._network.connected_peers()
        known = self._directory.get(source)
        is_reached = is_connected or (known is not None and known.dialled)
        if not self._limits.take(source, trio.current_time(), is_trusted=is_reached):
            return False
        try:
            heartbeat = self._verify(data)
        except UntimelyError:
            if is_connected:
                self.clock.on_heartbeat(source, issue_time(data, Heartbeat.kind))
            raise
        if heartbeat.peer != source:
            return False
        self.clock.on_heartbeat(source, heartbeat.issued_at_s)
        return self._enter(heartbeat, data)

    def _notice_twin(self, heartbeat: Heartbeat) -> None:
        """Notice a node that runs with our key, and go on above its number: peers take the highest one.

        Gossip seldom tells: no neighbour forwards a message to its origin, by whose id this one has it. The answers to
        presence queries do, where that node's heartbeat was the last one.
        """
        if heartbeat.peer != self._network.peer_id or heartbeat.sequence <= self._sequence.last:
            return  # one of ours that comes back late
        self._sequence.skip_to(heartbeat.sequence)
        if heartbeat.issued_at_s <= self._started_s:
            return  # of our earlier process, whose clock was ahead
        if self.twin() is None:
            _logger.error("heartbeat of another node with this node's key received", multiaddrs=heartbeat.multiaddrs)
        self._twin_heard_s = trio.current_time()

    def twin(self) -> str | None:
        """Return what to do about another node that runs with our key, if one was heard lately."""
        if trio.current_time() - self._twin_heard_s > TWIN_S:
            return None
        return "another node runs with this node's key, as of a copied data directory: stop it, or delete its peer.key"

    def _verify(self, envelope: bytes) -> Heartbeat:
        heartbeat = verify_record(Heartbeat, envelope, self._wall_clock())
        lifetime_s = heartbeat.expires_at_s - heartbeat.issued_at_s
        if lifetime_s > MAX_HEARTBEAT_LIFETIME_S:
            raise RemoteProtocolError(
                f"heartbeat valid for {lifetime_s} s: expected at most {MAX_HEARTBEAT_LIFETIME_S}"
            )
        return heartbeat

    def _enter(self, heartbeat: Heartbeat, envelope: bytes, relay: PeerId | None = None) -> bool:
        """Enter a heartbeat, unless a newer one is known or there is no room; return whether it was."""
        now_s, peer = trio.current_time(), heartbeat.peer
        if peer == self._network.peer_id:
            self._notice_twin(heartbeat)
            return False
        is_new = peer not in self._network.connected_peers() and not self._directory.knows(peer)
        if relay is None and is_new and not self._new_peers.take(1, now_s):
            return False
        if not self._directory.update(heartbeat, now_s, envelope, relay=relay):
            return False
        self._network.add_addresses(peer, heartbeat.multiaddrs)
        return True

    def _on_relayed_heartbeat(self, relay: PeerId, envelope: bytes) -> bool:
        """Enter a heartbeat from a presence answer; return whether to read on. Raises RemoteProtocolError."""
        with suppress(UntimelyError):  # valid by the clock of the relay
            self._enter(self._verify(envelope), envelope, relay)
        return self._directory.relayed_by(relay) < MAX_UNREACHED_PER_RELAY

    async def _query_first_neighbours(self) -> None:
        """Send presence queries to the first few neighbours that answer: a dial-back is a connection, too."""
        queried = tried = 0
        connected: set[PeerId] = set()
        async with self._network.events() as events:
            async for event in events:
                if isinstance(event, PeerConnected):
                    connected.add(event.peer)
                else:
                    connected.discard(event.peer)
                    if not connected:
                        queried = tried = 0
                is_due = queried < NEIGHBOURS_QUERIED and tried < NEIGHBOURS_TRIED
                if is_due and isinstance(event, PeerConnected):
                    tried += 1
                    read = partial(self._on_relayed_heartbeat, event.peer)
                    try:
                        # Without any heartbeat it is no answer: nodes of before refuse a query so.
                        queried += await query_presence(self._network, event.peer, read) > 0
                    except (NetworkError, RemoteProtocolError) as error:
                        _logger.debug("presence query failed", peer=event.peer, reason=str(error))
                    if (relayed := self._directory.relayed_by(event.peer)) >= MAX_UNREACHED_PER_RELAY:
                        _logger.warning(
                            "presence answer cut off: too many unreached peers", peer=event.peer, count=relayed
                        )
