"""Samples tokens from logits, reproducibly for the same seed and position.

The random numbers come from a counter-based generator (Philox) keyed by the seed and counted by position: there is no
state that a replay on another peer would have to restore. Penalties depend on the text so far, which a replay has, too:
`TokenCounts` keeps it by position.

The order of operations is vLLM's:

1. `logit_bias` is added;
2. `repetition_penalty`: logits of tokens of prompt and text are divided by it where positive, else multiplied;
3. `frequency_penalty` times a token's count in the text, and `presence_penalty` where it is in it, are taken off; with
   a `penalty_window` 2. and 3. are about that many tokens before the position;
4. tokens that a JSON Schema does not admit are masked, stop tokens also before the JSON, in reasoning, and while the
   text is shorter than `min_length`;
5. temperature 0 takes the likeliest token (greedy); else logits are divided by it;
6. `min_p` keeps the tokens at least so many times as likely as the likeliest;
7. `top_k` keeps the likeliest k, of equal ones those with the smallest ids;
8. `top_p` keeps the fewest of the likeliest that have this share of what is left.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from node.engine.interface import BadRequest, EngineError
from protocol.messages import Sampling

Logits = npt.NDArray[np.float32]
"""Shape (vocabulary,)."""

Scores = npt.NDArray[np.float64]
"""Logits after all that changes them; shape (vocabulary,)."""


class TokenCounts:
    """The tokens of one session by position, and how often each occurs, for penalties.

    The first `prompt_length` tokens are the prompt. A rewind undoes the counts behind it, so rejected drafts leave no
    trace.
    """

    def __init__(self, prompt_length: int) -> None:
        self._prompt_length = prompt_length
        self._tokens = array("i")
        self._seen: Counter[int] = Counter()
        self._counts: Counter[int] = Counter()
        """Of the text alone."""

    def __len__(self) -> int:
        return len(self._tokens)

    def reset(self, tokens: Iterable[int]) -> None:
        """Replace all tokens by these, the prompt first."""
        self._tokens = array("i", tokens)
        self._seen = Counter(self._tokens)
        self._counts = Counter(self._tokens[self._prompt_length :])

    def append(self, token: int) -> None:
        """Add the token of the next position."""
        if len(self._tokens) >= self._prompt_length:
            self._counts[token] += 1
        self._seen[token] += 1
        self._tokens.append(token)

    def rewind(self, length: int) -> None:
        """Drop the tokens from position `length` on; raise EngineError if there are fewer before it."""
        if len(self._tokens) < length:
            raise EngineError(f"only {len(self._tokens)} of the {length} tokens that penalties depend on are known")
        while len(self._tokens) > length:
            token = self._tokens.pop()
            for counts in (self._seen, self._counts) if len(self._tokens) >= self._prompt_length else (self._seen,):
                counts[token] -= 1
                if not counts[token]:
                    del counts[token]

    def text(self) -> Sequence[int]:
        """Return the tokens of the text."""
        return self._tokens[self._prompt_length :]

    def following(self, position: int, rows: int) -> Sequence[int]:
        """Return the tokens that follow rows from a position on. Raises EngineError where some are not known."""
        found = self._tokens[position + 1 : position + 1 + rows]
        if len(found) < rows:
            raise EngineError(f"only {len(self._tokens)} tokens of the prompt that is scored are known")
        return found

    def seen(self, window: int = 0) -> npt.NDArray[np.int64]:
        """Return the tokens that occur, each once; `window`: among the last ones, 0 for all."""
        if 0 < window < len(self._tokens):
            return np.unique(np.array(self._tokens[-window:], np.int64))
        return np.fromiter(self._seen, np.int64, len(self._seen))

    def counts(self, window: int = 0) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the tokens of the text, each once, and how often each occurs; `window`: as above."""
        if 0 < window < len(self._tokens) - self._prompt_length:
            return np.unique(np.array(self._tokens[-window:], np.int64), return_counts=True)
        size = len(self._counts)
        return np.fromiter(self._counts, np.int64, size), np.fromiter(self._counts.values(), np.int64, size)


def history_for(sampling: Sampling | None) -> TokenCounts | None:
    """Return an empty history where one is needed."""
    return TokenCounts(sampling.prompt_length) if sampling is not None and sampling.needs_history else None


class TextConstraint(Protocol):
    """What tokens a text admits; see `node.engine.constraint`."""

    def allowed(self, text: Sequence[int]) -> tuple[npt.NDArray[np.bool_], bool]:
        """Return which tokens may follow those of a text, and whether it may end there. Raises EngineError."""


def draw(
    logits: Logits,
    sampling: Sampling,
    position: int,
    history: TokenCounts | None = None,
    constraint: TextConstraint | None = None,
) -> int:
    """Return the token that takes absolute `position`, and add it to the history, which a constraint needs.

    Raises EngineError for logits that are not finite, and where the history does not reach up to the position.
    """
    best = int(np.argmax(logits))
    if not np.isfinite(logits[best]):
        raise EngineError("the logits are not finite: the model cannot process this input")
    if sampling.temperature <= 0 and history is None and not sampling.logit_bias and position >= sampling.min_length:
        return best  # nothing adjusts the logits: decoding greedily must not pay for a copy of them
    if history is not None:
        history.rewind(position)
    scores = _adjusted(logits, sampling, history)
    if constraint is not None and history is not None:
        scores = _constrained(scores, sampling, history.text(), constraint)
    if position < sampling.min_length:
        scores = _without(scores, sampling.stop_tokens)
    token = _choose(scores, sampling, position)
    if history is not None:
        history.append(token)
    return token


