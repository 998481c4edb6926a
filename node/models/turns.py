"""Conversations as strict chat templates want them: changed only where a template has refused them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

Turn = Mapping[str, Any]

ID_LENGTH = 9
_OF_THE_FIRST_CALL = ("reasoning_content", "thinking")


def mended_turns(turns: Sequence[Turn], refusal: str) -> list[Turn] | None:
    """Return a conversation without what a template refused it for; None where nothing is known to help."""
    for words, mend in _MENDS.items():
        if words in refusal:
            mended = list(mend(turns))
            return mended if mended != list(turns) else None
    return None


def _with_short_ids(turns: Sequence[Turn]) -> Iterator[Turn]:
    """Give calls of tools ids of nine letters and digits; a result that names no call is that of the next one.

    A call has the same id in every prompt, so that what was computed for earlier turns is used again.
    """
    unanswered: list[str] = []
    for position, turn in enumerate(turns):
        if calls := turn.get("tool_calls"):
            unanswered = [_short_id(call.get("id") or f"{position}/{number}") for number, call in enumerate(calls)]
            yield {**turn, "tool_calls": [{**call, "id": new} for call, new in zip(calls, unanswered, strict=True)]}
        elif turn["role"] == "tool":
            named = _short_id(turn.get("tool_call_id") or str(position))
            answered = named if named in unanswered or not unanswered else unanswered[0]
            unanswered = [each for each in unanswered if each != answered]
            yield {**turn, "tool_call_id": answered}
        else:
            yield turn


def _short_id(name: str) -> str:
    is_short = len(name) == ID_LENGTH and name.isascii() and name.isalnum()
    return name if is_short else hashlib.sha256(name.encode()).hexdigest()[:ID_LENGTH]


def _with_one_call_a_turn(turns: Sequence[Turn]) -> Iterator[Turn]:
    """Make a turn of each call, followed by its result."""
    position = 0
    while position < len(turns):
        turn, position = turns[position], position + 1
        calls = turn.get("tool_calls", ())
        if len(calls) < 2:
            yield turn
            continue
        results = list(takewhile(lambda each: each["role"] == "tool", turns[position:]))
        position += len(results)
        for number, call in enumerate(calls):
            later = {name: value for name, value in turn.items() if name not in _OF_THE_FIRST_CALL} | {"content": ""}
            yield {**(later if number else turn), "tool_calls": [call]}
            result = next((each for each in results if each.get("tool_call_id") in {None, call.get("id")}), None)
            if result is not None:
                results.remove(result)
                yield result
        yield from results


def _with_alternating_roles(turns: Sequence[Turn]) -> Iterator[Turn]:
    """Join turns of the user, or of the assistant, that follow each other, and what the user adds to a result."""
    before: Turn | None = None
    for turn in turns:
        roles = (before["role"], turn["role"]) if before else ()
        is_joined = roles in {("user", "user"), ("assistant", "assistant"), ("tool", "user")}
        if before and is_joined and "tool_calls" not in {*before, *turn}:
            before = {**turn, **before, "content": "\n\n".join([before["content"], turn["content"]])}
            continue
        if before:
            yield before
        before = turn
    if before:
        yield before


_MENDS = {
    "length 9": _with_short_ids,  # Mistral's
    "only supports single tool-calls": _with_one_call_a_turn,  # Llama 3's
    "must alternate": _with_alternating_roles,
}
"""What to do about refusals, by words of theirs."""
