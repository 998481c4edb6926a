"""Draws follow the distribution asked for, and are the same again for the same seed and position."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from node.engine.interface import EngineError
from node.engine.sampling import TokenCounts, draw, draw_and_verify, history_for, uniform
from node.engine.scoring import LEAST_LOGPROB, logprob_rows
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
    [(1.0, PROBABILITIES), (0.5, normalised(PROBABILITIES**2)), (2.0, normalised(PROBABILITIES**0.5))],
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


def test_non_finite_logits_are_an_error() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(EngineError, match="not finite"):
            draw(np.array([0, bad, 1], dtype=np.float32), Sampling(max_tokens=1), 0)


VOCABULARY = 400


def random_logits(number: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(number).normal(0, 4, VOCABULARY).astype(np.float32)


def told(sampling: Sampling, tokens: list[int]) -> TokenCounts | None:
    counts = history_for(sampling)
    if counts is not None:
        counts.reset(tokens)
    return counts


def by_transformers(logits: npt.NDArray[np.float32], sampling: Sampling, tokens: list[int]) -> Shares:
    """Return how likely each token is by transformers' processors, in vLLM's order."""
    ids, scores = torch.tensor([tokens]), torch.from_numpy(logits.copy())[None]
    processors: list[Any] = []
    if sampling.min_length:
        stops = torch.tensor(sampling.stop_tokens)
        processors.append(MinLengthLogitsProcessor(sampling.min_length, stops, device="cpu"))
    if sampling.logit_bias:
        bias: Any = [[[token], value] for token, value in sampling.logit_bias]
        processors.append(SequenceBiasLogitsProcessor(bias))
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    for processor in processors:
        scores = processor(ids, scores)
    # transformers has neither of these two: the OpenAI API's formula, as its documentation has it.
    text = tokens[sampling.prompt_length :]
    for token in set(text):
        scores[0, token] -= text.count(token) * sampling.frequency_penalty + sampling.presence_penalty
    processors = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    for processor in processors:
        scores = processor(ids, scores)
    return np.asarray(torch.softmax(scores[0].double(), 0).numpy())


@pytest.mark.parametrize(
    "way",
    [
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": VOCABULARY - 1},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 7, "top_p": 0.8, "min_p": 0.05},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.7},
        {"frequency_penalty": 0.9},
        {"presence_penalty": -1.1},
        {"frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.2},
        {"logit_bias": ((0, 7.5), (17, -100.0))},
        {"min_length": 25, "stop_tokens": (1, 5, 9)},
        {
            "top_k": 30,
            "top_p": 0.95,
            "min_p": 0.01,
            "repetition_penalty": 1.1,
            "frequency_penalty": -0.4,
            "logit_bias": ((3, 2.0),),
            "min_length": 25,
            "stop_tokens": (3, 4),
        },
    ],
)
def test_sampling_equals_transformers_logits_processors(way: dict[str, Any]) -> None:
    for number in range(8):
        rng = np.random.default_rng(100 + number)
        tokens = rng.integers(0, 40, 24).tolist()
        sampling = Sampling(max_tokens=1, temperature=1.3, seed=number, prompt_length=10, **way)
        logits = random_logits(number)
        # The stop tokens, and what is repeated, are the likeliest, so that it matters what becomes of them.
        logits[:12] += 6
        expected = by_transformers(logits, sampling, tokens)
        drawn = [draw(logits, replace(sampling, seed=seed), 24, told(sampling, tokens)) for seed in range(300)]
        assert expected[drawn].min() > 0, "what they take out is never drawn"
        greedy = draw(logits, replace(sampling, temperature=0.0), 24, told(sampling, tokens))
        assert greedy == int(expected.argmax())
        # The share of the likeliest, within five standard deviations.
        share = float(expected.max())
        assert abs(drawn.count(greedy) / 300 - share) <= 5 * (share * (1 - share) / 300) ** 0.5 + 1e-9


def test_of_equally_likely_tokens_top_k_keeps_the_first() -> None:
    logits = np.zeros(10, np.float32)
    for seed in range(50):
        assert draw(logits, Sampling(max_tokens=1, temperature=1, top_k=3, seed=seed), 0) < 3
        assert draw(logits, Sampling(max_tokens=1, temperature=1, top_k=1, seed=seed), 0) == 0


def test_where_only_stop_tokens_are_left_one_is_drawn() -> None:
    logits = np.array([-np.inf, 3, -np.inf, 1], np.float32)
    assert draw(logits, Sampling(max_tokens=1, stop_tokens=(1, 3, 900), min_length=9), 0) == 1
    assert draw(logits, Sampling(max_tokens=1, stop_tokens=(1, 900), min_length=9), 0) == 3
    assert draw(logits, Sampling(max_tokens=1, stop_tokens=(1, 900), min_length=9), 9) == 1


def test_penalties_apply_to_each_token_of_a_step() -> None:
    sampling = Sampling(max_tokens=1, presence_penalty=3.0, prompt_length=2)
    rows = np.tile(np.array([5, 4, 3, 2, -9], np.float32), (4, 1))
    assert draw_and_verify(rows, sampling, 2, (0, 1, 0), told(sampling, [0, 0])) == [0, 1, 2]
    assert draw_and_verify(rows, sampling, 2, (0, 1, 2), told(sampling, [0, 0])) == [0, 1, 2, 0]
    assert draw_and_verify(rows, sampling, 2, (3, 1, 2), told(sampling, [0, 0])) == [0]


def test_penalties_are_about_a_window_of_the_last_tokens() -> None:
    logits = np.array([5.0, 4.0, 3.0, 2.0], np.float32)
    penalised = Sampling(max_tokens=1, repetition_penalty=100.0, frequency_penalty=2.0, prompt_length=2)
    tokens = [0, 1, 2, 1]  # of which the first two are the prompt
    for window, drawn in ((0, 3), (1, 0), (2, 0), (4, 3), (99, 3)):
        sampling = replace(penalised, penalty_window=window)
        assert draw(logits, sampling, len(tokens), told(sampling, tokens)) == drawn
    text_alone = replace(penalised, repetition_penalty=1.0, frequency_penalty=4.0, penalty_window=4)
    assert draw(logits, text_alone, len(tokens), told(text_alone, tokens)) == 0, "not of the prompt"


def test_rewind_drops_drawn_tokens() -> None:
    sampling = Sampling(max_tokens=1, repetition_penalty=2.0, frequency_penalty=1.0, prompt_length=3)
    counts = told(sampling, [1, 2, 1])
    assert counts is not None
    for token in (4, 1, 4):
        counts.append(token)
    assert dict(zip(*(each.tolist() for each in counts.counts()), strict=True)) == {4: 2, 1: 1}
    counts.rewind(4)
    assert dict(zip(*(each.tolist() for each in counts.counts()), strict=True)) == {4: 1}
    counts.rewind(1)
    assert (counts.seen().tolist(), counts.counts()[0].tolist(), len(counts)) == ([1], [], 1)
    with pytest.raises(EngineError, match="only 1 of the 2 tokens"):
        draw(LOGITS, sampling, 2, counts)


def test_log_probabilities_are_those_of_the_model_whatever_is_drawn() -> None:
    sampling = Sampling(max_tokens=2, logprobs=3, temperature=1.0, logit_bias=((2, 100.0),))
    (row,) = logprob_rows(LOGITS[np.newaxis], [draw(LOGITS, sampling, 0)], 2)
    assert row[::2].tolist() == [2, 1, 3]
    assert np.allclose(np.exp(row[1::2]), PROBABILITIES[[2, 1, 3]])
    impossible = np.array([0.0, -np.inf, 0.0], np.float32)
    (row,) = logprob_rows(impossible[np.newaxis], [1], 2)
    assert row.tolist() == pytest.approx([1, LEAST_LOGPROB, 0, np.log(0.5), 2, np.log(0.5)])
    everything = logprob_rows(LOGITS[np.newaxis], [0], len(LOGITS))
    assert np.exp(everything[0, 3::2]).sum() == pytest.approx(1, abs=1e-5)
    with pytest.raises(EngineError, match="not finite"):
        logprob_rows(np.full((1, 3), np.nan, np.float32), [0], 0)
