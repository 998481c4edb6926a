"""Peers reach consensus despite packet loss, partitions, kills and liars: the daemon's code in virtual time."""

import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache

import trio

from node.consensus.chain_node import ChainNode
from node.consensus.environment import ConsensusEnvironment, ConsensusRules
from node.consensus.followed_chains import FollowedChains
from node.consensus.service import ConsensusService
from node.identity import Identity
from node.network.interface import NetworkError
from node.stages.voter import Agreement
from node.storage.chain_store import ChainStore
from node.testing.chain_store import memory_chain_store
from node.testing.memory_history import MemoryHistory
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetwork, MemoryNetworkHub
from node.util.offload import run_inline
from protocol.consensus import SignedMessage, sign_message, verify_message
from protocol.consensus_values import Cell, Commit, Reveal, Signature
from protocol.identity import ModelId
from selector.consensus.clock import EpochClock
from selector.consensus.sortition import MeasurementPlan
from tests.simulation import virtual_time
from tests.support.agreement import IdleMeter

MODEL = ModelId("ab" * 32)
PLAN = MeasurementPlan(("long", "short"), ("fast", "odd", "slow"))
EPOCH_S = 60.0
BEGINNING_S = 1_750_000_020.0
HARDWARE = "two cores"
NEIGHBOURS = 6

_verify_once = lru_cache(maxsize=1 << 16)(verify_message)


def truth(cell: Cell) -> float:
    return {"fast": -1.0, "slow": 0.7, "odd": 0.0}[cell.method] + len(cell.workload) / 100


def lie(cell: Cell) -> float:
    return -3.0 if cell.method == "slow" else truth(cell)


@dataclass
class Meter(IdleMeter):
    """A peer's readings, true or not."""

    reading: Callable[[Cell], float]
    seconds: float = 3.0
    measured: list[Cell] = field(default_factory=list)

    async def measure(self, cell: Cell) -> float | None:
        await trio.sleep(self.seconds)
        self.measured.append(cell)
        return self.reading(cell)


@dataclass
class Peer:
    """A peer, also while it is down: its identity and store survive."""

    identity: Identity
    meter: Meter
    serves: bool
    skew_s: float
    network: MemoryNetwork
    store: ChainStore = field(default_factory=memory_chain_store)
    consensus: ConsensusService = field(init=False)
    chains: FollowedChains = field(init=False)

    @property
    def agreement(self) -> Agreement | None:
        return self.chains.agreement(MODEL)

    @property
    def node(self) -> ChainNode:
        return self.chains.nodes[MODEL]


class Swarm:
    def __init__(self, seed: int, loss: float = 0.0, skew_s: float = 1.0) -> None:
        self.rng = random.Random(seed)
        link = LinkModel(latency_s=0.03, jitter_s=0.04, loss=loss, resolution_s=0.01)
        self.hub = MemoryNetworkHub(random.Random(self.rng.random()), link)
        self.peers: list[Peer] = []
        self.verify: Callable[[bytes], SignedMessage] = _verify_once
        self._skew_s = skew_s
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def running(self, count: int, liars: int = 0) -> AsyncIterator[None]:
        async with trio.open_nursery() as self._nursery:
            for number in range(count):
                await self.join(lie if number < liars else truth)
            yield
            self._nursery.cancel_scope.cancel()

    async def join(self, reading: Callable[[Cell], float] = truth, *, serves: bool = True) -> Peer:
        identity = Identity(self.rng.randbytes(32))
        skew_s = self.rng.uniform(-self._skew_s, self._skew_s)
        peer = Peer(identity, Meter(reading), serves, skew_s, self.hub.network(identity.peer_id))
        self.peers.append(peer)
        await self.start(peer)
        return peer

    async def restart(self, peer: Peer) -> None:
        peer.network = self.hub.network(peer.identity.peer_id)
        await self.start(peer)

    async def start(self, peer: Peer) -> None:
        assert self._nursery is not None
        await self._nursery.start(self._run, peer)

    async def _run(self, peer: Peer, task_status: trio.TaskStatus[None]) -> None:
        jitter = random.Random(self.rng.random())
        peer.chains = FollowedChains()
        environment = ConsensusEnvironment(
            identity=peer.identity,
            store=peer.store,
            history=MemoryHistory(),
            models=lambda: {MODEL: peer.serves},
            hardware=lambda: HARDWARE,
            meter=lambda _: peer.meter,
            wall_clock=lambda: BEGINNING_S + trio.current_time() + peer.skew_s,
            offload=run_inline,
            nonce=lambda: jitter.randbytes(32),
            verify=lambda envelope: self.verify(envelope),
        )
        rules = ConsensusRules(swarm=b"swarm", plan=PLAN, clock=EpochClock(EPOCH_S))
        peer.consensus = ConsensusService(peer.network, peer.chains, environment, rules.clock, lambda _: rules, jitter)
        async with peer.network.running(), trio.open_nursery() as nursery:
            task_status.started()
            nursery.start_soon(self._keep_neighbours, peer, jitter)
            nursery.start_soon(peer.consensus.run)

    async def _keep_neighbours(self, peer: Peer, jitter: random.Random) -> None:
        while True:
            live = [each.network for each in self.peers if each.network.alive and each is not peer]
            missing = NEIGHBOURS - len(peer.network.connected_peers())
            for other in jitter.sample(live, max(0, min(missing, len(live)))):
                with suppress(NetworkError):
                    await peer.network.connect(other.multiaddrs[0])
            await trio.sleep(jitter.uniform(2, 4))

    def heads(self, peers: list[Peer] | None = None) -> set[bytes | None]:
        live = [peer for peer in peers or self.peers if peer.network.alive]
        return {peer.agreement.statement if peer.agreement else None for peer in live}

    async def until_one_head(self, within_s: float, after_epoch: int = -1) -> Agreement:
        """Wait until all live peers have the same head, of a later epoch; return the agreement."""
        with trio.fail_after(within_s):
            while True:
                await trio.sleep(1)
                agreement = self.peers[-1].agreement
                if agreement and agreement.epoch > after_epoch and self.heads() == {agreement.statement}:
                    return agreement


