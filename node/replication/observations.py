"""Dissemination: every observation reaches every peer, and the histories of all become equal.

Gossip is the fast way and loses messages by design: a bounded number of small batches, dropped wherever somebody has
too much to do. Anti-entropy is the sure way: every peer compares its history with a random neighbour's every few
seconds, oftener while differences are found, and both hand over what the other lacks. An observation is acknowledged
when it is in the history; from there anti-entropy carries it, whatever becomes of the gossip.

What a peer sends costs that peer its own allowance, and an offence costs it our attention for a while.
"""

import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import structlog
import trio

from node.identity import Identity
from node.network.interface import GossipMessage, Network, NetworkError, PeerConnected, Stream
from node.replication.anti_entropy import Initiation, Outcome, Response
from node.replication.history import History
from node.replication.replica import Replica, verification_cost
from node.storage.database import StorageError
from node.swarm.dht_records import RecordKinds
from node.swarm.peer_limits import Ban, Standing, Standings
from node.util.token_bucket import Allowance, TokenBucket
from protocol.errors import RemoteProtocolError
from protocol.history import HistoryDigest, decode_batch, history_key, summarise, take_batch
from protocol.identity import PeerId
from protocol.observations import OBSERVATIONS_TOPIC, SignedObservation, open_observation
from protocol.records import seal, unseal_from_dht
from protocol.sync import PROTOCOL_ID

MAX_WAITING = 256
"""Own observations that wait for their gossip; of more, the oldest go by anti-entropy alone."""

STALE_S = 30.0
"""What has waited for so long is with everybody by anti-entropy: gossip would only repeat it."""

TOPIC_WINDOW_S = 10.0
MAX_HEARD = 1024
"""Batches of the last seconds that are remembered, to know how full the topic is."""

RECORD_LIFETIME_S = 1800
RECORD_REFRESH_S = 600
RECORD_INTERVAL_S = 60
RECORDS_ASKED_FOR = 3
RECORD_TIMEOUT_S = 5.0

LEAVE_S = 3.0
LEAVE_ATTEMPTS = 3
"""How long, and with how many neighbours, a leaving peer tries to hand over what it alone may have."""

BUSY_S = 3
"""How long an initiator is sent away when too many sessions are under way, seconds."""

CATCHING_UP = 1000
"""Who gets so many observations in one session is new: what it lacks itself it does not compare with others."""

SHORTEST_WAIT_S = 0.02
"""Debts below this are left to grow: a task that sleeps costs more."""

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationLimits:
    """What dissemination may cost. Work is measured in signatures verified, about 0.1 ms each."""

    batch_interval_s: float = 1.0
    """At most one gossip batch in so long."""
    topic_batches_per_s: float = 6.0
    """Batches that all peers together should publish: each publishes less often while it hears more than these."""
    gossip_work: Allowance = field(default=Allowance(1000, 4000))
    gossip_work_per_peer: Allowance = field(default=Allowance(200, 1000))
    get_work: Allowance = field(default=Allowance(4000, 64_000))
    """For what we asked for. A newcomer takes in most of a history at once; who has it takes in what is new."""
    serve_work: Allowance = field(default=Allowance(2000, 4000))
    serve_work_per_peer: Allowance = field(default=Allowance(1000, 4000))
    traffic: Allowance = field(default=Allowance(4 << 20, 8 << 20))
    """Bytes sent in sessions."""
    traffic_per_peer: Allowance = field(default=Allowance(1 << 20, 4 << 20))
    sessions_per_peer: Allowance = field(default=Allowance(2, 8))
    served_sessions: int = 8
    initiated_sessions: int = 2
    shortest_interval_s: float = 1.0
    """Between the sessions that we begin, while differences are found."""
    longest_interval_s: float = 8.0
    session_timeout_s: float = 60.0


