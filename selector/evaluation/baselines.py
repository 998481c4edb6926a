"""Baselines of the evaluation: from a random choice to the algorithm selection of the literature."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Self

import numpy as np
from sklearn.cluster import KMeans
from sklearn.ensemble import RandomForestRegressor
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.validation import check_is_fitted

from selector.boosting import BoostedTrees
from selector.dataset import FloatArray, IntArray, Pairs
from selector.effects import fit_effects, mean_regrets
from selector.estimator import NotApplicableError, Selector, weights_of
from selector.evaluation.text_embedding import Encoder, HashedNgrams, describe_contexts, describe_method
from selector.features import PHYSICS, ContextTable, PairTable, physics

UNKNOWN: Final = 1e6
"""Score of a method never measured: after every other."""

OVERFULL: Final = 10.0
"""Penalty, in natural logarithms, of a method whose weights and KV cache exceed the memory."""


class RandomChoice(Selector):
    """A random choice."""

    def __init__(self, random_state: int = 0) -> None:
        self.random_state = random_state

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        self.fitted_ = True
        return self

    def predict(self, X: Pairs) -> FloatArray:
        check_is_fitted(self)
        return np.random.default_rng(self.random_state).random(len(X))


class SingleBest(Selector):
    """The method with the lowest mean regret in training, everywhere."""

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        self.regret_ = dict(zip(X.methods, np.minimum(mean_regrets(X, y), UNKNOWN).tolist(), strict=True))
        return self

    def predict(self, X: Pairs) -> FloatArray:
        check_is_fitted(self)
        return np.array([self.regret_.get(method, UNKNOWN) for method in X.methods])[X.method]


class Roofline(Selector):
    """A hand-written rule: the method with the lowest roofline time that fits into memory, then the single best.

    It is the single best alone in a context of which a figure for the roofline is not known.
    """

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        if len(contexts_without_roofline(X)) == len(np.unique(X.context)):
            raise NotApplicableError("the rule needs the sizes of models and workloads, and the speed of the hardware")
        self.single_best_ = SingleBest().fit(X, y, sample_weight)
        return self

    def predict(self, X: Pairs) -> FloatArray:
        check_is_fitted(self)
        single_best = self.single_best_.predict(X)
        is_unknown = np.isin(X.context, contexts_without_roofline(X))
        return np.where(is_unknown, single_best, _roofline_scores(X) + 1e-3 * np.tanh(single_best))


def contexts_without_roofline(pairs: Pairs) -> IntArray:
    """Return the contexts in which the roofline time of a method is not known."""
    unknown: IntArray = np.unique(pairs.context[~np.isfinite(_roofline_scores(pairs))])
    return unknown


def _roofline_scores(pairs: Pairs) -> FloatArray:
    table = physics(pairs)
    total, fill = table[:, PHYSICS.index("total")], table[:, PHYSICS.index("fill")]
    scores: FloatArray = total * np.log(2.0) + np.where(np.nan_to_num(fill, nan=-1.0) > 0.0, OVERFULL, 0.0)
    return scores


class NearestNeighbours(Selector):
    """The mean relative cost of a method over the nearest contexts."""

    def __init__(self, n_neighbors: int = 15) -> None:
        self.n_neighbors = n_neighbors

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        effects = fit_effects(X, y, weights_of(y, sample_weight))
        self.methods_, self.mean_ = X.methods, effects.of_method
        self.table_ = _context_table(X)
        points, position = _points(self.table_, X)
        self.relative_ = np.full((len(points), len(X.methods)), np.nan)
        self.relative_[position, X.method] = y - effects.of_context[X.context]
        self.neighbours_ = NearestNeighbors(n_neighbors=min(self.n_neighbors, len(points))).fit(points)
        return self

    def predict(self, X: Pairs) -> FloatArray:
        check_is_fitted(self)
        points, position = _points(self.table_, X)
        distance, index = self.neighbours_.kneighbors(points)
        weight = 1.0 / (1.0 + distance)
        found = self.relative_[index]
        known = np.isfinite(found) * weight[:, :, None]
        sums = np.einsum("ckm,ckm->cm", np.nan_to_num(found), known) + 0.1 * self.mean_
        table = sums / (known.sum(axis=1) + 0.1)
        scores: FloatArray = table[position, _positions(self.methods_, X)]
        return scores


class Isac(Selector):
    """The single best of the context's cluster [ISAC: Kadioglu, Malitsky, Sellmann, Tierney, ECAI 2010]."""

    def __init__(self, min_cluster_size: int = 30, max_clusters: int = 24, random_state: int = 0) -> None:
        self.min_cluster_size = min_cluster_size
        self.max_clusters = max_clusters
        self.random_state = random_state

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        self.methods_ = X.methods
        self.table_ = _context_table(X)
        points, position = _points(self.table_, X)
        count = int(np.clip(len(points) // self.min_cluster_size, 1, self.max_clusters))
        count = min(count, len(np.unique(points, axis=0)))
        self.clusters_ = KMeans(count, n_init=3, random_state=self.random_state).fit(points)
        overall = np.minimum(mean_regrets(X, y), UNKNOWN)
        cluster = self.clusters_.labels_[position]
        self.regret_ = np.empty((count, len(X.methods)))
        for i in range(count):
            rows = cluster == i
            regret = mean_regrets(X.take(rows), y[rows])
            self.regret_[i] = np.where(np.isfinite(regret), regret, overall + 1.0)
        return self

    def predict(self, X: Pairs) -> FloatArray:
        check_is_fitted(self)
        points, position = _points(self.table_, X)
        scores: FloatArray = self.regret_[self.clusters_.predict(points)[position], _positions(self.methods_, X)]
        return scores


class Alors(Selector):
    """Matrix factorisation, with a forest from features to factors [ALORS: Misir, Sebag, AIJ 2017]."""

    def __init__(self, rank: int = 5, ridge: float = 1.0, sweeps: int = 10, random_state: int = 0) -> None:
        self.rank = rank
        self.ridge = ridge
        self.sweeps = sweeps
        self.random_state = random_state

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        effects = fit_effects(X, y, weights_of(y, sample_weight))
        self.methods_, self.mean_ = X.methods, effects.of_method
        self.table_ = _context_table(X)
        points, position = _points(self.table_, X, standardised=False)
        rest = y - effects.of_context[X.context] - effects.of_method[X.method]
        matrix, known = np.zeros((len(points), len(X.methods))), np.zeros((len(points), len(X.methods)))
        matrix[position, X.method], known[position, X.method] = rest, 1.0
        rank = min(self.rank, len(X.methods))
        self.factors_ = np.random.default_rng(self.random_state).normal(scale=0.1, size=(len(X.methods), rank))
        for _ in range(self.sweeps):
            of_context = _solve(matrix, known, self.factors_, self.ridge)
            self.factors_ = _solve(matrix.T, known.T, of_context, self.ridge)
        forest = RandomForestRegressor(60, min_samples_leaf=2, random_state=self.random_state)
        self.forest_ = forest.fit(points, of_context if rank > 1 else of_context[:, 0])
        return self

    def predict(self, X: Pairs) -> FloatArray:
        check_is_fitted(self)
        points, position = _points(self.table_, X, standardised=False)
        scores = self.forest_.predict(points).reshape(len(points), -1) @ self.factors_.T + self.mean_
        found: FloatArray = scores[position, _positions(self.methods_, X)]
        return found


def _solve(matrix: FloatArray, known: FloatArray, factors: FloatArray, ridge: float) -> FloatArray:
    """Return for each row of `matrix` the ridge regression of its known entries on the column factors."""
    gram = np.einsum("rm,mi,mj->rij", known, factors, factors, optimize=True) + ridge * np.eye(factors.shape[1])
    solved: FloatArray = np.linalg.solve(gram, ((matrix * known) @ factors)[:, :, None])
    return solved[:, :, 0]


class Lookup(Selector):
    """The single best of the same model and hardware; where they are new, of the same hardware, or model, or of all."""

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        overall = np.minimum(mean_regrets(X, y), UNKNOWN)
        self.methods_ = X.methods
        self.regrets_ = {}
        for names in _LOOKUP_NAMES:
            for key, rows in _rows_by_names(X, names):
                regret = mean_regrets(X.take(rows), y[rows])
                self.regrets_[names, key] = np.where(np.isfinite(regret), regret, overall + 1.0)
        return self

    def predict(self, X: Pairs) -> FloatArray:
        check_is_fitted(self)
        method, scores = _positions(self.methods_, X), np.empty(len(X))
        for names in _LOOKUP_NAMES:
            for key, rows in _rows_by_names(X, names):
                if (regret := self.regrets_.get((names, key))) is not None:
                    scores[rows] = regret[method[rows]]
        return scores


_LOOKUP_NAMES: Final = ((), ("model",), ("hardware",), ("model", "hardware"))
"""What contexts must have in common, in ascending order of preference."""


def _rows_by_names(pairs: Pairs, names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], IntArray]]:
    """Yield the rows of the contexts with equal names. Columns that the dataset lacks are equal everywhere."""
    of_contexts = [pairs.contexts.names[name] for name in names if name in pairs.contexts.names]
    rows_of: dict[tuple[str, ...], list[int]] = {}
    for row, context in enumerate(pairs.context):
        rows_of.setdefault(tuple(str(values[context]) for values in of_contexts), []).append(row)
    for key, rows in rows_of.items():
        yield key, np.array(rows, dtype=np.intp)


