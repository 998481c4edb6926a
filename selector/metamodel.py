"""The meta-model: one joint regression over pairs of context and method, so that methods learn from one another.

Its members are histogram gradient boosting, extremely randomised trees [Geurts, Ernst, Wehenkel, Machine Learning
2006] and kernel ridge regression, which is smooth where trees step, on three targets: the logarithm of the cost itself;
the same relative to what the context costs by itself; and what a linear fit on the logarithms of the roofline's times
leaves over. The first sees most, the second only what decides a choice, the third extrapolates to hardware and models
beyond those seen. Where whole values of a column are new, some members do not see the features that only say which
value it is: what can be learned of those is by heart. How much each member says follows from cross-validation on the
history at hand, in which whole groups of contexts are left out [stacked regressions: Breiman, Machine Learning 1996],
and so does how far a prediction may be off.
"""

from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from scipy.stats import norm
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.model_selection import GroupKFold
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
"""The regressions, the targets of each, and the features that it sees. Each target is a member.

Trees may share their splits among targets, which costs one fit instead of two; relative costs want splits of their own.
Fine trees, three times as many, which split by chance among fewer features, are the best where what is asked about is
like what was seen; where it is not, those that choose among all features are.
"""

KERNEL_POINTS: Final = 1000
"""Pairs that a kernel compares with, drawn by lot."""

KERNEL_ROWS: Final = 20_000
"""At most so many rows are in a kernel's fit, drawn by lot: what it holds meanwhile grows with rows times points."""

MIN_CONTEXTS_TO_WEIGH: Final = 12
"""With fewer contexts all members weigh the same: there is too little to leave out."""

LEAST_SQUARES_SHARE: Final = 0.7
LEAST_SQUARES_GROUPS: Final = 40
"""How much of the weights goes by least squares, and the number of groups to leave out with which it is half of that.

The rest goes by the regret of what each member would have chosen. Regret is what counts, and sees each member alone;
least squares see how members correct one another, but with few groups mostly what those happen to have in common.
"""

REGRET_POWER: Final = 4
REGRET_GROUPS: Final = 12
"""A member with half the regret gets two to this power the weight, and the number of groups with which it is half."""

REGRET_FLOOR: Final = 1e-3
"""Added to a regret, in natural logarithms of cost: what is smaller is luck."""

