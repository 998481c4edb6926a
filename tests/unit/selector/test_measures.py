import numpy as np
import pytest

from selector.dataset import Contexts, Dataset, DatasetError, build_dataset
from selector.evaluation.baselines import BASELINES, SingleBest, VirtualBest
from selector.evaluation.certainty import certainty_of
from selector.evaluation.measures import Fold, macro_f1, outcomes, split
from tests.unit.selector.measurements import made_up, out_of_fold_scores


def contexts_of(count: int, models: list[str] | None = None, budgets: list[str] | None = None) -> Contexts:
    names = {"model": np.array(models or ["m"] * count), "hardware": np.array(["h"] * count)}
    if budgets:
        names["budget"] = np.array(budgets)
    return Contexts(tuple(map(str, range(count))), names, ("x",), np.zeros((count, 1)))


def by_hand() -> Dataset:
    """Training context 0: b is best. Test contexts: 1 (a 1, b 2), 2 (b 1, c 1.04), 3 (c alone: no choice)."""
    rows = [(0, "a", 2.0), (0, "b", 1.0), (0, "c", 8.0), (1, "a", 1.0), (1, "b", 2.0), (2, "b", 1.0), (2, "c", 1.04)]
    rows.append((3, "c", 5.0))
    return build_dataset(contexts_of(4), [(i, method, float(np.log(cost))) for i, method, cost in rows])


HAND_FOLD = Fold(np.arange(3), np.arange(3, 8))


def test_measures_match_a_calculation_by_hand() -> None:
    dataset = by_hand()
    # Chosen: b in 1, c in 2, c in 3.
    found = outcomes(dataset, [HAND_FOLD], [np.array([1.0, 0.0, 1.0, 0.0, 0.0])], default="a").measures()
    assert found.contexts == 2
    assert found.accuracy == 0
    assert found.accuracy_within_5_percent == pytest.approx(1 / 2)
    assert found.ratio_to_virtual_best == pytest.approx((0.5 + 1 / 1.04) / 2)
    regret = (np.log(2) + np.log(1.04)) / 2
    assert found.regret == pytest.approx(regret)
    # The single best is b: wrong in 1, right in 2.
    assert found.closed_gap == pytest.approx(1 - regret / (np.log(2) / 2))
    # The default is a; where it was not measured, the most widely measured, of which the first by name.
    assert found.mean_speedup == pytest.approx((1 / 2 + 1 / 1.04) / 2)
    # a: never chosen; b: best in 2, chosen in 1; c: chosen in 2.
    assert found.f1 == 0


def test_probes_take_the_best_of_the_candidates() -> None:
    dataset = by_hand()
    found = outcomes(dataset, [HAND_FOLD], [np.array([1.0, 0.0, 1.0, 0.0, 0.0])], probes=2)
    assert found.measures().accuracy == 1.0
    assert found.measures(more_than=1).contexts == 2
    empty = found.measures(more_than=2)
    assert (empty.contexts, empty.accuracy, empty.closed_gap) == (0, None, None)


def test_single_best_of_the_closed_gap_gets_no_probes() -> None:
    dataset = made_up()
    folds = split(dataset, "model")
    scores = out_of_fold_scores(dataset, folds, SingleBest)
    assert outcomes(dataset, folds, scores).measures().closed_gap == pytest.approx(0.0)
    gap = outcomes(dataset, folds, scores, probes=2).measures().closed_gap
    assert gap is not None
    assert gap > 0.1


@pytest.mark.parametrize("name", ["single_best", "lookup", "isac"])
def test_repeated_measurements_do_not_weigh_in_the_single_best(name: str) -> None:
    """Method a is best but in context 0, where it was measured a hundred times."""
    rows = [(i, method, cost) for i in range(10) for method, cost in (("a", float(i == 0)), ("b", 0.3 * (i > 0)))]
    dataset = build_dataset(contexts_of(10), [*rows, *[(0, "a", 1.0)] * 100])
    folds = [Fold(np.arange(10), np.arange(10, 20)), Fold(np.arange(10, 20), np.arange(10))]
    scores = out_of_fold_scores(dataset, folds, BASELINES[name])
    found = outcomes(dataset, folds, scores).measures()
    assert found.accuracy == pytest.approx(0.9)
    assert found.closed_gap == pytest.approx(0.0)


def test_context_with_a_single_method_is_no_covered_interval_nor_a_right_choice() -> None:
    dataset, wrong = by_hand(), np.array([1.0, 0.0, 1.0, 0.0, 0.0])
    certainty = certainty_of(dataset, [HAND_FOLD], [wrong], [np.full(5, 1e-3)])
    assert certainty is not None
    assert (certainty.interval_coverage, certainty.answered, certainty.accuracy_of_answered) == (0.0, 1.0, 0.0)
    alone = Fold(np.arange(7), np.array([7]))
    assert certainty_of(dataset, [alone], [np.zeros(1)], [np.ones(1)]) is None


def test_virtual_best_has_no_regret() -> None:
    dataset = made_up()
    folds = split(dataset, "random")
    oracle = VirtualBest().fit_dataset(dataset)
    found = outcomes(dataset, folds, [oracle.predict(dataset.pairs.take(fold.test)) for fold in folds]).measures()
    assert (found.accuracy, found.regret, found.closed_gap, found.f1) == (1.0, 0.0, 1.0, 1.0)


def test_equal_costs_leave_no_gap() -> None:
    dataset = build_dataset(contexts_of(2), [(0, "a", 1.0), (0, "b", 1.0), (1, "a", 1.0), (1, "b", 1.0)])
    found = outcomes(dataset, [Fold(np.arange(2), np.arange(2, 4))], [np.array([1.0, 0.0])]).measures()
    assert (found.accuracy, found.f1, found.closed_gap) == (1.0, 1.0, None)


