"""This node's part in the consensus of every model that it knows of: one keeper a chain, gossip, and what was missed.

Gossip is the fast way; every peer also asks a random neighbour several times an epoch for what it missed. What a peer
sends costs that peer its own allowance, and an offence costs it our attention for a while.
"""

import hashlib
import random
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import structlog
import trio

from node.consensus.chain_node import ChainNode, Meter, Store, fresh_nonce
from node.consensus.chain_sync import Initiation, Outcome, Response
from node.consensus.followed_chains import FollowedChains
from node.identity import Identity
from node.network.interface import GossipMessage, Network, NetworkError, PeerConnected, Stream
from node.replication.history import History
from node.storage.database import StorageError
from node.swarm.peer_limits import Ban, Standing, Standings
from node.util.offload import Offload, run_in_thread
from node.util.token_bucket import Allowance, TokenBucket
from protocol.chains import PROTOCOL_ID
from protocol.consensus import CONSENSUS_TOPIC, EquivocationRecord, Said, open_said
from protocol.errors import RemoteProtocolError
from protocol.history import decode_batch, take_batch
from protocol.identity import ModelId, PeerId
from selector.consensus.clock import EpochClock
from selector.consensus.sortition import Agenda
from selector.consensus.values import Digest, genesis_of

MAX_CHAINS: Final = 8
"""Chains that a node follows at a time: those of the models that it serves first."""

MODELS_ROUND_S: Final = 1.0
"""How often it is looked whether there are models whose chain we do not follow yet."""

MAX_WAITING: Final = 1024
"""Own records that wait for their gossip; of more, the oldest go by the way of what was missed."""

OPENED: Final = 4096
"""Records remembered as verified, so that what comes twice is verified once."""

SERVED_SESSIONS: Final = 8
SESSION_TIMEOUT_S: Final = 60.0

GOSSIP_WORK: Final = Allowance(1000, 8000)
GOSSIP_WORK_PER_PEER: Final = Allowance(4, 64)
"""Signatures verified a second. A peer says about five things in an epoch."""

SERVE_WORK_PER_PEER: Final = Allowance(100, 1000)
TRAFFIC_PER_PEER: Final = Allowance(1 << 20, 8 << 20)
TRAFFIC: Final = Allowance(4 << 20, 16 << 20)
SESSIONS_PER_PEER: Final = Allowance(4, 16)

_logger = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class ConsensusStatistics:
    """What happened since the start."""

    batches_published: int = 0
    batches_received: int = 0
    batches_dropped: int = 0
    gossip_bytes_sent: int = 0
    gossip_bytes_received: int = 0
    sessions_initiated: int = 0
    sessions_served: int = 0
    sessions_failed: int = 0
    session_bytes_sent: int = 0
    session_bytes_received: int = 0
    records_fetched: int = 0
    offences: int = 0


def rules_of(clock: EpochClock, agenda: Agenda) -> str:
    """Return what peers must have in common to agree: those with other rules have a chain of their own."""
    workloads, methods = ",".join(agenda.workloads), ",".join(agenda.methods)
    return f"metaswarm/1 epoch={clock.epoch_s:g} workloads={workloads} methods={methods}"


def swarm_name(swarm_key: str | None) -> bytes:
    """Return what names a swarm in its chains: the hash of its key, which no outsider has, or that of nothing."""
    return hashlib.sha256(b"metaswarm/swarm/" + (swarm_key or "").encode()).digest()


