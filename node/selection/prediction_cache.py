"""Cache of this node's cost predictions: by the heuristic, or by the trained model once there is one.

Predictions are made per canonical context, in another process, and cached until the next model. A caller waits for a
bounded time at most; the heuristic replaces a late prediction.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import trio
from cachetools import LRUCache

from node.stages.voter import TableVersion
from protocol.identity import ModelId
from selector.evidence import AgreedTable
from selector.heuristic import HEURISTIC_DEVIATION, CostEstimate, CostTable, heuristic_table, predicted_cost
from selector.task import PORTFOLIO, Method, TaskContext
from selector.task_buckets import canonicalise

MISS_LIMIT_S: Final = 0.1
"""How long a choice waits for a prediction that is not cached."""

MAX_TABLES: Final = 4096
MAX_QUEUED: Final = 64


@dataclass(frozen=True, slots=True)
class Prediction:
    """Cost estimates in a context. `sample_count`: of the model behind them; 0 for the heuristic.

    `agreed`: the table of the model that is to be served, if they were learned from one, with the firm cells alone that
    were learned from.
    """

    table: CostTable
    sample_count: int
    agreed: AgreedTable | None = None

    @property
    def learned_from(self) -> TableVersion | None:
        """The name of the agreed table."""
        return TableVersion(self.agreed.epoch, self.agreed.digest) if self.agreed else None

    @property
    def basis(self) -> str:
        """The source: `model` or `rule`, as the API names them."""
        return "model" if self.sample_count else "rule"


Predictor = Callable[[TaskContext], Awaitable[Mapping[str, tuple[float, float]]]]
"""Predicts logarithm of cost and deviation of every method of the portfolio in a canonical context; of none where it
cannot. Raises OSError."""


class PredictionCache:
    """Predictions by canonical context, requested on first use."""

    def __init__(self) -> None:
        self.sample_count = 0
        """Samples and agreed cells that the model was trained on; 0 without one."""
        self.late = 0
        """Choices by the heuristic because the prediction was not there in time."""
        self._predictor: Predictor | None = None
        self._replaced = 0
        self._agreed: Mapping[ModelId, AgreedTable] = {}
        self._tables: LRUCache[TaskContext, CostTable] = LRUCache(MAX_TABLES)
        self._pending: dict[TaskContext, trio.Event] = {}
        self._requests_in, self._requests = trio.open_memory_channel[TaskContext](MAX_QUEUED)

    def set_predictor(
        self,
        predictor: Predictor | None,
        sample_count: int,
        agreed: Mapping[ModelId, AgreedTable] = MappingProxyType({}),
    ) -> None:
        """Replace the model, and clear the cache. `agreed`: see Prediction; by model served."""
        self._agreed = agreed
        self._predictor = predictor
        self.sample_count = sample_count
        self._replaced += 1
        self._tables.clear()

    async def predict(
        self, context: TaskContext, methods: Sequence[Method], model: ModelId | None = None
    ) -> Prediction:
        """Return the estimates of some methods after a bounded wait. `model`: that is to be served."""
        canonical = canonicalise(context)
        # A single method needs no wait, such as that of a text that continues after a lost stage.
        limit_s = MISS_LIMIT_S if len(methods) > 1 else 0.0
        table = await self._table(canonical, limit_s) if self._predictor else None
        if not table:
            return Prediction(heuristic_table(context, methods), 0)
        # The level of the cost depends on the exact size; the differences between methods on the canonical one.
        found: dict[str, CostEstimate] = {}
        for method in methods:
            cost, deviation = predicted_cost(context, method), HEURISTIC_DEVIATION
            if (estimate := table.get(method.name)) is not None:
                cost += estimate.log_cost - predicted_cost(canonical, PORTFOLIO[method.name])
                deviation = estimate.deviation
            found[method.name] = CostEstimate(cost, deviation)
        return Prediction(found, self.sample_count, self._agreed.get(model) if model else None)

    async def _table(self, context: TaskContext, limit_s: float) -> CostTable | None:
        if context in self._tables:
            return self._tables[context]
        event = self._pending.get(context)
        if event is None:
            event = trio.Event()
            try:
                self._requests_in.send_nowait(context)
            except trio.WouldBlock:
                self.late += 1
                return None
            self._pending[context] = event
        with trio.move_on_after(limit_s):
            await event.wait()
        table = self._tables.get(context)
        self.late += table is None
        return table

    async def run(self) -> None:
        """Make the requested predictions one at a time until cancelled."""
        async for context in self._requests:
            predictor, replaced = self._predictor, self._replaced
            try:
                if predictor is not None:
                    values = await predictor(context)
                    if replaced == self._replaced:
                        self._tables[context] = {name: CostEstimate(*pair) for name, pair in values.items()}
            except OSError:
                if replaced == self._replaced:  # else its process was replaced, and stopped
                    self.set_predictor(None, 0)
            finally:
                self._pending.pop(context).set()
