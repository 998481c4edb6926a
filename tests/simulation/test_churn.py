"""No accepted job is lost, whoever comes and goes: each ends in the text of an undisturbed run."""

import pytest

from tests.simulation.churn import Churn, play


def replays(churn: Churn) -> int:
    """Return how often a job went on on another route."""
    outcome = play(churn)
    assert not outcome.faults
    assert outcome.right > churn.duration_s / 4
    return outcome.replays


def test_no_job_is_lost_under_churn_every_second() -> None:
    assert sum(replays(Churn(seed=seed, duration_s=40)) for seed in range(4)) > 4, "in one there may be none by chance"


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(4, 308))
def test_no_job_is_lost_in_minutes_of_churn(seed: int) -> None:
    assert replays(Churn(seed=seed, duration_s=120))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_no_job_is_lost_in_an_hour_of_churn() -> None:
    assert replays(Churn(seed=308))
