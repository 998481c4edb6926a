"""A vote that contradicts what was measured has no weight, and one that goes beyond it keeps its own."""

import pytest

from protocol.consensus_values import VALUE_SCALE, Cell
from selector.consensus.reputation import NEWCOMER_WEIGHT
from selector.task import PORTFOLIO
from selector.voting import bound_weights, contradicts, scores, tally


def measured(*ratios: tuple[str, str, float]) -> dict[Cell, int]:
    return {Cell("two cores", workload, method): round(ratio * VALUE_SCALE) for workload, method, ratio in ratios}


SLOW_EVERYWHERE = measured(
    ("long", "slow", 1.0), ("short", "slow", 0.9), ("long", "fast", -1.0), ("short", "fast", 0.0)
)


def test_vote_for_a_method_that_was_slower_everywhere_has_no_weight() -> None:
    votes = [("liar", {"slow": -1.0, "fast": 0.0}), ("honest", {"slow": 1.0, "fast": 0.0}), ("newcomer", {})]
    weights = bound_weights(
        ["slow", "fast"],
        votes,
        {"liar": 5000, "honest": 3000},
        lambda peer: {} if peer == "newcomer" else SLOW_EVERYWHERE,
    )
    assert weights == (0, 3000, NEWCOMER_WEIGHT)


@pytest.mark.parametrize("lie", [[0.0, 1e9], [-1e9, 0.0], [-1e9, 1e9], [-5.0, 5.0]])
def test_one_of_three_ballots_does_not_decide_between_methods_that_clearly_differ(lie: list[float]) -> None:
    slow_and_fast = [0.0, -0.5]
    assert tally(["slow", "fast"], [slow_and_fast, lie, slow_and_fast]) == "fast"


def test_votes_count_up_to_a_limit_from_the_median() -> None:
    assert scores(["a"], [[0.0], [1e9], [0.0]])["a"] == pytest.approx(1 / 6)
    assert scores(["a"], [[0.0], [0.6], [0.1]])["a"] == pytest.approx((0 + 0.6 + 4 * 0.1) / 6)
    assert scores(["a"], [[5.0], [0.0]], [1, 3])["a"] == pytest.approx(0.0)


def test_vote_may_differ_where_workloads_do() -> None:
    depends = SLOW_EVERYWHERE | measured(("short", "slow", -0.5))
    assert not contradicts(depends, {"slow": -1.0, "fast": 0.0})


def test_one_workload_does_not_bind_a_vote() -> None:
    assert not contradicts(measured(("long", "slow", 1.0), ("long", "fast", -1.0)), {"slow": -1.0, "fast": 0.0})


def test_differences_within_the_tolerance_do_not_bind_a_vote() -> None:
    assert not contradicts(SLOW_EVERYWHERE, {"slow": -0.3, "fast": 0.0})


def test_readings_bind_votes_on_the_baseline() -> None:
    method = next(each for each in PORTFOLIO.values() if each != each.baseline)
    slower = measured(("long", method.name, 1.0), ("short", method.name, 1.0))
    assert contradicts(slower, {method.name: 0.0, method.baseline.name: 1.0})
    assert not contradicts(slower, {method.name: 1.0, method.baseline.name: 0.0})