@pytest.mark.parametrize("group", ["random", "model", "hardware"])
def test_folds_test_every_row_once_and_split_no_group(group: str) -> None:
    dataset = made_up(contexts=90)
    folds = split(dataset, group)
    tested = np.concatenate([fold.test for fold in folds])
    assert sorted(tested.tolist()) == list(range(len(dataset)))
    contexts = dataset.pairs.contexts
    labels = np.array(contexts.ids) if group == "random" else contexts.names[group]
    for fold in folds:
        train, test = (set(labels[dataset.pairs.context[rows]]) for rows in (fold.train, fold.test))
        assert not train & test
    assert len(folds) == {"random": 5, "model": 4, "hardware": 3}[group]


def test_contexts_that_differ_in_nothing_but_budget_stay_together() -> None:
    count = 40
    contexts = Contexts(
        tuple(map(str, range(count))),
        {"model": np.array(["m"] * count), "budget": np.array([str(i % 2) for i in range(count)])},
        ("x",),
        np.repeat(np.arange(count / 2), 2)[:, None],
    )
    dataset = build_dataset(contexts, [(i, method, 0.0) for i in range(count) for method in "ab"])
    for fold in split(dataset, "random"):
        train, test = (set((dataset.pairs.context[rows] // 2).tolist()) for rows in (fold.train, fold.test))
        assert not train & test


def test_contexts_of_which_only_the_ids_are_known_are_left_out_one_by_one() -> None:
    contexts = Contexts(tuple(map(str, range(20))), {}, (), np.zeros((20, 0)))
    dataset = build_dataset(contexts, [(i, method, 0.0) for i in range(20) for method in "ab"])
    assert [len(fold.test) for fold in split(dataset, "random")] == [8] * 5


def test_error_of_equal_contexts_says_so_and_what_was_left_out() -> None:
    dataset = build_dataset(contexts_of(20), [(i, "a", 0.0) for i in range(20)], notes=["left out 3 rows"])
    with pytest.raises(DatasetError, match=r"differ in nothing but their budget: .*; left out 3 rows"):
        split(dataset, "random")


def test_any_column_is_left_out_by_its_values() -> None:
    contexts = Contexts(
        tuple(map(str, range(12))),
        {"workload": np.array([f"w{i % 4}" for i in range(12)])},
        ("l_isl", "workload=w0"),
        np.column_stack([np.arange(12) % 3 + np.where(np.arange(12) % 3, 0.0, np.nan), np.arange(12) % 4 == 0]),
    )
    dataset = build_dataset(contexts, [(i, method, 0.0) for i in range(12) for method in "ab"])
    for group, groups in (("workload", 4), ("l_isl", 3)):
        folds = split(dataset, group)
        assert len(folds) == groups
        for fold in folds:
            assert len(np.unique(dataset.pairs.context[fold.test] % groups)) == 1
    with pytest.raises(DatasetError, match=r"no column 'engine' to leave out: use --group random, .*workload, l_isl$"):
        split(dataset, "engine")


def test_groups_are_merged_into_ten_folds() -> None:
    dataset = build_dataset(
        contexts_of(50, [f"m{i // 2}" for i in range(50)]), [(i, method, 0.0) for i in range(50) for method in "ab"]
    )
    assert len(split(dataset, "model")) == 10


def test_single_group_is_an_error() -> None:
    dataset = build_dataset(contexts_of(3), [(i, "a", 0.0) for i in range(3)])
    with pytest.raises(DatasetError, match="only one value of 'hardware'"):
        split(dataset, "hardware")
    contexts = Contexts(("0", "1"), {}, (), np.zeros((2, 0)))
    with pytest.raises(DatasetError, match="no column 'model'"):
        split(build_dataset(contexts, [(0, "a", 0.0), (1, "a", 0.0)]), "model")


def test_dataset_drops_infinite_costs_and_averages_repeats() -> None:
    dataset = build_dataset(
        contexts_of(2), [(0, "a", 1.0), (0, "a", 3.0), (0, "b", float("nan")), (1, "b", float("inf")), (1, "a", 0.0)]
    )
    assert dataset.cost.tolist() == [2.0, 0.0]
    assert dataset.weight.tolist() == [2.0, 1.0]
    assert len(dataset.notes) == 2
    with pytest.raises(DatasetError):
        build_dataset(contexts_of(1), [(0, "a", float("nan"))])


def test_costs_that_are_no_logarithms_are_left_out_with_a_question() -> None:
    rows = [(0, "a", 1e300), (0, "b", 1e4), (1, "a", -2e4), (1, "b", 0.0)]
    dataset = build_dataset(contexts_of(2), rows)
    assert dataset.cost.tolist() == [1e4, 0.0]
    (note,) = dataset.notes
    assert note.startswith("left out 2 rows")
    assert "is it the natural logarithm?" in note


@pytest.mark.filterwarnings("error")
def test_speedup_beyond_all_numbers_is_undefined() -> None:
    dataset = build_dataset(contexts_of(2), [(0, "a", 800.0), (0, "b", 0.0), (1, "a", 800.0), (1, "b", 0.0)])
    found = outcomes(dataset, [Fold(np.arange(2), np.arange(2, 4))], [np.array([1.0, 0.0])], default="a").measures()
    assert (found.accuracy, found.mean_speedup, found.regret) == (1.0, None, 0.0)


def test_macro_f1_is_the_mean_over_methods() -> None:
    assert macro_f1(np.array([0, 0, 3]), np.array([0, 3, 3])) == pytest.approx(2 / 3)
