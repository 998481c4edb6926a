"""The meta-model: one joint regression over pairs of context and method, so that methods share what is learned.

It is the mean of four members: histogram gradient boosting on the cost, and on the residual of a linear fit, which
extrapolates to hardware and models beyond those seen; extremely randomised trees [Geurts, Ernst, Wehenkel, Machine
Learning 2006] on the cost relative to the context's effect, and on that residual. In contexts among those seen a fifth
counts as much, trees on the residual less its mean in the context, which interpolate better and extrapolate worse. What
is predicted is the cost of a method relative to the other methods of the context, on which a choice depends.
"""

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.validation import check_is_fitted

from selector.boosting import BoostedTrees
from selector.confidence import INTERVAL
from selector.dataset import FloatArray, IntArray, Pairs, context_means
from selector.effects import fit_effects
from selector.estimator import Selector, weights_of
from selector.features import Familiarity, PairTable

CALIBRATION_ROWS: Final = 3_000
"""Rows of the cross-validation that the uncertainty follows from."""

CALIBRATION_FOLDS: Final = 3

MIN_CONTEXTS: Final = 12
"""With fewer contexts there is no cross-validation, and the uncertainty is that of knowing nothing."""

TREE_COUNT: Final = 20

MIN_DEVIATION: Final = 1e-3
"""Lower bound of standard deviations, in natural logarithms of cost."""

MAX_DISAGREEMENT: Final = 4.0
"""Errors by which a variance of the members is multiplied, at most: where they all but agree, fits of it are arbitrary.
"""

COVERAGE: Final = 0.9
"""Share of the errors within INTERVAL standard deviations."""


@dataclass(frozen=True, slots=True, eq=False)
class PairEstimates:
    """Predictions for pairs: natural logarithms of cost less the mean of the context's pairs.

    `deviation`: standard deviation of their errors.
    """

    relative: FloatArray
    deviation: FloatArray


class MetaModel(Selector):
    """The ensemble.

    `group`: the column for leave-one-group-out when errors are estimated; None: single contexts. `max_rows`: rows
    learned from; whole contexts are sampled.
    """

    def __init__(
        self, group: str | None = None, *, boosting_rounds: int = 150, max_rows: int = 60_000, random_state: int = 0
    ) -> None:
        self.group = group
        self.boosting_rounds = boosting_rounds
        self.max_rows = max_rows
        self.random_state = random_state

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        """Fit the members and the uncertainty."""
        weight = weights_of(y, sample_weight)
        rows = self._sample(X, self.max_rows)
        X, y, weight = X.take(rows), y[rows], weight[rows]
        self.members_ = _Members(self).fit(X, y, weight)
        self.variance_ = np.array([max(float(np.var(y)), MIN_DEVIATION**2), 1.0])
        rows = self._sample(X, CALIBRATION_ROWS)
        self._calibrate(X.take(rows), y[rows], weight[rows])
        return self

    def predict(self, X: Pairs) -> FloatArray:
        """Return predicted logarithms of cost, relative to the context."""
        return self.predict_all(X).relative

    def deviation(self, X: Pairs) -> FloatArray:
        """Return the standard deviation of each prediction's error."""
        return self.predict_all(X).deviation

    def predict_all(self, X: Pairs) -> PairEstimates:
        """Return predictions with their uncertainty."""
        check_is_fitted(self)
        mean, variance = self.members_.predict(X)
        deviation = np.sqrt(np.maximum(self.variance_[0] + self.variance_[1] * variance, MIN_DEVIATION**2))
        return PairEstimates(mean, deviation)

    def _sample(self, pairs: Pairs, count: int) -> IntArray:
        """Return at most `count` rows of randomly sampled whole contexts."""
        if len(pairs) <= count:
            return np.arange(len(pairs))
        drawn = np.random.default_rng(self.random_state).permutation(len(pairs.contexts))
        rows_of = np.bincount(pairs.context, minlength=len(pairs.contexts))[drawn]
        kept = np.zeros(len(pairs.contexts), dtype=bool)
        kept[drawn[np.cumsum(rows_of) <= count]] = True
        return np.flatnonzero(kept[pairs.context])

    def _calibrate(self, pairs: Pairs, y: FloatArray, weight: FloatArray) -> None:
        """Fit the variance to errors out of fold, as a constant and a multiple of the members' disagreement.

        It is scaled so that the intervals cover as many of these errors as they should: errors have long tails. Only
        contexts count in which methods can be compared: relative to a single one, any prediction of it is right.
        """
        compared = np.flatnonzero(np.bincount(pairs.context)[pairs.context] > 1)
        pairs, y, weight = pairs.take(compared), y[compared], weight[compared]
        groups = _groups(pairs, self.group)
        folds = min(CALIBRATION_FOLDS, len(np.unique(groups)))
        if folds < 2 or len(np.unique(pairs.context)) < MIN_CONTEXTS:
            return
        error, variance = np.empty(len(y)), np.empty(len(y))
        # Shuffled: measurements may repeat the methods in a cycle, which folds in their order would leave out.
        splits = GroupKFold(folds, shuffle=True, random_state=self.random_state)
        for train, test in splits.split(groups, groups=groups):
            members = _Members(self).fit(pairs.take(train), y[train], weight[train])
            mean, variance[test] = members.predict(pairs.take(test))
            error[test] = mean - _relative(y[test], pairs.take(test))
        design = np.column_stack([np.ones(len(variance)), variance])
        fit = LinearRegression(fit_intercept=False, positive=True).fit(design, error**2, sample_weight=weight)
        coefficients = np.minimum(fit.coef_, [np.inf, MAX_DISAGREEMENT])
        expected = np.sqrt(np.maximum(design @ coefficients, MIN_DEVIATION**2))
        self.variance_ = coefficients * (np.quantile(np.abs(error) / expected, COVERAGE) / INTERVAL) ** 2


