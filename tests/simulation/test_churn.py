"""No accepted job is lost, whoever comes and goes: each ends in the text of an undisturbed run."""

import pytest

from tests.simulation.churn import Churn, play


def check(churn: Churn) -> None:
    outcome = play(churn)
    assert not outcome.faults
    assert outcome.right > churn.duration_s / 4
    assert outcome.replays


@pytest.mark.parametrize("seed", range(4))
def test_no_job_is_lost_under_churn_every_second(seed: int) -> None:
    check(Churn(seed=seed, duration_s=40))


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(4, 308))
def test_no_job_is_lost_in_minutes_of_churn(seed: int) -> None:
    check(Churn(seed=seed, duration_s=120))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_no_job_is_lost_in_an_hour_of_churn() -> None:
    check(Churn(seed=308))
