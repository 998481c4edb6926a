"""A swarm of several models, whose peers choose their blocks by their memory, and come and go.

A checkpoint, a GGUF file that may be cut anywhere and one that may be cut at every sixth block only. Span supervisors
and stage servers are the real ones; engines load nothing, and word of what others serve spreads without messages: late,
and now and then later still.
"""

import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast
from unittest.mock import patch

import trio

from node.config import ServeSpec
from node.engine.device import Device
from node.engine.interface import parts_of
from node.identity import Identity
from node.models.manifest import FileEntry, Manifest
from node.network.interface import Network
from node.stages import block_placement
from node.stages.block_placement import PlacementAnnouncements
from node.stages.memory_admission import span_bytes_for
from node.stages.span_supervisor import ServingOptions, SpanSupervisor
from node.stages.stage_server import StageServer
from node.swarm.directory import AnnouncedPlacements, Candidate
from node.swarm.membership import Membership
from node.testing.fake_engine import FakeEngine, fake_span_info
from protocol.announcements import ServedSpan
from protocol.identity import BlockRange, ModelId, PeerId, Stage
from selector import placement
from selector.cuts import Parts
from selector.placement import Server, plan_moves
from selector.routing import Demand, Link, NoRouteError, Offer, find_route
from tests.simulation import virtual_time
from tests.simulation.placement import DELAY_S, HEARTBEAT_S, LOAD_BLOCK_S, LOSS, SILENCE_S
from tests.support.job_peers import Peer, Swarm

JOINING_S: Final = 120.0
CHURN_S: Final = 240.0
RECOVERY_S: Final = 120.0
CHECK_S: Final = 5.0
TRIALS: Final = 10
"""Of a plan: others than the placement's simulation, this one is not about the last percent of balance."""
MIB: Final = 1 << 20

CONFIG: Final[dict[str, Any]] = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 32_000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def manifest(name: str, blocks: int, package_format: str, granularity: int) -> Manifest:
    """Return the manifest of a model without files."""

    def file(part: str, size_bytes: int) -> FileEntry:
        return FileEntry(f"{name}-{part}", size_bytes, "0" * 64)

    return Manifest(
        config=CONFIG | {"num_hidden_layers": blocks},
        bos_token_id=None,
        eos_token_ids=(),
        tokenizer_files=(),
        embed=file("embed", 9 * MIB),
        head=file("head", 13 * MIB),
        blocks=tuple(file(f"block-{number:03d}", 20 * MIB) for number in range(blocks)),
        common=file("common", 4096) if package_format == "gguf" else None,
        format=package_format,
        granularity=granularity,
    )


MODELS: Final = {
    "checkpoint": manifest("checkpoint", 24, "safetensors", 1),
    "gguf": manifest("gguf", 32, "gguf", 1),
    "gguf by six": manifest("gguf by six", 26, "gguf", 6),
}
PARTS: Final = {"safetensors": Parts.ANY, "gguf": parts_of("llamacpp")}


@dataclass
class Outcome:
    """What became of the models, by name. `complete_share`: of the time of coming and going."""

    joined: dict[str, bool] = field(default_factory=dict)
    """Whether there was a route once all had joined, and after a third has left at once."""
    recovered: dict[str, bool] = field(default_factory=dict)
    complete_share: dict[str, float] = field(default_factory=dict)
    moves: int = 0
    left: int = 0
    faults: list[str] = field(default_factory=list)
    """Where coverage and the existence of a route said different things, and spans that may not be cut there."""


def play(seed: int, *, peers: int = 60) -> Outcome:
    """Return what becomes of a swarm; the same every time."""

    async def program() -> Outcome:
        async with trio.open_nursery() as nursery:
            outcome = await _Play(MixedSwarm(nursery, seed), random.Random(seed), peers).run()
            nursery.cancel_scope.cancel()
        return outcome

    # Every peer plans for itself. All live in one process, which plans the same only once.
    with patch.object(block_placement, "plan_moves", _plan_moves), patch.object(placement, "TRIALS", TRIALS):
        return virtual_time.run(program, seed=seed)


def _plan_moves(unit_count: int, servers: Iterable[Server], rng: random.Random) -> Mapping[PeerId, BlockRange]:
    return _planned(unit_count, tuple(servers))


@lru_cache(maxsize=4096)
def _planned(unit_count: int, servers: tuple[Server, ...]) -> Mapping[PeerId, BlockRange]:
    return MappingProxyType(plan_moves(unit_count, servers, random.Random(0)))


