"""Only confirmed methods are adopted, and the cost of exploration is bounded."""

import random
from collections.abc import Mapping

import pytest

from selector.adoption import (
    MAX_ROUNDS,
    RETRY_S,
    UNAVAILABLE_RETRY_S,
    Adoption,
    Candidates,
    ExplorationAllowance,
    is_decided,
)
from selector.confidence import MIN_CONFIDENCE
from selector.heuristic import CostEstimate, CostTable
from selector.task import BASELINE, parse_method

PLAIN = BASELINE.name
ALL = [PLAIN, "a", "b", "c"]


def costs(expected: Mapping[str, float], **deviations: float) -> CostTable:
    """Return predicted costs, all but certain unless a standard deviation is given."""
    return {name: CostEstimate(cost, deviations.get(name, 0.01)) for name, cost in expected.items()}


def test_only_the_default_is_accepted_before_any_trial() -> None:
    adoption = Adoption()
    assert adoption.in_use("bucket", ALL, "a") == "a"
    assert adoption.accepted("bucket", ALL, ALL, "a") == {"a"}


@pytest.mark.parametrize(("offered", "accepted"), [([PLAIN, "b"], {PLAIN}), (["b", "c"], {"b", "c"}), ([], set())])
def test_baseline_replaces_a_method_in_use_that_is_not_offered(offered: list[str], accepted: set[str]) -> None:
    assert Adoption().accepted("bucket", ALL, offered, "a") == accepted


@pytest.mark.parametrize(
    ("ratios", "adopted"),
    [
        ([-1.0, -1.0, -1.0], "b"),
        ([-0.51, -0.51, -0.51], "a"),  # better, but not by the margin
        ([-3.0, -0.4, -0.4], "a"),  # by one round alone
        ([-0.4, -0.4, -0.4], "a"),
        ([-1.0, -0.7, -0.4], "a"),  # it may be the noise
        ([-1.0, -0.9, -0.8], "b"),
    ],
)
def test_candidate_is_adopted_if_better_by_margin_and_noise(ratios: list[float], adopted: str) -> None:
    adoption = Adoption()
    assert adoption.record_trial("bucket", "a", {"a": [-0.5] * 3, "b": ratios}, 0.0) == adopted
    assert adoption.in_use("bucket", ALL, "c") == adopted
    assert adoption.accepted("bucket", ALL, ALL, "c") == {adopted}  # a loser is not in use as a tie either
    assert adoption.in_use("another bucket", ALL, "c") == "c"


def adopted_share(log_gain: float, noise: float, trials: int = 4000) -> float:
    """Return how often a candidate is adopted that costs e^log_gain times as much, in trials with noise."""
    rng, adopted = random.Random(1), 0
    for _ in range(trials):
        ratios: dict[str, list[float]] = {"a": [], "b": []}
        while len(ratios["a"]) < 3 or not is_decided("a", ratios):
            ratios["a"].append(rng.gauss(-5.0, noise))
            ratios["b"].append(rng.gauss(log_gain - 5.0, noise))
        assert len(ratios["a"]) <= MAX_ROUNDS
        adopted += Adoption().record_trial("bucket", "a", {"a": ratios["a"], "b": ratios["b"]}, 0.0) == "b"
    return adopted / trials


def test_error_of_a_trial_is_as_stated_and_clear_gains_are_found() -> None:
    assert adopted_share(0.1, 0.2) < 0.03  # worse by a tenth, under 20 % noise
    assert adopted_share(0.0, 0.2) < 0.06
    assert adopted_share(-0.3, 0.05) > 0.98
    assert adopted_share(-0.7, 0.2) > 0.95


