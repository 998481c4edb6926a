"""Conversations as strict chat templates want them: changed only where a template has refused them."""

import hashlib
from collections import defaultdict
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
    """Give calls of tools, and their results, ids of nine letters and digits.

    A call has the same id in every prompt, so that what was computed for earlier turns is used again.
    """
    ids: list[str] = []
    unanswered: dict[int, Turn] = {}
    for position, turn in enumerate(turns):
        if calls := turn.get("tool_calls"):
            unanswered = dict(enumerate(calls))
            ids = [_short_id(call.get("id") or f"{position}/{number}") for number, call in unanswered.items()]
            yield {**turn, "tool_calls": [{**call, "id": new} for call, new in zip(calls, ids, strict=True)]}
        elif turn["role"] == "tool":
            number = _take_answered(turn, unanswered)
            own = turn.get("tool_call_id") or str(position)
            yield {**turn, "tool_call_id": _short_id(own) if number is None else ids[number]}
        else:
            yield turn


def _take_answered(result: Turn, unanswered: dict[int, Turn]) -> int | None:
    """Remove the call that a result answers, and return its number: by its id, else its tool's name, else the next.

    Ollama's API has no ids, and its clients may send the results in another order than the calls.
    """
    call_id, name = result.get("tool_call_id"), result.get("name")
    numbers = [number for number, call in unanswered.items() if call_id and call.get("id") == call_id]
    numbers += [number for number, call in unanswered.items() if name and call["function"]["name"] == name]
    answered = next(iter([*numbers, *unanswered]), None)
    if answered is not None:
        del unanswered[answered]
    return answered


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
        unanswered, results_of = dict(enumerate(calls)), defaultdict[int | None, list[Turn]](list)
        for result in results:
            results_of[_take_answered(result, unanswered)].append(result)
        for number, call in enumerate(calls):
            later = {name: value for name, value in turn.items() if name not in _OF_THE_FIRST_CALL} | {"content": ""}
            yield {**(later if number else turn), "tool_calls": [call]}
            yield from results_of[number]
        yield from results_of[None]


def _with_alternating_roles(turns: Sequence[Turn]) -> Iterator[Turn]:
    """Join turns of one role that follow each other, and what the user adds to a result.

    A turn of the system behind others is the user's: such templates know the system's at the beginning only.
    """
    before: Turn | None = None
    for turn in turns:
        if before and turn["role"] == "system" != before["role"]:
            turn = {**turn, "role": "user"}
        roles = (before["role"], turn["role"]) if before else ()
        if before and roles in _JOINED and "tool_calls" not in {*before, *turn}:
            texts = {name: [each[name] for each in (before, turn) if each.get(name)] for name in _TEXTS}
            before = {**turn, **before, **{name: "\n\n".join(each) for name, each in texts.items() if each}}
            continue
        if before:
            yield before
        before = turn
    if before:
        yield before


_TEXTS = ("content", "reasoning_content")
_JOINED = {*((role, role) for role in ("system", "user", "assistant")), ("tool", "user")}

_MENDS = {
    "length 9": _with_short_ids,  # Mistral's
    "only supports single tool-calls": _with_one_call_a_turn,  # Llama 3's
    "must alternate": _with_alternating_roles,
    "must be at the beginning": _with_alternating_roles,  # Qwen3.5's, of the system's turn
}
"""What to do about refusals, by words of theirs."""
