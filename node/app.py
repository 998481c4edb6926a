"""The daemon: puts the rooms together into one tree of tasks, from the start to a polite leave."""

import fcntl
import os
import random
import shlex
import signal
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import structlog
import trio

from node.api.application import make_app
from node.api.server import serve as serve_api
from node.api.server import url_of
from node.capabilities.announcer import CapabilityAnnouncer
from node.capabilities.inventory import Inventory
from node.capabilities.probe import total_memory
from node.capabilities.traffic import TrafficMeter
from node.config import APPLICATION, LOCK_FILE, MEMORY_SHARE, READY_FILE, NodeConfig, NodeReady, StartError
from node.consensus.followed_chains import FollowedChains
from node.consensus.measurement_runner import AGENDA, MeasurementRunner
from node.consensus.service import ConsensusEnvironment, ConsensusRules, ConsensusService, swarm_name
from node.coordinator.coordinator import Coordinator, SwarmView
from node.coordinator.observation import software_name, software_versions
from node.coordinator.quality_store import LocalQualityStore
from node.coordinator.recorder import Recorder
from node.coordinator.trial_runner import BenchmarkRunner
from node.engine.client import start_engine
from node.engine.device import Device, DeviceError, find_device
from node.engine.engine_config import EngineOptions
from node.engine.worker_process import SpareWorker
from node.identity import IdentityError, load_or_create
from node.joining import conflicts, second_node
from node.models.files import Progress, ignore_progress
from node.models.library import Library
from node.models.store import ModelStore
from node.network.host import Libp2pNetwork, NetworkLimits
from node.network.interface import NetworkError
from node.replication.observations import ObservationReplicator
from node.selection.adoption_trials import AdoptionTrials
from node.selection.chooser import LearnedChooser, LearnedVoter
from node.selection.learner import Learner
from node.selection.prediction_cache import PredictionCache
from node.stages.block_placement import PlacementAnnouncements
from node.stages.scheduler import Batching
from node.stages.span_supervisor import ServingOptions, SpanSupervisor
from node.stages.stage_policy import PolicyController
from node.stages.stage_server import StageServer
from node.status import StatusView
from node.storage.adoption_store import AdoptionStore
from node.storage.chain_store import ConsensusStore
from node.storage.database import DATABASE_FILE, Database, StorageError, open_database
from node.storage.history import HistoryStore
from node.storage.peers import PeerBook
from node.swarm.dht_records import RecordKinds
from node.swarm.known_peers import keep_acquaintances
from node.swarm.link_estimates import LinkEstimates
from node.swarm.mdns import find_neighbours
from node.swarm.membership import Membership
from node.util.open_files import open_file_limit, outlasting_shortage, raise_open_file_limit
from protocol.capabilities import Links, fastest_bytes_per_s, hardware_class
from protocol.identity import ModelId, PeerId
from protocol.observations import bucket_of
from selector.consensus.clock import EpochClock
from selector.task_buckets import Viewpoint

DRAIN_LIMIT_S = 30.0
"""How long a node that was asked to stop waits for the jobs and sessions it has."""

MIN_MEMORY_BYTES = 1 << 20
"""A memory budget below this is a slip of the pen."""

RETENTION_INTERVAL_S = 60.0
"""How often the history is brought back within its bounds."""

_logger = structlog.get_logger(__name__)


