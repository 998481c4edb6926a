"""Whole peers over the in-memory network: real membership, stages and coordinator; an engine that is a hash chain."""

import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import trio

from node.config import ServeSpec
from node.coordinator.coordinator import Coordinator
from node.coordinator.method_choice import Chooser, QualityStore
from node.coordinator.observation import Recorder
from node.coordinator.submission import JobRequest, JobResult
from node.coordinator.swarm_view import SwarmView
from node.engine.device import Device
from node.engine.interface import REFERENCE, EngineCrashed, EngineOptions, SpanInfo, Variant, reference_variant
from node.identity import Identity
from node.models.library import KnownModel
from node.models.vocabulary import Vocabulary
from node.network.addresses import AddressBook
from node.network.interface import Network
from node.stages.background_allowance import BackgroundAllowance
from node.stages.block_placement import PlacementAnnouncements
from node.stages.memory_admission import span_bytes_for
from node.stages.scheduler import PolicyController
from node.stages.span import Span
from node.stages.span_supervisor import ServingOptions, SpanSupervisor
from node.stages.stage_server import StageServer
from node.stages.voter import Agreement, Voter
from node.swarm.dht_records import RecordKinds
from node.swarm.heartbeats import OwnServices
from node.swarm.link_estimates import LinkEstimates
from node.swarm.membership import Membership
from node.testing.fake_engine import FAKE_GGUF_MODEL, FAKE_MODEL, FakeEngine, fake_format, fake_span_info
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetworkHub
from node.util.offload import run_inline
from protocol.capabilities import Capabilities, hardware_class
from protocol.identity import BlockRange, JobId, ModelId, PeerId, SessionId
from protocol.messages import Open, Sampling, Slice, Step
from protocol.tensors import tensor_from_tokens
from selector.cuts import Cuts
from selector.routing import Links
from selector.task import BASELINE
from tests.support.capabilities import EPYC
from tests.support.heuristic_selection import HeuristicChooser, HeuristicVoter, NullQualityStore

BLOCKS = 9
HARDWARE = hardware_class(EPYC)
VOCABULARY = 1000


class NumberTokenizer:
    """Its text is numbers: token 7 reads "7 "; of other words it makes some number."""

    is_absent = False
    tool_format: str | None = None
    reasons = False
    reasoning_tokens: tuple[int, int] | None = None
    marks: dict[int, str] = {}  # noqa: RUF012 - as the real one has it
    stop_tokens: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.vocabulary = Vocabulary.build(b"", (f"{token} ".encode() for token in range(VOCABULARY)))

    def asked_by(self, asker: str) -> "NumberTokenizer":
        return self

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        await trio.lowlevel.checkpoint()
        return tuple((int(word) if word.isdecimal() else sum(word.encode())) % VOCABULARY for word in text.split())

    async def render_chat_text(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any], options: Any) -> str:
        await trio.lowlevel.checkpoint()
        return " ".join(message["content"] for message in messages)

    async def schema_fault(self, schema: str) -> str:
        await trio.lowlevel.checkpoint()
        return ""

    async def token_bytes(self, tokens: Sequence[int]) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        return [f"{token} ".encode() for token in tokens]

    async def decode(self, *sequences: Sequence[int]) -> list[str]:
        await trio.lowlevel.checkpoint()
        return ["".join(f"{token} " for token in tokens) for tokens in sequences]


@dataclass(frozen=True)
class _File:
    size_bytes: int = 4096


@dataclass(frozen=True)
class _Shape:
    """What of a manifest a coordinator looks at."""

    model_id: ModelId = FAKE_MODEL
    model_type: str = "fake"
    block_count: int = BLOCKS
    hidden_size: int = 32
    vocabulary_size: int = VOCABULARY
    max_positions: int = 4096
    config: dict[str, Any] = field(default_factory=lambda: {"hidden_size": 32, "num_attention_heads": 1})
    format: str = "safetensors"
    tied: bool = False
    common: None = None
    embed: _File = _File(4 * VOCABULARY * 32)
    blocks: tuple[_File, ...] = (_File(8 << 20),) * BLOCKS
    head: _File = _File()

    tokenizer: str = "numbers"
    granularity: int = 1

    @property
    def cuts(self) -> Cuts:
        return Cuts(self.block_count, self.granularity)

    @property
    def weight_files(self) -> list[_File]:
        return [self.embed, *self.blocks, self.head]

    def files_for(self, blocks: BlockRange) -> list[_File]:
        return [_File()] * len(blocks)

    def has_tokens_of(self, other: "_Shape") -> bool:
        return self.tokenizer == other.tokenizer


