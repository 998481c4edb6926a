"""Interface of all selectors: scikit-learn's conventions, with pairs of a context and a method as X."""

from typing import Self

import numpy as np
from sklearn.base import BaseEstimator

from selector.dataset import Dataset, FloatArray, Pairs


class NotApplicableError(ValueError):
    """The selector does not apply to the dataset. The message says what it would need."""


class Selector(BaseEstimator):  # type: ignore[misc]  # scikit-learn is not typed
    """An estimator that ranks methods: `fit(X, y, sample_weight)`, then `predict(X)`, with X a `Pairs`.

    `y` and predictions are natural logarithms of cost, float64 of shape (pairs,); predictions need only be comparable
    within a context. As in scikit-learn, the constructor only stores its arguments, fitted attributes end in an
    underscore, and equal arguments and data give equal predictions.
    """

    def fit(self, X: Pairs, y: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        """Fit to measured costs. Raises NotApplicableError."""
        raise NotImplementedError

    def predict(self, X: Pairs) -> FloatArray:
        """Return a predicted logarithm of cost for every pair. Raises sklearn.exceptions.NotFittedError."""
        raise NotImplementedError

    def deviation(self, X: Pairs) -> FloatArray | None:
        """Return the standard deviation of each prediction, relative to its context; None if it is not known."""
        del X
        return None

    def fit_dataset(self, dataset: Dataset) -> Self:
        """Fit to a dataset with its weights."""
        return self.fit(dataset.pairs, dataset.cost, dataset.weight)


def weights_of(y: FloatArray, sample_weight: FloatArray | None) -> FloatArray:
    """Return the weight of each row, 1 where none are given."""
    return np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
