"""Folds of the cross-validation and measures of a selector's choices.

For each test context a selector chooses one of the methods measured there, or, with N probes, the best of N candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from sklearn.metrics import f1_score

from selector.dataset import Dataset, DatasetError, FloatArray, IntArray
from selector.effects import mean_regrets

RANDOM_FOLDS: Final = 5
MAX_FOLDS: Final = 10
WITHIN: Final = float(np.log(1.05))
TIE: Final = 1e-12
"""Largest difference of equal logarithms of cost."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Rows of a dataset to train on, and rows to test on."""

    train: IntArray
    test: IntArray


def split(dataset: Dataset, group: str, seed: int = 0) -> list[Fold]:
    """Return the folds.

    `random`: five, with contexts that differ only in their budget in the same fold. Otherwise leave-one-group-out over
    the values of that column, merged into at most ten folds. Raises DatasetError for fewer than two groups.
    """
    contexts = dataset.pairs.contexts
    labels = contexts.siblings() if group == "random" else contexts.labels(group)
    if labels is None:
        has = ", ".join(contexts.groups()) or "none"
        raise DatasetError(f"the contexts have no column {group!r} to leave out: use --group random, or one of {has}")
    of_rows = labels[dataset.pairs.context]
    present = np.unique(of_rows)
    if len(present) < 2:
        what = f"only one value of {group!r} was measured" if group != "random" else "only one context was measured"
        if group == "random" and len(np.unique(dataset.pairs.context)) > 1:
            what = "the contexts that were measured differ in nothing but their budget"
        raise DatasetError(f"{what}: leaving it out would leave nothing to train on", dataset.notes)
    count = min(len(present), RANDOM_FOLDS if group == "random" else MAX_FOLDS)
    number_of = np.zeros(len(labels) + 1, dtype=np.intp)
    number_of[present] = _deal(np.bincount(of_rows)[present], count, seed)
    fold_of = number_of[of_rows]
    return [Fold(np.flatnonzero(fold_of != i), np.flatnonzero(fold_of == i)) for i in range(count)]


def _deal(sizes: IntArray, count: int, seed: int) -> IntArray:
    """Return a fold for each group: largest first, each to the smallest fold so far."""
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    filled = np.zeros(count, dtype=np.intp)
    fold_of = np.zeros(len(sizes), dtype=np.intp)
    for group in order:
        fold_of[group] = np.argmin(filled)
        filled[fold_of[group]] += sizes[group]
    return fold_of


@dataclass(frozen=True, slots=True)
class Measures:
    """Mean measures of a selector over test contexts; None where undefined or not finite.

    `regret` and `closed_gap` are in natural logarithms of cost; `mean_speedup` is over the default method.
    """

    contexts: int
    accuracy: float | None = None
    accuracy_within_5_percent: float | None = None
    mean_speedup: float | None = None
    ratio_to_virtual_best: float | None = None
    regret: float | None = None
    closed_gap: float | None = None
    f1: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """Per test context: logarithms of cost, the number of measured methods, and the labels for F1."""

    chosen: FloatArray
    best: FloatArray
    single_best: FloatArray
    default: FloatArray
    method_count: IntArray
    chosen_method: IntArray
    best_method: IntArray

    def measures(self, more_than: int = 1) -> Measures:
        """Return the measures over the contexts with more than `more_than` methods: of one there is no choice."""
        of = self.method_count > more_than
        count = int(np.count_nonzero(of))
        if not count:
            return Measures(0)
        regret = self.chosen[of] - self.best[of]
        reference = float(np.mean(self.single_best[of] - self.best[of]))
        return Measures(
            contexts=count,
            accuracy=float(np.mean(regret <= TIE)),
            accuracy_within_5_percent=float(np.mean(regret <= WITHIN + TIE)),
            mean_speedup=_mean_speedup(self.default[of] - self.chosen[of]),
            ratio_to_virtual_best=float(np.mean(np.exp(-regret))),
            regret=float(np.mean(regret)),
            closed_gap=1.0 - float(np.mean(regret)) / reference if reference > TIE else None,
            f1=macro_f1(self.best_method[of], self.chosen_method[of]),
        )


def _mean_speedup(log_speedup: FloatArray) -> float | None:
    with np.errstate(over="ignore"):
        mean = float(np.mean(np.exp(log_speedup)))
    return mean if np.isfinite(mean) else None


def macro_f1(truth: IntArray, predicted: IntArray) -> float:
    """Return the mean F1 score over every method that is best or chosen somewhere."""
    return float(f1_score(truth, predicted, average="macro", zero_division=0.0))


def references(training: Dataset, default: str | None) -> tuple[FloatArray, FloatArray]:
    """Return the scores of each method as single best and as default, from the training rows alone; lower is better."""
    methods = training.pairs.methods
    as_default = -np.bincount(training.pairs.method, minlength=len(methods)).astype(np.float64)
    if default in methods:
        as_default[methods.index(default)] = -np.inf
    return mean_regrets(training.pairs, training.cost), as_default


def checked(scores: FloatArray, fold: Fold) -> FloatArray:
    """Return the scores of a fold's test rows. Raises ValueError unless there is one number for each."""
    if scores.shape != fold.test.shape or np.isnan(scores).any():
        raise ValueError("a selector must return one number for each pair")
    return scores


def outcomes(
    dataset: Dataset,
    folds: Sequence[Fold],
    scores: Sequence[FloatArray],
    *,
    probes: int = 0,
    default: str | None = None,
) -> Outcomes:
    """Return the costs of the choices by these scores, and of the best, the single best and the default.

    Equal scores are ordered by the methods' names. `probes`: candidates of which the best is taken. Where the default
    was not measured, the most widely measured method replaces it.
    """
    parts: list[tuple[FloatArray | IntArray, ...]] = []
    for fold, score in zip(folds, scores, strict=True):
        single_best, as_default = references(dataset.take(fold.train), default)
        test = dataset.take(fold.test)
        chosen_row = _choose(test, score, max(1, probes))
        best_row = _choose(test, test.cost, 1)
        single_row = _choose(test, single_best[test.pairs.method], 1)
        default_row = _choose(test, as_default[test.pairs.method], 1)
        chosen_is_best = test.cost[chosen_row] - test.cost[best_row] <= TIE
        parts.append(
            (
                test.cost[chosen_row],
                test.cost[best_row],
                test.cost[single_row],
                test.cost[default_row],
                np.unique(test.pairs.context, return_counts=True)[1],
                test.pairs.method[chosen_row],
                # Of equally good methods, the chosen one counts as the best.
                test.pairs.method[np.where(chosen_is_best, chosen_row, best_row)],
            )
        )
    return Outcomes(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _choose(test: Dataset, score: FloatArray, count: int) -> IntArray:
    """Return for each context, ascending, the row with the lowest cost among the `count` with the lowest scores."""
    context = test.pairs.context
    order = np.lexsort((test.pairs.method, score, context))
    candidates = order[_rank_in_context(context[order]) < count]
    order = candidates[np.lexsort((test.pairs.method[candidates], test.cost[candidates], context[candidates]))]
    chosen: IntArray = order[_rank_in_context(context[order]) == 0]
    return chosen


def _rank_in_context(context: IntArray) -> IntArray:
    """Return the rank of each row within its context, whose rows are contiguous."""
    position = np.arange(len(context))
    starts = np.r_[True, context[1:] != context[:-1]] if len(context) else np.zeros(0, dtype=bool)
    return position - np.maximum.accumulate(np.where(starts, position, 0))
