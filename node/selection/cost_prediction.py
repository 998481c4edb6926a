"""Predicts what jobs take and cost: the meta-model's predictions, calibrated by the jobs that were served."""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from cachetools import FIFOCache

from node.coordinator.method_choice import OverBudget, SelectionRequest
from node.selection.prediction_cache import PredictionCache
from protocol.measurements import Objective
from selector.heuristic import predicted_cost
from selector.task import PORTFOLIO, Method, TaskContext

MAX_CALIBRATIONS: Final = 1000
CALIBRATING_JOBS: Final = 9
"""The last jobs whose median error calibrates predictions."""


class Calibration:
    """Median of the last log ratios of measured to predicted cost, by model, kind of task, hardware and stages.

    Predictions are in the seconds of the heuristic's reference machine. Time and computing are apart. Stages state
    their own computing, and peers with the same hardware share a calibration: a few false figures must not move it.
    """

    def __init__(self) -> None:
        self._errors: FIFOCache[tuple[object, ...], deque[float]] = FIFOCache(MAX_CALIBRATIONS)

    def of(self, context: TaskContext) -> float:
        """Return the offset of predicted logarithms of cost; 0 before the first job.

        Of the two in the middle of an even number it is the one that is nearer to what was predicted.
        """
        errors = self._errors.get(self._key(context))
        return min(statistics.median_low(errors), statistics.median_high(errors), key=abs) if errors else 0.0

    def update(self, context: TaskContext, error: float) -> None:
        """Add the error of one prediction without offset."""
        self._errors.setdefault(self._key(context), deque(maxlen=CALIBRATING_JOBS)).append(error)

    @staticmethod
    def _key(context: TaskContext) -> tuple[object, ...]:
        model = (context.architecture, context.hidden_size, context.block_count, context.weight_bytes)
        where = (context.hardware, context.stage_count, context.objective == Objective.LATENCY)
        return *model, context.task_kind, *where


@dataclass(frozen=True, slots=True)
class PredictedCompute:
    """The seconds of computing that a task takes on all stages of a route, by method.

    `log_s`: natural logarithms, before calibration, at the speed of the route's peers. `offset`: the calibration.
    `price`: the mean of the stages', by their expected seconds.
    """

    context: TaskContext
    log_s: Mapping[str, float]
    offset: float
    price: float

    def cost(self, method: str, tokens: int | None = None) -> float:
        """Return the predicted cost. `tokens`: that were generated, if not all."""
        log_s = self.log_s[method] + self.offset
        if tokens is not None:
            log_s += shortened(self.context, method, tokens)
        return self.price * math.exp(log_s)

    def within(self, request: SelectionRequest) -> SelectionRequest:
        """Return the request with the methods that are predicted to stay within its budget. Raises OverBudget."""
        if request.budget is None:
            return request
        admitted = [method for method in request.admitted if self.cost(method.name) <= request.budget]
        if not admitted:
            cheapest = min(request.admitted, key=lambda method: self.cost(method.name))
            raise OverBudget(self.cost(cheapest.name), cheapest)
        return replace(request, admitted=admitted)


async def predict_compute(
    request: SelectionRequest, usual: Method, predictions: PredictionCache, calibration: Calibration
) -> PredictedCompute:
    """Predict the computing of a request. `usual`: the method of most jobs like it, whether it is admitted or not.

    The planner knows how fast the peers of the route are, measured or as they report, with the usual method; the
    meta-model, how methods differ; and the calibration, by how much both together are wrong.
    """
    context, level = replace(request.context, objective=Objective.THROUGHPUT.value), 0.0
    table = dict((await predictions.predict(context, request.admitted, request.model)).table)
    if request.compute_s > 0:
        if usual.name not in table:
            table |= (await predictions.predict(context, [usual], request.model)).table
        level = math.log(request.compute_s) - table[usual.name].log_cost
    log_s = {name: level + estimate.log_cost for name, estimate in table.items()}
    return PredictedCompute(context, log_s, calibration.of(context), request.price)


def shortened(context: TaskContext, method: str, tokens: int) -> float:
    """Return what a text that ended early saves: the logarithm of the predicted cost over that of the whole text."""
    known = PORTFOLIO.get(method)
    if known is None:
        return 0.0
    return predicted_cost(replace(context, max_tokens=tokens), known) - predicted_cost(context, known)
