"""Predicted cost of each method with its uncertainty: the heuristic at first, the history increasingly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from selector.dataset import FloatArray, Pairs
from selector.evidence import AgreedTable
from selector.heuristic import HEURISTIC_DEVIATION, MIN_SAMPLES, CostEstimate, CostTable, predicted_cost
from selector.metamodel import MetaModel
from selector.sample import Sample
from selector.task import PORTFOLIO, Method, TaskContext
from selector.task_buckets import Viewpoint, canonicalise
from selector.task_features import tabulate
from selector.training_set import build_training_set

UNSEEN_DEVIATION: Final = 0.3
"""Additional standard deviation of a method that was never measured."""

HALF_SHARE_WEIGHT: Final = 20.0
"""Weight of samples at which the meta-model counts as much as the heuristic."""


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """A meta-model trained on a history. It never leaves the machine that trained it.

    `sample_count`: samples and agreed cells that it was trained on. `weight`: their total weight, in units of an own
    measurement. `learned_from`: the hardware classes whose agreed cells are among them, by model.
    """

    model: MetaModel
    support: Mapping[str, float]
    sample_count: int
    weight: float
    learned_from: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Weight of the meta-model relative to the heuristic, 0 to 1."""
        return self.weight / (self.weight + HALF_SHARE_WEIGHT)

    def table(self, context: TaskContext, methods: Sequence[Method] = tuple(PORTFOLIO.values())) -> CostTable:
        """Return the estimates in a context: the heuristic's, corrected by the meta-model."""
        context = canonicalise(context)
        count = len(methods)
        pairs = Pairs(
            tabulate([context]),
            tuple(method.name for method in methods),
            np.zeros(count, dtype=np.intp),
            np.arange(count, dtype=np.intp),
        )
        found = self.model.predict_all(pairs)
        table: dict[str, CostEstimate] = {}
        for method, relative, deviation in zip(methods, found.relative.tolist(), found.deviation.tolist(), strict=True):
            unseen = UNSEEN_DEVIATION**2 / (1.0 + self.support.get(method.name, 0.0))
            variance = self.share * (deviation**2 + unseen) + (1 - self.share) * HEURISTIC_DEVIATION**2
            cost = predicted_cost(context, method) + self.share * relative
            table[method.name] = CostEstimate(cost, math.sqrt(variance))
        return table


def train(samples: Sequence[Sample], viewpoint: Viewpoint, tables: Sequence[AgreedTable] = ()) -> Predictor | None:
    """Return the predictor trained on a history and on what the swarm agreed.

    None where what compares methods in both together is too little to beat the heuristic.
    """
    training = build_training_set(samples, viewpoint, tables)
    if training is None or training.sample_count < MIN_SAMPLES:
        return None
    dataset = training.dataset
    model = fit_model(dataset.pairs, dataset.cost, dataset.weight, group="task")
    return Predictor(model, training.support, training.sample_count, training.weight, training.learned_from)


def fit_model(pairs: Pairs, cost: FloatArray, weight: FloatArray, group: str | None = None) -> MetaModel:
    """Return a meta-model of weighted rows. `group`: see MetaModel.

    Trees weigh rows against settings meant for single rows, so that the mean weight must be one.
    """
    return MetaModel(group, max_rows=max(2, len(cost))).fit(
        pairs, cost, weight * (len(weight) / max(weight.sum(), 1e-300))
    )
