"""Builds the parts of a node in the order of their dependencies, as small bundles that the status pages read, too."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from node.capabilities.announcer import CapabilityAnnouncer
from node.capabilities.inventory import Inventory
from node.capabilities.traffic import TrafficMeter
from node.config import APPLICATION, NodeConfig, StartError
from node.consensus.environment import ConsensusEnvironment, ConsensusRules
from node.consensus.followed_chains import FollowedChains
from node.consensus.measurement_runner import MeasurementRunner, measurement_plan
from node.consensus.measuring_allowance import MeasuringAllowance
from node.consensus.service import ConsensusService, swarm_name
from node.coordinator.coordinator import Coordinator
from node.coordinator.observation import Recorder, software_name, software_versions, weight_type
from node.coordinator.quality_store import LocalQualityStore
from node.coordinator.swarm_view import SwarmView
from node.coordinator.trial_runner import BenchmarkRunner
from node.engine.client import start_engine
from node.engine.device import Device
from node.engine.interface import EngineOptions
from node.engine.worker_process import SpareWorker
from node.identity import Identity, IdentityError, load_or_create
from node.models.files import Progress
from node.models.library import Library
from node.models.store import GRAPHS_FOLDER, ModelStore
from node.network.host import Libp2pNetwork
from node.network.interface import Network
from node.network.limits import NetworkLimits
from node.network.relay_ledger import RelayLimits
from node.network.traversal import TraversalOptions
from node.replication.observations import ObservationReplicator
from node.selection.chooser import LearnedChooser, LearnedVoter
from node.selection.learner import Learner
from node.selection.prediction_cache import PredictionCache
from node.stages.background_allowance import BackgroundAllowance
from node.stages.block_placement import PlacementAnnouncements
from node.stages.scheduler import Batching, PolicyController
from node.stages.span_supervisor import ServingOptions, SpanSupervisor
from node.stages.stage_server import StageServer
from node.storage.adoption_store import AdoptionStore
from node.storage.chain_store import ChainStore
from node.storage.database import Database
from node.storage.history import HistoryStore
from node.storage.peers import KnownPeerStore
from node.swarm.dht_records import RecordKinds
from node.swarm.heartbeats import OwnServices
from node.swarm.link_estimates import LinkEstimates
from node.swarm.membership import Membership
from node.util.open_files import open_file_limit
from node.util.signal import Signal
from protocol.capabilities import Capabilities, Links, hardware_class, stage_facts
from protocol.identity import ModelId, PeerId, Stage
from protocol.observations import bucket_of
from selector.consensus.clock import EpochClock
from selector.task import PackageFormat
from selector.task_buckets import Viewpoint

AGENT = f"{APPLICATION}/{version(APPLICATION)}"
"""Program and version, as announced to other peers."""


@dataclass(frozen=True, slots=True)
class NetworkParts:
    """The peer on the network, and what it stores."""

    identity: Identity
    network: Network
    records: RecordKinds
    jitter: random.Random
    inventory: Inventory
    traffic: TrafficMeter
    history: HistoryStore
    known_peers: KnownPeerStore

    def own_hardware(self) -> str:
        """Return the class of this machine's hardware; `unknown` until it was measured."""
        capabilities = self.inventory.capabilities()
        return "unknown" if capabilities is None else hardware_class(capabilities)

    def busy_threads(self) -> int:
        """Return the threads that are busy here while an engine computes; 1 until the machine was measured."""
        capabilities = self.inventory.capabilities()
        return 1 if capabilities is None else stage_facts(capabilities, 1).busy_threads


@dataclass(frozen=True, slots=True)
class SelectionParts:
    """What chooses methods: predictions learned from the history, and the swarm's agreements."""

    chains: FollowedChains
    predictions: PredictionCache
    chooser: LearnedChooser
    learner: Learner


@dataclass(frozen=True, slots=True)
class SwarmParts:
    """This node's place in the swarm."""

    membership: Membership
    placements: PlacementAnnouncements
    placements_changed: Signal
    announcer: CapabilityAnnouncer
    replicator: ObservationReplicator

    async def announce_placements(self) -> None:
        """Send a heartbeat soon after each change of the announced placements, until cancelled."""
        while True:
            await self.placements_changed.wait()
            self.membership.announce()


@dataclass(frozen=True, slots=True)
class ServingParts:
    """What serves spans to others."""

    stages: StageServer
    library: Library
    spare_worker: SpareWorker
    supervisor: SpanSupervisor


@dataclass(frozen=True, slots=True)
class ClientParts:
    """What runs this node's own jobs."""

    links: LinkEstimates
    quality_store: LocalQualityStore
    recorder: Recorder
    coordinator: Coordinator
    trials: BenchmarkRunner


@dataclass(frozen=True, slots=True)
class NodeParts:
    """All parts of a node."""

    network: NetworkParts
    selection: SelectionParts
    swarm: SwarmParts
    serving: ServingParts
    client: ClientParts
    consensus: ConsensusService


