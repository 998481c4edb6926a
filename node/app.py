"""The daemon: puts the rooms together into one tree of tasks, from the start to a polite leave."""

import fcntl
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from importlib.metadata import version

import structlog
import trio

from node.api.application import make_app
from node.api.server import serve as serve_api
from node.api.server import url_of
from node.config import APPLICATION, READY_FILE, NodeConfig, NodeReady, StartError
from node.identity import IdentityError, load_or_create
from node.jobs.coordinator import Coordinator
from node.jobs.stage import Stages
from node.models.library import Library
from node.models.store import ModelStore
from node.network.host import Libp2pNetwork
from node.network.interface import NetworkError
from node.serving import Serving
from node.status import StatusView
from node.swarm.membership import Membership

DRAIN_LIMIT_S = 30.0
"""How long a node that was asked to stop waits for the jobs and sessions it has."""

LOCK_FILE = "node.lock"

_logger = structlog.get_logger(__name__)


class Node:
    """One peer: its rooms, wired. `running` brings it to life."""

    def __init__(self, config: NodeConfig) -> None:
        try:
            identity = load_or_create(config.data_dir)
            self._network = Libp2pNetwork(identity.seed, listen=config.listen, swarm_key=config.swarm_key)
        except (IdentityError, ValueError) as error:
            raise StartError(str(error)) from None
        agent = f"{APPLICATION}/{version(APPLICATION)}"
        jitter = random.Random(identity.peer_id)
        self._config = config
        self._stages = Stages(self._network, agent)
        self._membership = Membership(
            network=self._network,
            identity=identity,
            agent=agent,
            bootstrap=config.bootstrap,
            served_spans=self._stages.served_spans,
            jitter=jitter,
        )
        self._library = Library(ModelStore(config.cache_dir), self._network, self._membership)
        self._coordinator = Coordinator(self._library, self._membership, self._stages.switchboard, jitter)
        self._serving = Serving(
            config.serve,
            library=self._library,
            membership=self._membership,
            stages=self._stages,
            memory_bytes=config.memory_bytes,
            threads=config.threads,
            use_catalogue=not config.no_catalogue,
            jitter=jitter,
        )
        self._view = StatusView(
            agent=agent,
            network=self._network,
            membership=self._membership,
            coordinator=self._coordinator,
            stages=self._stages,
            library=self._library,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[NodeReady]:
        """Take part in the swarm inside the block; begins once the API answers and every span is loaded."""
        config = self._config
        api_stop = trio.Event()
        async with self._network.running(), trio.open_nursery() as api_nursery:
            serve = partial(serve_api, make_app(self._view, config.api_key), config.api_host, config.api_port)
            port = await api_nursery.start(partial(serve, stop=api_stop))
            self._view.api_url = url_of(config.api_host, port)
            async with self._stages.switchboard.running(), trio.open_nursery() as nursery:
                nursery.start_soon(self._membership.run)
                nursery.start_soon(self._library.run)
                await nursery.start(self._serving.run)
                yield NodeReady(
                    peer_id=self._network.peer_id,
                    multiaddrs=self._network.multiaddrs,
                    api_url=self._view.api_url,
                    pid=os.getpid(),
                )
                nursery.cancel_scope.cancel()
            api_stop.set()

    async def drain(self) -> None:
        """Take no new work, tell the swarm, and wait a bounded time for the work there is."""
        self._coordinator.draining = True
        self._stages.draining = True
        await self._membership.leave()
        with trio.move_on_after(DRAIN_LIMIT_S) as scope:
            await self._coordinator.wait_idle()
            await self._stages.wait_idle()
        if scope.cancelled_caught:
            _logger.warning("left with work undone", sessions=sum(len(span.sessions) for span in self._stages.spans()))


async def run_node(config: NodeConfig, on_ready: Callable[[NodeReady], None] | None = None) -> None:
    """Run a node until SIGTERM or SIGINT: the first drains and leaves, a second leaves at once.

    `on_ready` is called once the API answers and every span of `config.serve` is loaded; from then until the end
    `node.json` is in the data directory. Raises StartError where the node cannot start.
    """
    try:
        with _own(config):
            async with trio.open_nursery() as nursery:
                asked = trio.Event()
                is_ready = trio.Event()
                await nursery.start(_heed_signals, asked, is_ready, nursery.cancel_scope)
                node = Node(config)
                async with node.running() as ready:
                    is_ready.set()
                    ready.write(config.data_dir)
                    try:
                        if on_ready:
                            on_ready(ready)
                        await asked.wait()
                        _logger.info("leaving; a second signal leaves at once")
                        await node.drain()
                    finally:
                        with suppress(FileNotFoundError):
                            (config.data_dir / READY_FILE).unlink()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        for error in _leaves(group):
            if isinstance(error, StartError | NetworkError):
                raise StartError(str(error)) from None
        raise


async def _heed_signals(
    asked: trio.Event,
    is_ready: trio.Event,
    scope: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Set `asked` at the first signal; cancel everything at the second, or where there is nothing yet to leave."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            if asked.is_set() or not is_ready.is_set():
                scope.cancel()
            asked.set()


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions in a group of groups; a nursery wraps whatever passes it."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


@contextmanager
def _own(config: NodeConfig) -> Iterator[None]:
    """Make the data directory and hold it for ourselves: two nodes with one identity would confuse everybody."""
    try:
        config.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (config.data_dir / LOCK_FILE).open("w")
    except OSError as error:
        raise StartError(f"cannot use the data directory {config.data_dir}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(
                f"another node uses {config.data_dir}: stop it, or choose another directory with --data-dir"
            ) from None
        yield
