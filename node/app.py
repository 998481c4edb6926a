"""The daemon: one tree of tasks, from the checks at the start to the drain at the end."""

import os
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import structlog
import trio

from node.api.access import Access
from node.api.application import make_app
from node.api.interface import JoinDocument
from node.api.server import serve as serve_api
from node.api.server import url_of
from node.assembly import NodeParts, build_node, is_busy
from node.config import (
    APPLICATION,
    READY_FILE,
    ApiKey,
    NodeConfig,
    NodeReady,
    ServeSpec,
    StartError,
    hash_api_key,
    read_api_keys,
)
from node.engine.device import Device
from node.joining import join_elsewhere, join_here
from node.models.files import Progress, ignore_progress
from node.network.interface import NetworkError
from node.selection.adoption_trials import AdoptionTrials
from node.start_checks import check_start, own_data_dir
from node.status import StatusView
from node.storage.database import DATABASE_FILE, StorageError, open_database
from node.storage.history import HistoryStore
from node.swarm.known_peers import maintain_known_peers
from node.swarm.mdns import find_neighbours
from node.telemetry.observer import Telemetry
from node.telemetry.tracing import make_tracer
from node.util.open_files import raise_open_file_limit, retry_on_file_shortage

DRAIN_LIMIT_S = 30.0
"""Longest wait for jobs and sessions at shutdown."""

END_LIMIT_S = 2.0
"""Longest wait for the jobs that are ended then: each tells its stages."""

RETENTION_INTERVAL_S = 60.0
"""Pause between prunings of the history."""

READY_INTERVAL_S = 10.0
"""Interval at which `node.json` is compared with the addresses."""

_logger = structlog.get_logger(__name__)


def _keys(config: NodeConfig) -> tuple[ApiKey, ...]:
    """Return the keys of the HTTP API."""
    own = () if config.api_key is None else (ApiKey(name="default", sha256=hash_api_key(config.api_key)),)
    return (*own, *config.api_keys)


async def _reload_keys(config: NodeConfig, access: Access) -> None:
    """Take the API keys that are in their file now; where it is faulty, the former ones stay."""
    if config.api_keys_file is None:
        _logger.info("SIGHUP ignored", reason="without --api-keys there is nothing to reload")
        return
    try:
        keys = await trio.to_thread.run_sync(read_api_keys, config.api_keys_file)
    except ValueError as error:
        _logger.warning("API keys not reloaded, the former ones stay valid", reason=str(error))
        return
    access.keys.replace(_keys(replace(config, api_keys=keys)))
    _logger.info("API keys reloaded", file=str(config.api_keys_file), keys=len(keys))


