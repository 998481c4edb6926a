"""Log probabilities in the two forms of the OpenAI API."""

from collections.abc import Sequence
from typing import Any

from node.coordinator.submission import TokenLogprob


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return the field `logprobs` of a chat's choice."""
    return {"content": describe_logprobs(tokens), "refusal": None}


def describe_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Return tokens with their log probabilities, and those of the likeliest."""
    return [_described(token) | {"top_logprobs": [_described(each) for each in token.likeliest]} for token in tokens]


def completion_logprobs(tokens: Sequence[TokenLogprob], offset: int, echo: str = "") -> tuple[dict[str, Any], int]:
    """Return the field `logprobs` of a completion's choice, and where in its text the tokens behind these begin.

    `offset`: the character of the text at which these begin. `echo`: the prompt, where the text begins with it. The
    first token of a prompt has no log probability.
    """
    texts = [_text(token) for token in tokens]
    offsets = []
    for token, text in zip(tokens, texts, strict=True):
        offsets.append(offset)
        offset += _length_in_text(token, text, offset, echo)
    document = {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else {_text(each): each.logprob for each in token.likeliest}
            for token in tokens
        ],
        "text_offset": offsets,
    }
    return document, offset


def _length_in_text(token: TokenLogprob, text: str, offset: int, echo: str) -> int:
    """Return how many characters of the text a token is; one of several bytes counts where it begins.

    Special tokens are in a text only where a prompt spells them: not the BOS that the tokenizer puts before it, nor the
    space that some tokenizers put before its first word.
    """
    if token.is_special and not echo.startswith(text, offset):
        return 0
    is_space_added = not offset and bool(echo) and text.startswith(" ") and not echo.startswith(" ")
    return sum(byte & 0xC0 != 0x80 for byte in token.text) - is_space_added


def _described(token: TokenLogprob) -> dict[str, Any]:
    return {"token": _text(token), "logprob": token.logprob, "bytes": list(token.text)}


def _text(token: TokenLogprob) -> str:
    return token.text.decode(errors="replace")
