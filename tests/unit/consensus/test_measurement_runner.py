"""All that measurements for the swarm compute is charged, whatever comes of them."""

import random
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from node.consensus.measurement_runner import MeasurementRunner
from node.consensus.measuring_allowance import INITIAL_S, MeasuringAllowance
from node.coordinator.observation import Recorder
from node.coordinator.trial_runner import BenchmarkRunner
from node.identity import Identity
from node.storage.database import StorageFull
from node.testing.fake_engine import FAKE_MODEL
from protocol.consensus_values import Cell
from protocol.observations import SignedObservation
from selector.task import method
from selector.workloads import WORKLOADS
from tests.support.capabilities import EPYC
from tests.support.job_peers import HARDWARE, Peer, open_swarm

CELL = Cell(HARDWARE, next(iter(WORKLOADS)), method(engine="fused").name)
THREADS = EPYC.processor.physical_cores


class Recorded(MeasuringAllowance):
    """Keeps what is charged."""

    def __init__(self) -> None:
        super().__init__(0.1, lambda: 0.0)
        self.charges: list[float] = []

    def spend(self, seconds: float, *, is_done: bool = True) -> None:
        self.charges.append(seconds)
        super().spend(seconds)


async def ignore(observation: SignedObservation) -> None:
    del observation
    await trio.lowlevel.checkpoint()


def runner_at(
    peer: Peer, publish: Callable[[SignedObservation], Awaitable[None]] = ignore, allowance: Recorded | None = None
) -> tuple[MeasurementRunner, Recorded]:
    recorder, allowance = Recorder(Identity(b"7" * 32), publish), allowance or Recorded()
    runner = MeasurementRunner(
        BenchmarkRunner(peer.coordinator, recorder),
        FAKE_MODEL,
        lambda: False,
        random.Random(1),
        allowance=allowance,
        quality=lambda _: None,
        own_peer=peer.id,
    )
    return runner, allowance


async def test_observations_of_an_earlier_process_are_published_when_their_readings_are_revealed(
    virtual_clock: MockClock,
) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9))
        await swarm.settle()
        first, _ = runner_at(peer)
        assert await first.measure(CELL) is not None
        saved, published = first.withheld(), list[SignedObservation]()
        assert saved

        async def publish(observation: SignedObservation) -> None:
            await ignore(observation)
            if is_full:
                raise StorageFull("no space left")
            published.append(observation)

        is_full = True
        restarted, _ = runner_at(peer, publish)
        restarted.restore(saved)
        await restarted.revealed()
        assert restarted.withheld() == saved, "it is tried again with the next reveal"
        is_full = False
        await restarted.revealed()
        assert [each.envelope for each in published] == saved
        assert restarted.withheld() == []


def computed_s(peer: Peer) -> float:
    return sum(span.engine.statistics().compute_s for span in peer.stages.spans())


async def test_whatever_a_measurement_computes_is_charged(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9))
        await swarm.settle()
        runner, allowance = runner_at(peer)
        assert await runner.measure(CELL) is not None
        assert allowance.charges == [pytest.approx(THREADS * computed_s(peer))], "the warm-up, too"


async def test_measurement_that_is_broken_off_is_charged(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9), step_s=1.0)
        await swarm.settle()
        runner, allowance = runner_at(peer)
        with trio.move_on_after(20):
            await runner.measure(CELL)
        assert len(allowance.charges) == 1
        assert THREADS * computed_s(peer) <= allowance.charges[0] <= THREADS * 20
        assert not allowance.is_left


async def test_first_cell_of_a_large_model_is_read_though_it_takes_more_than_there_is(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9), step_s=0.5)
        await swarm.settle()
        runner, allowance = runner_at(peer)
        assert await runner.measure(CELL) is not None
        assert sum(allowance.charges) > INITIAL_S
        await trio.sleep(1800)
        assert await runner.measure(CELL) is None
        assert len(allowance.charges) == 1


async def test_only_one_of_several_models_is_measured_first_whatever_it_takes(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9), step_s=0.5)
        await swarm.settle()
        runner, allowance = runner_at(peer)
        other, _ = runner_at(peer, allowance=allowance)
        readings: list[float | None] = []

        async def measure(by: MeasurementRunner) -> None:
            readings.append(await by.measure(CELL))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(measure, runner)
            nursery.start_soon(measure, other)
        assert sorted(each is None for each in readings) == [False, True]
        assert allowance.charges == [pytest.approx(THREADS * computed_s(peer))], "the other waits, and finds none left"


async def test_cell_that_takes_longer_than_there_is_left_is_given_up_once(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9), step_s=0.5)
        await swarm.settle()
        runner, allowance = runner_at(peer)
        allowance.spend(1.0)  # by the first one
        assert await runner.measure(CELL) is None
        assert INITIAL_S / 2 < THREADS * computed_s(peer) <= INITIAL_S + THREADS * 0.5
        await trio.sleep(1800)  # there would be time again
        charges = len(allowance.charges)
        assert await runner.measure(CELL) is None
        assert len(allowance.charges) == charges, "nothing is computed for it again"


async def test_node_reports_no_reading_of_a_route_without_itself(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        part, whole = await swarm.join((0, 5), step_s=0.1), await swarm.join((0, 9), step_s=0.01)
        rest = await swarm.join((5, 9), step_s=0.01)
        await swarm.settle()
        assert await runner_at(part)[0].measure(CELL) is None
        assert computed_s(part) == 0
        swarm.hub.kill(whole.id)
        assert await runner_at(rest)[0].measure(CELL) is not None
