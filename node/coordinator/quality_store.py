"""The quality store: measures the effect of lossy methods on a model's answers, once, on real text.

Every coordinator measures for itself: others' figures could not be checked for less than it takes to measure, so none
have to be trusted. A measurement needs the model's files but not its memory (see `node.engine.quality`): small enough
files are fetched; with larger ones this node's jobs use exact methods only. Figures are kept in the cache folder, with
the software versions that they hold for.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from node.coordinator.observation import software_versions
from node.models.errors import ModelError
from node.models.files import write_atomically
from node.models.library import KnownModel, Library
from node.models.sample import sample_text
from node.models.store import QUALITY_FOLDER
from node.util.child_process import ChildError, run
from node.util.interpreter import python
from protocol.identity import BlockRange, ModelId
from selector.quality import MeasuredQuality
from selector.task import Method, PackageFormat, portfolio

MEASURE: Final = python("-m", "node.engine.quality")

WINDOW_TOKENS: Final = 256
WINDOWS: Final = 4
"""The text is read in this many independent windows: about 1,000 positions are judged."""

MAX_FETCHED_BYTES: Final = 4 << 30
"""Limit on a model's missing files that are fetched in order to measure it."""

TIME_LIMIT_S: Final = 1800.0

RETRY_S: Final = 1800.0
"""Time after which a failed measurement is tried again, unless files of the model have come or gone before."""

_SOFTWARE: Final = {
    PackageFormat.SAFETENSORS: ("torch", "transformers", "onnxruntime"),
    PackageFormat.GGUF: ("xllamacpp", "onnxruntime"),
}
"""What computes the packages of each format, beside us."""

_FORMAT: Final = 2
"""Of kept figures, counted up where our arithmetic changes: those of other formats are measured again."""

Figures = Mapping[str, MeasuredQuality | None]
"""By KV key; None for what this model cannot be served with."""

_logger = structlog.get_logger(__name__)


def kv_keys(package_format: str) -> tuple[str, ...]:
    """Return the measured KV keys: quality depends on no other switch."""
    return tuple(sorted({method.kv_key for method in portfolio(package_format) if not method.exact}))


class QualityError(Exception):
    """The quality of a model cannot be measured. The message is one line."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a measurement failed, when, and how much of the model was missing then."""

    reason: str
    at_s: float
    lacking_bytes: int | None


class LocalQualityStore:
    """Implements `node.coordinator.method_choice.QualityStore`; `run` measures, one model at a time."""

    def __init__(self, library: Library, cache_dir: Path, *, command: Sequence[str] = MEASURE) -> None:
        self._library = library
        self._folder = cache_dir / QUALITY_FOLDER
        self._command = command
        self._figures: dict[ModelId, Figures] = {}
        self._failures: dict[ModelId, _Failure] = {}
        self._requested: set[ModelId] = set()
        self._queue_in, self._queue = trio.open_memory_channel[KnownModel](16)

    def quality(self, model: ModelId, method: Method) -> MeasuredQuality | None:
        """Return the measured quality; see QualityStore."""
        return self._figures.get(model, {}).get(method.kv_key)

    def figures(self, model: ModelId) -> Figures:
        """Return all figures of a model."""
        return self._figures.get(model, {})

    def failure(self, model: ModelId) -> str | None:
        """Return why the last measurement failed; see QualityStore."""
        failure = self._failures.get(model)
        return failure.reason if failure else None

    def request(self, model: KnownModel) -> bool:
        """Request a measurement; see QualityStore."""
        if model.id in self._figures or self._has_failed(model):
            return False
        if model.id not in self._requested:
            try:
                self._queue_in.send_nowait(model)
            except trio.WouldBlock:
                return True  # requested again by the next job
            self._requested.add(model.id)
        return True

    def _has_failed(self, model: KnownModel) -> bool:
        """Return whether a measurement has failed that would fail again."""
        failure = self._failures.get(model.id)
        return (
            failure is not None
            and trio.current_time() < failure.at_s + RETRY_S
            and self._lacking_bytes(model) == failure.lacking_bytes
        )

    def _lacking_bytes(self, model: KnownModel) -> int | None:
        """Return how much of a model is missing; None of one that was removed."""
        try:
            return self._library.lacking_bytes(model.manifest)
        except ModelError:
            return None

    async def run(self) -> None:
        """Measure the requested models until cancelled."""
        async for model in self._queue:
            try:
                figures = await trio.to_thread.run_sync(self._load, model)
                if figures is None:
                    figures = await self._measure(model)
                    await trio.to_thread.run_sync(self._save, model, figures)
            except (QualityError, ModelError) as error:
                _logger.warning("quality not measured: lossy methods are not used", model=model.id, reason=str(error))
                self._failures[model.id] = _Failure(str(error), trio.current_time(), self._lacking_bytes(model))
            else:
                self._figures[model.id] = figures
                self._failures.pop(model.id, None)
            self._requested.discard(model.id)

    async def _measure(self, model: KnownModel) -> Figures:
        lacking_bytes = self._library.lacking_bytes(model.manifest)
        if lacking_bytes > MAX_FETCHED_BYTES:
            raise QualityError(f"{lacking_bytes} bytes of the model are missing: import it to have it measured")
        whole = BlockRange(0, model.block_count)
        package = await self._library.weights(model.manifest, whole, use_catalogue=False)
        text = await model.tokenizer.encode(sample_text())
        length = min(WINDOW_TOKENS, model.max_positions)
        windows = [text[start : start + length] for start in range(0, min(len(text), WINDOWS * length) - 1, length)]
        long_enough = [window for window in windows if len(window) > 1]
        request = json.dumps({"windows": long_enough, "lineages": kv_keys(model.manifest.format)})
        _logger.info("measuring the quality of lossy methods", model=model.id)
        began_s = trio.current_time()
        async with self._library.in_use(package, whole):
            try:
                done = await run(
                    [*self._command, str(package.path)],
                    what="the measuring process",
                    stdin=request.encode(),
                    time_limit_s=TIME_LIMIT_S,
                )
            except ChildError as error:
                raise QualityError(str(error)) from None
        figures = _figures_in(done)
        _logger.info("quality measured", model=model.id, seconds=round(trio.current_time() - began_s, 1))
        return figures

    def _load(self, model: KnownModel) -> Figures | None:
        """Return the saved figures, if they are complete and of this software."""
        try:
            saved = json.loads((self._folder / f"{model.id}.json").read_bytes())
            wanted = set(kv_keys(model.manifest.format))
            if saved["format"] != _FORMAT or saved["versions"] != _versions(model.manifest.format):
                return None
            if not wanted <= saved["figures"].keys():
                return None
            return _figures_in(json.dumps(saved["figures"]).encode())
        except (OSError, ValueError, TypeError, KeyError, QualityError):
            return None

    def _save(self, model: KnownModel, figures: Figures) -> None:
        document = {
            "format": _FORMAT,
            "versions": _versions(model.manifest.format),
            "figures": {name: asdict(each) if each else None for name, each in figures.items()},
        }
        with suppress(OSError):  # it is measured again after the next start
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / f"{model.id}.json", json.dumps(document, indent=2).encode())


def _figures_in(document: bytes) -> Figures:
    try:
        content: dict[str, dict[str, Any] | None] = json.loads(document)
        return {name: MeasuredQuality(**each) if each else None for name, each in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise QualityError(f"the measured figures are invalid: {error}") from None


def _versions(package_format: str) -> dict[str, str]:
    """Return the versions of the software that computes."""
    names = ("metaswarm", *_SOFTWARE[PackageFormat(package_format)])
    return {name: software_versions().get(name, "") for name in names}
