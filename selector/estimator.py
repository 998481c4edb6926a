"""What all selectors share: scikit-learn's conventions, with pairs of a context and a method as X."""

from typing import Self

import numpy as np
from sklearn.base import BaseEstimator

from selector.dataset import Dataset, FloatArray, Pairs


class NotApplicableError(ValueError):
    """This selector can say nothing about such a dataset. The message says what it would need."""


class Selector(BaseEstimator):  # type: ignore[misc]  # scikit-learn is not typed
    """An estimator that ranks methods: `fit(X, y, sample_weight)`, then `predict(X)`, with X a `Pairs`.

    `y` and what `predict` returns are natural logarithms of cost, float64 of shape (pairs,). A prediction need only be
    comparable with others of the same context. As everywhere in scikit-learn the constructor only keeps its arguments,
    what was learned ends in an underscore, and the same arguments and data give the same predictions.
    """

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:  # noqa: N803
        """Learn from what was measured. Raises NotApplicableError."""
        raise NotImplementedError

    def predict(self, X: Pairs) -> FloatArray:  # noqa: N803
        """Return a predicted logarithm of cost for every pair. Raises sklearn.exceptions.NotFittedError."""
        raise NotImplementedError

    def probe_scores(self, X: Pairs, count: int) -> FloatArray:  # noqa: N803
        """Return a score for every pair: so many methods of a context, those with the least, are worth measuring first.

        By default they are those that are predicted to be best.
        """
        del count
        return self.predict(X)

    def fit_dataset(self, dataset: Dataset) -> Self:
        """Learn from a dataset, each row with its weight."""
        return self.fit(dataset.pairs, dataset.cost, dataset.weight)


def weights_of(y: FloatArray, sample_weight: FloatArray | None) -> FloatArray:
    """Return the weight of each row, 1 where none are given."""
    return np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