class PerMethod(Selector, ABC):
    """One regression per method, from the features of a context to the cost relative to the context's effect.

    Relative costs, since a regression of the level that is wrong by another error for every method misleads.
    """

    def __init__(self, min_rows: int = 8, random_state: int = 0) -> None:
        self.min_rows = min_rows
        self.random_state = random_state

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        weight = weights_of(y, sample_weight)
        y = y - fit_effects(X, y, weight).of_context[X.context]
        self.table_ = _context_table(X)
        points, position = _points(self.table_, X, standardised=False)
        self.models_ = {}
        self.mean_ = dict.fromkeys(X.methods, UNKNOWN)
        for method in np.unique(X.method):
            rows = X.method == method
            self.mean_[X.methods[method]] = float(np.average(y[rows], weights=weight[rows]))
            if np.count_nonzero(rows) >= self.min_rows:
                model = self.new_model()
                self.models_[X.methods[method]] = model.fit(points[position[rows]], y[rows], sample_weight=weight[rows])
        return self

    def predict(self, X: Pairs) -> FloatArray:
        check_is_fitted(self)
        points, position = _points(self.table_, X, standardised=False)
        scores = np.empty(len(X))
        for method in np.unique(X.method):
            rows = X.method == method
            name = X.methods[method]
            if name in self.models_:
                scores[rows] = self.models_[name].predict(points[position[rows]])
            else:
                scores[rows] = self.mean_.get(name, UNKNOWN)
        return scores

    @abstractmethod
    def new_model(self) -> RandomForestRegressor | BoostedTrees:
        """Return the unfitted regression."""


