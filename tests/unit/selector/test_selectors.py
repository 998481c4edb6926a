"""Conformance of all selectors, the meta-model and the baselines."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.exceptions import NotFittedError

from selector.dataset import Dataset, FloatArray, IntArray
from selector.estimator import NotApplicableError, Selector
from selector.evaluation.baselines import BASELINES, TextEmbedding
from selector.evaluation.measures import Fold, outcomes, split
from selector.metamodel import MetaModel
from tests.unit.selector.measurements import made_up, out_of_fold_scores


def small_metamodel() -> MetaModel:
    return MetaModel(boosting_rounds=40, tree_count=10)


SELECTORS: dict[str, Callable[[], Selector]] = {"metaswarm": small_metamodel, **BASELINES}
HARDWARE = {"l_bw": 40.0, "l_bf": 49.0, "memgb": 80.0, "kvgb": 0.01}


def with_hardware(dataset: Dataset) -> Dataset:
    """Add the hardware columns that the roofline rule needs, equal for all contexts."""
    contexts = dataset.pairs.contexts
    constants = np.tile(list(HARDWARE.values()), (len(contexts), 1))
    contexts = replace(
        contexts, columns=(*contexts.columns, *HARDWARE), features=np.hstack([contexts.features, constants])
    )
    return replace(dataset, pairs=replace(dataset.pairs, contexts=contexts))


@pytest.fixture(params=list(SELECTORS), name="make")
def make_selector(request: pytest.FixtureRequest) -> Callable[[], Selector]:
    return SELECTORS[request.param]


DATASET = with_hardware(made_up())


def test_predictions_are_finite_and_deterministic(make: Callable[[], Selector]) -> None:
    first, second = make().fit_dataset(DATASET), make().fit_dataset(DATASET)
    predicted = first.predict(DATASET.pairs)
    assert predicted.shape == (len(DATASET),)
    assert np.isfinite(predicted).all()
    np.testing.assert_array_equal(predicted, second.predict(DATASET.pairs))
    np.testing.assert_array_equal(predicted, first.predict(DATASET.pairs))


def test_follows_scikit_learn_conventions(make: Callable[[], Selector]) -> None:
    selector = make()
    with pytest.raises(NotFittedError):
        selector.predict(DATASET.pairs)
    before = repr(selector.get_params())
    assert selector.fit(DATASET.pairs, DATASET.cost) is selector
    assert repr(selector.get_params()) == before
    with pytest.raises(NotFittedError):
        clone(selector).predict(DATASET.pairs)


def test_accepts_a_single_method_and_equal_costs(make: Callable[[], Selector]) -> None:
    alone = DATASET.take(DATASET.pairs.method == DATASET.pairs.method[0])
    assert np.isfinite(make().fit_dataset(alone).predict(alone.pairs)).all()
    constant = replace(DATASET, cost=np.zeros(len(DATASET)))
    assert np.isfinite(make().fit_dataset(constant).predict(constant.pairs)).all()


def test_accepts_missing_features(make: Callable[[], Selector]) -> None:
    contexts = DATASET.pairs.contexts
    features = contexts.features.copy()
    features[::2, 0] = np.nan
    features[:, 3] = np.nan
    holed = replace(DATASET, pairs=replace(DATASET.pairs, contexts=replace(contexts, features=features)))
    try:
        predicted = make().fit_dataset(holed).predict(holed.pairs)
    except NotApplicableError:
        return
    assert np.isfinite(predicted).all()


def test_accepts_three_observations(make: Callable[[], Selector]) -> None:
    few = DATASET.take(np.arange(3))
    assert np.isfinite(make().fit_dataset(few).predict(DATASET.pairs)).all()


def closed_gap(make: Callable[[], Selector], dataset: Dataset) -> float:
    folds = split(dataset, "model")
    gap = outcomes(dataset, folds, out_of_fold_scores(dataset, folds, make)).measures().closed_gap
    assert gap is not None
    return gap


def test_metamodel_closes_the_gap_on_models_left_out() -> None:
    dataset = made_up(contexts=120)
    assert closed_gap(small_metamodel, dataset) > 0.85
    assert abs(closed_gap(BASELINES["single_best"], dataset)) < 1e-9


def test_metamodel_generalises_over_method_factors() -> None:
    """A method never measured in training is judged by those that share its factors."""
    dataset = made_up(contexts=120, per_context=8)
    new = dataset.pairs.methods.index("b|fp8|tp2")
    model = small_metamodel().fit_dataset(dataset.take(dataset.pairs.method != new))
    contexts = dataset.pairs.contexts
    large = np.flatnonzero(contexts.features[:, 2] > 10)
    said = model.predict(dataset.of_contexts(large).pairs)
    of_new = dataset.of_contexts(large).pairs.method == new
    assert said[of_new].mean() < said[~of_new].mean() - 0.5


def test_first_probe_is_the_predicted_best(make: Callable[[], Selector]) -> None:
    selector = make().fit_dataset(DATASET)
    chosen = chosen_by(selector.predict(DATASET.pairs))
    np.testing.assert_array_equal(chosen_by(selector.probe_scores(DATASET.pairs, 1)), chosen)
    np.testing.assert_array_equal(chosen_by(selector.probe_scores(DATASET.pairs, 2)), chosen)


def chosen_by(scores: FloatArray) -> IntArray:
    """Return the method with the least score, of each context."""
    fold = Fold(np.arange(0), np.arange(len(DATASET)))
    return outcomes(DATASET, [fold], [scores]).chosen_method


def test_unmeasured_methods_are_probed_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = made_up(contexts=60, per_context=8)
    new = dataset.pairs.method == dataset.pairs.methods.index("b|fp8|tp1")
    model = small_metamodel().fit_dataset(dataset.take(~new))

    def places() -> IntArray:
        """Return in which place the new method would be measured, of each context."""
        order = np.argsort(model.probe_scores(dataset.pairs, 2).reshape(60, 8))
        of_new: IntArray = np.argsort(order)[new.reshape(60, 8)]
        return of_new

    eager = places()
    monkeypatch.setattr(model.ensemble_, "method_variance", lambda pairs: np.zeros(len(pairs)))
    sober = places()
    assert (eager <= sober).all()
    assert (eager < sober).any()


def test_deviation_matches_the_prediction_error() -> None:
    dataset = made_up(contexts=160, noise=0.3)
    training, test = dataset.of_contexts(np.arange(110)), dataset.of_contexts(np.arange(110, 160))
    found = small_metamodel().fit_dataset(training).predict_all(test.pairs)
    means = np.bincount(test.pairs.context, test.cost) / np.maximum(np.bincount(test.pairs.context), 1)
    error = test.cost - means[test.pairs.context] - found.relative
    assert 0.6 < np.sqrt(np.mean((error / found.deviation) ** 2)) < 1.6


def test_metamodel_size_is_bounded() -> None:
    model = MetaModel(boosting_rounds=20, tree_count=10, max_rows=100, max_leaves=200).fit_dataset(DATASET)
    forests = [fit.model for fit in model.ensemble_._fits if isinstance(fit.model, ExtraTreesRegressor)]
    assert forests
    assert all(sum(tree.get_n_leaves() for tree in forest.estimators_) <= 200 for forest in forests)


def test_member_weights_sum_to_one() -> None:
    model = small_metamodel().fit_dataset(DATASET)
    assert model.weights_.sum() == pytest.approx(1.0)
    assert (model.weights_ > 0).all()


def test_text_embedding_uses_the_given_encoder() -> None:
    read: list[str] = []

    def encode(texts: object) -> np.ndarray:
        assert isinstance(texts, list)
        read.extend(texts)
        return np.array([[len(text), text.count("1")] for text in texts], dtype=np.float64)

    TextEmbedding(encode).fit_dataset(DATASET)
    assert "model m1, " in {text[:10] for text in read}
    assert any("input tokens" in text for text in read)
    assert "method a fp8 tp2" in read
