"""How good a selector is on measurements that it has not seen: folds, measures, and the run over both.

For each context of the test folds a selector names one of the methods that were measured there, or, with N probes, N
of them, of which the best is taken. What is left out together is never seen in training in part.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Final, Literal

import numpy as np

from selector.dataset import Dataset, DatasetError, FloatArray, IntArray, Pairs, context_minima

Group = Literal["random", "model", "hardware"]

RANDOM_FOLDS: Final = 5
MAX_FOLDS: Final = 10
WITHIN: Final = float(np.log(1.05))
TIE: Final = 1e-12
"""Logarithms of cost that are no further apart are equal."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Rows of a dataset to train on, and rows to test on."""

    train: IntArray
    test: IntArray


def split(dataset: Dataset, group: Group, seed: int = 0) -> list[Fold]:
    """Return the folds.

    `random`: five, in which contexts that differ in nothing but their budget stay together. `model` and `hardware`:
    each value of that column left out in turn, merged into at most ten folds. Raises DatasetError where there are
    not two groups to tell apart.
    """
    contexts = dataset.pairs.contexts
    if group == "random":
        labels = contexts.siblings()
    elif group in contexts.names:
        labels = np.unique(contexts.names[group], return_inverse=True)[1].astype(np.intp)
    else:
        raise DatasetError(f"the contexts have no column {group!r} to leave out; use --group random")
    of_rows = labels[dataset.pairs.context]
    present = np.unique(of_rows)
    if len(present) < 2:
        what = "context" if group == "random" else f"value of {group!r}"
        raise DatasetError(f"only one {what} was measured: nothing could be left out and the rest learned from")
    count = min(len(present), RANDOM_FOLDS if group == "random" else MAX_FOLDS)
    number_of = np.zeros(len(labels) + 1, dtype=np.intp)
    number_of[present] = _deal(np.bincount(of_rows)[present], count, seed)
    fold_of = number_of[of_rows]
    return [Fold(np.flatnonzero(fold_of != i), np.flatnonzero(fold_of == i)) for i in range(count)]


def _deal(sizes: IntArray, count: int, seed: int) -> IntArray:
    """Deal groups into folds of about equal size: the largest first, each to the fold with the least so far."""
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
    """What is said of a selector over a set of contexts; None where there are none, or the ratio has no meaning.

    `regret` and `closed_gap` are in natural logarithms of cost, `mean_speedup` is over the default method.
    """

    contexts: int
    accuracy: float | None
    accuracy_within_5_percent: float | None
    mean_speedup: float | None
    ratio_to_virtual_best: float | None
    regret: float | None
    closed_gap: float | None
    f1: float | None

    def as_dict(self) -> dict[str, int | float | None]:
        """Return the measures by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """For each context that was tested: logarithms of cost, how many methods were measured, and labels for F1."""

    chosen: FloatArray
    best: FloatArray
    single_best: FloatArray
    default: FloatArray
    method_count: IntArray
    chosen_method: IntArray
    best_method: IntArray

    def measures(self, more_than: int = 0) -> Measures:
        """Return the measures over the contexts with more than so many methods."""
        of = self.method_count > more_than
        count = int(np.count_nonzero(of))
        if not count:
            return Measures(0, None, None, None, None, None, None, None)
        regret = self.chosen[of] - self.best[of]
        reference = float(np.mean(self.single_best[of] - self.best[of]))
        return Measures(
            contexts=count,
            accuracy=float(np.mean(regret <= TIE)),
            accuracy_within_5_percent=float(np.mean(regret <= WITHIN + TIE)),
            mean_speedup=float(np.mean(np.exp(self.default[of] - self.chosen[of]))),
            ratio_to_virtual_best=float(np.mean(np.exp(-regret))),
            regret=float(np.mean(regret)),
            closed_gap=1.0 - float(np.mean(regret)) / reference if reference > TIE else None,
            f1=macro_f1(self.best_method[of], self.chosen_method[of]),
        )


def macro_f1(truth: IntArray, predicted: IntArray) -> float:
    """Return the mean, over every method that is best or chosen somewhere, of its F1 score."""
    count = int(max(truth.max(), predicted.max())) + 1
    hit = np.bincount(truth[truth == predicted], minlength=count)
    either = np.bincount(truth, minlength=count) + np.bincount(predicted, minlength=count)
    return float(np.mean(2 * hit[either > 0] / either[either > 0]))


Estimator = Callable[[Dataset, Pairs], FloatArray]
"""Fit on a dataset, and return a predicted logarithm of cost (or any score, less is better) for each pair."""


def references(training: Dataset, default: str | None) -> tuple[FloatArray, FloatArray]:
    """Return for each method how it ranks (less first) as single best, and as default, by the training rows alone."""
    pairs, methods = training.pairs, len(training.pairs.methods)
    best = context_minima(training.cost, pairs.context, len(pairs.contexts))
    regret = training.cost - best[pairs.context]
    counts = np.bincount(pairs.method, minlength=methods).astype(np.float64)
    sums = np.bincount(pairs.method, weights=regret, minlength=methods)
    single_best = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    as_default = -counts
    if default in pairs.methods:
        as_default[pairs.methods.index(default)] = -np.inf
    return single_best, as_default


def predict_folds(dataset: Dataset, folds: Sequence[Fold], fit_predict: Estimator) -> Iterator[FloatArray]:
    """Yield the scores of every fold's test rows by a selector that was fitted on its training rows."""
    for fold in folds:
        yield checked(fit_predict(dataset.take(fold.train), dataset.pairs.take(fold.test)), fold)


def checked(scores: FloatArray, fold: Fold) -> FloatArray:
    """Return the scores of a fold's test rows. Raises ValueError where they are not one number for each: our fault."""
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
    """Return what the choices by these scores would have cost, next to the best, the single best and the default.

    Equal scores are decided by the order of the methods' names. `probes`: so many candidates are measured and the best
    is taken. Where the default was not measured in a context, the method that is most widely measured stands for it.
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
                # Of methods that are equally good, the one that was chosen counts as the best.
                test.pairs.method[np.where(chosen_is_best, chosen_row, best_row)],
            )
        )
    return Outcomes(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _choose(test: Dataset, score: FloatArray, count: int) -> IntArray:
    """Return for each context, ascending, the row with the least cost among the `count` rows with the least scores."""
    context = test.pairs.context
    order = np.lexsort((test.pairs.method, score, context))
    candidates = order[_rank_in_context(context[order]) < count]
    order = candidates[np.lexsort((test.pairs.method[candidates], test.cost[candidates], context[candidates]))]
    chosen: IntArray = order[_rank_in_context(context[order]) == 0]
    return chosen


def _rank_in_context(context: IntArray) -> IntArray:
    """Return the place of each row among those of its context; the rows of a context lie together."""
    position = np.arange(len(context))
    starts = np.r_[True, context[1:] != context[:-1]] if len(context) else np.zeros(0, dtype=bool)
    return position - np.maximum.accumulate(np.where(starts, position, 0))
