"""Membership: joins the swarm, says what this node serves, and hears what others do.

Three ways lead to a peer's spans, each for what it is good at. Heartbeats by gossip tell everybody every few seconds
who is alive and what it serves. Records in the DHT let a newcomer find the peers of a model before any heartbeat has
reached it. And a dial that fails takes a peer out at once.

What a peer says it serves counts once the peer was reached: see `node.swarm.directory`.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import structlog
import trio

from node.identity import Identity
from node.network.interface import Network, NetworkError, PeerConnected
from node.swarm.dht_records import RecordKinds
from node.swarm.dialling import Dialler
from node.swarm.directory import LIFE_IN_INTERVALS, MAX_UNREACHED_PER_TELLER, Candidate, Directory, Statement
from node.swarm.presence import PresenceServer, ask_who_is_here
from node.util.token_bucket import TokenBucket
from protocol.announcements import (
    HEARTBEAT_TOPIC,
    Heartbeat,
    ServedSpan,
    SpanRecord,
    blob_provider_key,
    provider_key,
    span_key,
)
from protocol.errors import LocalProtocolError, RemoteProtocolError, UntimelyError
from protocol.identity import BlockRange, ModelId, PeerId
from protocol.limits import MAX_ADDRESSES, MAX_HEARTBEAT_INTERVAL_MS
from protocol.messages import Load
from protocol.presence import PROTOCOL_ID
from protocol.records import seal, unseal, unseal_from_dht
from selector.routing import uncovered

HEARTBEAT_INTERVAL_S = 2.5
"""Between a peer's heartbeats in a small swarm."""

HEARTBEATS_PER_S = 4
"""Of all peers together. Everybody hears them all, at milliseconds of CPU each: in a large swarm each says less."""

HEARSAY_PER_S = 2 * HEARTBEATS_PER_S
HEARSAY_AT_ONCE = 128
"""Peers that are taken in by gossip alone: an honest swarm brings no more, and who is left out is heard again."""

HEARTBEAT_LIFETIME_S = 60
"""How long a heartbeat is valid at least by the wall clocks of others, which may differ from ours."""

NEIGHBOURS_ASKED = 3
"""Of its first neighbours a node asks so many who is here; one may know as little as we do."""

