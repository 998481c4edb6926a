"""The meta-model: one joint regression over pairs of context and method, so that methods share what is learned.

Its members are histogram gradient boosting, extremely randomised trees [Geurts, Ernst, Wehenkel, Machine Learning 2006]
and kernel ridge regression, on three targets: the logarithm of the cost; the same relative to the context's effect; and
the residual of a linear fit, which extrapolates to hardware and models beyond those seen. For leave-one-group-out, some
members do not see the features that merely identify a group. The members' weights and the uncertainty follow from
grouped cross-validation on the training data [stacked regressions: Breiman, Machine Learning 1996].
"""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

import numpy as np
from scipy.stats import norm
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.validation import check_is_fitted

from selector.boosting import BoostedTrees
from selector.dataset import FloatArray, IntArray, Pairs, context_means, context_minima
from selector.effects import fit_effects
from selector.estimator import Selector, weights_of
from selector.features import PairTable

FITS: Final = (
    ("boosting", ("cost",), "all"),
    ("boosting", ("relative",), "all"),
    ("boosting", ("residual",), "all"),
    ("trees", ("relative",), "all"),
    ("fine trees", ("relative",), "all"),
    ("trees", ("cost", "residual"), "all"),
    ("boosting", ("cost",), "general"),
    ("boosting", ("relative",), "general"),
    ("trees", ("relative",), "general"),
    ("trees", ("cost", "residual"), "general"),
    ("kernel", ("cost", "residual"), "all"),
)
"""The regressions with their targets and features. Each target is a member.

Trees may share their splits among targets, which costs one fit instead of two; relative costs need splits of their own.
Fine trees, three times as many over random subsets of the features, are best for queries like the training data;
otherwise those over all features are.
"""

KERNEL_POINTS: Final = 1000
"""Landmarks of the kernel, sampled at random."""

KERNEL_ROWS: Final = 20_000
"""Rows of a kernel's fit, sampled at random: its memory grows with rows times points."""

MIN_CONTEXTS_FOR_STACKING: Final = 12
"""With fewer contexts all members weigh the same."""

LEAST_SQUARES_SHARE: Final = 0.7
LEAST_SQUARES_GROUPS: Final = 40
"""Share of the weights set by least squares, and the number of groups at which it is half of that.

The rest follows from the regret of each member's own choices. Regret is the goal but sees each member alone; least
squares see how members correct one another, but overfit where there are few groups.
"""

REGRET_POWER: Final = 4
REGRET_GROUPS: Final = 12
"""Weight is regret to this negative power, and the number of groups at which the power is half."""

REGRET_FLOOR: Final = 1e-3
"""Added to every regret, in natural logarithms of cost; smaller ones are noise."""

MIN_DEVIATION: Final = 1e-3
"""Lower bound of standard deviations, in natural logarithms of cost."""


@dataclass(frozen=True, slots=True, eq=False)
class PairEstimates:
    """Predictions for pairs.

    `cost`: natural logarithms of cost. `relative`: the same less the mean of the context's pairs, which decides a
    choice. `deviation`: standard deviation of the error of `relative`.
    """

    cost: FloatArray
    relative: FloatArray
    deviation: FloatArray