def build_node(config: NodeConfig, database: Database, devices: Sequence[Device], progress: Progress) -> NodeParts:
    """Build a node. Raises StartError."""
    network = build_network(config, database, devices)
    selection = build_selection(config, network, database)
    stages = StageServer(
        network.network,
        AGENT,
        private_key=network.identity.private_key,
        hardware=network.own_hardware,
        voter=LearnedVoter(selection.predictions),
        controller=partial(PolicyController, batching=Batching(config.batching)),
        agreed=selection.chains.agreement,
        background=BackgroundAllowance(config.exploration, network.busy_threads),
    )
    swarm = build_swarm(config, network, stages)
    serving = build_serving(config, network, swarm, stages, devices, progress)
    client = build_client(config, network, selection, swarm, serving)
    consensus = build_consensus(config, database, network, selection, swarm, serving, client)
    return NodeParts(network, selection, swarm, serving, client, consensus)


def build_network(config: NodeConfig, database: Database, devices: Sequence[Device]) -> NetworkParts:
    """Build identity, network and stores. Raises StartError."""
    traffic = TrafficMeter()
    try:
        identity = load_or_create(config.data_dir)
        network = Libp2pNetwork(
            identity.seed,
            listen=config.listen,
            announce=config.announce,
            swarm_key=config.swarm_key,
            limits=NetworkLimits.within(open_file_limit()),
            traversal=TraversalOptions(
                relay=RelayLimits(bytes_per_s=config.relay_bytes_per_s) if config.relay else None,
                port_mapping=config.port_mapping,
            ),
            on_sent=traffic.sent,
            on_received=traffic.received,
        )
    except (IdentityError, ValueError) as error:
        raise StartError(str(error)) from None
    return NetworkParts(
        identity=identity,
        network=network,
        records=RecordKinds(network),
        jitter=random.Random(identity.peer_id),
        # Measured once for all nodes of this user: the figures are the machine's.
        inventory=Inventory(
            data_dir=config.cache_dir,
            traffic=traffic,
            connected=network.connected_peers,
            threads=config.threads,
            accelerators=tuple(each.accelerator for each in devices if each.accelerator),
            price=config.price,
        ),
        traffic=traffic,
        history=HistoryStore(database),
        known_peers=KnownPeerStore(database),
    )


def build_selection(config: NodeConfig, network: NetworkParts, database: Database) -> SelectionParts:
    """Build chooser and learner."""
    predictions, chains = PredictionCache(), FollowedChains()
    software = software_name(software_versions())

    async def count_observations() -> int:
        return sum((await network.history.count_by_observer()).values())

    def viewpoint() -> Viewpoint:
        """Return by whom and where the history is weighed, with the trust that the swarm has agreed on."""
        trust, default_trust = chains.trust()
        return Viewpoint(
            peer=network.identity.peer_id,
            hardware=network.own_hardware(),
            software=software,
            hour=bucket_of(int(time.time())),
            trust=trust,
            default_trust=default_trust,
        )

    store = AdoptionStore(database, software)
    chooser = LearnedChooser(predictions, network.jitter, share=config.exploration, store=store)
    learner = Learner(database.path, predictions, count=count_observations, viewpoint=viewpoint, tables=chains.tables)
    return SelectionParts(chains, predictions, chooser, learner)


def build_swarm(config: NodeConfig, network: NetworkParts, stages: StageServer) -> SwarmParts:
    """Build membership, announcements and the replication of observations."""
    placements_changed = Signal()
    placements = PlacementAnnouncements(placements_changed.set)
    membership = Membership(
        network=network.network,
        identity=network.identity,
        services=OwnServices(agent=AGENT, served_spans=stages.served_spans, placements=placements.current),
        bootstrap=config.bootstrap,
        records=network.records,
        jitter=network.jitter,
        on_round_trip=network.traffic.round_trip,
    )
    announcer = CapabilityAnnouncer(
        network=network.network,
        identity=network.identity,
        records=network.records,
        capabilities=network.inventory.capabilities,
        peers=lambda: [entry.peer for entry in membership.directory.reached()],
        jitter=network.jitter,
    )
    replicator = ObservationReplicator(
        network=network.network,
        identity=network.identity,
        history=network.history,
        records=network.records,
        jitter=network.jitter,
    )
    return SwarmParts(membership, placements, placements_changed, announcer, replicator)


