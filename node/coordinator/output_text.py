"""The text of a job's tokens: detokenised, ended by stop strings, with log probabilities where they are wanted."""

from collections.abc import AsyncGenerator, Sequence
from typing import Final

import trio

from node.coordinator.route_output import SampledToken
from node.coordinator.submission import JobError, JobErrorCode, JobRequest, PromptScored, TextDelta, TokenLogprob
from node.models.errors import ModelError
from node.models.library import KnownModel
from node.models.streaming import StopFinder, StreamDecoder
from protocol.messages import FinishReason
from protocol.tensors import TokenLogprobs

SCORES_AT_ONCE: Final = 512
"""Tokens of a prompt that an event has the log probabilities of: more would hold up the event loop."""


class OutputText:
    """Takes the tokens of one job in order."""

    def __init__(self, request: JobRequest, model: KnownModel, prompt: Sequence[int]) -> None:
        """`prompt`: the tokens of the job's prompt, whose text goes on, unless a new turn of a conversation begins."""
        self._request = request
        self._tokenizer = model.tokenizer
        is_continued = request.messages is None or request.continue_final_message
        self._decoder = StreamDecoder(
            model.tokenizer, prompt=prompt if is_continued else (), shows_marks=request.messages is not None
        )
        self._finder = StopFinder(request.stop)
        self._count = 0
        self._pieces: list[str] = []
        self._spelt: dict[int, bytes] = {}
        """Bytes of tokens that log probabilities name."""

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it, if one did."""
        return self._finder.found

    async def add(self, sampled: SampledToken, finish: FinishReason | None) -> tuple[TextDelta, FinishReason | None]:
        """Add a token; return what it adds to the text, and why the text ends with it, if so. Raises JobError.

        A stop token is not part of the text, and stop strings count from min_tokens on. Where the prompt is scored, the
        stop token has log probabilities, too: evaluation harnesses count on one token behind the prompt.
        """
        self._count += 1
        is_text = finish is not FinishReason.STOP
        try:
            piece = await self._decoder.feed(sampled.token) if is_text else ""
            if finish:
                piece += self._decoder.finish()
            if self._count > self._request.min_tokens:
                piece = self._finder.feed(piece)
            if self._finder.found:
                finish = FinishReason.STOP
            elif finish:
                piece += self._finder.finish()
            is_listed = is_text or self._request.prompt_logprobs
            logprobs = await self._described(sampled.logprobs) if sampled.logprobs and is_listed else ()
        except ModelError as error:
            raise JobError(JobErrorCode.FAILED, str(error), may_quote=True) from None
        self._pieces.append(piece)
        return TextDelta(text=piece, token_ids=(sampled.token,), logprobs=logprobs), finish

    async def scored(self, first: int, scores: Sequence[TokenLogprobs]) -> AsyncGenerator[PromptScored, None]:
        """Yield the prompt's tokens with their log probabilities, but for the first one, in pieces. Raises JobError."""
        try:
            await self._spell([first])
            has_text = self._tokenizer.vocabulary.has_text(first)
            described: tuple[TokenLogprob, ...] = (
                TokenLogprob(first, self._spelt[first], None, is_special=not has_text),
            )
            for start in range(0, max(1, len(scores)), SCORES_AT_ONCE):
                described += await self._described(*scores[start : start + SCORES_AT_ONCE])
                yield PromptScored(described)
                described = ()
                await trio.lowlevel.checkpoint()
        except ModelError as error:
            raise JobError(JobErrorCode.FAILED, str(error), may_quote=True) from None

    async def _described(self, *tokens: TokenLogprobs) -> tuple[TokenLogprob, ...]:
        await self._spell([token for each in tokens for token in (each.token, *(other for other, _ in each.likeliest))])
        spelt, vocabulary = self._spelt, self._tokenizer.vocabulary
        return tuple(
            TokenLogprob(
                each.token,
                spelt[each.token],
                each.logprob,
                tuple(TokenLogprob(token, spelt[token], logprob) for token, logprob in each.likeliest),
                is_special=not vocabulary.has_text(each.token),
            )
            for each in tokens
        )

    async def _spell(self, tokens: Sequence[int]) -> None:
        unknown = [token for token in dict.fromkeys(tokens) if token not in self._spelt]
        if self._tokenizer.is_absent:
            self._spelt.update(dict.fromkeys(unknown, b""))
        elif unknown:
            self._spelt.update(zip(unknown, await self._tokenizer.token_bytes(unknown), strict=True))
