"""Draws tokens from logits, the same ones again for the same seed and position.

The random numbers come from a counter-based generator (Philox) keyed by the seed and counted by position: there is no
state that a replay on another peer would have to bring along.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from node.engine.interface import BadRows
from protocol.messages import Sampling

Logits = npt.NDArray[np.float32]
"""Shape (vocabulary,)."""

Rows = npt.NDArray[np.float32]
"""Shape (rows, vocabulary)."""

_KEY_BITS = 64


def draw(logits: Logits, sampling: Sampling, position: int) -> int:
    """Return the token that takes absolute `position`. Raises BadRows for logits that are no numbers."""
    best = int(np.argmax(logits))
    if not np.isfinite(logits[best]):
        raise BadRows("the model made no sense of its input: its logits are not finite")
    if sampling.temperature <= 0:
        return best
    # Relative to the best, so that no temperature can overflow.
    weights = np.exp((logits.astype(np.float64) - float(logits[best])) / sampling.temperature)
    number = uniform(sampling.seed, position)
    if sampling.top_p >= 1:
        return _inverse(weights, number)
    # The smallest set of likely tokens with at least top_p of the whole; equal ones in the order of their ids.
    order = np.argsort(-weights, kind="stable")
    cumulated = np.cumsum(weights[order])
    kept = order[: int(np.searchsorted(cumulated, sampling.top_p * cumulated[-1])) + 1]
    return int(kept[_inverse(weights[kept], number)])


def draw_until_wrong(rows: Rows, sampling: Sampling, position: int, drafts: Sequence[int]) -> list[int]:
    """Return the tokens drawn from rows of logits, the first of which takes absolute `position`.

    `drafts`: guesses of the tokens that all rows but the last yield, or nothing. It ends with the first token that was
    guessed wrong: later rows follow from the guess. As a draw depends on seed and position alone, the text is the same
    as without guesses.
    """
    tokens: list[int] = []
    for number, logits in enumerate(rows):
        tokens.append(draw(logits, sampling, position + number))
        if number < len(drafts) and tokens[-1] != drafts[number]:
            break
    return tokens


def uniform(seed: int, position: int) -> float:
    """Return a number from 0 up to but not including 1 that depends on seed and position alone."""
    bits = np.random.Philox(key=seed % (1 << _KEY_BITS), counter=position)
    return float(np.random.Generator(bits).random())


def _inverse(weights: npt.NDArray[np.float64], number: float) -> int:
    """Return the index whose share of the cumulated weights holds `number`."""
    cumulated = np.cumsum(weights)
    index = int(np.searchsorted(cumulated, number * cumulated[-1], side="right"))
    return min(index, len(weights) - 1)