MAX_HEARTBEAT_LIFETIME_S = max(HEARTBEAT_LIFETIME_S, LIFE_IN_INTERVALS * MAX_HEARTBEAT_INTERVAL_MS // 1000)
"""The longest that a heartbeat may say it is valid."""

RECORD_LIFETIME_S = 1800
RECORD_REFRESH_S = 600

INTERVAL_SLACK = 4
"""A peer may know of more peers than we do, and so speak less often than we would: by this factor and no more."""

LEAST_LONGEST_INTERVAL_S = 10.0
"""However small the swarm, a peer may say that it speaks so rarely."""

PING_ROUND_S = 10.0
"""How often the round-trip times to the connected peers are measured."""

BOOTSTRAP_BACKOFF_S = (0.5, 30.0)
"""First and longest pause before a bootstrap address is dialled again."""

SEEK_TIMEOUT_S = 5.0
"""How long a job waits for the DHT when the heartbeats heard so far do not cover its model."""

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How the dialling of one bootstrap address goes; for `status` and the log."""

    multiaddr: str
    peer: PeerId | None
    error: str | None


def heartbeat_interval_s(peers: int) -> float:
    """Return the pause between the heartbeats of each of so many peers."""
    return min(MAX_HEARTBEAT_INTERVAL_MS / 1000, max(HEARTBEAT_INTERVAL_S, peers / HEARTBEATS_PER_S))


class Membership:
    """This node's place in the swarm."""

    def __init__(
        self,
        *,
        network: Network,
        identity: Identity,
        agent: str,
        bootstrap: Sequence[str],
        served_spans: Callable[[], tuple[ServedSpan, ...]],
        records: RecordKinds,
        jitter: random.Random,
        wall_clock: Callable[[], float] = time.time,
        on_round_trip: Callable[[PeerId, float], None] | None = None,
        stated: Callable[[], Statement] = lambda: Statement(0, ()),
    ) -> None:
        """Take no part yet.

        `on_round_trip` is told of every round trip that is measured, in seconds. `stated` says what this node means to
        serve.
        """
        self.directory = Directory(own_peer=network.peer_id, connected=network.connected_peers)
        self._dialler = Dialler(network, self.directory, jitter)
        self._hearsay = TokenBucket(HEARSAY_PER_S, HEARSAY_AT_ONCE, trio.current_time())
        self._network = network
        self._identity = identity
        self._agent = agent
        self._bootstrap = {multiaddr: Bootstrap(multiaddr, None, "not dialled yet") for multiaddr in bootstrap}
        self._served_spans = served_spans
        self._jitter = jitter
        self._wall_clock = wall_clock
        # A restarted node continues above what it said before, without having to remember it.
        self._sequence = int(wall_clock() * 1000)
        self._round_trips_s: dict[PeerId, float] = {}
        self._changed = trio.Event()
        self._on_round_trip = on_round_trip
        self._stated = stated
        self._leaving = False
        network.join_topic(HEARTBEAT_TOPIC, self._validate_heartbeat)
        network.set_stream_handler(PROTOCOL_ID, PresenceServer(self.directory).handle)
        records.register(SpanRecord.kind, self._validate_record)

    def bootstrap(self) -> tuple[Bootstrap, ...]:
        """Return how each bootstrap address fares."""
        return tuple(self._bootstrap.values())

    def served_models(self) -> tuple[ModelId, ...]:
        """Return the models that reached peers serve, wholly or in part."""
        return tuple(self.directory.models())

    def round_trip_s(self, peer: PeerId) -> float | None:
        """Return the round-trip time to a peer as last measured, in seconds."""
        return self._round_trips_s.get(peer)

    def announce(self) -> None:
        """Tell the swarm soon that what we serve has changed."""
        self._changed.set()

    async def run(self) -> None:
        """Take part until cancelled; the network must be running."""
        async with trio.open_nursery() as nursery:
            for multiaddr in self._bootstrap:
                nursery.start_soon(self._keep_dialling, multiaddr)
            nursery.start_soon(self._ask_first_neighbours)
            nursery.start_soon(self._beat)
            nursery.start_soon(self._keep_records)
            nursery.start_soon(self._forget_the_silent)
            nursery.start_soon(self._dialler.run)
            nursery.start_soon(self._measure_round_trips)

    async def leave(self) -> None:
        """Say goodbye: others forget us at once instead of when they have not heard us for long."""
        self._leaving = True
        with trio.CancelScope(deadline=trio.current_time() + 2, shield=True):
            await self._publish_heartbeat()
            # Gossip leaves with the network's own pace; the goodbye must be out before the network closes.
            await trio.sleep(0.1)

    def forget(self, peer: PeerId) -> None:
        """Take a peer for dead until it is heard again."""
        self.directory.forget(peer)

    def known_candidates(self, model: ModelId, *, without: Iterable[PeerId]) -> tuple[Candidate, ...]:
        """Return the reached peers that serve spans of a model, and look for no others."""
        return self.directory.candidates(model, without=without)

    async def candidates(self, model: ModelId, block_count: int, *, without: Iterable[PeerId]) -> tuple[Candidate, ...]:
        """Return the reached peers that serve spans of a model.

        Where they do not suffice those are dialled that were only heard of, and the DHT is asked.
        """
        without = tuple(without)

        def suffices() -> bool:
            found = self.directory.candidates(model, without=without)
            return not uncovered(block_count, (candidate.stage.blocks for candidate in found))

        if not suffices():
            with trio.move_on_after(SEEK_TIMEOUT_S):
                await self._dialler.reach_servers(model, suffices)
        if not suffices():
            with trio.move_on_after(SEEK_TIMEOUT_S):
                await self.seek(model)
        return self.directory.candidates(model, without=without)

    async def providers(self, model: ModelId) -> tuple[PeerId, ...]:
        """Return peers that serve a part of a model, and so have its manifest; asks the DHT where none was heard of."""

        def known_providers() -> list[PeerId]:
            return [peer for peer in self.directory.models().get(model, ()) if peer != self._network.peer_id]

        if not known_providers():
            with trio.move_on_after(SEEK_TIMEOUT_S):
                await self._dialler.reach_servers(model, lambda: bool(known_providers()))
        if known := known_providers():
            return tuple(known)
        return await self._answering_providers(provider_key(model))

    async def holders(self, sha256: str) -> tuple[PeerId, ...]:
        """Return peers that announced a file in the DHT and are there."""
        return await self._answering_providers(blob_provider_key(sha256))

    async def _answering_providers(self, key: bytes) -> tuple[PeerId, ...]:
        """Look providers up, and leave out those that do not answer: records outlive their peers by hours."""
        answering: list[PeerId] = []

        async def ask(peer: PeerId) -> None:
            with suppress(NetworkError):
                await self._network.ping(peer)
                answering.append(peer)

        with trio.move_on_after(SEEK_TIMEOUT_S):
            try:
                found = await self._network.find_providers(key)
            except NetworkError as error:
                _logger.info("no providers found", key=key.hex(), reason=str(error))
                return ()
            async with trio.open_nursery() as nursery:
                for peer in found:
                    nursery.start_soon(ask, peer)
        return tuple(answering)

    async def seek(self, model: ModelId) -> None:
        """Look a model's peers up in the DHT and take in those that can be reached."""
        try:
            peers = await self._network.find_providers(provider_key(model))
        except NetworkError as error:
            _logger.info("no providers found", model=model, reason=str(error))
            return
        async with trio.open_nursery() as nursery:
            for peer in peers:
                if self.directory.get(peer) is None:
                    nursery.start_soon(self._take_in, peer, model)

    async def _take_in(self, peer: PeerId, model: ModelId) -> None:
        """Read a peer's span record, and believe it once the peer answers: a record says nothing of liveness."""
        try:
            key = span_key(model, peer)
            data = await self._network.get_record(key)
            if data is None:
                return
            record = unseal_from_dht(SpanRecord, key, data, self._wall_clock())
            if not record.blocks:
                return  # it serves none any more, and may be leaving, which its heartbeat told better
            await self._network.ping(peer)
        except (NetworkError, RemoteProtocolError) as error:
            _logger.info("provider not available", peer=peer, reason=str(error))
            return
        self.directory.hear(
            Heartbeat(
                peer=peer,
                sequence=record.sequence,
                issued_at_s=record.issued_at_s,
                expires_at_s=record.expires_at_s,
                interval_ms=self._interval_ms(),
                multiaddrs=self._network.addresses_of(peer),
                agent="",
                spans=tuple(ServedSpan(model=model, blocks=blocks, load=Load()) for blocks in record.blocks),
            ),
            trio.current_time(),
            dialled=True,
        )

    # What others say

    def _validate_heartbeat(self, source: PeerId, data: bytes) -> bool:
        """Take a heartbeat in, and say whether it is handed on: to read the topic besides would verify it twice."""
        heartbeat = self._open(data)
        if heartbeat.peer != source:
            return False
        self._hear(heartbeat, data)
        return heartbeat.peer == self._network.peer_id or self.directory.knows(heartbeat.peer)

    def _open(self, envelope: bytes) -> Heartbeat:
        heartbeat = unseal(Heartbeat, envelope, self._wall_clock())
        lifetime_s = heartbeat.expires_at_s - heartbeat.issued_at_s
        if lifetime_s > MAX_HEARTBEAT_LIFETIME_S:
            raise RemoteProtocolError(f"a heartbeat lives {lifetime_s} s: expected at most {MAX_HEARTBEAT_LIFETIME_S}")
        return heartbeat

    def _validate_record(self, key: str, data: bytes) -> bool:
        unseal_from_dht(SpanRecord, key, data, self._wall_clock())
        return True

    def _hear(self, heartbeat: Heartbeat, envelope: bytes, teller: PeerId | None = None) -> None:
        now_s, peer = trio.current_time(), heartbeat.peer
        if peer == self._network.peer_id:
            return
        is_hearsay = teller is None and peer not in self._network.connected_peers() and not self.directory.knows(peer)
        if is_hearsay and not self._hearsay.take(1, now_s):
            return
        if self.directory.hear(heartbeat, now_s, envelope, teller=teller):
            self._network.add_addresses(peer, heartbeat.multiaddrs)

    def _hear_of(self, teller: PeerId, envelope: bytes) -> bool:
        """Take in a heartbeat that a neighbour has of somebody; return whether it may tell of more.

        Raises RemoteProtocolError.
        """
        with suppress(UntimelyError):  # by that neighbour's clock it was valid
            self._hear(self._open(envelope), envelope, teller)
        return self.directory.told_by(teller) < MAX_UNREACHED_PER_TELLER

    async def _ask_first_neighbours(self) -> None:
        """Ask the first few peers that we meet who is here."""
        asked = 0
        async with self._network.events() as events:
            async for event in events:
                if asked < NEIGHBOURS_ASKED and isinstance(event, PeerConnected):
                    asked += 1
                    try:
                        await ask_who_is_here(self._network, event.peer, partial(self._hear_of, event.peer))
                    except (NetworkError, RemoteProtocolError) as error:
                        _logger.debug("not told who is here", peer=event.peer, reason=str(error))
                    if (told := self.directory.told_by(event.peer)) >= MAX_UNREACHED_PER_TELLER:
                        _logger.warning("a peer told of more peers than one may", peer=event.peer, taken=told)

    # What we say

    async def _beat(self) -> None:
        while True:
            await self._publish_heartbeat()
            with trio.move_on_after(self._interval_ms() / 1000 * self._jitter.uniform(0.8, 1.2)):
                await self._changed.wait()
            self._changed = trio.Event()

    def _interval_ms(self) -> int:
        return int(1000 * heartbeat_interval_s(len(self.directory.reached())))

    async def _publish_heartbeat(self) -> None:
        self._sequence += 1
        now_s = int(self._wall_clock())
        interval_ms = self._interval_ms()
        said = Statement(0, ()) if self._leaving else self._stated()
        heartbeat = Heartbeat(
            peer=self._network.peer_id,
            sequence=self._sequence,
            issued_at_s=now_s,
            expires_at_s=now_s + max(HEARTBEAT_LIFETIME_S, LIFE_IN_INTERVALS * interval_ms // 1000),
            interval_ms=interval_ms,
            multiaddrs=self._network.multiaddrs[:MAX_ADDRESSES],
            agent=self._agent,
            spans=self._served_spans(),
            placements=said.placements,
            placed_at_ms=said.said_at_ms,
            leaving=self._leaving,
        )
        try:
            envelope = seal(heartbeat, self._identity.private_key)
            self.directory.hear(heartbeat, trio.current_time(), envelope)
            await self._network.publish(HEARTBEAT_TOPIC, envelope)
        except (NetworkError, LocalProtocolError) as error:
            _logger.debug("heartbeat not published", reason=str(error))

    async def _keep_records(self) -> None:
        """Keep our provider and span records in the DHT: on every change, and long before they expire."""
        told: dict[ModelId, tuple[BlockRange, ...]] = {}
        told_at_s = -math.inf
        told_peers = 0
        while True:
            spans: dict[ModelId, tuple[BlockRange, ...]] = {}
            for span in self._served_spans():
                spans[span.model] = (*spans.get(span.model, ()), span.blocks)
            peers = len(self._network.connected_peers())
            # The first peers that we meet have not heard of us: a record put among nobody is with nobody.
            stale = trio.current_time() - told_at_s >= RECORD_REFRESH_S or (peers and not told_peers)
            for model in {*spans, *told}:
                if stale or spans.get(model) != told.get(model):
                    await self._put_record(model, spans.get(model, ()))
            if stale or spans != told:
                told, told_at_s, told_peers = spans, trio.current_time(), peers
            await trio.sleep(1)

    async def _put_record(self, model: ModelId, spans: tuple[BlockRange, ...]) -> None:
        self._sequence += 1
        now_s = int(self._wall_clock())
        record = SpanRecord(
            peer=self._network.peer_id,
            model=model,
            blocks=spans,
            sequence=self._sequence,
            issued_at_s=now_s,
            expires_at_s=now_s + RECORD_LIFETIME_S,
        )
        try:
            if spans:
                await self._network.provide(provider_key(model))
            key = span_key(model, record.peer)
            await self._network.put_record(key, seal(record, self._identity.private_key))
        except (NetworkError, LocalProtocolError) as error:
            _logger.debug("span record not stored", model=model, reason=str(error))

    # Staying connected

    async def _keep_dialling(self, multiaddr: str) -> None:
        """Dial a bootstrap address until it answers, and again whenever the connection is gone."""
        pause_s, longest_s = BOOTSTRAP_BACKOFF_S
        while True:
            known = self._bootstrap[multiaddr].peer
            if known is None or known not in self._network.connected_peers():
                try:
                    peer = await self._network.connect(multiaddr)
                except NetworkError as error:
                    self._bootstrap[multiaddr] = Bootstrap(multiaddr, known, str(error))
                    _logger.warning("bootstrap peer not reached", multiaddr=multiaddr, reason=str(error))
                    pause_s = min(longest_s, pause_s * 2)
                else:
                    self._bootstrap[multiaddr] = Bootstrap(multiaddr, peer, None)
                    pause_s = BOOTSTRAP_BACKOFF_S[0]
            await trio.sleep(pause_s * self._jitter.uniform(0.8, 1.2))

    async def _forget_the_silent(self) -> None:
        while True:
            longest_s = max(LEAST_LONGEST_INTERVAL_S, INTERVAL_SLACK * self._interval_ms() / 1000)
            for peer in self.directory.expire(trio.current_time(), longest_s):
                _logger.info("peer forgotten: not heard for too long", peer=peer)
            await trio.sleep(1)

    async def _measure_round_trips(self) -> None:
        """Ping the connected peers, one after another, again and again."""
        while True:
            peers = self._network.connected_peers()
            self._round_trips_s = {peer: s for peer, s in self._round_trips_s.items() if peer in peers}
            for peer in peers:
                try:
                    round_trip_s = await self._network.ping(peer)
                except NetworkError as error:
                    _logger.debug("ping failed", peer=peer, reason=str(error))
                    continue
                self._round_trips_s[peer] = round_trip_s
                if self._on_round_trip is not None:
                    self._on_round_trip(peer, round_trip_s)
            await trio.sleep(PING_ROUND_S * self._jitter.uniform(0.8, 1.2))
