"""This node's own capabilities: probed facts, measured throughput, observed links."""

import dataclasses
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog
import trio

from node.capabilities.measure import (
    MeasurementError,
    Measurements,
    load_measurements,
    measuring_alone,
    run_benchmark,
    save_measurements,
)
from node.capabilities.probe import available_memory, fingerprint, probe
from node.capabilities.traffic import TrafficMeter
from protocol.capabilities import Accelerator, Capabilities, Throughput
from protocol.figures import USUAL_PRICE
from protocol.identity import PeerId

GOOD_SHARE: Final = 0.75
"""A benchmark that got a smaller share of the processor measured the load of the machine, and is repeated."""

REPEAT_AFTER_S: Final = (600.0, 1800.0, 7200.0)
"""Pauses before each repetition of a measurement that failed, or that a busy machine distorted."""

STARTING_S: Final = 60.0
"""Longest wait of a first measurement for the start of the node: both need the whole processor."""

OTHERS_TURN_S: Final = 5.0
"""Poll interval while another node measures this machine."""

Benchmark = Callable[[int], Awaitable[Measurements]]

_logger = structlog.get_logger(__name__)


class Inventory:
    """The capabilities as far as they are known: facts first, then measurements, and links from traffic."""

    def __init__(
        self,
        *,
        data_dir: Path,
        traffic: TrafficMeter,
        connected: Callable[[], Collection[PeerId]],
        threads: int | None = None,
        accelerators: tuple[Accelerator, ...] = (),
        price: float = USUAL_PRICE,
        read_facts: Callable[[], Capabilities] = probe,
        benchmark: Benchmark = run_benchmark,
    ) -> None:
        """Measure with `threads` threads, or one for each physical core.

        `data_dir`: stores the measurements; the nodes of one machine may share it. `accelerators`: the devices of
        the engines, if not the CPU; others are not announced. `price`: of a second of computing. `connected`: the
        peers whose links count.
        """
        self._data_dir = data_dir
        self._traffic = traffic
        self._connected = connected
        self._threads = threads
        self._accelerators = accelerators
        self._price = price
        self._read_facts = read_facts
        self._benchmark = benchmark
        self._facts: Capabilities | None = None
        self._available_bytes = 0

    def capabilities(self) -> Capabilities | None:
        """Return the capabilities known so far; None until the facts are probed."""
        if self._facts is None:
            return None
        with suppress(OSError):  # out of file descriptors: the last value stands
            self._available_bytes = available_memory()
        available_bytes = min(self._available_bytes, self._facts.memory.total_bytes)
        memory = dataclasses.replace(self._facts.memory, available_bytes=available_bytes)
        return dataclasses.replace(self._facts, memory=memory, links=self._traffic.links(self._connected()))

    async def run(self, started: trio.Event | None = None) -> None:
        """Probe the facts, measure unless this hardware was measured before, and return.

        `started`: set once the node is started; a first measurement waits for it.
        """
        facts = await trio.to_thread.run_sync(self._read_facts)
        self._facts = facts = dataclasses.replace(facts, accelerators=self._accelerators)
        threads = self._threads or facts.processor.physical_cores
        identifier = await trio.to_thread.run_sync(fingerprint, facts, threads)
        # Of the announced facts only: machines that are measured alike keep their fingerprint.
        processor = dataclasses.replace(facts.processor, threads=self._threads)
        price = None if self._price == USUAL_PRICE else self._price
        self._facts = facts = dataclasses.replace(facts, processor=processor, price=price)
        best = await trio.to_thread.run_sync(load_measurements, self._data_dir, identifier)
        if best is not None:
            self._facts = _with_measurements(facts, best)
        elif started is not None:
            with trio.move_on_after(STARTING_S):
                await started.wait()
        # A starting node does not repeat a measurement at once.
        for pause_s in REPEAT_AFTER_S if best is not None else (0.0, *REPEAT_AFTER_S):
            if best is not None and best.cpu_share >= GOOD_SHARE:
                return
            await trio.sleep(pause_s)
            try:
                measured = await self._measure(identifier, threads, best)
            except MeasurementError as error:
                _logger.warning("benchmark failed", reason=str(error))
                continue
            if best is None or measured.cpu_share > best.cpu_share:
                best = measured
                self._facts = _with_measurements(facts, best)

    async def _measure(self, identifier: str, threads: int, best: Measurements | None) -> Measurements:
        """Return new measurements, or better ones that another node of this machine stored; store the best."""
        while True:
            with measuring_alone(self._data_dir) as alone:
                if alone:
                    stored = await trio.to_thread.run_sync(load_measurements, self._data_dir, identifier)
                    if stored is not None and (best is None or stored.cpu_share > best.cpu_share):
                        return stored
                    measured = await self._benchmark(threads)
                    _logger.info("machine measured", cpu_share=round(measured.cpu_share, 2), gaps=measured.gaps)
                    if best is None or measured.cpu_share > best.cpu_share:
                        await trio.to_thread.run_sync(save_measurements, self._data_dir, identifier, measured)
                    return measured
            await trio.sleep(OTHERS_TURN_S)


def _with_measurements(facts: Capabilities, measured: Measurements) -> Capabilities:
    """Return the facts with measurements, of those accelerators only that this node uses."""
    figures = {dataclasses.replace(each, throughput=Throughput()): each for each in measured.accelerators}
    return dataclasses.replace(
        facts,
        processor=dataclasses.replace(facts.processor, throughput=measured.cpu),
        accelerators=tuple(figures.get(each, each) for each in facts.accelerators),
    )