class Node:
    """One peer: its rooms, wired. `running` brings it to life."""

    def __init__(
        self, config: NodeConfig, database: Database, device: Device, progress: Progress = ignore_progress
    ) -> None:
        traffic = TrafficMeter()
        try:
            identity = load_or_create(config.data_dir)
            self._network = Libp2pNetwork(
                identity.seed,
                listen=config.listen,
                swarm_key=config.swarm_key,
                limits=NetworkLimits.within(open_file_limit()),
                on_sent=traffic.sent,
                on_received=traffic.received,
            )
        except (IdentityError, ValueError) as error:
            raise StartError(str(error)) from None
        agent = f"{APPLICATION}/{version(APPLICATION)}"
        jitter = random.Random(identity.peer_id)
        self._config = config
        records = RecordKinds(self._network)
        self._history = HistoryStore(database)
        self._peer_book = PeerBook(database)
        # Measured once for all nodes of this user on this machine: the figures are the machine's.
        self._inventory = Inventory(
            data_dir=config.cache_dir,
            models_dir=config.cache_dir,
            traffic=traffic,
            threads=config.threads,
            accelerator=device.accelerator,
        )
        predictions, self._chains = PredictionCache(), FollowedChains()
        self._chooser = LearnedChooser(
            predictions,
            jitter,
            share=config.exploration,
            store=AdoptionStore(database, software_name(software_versions())),
        )
        self._learner = Learner(
            database.path,
            predictions,
            count=self._count_observations,
            viewpoint=partial(self._viewpoint, identity.peer_id),
        )
        self._stages = StageServer(
            self._network,
            agent,
            private_key=identity.private_key,
            hardware=self._hardware,
            voter=LearnedVoter(predictions),
            controller=partial(PolicyController, batching=Batching(config.batching)),
            agreed=self._chains.agreement,
        )
        self._statements = PlacementAnnouncements(lambda: self._membership.announce())
        self._membership = Membership(
            network=self._network,
            identity=identity,
            agent=agent,
            bootstrap=config.bootstrap,
            served_spans=self._stages.served_spans,
            records=records,
            jitter=jitter,
            on_round_trip=traffic.round_trip,
            stated=self._statements.current,
        )
        self._announcer = CapabilityAnnouncer(
            network=self._network,
            identity=identity,
            records=records,
            capabilities=self._inventory.capabilities,
            peers=lambda: [presence.peer for presence in self._membership.directory.reached()],
            jitter=jitter,
        )
        self._dissemination = ObservationReplicator(
            network=self._network, identity=identity, history=self._history, records=records, jitter=jitter
        )
        self._consensus = ConsensusService(
            self._network,
            self._chains,
            ConsensusEnvironment(
                identity=identity,
                store=ConsensusStore(database),
                history=self._history,
                models=self._models,
                hardware=self._known_hardware,
                meter=self._meter,
            ),
            ConsensusRules(
                swarm=swarm_name(config.swarm_key),
                agenda=AGENDA,
                clock=EpochClock(config.epoch_s),
                checkpoints=config.checkpoints,
            ),
            jitter,
        )
        self._jitter = jitter
        self._library = Library(
            ModelStore(config.cache_dir),
            self._network,
            self._membership,
            cache_limit_bytes=config.cache_limit_bytes,
        )
        self._recorder = Recorder(identity, self._dissemination)
        self._ledger = LocalQualityStore(self._library, config.cache_dir)
        self._coordinator = Coordinator(
            self._library,
            SwarmView(
                finder=self._membership,
                links=LinkEstimates(self._network.peer_id, self._membership.round_trip_s, self._links_of).between,
                hardware=self._hardware_of,
                bandwidth=self._bandwidth_of,
                expected=self._membership.directory.expected,
                agreed=self._chains.agreement,
            ),
            self._stages.link_pool,
            jitter,
            self._recorder,
            chooser=self._chooser,
            quality_store=self._ledger,
        )
        self._trials = BenchmarkRunner(self._coordinator, self._recorder)
        self._spare_worker = SpareWorker(EngineOptions(threads=config.threads))
        self._serving = SpanSupervisor(
            ServingOptions(
                specs=config.serve,
                draft=config.draft,
                memory_bytes=config.memory_bytes,
                threads=config.threads,
                device=device,
                graphs_dir=config.cache_dir / "graphs",
                use_catalogue=not config.no_catalogue,
                progress=progress,
            ),
            library=self._library,
            membership=self._membership,
            stages=self._stages,
            placements=self._statements,
            jitter=jitter,
            start_engine=partial(start_engine, spare=self._spare_worker),
        )
        self._view = StatusView(
            agent=agent,
            serve=[str(spec) for spec in config.serve],
            network=self._network,
            membership=self._membership,
            coordinator=self._coordinator,
            trials=self._trials,
            stages=self._stages,
            library=self._library,
            ledger=self._ledger,
            history=self._history,
            dissemination=self._dissemination,
            consensus=self._consensus,
            chains=self._chains,
            chooser=self._chooser,
            learner=self._learner,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[NodeReady]:
        """Take part in the swarm inside the block; begins once the API answers and every span is loaded."""
        config = self._config
        api_stop, started = trio.Event(), trio.Event()
        async with self._network.running(), trio.open_nursery() as api_nursery:
            serve = partial(serve_api, make_app(self._view, config.api_key), config.api_host, config.api_port)
            port = await api_nursery.start(partial(serve, stop=api_stop))
            self._view.api_url = url_of(config.api_host, port)
            async with self._stages.link_pool.running(), trio.open_nursery() as nursery:
                tasks: list[tuple[Callable[..., Awaitable[None]], *tuple[object, ...]]] = [
                    (self._membership.run,),
                    (self._library.run,),
                    (self._inventory.run, started),
                    (self._ledger.run,),
                    (self._announcer.run,),
                    (self._dissemination.run,),
                    (self._consensus.run,),
                    (self._learner.run,),
                    (self._chooser.trials.run, AdoptionTrials(self._trials), self._is_busy),
                    (self._keep_history_bounded,),
                    (keep_acquaintances, self._network, self._peer_book),
                ]
                if config.serve:
                    tasks.append((self._spare_worker.run,))
                if config.mdns:
                    tasks.append((find_neighbours, self._network, config.swarm_key))
                for task in tasks:
                    nursery.start_soon(outlasting_shortage, *task)
                await nursery.start(self._serving.run)
                if not config.serve:
                    _logger.warning("this node serves no blocks: start it with --serve MODEL to serve some")
                started.set()
                yield NodeReady(
                    peer_id=self._network.peer_id,
                    multiaddrs=self._network.multiaddrs,
                    api_url=self._view.api_url,
                    pid=os.getpid(),
                )
                nursery.cancel_scope.cancel()
            api_stop.set()

    def _hardware(self) -> str:
        """Return the class of this machine's hardware, once it is known."""
        capabilities = self._inventory.capabilities()
        return "unknown" if capabilities is None else hardware_class(capabilities)

    def _known_hardware(self) -> str | None:
        return None if self._inventory.capabilities() is None else self._hardware()

    def _models(self) -> dict[ModelId, bool]:
        """Return the models that live peers serve, and whether this node does and means to stay."""
        served = {span.info.model for span in self._stages.spans()} if not self._stages.is_draining else set()
        return {model: model in served for model in (*self._membership.directory.models(), *served)}

    def _meter(self, model: ModelId) -> MeasurementRunner:
        return MeasurementRunner(self._trials, self._recorder, model, self._is_busy, self._jitter)

    def _is_busy(self) -> bool:
        return self._coordinator.statistics().running > 0 or any(span.sessions for span in self._stages.spans())

    def _hardware_of(self, peer: PeerId) -> str:
        """Return the class of a peer's hardware, as far as it was told."""
        if peer == self._network.peer_id:
            return self._hardware()
        capabilities = self._announcer.known(peer)
        return "unknown" if capabilities is None else hardware_class(capabilities)

    def _bandwidth_of(self, peer: PeerId) -> float | None:
        """Return how many bytes a second a peer says it reads from its fastest memory; None where it says nothing."""
        capabilities = self._announcer.known(peer)
        return None if capabilities is None else fastest_bytes_per_s(capabilities)

    def _viewpoint(self, peer: PeerId) -> Viewpoint:
        """Return for whom the history is weighed: this node, as it is now, with what the swarm has agreed of others."""
        trust, in_strangers = self._chains.trust()
        return Viewpoint(
            peer=peer,
            hardware=self._hardware(),
            software=software_name(software_versions()),
            hour=bucket_of(int(time.time())),
            trust=trust,
            default_trust=in_strangers,
        )

    async def _count_observations(self) -> int:
        return sum((await self._history.count_by_observer()).values())

    def _links_of(self, peer: PeerId) -> Links | None:
        """Return what a peer said of its links to others."""
        capabilities = self._announcer.known(peer)
        return None if capabilities is None else capabilities.links

    async def _keep_history_bounded(self) -> None:
        while True:
            try:
                await self._history.retain(time.time())
            except StorageError as error:
                _logger.warning("the history could not be pruned", reason=str(error))
            await trio.sleep(RETENTION_INTERVAL_S)

    async def drain(self) -> None:
        """Take no new work, tell the swarm, hand over what can be, and wait a bounded time for the rest."""
        self._coordinator.draining = True
        self._stages.start_draining()
        await self._membership.leave()
        self._stages.migrate_sessions()
        await self._announcer.withdraw()
        with trio.move_on_after(DRAIN_LIMIT_S) as scope:
            await self._coordinator.wait_idle()
            await self._stages.wait_idle()
        await self._dissemination.leave()
        if scope.cancelled_caught:
            _logger.warning("left with work undone", sessions=sum(len(span.sessions) for span in self._stages.spans()))


@asynccontextmanager
async def running_node(
    config: NodeConfig, progress: Progress = ignore_progress
) -> AsyncIterator[tuple[Node, NodeReady]]:
    """Open the data directory's database and run a node on it inside the block."""
    async with open_database(config.data_dir / DATABASE_FILE) as database:
        if database.set_aside is not None:
            _logger.warning("damaged history set aside; the swarm refills it", file=str(database.set_aside))
        try:
            # Only who serves computes; but what others are told of this machine should be what would.
            device = await find_device(config.device)
        except DeviceError as error:
            raise StartError(f"cannot compute on {config.device}: {error}; see --device") from None
        _check_memory(config, device)
        node = Node(config, database, device, progress)
        async with node.running() as ready:
            yield node, ready


async def run_node(
    config: NodeConfig,
    on_ready: Callable[[NodeReady], None] | None = None,
    progress: Progress = ignore_progress,
) -> None:
    """Run a node until SIGTERM or SIGINT: the first drains and leaves, a second leaves at once.

    `progress` is told how files are got that are missing, from any thread.
    `on_ready` is called once the API answers and every span of `config.serve` is loaded; from then until the end
    `node.json` is in the data directory. Raises StartError where the node cannot start.
    """
    raise_open_file_limit()
    _check_conflicts(config)
    try:
        with _own(config):
            async with trio.open_nursery() as nursery:
                asked = trio.Event()
                is_ready = trio.Event()
                await nursery.start(_heed_signals, asked, is_ready, nursery.cancel_scope)
                async with running_node(config, progress) as (node, ready), _announced(ready, config.data_dir):
                    is_ready.set()
                    if on_ready:
                        on_ready(ready)
                    await asked.wait()
                    _logger.info("leaving; a second signal leaves at once")
                    await node.drain()
                nursery.cancel_scope.cancel()
    except (StorageError, BaseExceptionGroup) as fault:
        for error in _leaves(fault):
            if isinstance(error, StartError | NetworkError | StorageError):
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


@asynccontextmanager
async def _announced(ready: NodeReady, data_dir: Path) -> AsyncIterator[None]:
    """Keep `node.json` in the data directory inside the block."""
    ready.write(data_dir)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            (data_dir / READY_FILE).unlink()


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions in a group of groups; a nursery wraps whatever passes it."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _keep_private(data_dir: Path) -> None:
    """Take from others what rights they have to a data directory, unless it is one that many share, like /tmp."""
    status = data_dir.stat()
    is_shared = status.st_mode & stat.S_ISVTX or data_dir.resolve() in {Path.home().resolve(), Path("/")}
    if status.st_uid == os.getuid() and status.st_mode & 0o077 and not is_shared:
        data_dir.chmod(0o700)


def _check_memory(config: NodeConfig, device: Device) -> None:
    """Raise StartError for a memory budget that this machine does not have, or in which nothing fits."""
    budget_bytes = config.memory_bytes
    if budget_bytes is None:
        return
    there_bytes = total_memory()
    where = "this machine"
    if device.accelerator is not None:
        there_bytes, where = device.accelerator.memory_bytes, device.accelerator.name
    if budget_bytes > there_bytes:
        raise StartError(
            f"--memory: {_mebibytes(budget_bytes)} is more than {where} has, {_mebibytes(there_bytes)}; "
            f"give less, or leave it out to use {MEMORY_SHARE:.0%} of what is free"
        )
    if budget_bytes < MIN_MEMORY_BYTES:
        raise StartError(
            f"--memory: {budget_bytes} bytes are too little to serve anything with; expected at least "
            f"{_mebibytes(MIN_MEMORY_BYTES)}, for example 4GiB"
        )


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _check_conflicts(config: NodeConfig) -> None:
    """Raise StartError where a second node was started like a first one: all that they cannot share, at once."""
    found = conflicts(config)
    try:
        with _own(config):
            pass
    except StartError as error:
        found.append(str(error))
    if len(found) > 1:
        options = shlex.join(second_node(config))
        raise StartError(f"{'; '.join(found)}; a second node on this machine takes {options}")


@contextmanager
def _own(config: NodeConfig) -> Iterator[None]:
    """Make the data directory and hold it for ourselves: two nodes with one identity would confuse everybody."""
    try:
        config.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        _keep_private(config.data_dir)
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
