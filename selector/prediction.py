"""What each method is expected to cost, and how sure that is: by the rule at first, by the history more and more."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from selector.dataset import FloatArray, Pairs
from selector.expectation import MIN_EXPERIENCES, RULE_DEVIATION, Expectation, Table
from selector.heuristic import predicted_cost
from selector.metamodel import MetaModel
from selector.task import PORTFOLIO, Method, TaskContext
from selector.task_buckets import Viewpoint, representative
from selector.training_set import ContextColumns, Experience, lesson_of

UNSEEN_DEVIATION: Final = 0.3
"""What is added for a method that was never measured."""

HALF_TRUST: Final = 20.0
"""The weight of measurements with which rule and model have the same say."""


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """A meta-model trained on a history. It never leaves the machine that trained it.

    `experiences`: how many it was trained on. `weight`: what those were worth to this peer, in measurements of its own.
    """

    model: MetaModel
    columns: ContextColumns
    support: Mapping[str, float]
    experiences: int
    weight: float

    @property
    def share(self) -> float:
        """How much the model has to say beside the rule, from 0 to 1."""
        return self.weight / (self.weight + HALF_TRUST)

    def table(self, context: TaskContext, methods: Sequence[Method] = tuple(PORTFOLIO.values())) -> Table:
        """Return what each method is expected to cost in a context: what the rule says, and the model adds."""
        context = representative(context)
        count = len(methods)
        pairs = Pairs(
            self.columns.table([context]),
            tuple(method.name for method in methods),
            np.zeros(count, dtype=np.intp),
            np.arange(count, dtype=np.intp),
        )
        said = self.model.predict_all(pairs)
        relative: FloatArray = said.relative
        table: dict[str, Expectation] = {}
        for i, method in enumerate(methods):
            unseen = UNSEEN_DEVIATION**2 / (1.0 + self.support.get(method.name, 0.0))
            learned = float(said.deviation[i]) ** 2 + unseen
            variance = self.share * learned + (1 - self.share) * RULE_DEVIATION**2
            cost = predicted_cost(context, method) + self.share * float(relative[i])
            table[method.name] = Expectation(cost, math.sqrt(variance))
        return table


def train(experiences: Sequence[Experience], viewpoint: Viewpoint) -> Predictor | None:
    """Return what a peer learns from a history; None where that is too little to say anything beyond the rule."""
    if len(experiences) < MIN_EXPERIENCES:
        return None
    lesson = lesson_of(experiences, viewpoint)
    if lesson is None:
        return None
    # Trees weigh rows against their settings for single rows: on average a row counts as one.
    weight = lesson.dataset.weight
    model = MetaModel("task", max_rows=2 * len(experiences), max_leaves=100_000, tree_count=40)
    model.fit(lesson.dataset.pairs, lesson.dataset.cost, weight * (len(weight) / max(weight.sum(), 1e-300)))
    return Predictor(model, lesson.columns, lesson.support, len(experiences), lesson.weight)
