"""Scores a prompt: the log probability of each of its tokens, from logits of all rows.

Logits of a prompt are a thousand times its size, so that they are computed and reduced a few megabytes at a time.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from node.engine.interface import EngineError

LEAST_LOGPROB: Final = -9999.0
"""Of a token that is as good as impossible, as in the OpenAI API."""

LOGIT_BYTES: Final = 32 << 20
"""Limit of the logits that are in memory at a time."""

Floats = npt.NDArray[np.float32]


class Piece(NamedTuple):
    """Rows `start` to `end` of the part with this number."""

    part: int
    start: int
    end: int


class Scored(NamedTuple):
    """What a pass over rows of a prompt gives.

    `scores`: rows of `logprob_rows`, one for each row behind which a token of the prompt follows. `logits`: of the
    trailing rows behind which a token is drawn.
    """

    scores: Floats
    logits: Floats


def scored_pieces(lengths: Sequence[int], vocabulary_size: int) -> Iterator[list[Piece]]:
    """Yield passes over parts with so many rows, each of which has few enough for its logits.

    A pass has one piece of a part at most; the pieces of a part follow one another.
    """
    limit = max(1, LOGIT_BYTES // (4 * vocabulary_size))
    pieces: list[Piece] = []
    room = limit
    for part, length in enumerate(lengths):
        start = 0
        while start < length:
            end = min(length, start + room)
            pieces.append(Piece(part, start, end))
            room -= end - start
            start = end
            if not room:
                yield pieces
                pieces, room = [], limit
    if pieces:
        yield pieces


def logprob_rows(logits: Floats, tokens: Sequence[int], count: int) -> Floats:
    """Return a row for each token, of the logits before it: the token, its log probability, and `count` likeliest ones.

    Probabilities are the model's own, before anything adjusts the logits; see docs/protocol.md, Log probabilities.
    Raises EngineError for logits that are not finite.
    """
    found = np.empty((len(tokens), 2 + 2 * count), np.float32)
    for row, scores, token in zip(found, logits, tokens, strict=False):
        best = scores.max()
        if not np.isfinite(best):
            raise EngineError("the logits are not finite: the model cannot process this input")
        total = float(np.exp(scores - best).sum(dtype=np.float64))
        chosen = [token, *largest(scores, count)] if count else [token]
        row[::2] = chosen
        row[1::2] = np.clip(scores[chosen].astype(np.float64) - float(best) - np.log(total), LEAST_LOGPROB, 0.0)
    return found


def largest(values: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.intp]:
    """Return the indices of the largest values, the largest first, of equal ones those with the smallest index."""
    count = min(count, len(values))
    candidates = np.flatnonzero(values >= np.partition(values, len(values) - count)[len(values) - count])
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]
