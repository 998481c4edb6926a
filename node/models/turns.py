"""Conversations as strict chat templates want them: changed only where a template has refused them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Turn = Mapping[str, Any]


def mended_turns(turns: Sequence[Turn], refusal: str) -> list[Turn] | None:
    """Return a conversation without what a template refused it for; None where nothing is known to help."""
    for words, mend in _MENDS.items():
        if words in refusal:
            mended = list(mend(turns))
            return mended if mended != list(turns) else None
    return None


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


_MENDS = {"must alternate": _with_alternating_roles}
"""What to do about refusals, by words of theirs."""