LEAF_FLOOR: Final = 1e-3
"""The least standard deviation that is told, in natural logarithms of cost."""


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What a meta-model says of pairs.

    `cost`: predicted natural logarithms of cost. `relative`: the same, less the mean of the context's pairs: that is
    what a choice goes by. `deviation`: the standard deviation that `relative` is expected to be off by.
    """

    cost: FloatArray
    relative: FloatArray
    deviation: FloatArray


class MetaModel(Selector):
    """The ensemble.

    `group`: the column of the contexts whose values are left out whole in cross-validation; None for single contexts.
    `max_rows`: at most so many rows are learned from, whole contexts drawn by lot. `max_leaves`: of all trees of one
    extra-trees member, which bounds its size in memory to some 100 bytes a leaf. `n_jobs`: threads.
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
        n_jobs: int = 1,
    ) -> None:
        self.group = group
        self.boosting_rounds = boosting_rounds
        self.tree_count = tree_count
        self.max_rows = max_rows
        self.max_leaves = max_leaves
        self.random_state = random_state
        self.n_jobs = n_jobs

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:  # noqa: N803
        """Learn members, weights and uncertainty."""
        weight = weights_of(y, sample_weight)
        rows = self._draw_rows(X)
        X, y, weight = X.take(rows), y[rows], weight[rows]  # noqa: N806
        self.variance_ = np.array([max(float(np.var(y)), LEAF_FLOOR**2), 1.0])
        self.ensemble_ = _Ensemble(self, scale=1.0).fit(X, y, weight)
        self.weights_ = np.full(len(self.ensemble_.members), 1.0 / len(self.ensemble_.members))
        held_out = self._cross_validate(X, y, weight)
        if held_out is not None:
            self._weigh(X, y, weight, held_out, len(np.unique(_groups(X, self.group))))
        return self

    def predict(self, X: Pairs) -> FloatArray:  # noqa: N803
        """Return predicted logarithms of cost."""
        return self.predict_all(X).cost

    def predict_all(self, X: Pairs) -> Prediction:  # noqa: N803
        """Return predicted costs, and how far they may be off."""
        check_is_fitted(self)
        said = self.ensemble_.predict(X)
        cost = said @ self.weights_
        centred = _centred(said, X)
        relative = centred @ self.weights_
        spread = ((centred - relative[:, None]) ** 2) @ self.weights_
        deviation = np.sqrt(np.maximum(self.variance_[0] + self.variance_[1] * spread, LEAF_FLOOR**2))
        return Prediction(cost, relative, deviation)

    def probe_scores(self, X: Pairs, count: int) -> FloatArray:  # noqa: N803
        """Return by which methods to begin measuring; see Selector.

        First comes the one that is expected to be best, then those that are expected to improve on it the most [Jones,
        Schonlau, Welch, Journal of Global Optimization 1998]. Of a method never measured it is known how far methods
        differ, and no more.
        """
        said = self.predict_all(X)
        if count < 2:
            return said.cost
        first = _first_rows(said.relative, X.context)
        variance = said.deviation**2 + self.ensemble_.ignorance(X)
        behind = said.relative - said.relative[first]
        scale = np.sqrt(variance + variance[first])
        improvement = scale * norm.pdf(behind / scale) - behind * norm.sf(behind / scale)
        improvement[np.unique(first)] = np.inf
        order = np.lexsort((said.relative, -improvement))  # far behind no improvement is left that a float could hold
        scores = np.empty(len(order))
        scores[order] = np.arange(len(order))
        return scores

    def _draw_rows(self, pairs: Pairs) -> IntArray:
        """Return the rows of as many whole contexts, drawn by lot, as `max_rows` leaves room for."""
        if len(pairs) <= self.max_rows:
            return np.arange(len(pairs))
        drawn = np.random.default_rng(self.random_state).permutation(len(pairs.contexts))
        counts = np.bincount(pairs.context, minlength=len(pairs.contexts))[drawn]
        kept = np.zeros(len(pairs.contexts), dtype=bool)
        kept[drawn[np.cumsum(counts) <= self.max_rows]] = True
        return np.flatnonzero(kept[pairs.context])

    def _cross_validate(self, pairs: Pairs, y: FloatArray, weight: FloatArray) -> FloatArray | None:
        """Return what smaller members say of rows held out of their training, shape (rows, members)."""
        groups = _groups(pairs, self.group)
        count = min(3, len(np.unique(groups)))
        if count < 2 or len(np.unique(pairs.context)) < MIN_CONTEXTS_TO_WEIGH:
            return None
        said = np.empty((len(pairs), len(self.weights_)))
        for train, test in GroupKFold(count).split(groups, groups=groups):
            ensemble = _Ensemble(self, scale=0.4, general=self.ensemble_.general)
            ensemble.fit(pairs.take(train), y[train], weight[train])
            said[test] = ensemble.predict(pairs.take(test))
        return said

    def _weigh(self, pairs: Pairs, y: FloatArray, weight: FloatArray, said: FloatArray, groups: int) -> None:
        """Weigh members by how well they order the methods of contexts not seen, and learn how far they are off."""
        centred, truth = _centred(said, pairs), _centred(y[:, None], pairs)[:, 0]
        regret = y - context_minima(y, pairs.context, len(pairs.contexts))[pairs.context]
        chosen = _mean_regrets(centred, regret, pairs.context)
        self.weights_ = (chosen + REGRET_FLOOR) ** (-REGRET_POWER * groups / (groups + REGRET_GROUPS))
        self.weights_ /= self.weights_.sum()
        found = _non_negative_fit(centred, truth, weight * np.exp(-regret))  # a choice is among the best
        if found.sum() > 0:
            share = LEAST_SQUARES_SHARE * groups / (groups + LEAST_SQUARES_GROUPS)
            self.weights_ = (1 - share) * self.weights_ + share * found / found.sum()
        mean = centred @ self.weights_
        spread = ((centred - mean[:, None]) ** 2) @ self.weights_
        design = np.column_stack([np.ones(len(spread)), spread])
        self.variance_ = _non_negative_fit(design, (truth - mean) ** 2, weight)


