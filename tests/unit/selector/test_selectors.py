"""Conformance of all selectors, the meta-model and the baselines."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from selector.dataset import Dataset
from selector.estimator import NotApplicableError, Selector
from selector.evaluation.baselines import BASELINES, TextEmbedding
from selector.evaluation.certainty import certainty_of
from selector.evaluation.measures import outcomes, split
from selector.features import Familiarity
from selector.metamodel import MetaModel
from tests.unit.selector.measurements import made_up, out_of_fold_scores


def small_metamodel() -> MetaModel:
    return MetaModel(boosting_rounds=40)


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


def test_accepts_figures_missing_in_some_contexts(make: Callable[[], Selector]) -> None:
    """None is missing in training, as where it is of hardware left out that the figure is not known."""
    contexts = DATASET.pairs.contexts
    features = contexts.features.copy()
    for i, column in enumerate(["l_params", "l_bw", "kvgb"]):
        features[-1 - i, contexts.columns.index(column)] = np.nan
    holed = replace(DATASET, pairs=replace(DATASET.pairs, contexts=replace(contexts, features=features)))
    fitted = make().fit_dataset(holed.of_contexts(np.arange(len(contexts) - 3)))
    assert np.isfinite(fitted.predict(holed.pairs)).all()
    assert np.isfinite(make().fit_dataset(holed).predict(holed.pairs)).all()


def test_rule_is_the_single_best_in_contexts_without_its_figures() -> None:
    contexts = DATASET.pairs.contexts
    features = contexts.features.copy()
    features[:30, contexts.columns.index("l_bw")] = np.nan
    holed = replace(DATASET, pairs=replace(DATASET.pairs, contexts=replace(contexts, features=features)))
    rule, single_best = (BASELINES[name]().fit_dataset(holed) for name in ("rule", "single_best"))
    unknown, known = holed.of_contexts(np.arange(30)).pairs, holed.of_contexts(np.arange(30, 60)).pairs
    np.testing.assert_array_equal(rule.predict(unknown), single_best.predict(unknown))
    before = BASELINES["rule"]().fit_dataset(DATASET)
    np.testing.assert_allclose(rule.predict(known), before.predict(known))


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


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_intervals_cover_nine_of_ten_costs_on_hardware_left_out(noise: float) -> None:
    dataset = made_up(contexts=200, noise=noise)
    folds = split(dataset, "hardware")
    models = [MetaModel("hardware", boosting_rounds=40).fit_dataset(dataset.take(fold.train)) for fold in folds]
    found = [model.predict_all(dataset.pairs.take(fold.test)) for model, fold in zip(models, folds, strict=True)]
    certainty = certainty_of(dataset, folds, [each.relative for each in found], [each.deviation for each in found])
    assert certainty is not None
    assert 0.86 < certainty.interval_coverage < 0.96


def test_confident_choices_are_right_and_others_are_probed() -> None:
    dataset = made_up(contexts=160, noise=0.2)
    folds = split(dataset, "random")
    models = [small_metamodel().fit_dataset(dataset.take(fold.train)) for fold in folds]
    found = [model.predict_all(dataset.pairs.take(fold.test)) for model, fold in zip(models, folds, strict=True)]
    scores = [each.relative for each in found]
    certainty = certainty_of(dataset, folds, scores, [each.deviation for each in found])
    overall = outcomes(dataset, folds, scores).measures()
    assert certainty is not None
    assert certainty.within_5_percent_of_answered is not None
    assert overall.accuracy is not None
    assert overall.accuracy_within_5_percent is not None
    assert 0.2 < certainty.answered < 0.9
    assert certainty.accuracy_at_70_percent > overall.accuracy + 0.03
    assert certainty.within_5_percent_of_answered > overall.accuracy_within_5_percent + 0.03
    assert certainty.stated_confidence == pytest.approx(certainty.within_5_percent_of_answered, abs=0.1)


def test_metamodel_learns_from_a_bounded_number_of_rows() -> None:
    contexts = DATASET.take(MetaModel(max_rows=100)._sample(DATASET.pairs, 100)).pairs.context
    assert 90 <= len(contexts) <= 100
    assert (np.unique(contexts, return_counts=True)[1] == 5).all()  # whole ones


@pytest.mark.parametrize("column", ["l_isl", "l_bw"])  # the second is equal in all contexts of training
def test_a_context_is_familiar_unless_a_figure_is_beyond_those_seen(column: str) -> None:
    known = Familiarity().fit(DATASET.pairs)
    contexts = DATASET.pairs.contexts

    def familiar(change: float) -> set[float]:
        features = contexts.features.copy()
        features[:, contexts.columns.index(column)] += change
        return set(known.of(replace(DATASET.pairs, contexts=replace(contexts, features=features))).tolist())

    assert familiar(0.0) == {1.0}
    assert familiar(np.nan) == {1.0}
    assert familiar(20.0) == {0.0}


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


def test_jobs_without_comparison_do_not_make_predictions_certain() -> None:
    """Served jobs stand alone in their contexts: what is predicted of them, relative to these, is always right."""
    dataset = made_up(contexts=400, noise=0.3)
    first = np.unique(dataset.pairs.context, return_index=True)[1]
    alone = first[40:]
    compared = np.flatnonzero(dataset.pairs.context < 40)
    served = small_metamodel().fit_dataset(dataset.take(np.concatenate([compared, alone])))
    queries = dataset.of_contexts(np.arange(100, 140)).pairs
    assert np.median(served.deviation(queries)) > 0.1


def test_metamodel_learns_from_equal_contexts_with_hardly_any_second_method() -> None:
    dataset = made_up(contexts=12, per_context=1)
    pairs = dataset.pairs
    method = np.zeros(len(pairs), dtype=np.intp)
    method[-1] = 1
    features = np.repeat(pairs.contexts.features[:1], len(pairs.contexts), axis=0)
    equal = replace(pairs, method=method, contexts=replace(pairs.contexts, features=features))
    assert np.isfinite(MetaModel().fit(equal, dataset.cost).predict(equal)).all()