class MetaModel(Selector):
    """The ensemble.

    `group`: the column for leave-one-group-out in cross-validation; None: single contexts. `max_rows`: rows learned
    from; whole contexts are sampled. `max_leaves`: of all trees of one extra-trees member, at some 100 bytes per leaf.
    """

    def __init__(
        self,
        group: str | None = None,
        *,
        boosting_rounds: int = 60,
        tree_count: int = 40,
        max_rows: int = 60_000,
        max_leaves: int = 400_000,
        random_state: int = 0,
    ) -> None:
        self.group = group
        self.boosting_rounds = boosting_rounds
        self.tree_count = tree_count
        self.max_rows = max_rows
        self.max_leaves = max_leaves
        self.random_state = random_state

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        """Fit the members, their weights and the uncertainty."""
        weight = weights_of(y, sample_weight)
        rows = self._sample_rows(X)
        X, y, weight = X.take(rows), y[rows], weight[rows]
        self.variance_ = np.array([max(float(np.var(y)), MIN_DEVIATION**2), 1.0])
        self.ensemble_ = _Ensemble(self, scale=1.0).fit(X, y, weight)
        self.weights_ = np.full(self.ensemble_.member_count, 1.0 / self.ensemble_.member_count)
        held_out = self._cross_validate(X, y, weight)
        if held_out is not None:
            self._weigh(X, y, weight, held_out, len(np.unique(_groups(X, self.group))))
        return self

    def predict(self, X: Pairs) -> FloatArray:
        """Return predicted logarithms of cost."""
        return self.predict_all(X).cost

    def predict_all(self, X: Pairs) -> PairEstimates:
        """Return predicted costs with their uncertainty."""
        check_is_fitted(self)
        predicted = self.ensemble_.predict(X)
        cost = predicted @ self.weights_
        centred = _centred(predicted, X)
        relative = centred @ self.weights_
        spread = ((centred - relative[:, None]) ** 2) @ self.weights_
        deviation = np.sqrt(np.maximum(self.variance_[0] + self.variance_[1] * spread, MIN_DEVIATION**2))
        return PairEstimates(cost, relative, deviation)

    def probe_scores(self, X: Pairs, count: int) -> FloatArray:
        """Return the scores for probing; see Selector.

        First comes the predicted best, then the methods by expected improvement on it [Jones, Schonlau, Welch, Journal
        of Global Optimization 1998]. The variance of a method never measured is that between methods.
        """
        predicted = self.predict_all(X)
        if count < 2:
            return predicted.cost
        first = _first_rows(predicted.relative, X.context)
        variance = predicted.deviation**2 + self.ensemble_.method_variance(X)
        behind = predicted.relative - predicted.relative[first]
        scale = np.sqrt(variance + variance[first])
        improvement = scale * norm.pdf(behind / scale) - behind * norm.sf(behind / scale)
        improvement[np.unique(first)] = np.inf
        order = np.lexsort((predicted.relative, -improvement))  # the improvement of methods far behind underflows to 0
        scores = np.empty(len(order))
        scores[order] = np.arange(len(order))
        return scores

    def _sample_rows(self, pairs: Pairs) -> IntArray:
        """Return at most `max_rows` rows of randomly sampled whole contexts."""
        if len(pairs) <= self.max_rows:
            return np.arange(len(pairs))
        drawn = np.random.default_rng(self.random_state).permutation(len(pairs.contexts))
        counts = np.bincount(pairs.context, minlength=len(pairs.contexts))[drawn]
        kept = np.zeros(len(pairs.contexts), dtype=bool)
        kept[drawn[np.cumsum(counts) <= self.max_rows]] = True
        return np.flatnonzero(kept[pairs.context])

    def _cross_validate(self, pairs: Pairs, y: FloatArray, weight: FloatArray) -> FloatArray | None:
        """Return out-of-fold predictions of smaller members, shape (rows, members); None with too few groups."""
        groups = _groups(pairs, self.group)
        count = min(3, len(np.unique(groups)))
        if count < 2 or len(np.unique(pairs.context)) < MIN_CONTEXTS_FOR_STACKING:
            return None
        predicted = np.empty((len(pairs), len(self.weights_)))
        for train, test in GroupKFold(count).split(groups, groups=groups):
            ensemble = _Ensemble(self, scale=0.4, general=self.ensemble_.general)
            ensemble.fit(pairs.take(train), y[train], weight[train])
            predicted[test] = ensemble.predict(pairs.take(test))
        return predicted

    def _weigh(self, pairs: Pairs, y: FloatArray, weight: FloatArray, predicted: FloatArray, groups: int) -> None:
        """Set the members' weights by how well they order methods out of fold, and fit the uncertainty."""
        centred, truth = _centred(predicted, pairs), _centred(y[:, None], pairs)[:, 0]
        regret = y - context_minima(y, pairs.context, len(pairs.contexts))[pairs.context]
        chosen = _mean_regrets(centred, regret, pairs.context)
        self.weights_ = (chosen + REGRET_FLOOR) ** (-REGRET_POWER * groups / (groups + REGRET_GROUPS))
        self.weights_ /= self.weights_.sum()
        found = _non_negative_fit(centred, truth, weight * np.exp(-regret))  # choices fall among the best
        if found.sum() > 0:
            share = LEAST_SQUARES_SHARE * groups / (groups + LEAST_SQUARES_GROUPS)
            self.weights_ = (1 - share) * self.weights_ + share * found / found.sum()
        mean = centred @ self.weights_
        spread = ((centred - mean[:, None]) ** 2) @ self.weights_
        design = np.column_stack([np.ones(len(spread)), spread])
        self.variance_ = _non_negative_fit(design, (truth - mean) ** 2, weight)


