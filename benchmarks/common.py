"""Shared by the benchmarks: the demo model, summaries of samples, and the load of the machine."""

import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import numpy as np
import trio

from node.config import NodeReady, default_cache_dir
from node.demo import local_swarm
from node.models.catalogue import DEMO_MODEL
from node.models.importer import import_model
from node.models.store import ModelStore, Package


def demo_package() -> Package:
    """Return the demo model, imported if it is not in the user's cache yet: daemons are then ready at once."""
    return import_model(DEMO_MODEL, ModelStore())


@asynccontextmanager
async def whole_model(package: Package, peers: int) -> AsyncIterator[NodeReady]:
    """Run a swarm that serves the whole model in equal parts; yield the first peer once it sees every block served."""
    async with whole_swarm(package, peers) as swarm:
        yield swarm[0]


@asynccontextmanager
async def whole_swarm(package: Package, peers: int) -> AsyncIterator[list[NodeReady]]:
    """As `whole_model`, with all peers."""
    block_count = package.manifest.block_count
    async with (
        local_swarm(DEMO_MODEL, block_count, peers, default_cache_dir(), lambda *_: None) as swarm,
        httpx.AsyncClient(base_url=swarm[0].ready.api_url, timeout=60) as client,
    ):
        with trio.fail_after(60):
            while not await _is_complete(client):
                await trio.sleep(0.1)
        yield [peer.ready for peer in swarm]


async def _is_complete(client: httpx.AsyncClient) -> bool:
    answer = (await client.get("/swarm/models")).raise_for_status().json()
    return any(model["complete"] for model in answer["models"])


def describe_machine() -> dict[str, float]:
    """Return the number of cores and the load average of the last minute."""
    return {"cores": os.cpu_count() or 1, "load_average": os.getloadavg()[0]}


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of a sample. `p5` approximates a time on an otherwise idle machine."""

    p5: float
    median: float
    p99: float
    greatest: float


def spread_of(values: Sequence[float]) -> Spread:
    """Return the percentiles of at least one value."""
    p5, median, p99 = (float(value) for value in np.percentile(values, (5, 50, 99)))
    return Spread(p5=p5, median=median, p99=p99, greatest=float(max(values)))


def times_ms(action: Callable[[], None], count: int) -> list[float]:
    """Return how long an action took each time, in milliseconds."""
    times = []
    for _ in range(count):
        start_s = time.perf_counter()
        action()
        times.append((time.perf_counter() - start_s) * 1e3)
    return times


def verdict(value: float, target: float) -> str:
    """Return whether a figure is within its upper limit."""
    return "met" if value <= target else "missed"
