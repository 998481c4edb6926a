"""A swarm in memory and in virtual time: real dissemination over links that lose, between peers that come and go."""

import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from unittest.mock import patch

import trio

from node.identity import Identity
from node.network.interface import NetworkError
from node.replication.observations import ObservationReplicator, ReplicationLimits
from node.swarm.dht_records import RecordKinds
from node.swarm.heartbeats import OwnServices
from node.swarm.membership import Membership
from node.testing.memory_history import MemoryHistory
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetwork, MemoryNetworkHub
from node.testing.memory_stream import Packet
from protocol import records as signed_records
from protocol.identity import JobId, PeerId
from protocol.observations import SignedObservation, sign_observation, verify_observation
from tests.support.observations import observation

EPOCH_S = 1_750_000_000
"""Unix time at the start of a simulation."""

NEIGHBOURS = 8

# Whether a signature is right does not depend on who looks at it. All peers live in one process, which looks once.
_verify_once = lru_cache(maxsize=1 << 17)(verify_observation)


@contextmanager
def signatures_verified_once() -> Iterator[None]:
    """Inside the block no signature of a record, either, is verified twice."""
    with patch.object(signed_records, "verify_envelope", lru_cache(maxsize=1 << 12)(signed_records.verify_envelope)):
        yield


class MeteredHub(MemoryNetworkHub):
    """Counts what each peer sends, gossip that it forwards included."""

    def __init__(self, rng: random.Random, link: LinkModel) -> None:
        super().__init__(rng, link)
        self.bytes_sent: Counter[PeerId] = Counter()

    def send(self, packet: Packet) -> None:
        self.bytes_sent[packet.sender] += packet.size
        super().send(packet)


class Trace:
    """Who took in what, and when."""

    def __init__(self) -> None:
        self.published_at_s: dict[bytes, float] = {}
        self.delays_s: list[float] = []
        self.last_arrival_s = 0.0
        self._hashed = hashlib.sha256()

    def arrived(self, peer: PeerId, observations: Sequence[SignedObservation]) -> None:
        now_s = trio.current_time()
        for signed in observations:
            self._hashed.update(f"{now_s!r} {peer} ".encode() + signed.id)
            self.delays_s.append(now_s - self.published_at_s[signed.id])
            self.last_arrival_s = now_s

    def digest(self) -> str:
        return self._hashed.hexdigest()


class TracedHistory(MemoryHistory):
    def __init__(self, peer: PeerId, trace: Trace) -> None:
        super().__init__()
        self._peer = peer
        self._trace = trace

    async def add_many(self, observations: Sequence[SignedObservation]) -> Sequence[SignedObservation]:
        new = await super().add_many(observations)
        self._trace.arrived(self._peer, new)
        return new


@dataclass
class SimulatedPeer:
    """A peer, also while it is down: identity and history outlive the process."""

    number: int
    identity: Identity
    history: TracedHistory
    clock_skew_s: float
    network: MemoryNetwork
    dissemination: ObservationReplicator = field(init=False)
    membership: Membership | None = field(init=False, default=None)

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    @property
    def alive(self) -> bool:
        return self.network.alive


