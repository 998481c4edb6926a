"""Replication of observations: every observation reaches every peer, and the histories of all peers become equal.

Gossip is fast and lossy. Anti-entropy is reliable: every peer compares its history with a random neighbour's every few
seconds, more often while differences are found, and both exchange what the other lacks. An observation is acknowledged
once it is in the history; from there anti-entropy spreads it, whatever happens to the gossip.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import structlog
import trio

from node.identity import Identity
from node.network.interface import Network, NetworkError, Stream
from node.replication.anti_entropy import SyncInitiator, SyncResponder
from node.replication.gossip_topic import BatchPacer, GossipTopic
from node.replication.history import History
from node.replication.peer_limits import Ban, PeerAllowances, PeerLimits
from node.replication.pull import PullLimits, PullService
from node.replication.replica import Replica
from node.replication.session import SessionOutcome, Throttle
from node.storage.database import StorageError
from node.swarm.dht_records import RecordKinds
from node.util.elapsed import Elapsed
from node.util.lasting_failure import LastingFailure
from node.util.signal import Signal
from node.util.token_bucket import Allowance
from protocol.errors import RemoteProtocolError
from protocol.history import HistoryDigest, history_key, summarise
from protocol.identity import PeerId
from protocol.observations import OBSERVATIONS_TOPIC, SignedObservation, verify_observation
from protocol.records import seal, verify_dht_record
from protocol.sync import PROTOCOL_ID

RECORD_LIFETIME_S = 1800
RECORD_REFRESH_S = 600
RECORD_INTERVAL_S = 60
RECORDS_READ = 3
"""First neighbours whose digest records are read."""

RECORD_TIMEOUT_S = 5.0

LEAVE_S = 3.0
LEAVE_ATTEMPTS = 3
"""How long, and with how many neighbours, a leaving peer tries to hand over what it alone may have."""

PEER_ALLOWANCES = PeerAllowances(
    gossip=Allowance(200, 1000),
    work=Allowance(1000, 4000),
    traffic=Allowance(1 << 20, 4 << 20),
    sessions=Allowance(2, 8),
)

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationLimits:
    """Bounds on the cost of replication. Work is measured in signatures verified, about 0.1 ms each."""

    batch_interval_s: float = 1.0
    """Shortest pause between two gossip batches."""
    topic_batches_per_s: float = 6.0
    """Batches that all peers together should publish."""
    gossip_work: Allowance = field(default=Allowance(1000, 4000))
    per_peer: PeerAllowances = PEER_ALLOWANCES
    pull: PullLimits = field(default=PullLimits(catching_up=1000))
    initiated_sessions: int = 2
    shortest_interval_s: float = 1.0
    """Between the sessions that we begin, while differences are found."""
    longest_interval_s: float = 8.0


@dataclass(slots=True, kw_only=True)
class ReplicationStatistics:
    """Counters since the start."""

    new_by_gossip: int = 0
    new_by_sync: int = 0
    sync_bytes_sent: int = 0
    last_equal_s: float | None = None
    """Monotonic time at which a neighbour's history was last found equal to ours."""


