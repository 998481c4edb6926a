from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from node.capabilities.inventory import REPEAT_AFTER_S, Inventory
from node.capabilities.measure import MeasurementError, Measurements, save_measurements
from node.capabilities.probe import fingerprint
from node.capabilities.traffic import TrafficMeter
from protocol.capabilities import Accelerator, Capabilities, Throughput
from tests.support.capabilities import EPYC, H100, peer_of

FACTS = replace(
    EPYC, processor=replace(EPYC.processor, throughput=Throughput()), memory=replace(EPYC.memory, total_bytes=1 << 45)
)


def measurements(share: float) -> Measurements:
    return Measurements(
        cpu=Throughput(fp32_flop_per_s=share * 1e9), cpu_share=share, accelerators=(H100, replace(H100, name="another"))
    )


class FakeBenchmark:
    """Takes three seconds, and finds the machine as busy as it is told."""

    def __init__(self, shares: Sequence[float | str]) -> None:
        self.asked: list[int] = []
        self.asked_at_s: list[float] = []
        self.known_before: list[float | None] = []
        self.started = trio.Event()
        self.inventory: Inventory | None = None
        self._shares = iter(shares)

    async def __call__(self, threads: int) -> Measurements:
        self.asked.append(threads)
        self.asked_at_s.append(trio.current_time())
        if self.inventory is not None:
            self.known_before.append(fp32(self.inventory))
        self.started.set()
        await trio.sleep(3)
        share = next(self._shares)
        if isinstance(share, str):
            raise MeasurementError(share)
        return measurements(share)


def inventory(
    tmp_path: Path, *shares: float | str, threads: int | None = None, accelerators: tuple[Accelerator, ...] = ()
) -> tuple[Inventory, FakeBenchmark]:
    benchmark = FakeBenchmark(shares)
    made = Inventory(
        data_dir=tmp_path,
        traffic=TrafficMeter(),
        connected=tuple,
        threads=threads,
        accelerators=accelerators,
        read_facts=lambda: FACTS,
        benchmark=benchmark,
    )
    benchmark.inventory = made
    return made, benchmark


def known(found: Inventory) -> Capabilities:
    capabilities = found.capabilities()
    assert capabilities is not None
    return capabilities


def fp32(found: Inventory) -> float | None:
    return known(found).processor.throughput.fp32_flop_per_s


async def test_facts_precede_measurements(tmp_path: Path, virtual_clock: MockClock) -> None:
    found, benchmark = inventory(tmp_path, 0.9)
    assert found.capabilities() is None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.run)
        await benchmark.started.wait()
        assert known(found).processor == FACTS.processor
        assert fp32(found) is None
    assert fp32(found) == pytest.approx(0.9e9)
    assert known(found).accelerators == ()
    assert benchmark.asked == [FACTS.processor.physical_cores]


async def test_only_the_accelerator_in_use_is_announced(tmp_path: Path, virtual_clock: MockClock) -> None:
    plain = replace(H100, throughput=Throughput())
    found, benchmark = inventory(tmp_path, 0.9, accelerators=(plain,))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.run)
        await benchmark.started.wait()
        assert known(found).accelerators == (plain,), "a GPU is a GPU before it is measured"
    assert known(found).accelerators == (H100,)
    strange = replace(plain, name="not measured")
    found, _ = inventory(tmp_path / "other", 0.9, accelerators=(strange,))
    await found.run()
    assert known(found).accelerators == (strange,)


async def test_first_measurement_waits_for_the_start(tmp_path: Path, virtual_clock: MockClock) -> None:
    found, benchmark = inventory(tmp_path, 0.9)
    started = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.run, started)
        await trio.sleep(20)
        assert benchmark.asked_at_s == []
        started.set()
    assert len(benchmark.asked_at_s) == 1


async def test_measurement_starts_after_the_timeout_without_a_start(tmp_path: Path, virtual_clock: MockClock) -> None:
    found, _ = inventory(tmp_path, 0.9)
    await found.run(trio.Event())
    assert fp32(found) == 0.9e9


async def test_a_restart_does_not_measure_again(tmp_path: Path, virtual_clock: MockClock) -> None:
    first, _ = inventory(tmp_path, 0.9)
    await first.run()
    second, benchmark = inventory(tmp_path)
    await second.run()
    assert benchmark.asked == []
    assert replace(known(second), memory=FACTS.memory) == replace(known(first), memory=FACTS.memory)


