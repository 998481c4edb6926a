"""Nothing is adopted that a trial did not confirm, and what trying costs stays bounded."""

import pytest

from selector.adoption import MISSED_RETRY_S, RETRY_S, Adoption, Budget
from selector.task import BASELINE

PLAIN = BASELINE.name
ALL = [PLAIN, "a", "b", "c"]
SURE = dict.fromkeys(ALL, 0.01)


def test_before_any_trial_the_default_is_in_use_and_nothing_else_is_accepted() -> None:
    adoption = Adoption()
    assert adoption.in_use("kind", ALL, "a") == "a"
    assert adoption.accepted("kind", ALL, ALL, "a") == {"a"}


@pytest.mark.parametrize(("offered", "accepted"), [([PLAIN, "b"], {PLAIN}), (["b", "c"], {"b", "c"}), ([], set())])
def test_where_the_method_in_use_is_not_on_offer_the_baseline_is_taken(offered: list[str], accepted: set[str]) -> None:
    assert Adoption().accepted("kind", ALL, offered, "a") == accepted


@pytest.mark.parametrize(
    ("ratios", "adopted"),
    [
        ([-1.0, -1.0, -1.0], "b"),
        ([-0.51, -0.51, -0.51], "a"),  # better, but not by the margin
        ([-3.0, -0.4, -0.4], "a"),  # by one round alone
        ([-0.4, -0.4, -0.4], "a"),
    ],
)
def test_a_candidate_is_adopted_where_it_was_better_by_a_margin_and_in_most_rounds(
    ratios: list[float], adopted: str
) -> None:
    adoption = Adoption()
    assert adoption.settle("kind", "a", {"a": [-0.5] * 3, "b": ratios}, 0.0) == adopted
    assert adoption.in_use("kind", ALL, "c") == adopted
    assert adoption.in_use("another kind", ALL, "c") == "c"


def test_what_a_job_does_not_admit_is_not_in_use_for_it() -> None:
    adoption = Adoption()
    adoption.settle("kind", "a", {"a": [-0.5] * 3, "b": [-1.0] * 3}, 0.0)
    assert adoption.in_use("kind", [PLAIN, "a"], "a") == "a"


def test_the_baseline_takes_the_place_of_what_is_worse_than_it() -> None:
    adoption = Adoption()
    assert adoption.settle("kind", "a", {"a": [0.2] * 3}, 0.0) == PLAIN


def test_what_lost_does_not_come_back_because_the_baseline_was_slow_that_day() -> None:
    adoption = Adoption()
    adoption.settle("kind", "a", {"a": [-1.0] * 3, "b": [-1.3] * 3}, 0.0)
    assert adoption.settle("kind", "b", {"b": [-0.9] * 3, "c": [-0.5] * 3}, 1.0) == "b"
    assert adoption.in_use("kind", ALL, PLAIN) == "b"
    assert adoption.accepted("kind", ALL, ALL, PLAIN) == {"b"}


def test_a_method_that_lost_is_not_tried_again_for_a_while() -> None:
    adoption = Adoption()
    expected = {PLAIN: 0.0, "a": -0.5, "b": -1.0, "c": -0.4}
    assert adoption.candidates("kind", ALL, "a", expected, SURE, 0.0) == ["b"]
    adoption.settle("kind", "a", {"a": [-0.5] * 3, "b": [-0.1] * 3}, 0.0)
    assert adoption.candidates("kind", ALL, "a", expected, SURE, 1.0) == []
    assert adoption.candidates("kind", ALL, "a", expected, SURE, RETRY_S + 1.0) == ["b"]


def test_a_method_that_could_not_be_had_is_not_tried_again_at_once_and_makes_room_for_others() -> None:
    adoption = Adoption()
    expected = {PLAIN: 0.0, "a": -0.5, "b": -1.0, "c": -0.7}
    adoption.miss("kind", {"b"}, 0.0)
    assert adoption.candidates("kind", ALL, "a", expected, SURE, 1.0) == ["c"]
    assert adoption.candidates("another kind", ALL, "a", expected, SURE, 1.0) == ["b", "c"]
    assert adoption.candidates("kind", ALL, "a", expected, SURE, MISSED_RETRY_S + 1.0) == ["b", "c"]
    assert "b" not in adoption.standings("kind")


def test_what_may_well_be_better_is_worth_a_trial_and_what_is_known_to_be_worse_is_not() -> None:
    expected = {PLAIN: 0.0, "a": -0.5, "b": -0.45, "c": -0.45}
    assert Adoption().candidates("kind", ALL, "a", expected, {**SURE, "b": 0.5}, 0.0) == ["b"]


def test_of_methods_that_do_the_same_to_a_task_one_is_tried() -> None:
    adoption = Adoption()
    expected = {PLAIN: 0.0, "a": -0.5, "b": -1.0, "c": -0.9}
    effects = {PLAIN: "nothing", "a": "something", "b": "more", "c": "more"}
    assert adoption.candidates("kind", ALL, "a", expected, SURE, 0.0, effects) == ["b"]
    adoption.settle("kind", "a", {"a": [-0.5] * 3, "b": [-0.1] * 3}, 0.0, effects)
    assert adoption.candidates("kind", ALL, "a", expected, SURE, 1.0, effects) == []
    elsewhere = {**effects, "b": "less"}  # what b did to the other task, c does to this one
    assert adoption.candidates("kind", ALL, "a", expected, SURE, 1.0, elsewhere) == []


def test_nothing_is_tried_while_the_method_in_use_is_not_on_offer() -> None:
    assert Adoption().candidates("kind", ALL, "a", {PLAIN: 0.0, "b": -9.0}, SURE, 0.0) == []


def test_so_many_kinds_are_remembered_and_no_more() -> None:
    adoption = Adoption()
    for number in range(2000):
        adoption.settle(str(number), "a", {"a": [-1.0] * 3}, 0.0)
    assert adoption.standings("1999")
    assert not adoption.standings("0")


def test_a_budget_grows_with_what_is_served_and_zero_is_none() -> None:
    budget = Budget(share=0.1, allowance_s=1.0)
    assert budget.left_s == 1.0
    budget.trial_s = 2.0
    assert budget.left_s < 0
    budget.served_s = 100.0
    assert budget.left_s == pytest.approx(9.0)
    assert not Budget(share=0.0, allowance_s=1.0).may_explore


def test_no_more_than_the_share_of_jobs_is_explored() -> None:
    budget = Budget(share=0.1, allowance_s=1e9)
    for _ in range(1000):
        budget.explored_jobs += budget.may_explore
        budget.jobs += 1
        assert budget.explored_jobs <= 0.1 * budget.jobs
    assert budget.explored_jobs == 100