class Consensus:
    """This node's part in the consensus. Made before the network runs; `run` needs it running."""

    def __init__(
        self,
        *,
        network: Network,
        identity: Identity,
        store: Store,
        history: History,
        chains: FollowedChains,
        models: Callable[[], Mapping[ModelId, bool]],
        hardware: Callable[[], str | None],
        meter: Callable[[ModelId], Meter],
        swarm: bytes,
        agenda: Agenda,
        clock: EpochClock,
        jitter: random.Random,
        checkpoints: Collection[Digest] = (),
        wall_clock: Callable[[], float] = time.time,
        offload: Offload = run_in_thread,
        nonce: Callable[[], bytes] = fresh_nonce,
        open_envelope: Callable[[bytes], Said] = open_said,
    ) -> None:
        """Join the topic and serve the protocol.

        `models`: those that live peers serve, and whether we serve it ourselves. `meter` measures for one of them.
        """
        self._network = network
        self._identity = identity
        self._store = store
        self._history = history
        self._models = models
        self._hardware = hardware
        self._meter = meter
        self._swarm = swarm
        self._agenda = agenda
        self._clock = clock
        self._jitter = jitter
        self._checkpoints = checkpoints
        self._wall_clock = wall_clock
        self._offload = offload
        self._nonce = nonce
        self._open_unknown = open_envelope
        self._keepers = chains.nodes
        self._by_chain: dict[Digest, ChainNode] = {}
        self._standings = Standings(GOSSIP_WORK_PER_PEER, SERVE_WORK_PER_PEER, TRAFFIC_PER_PEER, SESSIONS_PER_PEER)
        self._gossip_work = GOSSIP_WORK.bucket(0.0)
        self._traffic = TRAFFIC.bucket(0.0)
        self._opened: OrderedDict[bytes, Said] = OrderedDict()
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._waiting_filled = trio.Event()
        self._neighbours: deque[PeerId] = deque(maxlen=64)
        """Connected of late: behind them may be what a partition has kept from us."""
        self._hurry = trio.Event()
        self._serving = 0
        self._statistics = ConsensusStatistics()
        network.join_topic(CONSENSUS_TOPIC, self._validate)
        network.set_stream_handler(PROTOCOL_ID, self._serve)

    def statistics(self) -> ConsensusStatistics:
        """Return what happened since the start."""
        return replace(self._statistics)

    async def run(self) -> None:
        """Take part until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            nursery.start_soon(self._publish_for_ever)
            nursery.start_soon(self._heed_connections)
            while True:
                self._follow(nursery)
                await trio.sleep(min(MODELS_ROUND_S, self._clock.epoch_s / 20))

    # Chains

    def _follow(self, nursery: trio.Nursery) -> None:
        """Begin to follow the chains of models that we have not heard of before."""
        models = self._models()
        for model in sorted(models, key=lambda model: (not models[model], model)):
            if model not in self._keepers and len(self._keepers) < MAX_CHAINS:
                genesis = genesis_of(self._swarm, model, rules_of(self._clock, self._agenda))
                keeper = ChainNode(
                    identity=self._identity,
                    genesis=genesis,
                    clock=self._clock,
                    agenda=self._agenda,
                    store=self._store,
                    history=self._history,
                    meter=self._meter(model),
                    hardware=self._hardware,
                    participates=partial(self._serves, model),
                    publish=self._publish,
                    wall_clock=self._wall_clock,
                    checkpoints=self._checkpoints,
                    offload=self._offload,
                    nonce=self._nonce,
                )
                self._keepers[model] = self._by_chain[genesis] = keeper
                nursery.start_soon(self._keep, keeper)

    def _serves(self, model: ModelId) -> bool:
        return self._models().get(model, False)

    async def _keep(self, keeper: ChainNode) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ask_for_ever, keeper)
            while True:
                try:
                    await keeper.run()
                except StorageError as error:
                    _logger.warning("a chain cannot be read; trying again", reason=str(error))
                    await trio.sleep(self._clock.epoch_s / 10)

    # Gossip

    def _publish(self, said: Sequence[Said]) -> None:
        self._waiting += [each.envelope for each in said]
        self._waiting_filled.set()

    async def _publish_for_ever(self) -> None:
        while True:
            await self._waiting_filled.wait()
            self._waiting_filled = trio.Event()
            while self._waiting:
                batch = take_batch(self._waiting)
                try:
                    await self._network.publish(CONSENSUS_TOPIC, batch)
                except NetworkError as error:
                    _logger.debug("consensus not gossiped", reason=str(error))
                else:
                    self._statistics.batches_published += 1
                    self._statistics.gossip_bytes_sent += len(batch)

    def _validate(self, source: PeerId, data: bytes) -> bool:
        """Whether a batch is taken and forwarded: of a chain that we follow, of now, and its publisher's own word."""
        now_s = trio.current_time()
        standing = self._standings.of(source, now_s)
        epoch = self._clock.epoch_at(self._wall_clock())
        envelopes = decode_batch(data)
        cost = len(envelopes)
        if standing.barred(now_s) or not standing.gossip.take(cost, now_s) or not self._gossip_work.take(cost, now_s):
            self._statistics.batches_dropped += 1
            return False
        said = [self._open(envelope) for envelope in envelopes]
        if any(each.peer != source for each in said):
            raise RemoteProtocolError("a batch of records that others have said")
        self._statistics.batches_received += 1
        self._statistics.gossip_bytes_received += len(data)
        return all(each.body.chain in self._by_chain and _is_timely(each, epoch) for each in said)

    async def _listen(self) -> None:
        async with self._network.subscribe(CONSENSUS_TOPIC) as messages:
            async for message in messages:
                self._hear(message)

    def _hear(self, message: GossipMessage) -> None:
        said = [self._open(envelope) for envelope in decode_batch(message.data)]
        for each in said:
            if keeper := self._by_chain.get(each.body.chain):
                keeper.hear([each])

    def _open(self, envelope: bytes) -> Said:
        """Return what was said in an envelope; verified once. Raises RemoteProtocolError."""
        key = hashlib.sha256(envelope).digest()
        if (known := self._opened.get(key)) is not None:
            return known
        said = self._opened[key] = self._open_unknown(envelope)
        if len(self._opened) > OPENED:
            self._opened.popitem(last=False)
        return said

    # What was missed

    async def _ask_for_ever(self, keeper: ChainNode) -> None:
        """Ask a neighbour for what we missed: a random one several times an epoch, at once where something lacks."""
        interval_s = self._clock.epoch_s / 20
        while True:
            if peer := self._choose_neighbour():
                more = await self._ask(keeper, peer)
                if more:
                    continue
            pause_s = self._jitter.uniform(0.8, 1.2) * interval_s
            with trio.move_on_after(pause_s):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_first, keeper.wants_more, nursery.cancel_scope)
                    nursery.start_soon(_first, self._hurry, nursery.cancel_scope)
            # Even where much lacks, no faster than this.
            await trio.sleep(min(0.5, interval_s / 4) * self._jitter.uniform(0.5, 1))
            if keeper.wants_more.is_set():
                keeper.wants_more = trio.Event()
            if self._hurry.is_set():
                self._hurry = trio.Event()

    def _choose_neighbour(self) -> PeerId | None:
        now_s = trio.current_time()
        connected = set(self._network.connected_peers())
        while self._neighbours:
            if (peer := self._neighbours.popleft()) in connected and self._may_ask(peer, now_s):
                return peer
        peers = sorted(peer for peer in connected if self._may_ask(peer, now_s))
        return self._jitter.choice(peers) if peers else None

    def _may_ask(self, peer: PeerId, now_s: float) -> bool:
        standing = self._standings.of(peer, now_s)
        return not standing.barred(now_s) and now_s >= standing.retry_at_s

    async def _ask(self, keeper: ChainNode, peer: PeerId) -> bool:
        """Ask one peer; return whether it has more to tell."""
        standing = self._standings.of(peer, trio.current_time())
        outcome = Outcome()
        try:
            with trio.fail_after(SESSION_TIMEOUT_S):
                stream = await self._network.open_stream(peer, PROTOCOL_ID)
                try:
                    initiation = Initiation(stream, keeper, self._open)
                    outcome = initiation.outcome
                    await initiation.run()
                finally:
                    await stream.aclose()
        except RemoteProtocolError as error:
            self._penalise(peer, standing, error)
        except (NetworkError, StorageError, trio.TooSlowError) as error:
            self._statistics.sessions_failed += 1
            standing.failed(trio.current_time(), self._jitter.uniform(0.5, 1.5))
            _logger.debug("chain session failed", peer=peer, reason=str(error))
        else:
            self._statistics.sessions_initiated += 1
            if outcome.retry_s is not None:
                standing.retry_at_s = trio.current_time() + outcome.retry_s * self._jitter.uniform(1, 2)
            else:
                standing.succeeded()
        self._count(outcome)
        return outcome.more

    async def _serve(self, stream: Stream) -> None:
        now_s = trio.current_time()
        standing = self._standings.of(stream.peer, now_s)
        if standing.barred(now_s):
            await stream.reset()
            return
        response = Response(stream, partial(_pay, (standing.traffic, self._traffic)))
        try:
            with trio.move_on_after(SESSION_TIMEOUT_S):
                if self._serving >= SERVED_SESSIONS or not standing.sessions.take(1, now_s):
                    await response.refuse()
                    return
                self._serving += 1
                try:
                    self._statistics.sessions_served += 1
                    await response.run(self._by_chain.get)
                finally:
                    self._serving -= 1
        except RemoteProtocolError as error:
            self._penalise(stream.peer, standing, error)
            await stream.reset()
        except (NetworkError, StorageError) as error:
            _logger.debug("served chain session failed", peer=stream.peer, reason=str(error))
        finally:
            self._count(response.outcome)

    def _count(self, outcome: Outcome) -> None:
        self._statistics.session_bytes_sent += outcome.bytes_sent
        self._statistics.session_bytes_received += outcome.bytes_received
        self._statistics.records_fetched += outcome.received

    def bans(self) -> dict[PeerId, Ban]:
        """Return the peers of which nothing is looked at now, and why."""
        return self._standings.bans(trio.current_time())

    def _penalise(self, peer: PeerId, standing: Standing, error: RemoteProtocolError) -> None:
        seconds = standing.penalise(trio.current_time(), str(error))
        self._statistics.offences += 1
        _logger.warning("peer barred: it broke a rule of the consensus", peer=peer, seconds=seconds, fault=str(error))

    async def _heed_connections(self) -> None:
        async with self._network.events() as events:
            async for event in events:
                if isinstance(event, PeerConnected):
                    self._neighbours.append(event.peer)
                    self._hurry.set()


def _is_timely(said: Said, epoch: int) -> bool:
    return isinstance(said.body, EquivocationRecord) or abs(said.body.epoch - epoch) <= 1


async def _first(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def _pay(buckets: Sequence[TokenBucket], amount: int) -> None:
    wait_s = max(bucket.spend(amount, trio.current_time()) for bucket in buckets)
    if wait_s >= 0.02:
        await trio.sleep(wait_s)
