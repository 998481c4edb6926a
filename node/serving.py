"""What this node serves: gets the files of its spans, runs an engine for each, and starts another when one dies."""

import random
from collections.abc import Sequence
from pathlib import Path

import psutil
import structlog
import trio

from node.config import ServeSpec, StartError
from node.engine.client import start_engine
from node.engine.interface import EngineCrashed, EngineError
from node.engine.source import EngineOptions
from node.jobs.planner import UNKNOWN_BLOCK_S
from node.jobs.stage import Stages
from node.models.errors import ModelError
from node.models.library import Library
from node.models.manifest import Manifest
from node.models.store import AmbiguousModelError, UnknownModelError
from node.swarm.directory import Candidate
from node.swarm.membership import HEARTBEAT_INTERVAL_S, Membership
from protocol.identity import BlockRange
from selector.placement import Server, choose_span

RETRY_S = (1.0, 30.0)
"""First and longest pause before a span that could not be had, or whose engine died, is tried again."""

MEMORY_SHARE = 0.75
"""Of the memory that is free when the node starts, where --memory says nothing."""

WEIGHT_SHARE = 0.75
"""Of a span's memory, when the node chooses the blocks itself; the rest is for KV caches."""

_logger = structlog.get_logger(__name__)


class Serving:
    """Keeps the spans of `--serve` served."""

    def __init__(
        self,
        specs: Sequence[ServeSpec],
        *,
        library: Library,
        membership: Membership,
        stages: Stages,
        memory_bytes: int | None,
        threads: int | None,
        graphs_dir: Path,
        use_catalogue: bool,
        jitter: random.Random,
    ) -> None:
        self._specs = tuple(dict.fromkeys(specs))
        self._library = library
        self._membership = membership
        self._stages = stages
        self._threads = threads
        self._graphs_dir = graphs_dir
        self._use_catalogue = use_catalogue
        self._jitter = jitter
        budget_bytes = memory_bytes or int(psutil.virtual_memory().available * MEMORY_SHARE)
        self._span_bytes = budget_bytes // max(1, len(self._specs))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started once every span is loaded. Raises StartError where one never can be."""
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as starting:
                for spec in self._specs:
                    starting.start_soon(nursery.start, self._keep_serving, spec)
            task_status.started()

    async def _keep_serving(
        self, spec: ServeSpec, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Load and serve a span, again after every failure: what is missing now may come with another peer."""
        pause_s, longest_s = RETRY_S
        loaded = False
        while True:
            # What never was served may end the start of a node; what was served once never ends the node.
            passing: tuple[type[Exception], ...] = (ModelError, EngineCrashed, *((StartError,) if loaded else ()))
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self._serve, spec)
                    pause_s = RETRY_S[0]
                    if not loaded:
                        loaded = True
                        task_status.started()
            except* passing as group:
                _logger.warning("span not served now", span=str(spec), reason=_reasons(group), again_in_s=pause_s)
            self._membership.announce()
            await trio.sleep(pause_s * self._jitter.uniform(0.8, 1.2))
            pause_s = min(longest_s, pause_s * 2)

    async def _serve(self, spec: ServeSpec, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve a span until its engine dies. Raises StartError for what no peer and no time can mend."""
        try:
            manifest = await self._library.manifest(spec.model, use_catalogue=self._use_catalogue)
            blocks = spec.blocks or await self._choose(manifest)
            if blocks.end > manifest.block_count:
                raise StartError(f"cannot serve {spec}: the model has blocks 0-{manifest.block_count}")
            package = await self._library.weights(manifest, blocks, use_catalogue=self._use_catalogue)
            options = EngineOptions(memory_bytes=self._span_bytes, threads=self._threads, cache_dir=self._graphs_dir)
            async with start_engine(package, blocks, options) as engine, trio.open_nursery() as nursery:
                await nursery.start(self._stages.serve, engine)
                self._membership.announce()
                _logger.info("serving", model=spec.model, blocks=str(blocks), load_s=round(engine.info.load_s, 2))
                task_status.started()
        except (UnknownModelError, AmbiguousModelError) as error:
            raise StartError(f"cannot serve {spec}: {error}") from None
        except EngineCrashed:
            raise
        except EngineError as error:
            raise StartError(f"cannot serve {spec}: {error}") from None

    async def _choose(self, manifest: Manifest) -> BlockRange:
        """Choose the blocks that the swarm lacks most, once there was time to hear what it has."""
        await trio.sleep(2 * HEARTBEAT_INTERVAL_S if self._membership.bootstrap() else 0)
        served = self._membership.directory.candidates(manifest.model_id)
        block_bytes = max(file.size_bytes for file in manifest.blocks)
        around_bytes = manifest.embed.size_bytes + manifest.head.size_bytes
        holds = max(1, int((self._span_bytes * WEIGHT_SHARE - around_bytes) // block_bytes))
        length = min(holds, manifest.block_count)
        others = [server_of(candidate) for candidate in served]
        chosen = choose_span(manifest.block_count, others, length, 1 / (UNKNOWN_BLOCK_S * length))
        return BlockRange(*chosen)


def server_of(candidate: Candidate) -> Server:
    """Return what a peer adds to its blocks, by its step time as it told it last."""
    blocks = candidate.blocks
    step_s = candidate.load.step_s or UNKNOWN_BLOCK_S * len(blocks)
    return Server(candidate.peer, blocks.start, blocks.end, 1 / step_s)


def _reasons(group: BaseExceptionGroup[Exception]) -> str:
    """Return what the exceptions of a group say, in one line."""
    texts = [_reasons(error) if isinstance(error, BaseExceptionGroup) else str(error) for error in group.exceptions]
    return "; ".join(dict.fromkeys(texts))
