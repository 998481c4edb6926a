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


def completion_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """Return the field `logprobs` of a completion's choice, whose tokens begin at a character of the text.

    The first token of a prompt has no log probability.
    """
    texts = [_text(token) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else {_text(each): each.logprob for each in token.likeliest}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def _described(token: TokenLogprob) -> dict[str, Any]:
    return {"token": _text(token), "logprob": token.logprob, "bytes": list(token.text)}


def _text(token: TokenLogprob) -> str:
    return token.text.decode(errors="replace")
