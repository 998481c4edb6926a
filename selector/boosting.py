"""Boosted trees over binned columns: scikit-learn's, at a cost that does not hang on the weights of the rows."""

from typing import Any, Final, Self

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

from selector.dataset import FloatArray

MAX_BINS: Final = 255
"""A column's values are told apart to so many, which is what scikit-learn's histograms hold."""


class BoostedTrees:
    """A histogram gradient boosting whose bins hold about as many rows each, whatever the rows weigh.

    scikit-learn takes weighted quantiles where rows have weights, and sorts each column anew for every one of them:
    that took ten times as long as the boosting. Binned before, each column has few enough values to be taken as it is.
    """

    def __init__(self, **parameters: Any) -> None:
        """Take the parameters of HistGradientBoostingRegressor."""
        self._model = HistGradientBoostingRegressor(early_stopping=False, **parameters)

    def fit(self, table: FloatArray, y: FloatArray, sample_weight: FloatArray) -> Self:
        """Learn from rows of finite numbers or NaN, shape (rows, columns)."""
        self._edges = [_edges(column) for column in table.T]
        self._known = ~np.isnan(table).all(axis=0)
        self._model.fit(self._binned(table), y, sample_weight=sample_weight)
        return self

    def predict(self, table: FloatArray) -> FloatArray:
        """Return a number for each row."""
        predicted: FloatArray = self._model.predict(self._binned(table))
        return predicted

    def _binned(self, table: FloatArray) -> FloatArray:
        binned = np.empty_like(table)
        for j, edges in enumerate(self._edges):
            binned[:, j] = np.searchsorted(edges, table[:, j])
        binned[np.isnan(table) & self._known] = np.nan  # scikit-learn takes no column with nothing else
        return binned


def _edges(column: FloatArray) -> FloatArray:
    """Return the upper ends of all bins but the last, ascending: half-way between values that the rows have."""
    known = np.sort(column[~np.isnan(column)])
    values = np.unique(known)
    if len(values) > MAX_BINS:
        values = np.unique(known[np.linspace(0, len(known) - 1, MAX_BINS).astype(np.intp)])
    edges: FloatArray = (values[:-1] + values[1:]) / 2
    return edges