@dataclass(slots=True, kw_only=True)
class ReplicationStatistics:
    """What happened since the start."""

    batches_published: int = 0
    batches_received: int = 0
    batches_dropped: int = 0
    """Not looked at: their publisher, or all together, had used up the allowance, or it was barred."""
    batches_invalid: int = 0
    gossip_bytes_sent: int = 0
    gossip_bytes_received: int = 0
    new_by_gossip: int = 0
    new_by_sync: int = 0
    handed_over: int = 0
    """Observations that others had from us in sessions."""
    sessions_initiated: int = 0
    sessions_served: int = 0
    sessions_refused: int = 0
    sessions_failed: int = 0
    sessions_equal: int = 0
    """Sessions begun by us that found no difference."""
    sync_bytes_sent: int = 0
    sync_bytes_received: int = 0
    offences: int = 0
    waiting: int = 0
    """Own observations that wait for their gossip."""
    barred_peers: int = 0
    interval_s: float = 0.0
    """Between the sessions that we begin, at present."""
    last_equal_s: float | None = None
    """When, by the monotonic clock, a neighbour last held the same as we."""


class _Payer:
    """Makes a session wait for its allowances."""

    def __init__(self, work: tuple[TokenBucket, ...], traffic: tuple[TokenBucket, ...]) -> None:
        self._work = work
        self._traffic = traffic

    async def pay_work(self, amount: float) -> None:
        await self._pay(self._work, amount)

    async def pay_traffic(self, sent_bytes: int) -> None:
        await self._pay(self._traffic, sent_bytes)

    async def _pay(self, buckets: tuple[TokenBucket, ...], amount: float) -> None:
        now_s = trio.current_time()
        wait_s = max(bucket.spend(amount, now_s) for bucket in buckets)
        if wait_s >= SHORTEST_WAIT_S:
            await trio.sleep(wait_s)