def draw_and_verify(
    rows: Iterable[Logits],
    sampling: Sampling,
    position: int,
    drafts: Sequence[int],
    history: TokenCounts | None = None,
    constraint: TextConstraint | None = None,
) -> list[int]:
    """Return the tokens drawn from rows of logits, the first of which takes absolute `position`.

    `drafts`: of the tokens that all rows but the last yield (speculative decoding), or empty. It ends with the first
    rejected draft: later rows follow from it. As a draw depends on seed, position and the tokens before it alone, the
    text is the same as without drafts.
    """
    tokens: list[int] = []
    for number, logits in enumerate(rows):
        tokens.append(draw(logits, sampling, position + number, history, constraint))
        if number < len(drafts) and tokens[-1] != drafts[number]:
            break
        if constraint is not None and tokens[-1] in sampling.stop_tokens:
            break  # nothing follows the end of a text
    return tokens


def uniform(seed: int, position: int) -> float:
    """Return a number from 0 up to but not including 1 that depends on seed and position alone."""
    bits = np.random.Philox(key=seed % (1 << 64), counter=position)
    return float(np.random.Generator(bits).random())


def _adjusted(logits: Logits, sampling: Sampling, history: TokenCounts | None) -> Scores:
    """Return logits after bias and penalties."""
    scores = logits.astype(np.float64)
    for token, bias in sampling.logit_bias:
        if token < len(scores):
            scores[token] += bias
    if history is not None:
        if sampling.repetition_penalty != 1:
            seen = history.seen(sampling.penalty_window)
            of_seen, penalty = scores[seen], sampling.repetition_penalty
            scores[seen] = np.where(of_seen > 0, of_seen / penalty, of_seen * penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            tokens, counts = history.counts(sampling.penalty_window)
            scores[tokens] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return scores


def _without(scores: Scores, stop_tokens: Sequence[int]) -> Scores:
    """Return scores without stop tokens, unless there is nothing else to draw."""
    without = scores.copy()
    without[[token for token in stop_tokens if token < len(scores)]] = -np.inf
    return without if np.isfinite(without.max()) else scores


def _constrained(scores: Scores, sampling: Sampling, text: Sequence[int], constraint: TextConstraint) -> Scores:
    """Return scores of the allowed tokens alone, stop tokens where the text may end. Raises BadRequest for none."""
    begin, end, document = sampling.reasoning_begin, sampling.reasoning_end, text
    if end is not None and (begin is None or begin in text[:1]):
        if end not in text:
            return _without(scores, sampling.stop_tokens)
        document = text[text.index(end) + 1 :]
    allowed, may_end = constraint.allowed(document)
    admitted = np.zeros(len(scores), np.bool_)  # a manifest may state another size of the vocabulary
    admitted[: len(allowed)] = allowed[: len(scores)]
    if begin is not None and not text and begin < len(scores):
        admitted[begin] = True
    admitted[[token for token in sampling.stop_tokens if token < len(scores)]] = may_end
    constrained = np.where(admitted, scores, -np.inf)
    if not np.isfinite(constrained.max()):
        raise BadRequest("no token can follow: the JSON Schema and the model's stop tokens leave none")
    return constrained


def _choose(scores: Scores, sampling: Sampling, position: int) -> int:
    best = int(np.argmax(scores))
    if sampling.temperature <= 0:
        return best
    # Relative to the best, so that no temperature can overflow.
    weights = np.exp((scores - scores[best]) / sampling.temperature)
    number = uniform(sampling.seed, position)
    if sampling.top_p >= 1 and sampling.min_p <= 0 and not 0 < sampling.top_k < len(weights):
        return _inverse(weights, number)
    kept = _likeliest(weights, sampling)
    if sampling.top_p < 1:
        cumulated = np.cumsum(weights[kept])
        kept = kept[: int(np.searchsorted(cumulated, sampling.top_p * cumulated[-1])) + 1]
    return int(kept[_inverse(weights[kept], number)])


def _likeliest(weights: Scores, sampling: Sampling) -> npt.NDArray[np.intp]:
    """Return the tokens that min_p and top_k keep, the likeliest first, equal ones in the order of their ids."""
    least = sampling.min_p
    if 0 < sampling.top_k < len(weights):
        kth = len(weights) - sampling.top_k
        least = max(least, float(np.partition(weights, kth)[kth]))
    candidates = np.flatnonzero(weights >= least)
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    return order[: sampling.top_k] if sampling.top_k else order


def _inverse(weights: npt.NDArray[np.float64], number: float) -> int:
    """Return the index whose share of the cumulated weights holds `number`."""
    cumulated = np.cumsum(weights)
    index = int(np.searchsorted(cumulated, number * cumulated[-1], side="right"))
    return min(index, len(weights) - 1)
