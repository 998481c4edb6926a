"""A bad day in the life of a swarm, and what became of its history."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import trio

from node.swarm.heartbeats import heartbeat_interval_s
from node.testing.memory_links import LinkModel
from tests.simulation import virtual_time
from tests.simulation.swarm import SimulatedPeer, Swarm, signatures_verified_once

SETTLE_S = 10.0
CONVERGENCE_LIMIT_S = 300.0
RESOLUTION_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What befalls the swarm. `faults_s`: how long observations, joins and leaves go on."""

    peers: int
    seed: int = 1
    loss: float = 0.3
    faults_s: float = 100.0
    partition_at_s: float = 20.0
    partition_s: float = 60.0
    joins_per_s: float = 1.0
    leaves_per_s: float = 1.0
    observations_per_s: float = 5.0
    clock_skew_s: float = 20.0
    idle_s: float = 10.0
    with_membership: bool = True

    @property
    def heartbeat_interval_s(self) -> float:
        """Between the heartbeats of a peer, once all know each other."""
        return heartbeat_interval_s(self.peers)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of it."""

    peers: int
    """Alive at the end."""
    observations: int
    held: int
    """By every peer at the end."""
    lost_with_their_observer: int
    """Nobody else had them when their only holder was killed, which did not come back."""
    missing: int
    """Observations that a live peer was acknowledged and that not everybody holds."""
    convergence_s: float
    """From the last fault until all hold the same; messages go on being lost."""
    median_delay_s: float
    p99_delay_s: float
    """From an observation to its arrival at a peer that was there when it was made."""
    busy_bytes_per_s: float
    """Sent by a peer, on average, while faults and observations went on."""
    idle_bytes_per_s: float
    """The same when all hold the same and nothing happens."""
    sync_share: float
    """Of the bytes in all, what anti-entropy sent."""
    trace: str


def play(scenario: Scenario) -> Result:
    """Return what becomes of a scenario; the same every time."""

    async def program() -> Result:
        swarm = Swarm(
            seed=scenario.seed,
            link=LinkModel(latency_s=0.03, jitter_s=0.04, loss=scenario.loss, resolution_s=RESOLUTION_S),
            clock_skew_s=scenario.clock_skew_s,
            with_membership=scenario.with_membership,
        )
        async with swarm.running(scenario.peers):
            return await _Play(scenario, swarm).run()

    with signatures_verified_once():
        return virtual_time.run(program, seed=scenario.seed)


class _Play:
    def __init__(self, scenario: Scenario, swarm: Swarm) -> None:
        self._scenario = scenario
        self._swarm = swarm
        self._rng = random.Random(swarm.rng.random())
        self._down: list[SimulatedPeer] = []
        self._groups: list[list[SimulatedPeer]] = []

    async def run(self) -> Result:
        scenario, swarm = self._scenario, self._swarm
        await trio.sleep(SETTLE_S + 2 * scenario.heartbeat_interval_s)
        before = self._bytes_sent()
        with trio.move_on_after(scenario.faults_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._again_and_again, scenario.observations_per_s, self._observe)
                nursery.start_soon(self._again_and_again, scenario.joins_per_s, self._join)
                nursery.start_soon(self._again_and_again, scenario.leaves_per_s, self._leave)
                nursery.start_soon(self._partition)
        busy_bytes = self._bytes_sent() - before
        convergence_s = await swarm.until_converged(CONVERGENCE_LIMIT_S)
        before = self._bytes_sent()
        await trio.sleep(scenario.idle_s)
        idle_bytes = self._bytes_sent() - before
        live = swarm.live()
        held = live[0].history.envelopes.keys()
        delays_s = sorted(swarm.trace.delays_s)
        sync_bytes = sum(peer.dissemination.statistics().sync_bytes_sent for peer in swarm.peers)
        return Result(
            peers=len(live),
            observations=len(swarm.acknowledged),
            held=len(held),
            lost_with_their_observer=len(swarm.acknowledged.keys() - held),
            missing=len(swarm.lost()),
            convergence_s=convergence_s,
            median_delay_s=delays_s[len(delays_s) // 2],
            p99_delay_s=delays_s[len(delays_s) * 99 // 100],
            busy_bytes_per_s=busy_bytes / scenario.faults_s / scenario.peers,
            idle_bytes_per_s=idle_bytes / scenario.idle_s / len(live),
            sync_share=sync_bytes / self._bytes_sent(),
            trace=swarm.trace.digest(),
        )

    def _bytes_sent(self) -> int:
        return sum(self._swarm.hub.bytes_sent.values())

    async def _again_and_again(self, rate: float, act: Callable[[trio.Nursery], None]) -> None:
        async with trio.open_nursery() as nursery:
            while rate:
                await trio.sleep(self._rng.expovariate(rate))
                act(nursery)

    def _observe(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._swarm.observe, self._rng.choice(self._swarm.live()))

    def _join(self, nursery: trio.Nursery) -> None:
        """Have a newcomer join or, as likely, one come back that was killed."""
        if self._down and self._rng.random() < 0.5:
            peer = self._down.pop(self._rng.randrange(len(self._down)))
            nursery.start_soon(self._swarm.restart, peer)
        else:
            nursery.start_soon(self._join_as_newcomer)

    async def _join_as_newcomer(self) -> None:
        peer = await self._swarm.join()
        if self._groups:
            self._rng.choice(self._groups).append(peer)
            self._cut()

    def _leave(self, nursery: trio.Nursery) -> None:
        """Kill a peer or, as likely, have it leave in good order."""
        if mortal := self._swarm.mortal():
            peer = self._rng.choice(mortal)
            if self._rng.random() < 0.5:
                self._swarm.kill(peer)
                self._down.append(peer)
            else:
                nursery.start_soon(self._swarm.leave, peer)

    async def _partition(self) -> None:
        await trio.sleep(self._scenario.partition_at_s)
        everybody = list(self._swarm.peers)
        self._rng.shuffle(everybody)
        self._groups = [everybody[::2], everybody[1::2]]
        self._cut()
        await trio.sleep(self._scenario.partition_s)
        self._groups = []
        self._swarm.hub.heal()

    def _cut(self) -> None:
        self._swarm.hub.partition([[peer.peer_id for peer in group] for group in self._groups])