class Node:
    """One peer: its parts, and the tree of their tasks."""

    def __init__(self, config: NodeConfig, parts: NodeParts, access: Access) -> None:
        self._config = config
        self._access = access
        self._parts = parts
        tracer = make_tracer(parts.network.network.peer_id, version(APPLICATION))
        self._telemetry = Telemetry(parts.serving.library.name_of, tracer)
        parts.client.coordinator.observer = self._telemetry
        parts.serving.stages.observer = self._telemetry
        self._is_ready = False
        self._view = StatusView(
            parts, [str(spec) for spec in config.serve], self._telemetry, self._join_commands, config.data_dir
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the node inside the block, which begins once the API answers and every span is loaded."""
        config, network = self._config, self._parts.network.network
        api_stop, started = self._view.stopping, trio.Event()
        async with self._telemetry.running(), network.running(), trio.open_nursery() as api_nursery:
            serve = partial(serve_api, make_app(self._view, self._access), config.api_host, config.api_port)
            port = await api_nursery.start(partial(serve, stop=api_stop))
            self._view.api_url = url_of(config.api_host, port)
            addresses = list(network.multiaddrs)
            _logger.info("listening", api=self._view.api_url, addresses=addresses, bootstrap=list(config.bootstrap))
            async with self._parts.serving.stages.link_pool.running(), trio.open_nursery() as nursery:
                for task in self._tasks(started):
                    nursery.start_soon(retry_on_file_shortage, *task)
                await nursery.start(self._parts.serving.supervisor.run)
                if not config.serve:
                    _logger.warning("this node serves no blocks; --serve MODEL serves some")
                started.set()
                self._is_ready = True
                yield
                nursery.cancel_scope.cancel()
            api_stop.set()

    def ready(self) -> NodeReady:
        """Return where the node is now: networks change, and peers and gateways tell of further addresses."""
        network = self._parts.network.network
        return NodeReady(
            peer_id=network.peer_id, multiaddrs=network.multiaddrs, api_url=self._view.api_url, pid=os.getpid()
        )

    def _join_commands(self, serve: ServeSpec | None) -> JoinDocument:
        """Return the commands with which another node joins; none before this one is ready."""
        ready = self.ready()
        if not self._is_ready or not ready.multiaddrs:
            return {"here": None, "elsewhere": None}
        elsewhere = join_elsewhere(self._config, ready, serve)
        return {
            "here": shlex.join(join_here(self._config, ready, serve)),
            "elsewhere": None if elsewhere is None else shlex.join(elsewhere),
        }

    def _tasks(self, started: trio.Event) -> list[tuple[Callable[..., Awaitable[None]], *tuple[object, ...]]]:
        """Return the tasks that run as long as the node."""
        config, parts = self._config, self._parts
        network, swarm, selection = parts.network, parts.swarm, parts.selection
        busy = partial(is_busy, parts.client.coordinator, parts.serving.stages)
        tasks: list[tuple[Callable[..., Awaitable[None]], *tuple[object, ...]]] = [
            (self._view.sample_loop,),
            (swarm.membership.run,),
            (swarm.announce_placements,),
            (swarm.announcer.run,),
            (swarm.replicator.run,),
            (parts.serving.library.run,),
            (network.inventory.run, started),
            (parts.client.quality_store.run,),
            (parts.consensus.run,),
            (selection.learner.run,),
            (selection.chooser.trials.run, AdoptionTrials(parts.client.trials), busy),
            (_retention_loop, network.history, swarm.membership.heartbeats.clock.is_confirmed),
            (maintain_known_peers, network.network, network.known_peers, network.jitter),
        ]
        if config.serve:
            tasks.append((parts.serving.spare_worker.run,))
        if config.mdns:
            tasks.append((find_neighbours, network.network, config.swarm_key))
        return tasks

    async def drain(self) -> None:
        """Refuse new work, announce the departure, migrate sessions, and wait a bounded time for the rest.

        Jobs that are not done then end with an error, as long as there are links to their stages and clients.
        """
        coordinator, stages, swarm = self._parts.client.coordinator, self._parts.serving.stages, self._parts.swarm
        coordinator.draining = True
        stages.start_draining()
        await swarm.membership.leave()
        stages.migrate_sessions()
        await swarm.announcer.withdraw()
        with trio.move_on_after(DRAIN_LIMIT_S) as scope:
            await coordinator.wait_idle()
            await stages.wait_idle()
        if scope.cancelled_caught:
            jobs, sessions = coordinator.statistics.running, sum(len(s.sessions) for s in stages.spans())
            _logger.warning("shutdown timed out with open sessions", jobs=jobs, sessions=sessions)
            coordinator.end_jobs()
            with trio.move_on_after(END_LIMIT_S):
                await coordinator.wait_idle()
        await swarm.replicator.leave()


async def _retention_loop(history: HistoryStore, is_clock_confirmed: Callable[[], bool]) -> None:
    """Prune the history to its bounds, again and again; by age only while peers agree with this machine's clock."""
    while True:
        try:
            await history.retain(time.time(), by_age=is_clock_confirmed())
        except StorageError as error:
            _logger.warning("could not prune the history", reason=str(error))
        await trio.sleep(RETENTION_INTERVAL_S)


@asynccontextmanager
async def _running_node(
    config: NodeConfig, access: Access, progress: Progress, devices: Sequence[Device]
) -> AsyncIterator[Node]:
    """Open the data directory's database and run a node on it inside the block, on the devices that were found."""
    async with open_database(config.data_dir / DATABASE_FILE) as database:
        if database.set_aside is not None:
            _logger.warning("corrupt history renamed; the swarm refills it", file=str(database.set_aside))
        node = Node(config, build_node(config, database, devices, progress), access)
        async with node.running():
            yield node


@asynccontextmanager
async def _ready_file(ready: Callable[[], NodeReady], data_dir: Path) -> AsyncIterator[None]:
    """Keep `node.json` in the data directory inside the block, written anew when addresses change."""
    written = ready()
    written.write(data_dir)

    async def update() -> None:
        nonlocal written
        while True:
            await trio.sleep(READY_INTERVAL_S)
            if (now := ready()) != written:
                try:
                    await trio.to_thread.run_sync(now.write, data_dir)
                    written = now
                except StartError as error:
                    _logger.debug("addresses not written, trying again", reason=str(error))

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(update)
            yield
            nursery.cancel_scope.cancel()
    finally:
        (data_dir / READY_FILE).unlink(missing_ok=True)


async def run_node(
    config: NodeConfig, on_ready: Callable[[NodeReady], None] | None = None, progress: Progress = ignore_progress
) -> None:
    """Run a node until SIGTERM or SIGINT: the first drains and leaves, a second leaves at once. SIGHUP reloads keys.

    `progress` gets the progress of downloads, from any thread. `on_ready` is called once the API answers and every span
    of `config.serve` is loaded; from then on `node.json` is in the data directory. Raises StartError.
    """
    raise_open_file_limit()
    devices = await check_start(config)
    _log_start(config, devices)
    access = Access(keys=_keys(config), cors_origins=config.cors_origins)
    try:
        with own_data_dir(config):
            async with trio.open_nursery() as nursery:
                asked = trio.Event()
                is_ready = trio.Event()
                reload = partial(_reload_keys, config, access)
                await nursery.start(_on_signals, asked, is_ready, reload, nursery.cancel_scope)
                async with (
                    _running_node(config, access, progress, devices) as node,
                    _ready_file(node.ready, config.data_dir),
                ):
                    ready = node.ready()
                    _logger.info("node ready", peer=ready.peer_id, api=ready.api_url)
                    is_ready.set()
                    if on_ready:
                        on_ready(ready)
                    await asked.wait()
                    _logger.info("draining; a second signal exits at once")
                    await node.drain()
                nursery.cancel_scope.cancel()
    except (StorageError, BaseExceptionGroup) as fault:
        for error in _leaves(fault):
            if isinstance(error, StartError | NetworkError | StorageError):
                raise StartError(str(error)) from None
        raise


def _log_start(config: NodeConfig, devices: Sequence[Device]) -> None:
    """Log what is about to start: loading may take minutes, in which nothing else is said without a terminal."""
    _logger.info(
        "node starting",
        version=version(APPLICATION),
        data_dir=str(config.data_dir),
        cache_dir=str(config.cache_dir),
        serve=[str(spec) for spec in config.serve],
        devices=[device.name for device in devices],
        memory_bytes=config.memory_bytes or "auto",
    )


async def _on_signals(
    asked: trio.Event,
    is_ready: trio.Event,
    reload: Callable[[], Awaitable[None]],
    scope: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Set `asked` at the first signal; cancel everything at the second, or at the first before the node is ready.

    SIGHUP reloads, as in other daemons, and is the first signal where a terminal hangs up, which may send several.
    """
    ends_with_terminal = _ends_with_terminal()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            is_hangup = number == signal.SIGHUP
            if is_hangup and not ends_with_terminal:
                await reload()
                continue
            if not is_ready.is_set() or (asked.is_set() and not is_hangup):
                scope.cancel()
            asked.set()


def _ends_with_terminal() -> bool:
    """Return whether this process was started in a terminal, and not (as by nohup) to outlive it."""
    is_in_terminal = any(file is not None and file.isatty() for file in (sys.stdin, sys.stdout, sys.stderr))
    return is_in_terminal and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions in nested groups: nurseries wrap what passes them."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
