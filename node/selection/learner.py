"""Keeps this node's model of the history fresh: starts a worker process that trains whenever the history has grown.

The worker trains at the lowest priority, then answers predictions until the next worker replaces it, or until it was
not asked for a while: then the model is in a file only (`trained_model`). Between two trainings the learner rests for
several times the duration of the last one, which bounds its share of a core.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import structlog
import trio

from node.selection.agreed_tables import dump_table
from node.selection.prediction_cache import PredictionCache
from node.selection.trained_model import TrainedModel
from node.storage.database import StorageError
from node.util.child_process import ChildError
from protocol.forms import Digest
from protocol.identity import ModelId
from selector.evidence import AgreedTable
from selector.heuristic import MIN_SAMPLES
from selector.task_buckets import Viewpoint

POLL_S: Final = 2.0
"""Interval of checks of the history's size."""

GROWTH: Final = 0.2
"""The model is trained anew once the history has grown by this share,"""

MAX_AGE_S: Final = 24 * 3600.0
"""or after this time in any case: old observations expire, and the history changes without growing."""

REST: Final = 4.0
"""Pause after a training, in durations of that training."""

TRAINING_LIMIT_S: Final = 3600.0
"""Timeout of a training, which gets about a hundredth of a core where all are always busy."""

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """The model in use. `share`: its weight relative to the heuristic, 0 to 1. `trained_s`: trio's clock."""

    version: int
    sample_count: int
    share: float
    training_s: float
    trained_s: float
    peak_bytes: int


class Learner:
    """Trains on the history of this node, and sets the predictor of its `PredictionCache`."""

    def __init__(
        self,
        database: Path,
        predictions: PredictionCache,
        *,
        count: Callable[[], Awaitable[int]],
        viewpoint: Callable[[], Viewpoint],
        tables: Callable[[], Sequence[AgreedTable]] = tuple,
    ) -> None:
        """`count`: observations in the history; `viewpoint`: the peer for which they are weighted.

        `tables`: what the swarm agreed about each model.
        """
        self.status: ModelStatus | None = None
        self._database = database
        self._predictions = predictions
        self._count = count
        self._viewpoint = viewpoint
        self._tables = tables
        self._trained_tables: frozenset[Digest] = frozenset()
        """The digests of the agreed tables of the last training."""
        self._model: TrainedModel | None = None
        self._trained_count = 0
        """Size of the history at the last training."""
        self._began_s = 0.0

    async def run(self) -> None:
        """Keep the model fresh until cancelled. No failure here ends the node."""
        self._began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._predictions.run)
            try:
                while True:
                    await self._refresh(nursery)
                    await trio.sleep(POLL_S)
            finally:
                await self._replace_model(None)

    async def _refresh(self, nursery: trio.Nursery) -> None:
        """Train a new model if one is due, then rest."""
        if self._model is not None:
            await self._model.unload_if_idle()
            if not self._predictions.sample_count:
                # The model is lost, as its process failed: train again, though the history has not grown.
                await self._replace_model(None)
                self._trained_count = 0
        try:
            count = await self._count()
        except StorageError:
            return
        tables = self._tables()
        digests = frozenset(table.digest for table in tables)
        is_old = trio.current_time() - self._began_s >= MAX_AGE_S
        has_grown = count >= self._trained_count * (1 + GROWTH)
        if count < MIN_SAMPLES or not (has_grown or is_old or digests != self._trained_tables):
            return
        self._began_s = trio.current_time()
        model = await self._train(nursery, tables)
        if model is not None:
            await self._replace_model(model)
        self._trained_count, self._trained_tables = count, digests
        await trio.sleep(REST * (trio.current_time() - self._began_s))

    async def _replace_model(self, model: TrainedModel | None) -> None:
        old, self._model = self._model, model
        if old is not None:
            await old.stop()

    async def _train(self, nursery: trio.Nursery, tables: Sequence[AgreedTable]) -> TrainedModel | None:
        """Return a trained model, which the predictions use from now on; None if training failed."""
        model: TrainedModel | None = None
        trained = False
        try:
            model = TrainedModel(self._database.parent, nursery)
            with trio.fail_after(TRAINING_LIMIT_S):
                request = {
                    "database": str(self._database),
                    "viewpoint": asdict(self._viewpoint()),
                    "tables": [dump_table(table) for table in tables],
                }
                result = await model.train(request)
            if result.get("samples"):
                agreed = {
                    ModelId(table.model): table.firm_part(result["learned_from"][table.model])
                    for table in tables
                    if table.model in result["learned_from"]
                }
                self._predictions.set_predictor(model.predict, result["samples"], agreed)
                self.status = ModelStatus(
                    version=self.status.version + 1 if self.status else 1,
                    sample_count=result["samples"],
                    share=result["share"],
                    training_s=result["seconds"],
                    trained_s=trio.current_time(),
                    peak_bytes=result["peak_bytes"],
                )
                _logger.info("model trained", **result)
                trained = True
        except (ChildError, OSError, ValueError, KeyError, trio.TooSlowError) as error:
            _logger.warning("training failed", reason=str(error))
        finally:
            if model is not None and not trained:
                await model.stop()
        return model if trained else None
