"""What this node serves: gets the files of its spans, runs an engine for each, and starts another when one dies.

Which blocks those are, where the node chooses them itself, is decided in `placing`.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import trio

from node.config import MEMORY_SHARE, ServeSpec, StartError
from node.engine.base import Engine
from node.engine.client import start_engine
from node.engine.device import CPU, Device, DeviceError, find_device
from node.engine.engine_config import EngineOptions
from node.engine.interface import REFERENCE, EngineCrashed, EngineError, Variant
from node.models.errors import ModelError
from node.models.files import Progress, ignore_progress
from node.models.library import Library
from node.models.manifest import Manifest
from node.models.store import AmbiguousModelError, Package, UnknownModelError
from node.stages.block_placement import BlockPlacer, PlacementAnnouncements, unknown_rate
from node.stages.replay_buffer import replay_bytes_of
from node.stages.span import Span
from node.stages.stage_server import StageServer
from node.swarm.membership import HEARTBEAT_INTERVAL_S, Membership
from node.util.offload import Offload, run_in_thread
from protocol.announcements import Placement
from protocol.identity import BlockRange, ModelId, PeerId
from selector.task import PORTFOLIO

RETRY_S = (1.0, 30.0)
"""First and longest pause before a span that could not be had, or whose engine died, is tried again."""

WEIGHT_SHARE = 0.75
"""Of a span's memory, when the node chooses the blocks itself; the rest is for KV caches."""

_EXACT_VARIANTS = tuple(
    variant
    for variant in dict.fromkeys(
        Variant(method.engine, method.arithmetic) for method in PORTFOLIO.values() if method.exact
    )
    if variant != REFERENCE
)
"""Built before any job asks for them: who is to take a lost stage's place has to calculate as that one did."""

_HALF_PRECISION = ("bfloat16", "float16")

HEARD_ROUND_S = 0.1
"""How often a node that is new looks whether it has heard of anybody."""

SETTLED_S = 1.0
"""So long after it has, it has heard what there is to hear."""

DRAFT_VARIANTS = (Variant("onnxruntime", "int8"), Variant("fused", "int8"))
"""What a draft model is computed with on a CPU, the quickest first: its guesses need not be exact."""

GPU_DRAFT_VARIANTS = (Variant("fused", "bf16"),)

StartEngine = Callable[[Package, BlockRange, EngineOptions], AbstractAsyncContextManager[Engine]]

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Held:
    """A span that is served, until the scope is cancelled."""

    span: Span
    scope: trio.CancelScope


