"""Fixtures of the tests with real daemons and the real model."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from node.models.importer import import_model
from node.models.store import ModelStore, Package
from tests.process.daemons import MODEL, Daemon, StartDaemon, complete_swarm, running_daemon
from tests.support.demo_model import dequantised_demo_model


@pytest.fixture
async def start_daemon(tmp_path: Path) -> AsyncIterator[StartDaemon]:
    """Start daemons that live as long as the test; each gets a data directory of its own."""
    async with AsyncExitStack() as stack:
        started = 0

        async def start(*flags: str, data_dir: Path | None = None, **options: Any) -> Daemon:
            nonlocal started
            started += 1
            folder = data_dir or tmp_path / f"node-{started}"
            return await stack.enter_async_context(running_daemon(folder, *flags, **options))

        yield start


@pytest.fixture
async def start_swarm(start_daemon: StartDaemon, package: Package) -> Callable[..., Awaitable[list[Daemon]]]:
    """Start a swarm that lives as long as the test; see `complete_swarm`."""
    return partial(complete_swarm, start_daemon)


@pytest.fixture(scope="session")
def dequantised() -> Package:
    """The demo model's weights in fp32, for the engines of safetensors packages."""
    return dequantised_demo_model()


@pytest.fixture(scope="session")
def package() -> Package:
    """The demo model in the user's cache, imported once per machine."""
    store = ModelStore()
    found = store.resolve(MODEL)
    package = store.find(found)
    if package is None or package.missing():
        import_model(MODEL, store)
    return store.get(found)
