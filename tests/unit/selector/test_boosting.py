"""Boosting over our bins equals scikit-learn's, without its cost for sample weights."""

from unittest.mock import patch

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingRegressor

from selector.boosting import MAX_BINS, BoostedTrees
from selector.dataset import FloatArray

PARAMETERS = {"max_iter": 20, "random_state": 0}


@pytest.fixture(name="table")
def make_table() -> FloatArray:
    """Columns with few values, with many, with some that are missing, and with nothing else."""
    generator = np.random.default_rng(0)
    few, many = generator.integers(0, 5, 500), generator.normal(size=500)
    return np.column_stack([few, many, np.where(few == 2, np.nan, many**2), np.full(500, np.nan)])


def test_equals_scikit_learn_on_the_same_bins(table: FloatArray) -> None:
    y = np.nan_to_num(table) @ np.array([1.0, -2.0, 0.5, 0.0])
    few = table.copy()
    few[:, 1:] = np.round(few[:, 1:])
    sees = few[:, :-1]  # it takes no column where all is missing
    expected = HistGradientBoostingRegressor(early_stopping=False, **PARAMETERS).fit(sees, y).predict(sees)
    assert BoostedTrees(**PARAMETERS).fit(few, y, np.ones(500)).predict(few) == pytest.approx(expected)


def test_learns_from_columns_with_more_values_than_bins(table: FloatArray) -> None:
    y = 3.0 * (table[:, 1] > 0.5) + table[:, 0]
    assert len(np.unique(table[:, 1])) > MAX_BINS
    said = BoostedTrees(max_iter=100).fit(table, y, np.ones(500)).predict(table)
    assert float(np.mean((said - y) ** 2)) < 0.01 * float(np.var(y))


def test_values_out_of_range_fall_into_the_outermost_bin(table: FloatArray) -> None:
    y = table[:, 1]
    trees = BoostedTrees(**PARAMETERS).fit(table, y, np.ones(500))
    beyond, outermost = np.array([[1.0, 1e9, 0.0, np.nan]]), np.array([[1.0, y.max(), 0.0, np.nan]])
    assert trees.predict(beyond) == trees.predict(outermost)


def test_sample_weights_count(table: FloatArray) -> None:
    half = np.arange(500) % 2 == 0
    y = np.where(half, 1.0, -1.0)
    said = BoostedTrees(**PARAMETERS).fit(np.zeros((500, 1)) + 1.0, y, np.where(half, 3.0, 1.0)).predict(table[:, :1])
    assert said == pytest.approx(np.full(500, 0.5), abs=0.05)


def test_no_weighted_percentiles_are_computed(table: FloatArray) -> None:
    """scikit-learn took ten times as long to sort as to boost: it does so where a column has more values than bins."""
    weights = np.random.default_rng(1).uniform(0.5, 2.0, 500)
    with patch("sklearn.ensemble._hist_gradient_boosting.binning._weighted_percentile") as sorts:
        BoostedTrees(**PARAMETERS).fit(table, table[:, 0], weights)
    sorts.assert_not_called()