def test_peers_agree_despite_twenty_percent_packet_loss() -> None:
    async def program() -> tuple[Agreement, int]:
        swarm = Swarm(seed=1, loss=0.2)
        async with swarm.running(9):
            await trio.sleep(10 * EPOCH_S)
            agreement = await swarm.until_one_head(EPOCH_S)
            return agreement, max(len(peer.meter.measured) for peer in swarm.peers)

    agreement, measured = virtual_time.run(program, seed=1)
    assert agreement.epoch >= (BEGINNING_S + 9 * EPOCH_S) // EPOCH_S
    assert len(agreement.weights) == 9
    assert len(agreement.table) == 6
    assert all(math.isclose(entry.value / 1e6, truth(cell), abs_tol=1e-6) for cell, entry in agreement.table.items())
    assert 1 <= measured <= 2 * 12


def test_partition_heals_to_the_branch_with_the_quorum() -> None:
    async def program() -> tuple[int, set[bytes | None], set[bytes], int]:
        swarm = Swarm(seed=2)
        async with swarm.running(9):
            before = await swarm.until_one_head(4 * EPOCH_S)
            most, few = swarm.peers[:7], swarm.peers[7:]
            swarm.hub.partition([[peer.identity.peer_id for peer in group] for group in (most, few)])
            await trio.sleep(4 * EPOCH_S)
            assert swarm.heads(few) != swarm.heads(most)
            agreed = swarm.heads(most)
            swarm.hub.heal()
            agreement = await swarm.until_one_head(3 * EPOCH_S)
            path = {entry.id for entry in few[0].node.replica.chain.canonical()}
            return before.epoch, agreed, path, agreement.epoch

    before, agreed, path, after = virtual_time.run(program, seed=2)
    assert agreed <= path
    assert after >= before + 3


def test_liars_lose_reputation() -> None:
    async def program() -> tuple[Agreement, list[str], list[str]]:
        swarm = Swarm(seed=3)
        async with swarm.running(12, liars=3):
            await trio.sleep(15 * EPOCH_S)
            agreement = await swarm.until_one_head(EPOCH_S)
            names = [peer.identity.peer_id for peer in swarm.peers]
            return agreement, [*names[:3]], [*names[3:]]

    agreement, liars, honest = virtual_time.run(program, seed=3)
    assert max(agreement.weights[peer] for peer in liars) < min(agreement.weights[peer] for peer in honest)
    assert all(math.isclose(entry.value / 1e6, truth(cell), abs_tol=1e-6) for cell, entry in agreement.table.items())