_GGUF = _Shape(FAKE_GGUF_MODEL, config={"weight_type": "Q4_1"}, format="gguf", blocks=(_File(1024),) * BLOCKS)


def wall_clock() -> float:
    """Return what all clocks show, in virtual time."""
    return 1_800_000_000 + trio.current_time()


class FakeLibrary:
    """Has every file of the fake model, which knows numbers, and of one that knows nothing else than letters."""

    granularity = 1

    async def manifest(self, text: str, **options: object) -> Any:
        return _Shape(tokenizer="letters" if text == "letters" else "numbers", granularity=self.granularity)

    async def weights(self, manifest: object, blocks: BlockRange, **options: object) -> Any:
        await trio.sleep(1)
        return None

    def in_use(self, package: object, blocks: BlockRange) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def name_of(self, model: ModelId) -> str:
        return "fake"


class FakeModels:
    """Knows the fake engine's GGUF model under the name "fake-gguf", and its other one under any other name."""

    def __init__(self, tokenizer: NumberTokenizer) -> None:
        self.known = KnownModel(FAKE_MODEL, "fake", cast("Any", _Shape()), cast("Any", tokenizer))
        self.gguf = KnownModel(FAKE_GGUF_MODEL, "fake-gguf", cast("Any", _GGUF), cast("Any", tokenizer))

    async def open(self, text: str) -> KnownModel:
        await trio.lowlevel.checkpoint()
        return self.gguf if text in {self.gguf.name, self.gguf.id} else self.known


@dataclass
class Peer:
    """One peer of the swarm."""

    network: Network
    stages: StageServer
    membership: Membership
    coordinator: Coordinator
    tokenizer: NumberTokenizer
    placements: PlacementAnnouncements
    models: FakeModels
    engines: list[FakeEngine] = field(default_factory=list)

    @property
    def id(self) -> PeerId:
        return self.network.peer_id

    async def run(self, request: JobRequest) -> JobResult:
        """Run a job to its end."""
        async with self.coordinator.submit(request) as events:
            async for event in events:
                if isinstance(event, JobResult):
                    return event
        raise AssertionError("a job ends with its result")

    def held(self) -> tuple[int, int]:
        """Return the sessions and the KV positions that this peer holds."""
        statistics = [engine.statistics() for engine in self.engines]
        return sum(len(s.sessions) for s in self.stages.spans()), sum(s.reserved_positions for s in statistics)