class _Fit(NamedTuple):
    """One fitted regression. `scale`: standard deviations of its targets in training."""

    model: Any
    targets: tuple[str, ...]
    columns: IntArray
    scale: FloatArray


class _Ensemble:
    """The members, fitted on the same rows. `general`: whether some see only features that do not identify a group."""

    def __init__(self, of: MetaModel, scale: float, *, general: bool | None = None) -> None:
        self._of = of
        self._scale = scale
        self.general = general

    def fit(self, pairs: Pairs, y: FloatArray, weight: FloatArray) -> Self:
        self._table = PairTable().fit(pairs)
        effects = fit_effects(pairs, y, weight)
        self._effect = dict(
            zip(pairs.methods, np.column_stack([effects.of_method, effects.support]).tolist(), strict=True)
        )
        table = self._matrix(pairs)
        columns = {"all": np.arange(table.shape[1])}
        identifying = self._table.columns_of_group(pairs, self._of.group)
        if self.general is None:
            self.general = 0 < len(identifying) < len(self._table.contexts_.kept)
        if self.general:
            columns["general"] = np.setdiff1d(columns["all"], identifying)
        # A linear fit on the features, most of which are logarithms, as roofline times are.
        self._line = _scaled(Ridge(alpha=10.0)).fit(table, y, ridge__sample_weight=weight)
        residual = y - self._line.predict(table)
        values = {"cost": y, "relative": y - effects.of_context[pairs.context], "residual": residual}
        self._fits = []
        for kind, targets, view in FITS:
            if view in columns:
                wanted = np.column_stack([values[name] for name in targets])
                scale = np.maximum(wanted.std(axis=0), MIN_DEVIATION)
                wanted = (wanted / scale)[:, 0] if len(targets) == 1 else wanted / scale
                model = self._fit(kind, table[:, columns[view]], wanted, weight)
                self._fits.append(_Fit(model, targets, columns[view], scale))
        self._targets = [name for fit in self._fits for name in fit.targets]
        return self

    @property
    def member_count(self) -> int:
        """Columns of `predict`."""
        return len(self._targets)

    def method_variance(self, pairs: Pairs) -> FloatArray:
        """Return the variance due to missing measurements of each pair's method, shape (pairs,)."""
        effects = [effect for effect, support in self._effect.values() if support > 0] or [0.0]
        support = np.array([self._effect.get(method, (0.0, 0.0))[1] for method in pairs.methods])
        unknown: FloatArray = (float(np.var(effects)) / (1.0 + support))[pairs.method]
        return unknown

    def predict(self, pairs: Pairs) -> FloatArray:
        """Return each member's predicted logarithms of cost, shape (pairs, members)."""
        table = self._matrix(pairs)
        predicted = np.column_stack(
            [fit.model.predict(table[:, fit.columns]).reshape(len(pairs), -1) * fit.scale for fit in self._fits]
        )
        predicted[:, [name == "residual" for name in self._targets]] += self._line.predict(table)[:, None]
        # Members on relative costs take a context's level from the others.
        is_relative = np.array([name == "relative" for name in self._targets])
        level, count = predicted[:, ~is_relative].mean(axis=1), len(pairs.contexts)
        mean = context_means(level, pairs.context, count)[pairs.context]
        for j in np.flatnonzero(is_relative):
            predicted[:, j] += mean - context_means(predicted[:, j], pairs.context, count)[pairs.context]
        return predicted

    def _matrix(self, pairs: Pairs) -> FloatArray:
        unknown = [0.0, 0.0]
        effects = np.array([self._effect.get(method, unknown) for method in pairs.methods]).reshape(-1, 2)
        return np.hstack([self._table.transform(pairs), effects[pairs.method]])

    def _fit(self, kind: str, table: FloatArray, wanted: FloatArray, weight: FloatArray) -> Any:
        of = self._of
        count = max(8, int(of.tree_count * self._scale))
        if kind == "kernel":
            return _fit_kernel(table, wanted, weight, of.random_state)
        if kind == "trees":
            share = 1.0 if wanted.ndim == 1 else 0.5
            model = _extra_trees(of, count, min_samples_leaf=2, max_features=share)
        elif kind == "fine trees":
            model = _extra_trees(of, 3 * count, min_samples_leaf=1, max_features=0.4)
        else:
            model = BoostedTrees(
                max_iter=max(20, int(of.boosting_rounds * self._scale)),
                learning_rate=0.12 if self._scale == 1.0 else 0.18,
                max_leaf_nodes=20,
                max_features=0.5,
                l2_regularization=1.0,
                min_samples_leaf=int(np.clip(len(table) // 40, 2, 10)),
                random_state=of.random_state,
            )
        return model.fit(table, wanted, sample_weight=weight)


def _extra_trees(of: MetaModel, count: int, **parameters: float) -> ExtraTreesRegressor:
    leaves = max(2, of.max_leaves // count)
    return ExtraTreesRegressor(count, max_leaf_nodes=leaves, random_state=of.random_state, **parameters)


def _fit_kernel(table: FloatArray, wanted: FloatArray, weight: FloatArray, random_state: int) -> Pipeline:
    """Fit kernel ridge regression with a Gaussian kernel, by Nyström's method [Williams, Seeger, NIPS 2000].

    Unlike trees it interpolates smoothly; far from all measurements it returns to the mean.
    """
    rows = np.random.default_rng(random_state).permutation(len(table))[:KERNEL_ROWS]
    kernel = Nystroem(
        gamma=0.5 / table.shape[1],  # rows are sqrt(2 columns) apart on average
        n_components=min(KERNEL_POINTS, len(rows)),
        random_state=random_state,
    )
    return _scaled(kernel, Ridge(alpha=0.1)).fit(table[rows], wanted[rows], ridge__sample_weight=weight[rows])


def _scaled(*steps: Any) -> Pipeline:
    """Return the steps after a standardisation that replaces missing values by 0 and clips outliers."""
    return make_pipeline(StandardScaler(), FunctionTransformer(_fill_and_clip), *steps)


def _fill_and_clip(table: FloatArray) -> FloatArray:
    return np.clip(np.nan_to_num(table), -4.0, 4.0)


def _centred(values: FloatArray, pairs: Pairs) -> FloatArray:
    """Return the columns of values, each less its mean within the context."""
    count = len(pairs.contexts)
    means = [context_means(values[:, j], pairs.context, count)[pairs.context] for j in range(values.shape[1])]
    return values - np.column_stack(means)


def _mean_regrets(predicted: FloatArray, regret: FloatArray, context: IntArray) -> FloatArray:
    """Return each member's mean regret over the contexts when it chooses its predicted best."""
    return np.array([np.mean(regret[np.unique(_first_rows(of_member, context))]) for of_member in predicted.T])


def _first_rows(predicted: FloatArray, context: IntArray) -> IntArray:
    """Return for each row the row of the same context with the lowest prediction."""
    order = np.lexsort((predicted, context))
    first = np.unique(context[order], return_index=True)[1]
    of_context = np.zeros(int(context.max(initial=-1)) + 1, dtype=np.intp)
    of_context[context[order][first]] = order[first]
    rows: IntArray = of_context[context]
    return rows


def _non_negative_fit(table: FloatArray, y: FloatArray, weight: FloatArray) -> FloatArray:
    """Return the coefficients of non-negative least squares through the origin."""
    fit = LinearRegression(fit_intercept=False, positive=True).fit(table, y, sample_weight=weight)
    coefficients: FloatArray = fit.coef_
    return coefficients


def _groups(pairs: Pairs, column: str | None) -> IntArray:
    """Return each pair's group in cross-validation: its value of `column`, else contexts equal but for the budget."""
    names = pairs.contexts.names
    if column is not None and column in names and len(np.unique(names[column][pairs.context])) > 2:
        return np.unique(names[column], return_inverse=True)[1].astype(np.intp)[pairs.context]
    return pairs.contexts.siblings()[pairs.context]