@dataclass(frozen=True)
class Said:
    """What a peer announced, and when each other peer hears of it: drawn when that one first listens."""

    said_s: float
    placements: AnnouncedPlacements
    spans: tuple[ServedSpan, ...]
    rng: random.Random
    heard_s: dict[PeerId, float]

    def is_heard(self, by: PeerId, now_s: float) -> bool:
        heard_s = self.heard_s.get(by)
        if heard_s is None:
            late_s = self.rng.uniform(*DELAY_S) + (HEARTBEAT_S if self.rng.random() < LOSS else 0)
            heard_s = self.heard_s[by] = self.said_s + late_s
        return heard_s <= now_s


class Rumours:
    """Stands in for a peer's membership and its directory of others."""

    def __init__(self, network: Network, stages: StageServer, placed: PlacementAnnouncements, swarm: "MixedSwarm"):
        self.directory = self
        self._peer = network.peer_id
        self._stages = stages
        self._placements = placed
        self._swarm = swarm

    async def run(self) -> None:
        await trio.sleep_forever()

    def bootstrap(self) -> Sequence[str]:
        return ("somebody",)

    def announce(self) -> None:
        now_s = trio.current_time()
        said = Said(
            now_s, self._placements.current(), self._stages.served_spans(), self._swarm.rng, {self._peer: now_s}
        )
        self._swarm.said.setdefault(self._peer, []).append(said)

    def round_trip_s(self, peer: PeerId) -> float | None:
        return None

    def _heard(self) -> Iterable[tuple[PeerId, Sequence[Said]]]:
        now_s = trio.current_time()
        for peer, said in self._swarm.said.items():
            if self._swarm.died_s.get(peer, now_s) + SILENCE_S > now_s:
                heard = [each for each in said if each.is_heard(self._peer, now_s)]
                if heard:
                    yield peer, heard

    def servers(self, model: ModelId, until_ms: int) -> tuple[Server, ...]:
        found = []
        for peer, heard in self._heard():
            before = [each.placements for each in heard if each.placements.since_ms <= until_ms]
            found += [
                Server(Stage(peer, placed.blocks), placed.rate, placed.movable)
                for placed in (before[-1].placements if before else ())
                if placed.model == model
            ]
        return tuple(sorted(found))

    def candidates(self, model: ModelId, *, without: Iterable[PeerId] = ()) -> tuple[Candidate, ...]:
        excluded = set(without)
        return tuple(
            Candidate(Stage(peer, span.blocks), span.load)
            for peer, heard in self._heard()
            if peer not in excluded
            for span in heard[-1].spans
            if span.model == model
        )


class Library:
    """Has the manifests, and fetches and loads at a peer's pace."""

    def __init__(self, load_block_s: float) -> None:
        self._load_block_s = load_block_s

    async def manifest(self, text: str, **_: object) -> Manifest:
        return MODELS[text]

    async def weights(self, model: Manifest, blocks: BlockRange, **_: object) -> Manifest:
        await trio.sleep(self._load_block_s * len(blocks))
        return model

    def in_use(self, _package: object, _blocks: BlockRange) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def name_of(self, model: ModelId) -> str:
        return next(name for name, each in MODELS.items() if each.model_id == model)