class RandomForest(PerMethod):
    """A random forest per method: the usual performance model of algorithm selection."""

    def new_model(self) -> RandomForestRegressor:
        return RandomForestRegressor(100, random_state=self.random_state)


class GradientBoosting(PerMethod):
    """Boosted trees per method."""

    def new_model(self) -> BoostedTrees:
        return BoostedTrees(max_iter=100, min_samples_leaf=5, random_state=self.random_state)


class JointBoosting(Selector):
    """One gradient boosting over pairs: numbers of the context and factors of the method, without roofline features."""

    def __init__(self, random_state: int = 0) -> None:
        self.random_state = random_state

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        self.table_ = PairTable().fit(X)
        trees = BoostedTrees(max_iter=150, learning_rate=0.12, random_state=self.random_state)
        self.trees_ = trees.fit(self.table_.transform(X, roofline=False), y, sample_weight=weights_of(y, sample_weight))
        return self

    def predict(self, X: Pairs) -> FloatArray:
        check_is_fitted(self)
        scores: FloatArray = self.trees_.predict(self.table_.transform(X, roofline=False))
        return scores


class TextEmbedding(Selector):
    """The pipeline of MetaInf [arXiv 2410.21340]: embedded descriptions of both sides, then boosted trees.

    Model, hardware, workload and method are embedded separately, so that few texts are distinct. `encode`: text
    encoder, hashed n-grams by default.
    """

    def __init__(self, encode: Encoder | None = None, components: int = 24, random_state: int = 0) -> None:
        self.encode = encode
        self.components = components
        self.random_state = random_state

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        encode: Encoder = self.encode or HashedNgrams()
        used = np.unique(X.context)
        described = describe_contexts(X.contexts, used)
        self.contexts_ = [_Embedding(encode, self.components).fit(texts) for texts in described]
        self.methods_ = _Embedding(encode, self.components).fit([describe_method(method) for method in X.methods])
        trees = BoostedTrees(max_iter=300, random_state=self.random_state)
        self.trees_ = trees.fit(self._table(X), y, sample_weight=weights_of(y, sample_weight))
        return self

    def predict(self, X: Pairs) -> FloatArray:
        check_is_fitted(self)
        scores: FloatArray = self.trees_.predict(self._table(X))
        return scores

    def _table(self, pairs: Pairs) -> FloatArray:
        used, position = np.unique(pairs.context, return_inverse=True)
        described = describe_contexts(pairs.contexts, used)
        contexts = [embedding.transform(texts) for embedding, texts in zip(self.contexts_, described, strict=True)]
        methods = self.methods_.transform([describe_method(method) for method in pairs.methods])
        return np.hstack([*(table[position] for table in contexts), methods[pairs.method]])