class _Ensemble:
    """The members, fitted on the same rows. `general`: whether some of them see general features only."""

    def __init__(self, of: MetaModel, scale: float, *, general: bool | None = None) -> None:
        self._group = of.group
        self.general = general
        self._boosting: dict[str, Any] = {
            "max_iter": max(20, int(of.boosting_rounds * scale)),
            "learning_rate": 0.12 if scale == 1.0 else 0.18,
            "max_leaf_nodes": 20,
            "max_features": 0.5,
            "l2_regularization": 1.0,
            "random_state": of.random_state,
        }
        count = max(8, int(of.tree_count * scale))
        self._trees = self._settings_of_trees(of, count)
        self._fine_trees = self._settings_of_trees(of, 3 * count)
        self._random_state = of.random_state

    @staticmethod
    def _settings_of_trees(of: MetaModel, count: int) -> dict[str, Any]:
        return {
            "n_estimators": count,
            "max_leaf_nodes": max(2, of.max_leaves // count),
            "n_jobs": of.n_jobs,
            "random_state": of.random_state,
        }

    def fit(self, pairs: Pairs, y: FloatArray, weight: FloatArray) -> Self:
        self._table = PairTable().fit(pairs)
        effects = fit_effects(pairs, y, weight)
        self._effect = dict(
            zip(pairs.methods, np.column_stack([effects.of_method, effects.support]).tolist(), strict=True)
        )
        table = self._matrix(pairs)
        self._columns = {"all": np.arange(table.shape[1])}
        by_heart = self._table.columns_of_group(pairs, self._group)
        if self.general is None:
            self.general = 0 < len(by_heart) < len(self._table.contexts_.kept)
        if self.general:
            self._columns["general"] = np.setdiff1d(self._columns["all"], by_heart)
        self._line = _Line().fit(table, y, weight)
        residual = y - self._line.predict(table)
        targets = {"cost": y, "relative": y - effects.of_context[pairs.context], "residual": residual}
        self._fits = []
        for kind, names, view in FITS:
            if view in self._columns:
                wanted = np.column_stack([targets[name] for name in names])
                scale = np.maximum(wanted.std(axis=0), LEAF_FLOOR)
                wanted = (wanted / scale)[:, 0] if len(names) == 1 else wanted / scale
                model = self._new(kind, len(y), names).fit(table[:, self._columns[view]], wanted, sample_weight=weight)
                self._fits.append((model, names, view, scale))
        return self

    def ignorance(self, pairs: Pairs) -> FloatArray:
        """Return the variance of what is not known of each pair's method for want of measurements, shape (pairs,)."""
        effects = [effect for effect, support in self._effect.values() if support > 0] or [0.0]
        support = np.array([self._effect.get(method, (0.0, 0.0))[1] for method in pairs.methods])
        unknown: FloatArray = (float(np.var(effects)) / (1.0 + support))[pairs.method]
        return unknown

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the members, in the order of what `predict` returns."""
        shown = [(kind, names, view) for kind, names, view in FITS if view in self._columns]
        return tuple(f"{kind} on {name}, {view} features" for kind, names, view in shown for name in names)

    def predict(self, pairs: Pairs) -> FloatArray:
        """Return what each member says, shape (pairs, members), in logarithms of cost."""
        table = self._matrix(pairs)
        said = np.column_stack(
            [
                model.predict(table[:, self._columns[view]]).reshape(len(pairs), -1) * scale
                for model, _, view, scale in self._fits
            ]
        )
        targets = [name for _, names, _, _ in self._fits for name in names]
        line = self._line.predict(table)
        for j, target in enumerate(targets):
            if target == "residual":
                said[:, j] += line
        # The relative members know nothing of a context's level: they take it from the others.
        level = [j for j, target in enumerate(targets) if target != "relative"]
        mean = context_means(said[:, level].mean(axis=1), pairs.context, len(pairs.contexts))[pairs.context]
        for j, target in enumerate(targets):
            if target == "relative":
                own = context_means(said[:, j], pairs.context, len(pairs.contexts))[pairs.context]
                said[:, j] += mean - own
        return said

    def _matrix(self, pairs: Pairs) -> FloatArray:
        unknown = [0.0, 0.0]
        effects = np.array([self._effect.get(method, unknown) for method in pairs.methods]).reshape(-1, 2)
        return np.hstack([self._table.transform(pairs), effects[pairs.method]])

    def _new(self, kind: str, rows: int, targets: tuple[str, ...]) -> Any:
        if kind == "trees":
            share = 1.0 if len(targets) == 1 else 0.5
            return ExtraTreesRegressor(min_samples_leaf=2, max_features=share, **self._trees)
        if kind == "fine trees":
            return ExtraTreesRegressor(min_samples_leaf=1, max_features=0.4, **self._fine_trees)
        if kind == "kernel":
            return _Kernel(self._random_state)
        return BoostedTrees(min_samples_leaf=int(np.clip(rows // 40, 2, 10)), **self._boosting)


class _Scale:
    """Brings columns about 0 and to equal weight; what is missing is 0."""

    def fit(self, table: FloatArray) -> Self:
        with np.errstate(invalid="ignore"):
            known = np.isfinite(table)
            counts = np.maximum(known.sum(axis=0), 1)
            filled = np.where(known, table, 0.0)
            self._centre = filled.sum(axis=0) / counts
            deviation = np.sqrt((np.where(known, table - self._centre, 0.0) ** 2).sum(axis=0) / counts)
        self._scale = np.where(deviation > 0, deviation, 1.0)
        return self

    def transform(self, table: FloatArray) -> FloatArray:
        """Return the columns; what lies far outside of what was seen is brought to its edge."""
        columns: FloatArray = np.clip(np.nan_to_num((table - self._centre) / self._scale), -4.0, 4.0)
        return columns


class _Line:
    """A ridge regression on the features, which are logarithms for the most part: the roofline's straight lines."""

    def fit(self, table: FloatArray, y: FloatArray, weight: FloatArray) -> Self:
        self._scale = _Scale().fit(table)
        self._ridge = Ridge(alpha=10.0).fit(self._scale.transform(table), y, sample_weight=weight)
        return self

    def predict(self, table: FloatArray) -> FloatArray:
        line: FloatArray = self._ridge.predict(self._scale.transform(table))
        return line


class _Kernel:
    """A ridge regression in the space of a Gaussian kernel, by Nyström's method [Williams, Seeger, NIPS 2000].

    Between what was measured it interpolates without steps; far from all of it what it says goes back to the mean.
    """

    def __init__(self, random_state: int) -> None:
        self._random_state = random_state

    def fit(self, table: FloatArray, y: FloatArray, sample_weight: FloatArray) -> Self:
        rows = np.random.default_rng(self._random_state).permutation(len(y))[:KERNEL_ROWS]
        self._scale = _Scale().fit(table)
        self._map = Nystroem(
            gamma=0.5 / table.shape[1],  # rows are sqrt(2 columns) apart on average
            n_components=min(KERNEL_POINTS, len(rows)),
            random_state=self._random_state,
        )
        mapped = self._map.fit_transform(self._scale.transform(table[rows]))
        self._ridge = Ridge(alpha=0.1).fit(mapped, y[rows], sample_weight=sample_weight[rows])
        return self

    def predict(self, table: FloatArray) -> FloatArray:
        said: FloatArray = self._ridge.predict(self._map.transform(self._scale.transform(table)))
        return said


def _centred(values: FloatArray, pairs: Pairs) -> FloatArray:
    """Return the columns of values, each less its mean over the pairs of the same context."""
    count = len(pairs.contexts)
    means = [context_means(values[:, j], pairs.context, count)[pairs.context] for j in range(values.shape[1])]
    return values - np.column_stack(means)


def _mean_regrets(said: FloatArray, regret: FloatArray, context: IntArray) -> FloatArray:
    """Return each member's mean regret over the contexts, in each of which it chooses what it says costs least."""
    return np.array([np.mean(regret[np.unique(_first_rows(of_member, context))]) for of_member in said.T])


def _first_rows(said: FloatArray, context: IntArray) -> IntArray:
    """Return for each row that of the same context with the least of what is said."""
    order = np.lexsort((said, context))
    first = np.unique(context[order], return_index=True)[1]
    of_context = np.zeros(int(context.max(initial=-1)) + 1, dtype=np.intp)
    of_context[context[order][first]] = order[first]
    rows: IntArray = of_context[context]
    return rows


def _non_negative_fit(table: FloatArray, y: FloatArray, weight: FloatArray) -> FloatArray:
    """Return the coefficients, none negative, of least squares through the origin."""
    fit = LinearRegression(fit_intercept=False, positive=True).fit(table, y, sample_weight=weight)
    coefficients: FloatArray = fit.coef_
    return coefficients


def _groups(pairs: Pairs, column: str | None) -> IntArray:
    """Return for each pair the number of what is left out together.

    That is a value of the column, else contexts that differ in nothing but their budget: they may share measurements.
    """
    names = pairs.contexts.names
    if column is not None and column in names and len(np.unique(names[column][pairs.context])) > 2:
        return np.unique(names[column], return_inverse=True)[1].astype(np.intp)[pairs.context]
    return pairs.contexts.siblings()[pairs.context]