def test_equivocator_is_expelled_by_gossiped_proof() -> None:
    async def program() -> tuple[list[tuple[str, ...]], str]:
        swarm = Swarm(seed=4)
        async with swarm.running(6):
            await swarm.until_one_head(4 * EPOCH_S)
            cheat = swarm.peers[0]
            epoch = cheat.node.clock.epoch_at(cheat.node.now_s())
            for statement in (bytes(32), bytes([1]) * 32):
                body = Signature(cheat.node.genesis, epoch, cheat.identity.peer_id, statement)
                cheat.consensus._publish([sign_message(body, cheat.identity.private_key)])
                await trio.sleep(1)
            await trio.sleep(3 * EPOCH_S)
            states = [peer.node.replica.participant.state() for peer in swarm.peers[1:]]
            return [state.banned for state in states if state], cheat.identity.peer_id

    expelled, cheat = virtual_time.run(program, seed=4)
    assert expelled == [(cheat,)] * 5


def test_message_that_a_peer_fetched_reaches_all_others_by_gossip() -> None:
    """A member that gossips nothing, so as to decide by answering who has its messages, decides nothing."""

    async def program() -> tuple[int, float]:
        swarm = Swarm(seed=8)
        async with swarm.running(8):
            await swarm.until_one_head(4 * EPOCH_S)
            silent, others = swarm.peers[0], swarm.peers[1:]
            silent.consensus._gossip.publish = lambda envelopes: None  # type: ignore[method-assign]
            epoch = silent.node.clock.epoch_at(silent.node.now_s())
            await trio.sleep(silent.node.clock.starts_s(epoch + 1) - silent.node.now_s())

            def held() -> int:
                logs = (peer.node.replica.log.recent().values() for peer in others)
                name = silent.identity.peer_id
                return sum(any(each.peer == name and each.epoch == epoch + 1 for each in log) for log in logs)

            while not held():
                await trio.sleep(0.05)
            began_s = trio.current_time()
            while held() < len(others):
                await trio.sleep(0.05)
            return held(), trio.current_time() - began_s

    held, seconds = virtual_time.run(program, seed=8)
    assert held == 7
    assert seconds < EPOCH_S / 100


def test_newcomer_without_a_span_adopts_the_agreed_table() -> None:
    async def program() -> tuple[float, bytes, bytes]:
        swarm = Swarm(seed=5)
        async with swarm.running(4):
            await trio.sleep(8 * EPOCH_S + 10)
            agreed = swarm.peers[0].agreement
            assert agreed
            newcomer = await swarm.join(serves=False)
            began_s = trio.current_time()
            with trio.fail_after(20):
                while newcomer.agreement is None or newcomer.agreement.statement != agreed.statement:
                    await trio.sleep(0.1)
            return trio.current_time() - began_s, agreed.table_digest, newcomer.agreement.table_digest

    seconds, table, adopted = virtual_time.run(program, seed=5)
    assert table == adopted
    assert seconds < 20


def test_killed_and_restarted_peers_never_equivocate() -> None:
    async def program() -> tuple[dict[tuple[str, int, bytes | None], set[bytes]], int, int]:
        swarm = Swarm(seed=6, loss=0.1)
        signed: dict[tuple[str, int, bytes | None], set[bytes]] = {}

        def verify_and_note(envelope: bytes) -> SignedMessage:
            message = _verify_once(envelope)
            body = message.body
            if isinstance(body, Commit):
                signed.setdefault((message.peer, body.epoch, body.parent), set()).add(envelope)
            elif isinstance(body, Reveal):
                signed.setdefault((message.peer, body.epoch, body.commitment), set()).add(envelope)
            elif isinstance(body, Signature):
                signed.setdefault((message.peer, body.epoch, None), set()).add(envelope)
            return message

        swarm.verify = verify_and_note
        async with swarm.running(5):
            for number in range(60):
                await trio.sleep(swarm.rng.uniform(1, 15))
                peer = swarm.peers[number % 3]
                swarm.hub.kill(peer.identity.peer_id)
                await trio.sleep(swarm.rng.uniform(0, 3))
                await swarm.restart(peer)
            agreement = await swarm.until_one_head(6 * EPOCH_S)
            equivocations = sum(len(peer.node.replica.log.equivocators) for peer in swarm.peers)
            return signed, equivocations, agreement.epoch

    signed, equivocations, _ = virtual_time.run(program, seed=6)
    assert len(signed) > 20
    assert {len(envelopes) for envelopes in signed.values()} == {1}
    assert equivocations == 0