class _Embedding:
    """Principal components of text embeddings."""

    def __init__(self, encode: Encoder, components: int) -> None:
        self._encode = encode
        self._components = components

    def fit(self, texts: Sequence[str]) -> Self:
        distinct = sorted(set(texts))
        vectors = self._encode(distinct)
        self._mean = vectors.mean(axis=0)
        self._axes = np.linalg.svd(vectors - self._mean, full_matrices=False)[2][: self._components].T
        return self

    def transform(self, texts: Sequence[str]) -> FloatArray:
        distinct, position = np.unique(np.array(texts, dtype=np.str_), return_inverse=True)
        components: FloatArray = ((self._encode(distinct.tolist()) - self._mean) @ self._axes)[position]
        return components


class VirtualBest(Selector):
    """The oracle: knows the cost of every pair it was fitted on."""

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        self.costs_ = dict(zip(_keys(X), y.tolist(), strict=True))
        return self

    def predict(self, X: Pairs) -> FloatArray:
        check_is_fitted(self)
        return np.array([self.costs_.get(key, UNKNOWN) for key in _keys(X)])


def _keys(pairs: Pairs) -> list[tuple[str, str]]:
    """Return the context id and the method's name of every pair."""
    return [(pairs.contexts.ids[i], pairs.methods[j]) for i, j in zip(pairs.context, pairs.method, strict=True)]


def _positions(methods: Sequence[str], pairs: Pairs) -> IntArray:
    """Return for each pair the index of its method among `methods`."""
    if tuple(methods) == pairs.methods:
        return pairs.method
    index = {method: i for i, method in enumerate(methods)}
    missing = [method for method in pairs.methods if method not in index]
    if missing:
        raise ValueError(f"the methods {missing[:3]} were not among those fitted on")
    return np.array([index[method] for method in pairs.methods], dtype=np.intp)[pairs.method]


def _context_table(pairs: Pairs) -> ContextTable:
    return ContextTable.of(pairs.contexts.take(np.unique(pairs.context)))


def _points(table: ContextTable, pairs: Pairs, *, standardised: bool = True) -> tuple[FloatArray, IntArray]:
    """Return the features of the contexts in use, at least one column, and each pair's row in them."""
    used, position = np.unique(pairs.context, return_inverse=True)
    contexts = pairs.contexts.take(used)
    points = table.standardised(contexts) if standardised else table.matrix(contexts)
    return points if points.shape[1] else np.zeros((len(used), 1)), position


BASELINES: Final[dict[str, Callable[[], Selector]]] = {
    "random": RandomChoice,
    "single_best": SingleBest,
    "lookup": Lookup,
    "rule": Roofline,
    "nearest_neighbours": NearestNeighbours,
    "isac": Isac,
    "alors": Alors,
    "random_forest": RandomForest,
    "gradient_boosting": GradientBoosting,
    "joint_boosting": JointBoosting,
    "text_embedding": TextEmbedding,
    "virtual_best": VirtualBest,
}
"""Every baseline by its name in tables."""