def test_clear_trial_ends_after_three_rounds() -> None:
    assert not is_decided("a", {"a": [0.0] * 2, "b": [-1.0] * 2})
    assert is_decided("a", {"a": [0.0] * 3, "b": [-1.0, -0.9, -0.95]})
    assert is_decided("a", {"a": [0.0] * 3, "b": [0.5, 0.4, 0.6]})
    assert not is_decided("a", {"a": [0.0] * 3, "b": [-0.4, -0.1, -0.3]})
    assert is_decided("a", {"a": [0.0] * MAX_ROUNDS, "b": [-0.4, 0.3] * (MAX_ROUNDS // 2)})


def test_methods_of_gguf_packages_are_tried_against_their_own_baseline() -> None:
    adoption, plain = Adoption(), parse_method("baseline", "gguf").name
    cached, chunked = (parse_method(text, "gguf").name for text in ("prefix_cache=on", "prefill_chunk=128"))
    admitted = [plain, cached, chunked]
    expected = costs({plain: 0.0, cached: -0.5, chunked: -0.4})
    assert adoption.accepted("bucket", admitted, [plain, chunked], cached) == {plain}
    assert adoption.candidates("bucket", admitted, plain, expected, 0.0).names == (cached, chunked)
    assert adoption.record_trial("bucket", cached, {cached: [0.3] * 3}, 0.0) == plain
    assert adoption.trials("bucket").keys() == {plain, cached}


def test_method_in_use_is_one_that_the_job_admits() -> None:
    adoption = Adoption()
    adoption.record_trial("bucket", "a", {"a": [-0.5] * 3, "b": [-1.0] * 3}, 0.0)
    assert adoption.in_use("bucket", [PLAIN, "a"], "a") == "a"


def test_baseline_replaces_a_worse_method() -> None:
    adoption = Adoption()
    assert adoption.record_trial("bucket", "a", {"a": [0.2] * 3}, 0.0) == PLAIN


def test_slow_baseline_does_not_revive_a_method_that_lost() -> None:
    adoption = Adoption()
    adoption.record_trial("bucket", "a", {"a": [-1.0] * 3, "b": [-1.3] * 3}, 0.0)
    assert adoption.record_trial("bucket", "b", {"b": [-0.9] * 3, "c": [-0.5] * 3}, 1.0) == "b"
    assert adoption.in_use("bucket", ALL, PLAIN) == "b"
    assert adoption.accepted("bucket", ALL, ALL, PLAIN) == {"b"}


def test_method_that_lost_is_retried_after_a_pause() -> None:
    adoption = Adoption()
    expected = costs({PLAIN: 0.0, "a": -0.5, "b": -1.0, "c": -0.4})
    assert adoption.candidates("bucket", ALL, "a", expected, 0.0).names == ("b",)
    adoption.record_trial("bucket", "a", {"a": [-0.5] * 3, "b": [-0.1] * 3}, 0.0)
    assert adoption.candidates("bucket", ALL, "a", expected, 1.0).names == ()
    assert adoption.candidates("bucket", ALL, "a", expected, RETRY_S + 1.0).names == ("b",)


def test_unavailable_method_is_retried_after_a_pause() -> None:
    adoption = Adoption()
    expected = costs({PLAIN: 0.0, "a": -0.5, "b": -1.0, "c": -0.7})
    adoption.record_unavailable("bucket", {"b"}, 0.0)
    assert adoption.candidates("bucket", ALL, "a", expected, 1.0).names == ("c",)
    assert adoption.candidates("another bucket", ALL, "a", expected, 1.0).names == ("b", "c")
    assert adoption.candidates("bucket", ALL, "a", expected, UNAVAILABLE_RETRY_S + 1.0).names == ("b", "c")
    assert "b" not in adoption.trials("bucket")


@pytest.mark.parametrize(("deviation", "probed"), [(0.01, ()), (0.1, ()), (0.4, ("b", "c"))])
def test_two_best_are_probed_where_the_choice_is_not_confident(deviation: float, probed: tuple[str, ...]) -> None:
    expected = {PLAIN: 0.0, "a": -0.5, "b": -0.4, "c": -0.35, "d": -0.3}
    found = Adoption().candidates("bucket", [*ALL, "d"], "a", costs(expected, **dict.fromkeys("abcd", deviation)), 0.0)
    assert found.names == probed
    assert found.confidence is not None
    assert (found.confidence < MIN_CONFIDENCE) == bool(probed)


def test_confidence_is_in_what_was_not_tried() -> None:
    adoption, expected = Adoption(), costs({PLAIN: 0.0, "a": -0.5, "b": -0.5}, b=0.3)
    doubted = adoption.candidates("bucket", ALL, "a", expected, 0.0)
    adoption.record_trial("bucket", "a", {"a": [-0.5] * 3, "b": [-0.1] * 3}, 0.0)
    settled = adoption.candidates("bucket", ALL, "a", expected, 1.0)
    assert doubted.confidence is not None
    assert doubted.confidence < MIN_CONFIDENCE
    assert settled.confidence == 1.0


def test_confidence_in_a_method_that_is_not_offered_is_unknown() -> None:
    assert Adoption().candidates("bucket", ALL, "a", costs({PLAIN: 0.0, "b": -1.0}), 0.0) == Candidates(None)


def test_one_of_equivalent_methods_is_tried() -> None:
    adoption = Adoption()
    expected = costs({PLAIN: 0.0, "a": -0.5, "b": -1.0, "c": -0.9})
    effects = {PLAIN: "nothing", "a": "something", "b": "more", "c": "more"}
    assert adoption.candidates("bucket", ALL, "a", expected, 0.0, effects).names == ("b",)
    adoption.record_trial("bucket", "a", {"a": [-0.5] * 3, "b": [-0.1] * 3}, 0.0, effects)
    assert adoption.candidates("bucket", ALL, "a", expected, 1.0, effects).names == ()
    elsewhere = {**effects, "b": "less"}  # what b did to the other task, c does to this one
    assert adoption.candidates("bucket", ALL, "a", expected, 1.0, elsewhere).names == ()


def test_no_candidates_while_the_method_in_use_is_not_offered() -> None:
    assert Adoption().candidates("bucket", ALL, "a", costs({PLAIN: 0.0, "b": -9.0}), 0.0).names == ()


def test_oldest_buckets_are_evicted() -> None:
    adoption = Adoption()
    for number in range(2000):
        adoption.record_trial(str(number), "a", {"a": [-1.0] * 3}, 0.0)
    assert adoption.trials("1999")
    assert not adoption.trials("0")


def test_allowance_grows_with_served_time() -> None:
    allowance = ExplorationAllowance(share=0.1, initial_s=1.0)
    assert allowance.left_s == 1.0
    allowance.trial_s = 2.0
    assert allowance.left_s < 0
    allowance.served_s = 100.0
    assert allowance.left_s == pytest.approx(9.0)
    assert not ExplorationAllowance(share=0.0, initial_s=1.0).may_explore


def test_explored_jobs_stay_within_the_share() -> None:
    allowance = ExplorationAllowance(share=0.1, initial_s=1e9)
    for _ in range(1000):
        allowance.explored_jobs += allowance.may_explore
        allowance.jobs += 1
        assert allowance.explored_jobs <= 0.1 * allowance.jobs
    assert allowance.explored_jobs == 100
