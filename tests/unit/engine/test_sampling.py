"""Draws follow the distribution asked for, and are the same again for the same seed and position."""

import numpy as np
import numpy.typing as npt
import pytest

from node.engine.interface import EngineError
from node.engine.sampling import draw, uniform
from protocol.messages import Sampling

PROBABILITIES = np.array([0.02, 0.4, 0.08, 0.25, 0.05, 0.2])
Shares = npt.NDArray[np.float64]
LOGITS = np.log(PROBABILITIES).astype(np.float32)
DRAWS = 10_000


def shares(sampling: Sampling) -> Shares:
    """Return how often each token is drawn."""
    tokens = [draw(LOGITS, sampling, position) for position in range(DRAWS)]
    return np.asarray(np.bincount(tokens, minlength=len(PROBABILITIES)) / DRAWS)


def chi_square(observed: Shares, expected: Shares) -> float:
    kept = expected > 0
    assert observed[~kept].sum() == 0
    return float((DRAWS * (observed[kept] - expected[kept]) ** 2 / expected[kept]).sum())


def normalised(weights: Shares) -> Shares:
    return np.asarray(weights / weights.sum())


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(LOGITS, Sampling(max_tokens=1, top_p=0.1, seed=3), 5) == 1


# The bound is chi-square's 99.9 % quantile for five degrees of freedom; the seeds are fixed.
@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, PROBABILITIES),
        (0.5, normalised(PROBABILITIES**2)),
        (2.0, normalised(PROBABILITIES**0.5)),
    ],
)
def test_tokens_are_as_frequent_as_they_are_likely(temperature: float, expected: Shares) -> None:
    assert chi_square(shares(Sampling(max_tokens=1, temperature=temperature, seed=1)), expected) < 20.5


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, [1]), (0.41, [1, 3]), (0.8, [1, 3, 5]), (0.86, [1, 3, 5, 2])])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    expected = np.zeros_like(PROBABILITIES)
    expected[kept] = PROBABILITIES[kept]
    assert chi_square(shares(Sampling(max_tokens=1, temperature=1, top_p=top_p, seed=2)), normalised(expected)) < 20.5


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    numbers = {(seed, position): uniform(seed, position) for seed in (0, 1, -1, 2**63) for position in range(50)}
    again = {key: uniform(*key) for key in reversed(numbers)}
    assert again == numbers
    assert len(set(numbers.values())) == len(numbers)
    assert 0.4 < float(np.mean(list(numbers.values()))) < 0.6


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_no_temperature_overflows(temperature: float) -> None:
    logits = np.array([-1e30, 5, 4, -np.inf], dtype=np.float32)
    tokens = {draw(logits, Sampling(max_tokens=1, temperature=temperature), position) for position in range(50)}
    assert tokens == ({1} if temperature < 1 else {0, 1, 2})


def test_logits_that_are_no_numbers_are_an_error() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(EngineError, match="not finite"):
            draw(np.array([0, bad, 1], dtype=np.float32), Sampling(max_tokens=1), 0)