class ObservationReplicator:
    """This node's part in spreading the history. Made before the network runs; `run` needs it running."""

    def __init__(
        self,
        *,
        network: Network,
        identity: Identity,
        history: History,
        records: RecordKinds,
        jitter: random.Random,
        wall_clock: Callable[[], float] = time.time,
        limits: ReplicationLimits | None = None,
        open_envelope: Callable[[bytes], SignedObservation] = open_observation,
    ) -> None:
        """Join the topic and serve the protocol. `open_envelope` verifies; simulations remember what it said."""
        self._network = network
        self._identity = identity
        self._history = history
        self._jitter = jitter
        self._wall_clock = wall_clock
        self._limits = limits = limits or ReplicationLimits()
        self._replica = Replica(history, wall_clock, open_envelope)
        self._statistics = ReplicationStatistics()
        self._standings = Standings(
            limits.gossip_work_per_peer,
            limits.serve_work_per_peer,
            limits.traffic_per_peer,
            limits.sessions_per_peer,
        )
        self._gossip_work = limits.gossip_work.bucket(0.0)
        self._get_work = limits.get_work.bucket(0.0)
        self._serve_work = limits.serve_work.bucket(0.0)
        self._traffic = limits.traffic.bucket(0.0)
        self._waiting: deque[tuple[float, bytes]] = deque(maxlen=MAX_WAITING)
        self._waiting_filled = trio.Event()
        self._heard_at_s: deque[tuple[float, PeerId]] = deque(maxlen=MAX_HEARD)
        self._batch_interval_s = limits.batch_interval_s
        self._interval_s = limits.shortest_interval_s
        self._hurry = trio.Event()
        self._talking_to: set[PeerId] = set()
        self._getting: set[Initiation] = set()
        self._serving = 0
        self._promising: dict[PeerId, int] = {}
        network.join_topic(OBSERVATIONS_TOPIC, self._validate_batch)
        network.set_stream_handler(PROTOCOL_ID, self._serve)
        records.register(HistoryDigest.kind, self._validate_record)

    def statistics(self) -> ReplicationStatistics:
        """Return what happened since the start, and how things stand."""
        return replace(
            self._statistics,
            waiting=len(self._waiting),
            barred_peers=len(self._standings.barred(trio.current_time())),
            interval_s=self._interval_s,
        )

    async def publish(self, observation: SignedObservation) -> None:
        """Keep an observation of our own and let the swarm know. On return it is safe, and will reach everybody."""
        await self._replica.take_in([observation])
        self._waiting.append((trio.current_time(), observation.envelope))
        self._waiting_filled.set()

    async def run(self) -> None:
        """Take part until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._publish_batches)
            nursery.start_soon(self._listen)
            nursery.start_soon(self._keep_comparing, nursery)
            nursery.start_soon(self._keep_record)
            nursery.start_soon(self._heed_connections)

    async def leave(self) -> None:
        """Before a polite end: see that a neighbour holds what we hold, within a bounded time."""
        with trio.move_on_after(LEAVE_S):
            for _ in range(LEAVE_ATTEMPTS):
                if (peer := self._choose_neighbour()) is None:
                    return
                self._talking_to.add(peer)
                outcome = await self._compare_with(peer)
                if outcome.equal:
                    return

    # Gossip

    async def _publish_batches(self) -> None:
        while True:
            await self._waiting_filled.wait()
            self._waiting_filled = trio.Event()
            while batch := self._next_batch():
                try:
                    await self._network.publish(OBSERVATIONS_TOPIC, batch)
                except NetworkError as error:
                    _logger.debug("observations not gossiped", reason=str(error))
                else:
                    self._statistics.batches_published += 1
                    self._statistics.gossip_bytes_sent += len(batch)
                self._adapt_batch_interval()
                await trio.sleep(self._batch_interval_s * self._jitter.uniform(0.8, 1.2))

    def _next_batch(self) -> bytes | None:
        now_s = trio.current_time()
        while self._waiting and now_s - self._waiting[0][0] > STALE_S:
            self._waiting.popleft()
        if not self._waiting:
            return None
        envelopes = deque(envelope for _, envelope in self._waiting)
        count = len(envelopes)
        batch = take_batch(envelopes)
        for _ in range(count - len(envelopes)):
            self._waiting.popleft()
        return batch

    def _adapt_batch_interval(self) -> None:
        """Publish less often while the topic is full, so that nobody's validators and meshes are overrun.

        Slower by half, at most to a fair share of the topic; faster again by a fifth.
        """
        now_s = trio.current_time()
        while self._heard_at_s and now_s - self._heard_at_s[0][0] > TOPIC_WINDOW_S:
            self._heard_at_s.popleft()
        limits = self._limits
        if len(self._heard_at_s) > limits.topic_batches_per_s * TOPIC_WINDOW_S:
            sources = 1 + len({source for _, source in self._heard_at_s})
            fair_s = max(limits.batch_interval_s, sources / limits.topic_batches_per_s)
            self._batch_interval_s = min(fair_s, self._batch_interval_s * 1.5)
        else:
            self._batch_interval_s = max(limits.batch_interval_s, self._batch_interval_s / 1.2)

    def _validate_batch(self, source: PeerId, data: bytes) -> bool:
        """Say whether a batch is forwarded. Verifies every signature in it, within the publisher's allowance."""
        if source == self._network.peer_id:
            return True
        now_s = trio.current_time()
        standing = self._standings.of(source, now_s)
        if standing.barred(now_s):
            self._statistics.batches_dropped += 1
            return False
        try:
            unknown = [envelope for envelope in decode_batch(data) if not self._replica.is_open(envelope)]
            cost = sum(map(verification_cost, unknown))
            if not standing.gossip.take(cost, now_s) or not self._gossip_work.take(cost, now_s):
                self._statistics.batches_dropped += 1
                return False
            observations = [self._replica.open(envelope) for envelope in unknown]
        except RemoteProtocolError as error:
            self._statistics.batches_invalid += 1
            self._penalise(source, standing, error)
            raise
        return not any(map(self._replica.untimely_s, observations))

    async def _listen(self) -> None:
        async with self._network.subscribe(OBSERVATIONS_TOPIC) as messages:
            await self._take_batches(messages)

    async def _take_batches(self, messages: AsyncIterator[GossipMessage]) -> None:
        async for message in messages:
            self._statistics.batches_received += 1
            self._statistics.gossip_bytes_received += len(message.data)
            self._heard_at_s.append((trio.current_time(), message.source))
            observations = [self._replica.open(envelope) for envelope in decode_batch(message.data)]
            try:
                self._statistics.new_by_gossip += await self._replica.take_in(observations)
            except StorageError as error:
                _logger.warning("gossiped observations not kept", reason=str(error))

    # Sessions that we begin

    async def _keep_comparing(self, nursery: trio.Nursery) -> None:
        while True:
            await self._wait_for_interval()
            peer = self._choose_neighbour()
            if peer is not None and len(self._talking_to) < self._limits.initiated_sessions:
                self._talking_to.add(peer)
                nursery.start_soon(self._compare_with, peer)

    async def _wait_for_interval(self) -> None:
        """Wait for the interval, which may become shorter meanwhile."""
        started_s = trio.current_time()
        factor = self._jitter.uniform(0.75, 1.25)
        while (left_s := started_s + factor * self._interval_s - trio.current_time()) > 0:
            self._hurry = trio.Event()
            with trio.move_on_after(left_s):
                await self._hurry.wait()

    def _choose_neighbour(self) -> PeerId | None:
        now_s = trio.current_time()
        willing = []
        for peer in self._network.connected_peers():
            standing = self._standings.of(peer, now_s)
            if peer not in self._talking_to and not standing.barred(now_s) and standing.retry_at_s <= now_s:
                willing.append(peer)
        if not willing:
            return None
        promising = max(willing, key=lambda peer: self._promising.get(peer, 0))
        return promising if self._promising.pop(promising, 0) else self._jitter.choice(willing)

    async def _compare_with(self, peer: PeerId) -> Outcome:
        """Run one session with a neighbour, and draw the conclusions."""
        standing = self._standings.of(peer, trio.current_time())
        self._statistics.sessions_initiated += 1
        outcome = Outcome()
        try:
            with trio.move_on_after(self._limits.session_timeout_s):
                stream = await self._network.open_stream(peer, PROTOCOL_ID)
                initiation = Initiation(stream, self._replica, self._payer_of_gets(), self._jitter)
                outcome = initiation.outcome
                self._getting.add(initiation)
                try:
                    await initiation.run()
                finally:
                    self._getting.discard(initiation)
                    await stream.aclose()
        except RemoteProtocolError as error:
            self._penalise(peer, standing, error)
        except (NetworkError, StorageError) as error:
            self._statistics.sessions_failed += 1
            standing.failed(trio.current_time(), self._jitter.uniform(0.5, 1.5))
            _logger.debug("session failed", peer=peer, reason=str(error))
        else:
            self._conclude(standing, outcome)
        finally:
            self._talking_to.discard(peer)
            self._count(outcome)
        return outcome

    def _conclude(self, standing: Standing, outcome: Outcome) -> None:
        now_s = trio.current_time()
        if outcome.retry_s is not None:
            standing.retry_at_s = now_s + outcome.retry_s * self._jitter.uniform(1, 2)
            return
        if outcome.equal:
            self._statistics.last_equal_s = now_s
        if outcome.equal and not outcome.differed:
            self._statistics.sessions_equal += 1
            self._interval_s = min(self._limits.longest_interval_s, self._interval_s * 1.5)
        if outcome.received or outcome.sent:
            self._speed_up()
        if outcome.equal or outcome.received or outcome.sent:
            standing.succeeded()
        else:
            # It differs and nothing can be done about it: it keeps what we decline, or declines what we have, or lies.
            standing.failed(now_s, self._jitter.uniform(0.5, 1.5))

    def _speed_up(self) -> None:
        self._interval_s = self._limits.shortest_interval_s
        self._hurry.set()

    def _payer_of_gets(self) -> _Payer:
        return _Payer((self._get_work,), (self._traffic,))

    # Sessions that others begin

    async def _serve(self, stream: Stream) -> None:
        now_s = trio.current_time()
        standing = self._standings.of(stream.peer, now_s)
        if standing.barred(now_s):
            await stream.reset()
            return
        response = Response(
            stream,
            self._replica,
            _Payer((standing.work, self._serve_work), (standing.traffic, self._traffic)),
        )
        try:
            with trio.move_on_after(self._limits.session_timeout_s), self._slot(standing) as free:
                await (response.run() if free else response.refuse(BUSY_S))
        except RemoteProtocolError as error:
            self._penalise(stream.peer, standing, error)
            await stream.reset()
        except (NetworkError, StorageError) as error:
            _logger.debug("served session failed", peer=stream.peer, reason=str(error))
        finally:
            self._count(response.outcome)
            if response.outcome.received or response.outcome.sent:
                self._speed_up()

    @contextmanager
    def _slot(self, standing: Standing) -> Iterator[bool]:
        """Hold one of the places for served sessions, if there is one and the peer may have it."""
        is_new = any(each.outcome.received >= CATCHING_UP for each in self._getting)
        free = self._serving < self._limits.served_sessions and not is_new
        free = free and standing.sessions.take(1, trio.current_time())
        if not free:
            self._statistics.sessions_refused += 1
            yield False
            return
        self._statistics.sessions_served += 1
        self._serving += 1
        try:
            yield True
        finally:
            self._serving -= 1

    def _count(self, outcome: Outcome) -> None:
        self._statistics.new_by_sync += outcome.received
        self._statistics.handed_over += outcome.sent
        self._statistics.sync_bytes_sent += outcome.bytes_sent
        self._statistics.sync_bytes_received += outcome.bytes_received

    def bans(self) -> dict[PeerId, Ban]:
        """Return the peers of which nothing is looked at now, and why."""
        return self._standings.bans(trio.current_time())

    def _penalise(self, peer: PeerId, standing: Standing, error: RemoteProtocolError) -> None:
        seconds = standing.penalise(trio.current_time(), str(error))
        self._statistics.offences += 1
        _logger.warning("peer barred: it broke a rule of dissemination", peer=peer, seconds=seconds, fault=str(error))

    # The digest record

    def _validate_record(self, key: str, data: bytes) -> bool:
        unseal_from_dht(HistoryDigest, key, data, self._wall_clock())
        return True

    async def _keep_record(self) -> None:
        """Keep the record of what we hold in the DHT up to date, within reason."""
        told_digest = b""
        told_at_s = 0.0
        while True:
            try:
                tree = await self._replica.tree()
                digest = tree.summary("").digest
                if digest != told_digest or trio.current_time() - told_at_s >= RECORD_REFRESH_S:
                    wall_s = self._wall_clock()
                    record = HistoryDigest(
                        peer=self._network.peer_id,
                        sequence=int(wall_s * 1000),
                        issued_at_s=int(wall_s),
                        expires_at_s=int(wall_s) + RECORD_LIFETIME_S,
                        first_bucket=self._replica.first_bucket(),
                        count=tree.summary("").count,
                        digest=digest,
                        parts=summarise(tree),
                    )
                    await self._network.put_record(history_key(record.peer), seal(record, self._identity.private_key))
                    told_digest, told_at_s = digest, trio.current_time()
            except (NetworkError, StorageError) as error:
                _logger.debug("history record not stored", reason=str(error))
            await trio.sleep(RECORD_INTERVAL_S * self._jitter.uniform(0.75, 1.25))

    async def _heed_connections(self) -> None:
        """Compare with new neighbours first: behind a new link may be all that a partition has kept from us.

        Of the first ones also read from their records who holds most of what we lack, and begin there.
        """
        asked = 0
        async with self._network.events() as events:
            async for event in events:
                if isinstance(event, PeerConnected):
                    self._promising.setdefault(event.peer, 1)
                    self._speed_up()
                    if asked < RECORDS_ASKED_FOR:
                        asked += 1
                        await self._read_record(event.peer)
                else:
                    self._promising.pop(event.peer, None)

    async def _read_record(self, peer: PeerId) -> None:
        with trio.move_on_after(RECORD_TIMEOUT_S):
            try:
                if data := await self._network.get_record(history_key(peer)):
                    record = unseal_from_dht(HistoryDigest, history_key(peer), data, self._wall_clock())
                    self._promising[peer] = 1 + record.estimate_lacking(await self._replica.tree())
            except (NetworkError, RemoteProtocolError, StorageError) as error:
                _logger.debug("history record not read", peer=peer, reason=str(error))