class _Members:
    """The members, fitted on the same rows.

    They are of different kinds, and have different targets, since such members err differently: each is far behind
    another one on some data, and none is ahead everywhere.
    """

    def __init__(self, of: MetaModel) -> None:
        self._of = of

    def fit(self, pairs: Pairs, y: FloatArray, weight: FloatArray) -> Self:
        self._table = PairTable().fit(pairs)
        self._familiarity = Familiarity().fit(pairs)
        table = self._matrix(pairs)
        self._line = _linear_fit().fit(table, y, ridge__sample_weight=weight)
        residual = y - self._line.predict(table)
        relative = y - fit_effects(pairs, y, weight).of_context[pairs.context]
        self._on_cost = self._boosting(len(y)).fit(table, y, weight)
        self._on_relative = self._extra_trees(1.0).fit(table, relative, weight)
        self._on_residual = [
            self._boosting(len(y)).fit(table, residual, weight),
            self._extra_trees(0.5).fit(table, residual, weight),
        ]
        residual = residual - _context_effect(residual, pairs, weight)
        self._among_seen = self._extra_trees(0.5).fit(table, residual, weight)
        return self

    def predict(self, pairs: Pairs) -> tuple[FloatArray, FloatArray]:
        """Return predictions relative to the context, and the variance of the four members."""
        table = self._matrix(pairs)
        line = self._line.predict(table)
        predicted = [self._on_cost.predict(table), self._on_relative.predict(table)]
        predicted += [line + member.predict(table) for member in self._on_residual]
        four = np.column_stack([_relative(each, pairs) for each in predicted])
        fifth, familiar = _relative(line + self._among_seen.predict(table), pairs), self._familiarity.of(pairs)
        return (four.sum(axis=1) + familiar * fifth) / (4.0 + familiar), four.var(axis=1)

    def _matrix(self, pairs: Pairs) -> FloatArray:
        table = self._table.transform(pairs, roofline=True)
        return table if table.shape[1] else np.zeros((len(pairs), 1))  # where all that was measured is equal

    def _boosting(self, rows: int) -> BoostedTrees:
        of = self._of
        return BoostedTrees(
            max_iter=of.boosting_rounds,
            learning_rate=0.12,
            min_samples_leaf=int(np.clip(rows // 40, 2, 20)),
            random_state=of.random_state,
        )

    def _extra_trees(self, features: float) -> ExtraTreesRegressor:
        """Return trees that choose each split from a share of the features."""
        of = self._of
        return ExtraTreesRegressor(TREE_COUNT, min_samples_leaf=2, max_features=features, random_state=of.random_state)


def _linear_fit() -> Pipeline:
    """Return a linear fit on the features, most of which are logarithms, as roofline times are."""
    return make_pipeline(StandardScaler(), FunctionTransformer(_fill_and_clip), Ridge(alpha=10.0))


def _fill_and_clip(table: FloatArray) -> FloatArray:
    """Return standardised features with missing values at the mean, and without outliers, which would bend a line."""
    return np.clip(np.nan_to_num(table), -4.0, 4.0)


def _context_effect(residual: FloatArray, pairs: Pairs, weight: FloatArray) -> FloatArray:
    """Return each pair's mean residual of the context, shrunk as by one more measurement of 0.

    Trees need not learn what all methods of a context have in common. It is shrunk since the mean of few methods is
    also theirs.
    """
    contexts = len(pairs.contexts)
    sums = np.bincount(pairs.context, weights=weight * residual, minlength=contexts)
    effect: FloatArray = sums / (np.bincount(pairs.context, weights=weight, minlength=contexts) + 1.0)
    return effect[pairs.context]


def _relative(values: FloatArray, pairs: Pairs) -> FloatArray:
    """Return values less the mean within their context."""
    relative: FloatArray = values - context_means(values, pairs.context, len(pairs.contexts))[pairs.context]
    return relative


def _groups(pairs: Pairs, column: str | None) -> IntArray:
    """Return each pair's group in cross-validation: its value of `column`, else contexts equal but for the budget.

    Where all contexts are equal, as on a node with one kind of jobs, each is a group of its own.
    """
    labels = None if column is None else pairs.contexts.labels(column)
    if labels is not None and len(np.unique(labels[pairs.context])) > 2:
        return labels[pairs.context]
    siblings = pairs.contexts.siblings()[pairs.context]
    return siblings if len(np.unique(siblings)) > 1 else pairs.context
