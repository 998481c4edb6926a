"""The quality ledger: what lossy methods do to a model's answers, measured here, once, on real text.

Everybody who coordinates jobs measures for itself. What others say of quality could not be checked for less than it
takes to measure, and so nobody has to be believed. It needs the model's files but not its memory (see
`node.engine.quality`): they are fetched where they are few enough, and where they are not, this node's jobs are served
by exact methods only. Figures are kept in the cache folder, with the versions they hold for.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Protocol

import structlog
import trio

from node.coordinator.method_choice import Asked
from node.models.errors import ModelError
from node.models.files import write_atomically
from node.models.library import KnownModel
from node.models.manifest import Manifest
from node.models.sample import sample_text
from node.models.store import Package
from node.util.child_process import ChildError, python, run
from protocol.identity import BlockRange, ModelId
from selector.task import PORTFOLIO, MeasuredQuality, Method

MEASURE: Final = python("-m", "node.engine.quality")

WINDOW_TOKENS: Final = 256
WINDOWS: Final = 4
"""The text is read in so many windows, each by itself: some 1,000 positions are judged."""

MAX_FETCHED_BYTES: Final = 4 << 30
"""What a node that lacks files of a model gets from others in order to judge it, at most."""

TIME_LIMIT_S: Final = 1800.0

KV_KEYS: Final = tuple(sorted({method.kv_key for method in PORTFOLIO.values() if not method.exact}))
"""What is measured: quality depends on nothing else of a method."""

Figures = Mapping[str, MeasuredQuality | None]
"""By KV key; None for what this model cannot be served with."""

_logger = structlog.get_logger(__name__)


class Weights(Protocol):
    """Gets the files of models; `node.models.library` is the real one."""

    async def weights(self, manifest: Manifest, blocks: BlockRange, *, use_catalogue: bool) -> Package:
        """Return a package with the files of a span. Raises ModelError."""
        ...

    def in_use(self, package: Package, blocks: BlockRange) -> AbstractContextManager[None]:
        """Keep the files of a span from being deleted, inside the block."""
        ...

    def lacking_bytes(self, manifest: Manifest) -> int:
        """Return how much of a model is not here."""
        ...


class QualityError(Exception):
    """The quality of a model cannot be measured here. The message is one line."""


class LocalQualityStore:
    """Implements `node.coordinator.method_choice.QualityStore`; `run` measures, one model at a time."""

    def __init__(self, weights: Weights, cache_dir: Path, *, command: Sequence[str] = MEASURE) -> None:
        self._weights = weights
        self._folder = cache_dir / "quality"
        self._command = command
        self._figures: dict[ModelId, Figures] = {}
        self._asked: set[ModelId] = set()
        self._wanted_in, self._wanted = trio.open_memory_channel[KnownModel](16)

    def quality(self, model: ModelId, method: Method) -> MeasuredQuality | None:
        """Return what was measured; see Ledger."""
        return self._figures.get(model, {}).get(method.kv_key)

    def figures(self, model: ModelId) -> Figures:
        """Return all that was measured of a model."""
        return self._figures.get(model, {})

    def ask(self, model: KnownModel) -> Asked:
        """Have a model measured unless it was; see Ledger."""
        if model.id in self._figures:
            return Asked.KNOWN
        if model.id not in self._asked:
            try:
                self._wanted_in.send_nowait(model)
            except trio.WouldBlock:
                return Asked.UNDER_WAY  # asked for again by the next job
            self._asked.add(model.id)
        return Asked.UNDER_WAY

    async def run(self) -> None:
        """Measure what is asked for until cancelled."""
        async for model in self._wanted:
            try:
                figures = await trio.to_thread.run_sync(self._kept, model.id)
                if figures is None:
                    figures = await self._measure(model)
                    await trio.to_thread.run_sync(self._keep, model.id, figures)
            except (QualityError, ModelError) as error:
                _logger.warning("lossy methods are not used: quality not measured", model=model.id, reason=str(error))
                figures = {}
            self._figures[model.id] = figures

    async def _measure(self, model: KnownModel) -> Figures:
        lacking_bytes = self._weights.lacking_bytes(model.manifest)
        if lacking_bytes > MAX_FETCHED_BYTES:
            raise QualityError(f"{lacking_bytes} bytes of the model are not here: import it to have it measured")
        whole = BlockRange(0, model.block_count)
        package = await self._weights.weights(model.manifest, whole, use_catalogue=False)
        text = await model.tokenizer.encode(sample_text())
        length = min(WINDOW_TOKENS, model.max_positions)
        windows = [text[start : start + length] for start in range(0, min(len(text), WINDOWS * length) - 1, length)]
        asked = json.dumps({"windows": [window for window in windows if len(window) > 1], "lineages": KV_KEYS})
        _logger.info("measuring what lossy methods do to a model", model=model.id)
        began_s = trio.current_time()
        with self._weights.in_use(package, whole):
            try:
                done = await run(
                    [*self._command, str(package.path)],
                    what="the measuring process",
                    stdin=asked.encode(),
                    time_limit_s=TIME_LIMIT_S,
                )
            except ChildError as error:
                raise QualityError(str(error)) from None
        figures = _figures_in(done)
        _logger.info("quality measured", model=model.id, seconds=round(trio.current_time() - began_s, 1))
        return figures

    def _kept(self, model: ModelId) -> Figures | None:
        """Return what an earlier run has kept, if it holds for this software and is all there."""
        try:
            kept = json.loads((self._folder / f"{model}.json").read_bytes())
            if kept["versions"] != _versions() or not set(KV_KEYS) <= kept["figures"].keys():
                return None
            return _figures_in(json.dumps(kept["figures"]).encode())
        except (OSError, ValueError, TypeError, KeyError, QualityError):
            return None

    def _keep(self, model: ModelId, figures: Figures) -> None:
        document = {
            "versions": _versions(),
            "figures": {name: asdict(each) if each else None for name, each in figures.items()},
        }
        with suppress(OSError):  # then it is measured again after the next start
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / f"{model}.json", json.dumps(document, indent=2).encode())


def _figures_in(document: bytes) -> Figures:
    try:
        content: dict[str, dict[str, Any] | None] = json.loads(document)
        return {name: MeasuredQuality(**each) if each else None for name, each in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise QualityError(f"the figures make no sense: {error}") from None


def _versions() -> dict[str, str]:
    """Return the versions of what calculates."""
    return {name: version(name) for name in ("metaswarm", "torch", "transformers", "onnxruntime")}