def build_serving(
    config: NodeConfig,
    network: NetworkParts,
    swarm: SwarmParts,
    stages: StageServer,
    devices: Sequence[Device],
    progress: Progress,
) -> ServingParts:
    """Build the model library and the supervisor of spans."""
    library = Library(
        ModelStore(config.cache_dir), network.network, swarm.membership, cache_limit_bytes=config.cache_limit_bytes
    )
    spare_worker = SpareWorker(EngineOptions(threads=config.threads))
    options = ServingOptions(
        specs=config.serve,
        draft=config.draft,
        memory_bytes=config.memory_bytes,
        threads=config.threads,
        devices=devices,
        graphs_dir=config.cache_dir / GRAPHS_FOLDER,
        use_catalogue=not config.no_catalogue,
        progress=progress,
        expect_format=spare_worker.expect,
    )
    supervisor = SpanSupervisor(
        options,
        library=library,
        membership=swarm.membership,
        stages=stages,
        placements=swarm.placements,
        jitter=network.jitter,
        start_engine=partial(start_engine, spare=spare_worker),
    )
    return ServingParts(stages, library, spare_worker, supervisor)


def build_client(
    config: NodeConfig, network: NetworkParts, selection: SelectionParts, swarm: SwarmParts, serving: ServingParts
) -> ClientParts:
    """Build the coordinator and what measures by its jobs."""
    announcer, membership = swarm.announcer, swarm.membership

    def capabilities_of(peer: PeerId) -> Capabilities | None:
        own = peer == network.identity.peer_id
        return network.inventory.capabilities() if own else announcer.known(peer)

    def links_of(peer: PeerId) -> Links | None:
        capabilities = announcer.known(peer)
        return None if capabilities is None else capabilities.links

    def relay_to(peer: PeerId) -> PeerId | None:
        way = network.network.way_to(peer)
        return None if way is None else way.relay

    links = LinkEstimates(
        membership.directory, network.identity.peer_id, membership.round_trip_s, links_of, relay_to=relay_to
    )
    recorder = Recorder(network.identity, swarm.replicator.publish)
    quality_store = LocalQualityStore(serving.library, config.cache_dir)
    view = SwarmView(
        finder=membership,
        links=links.between,
        capabilities=capabilities_of,
        expected=membership.directory.expected,
        agreed=selection.chains.agreement,
    )
    coordinator = Coordinator(
        serving.library.open,
        view,
        serving.stages.link_pool,
        network.jitter,
        recorder,
        quality_store=quality_store,
        chooser=selection.chooser,
    )
    return ClientParts(links, quality_store, recorder, coordinator, BenchmarkRunner(coordinator, recorder))


def build_consensus(
    config: NodeConfig,
    database: Database,
    network: NetworkParts,
    selection: SelectionParts,
    swarm: SwarmParts,
    serving: ServingParts,
    client: ClientParts,
) -> ConsensusService:
    """Build this node's part in the consensus."""
    stages, library = serving.stages, serving.library

    def served_models() -> dict[ModelId, bool]:
        """Return the models that live peers serve, and whether this node does and is not about to leave."""
        served = {span.info.model for span in stages.spans()} if not stages.is_draining else set()
        return {model: model in served for model in (*swarm.membership.directory.models(), *served)}

    allowance = MeasuringAllowance(config.exploration, lambda: stages.served_s * network.busy_threads())

    def meter(model: ModelId) -> MeasurementRunner:
        return MeasurementRunner(
            client.trials,
            model,
            partial(is_busy, client.coordinator, stages),
            network.jitter,
            allowance=allowance,
            quality=partial(client.quality_store.quality, model),
            own_peer=network.identity.peer_id,
            own_route=lambda: route_alone(stages, network.identity.peer_id, model),
        )

    environment = ConsensusEnvironment(
        identity=network.identity,
        store=ChainStore(database),
        history=network.history,
        models=served_models,
        hardware=lambda: None if network.inventory.capabilities() is None else network.own_hardware(),
        meter=meter,
        clock_agrees=swarm.membership.heartbeats.clock.agrees,
    )
    clock = EpochClock(config.epoch_s)

    def rules(model: ModelId) -> ConsensusRules:
        """Return the rules of a model's chain; without its manifest, those of a safetensors package."""
        manifest = library.local_manifest(model)
        known = (PackageFormat.SAFETENSORS,) if manifest is None else (manifest.format, weight_type(manifest))
        return ConsensusRules(
            swarm=swarm_name(config.swarm_key),
            plan=measurement_plan(*known),
            clock=clock,
            checkpoints=config.checkpoints,
        )

    return ConsensusService(network.network, selection.chains, environment, clock, rules, network.jitter)


def route_alone(stages: StageServer, own_peer: PeerId, model: ModelId) -> tuple[Stage, ...]:
    """Return the route over this node alone; none where it does not serve the whole model."""
    for span in stages.spans():
        if span.info.model == model and span.info.is_first and span.info.is_last:
            return (Stage(own_peer, span.info.blocks),)
    return ()


def is_busy(coordinator: Coordinator, stages: StageServer) -> bool:
    """Return whether any job or session is running."""
    return coordinator.statistics.running > 0 or any(span.sessions for span in stages.spans())
