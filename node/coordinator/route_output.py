"""What the last stage of a route sends to the coordinator: tokens, scores of the prompt, or its embedding."""

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from protocol.messages import FinishReason, Sampling, Slice
from protocol.tensors import Tensor, TokenLogprobs, drawn_tokens, embedding_from_tensor, logprobs_from_tensor


class SampledToken(NamedTuple):
    """A token as it arrived from the last stage, at `arrived_s`, trio's clock."""

    token: int
    finish_reason: FinishReason | None
    arrived_s: float
    logprobs: TokenLogprobs | None = None


class PromptScores(NamedTuple):
    """The log probabilities of some tokens of the prompt, as they arrived from the last stage."""

    tokens: Sequence[TokenLogprobs]


LastStageOutput: TypeAlias = "SampledToken | PromptScores | array[float]"
"""A token, scores, or an embedding."""


class OutputReader:
    """Reads the messages of a last stage. `most`: rows, and outputs of all messages together, at most.

    Token ids outside the vocabulary are refused here: one that became part of the text would fail every replay of it,
    at honest stages.
    """

    def __init__(self, sampling: Sampling, vocabulary_size: int) -> None:
        self._sampling = sampling
        self._vocabulary_size = vocabulary_size
        self._unscored: Sequence[int] | None = None if sampling.prompt_logprobs else ()
        """The tokens of the prompt whose scores are to come next; None before that is known."""
        self.is_complete = False
        """Whether nothing is to come any more."""
        self.most = sampling.max_tokens + (sampling.prompt_length if sampling.prompt_logprobs else 0)

    def begin(self, tokens: Sequence[int]) -> None:
        """Expect outputs for a job's tokens. Where they are scored, the last stage computes all of them."""
        if self._sampling.prompt_logprobs:
            self._unscored = tokens[1 : self._sampling.prompt_length]

    def read(self, part: Slice, tensor: Tensor, now_s: float) -> list[LastStageOutput]:
        """Return the outputs in a message that has just arrived. Raises ValueError."""
        if self._sampling.pooling is not None:
            embedding = embedding_from_tensor(tensor)
            self.is_complete = True
            return [embedding]
        if self._unscored is None:
            raise ValueError("scores of a prompt that was not sent yet")
        count = min(len(self._unscored), tensor.rows)
        scores = self._read_scores(part, tensor.cut(0, count), self._unscored)
        drawn = tensor.cut(count, tensor.rows)
        logprobs = self._logprobs(drawn) if self._sampling.logprobs else [None] * drawn.rows
        tokens = drawn_tokens(drawn)
        self._check(tokens)
        finish = [*[None] * (len(tokens) - 1), part.finish_reason] if tokens else []
        self.is_complete = bool(finish[-1]) if finish else not (self._unscored or self._sampling.max_tokens)
        times = [now_s] * len(tokens)
        return [*scores, *(SampledToken(*each) for each in zip(tokens, finish, times, logprobs, strict=True))]

    def _read_scores(self, part: Slice, tensor: Tensor, unscored: Sequence[int]) -> list[PromptScores]:
        if not tensor.rows:
            return []
        found = self._logprobs(tensor)
        begins = self._sampling.prompt_length - len(unscored)
        if part.position != begins or [each.token for each in found] != list(unscored[: len(found)]):
            raise ValueError("scores of other tokens than the prompt's next ones")
        self._unscored = unscored[len(found) :]
        return [PromptScores(found)]

    def _logprobs(self, tensor: Tensor) -> list[TokenLogprobs]:
        found = logprobs_from_tensor(tensor)
        self._check(token for each in found for token, _ in each.likeliest)
        return found

    def _check(self, tokens: Iterable[int]) -> None:
        if not all(0 <= token < self._vocabulary_size for token in tokens):
            raise ValueError(f"a token id is not from 0 to {self._vocabulary_size - 1}")