class Swarm:
    """Peers that come and go on a network in memory."""

    def __init__(
        self,
        nursery: trio.Nursery,
        seed: int = 1,
        link: LinkModel | None = None,
        controller: Callable[[], PolicyController] = PolicyController,
        *,
        address_book: AddressBook | None = None,
    ) -> None:
        self._controller = controller
        self.hub = MemoryNetworkHub(random.Random(seed), link, address_book=address_book)
        self.peers: list[Peer] = []
        self._capabilities: dict[PeerId, Capabilities] = {}
        """What every peer knows of the others' machines."""
        self._nursery = nursery
        self.rng = random.Random(seed)

    async def join(
        self,
        *spans: tuple[int, int],
        step_s: float = 0.01,
        variants: Iterable[Variant] | None = None,
        chooser: Chooser | None = None,
        voter: Voter | None = None,
        recorder: Recorder | None = None,
        row_s: float | None = None,
        slowness: Mapping[Variant, float] | None = None,
        ledger: QualityStore | None = None,
        agreed: Agreement | None = None,
        draft: FakeEngine | None = None,
        capabilities: Capabilities = EPYC,
        background: BackgroundAllowance | None = None,
        **shape: Any,
    ) -> Peer:
        """Start a peer that serves spans of the fake model; the first peer of the swarm is its bootstrap peer.

        `variants`: of its engines when they start; None: all. `draft`: the engine of a whole model, which drafts for
        jobs whose first blocks are served here. `shape`: of the model, see `fake_span_info`.
        """
        identity = Identity(self.rng.randbytes(32))
        network = self.hub.network(identity.peer_id)
        self._capabilities[identity.peer_id] = capabilities
        stages = StageServer(
            network,
            "test/1",
            private_key=identity.private_key,
            hardware=lambda: hardware_class(capabilities),
            voter=voter or HeuristicVoter(),
            controller=self._controller,
            agreed=lambda model: agreed,
            background=background,
        )
        placements = PlacementAnnouncements(lambda: membership.announce(), wall_clock)
        membership = self._membership(identity, network, stages, placements)
        tokenizer = NumberTokenizer()
        models = FakeModels(tokenizer)
        links = self._links(network, membership)
        coordinator = Coordinator(
            models.open,
            SwarmView(
                finder=membership,
                links=links,
                capabilities=self._capabilities.get,
                expected=lambda model: self._expected(membership, model),
                agreed=lambda model: agreed,
            ),
            stages.link_pool,
            self.rng,
            recorder,
            chooser=chooser or HeuristicChooser(),
            quality_store=ledger or NullQualityStore(),
        )
        peer = Peer(network, stages, membership, coordinator, tokenizer, placements, models)
        self.peers.append(peer)
        make_engine = partial(
            FakeEngine,
            step_s=step_s,
            row_s=step_s / 100 if row_s is None else row_s,
            variants=None if variants is None else tuple(variants),
            slowness=slowness,
        )
        await self._nursery.start(self._carry, peer, spans, make_engine, draft, shape)
        return peer

    async def join_where_needed(
        self,
        length: int,
        library: Any = None,
        *,
        draft: str | None = None,
        blocks: BlockRange | None = None,
        devices: Sequence[Device] = (Device("cpu", 1 << 40),),
        memory_bytes: int | None = None,
    ) -> Peer:
        """Start a peer that serves a number of blocks of the fake model on each device, its own choice or given.

        `memory_bytes`: by default what these take.
        """
        peer = await self.join()
        shape = _Shape()
        anywhere = [BlockRange(0, length), BlockRange(BLOCKS - length, BLOCKS)]
        memory_bytes = memory_bytes or max(span_bytes_for(cast("Any", shape), span) for span in anywhere)

        @asynccontextmanager
        async def start_engine(
            package: object, blocks: BlockRange, options: EngineOptions
        ) -> AsyncIterator[FakeEngine]:
            info = replace(fake_span_info(blocks, block_count=BLOCKS), device=options.device)
            engine = FakeEngine(info, step_s=0.01, row_s=0.0001, variants=[REFERENCE])
            peer.engines.append(engine)
            yield engine

        serving = SpanSupervisor(
            ServingOptions(
                specs=[ServeSpec("fake", blocks)],
                memory_bytes=memory_bytes * (1 if draft is None else 2),
                draft=draft,
                threads=1,
                devices=devices,
                graphs_dir=Path(),
                use_catalogue=False,
            ),
            library=library or cast("Any", FakeLibrary()),
            membership=peer.membership,
            stages=peer.stages,
            placements=peer.placements,
            jitter=self.rng,
            start_engine=start_engine,
            offload=run_inline,
        )
        await self._nursery.start(serving.run)
        return peer

    def lose_record(self, peer: PeerId) -> None:
        """Have nobody know what machine a peer runs on."""
        del self._capabilities[peer]

    def _membership(
        self, identity: Identity, network: Network, stages: StageServer, placements: PlacementAnnouncements
    ) -> Membership:
        return Membership(
            network=network,
            identity=identity,
            services=OwnServices(agent="test/1", served_spans=stages.served_spans, placements=placements.current),
            bootstrap=self.peers[0].network.multiaddrs if self.peers else (),
            records=RecordKinds(network),
            jitter=self.rng,
            wall_clock=wall_clock,
        )

    def _expected(self, membership: Membership, model: ModelId) -> tuple[BlockRange, ...]:
        return membership.directory.expected(model)

    def _links(self, network: Network, membership: Membership) -> Links:
        return LinkEstimates(membership.directory, network.peer_id, membership.round_trip_s, lambda _: None).between

    async def _carry(
        self,
        peer: Peer,
        spans: Iterable[tuple[int, int]],
        make_engine: Callable[[SpanInfo], FakeEngine],
        draft: FakeEngine | None,
        shape: dict[str, Any],
        *,
        task_status: trio.TaskStatus[None],
    ) -> None:
        async with peer.network.running(), peer.stages.link_pool.running(), trio.open_nursery() as nursery:
            nursery.start_soon(peer.membership.run)
            for start, end in spans:
                info = fake_span_info(BlockRange(start, end), block_count=BLOCKS, **shape)
                engine = make_engine(info)
                peer.engines.append(engine)
                await nursery.start(self._serve, peer, engine)
                peer.membership.announce()
            if draft is not None:
                peer.engines.append(draft)
                await nursery.start(self._run_draft_model, peer, draft)
            task_status.started()
            await trio.sleep_forever()

    async def _run_draft_model(self, peer: Peer, engine: FakeEngine, *, task_status: trio.TaskStatus[None]) -> None:
        package_format = fake_format(engine.info.model)
        target = FAKE_GGUF_MODEL if package_format == "gguf" else FAKE_MODEL
        try:
            await peer.stages.run_draft_model(
                engine, reference_variant(package_format), [target], task_status=task_status
            )
        except* EngineCrashed:
            peer.engines.remove(engine)

    async def _serve(self, peer: Peer, engine: FakeEngine, *, task_status: trio.TaskStatus[Span]) -> None:
        try:
            await peer.stages.serve(engine, task_status=task_status)
        except* EngineCrashed:
            peer.membership.announce()

    async def serve_again(self, peer: Peer, span: tuple[int, int], step_s: float = 0.01) -> None:
        """Have a peer whose engine crashed serve a span again."""
        peer.engines.clear()
        engine = FakeEngine(fake_span_info(BlockRange(*span), block_count=BLOCKS), step_s=step_s, row_s=step_s / 100)
        peer.engines.append(engine)
        await self._nursery.start(self._serve, peer, engine)
        peer.membership.announce()

    def serving(self, span: tuple[int, int]) -> Peer:
        """Return a peer that serves a span and has a session of a job."""
        return next(each for each in self.peers if each.held()[0] and each.engines[0].info.blocks == BlockRange(*span))

    async def settle(self) -> None:
        """Wait until every peer knows every other, and what it serves."""
        while not all(self._knows(peer, other) for peer in self.peers for other in self.peers):
            await trio.sleep(0.1)

    def _knows(self, peer: Peer, other: Peer) -> bool:
        presence = peer.membership.directory.get(other.id)
        served = {span.blocks for span in other.stages.served_spans()}
        return presence is not None and {span.blocks for span in presence.spans} == served


@asynccontextmanager
async def open_swarm(
    seed: int = 1, link: LinkModel | None = None, controller: Callable[[], PolicyController] = PolicyController
) -> AsyncIterator[Swarm]:
    """Hold a swarm inside the block."""
    async with trio.open_nursery() as nursery:
        yield Swarm(nursery, seed, link, controller)
        nursery.cancel_scope.cancel()


def a_step(session: SessionId) -> Step:
    """Return rows for the first stage of a job."""
    return Step(slices=(Slice(session=session, position=0, rows=1),), tensor=tensor_from_tokens([1]))


def an_opening(peer: Peer) -> Open:
    """Return what opens a session of the whole fake model at a peer, with nearly all its memory."""
    info = peer.engines[0].info
    return Open(
        session=SessionId(JobId("00" * 16), 0),
        model=info.model,
        blocks=info.blocks,
        methods=(BASELINE.name,),
        positions=4000,
        sampling=Sampling(max_tokens=10),
    )
