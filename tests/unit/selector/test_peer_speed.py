"""Told speeds count as hints within bounds; what jobs measured replaces them."""

import random

import pytest

from selector.peer_speed import (
    MAX_MEASURED,
    PROVEN_JOBS,
    UNKNOWN_BLOCK_S,
    UNTESTED_FACTOR,
    Claim,
    Exploration,
    Measurements,
    Share,
    judge,
    least_block_s,
)

NOTHING = Measurements(), "m", "own"
"""Nothing was measured yet."""


def measured(**seconds: float) -> Measurements:
    """Peers that so many jobs have measured as prove their speed, one block each."""
    known = Measurements()
    for peer, block_s in seconds.items():
        for _ in range(PROVEN_JOBS):
            known.observe("m", [Share(peer, 1)], block_s)
    return known


def test_one_stage_alone_is_measured_at_once() -> None:
    known = Measurements()
    known.observe("m", [Share("a", 10)], 0.5)
    assert known.seconds("a", "m") == pytest.approx(0.05, rel=0.15)
    assert known.seconds("a", "other model") is None
    assert known.jobs("a", "m") == 1


def test_stage_that_hides_its_time_is_measured_over_several_routes() -> None:
    """Three honest peers of 1 ms a block, and one that takes 20 and says it took none."""
    known = Measurements()
    true_s = {"a": 0.001, "b": 0.001, "c": 0.001, "liar": 0.02}
    rng = random.Random(1)
    for _ in range(40):
        route = rng.sample(sorted(true_s), 2)
        took_s = sum(10 * true_s[peer] for peer in route)
        shares = [Share(peer, 10, 0.0 if peer == "liar" else 10 * true_s[peer]) for peer in route]
        known.observe("m", shares, took_s)
    assert known.seconds("liar", "m") == pytest.approx(0.02, rel=0.2)
    assert all((known.seconds(peer, "m") or 1) < 0.004 for peer in "abc")


def test_an_estimate_follows_a_peer_that_becomes_slower() -> None:
    known = measured(a=0.001)
    for _ in range(30):
        known.observe("m", [Share("a", 1)], 0.01)
    assert known.seconds("a", "m") == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_invalid_times_are_ignored(seconds: float) -> None:
    known = Measurements()
    known.observe("m", [Share("a", 1)], seconds)
    assert known.jobs("a", "m") == 0


def test_measurements_are_bounded() -> None:
    known = Measurements()
    for number in range(MAX_MEASURED + 10):
        known.observe("m", [Share(str(number), 1)], 1.0)
    assert known.jobs("9", "m") == 0
    assert known.jobs("10", "m") == 1


def test_claimed_speed_far_beyond_measurements_is_a_promise() -> None:
    known = measured(a=0.002)
    claims = [Claim("a", 1e-9), Claim("liar", 1e-9), Claim("plain", 0.0019), Claim("slow", 0.01), Claim("mute", 0.0)]
    honest, liar, plain, slow, mute = judge(claims, known, "m", "own")
    assert not any(each.is_promise for each in (honest, plain, slow, mute))
    assert honest.block_s == pytest.approx(0.002, rel=0.1)
    assert liar.is_promise
    assert liar.block_s == pytest.approx(UNTESTED_FACTOR * honest.block_s)
    assert liar.promised_s == 1e-9
    assert plain.block_s == pytest.approx(UNTESTED_FACTOR * honest.block_s)
    assert (slow.block_s, mute.block_s) == (0.01, UNKNOWN_BLOCK_S)


def test_highest_claim_does_not_set_the_reference() -> None:
    for told in ([0.0, 1e-9], [0.002, 1e-9], [0.002, 0.003, 1e-9]):
        *honest, liar = judge([Claim(str(n), s) for n, s in enumerate(told)], Measurements(), "m", "own")
        assert liar.is_promise
        assert not any(each.is_promise for each in honest)
        assert liar.block_s >= min(each.block_s for each in honest)


def test_own_claim_counts_as_measured() -> None:
    own, liar = judge([Claim("own", 0.004), Claim("liar", 1e-9)], Measurements(), "m", "own")
    assert (own.block_s, own.is_promise) == (0.004, False)
    assert liar.is_promise
    assert liar.block_s > own.block_s


def test_measured_speed_counts_from_the_first_job_if_plausible() -> None:
    known = measured(a=0.01)
    known.observe("m", [Share("faster", 1)], 0.003)
    known.observe("m", [Share("magic", 1)], 0.00001)
    faster, magic = judge([Claim("faster", 0.0), Claim("magic", 0.0)], known, "m", "own")
    assert not faster.is_promise
    assert faster.block_s == pytest.approx(0.003, rel=0.15)
    assert magic.is_promise
    for _ in range(PROVEN_JOBS - 1):
        known.observe("m", [Share("magic", 1)], 0.00001)
    (magic,) = judge([Claim("magic", 0.0)], known, "m", "own")
    assert (magic.is_promise, magic.block_s < 0.0001) == (False, True)


def test_hardware_bounds_a_claimed_speed() -> None:
    least_s = least_block_s(64e6, 20e9)
    assert least_s == pytest.approx(1e-4)
    assert least_block_s(64e6, 1e30) == least_block_s(64e6, None) > 1e-7, "and what is said of it is bounded as well"
    (speed,) = judge([Claim("a", 1e-9, least_s)], Measurements(), "m", "own")
    assert speed.promised_s == least_s


def test_one_job_in_ten_explores_a_promise_deterministically() -> None:
    def tries(seed: int) -> list[str | None]:
        exploration = Exploration(random.Random(seed))
        result: list[str | None] = []
        for _ in range(100):
            result.append(exploration.draw({"a", "b", "c"}))
            if result[-1] is not None:
                exploration.spend()
        return result

    tried = tries(3)
    assert all(sum(each is not None for each in tried[: n + 1]) <= (n + 1) / 10 for n in range(100))
    assert sum(each is not None for each in tried) == 10
    assert set(tried) == {None, "a", "b", "c"}
    assert tried == tries(3)


def test_jobs_without_promises_accrue_no_exploration() -> None:
    exploration = Exploration(random.Random(1))
    assert all(exploration.draw(()) is None for _ in range(1000))
    assert exploration.draw({"a"}) is None


def test_the_reference_follows_what_is_measured() -> None:
    known = Measurements()
    assert known.reference_s("m") is None
    known.observe("m", [Share("a", 1)], 0.01)
    assert known.reference_s("m") == pytest.approx(0.01, rel=0.15)
    assert known.reference_s("other model") is None
    known.observe("m", [Share("b", 1)], 0.002)
    assert known.reference_s("m") == pytest.approx(0.002, rel=0.15)


@pytest.mark.parametrize("liars", [1, 2, 5])
def test_many_high_claims_do_not_set_the_reference(liars: int) -> None:
    honest, *lying = judge([Claim("honest", 0.002), *(Claim(f"liar{n}", 1e-9) for n in range(liars))], *NOTHING)
    assert not honest.is_promise
    assert all(each.is_promise for each in lying)
    plausible, _, _ = judge([Claim("fast", 2e-4), Claim("a", 1e-9), Claim("b", 1e-9)], *NOTHING)
    assert not plausible.is_promise