class Swarm:
    """All peers of a simulation. Everything that is left to chance is drawn from the seed."""

    def __init__(
        self,
        *,
        seed: int,
        link: LinkModel,
        clock_skew_s: float = 0.0,
        with_membership: bool = True,
        limits: ReplicationLimits | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.hub = MeteredHub(random.Random(self.rng.random()), link)
        self.trace = Trace()
        self.peers: list[SimulatedPeer] = []
        self.acknowledged: dict[bytes, SimulatedPeer] = {}
        """Who published an observation, by its id."""
        self._clock_skew_s = clock_skew_s
        self._with_membership = with_membership
        self._limits = limits or ReplicationLimits()
        self._bootstrap: list[str] = []
        self._jobs = 0
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def running(self, count: int, bootstrap_count: int = 3) -> AsyncIterator[None]:
        """Start some peers, the first few of which the others know of; all end with the block."""
        async with trio.open_nursery() as self._nursery:
            for _ in range(count):
                peer = await self.join()
                if len(self._bootstrap) < bootstrap_count:
                    self._bootstrap.append(peer.network.multiaddrs[0])
            yield
            self._nursery.cancel_scope.cancel()

    def live(self) -> list[SimulatedPeer]:
        return [peer for peer in self.peers if peer.alive]

    def mortal(self) -> list[SimulatedPeer]:
        """Return the live peers that are not bootstrap peers."""
        return [peer for peer in self.peers[len(self._bootstrap) :] if peer.alive]

    async def join(self) -> SimulatedPeer:
        """Add a peer that nobody has heard of."""
        identity = Identity(self.rng.randbytes(32))
        peer = SimulatedPeer(
            len(self.peers),
            identity,
            TracedHistory(identity.peer_id, self.trace),
            self.rng.uniform(-self._clock_skew_s, self._clock_skew_s),
            self.hub.network(identity.peer_id),
        )
        self.peers.append(peer)
        await self.start(peer)
        return peer

    async def start(self, peer: SimulatedPeer) -> None:
        """Start a peer."""
        assert self._nursery is not None
        await self._nursery.start(self._run, peer)

    async def restart(self, peer: SimulatedPeer) -> None:
        """Start a peer again with what its disk held."""
        peer.network = self.hub.network(peer.peer_id)
        await self.start(peer)

    def kill(self, peer: SimulatedPeer) -> None:
        self.hub.kill(peer.peer_id)

    async def leave(self, peer: SimulatedPeer) -> None:
        """Have a peer leave in good order."""
        await peer.dissemination.leave()
        self.kill(peer)

    async def _run(self, peer: SimulatedPeer, task_status: trio.TaskStatus[None]) -> None:
        network = peer.network
        jitter = random.Random(self.rng.random())

        def wall_clock() -> float:
            return EPOCH_S + trio.current_time() + peer.clock_skew_s

        records = RecordKinds(network)
        if self._with_membership:
            peer.membership = Membership(
                network=network,
                identity=peer.identity,
                services=OwnServices(agent="simulated", served_spans=tuple),
                bootstrap=self._bootstrap,
                records=records,
                jitter=jitter,
                wall_clock=wall_clock,
            )
        peer.dissemination = ObservationReplicator(
            network=network,
            identity=peer.identity,
            history=peer.history,
            records=records,
            jitter=jitter,
            wall_clock=wall_clock,
            limits=self._limits,
            verify_envelope=_verify_once,
        )
        async with network.running(), trio.open_nursery() as nursery:
            task_status.started()
            nursery.start_soon(
                peer.membership.run if peer.membership else partial(self._keep_neighbours, network, jitter)
            )
            nursery.start_soon(peer.dissemination.run)

    async def _keep_neighbours(self, network: MemoryNetwork, jitter: random.Random) -> None:
        """Stand in for the membership, whose heartbeats at a thousand peers would take hours of real time."""
        while True:
            addresses = list(self._bootstrap)
            missing = NEIGHBOURS - len(network.connected_peers())
            if missing > 0:
                live = [peer.network for peer in self.live()]
                addresses += [other.multiaddrs[0] for other in jitter.sample(live, min(missing, len(live)))]
            for address in addresses:
                if network.peer_id not in address:
                    with suppress(NetworkError):
                        await network.connect(address)
            await trio.sleep(jitter.uniform(2, 4))

    async def observe(self, peer: SimulatedPeer) -> None:
        """Have a peer observe something and publish it."""
        self._jobs += 1
        made = observation(issued_at_s=int(EPOCH_S + trio.current_time() + peer.clock_skew_s))
        stage = replace(made.route[0], peer=peer.peer_id)
        made = replace(made, observer=peer.peer_id, job=JobId(f"{self._jobs:032x}"), route=(stage,))
        signed = sign_observation(made, peer.identity.private_key)
        self.trace.published_at_s[signed.id] = trio.current_time()
        await peer.dissemination.publish(signed)
        self.acknowledged[signed.id] = peer

    def is_converged(self) -> bool:
        """Say whether all live peers hold the same, and all that live peers were acknowledged."""
        live = self.live()
        first = live[0].history.envelopes.keys()
        return all(peer.history.envelopes.keys() == first for peer in live) and not self.lost()

    def lost(self) -> set[bytes]:
        """Return the ids that live peers were acknowledged and that some live peer does not hold."""
        held = set.intersection(*(set(peer.history.envelopes) for peer in self.live()))
        return {content_id for content_id, peer in self.acknowledged.items() if peer.alive and content_id not in held}

    async def until_converged(self, within_s: float) -> float:
        """Wait until everybody holds the same; return how long that took. Raises TooSlowError."""
        started_s = trio.current_time()
        with trio.fail_after(within_s):
            while not self.is_converged():
                await trio.sleep(0.5)
        return trio.current_time() - started_s