async def test_changed_thread_count_is_measured_again(tmp_path: Path, virtual_clock: MockClock) -> None:
    first, _ = inventory(tmp_path, 0.9)
    await first.run()
    second, benchmark = inventory(tmp_path, 0.8, threads=1)
    await second.run()
    assert benchmark.asked == [1]


async def test_measurement_of_a_busy_machine_is_repeated(tmp_path: Path, virtual_clock: MockClock) -> None:
    found, benchmark = inventory(tmp_path, 0.3, 0.2, 0.9, 1.0)
    await found.run()
    assert benchmark.known_before == [None, pytest.approx(0.3e9), pytest.approx(0.3e9)], "the better of two stays"
    assert fp32(found) == pytest.approx(0.9e9)
    first, second, third = benchmark.asked_at_s
    assert second - first >= REPEAT_AFTER_S[0]
    assert third - second >= REPEAT_AFTER_S[1]


async def test_repetitions_on_a_busy_machine_are_bounded(tmp_path: Path, virtual_clock: MockClock) -> None:
    found, benchmark = inventory(tmp_path, *[0.3] * 10)
    await found.run()
    assert len(benchmark.asked) == 1 + len(REPEAT_AFTER_S)


async def test_nodes_of_one_machine_share_measurements(tmp_path: Path, virtual_clock: MockClock) -> None:
    nodes = [inventory(tmp_path, 0.9) for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for found, _ in nodes:
            nursery.start_soon(found.run)
    assert sum(len(benchmark.asked) for _, benchmark in nodes) == 1
    assert [fp32(found) for found, _ in nodes] == [pytest.approx(0.9e9)] * 3


async def test_benchmark_lock_of_a_dead_node_is_released(tmp_path: Path, virtual_clock: MockClock) -> None:
    (dying, started), (found, benchmark) = inventory(tmp_path, 0.9), inventory(tmp_path, 0.8)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dying.run)
        await started.started.wait()
        nursery.cancel_scope.cancel()
    await found.run()
    assert len(benchmark.asked) == 1
    assert fp32(found) == pytest.approx(0.8e9)


async def test_better_measurements_of_another_node_are_used(tmp_path: Path, virtual_clock: MockClock) -> None:
    found, benchmark = inventory(tmp_path, 0.3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.run)
        await benchmark.started.wait()
        while fp32(found) is None:
            await trio.sleep(0.01)
        identifier = fingerprint(FACTS, FACTS.processor.physical_cores)
        save_measurements(tmp_path, identifier, measurements(0.95))
    assert len(benchmark.asked) == 1
    assert fp32(found) == pytest.approx(0.95e9)


async def test_a_failed_measurement_is_a_gap(tmp_path: Path, virtual_clock: MockClock) -> None:
    found, benchmark = inventory(tmp_path, *["the driver crashed"] * 10)
    await found.run()
    assert known(found).processor == FACTS.processor
    assert fp32(found) is None
    assert len(benchmark.asked) == 1 + len(REPEAT_AFTER_S)


async def test_failed_measurement_is_repeated(tmp_path: Path, virtual_clock: MockClock) -> None:
    found, benchmark = inventory(tmp_path, "it took too long", 0.9)
    await found.run()
    assert fp32(found) == pytest.approx(0.9e9)
    assert benchmark.asked_at_s[1] - benchmark.asked_at_s[0] >= REPEAT_AFTER_S[0]


async def test_links_and_free_memory_are_current(tmp_path: Path, virtual_clock: MockClock) -> None:
    traffic, connected = TrafficMeter(), [peer_of(5)]
    found = Inventory(
        data_dir=tmp_path,
        traffic=traffic,
        connected=lambda: connected,
        read_facts=lambda: FACTS,
        benchmark=FakeBenchmark([0.9]),
    )
    await found.run()
    assert known(found).links.neighbours == ()
    traffic.round_trip(peer_of(5), 0.1)
    assert [neighbour.peer for neighbour in known(found).links.neighbours] == [peer_of(5)]
    connected.clear()
    assert known(found).links.neighbours == ()
    assert 0 < known(found).memory.available_bytes < FACTS.memory.total_bytes