@dataclass
class Member:
    """A peer that serves a model, until its scope is cancelled."""

    peer: Peer
    model: str
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class MixedSwarm(Swarm):
    """Peers that serve blocks of their own choice."""

    def __init__(self, nursery: trio.Nursery, seed: int) -> None:
        super().__init__(nursery, seed)
        self._tasks = nursery
        self.members: list[Member] = []
        self.said: dict[PeerId, list[Said]] = {}
        self.died_s: dict[PeerId, float] = {}
        self.started = 0

    def _membership(
        self, identity: Identity, network: Network, stages: StageServer, placements: PlacementAnnouncements
    ) -> Membership:
        return cast("Membership", Rumours(network, stages, placements, self))

    async def join_with(self, model: str, memory_bytes: int) -> None:
        """Start a peer that serves what fits into its memory; return at once."""
        member = Member(await self.join(), model)
        self.members.append(member)
        self._tasks.start_soon(self._serve_model, member, memory_bytes, self.rng.uniform(*LOAD_BLOCK_S))

    async def _serve_model(self, member: Member, memory_bytes: int, load_block_s: float) -> None:
        @asynccontextmanager
        async def start_engine(model: Any, blocks: BlockRange, _options: object) -> AsyncIterator[FakeEngine]:
            self.started += 1
            yield FakeEngine(fake_span_info(blocks, model=model.model_id, block_count=model.block_count), step_s=0.01)

        peer = member.peer
        supervisor = SpanSupervisor(
            ServingOptions(
                specs=[ServeSpec(member.model)],
                memory_bytes=memory_bytes,
                threads=1,
                devices=(Device("cpu", 1 << 40),),
                graphs_dir=Path(),
                use_catalogue=False,
            ),
            library=cast("Any", Library(load_block_s)),
            membership=peer.membership,
            stages=peer.stages,
            placements=peer.placements,
            jitter=self.rng,
            start_engine=cast("Any", start_engine),
            offload=_inline,
        )
        with member.scope:
            await supervisor.run()

    def die(self, member: Member) -> None:
        """Kill a peer, of which the others learn when they miss its heartbeats."""
        self.members.remove(member)
        self.died_s[member.peer.id] = trio.current_time()
        member.scope.cancel()
        self.hub.kill(member.peer.id)

    def spans(self, model: Manifest) -> list[Stage]:
        """Return what is served of a model."""
        return [
            Stage(member.peer.id, span.blocks)
            for member in self.members
            for span in member.peer.stages.served_spans()
            if span.model == model.model_id
        ]


async def _inline(function: Callable[[], Any]) -> Any:
    await trio.lowlevel.checkpoint()
    return function()


class _Play:
    def __init__(self, swarm: MixedSwarm, rng: random.Random, peers: int) -> None:
        self._swarm = swarm
        self._rng = rng
        self._peers = peers
        self._outcome = Outcome()

    async def run(self) -> Outcome:
        swarm, rng, outcome = self._swarm, self._rng, self._outcome
        joins_s = sorted(rng.uniform(0, JOINING_S) for _ in range(self._peers))
        for number, when_s in enumerate(joins_s):
            await trio.sleep_until(when_s)
            await self._join(list(MODELS)[number % len(MODELS)])
        await trio.sleep_until(JOINING_S + RECOVERY_S)
        outcome.joined = self._routes()
        complete = dict.fromkeys(MODELS, 0)
        checks = int(CHURN_S / CHECK_S)
        for number in range(checks):
            if number % 2:
                await self._join(rng.choice(list(MODELS)))
            else:
                self._leave(rng.choice(swarm.members))
            await trio.sleep(CHECK_S)
            for name, found in self._routes().items():
                complete[name] += found
        outcome.complete_share = {name: count / checks for name, count in complete.items()}
        for member in rng.sample(swarm.members, len(swarm.members) // 3):
            self._leave(member)
        await trio.sleep(RECOVERY_S)
        outcome.recovered = self._routes()
        outcome.moves = swarm.started - self._peers - checks // 2
        return outcome

    async def _join(self, name: str) -> None:
        """Join with memory for a number of units of the model, from one to all."""
        model = MODELS[name]
        units = self._rng.choice(
            [1, 1, 2, 2, 3, max(1, model.cuts.unit_count // 4), max(1, model.cuts.unit_count // 2)]
        )
        spans = [model.cuts.blocks_of(BlockRange(first, first + units)) for first in (0, model.cuts.unit_count - units)]
        await self._swarm.join_with(name, max(span_bytes_for(model, span) for span in spans) + MIB)

    def _leave(self, member: Member) -> None:
        self._outcome.left += 1
        self._swarm.die(member)

    def _routes(self) -> dict[str, bool]:
        """Return for each model whether there is a route now; note where the coverage says otherwise."""
        found = {}
        for name, model in MODELS.items():
            stages = self._swarm.spans(model)
            offers = [Offer(stage, 0.001, parts=PARTS[model.format]) for stage in stages]
            demand = Demand(
                block_count=model.block_count, prompt_rows=9, new_tokens=9, row_bytes=64, granularity=model.granularity
            )
            try:
                find_route(demand, offers, lambda a, b: Link(0.01, 1e8))
            except NoRouteError:
                found[name] = False
            else:
                found[name] = True
            if found[name] == bool(model.cuts.uncovered(stage.blocks for stage in stages)):
                self._outcome.faults.append(f"{name} at {trio.current_time():.0f} s: {sorted(stages)}")
            self._outcome.faults += [fault for stage in stages if (fault := model.cuts.fault(stage.blocks))]
        return found
