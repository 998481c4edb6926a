"""The text of a job's tokens: detokenised, ended by stop strings, with log probabilities where they are wanted."""

from collections.abc import Sequence

from node.coordinator.route import SampledToken
from node.coordinator.submission import JobError, JobErrorCode, JobRequest, TextDelta, TokenLogprob
from node.models.errors import ModelError
from node.models.library import KnownModel
from node.models.streaming import StopFinder, StreamDecoder
from protocol.messages import FinishReason
from protocol.tensors import TokenLogprobs


class OutputText:
    """Takes the tokens of one job in order."""

    def __init__(self, request: JobRequest, model: KnownModel) -> None:
        self._request = request
        self._tokenizer = model.tokenizer
        self._decoder = StreamDecoder(model.tokenizer, shows_marks=request.messages is not None)
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

        A stop token is not part of the text, and stop strings count from min_tokens on.
        """
        self._count += 1
        is_text = finish is not FinishReason.STOP
        try:
            piece = await self._decoder.feed(sampled.token) if is_text else ""
            if self._count > self._request.min_tokens:
                piece = self._finder.feed(piece)
            if self._finder.found:
                finish = FinishReason.STOP
            elif finish:
                piece += self._finder.feed(await self._decoder.finish()) + self._finder.finish()
            logprobs = await self._described(sampled.logprobs) if sampled.logprobs and is_text else ()
        except ModelError as error:
            raise JobError(JobErrorCode.FAILED, str(error)) from None
        self._pieces.append(piece)
        return TextDelta(text=piece, token_ids=(sampled.token,), logprobs=logprobs), finish

    async def _described(self, drawn: TokenLogprobs) -> tuple[TokenLogprob, ...]:
        pairs = [(drawn.token, drawn.logprob), *drawn.likeliest]
        await self._spell([token for token, _ in pairs])
        first, *likeliest = (TokenLogprob(token, self._spelt[token], logprob) for token, logprob in pairs)
        return (TokenLogprob(first.token, first.text, first.logprob, tuple(likeliest)),)

    async def _spell(self, tokens: Sequence[int]) -> None:
        unknown = [token for token in dict.fromkeys(tokens) if token not in self._spelt]
        if self._tokenizer.is_absent:
            self._spelt.update(dict.fromkeys(unknown, b""))
        elif unknown:
            self._spelt.update(zip(unknown, await self._tokenizer.token_bytes(unknown), strict=True))