class ObservationReplicator:
    """Replicates the history of this node. Made before the network runs; `run` needs it running."""

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
        verify_envelope: Callable[[bytes], SignedObservation] = verify_observation,
    ) -> None:
        """Join the topic and serve the protocol. `verify_envelope` verifies; simulations cache its results."""
        self._network = network
        self._identity = identity
        self._jitter = jitter
        self._wall_clock = wall_clock
        self._limits = limits = limits or ReplicationLimits()
        self._replica = Replica(history, wall_clock, verify_envelope)
        self._statistics = ReplicationStatistics()
        self._peer_limits = PeerLimits(limits.per_peer)
        self._gossip = GossipTopic(
            network,
            OBSERVATIONS_TOPIC,
            self._replica.verifier,
            self._peer_limits,
            limits.gossip_work,
            accepts=lambda _, observation: not self._replica.untimely_s(observation),
            pacer=BatchPacer(limits.batch_interval_s, limits.topic_batches_per_s, jitter),
        )
        self._pull = PullService(
            network,
            PROTOCOL_ID,
            self._peer_limits,
            limits.pull,
            jitter,
            respond=partial(SyncResponder, replica=self._replica),
            on_outcome=self._on_outcome,
        )
        self._interval_s = limits.shortest_interval_s
        self._hurry = Signal()
        self._records_left = RECORDS_READ
        self._storage_failure = LastingFailure()
        records.register(HistoryDigest.kind, self._validate_record)

    def statistics(self) -> ReplicationStatistics:
        """Return counters since the start."""
        return replace(self._statistics)

    def bans(self) -> dict[PeerId, Ban]:
        """Return the peers that are banned now."""
        return self._peer_limits.bans(trio.current_time())

    async def publish(self, observation: SignedObservation) -> None:
        """Store and gossip an observation of our own. On return it is durable, and will reach every peer."""
        await self._replica.store([observation])
        self._gossip.publish([observation.envelope])

    async def run(self) -> None:
        """Replicate until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._gossip.run, self._store_gossiped)
            nursery.start_soon(self._pull_loop, nursery)
            nursery.start_soon(self._record_loop)
            nursery.start_soon(self._pull.watch_connections, self._on_connected)

    async def leave(self) -> None:
        """Make sure, before a shutdown and within a bounded time, that a neighbour has what we have."""
        with trio.move_on_after(LEAVE_S):
            for _ in range(LEAVE_ATTEMPTS):
                if (peer := self._pull.choose_neighbour()) is None or (await self._compare_with(peer)).equal:
                    return

    async def _store_gossiped(self, observations: Sequence[SignedObservation]) -> None:
        try:
            new = await self._replica.store(observations)
        except StorageError as error:
            if self._storage_failure.is_due(str(error)):
                _logger.warning("gossiped observations not stored", reason=str(error))
            return
        self._statistics.new_by_gossip += new
        if new:
            self._storage_failure.ended()

    # Sessions

    async def _pull_loop(self, nursery: trio.Nursery) -> None:
        while True:
            await self._wait_for_interval()
            if self._pull.pulling < self._limits.initiated_sessions and (peer := self._pull.choose_neighbour()):
                nursery.start_soon(self._compare_with, peer)

    async def _wait_for_interval(self) -> None:
        """Wait for the interval, which may become shorter meanwhile."""
        started_s = trio.current_time()
        factor = self._jitter.uniform(0.75, 1.25)
        while (left_s := started_s + factor * self._interval_s - trio.current_time()) > 0:
            with trio.move_on_after(left_s):
                await self._hurry.wait()

    async def _compare_with(self, peer: PeerId) -> SessionOutcome:
        """Run one session with a neighbour; adapt the interval to its outcome."""

        def initiate(stream: Stream, throttle: Throttle) -> SyncInitiator:
            return SyncInitiator(stream, throttle, self._replica, self._jitter)

        outcome = await self._pull.pull(peer, initiate)
        if outcome.equal:
            self._statistics.last_equal_s = trio.current_time()
            if not outcome.differed:
                self._interval_s = min(self._limits.longest_interval_s, self._interval_s * 1.5)
        return outcome

    def _on_outcome(self, outcome: SessionOutcome) -> None:
        self._statistics.new_by_sync += outcome.received
        self._statistics.sync_bytes_sent += outcome.bytes_sent
        if outcome.received or outcome.sent:
            self._speed_up()

    def _speed_up(self) -> None:
        self._interval_s = self._limits.shortest_interval_s
        self._hurry.set()

    async def _on_connected(self, peer: PeerId) -> None:
        """Compare with a new neighbour soon. Of the first few, prefer the one whose record promises most."""
        self._speed_up()
        if self._records_left:
            self._records_left -= 1
            await self._read_record(peer)

    # The digest record in the DHT

    def _validate_record(self, key: str, data: bytes) -> bool:
        verify_dht_record(HistoryDigest, key, data, self._wall_clock())
        return True

    async def _record_loop(self) -> None:
        """Keep the digest record of our history in the DHT current, at a bounded rate."""
        put_digest, since_put = b"", Elapsed(self._wall_clock)
        while True:
            try:
                tree = await self._replica.tree()
                root = tree.summary("")
                if root.digest != put_digest or since_put.seconds() >= RECORD_REFRESH_S:
                    wall_s = self._wall_clock()
                    record = HistoryDigest(
                        peer=self._network.peer_id,
                        sequence=int(wall_s * 1000),
                        issued_at_s=int(wall_s),
                        expires_at_s=int(wall_s) + RECORD_LIFETIME_S,
                        first_bucket=self._replica.first_bucket(),
                        count=root.count,
                        digest=root.digest,
                        parts=summarise(tree),
                    )
                    await self._network.put_record(history_key(record.peer), seal(record, self._identity.private_key))
                    put_digest = root.digest
                    since_put.restart()
            except (NetworkError, StorageError) as error:
                _logger.debug("history record not stored", reason=str(error))
            await trio.sleep(RECORD_INTERVAL_S * self._jitter.uniform(0.75, 1.25))

    async def _read_record(self, peer: PeerId) -> None:
        """Prefer a peer by how much of what we lack its record promises."""
        with trio.move_on_after(RECORD_TIMEOUT_S):
            try:
                if data := await self._network.get_record(history_key(peer)):
                    record = verify_dht_record(HistoryDigest, history_key(peer), data, self._wall_clock())
                    self._pull.prefer(peer, 1 + record.estimate_missing(await self._replica.tree()))
            except (NetworkError, RemoteProtocolError, StorageError) as error:
                _logger.debug("history record not read", peer=peer, reason=str(error))
