"""Span supervisor: gets the weights of this node's spans, runs an engine for each, and restarts those that fail.

Which blocks these are, where the node chooses them itself, is decided in `block_placement`.
"""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import trio

from node.config import MEMORY_SHARE, ServeSpec, StartError
from node.engine.base import Engine
from node.engine.client import start_engine
from node.engine.device import CPU, Device, DeviceError, find_device
from node.engine.interface import EngineCrashed, EngineError, EngineOptions, Variant, reference_variant
from node.models.errors import ModelError
from node.models.files import Progress, ending, ignore_progress
from node.models.library import Library
from node.models.manifest import Manifest
from node.models.store import AmbiguousModelError, Package, UnknownModelError
from node.stages.block_placement import BlockPlacer, PlacementAnnouncements, unknown_rate
from node.stages.device_shares import (
    DeviceShare,
    cpu_bytes_of_each,
    longest_over,
    share_beside,
    shares_of_spans,
    split_over,
    usable_shares,
)
from node.stages.memory_admission import engine_bytes_of, shortage, smallest_span, span_bytes_for
from node.stages.replay_buffer import replay_bytes_of
from node.stages.span import Span
from node.stages.span_move import RunningSpan, hand_over
from node.stages.stage_server import StageServer
from node.swarm.heartbeats import HEARTBEAT_INTERVAL_S
from node.swarm.membership import Membership
from node.util.backoff import backoff_s
from node.util.offload import Offload, run_in_thread
from protocol.announcements import Placement
from protocol.identity import BlockRange, ModelId
from selector.task import PackageFormat

RETRY_S = (1.0, 30.0)
"""Backoff of a span that failed: the first and the longest pause."""

_HALF_PRECISION = ("bfloat16", "float16")

EXACT_VARIANTS = (Variant("onnxruntime", "fp32"), Variant("fused", "fp32"))
"""The fastest first. One is built before any job requests it, the same on all nodes that can: a stage that replaces a
lost one has to calculate as that one did."""

HALF_PRECISION_EXACT_VARIANTS = (Variant("fused", "fp32"),)
"""Of weights published in two bytes, which onnxruntime would hold in four."""

DISCOVERY_ROUND_S = 0.1
"""How often a new node checks whether it knows any server of the model."""

SETTLED_S = 1.0
"""This long after it has, it knows what there is to know."""

DRAFT_VARIANTS = (Variant("onnxruntime", "int8"), Variant("fused", "int8"))
"""Of a draft model in a safetensors package on a CPU, the fastest first: drafts need not be exact."""

GPU_DRAFT_VARIANTS = (Variant("fused", "bf16"),)

Shares = Sequence[DeviceShare]
"""The devices of a span."""

StartEngine = Callable[[Package, BlockRange, EngineOptions], AbstractAsyncContextManager[Engine]]

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """What to serve, and with which resources. `memory_bytes`: for all spans of a device; None: of what is free.

    `expect_format`: called with the format of a package before its files are fetched.
    """

    specs: Sequence[ServeSpec]
    devices: Sequence[Device]
    graphs_dir: Path
    draft: str | None = None
    memory_bytes: int | None = None
    threads: int | None = None
    use_catalogue: bool = True
    progress: Progress = ignore_progress
    expect_format: Callable[[str], None] = lambda _format: None

    @property
    def shares(self) -> Sequence[Shares]:
        """The devices of each span, and of the draft model behind them."""
        memory_bytes = [self.memory_bytes or int(each.free_bytes * MEMORY_SHARE) for each in self.devices]
        return shares_of_spans(self.devices, memory_bytes, len(set(self.specs)), draft=self.draft is not None)

    @property
    def cpu_bytes(self) -> int:
        """What each span, and the draft model, would have of main memory."""
        return cpu_bytes_of_each(self.memory_bytes, len(set(self.specs)) + (self.draft is not None))


