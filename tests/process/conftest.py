"""Fixtures of the tests with real daemons and the real model."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from node.models.importer import import_model
from node.models.store import ModelStore, Package
from tests.process.daemons import MODEL, Daemon, StartDaemon, is_complete, running_daemon, until


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
    """Start one daemon per span, each with the first as its bootstrap peer, and wait until the model is complete.

    `flags` are the first one's.
    """

    async def start(*spans: str, flags: Sequence[str] = ()) -> list[Daemon]:
        daemons = [await start_daemon("--serve", f"{MODEL}:{spans[0]}", *flags)]
        first = daemons[0]

        async def start_another(span: str) -> None:
            daemons.append(await start_daemon("--serve", f"{MODEL}:{span}", "--bootstrap", first.multiaddr))

        async with trio.open_nursery() as nursery:
            for span in spans[1:]:
                nursery.start_soon(start_another, span)
        await until(partial(is_complete, first))
        return daemons

    return start


@pytest.fixture(scope="session")
def package() -> Package:
    """The demo model in the user's cache, imported once per machine."""
    store = ModelStore()
    found = store.resolve(MODEL)
    package = store.find(found)
    if package is None or package.missing():
        import_model(MODEL, store)
    return store.get(found)
