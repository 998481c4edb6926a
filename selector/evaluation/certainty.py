"""Whether a selector knows when it is wrong: coverage of its intervals, and its choices by their confidence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selector.confidence import INTERVAL, MIN_CONFIDENCE, WITHIN, confidence
from selector.dataset import Dataset, FloatArray, context_means
from selector.evaluation.measures import TIE, Fold
from selector.heuristic import CostEstimate

ANSWERED_SHARE = 0.7
"""Share of the contexts, those with the most confident choices, whose accuracy is told."""


@dataclass(frozen=True, slots=True)
class Certainty:
    """Means over test contexts with several methods, all without probes.

    `interval_coverage`: share of the pairs whose cost, relative to their context, is within the 90 % interval.
    `answered`: share of the contexts with a confidence of at least MIN_CONFIDENCE, in the others of which the choice
    is a probe; `accuracy_of_answered`, and `within_5_percent_of_answered`. `stated_confidence`: its mean among them,
    to be compared with the latter. `accuracy_at_70_percent`: of the most confident choices.
    """

    interval_coverage: float
    answered: float
    accuracy_of_answered: float | None
    within_5_percent_of_answered: float | None
    stated_confidence: float | None
    accuracy_at_70_percent: float


def certainty_of(
    dataset: Dataset, folds: Sequence[Fold], scores: Sequence[FloatArray], deviations: Sequence[FloatArray]
) -> Certainty | None:
    """Return how true the deviations of scores are, for the test rows of every fold; None where nothing can be told.

    A context with a single method says nothing: relative to itself, any prediction of it is right.
    """
    covered, choices = [], []
    for fold, score_of_all, deviation_of_all in zip(folds, scores, deviations, strict=True):
        test = dataset.take(fold.test)
        told = np.bincount(test.pairs.context)[test.pairs.context] > 1
        test, score, deviation = test.take(told), score_of_all[told], deviation_of_all[told]
        covered.append(np.abs(_relative(test, test.cost) - _relative(test, score)) <= INTERVAL * deviation)
        choices += _choices(test, score, deviation)
    if not choices:
        return None
    sure, regret = np.array(choices).T
    answered = sure >= MIN_CONFIDENCE
    most_sure = np.argsort(-sure, kind="stable")[: round(ANSWERED_SHARE * len(sure))]
    return Certainty(
        interval_coverage=float(np.mean(np.concatenate(covered))),
        answered=float(np.mean(answered)),
        accuracy_of_answered=float(np.mean(regret[answered] <= TIE)) if answered.any() else None,
        within_5_percent_of_answered=float(np.mean(regret[answered] <= WITHIN + TIE)) if answered.any() else None,
        stated_confidence=float(np.mean(sure[answered])) if answered.any() else None,
        accuracy_at_70_percent=float(np.mean(regret[most_sure] <= TIE)),
    )


def _relative(dataset: Dataset, cost: FloatArray) -> FloatArray:
    context = dataset.pairs.context
    relative: FloatArray = cost - context_means(cost, context, len(dataset.pairs.contexts))[context]
    return relative


def _choices(test: Dataset, score: FloatArray, deviation: FloatArray) -> list[tuple[float, float]]:
    """Return the confidence and the regret of the choice in each context."""
    if not len(test):
        return []
    order = np.lexsort((test.pairs.method, score, test.pairs.context))
    starts = np.flatnonzero(np.diff(test.pairs.context[order], prepend=-1))
    found = []
    for rows in np.split(order, starts[1:]):
        estimates = [CostEstimate(*pair) for pair in zip(score[rows].tolist(), deviation[rows].tolist(), strict=True)]
        regret = float(test.cost[rows[0]] - test.cost[rows].min())
        found.append((confidence(estimates[0], estimates[1:]), regret))
    return found