class SpanSupervisor:
    """Keeps the spans of `--serve` served."""

    def __init__(
        self,
        options: ServingOptions,
        *,
        library: Library,
        membership: Membership,
        stages: StageServer,
        placements: PlacementAnnouncements,
        jitter: random.Random,
        start_engine: StartEngine = start_engine,
        offload: Offload = run_in_thread,
    ) -> None:
        self._options = options
        self._library = library
        self._membership = membership
        self._stages = stages
        self._placements = placements
        self._placers: dict[ModelId, BlockPlacer] = {}
        self._jitter = jitter
        self._start_engine = start_engine
        self._offload = offload
        self.unserved: dict[str, str] = {str(spec): "being loaded" for spec in options.specs}
        """Why a span of the configuration is not served now."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started once every span is loaded. Raises StartError where one never can be."""
        draft, shares = self._options.draft, self._options.shares
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as starting:
                for number, spec in enumerate(dict.fromkeys(self._options.specs)):
                    serve = partial(self._serve, spec, shares[number])
                    starting.start_soon(nursery.start, self._run_with_restarts, str(spec), serve)
                if draft is not None:
                    serve = partial(self._run_draft_model, draft, shares[-1][0])
                    starting.start_soon(nursery.start, self._run_with_restarts, draft, serve)
            task_status.started()

    async def _run_with_restarts(
        self,
        name: str,
        serve: Callable[..., Awaitable[None]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Load and serve something, again after every failure: what is missing now may come with another peer."""
        failures = 0
        loaded = False
        while True:
            # Before anything was served a failure may end the node's start; after that it never ends the node.
            retried: tuple[type[Exception], ...] = (ModelError, EngineCrashed)
            if loaded:
                retried += StartError, OSError
            failures += 1
            reason = "ended"
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(serve)
                    failures = 1
                    self.unserved.pop(name, None)
                    if not loaded:
                        loaded = True
                        task_status.started()
            except* retried as group:
                reason = _reasons(group)
            if name != self._options.draft:  # jobs do without a draft model
                self.unserved[name] = reason
            pause_s = backoff_s(failures, RETRY_S, self._jitter)
            _logger.warning("failed to serve span, retrying", span=name, reason=reason, again_in_s=round(pause_s, 1))
            self._membership.announce()
            await trio.sleep(pause_s)

    async def _manifest(self, model: str) -> Manifest:
        return await self._library.manifest(model, use_catalogue=self._options.use_catalogue)

    @asynccontextmanager
    async def _engine(
        self, manifest: Manifest, blocks: BlockRange, share: DeviceShare, memory_bytes: int
    ) -> AsyncIterator[Engine]:
        """Get the weights of blocks, and run an engine with them inside the block.

        Raises EngineError where they do not fit into memory, before they are fetched.
        """
        self._options.expect_format(manifest.format)
        if (why := shortage(manifest, blocks, share.memory_bytes, share.device)) is not None:
            raise EngineError(why)
        with ending(self._options.progress) as progress:
            package = await self._library.weights(
                manifest, blocks, use_catalogue=self._options.use_catalogue, progress=progress
            )
        options = EngineOptions(
            memory_bytes=memory_bytes,
            threads=self._options.threads,
            cache_dir=self._options.graphs_dir,
            device=share.device,
            plan_rows=share.device == CPU,
            narrow_kv=share.device != CPU,
        )
        async with self._library.in_use(package, blocks), self._start_engine(package, blocks, options) as engine:
            yield engine

    # Spans

    async def _serve(
        self, spec: ServeSpec, shares: Shares, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve a span until its engine dies. Raises StartError for what neither a peer nor time can cure."""
        try:
            manifest = await self._manifest(spec.model)
            shares = usable_shares(manifest, shares, self._options.cpu_bytes)
            if spec.blocks is None:
                await self._serve_where_needed(manifest, shares, task_status)
                return
            if (fault := manifest.cuts.fault(spec.blocks)) is not None:
                raise StartError(f"cannot serve {spec}: {fault}")
            rate = unknown_rate(len(spec.blocks))
            placement = Placement(model=manifest.model_id, blocks=spec.blocks, rate=rate, movable=False)
            self._placements.publish(spec, placement)
            async with trio.open_nursery() as nursery:
                await nursery.start(self._run_span, manifest, spec.blocks, shares)
                task_status.started()
        except (UnknownModelError, AmbiguousModelError) as error:
            raise StartError(f"cannot serve {spec}: {error}") from None

    async def _run_span(
        self,
        manifest: Manifest,
        blocks: BlockRange,
        shares: Shares,
        *,
        task_status: trio.TaskStatus[RunningSpan] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve a span, a part on each of its devices, until its scope is cancelled or an engine dies.

        The latter raises EngineCrashed, in a group, unless another span is served beside it, during a move.
        """
        parts = await self._split(manifest, blocks, shares)
        running: RunningSpan | None = None
        with trio.CancelScope() as scope:
            try:
                async with trio.open_nursery() as nursery:
                    spans: list[Span] = []
                    for part, share in zip(parts, shares, strict=False):
                        spans.append(await nursery.start(self._run_part, manifest, part, share))
                    running = RunningSpan(blocks, spans, scope)
                    task_status.started(running)
            except* EngineCrashed as group:
                if running is None or not running.on_crashed(_reasons(group)):
                    raise

    async def _run_part(
        self,
        manifest: Manifest,
        blocks: BlockRange,
        share: DeviceShare,
        *,
        task_status: trio.TaskStatus[Span] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve blocks on one device until cancelled or its engine dies."""
        replay_bytes = replay_bytes_of(share.memory_bytes)
        memory_bytes = engine_bytes_of(share.memory_bytes, share.device)
        try:
            async with self._engine(manifest, blocks, share, memory_bytes) as engine, trio.open_nursery() as nursery:
                span = await nursery.start(self._stages.serve, engine, replay_bytes)
                span.variants.request_first_of(_exact_variants(manifest))
                self._membership.announce()
                load_s = round(engine.info.load_s, 2)
                model = manifest.model_id
                computed_by = engine.info.engine or share.device
                _logger.info("span served", model=model, blocks=str(blocks), engine=computed_by, load_s=load_s)
                task_status.started(span)
        except EngineCrashed:
            raise
        except EngineError as error:
            name = self._library.name_of(manifest.model_id)
            raise StartError(f"cannot serve {name}:{blocks}: {error}") from None

    async def _split(self, manifest: Manifest, blocks: BlockRange, shares: Shares) -> Sequence[BlockRange]:
        if len(shares) == 1:
            return (blocks,)
        return await self._offload(lambda: split_over(manifest, blocks, shares))

    async def _serve_where_needed(self, manifest: Manifest, shares: Shares, task_status: trio.TaskStatus[None]) -> None:
        """Serve the least covered blocks, and others when those are covered less: these before the old ones go."""
        model = manifest.model_id
        placer = self._placer(manifest, shares)
        announced = self._placements.of(model)
        blocks = announced.blocks if announced else await self._choose(manifest, placer, shares)
        placer.publish(blocks)
        async with trio.open_nursery() as nursery:
            try:
                running = await nursery.start(self._run_span, manifest, blocks, shares)
            except* (ModelError, StartError):
                placer.publish(None)  # others should not count on us; and next time other blocks may be needed more
                raise
            task_status.started()
            while True:
                target = await placer.next_move(running.blocks, running.step_s)
                new = await self._try_to_run(manifest, target, shares, nursery)
                if new is not None and await hand_over(
                    running, new, placer=placer, stages=self._stages, announce=self._membership.announce
                ):
                    running = new
                else:
                    placer.on_move_failed(running.blocks)

    def _placer(self, manifest: Manifest, shares: Shares) -> BlockPlacer:
        """Return the placer of a model; it remembers failed moves when the span is restarted."""
        model = manifest.model_id
        if model not in self._placers:
            self._placers[model] = BlockPlacer(
                model,
                manifest.cuts,
                longest_over(manifest, shares),
                own_peer=self._stages.link_pool.peer_id,
                membership=self._membership,
                placements=self._placements,
                jitter=self._jitter,
                offload=self._offload,
            )
        return self._placers[model]

    async def _try_to_run(
        self, manifest: Manifest, blocks: BlockRange, shares: Shares, nursery: trio.Nursery
    ) -> RunningSpan | None:
        """Serve a span beside the present one; None where that fails, which harms nothing."""
        running = None
        try:
            beside = await self._shares_beside(manifest, blocks, shares)
            running = await nursery.start(self._run_span, manifest, blocks, beside)
        except* (DeviceError, ModelError, EngineError, StartError) as group:
            reason = _reasons(group)
            _logger.warning("stayed with the old blocks", model=manifest.model_id, wanted=str(blocks), reason=reason)
        return running

    async def _shares_beside(self, manifest: Manifest, blocks: BlockRange, shares: Shares) -> Shares:
        """Return what blocks may take beside the present ones. Raises StartError where they do not fit."""
        free_bytes = [(await find_device(share.device)).free_bytes for share in shares]
        beside = [share_beside(share, free) for share, free in zip(shares, free_bytes, strict=True)]
        parts = await self._split(manifest, blocks, beside)
        for part, share, free in zip(parts, beside, free_bytes, strict=False):
            needed, available = span_bytes_for(manifest, part, share.device), min(free, share.memory_bytes)
            if needed > available:
                raise StartError(f"they need {needed} bytes of memory beside the old ones, of {available}")
        return beside

    async def _choose(self, manifest: Manifest, placer: BlockPlacer, shares: Shares) -> BlockRange:
        """Choose the least covered blocks, after a moment to learn what the swarm has."""
        if self._membership.bootstrap():
            # The first neighbours announce all they know at once; a swarm without any is not waited for long.
            with trio.move_on_after(2 * HEARTBEAT_INTERVAL_S):
                while not self._membership.directory.candidates(manifest.model_id):  # noqa: ASYNC110 - no signal
                    await trio.sleep(DISCOVERY_ROUND_S)
                await trio.sleep(SETTLED_S)
        try:
            return placer.choose()
        except ValueError:
            share = max(shares, key=lambda each: each.memory_bytes)
            name, smallest = self._library.name_of(manifest.model_id), smallest_span(manifest, share.device)
            why = shortage(manifest, smallest, share.memory_bytes, share.device)
            raise StartError(f"cannot serve {name}, not even its blocks {smallest}: {why}") from None

    # The draft model

    async def _run_draft_model(
        self, name: str, share: DeviceShare, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run a draft model until its engine dies. Raises StartError where its tokenizer is not that of any span."""
        try:
            manifest = await self._manifest(name)
            served = [await self._manifest(spec.model) for spec in self._options.specs]
        except (UnknownModelError, AmbiguousModelError) as error:
            raise StartError(f"cannot use draft model {name}: {error}") from None
        models = {each.model_id for each in served if each.has_tokens_of(manifest)}
        if not models:
            targets = " or ".join(dict.fromkeys(spec.model for spec in self._options.specs))
            raise StartError(
                f"draft model {name} cannot be used with {targets}: tokenizers differ; choose one of the same family"
            )
        self._stages.register_draft(models)
        task_status.started()  # jobs need not wait for what only saves time
        try:
            whole = BlockRange(0, manifest.block_count)
            [share, *_] = usable_shares(manifest, [share], self._options.cpu_bytes)
            async with self._engine(manifest, whole, share, share.memory_bytes) as engine:
                variant = await self._fastest_variant(engine, manifest.format, share.device)
                async with trio.open_nursery() as nursery:
                    await nursery.start(self._stages.run_draft_model, engine, variant, models)
                    _logger.info("draft model served", model=manifest.model_id, variant=str(variant))
        except EngineCrashed:
            raise
        except EngineError as error:  # no reason to stop serving: it is retried, as after a crash
            raise EngineCrashed(f"cannot run draft model {name}: {error}") from None

    async def _fastest_variant(self, engine: Engine, package_format: str, device: str) -> Variant:
        """Build the fastest variant that is available for a draft model, and return it."""
        variants = DRAFT_VARIANTS if device == CPU else GPU_DRAFT_VARIANTS
        for variant in variants if package_format == PackageFormat.SAFETENSORS else ():
            try:
                await engine.prepare(variant)
            except EngineCrashed:
                raise
            except EngineError as error:
                _logger.info("variant unavailable", variant=str(variant), why=str(error))
            else:
                return variant
        return reference_variant(package_format)


def _exact_variants(manifest: Manifest) -> Sequence[Variant]:
    """Return the exact variants of a package beside its reference, of which a node holds the first that fits."""
    if manifest.format != PackageFormat.SAFETENSORS:
        return ()
    return HALF_PRECISION_EXACT_VARIANTS if manifest.config.get("dtype") in _HALF_PRECISION else EXACT_VARIANTS


def _reasons(group: BaseExceptionGroup[Exception]) -> str:
    """Return the messages of a group's exceptions, in one line."""
    texts = [_reasons(error) if isinstance(error, BaseExceptionGroup) else str(error) for error in group.exceptions]
    return "; ".join(dict.fromkeys(texts))
