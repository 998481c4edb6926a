"""Gradient boosting with our own binning, because scikit-learn's is slow with sample weights."""

from typing import Any, Final, Self

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

from selector.dataset import FloatArray

MAX_BINS: Final = 64
"""Bins per column. The limit of scikit-learn's histograms, 255, takes longer."""


class BoostedTrees:
    """Histogram gradient boosting over unweighted quantile bins.

    With sample weights scikit-learn computes weighted quantiles and sorts each column anew for every one of them: that
    took ten times as long as the boosting. A column binned beforehand has few enough values to be used as it is.
    """

    def __init__(self, **parameters: Any) -> None:
        """Take the parameters of HistGradientBoostingRegressor."""
        self._model = HistGradientBoostingRegressor(early_stopping=False, **parameters)

    def fit(self, table: FloatArray, y: FloatArray, sample_weight: FloatArray) -> Self:
        """Fit on rows of finite numbers or NaN, shape (rows, columns)."""
        self._edges = [_edges(column) for column in table.T]
        self._known = ~np.isnan(table).all(axis=0)
        self._model.fit(self._binned(table), y, sample_weight=sample_weight)
        return self

    def predict(self, table: FloatArray) -> FloatArray:
        """Return a prediction for each row."""
        predicted: FloatArray = self._model.predict(self._binned(table))
        return predicted

    def _binned(self, table: FloatArray) -> FloatArray:
        binned = np.empty_like(table)
        for j, edges in enumerate(self._edges):
            binned[:, j] = np.searchsorted(edges, table[:, j])
        binned[np.isnan(table) & self._known] = np.nan  # scikit-learn rejects a column of NaN only
        return binned


def _edges(column: FloatArray) -> FloatArray:
    """Return the ascending upper edges of all bins but the last, half-way between observed values."""
    known = np.sort(column[~np.isnan(column)])
    values = np.unique(known)
    if len(values) > MAX_BINS:
        values = np.unique(known[np.linspace(0, len(known) - 1, MAX_BINS).astype(np.intp)])
    edges: FloatArray = (values[:-1] + values[1:]) / 2
    return edges