class SpanSupervisor:
    """Keeps the spans of `--serve` served."""

    def __init__(
        self,
        specs: Sequence[ServeSpec],
        *,
        library: Library,
        membership: Membership,
        stages: StageServer,
        statements: PlacementAnnouncements,
        own_peer: PeerId,
        memory_bytes: int | None,
        draft: str | None = None,
        threads: int | None,
        device: Device,
        graphs_dir: Path,
        use_catalogue: bool,
        jitter: random.Random,
        start_engine: StartEngine = start_engine,
        offload: Offload = run_in_thread,
        progress: Progress = ignore_progress,
    ) -> None:
        self._specs = tuple(dict.fromkeys(specs))
        self._draft = draft
        self._library = library
        self._membership = membership
        self._stages = stages
        self.statements = statements
        self._own_peer = own_peer
        self._placings: dict[ModelId, BlockPlacer] = {}
        self._start_engine = start_engine
        self._offload = offload
        self._progress = progress
        self._threads = threads
        self._device = device.name
        self._graphs_dir = graphs_dir
        self._use_catalogue = use_catalogue
        self._jitter = jitter
        budget_bytes = memory_bytes or int(device.free_bytes * MEMORY_SHARE)
        self._span_bytes = budget_bytes // max(1, len(self._specs) + (draft is not None))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started once every span is loaded. Raises StartError where one never can be."""
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as starting:
                for spec in self._specs:
                    starting.start_soon(nursery.start, self._keep, str(spec), partial(self._serve, spec))
                if self._draft is not None:
                    starting.start_soon(nursery.start, self._keep, self._draft, partial(self._guess, self._draft))
            task_status.started()

    async def _keep(
        self,
        name: str,
        serve: Callable[..., Awaitable[None]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Load and serve something, again after every failure: what is missing now may come with another peer."""
        pause_s, longest_s = RETRY_S
        loaded = False
        while True:
            # What never was served may end the start of a node; what was served once never ends the node.
            passing: tuple[type[Exception], ...] = (
                ModelError,
                EngineCrashed,
                *((StartError, OSError) if loaded else ()),
            )
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(serve)
                    pause_s = RETRY_S[0]
                    if not loaded:
                        loaded = True
                        task_status.started()
            except* passing as group:
                _logger.warning("not served now", what=name, reason=_reasons(group), again_in_s=pause_s)
            self._membership.announce()
            await trio.sleep(pause_s * self._jitter.uniform(0.8, 1.2))
            pause_s = min(longest_s, pause_s * 2)

    async def _serve(self, spec: ServeSpec, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve a span until its engine dies. Raises StartError for what no peer and no time can mend."""
        try:
            manifest = await self._library.manifest(spec.model, use_catalogue=self._use_catalogue)
            if spec.blocks is None:
                await self._serve_where_needed(manifest, task_status)
                return
            if spec.blocks.end > manifest.block_count:
                raise StartError(f"cannot serve {spec}: the model has blocks 0-{manifest.block_count}")
            rate = unknown_rate(len(spec.blocks))
            said = Placement(model=manifest.model_id, blocks=spec.blocks, rate=rate, movable=False)
            self.statements.say(spec, said)
            async with trio.open_nursery() as nursery:
                await nursery.start(self._hold, manifest, spec.blocks)
                task_status.started()
        except (UnknownModelError, AmbiguousModelError) as error:
            raise StartError(f"cannot serve {spec}: {error}") from None

    async def _guess(self, name: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Guess with a whole model until its engine dies. Raises StartError where it has none of the served tokens."""
        try:
            manifest = await self._library.manifest(name, use_catalogue=self._use_catalogue)
            served = [
                await self._library.manifest(spec.model, use_catalogue=self._use_catalogue) for spec in self._specs
            ]
        except (UnknownModelError, AmbiguousModelError) as error:
            raise StartError(f"cannot guess with {name}: {error}") from None
        models = {each.model_id for each in served if each.has_tokens_of(manifest)}
        if not models:
            theirs = " or ".join(dict.fromkeys(spec.model for spec in self._specs))
            raise StartError(f"cannot guess with {name} what {theirs} says: they have different tokenizers")
        self._stages.expect_guesses(models)
        task_status.started()  # jobs need not wait for who only saves them time
        blocks = BlockRange(0, manifest.block_count)
        package = await self._library.weights(
            manifest, blocks, use_catalogue=self._use_catalogue, progress=self._progress
        )
        with self._library.in_use(package, blocks):
            try:
                async with self._start_engine(package, blocks, self._engine_options(self._span_bytes)) as engine:
                    variant = await self._quickest(engine)
                    async with trio.open_nursery() as nursery:
                        await nursery.start(self._stages.guess, engine, variant, models)
                        _logger.info("guessing", model=manifest.model_id, variant=str(variant))
            except EngineCrashed:
                raise
            except EngineError as error:  # no reason to stop serving: it is tried again, as after a crash
                raise EngineCrashed(f"cannot guess with {name}: {error}") from None

    async def _quickest(self, engine: Engine) -> Variant:
        """Build the quickest variant that can be had for a draft model, and return it."""
        for variant in DRAFT_VARIANTS if self._device == CPU else GPU_DRAFT_VARIANTS:
            try:
                await engine.prepare(variant)
            except EngineCrashed:
                raise
            except EngineError as error:
                _logger.info("variant not to be had", variant=str(variant), why=str(error))
            else:
                return variant
        return REFERENCE

    async def _serve_where_needed(self, manifest: Manifest, task_status: trio.TaskStatus[None]) -> None:
        """Serve the blocks that the swarm lacks most, and others when it lacks those more.

        What is new is served before what is old goes, and that goes only once others serve it and its last session has
        ended.
        """
        model = manifest.model_id
        placing = self._placings.get(model)
        if placing is None:
            placing = self._placings[model] = BlockPlacer(
                model,
                manifest.block_count,
                own_peer=self._own_peer,
                membership=self._membership,
                statements=self.statements,
                jitter=self._jitter,
                offload=self._offload,
            )
        said = self.statements.of(model)
        blocks = said.blocks if said else await self._choose(manifest, placing)
        placing.say(blocks)
        async with trio.open_nursery() as nursery:
            try:
                held = await nursery.start(self._hold, manifest, blocks)
            except* (ModelError, StartError):
                placing.say(None)  # others should not count on us; and next time other blocks may be lacked more
                raise
            task_status.started()
            while True:
                target = await placing.next_move(blocks, lambda held=held: held.span.load().step_s)  # type: ignore[misc]
                new = await self._try_to_hold(manifest, target, nursery)
                if new is None:
                    placing.bar(target)
                    placing.say(blocks)
                    continue
                await placing.wait_dispensable(blocks, target)
                self._stages.retire(held.span)
                self._membership.announce()
                await self._stages.wait_retired(held.span)
                held.scope.cancel()
                _logger.info("moved to other blocks", model=model, dropped=str(blocks), blocks=str(target))
                held, blocks = new, target

    async def _try_to_hold(self, manifest: Manifest, blocks: BlockRange, nursery: trio.Nursery) -> _Held | None:
        """Serve a span beside what is served already; None where that fails, which harms nothing."""
        weight_bytes = _loaded_bytes(manifest, sum(file.size_bytes for file in manifest.files_for(blocks)))
        needed_bytes = int(weight_bytes / MEMORY_SHARE)
        if self._device != CPU:  # whose memory is taken at once, all that may be needed
            needed_bytes = max(needed_bytes, self._span_bytes)
        try:
            free_bytes = (await find_device(self._device)).free_bytes
        except DeviceError as error:
            free_bytes = 0
            _logger.warning("how much of the device is free is not known", device=self._device, reason=str(error))
        if needed_bytes > free_bytes:
            why = f"they need {needed_bytes} bytes of memory beside the old ones, of {free_bytes} that are free"
            _logger.warning("stayed with the old blocks", model=manifest.model_id, wanted=str(blocks), reason=why)
            return None
        held = None
        try:
            held = await nursery.start(self._hold, manifest, blocks)
        except* (ModelError, EngineError, StartError) as group:
            why = _reasons(group)
            _logger.warning("stayed with the old blocks", model=manifest.model_id, wanted=str(blocks), reason=why)
        return held

    async def _hold(
        self,
        manifest: Manifest,
        blocks: BlockRange,
        *,
        task_status: trio.TaskStatus[_Held] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Get the files of a span, and serve it until its scope is cancelled or its engine dies."""
        package = await self._library.weights(
            manifest, blocks, use_catalogue=self._use_catalogue, progress=self._progress
        )
        replay_bytes = replay_bytes_of(self._span_bytes)
        # What is kept for replays lies in main memory, whatever computes.
        options = self._engine_options(self._span_bytes - (replay_bytes if self._device == CPU else 0))
        with trio.CancelScope() as scope, self._library.in_use(package, blocks):
            try:
                async with self._start_engine(package, blocks, options) as engine, trio.open_nursery() as nursery:
                    span = await nursery.start(self._stages.serve, engine, replay_bytes)
                    span.want(_EXACT_VARIANTS)
                    self._membership.announce()
                    load_s = round(engine.info.load_s, 2)
                    _logger.info(
                        "serving", model=manifest.model_id, blocks=str(blocks), device=self._device, load_s=load_s
                    )
                    task_status.started(_Held(span, scope))
            except EngineCrashed:
                raise
            except EngineError as error:
                name = self._library.name_of(manifest.model_id)
                raise StartError(f"cannot serve {name}:{blocks}: {error}") from None

    def _engine_options(self, memory_bytes: int) -> EngineOptions:
        return EngineOptions(
            memory_bytes=memory_bytes,
            threads=self._threads,
            cache_dir=self._graphs_dir,
            device=self._device,
            plan_rows=self._device == CPU,
        )

    async def _choose(self, manifest: Manifest, placing: BlockPlacer) -> BlockRange:
        """Choose the blocks that the swarm lacks most, once there was time to hear what it has."""
        if self._membership.bootstrap():
            # The first neighbours tell all they know at once; where there is nobody to tell, nobody is waited for long.
            with trio.move_on_after(2 * HEARTBEAT_INTERVAL_S):
                while True:
                    if self._membership.directory.candidates(manifest.model_id):
                        break
                    await trio.sleep(HEARD_ROUND_S)
                await trio.sleep(SETTLED_S)
        block_bytes = _loaded_bytes(manifest, max(file.size_bytes for file in manifest.blocks))
        around_bytes = _loaded_bytes(manifest, manifest.embed.size_bytes + manifest.head.size_bytes)
        return placing.choose(max(1, int((self._span_bytes * WEIGHT_SHARE - around_bytes) // block_bytes)))


def _loaded_bytes(manifest: Manifest, stored_bytes: int) -> int:
    """Return what weights take in memory: they are loaded as f32, and may be stored in half the bytes."""
    return stored_bytes * (2 if manifest.config.get("dtype") in _HALF_PRECISION else 1)


def _reasons(group: BaseExceptionGroup[Exception]) -> str:
    """Return what the exceptions of a group say, in one line."""
    texts = [_reasons(error) if isinstance(error, BaseExceptionGroup) else str(error) for error in group.exceptions]
    return "; ".join(dict.fromkeys(texts))
