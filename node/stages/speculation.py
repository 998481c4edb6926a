"""Speculative decoding: the first stage drafts the tokens that follow, and the last one verifies all in one pass.

Prompt lookup (Saxena, 2023): where the last few tokens occurred before, what followed then may follow again. A draft
model (`node.stages.draft_model`) predicts the next tokens itself. Verification is exact: a token is drawn from the
model's own logits, keyed by seed and position, whether or not it was drafted.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

LOOKUP_TOKENS: Final = (3, 2)
"""Lengths of the n-grams that are looked up, the more specific first."""


def matching_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


class Drafter(Protocol):
    """Drafts the tokens that follow the text so far."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""

    def draft(self, count: int, then: Callable[[Sequence[int]], None]) -> None:
        """Call `then`, at once or later, with at most `count` draft tokens."""

    def close(self) -> None:
        """Free the drafter; a pending `then` is not called."""


class PromptLookup:
    """Finds what followed the last few tokens when they occurred before, in constant time per token."""

    def __init__(self, lengths: Sequence[int] = LOOKUP_TOKENS) -> None:
        self._tokens: list[int] = []
        # By length, by n-gram: the place of the token that followed it last.
        self._followed: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in lengths}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text; see Drafter."""
        for token in tokens:
            place = len(self._tokens)
            for length, followed in self._followed.items():
                if place >= length:
                    followed[tuple(self._tokens[place - length :])] = place
            self._tokens.append(token)

    def draft(self, count: int, then: Callable[[Sequence[int]], None]) -> None:
        """Draft at once; see Drafter."""
        then(self.look_up(count))

    def close(self) -> None:
        """Do nothing; see Drafter."""

    def look_up(self, count: int) -> list[int]:
        """Return what followed before; past the end of the text it continues with itself."""
        for length, followed in self._followed.items():
            place = followed.get(tuple(self._tokens[-length:])) if len(self._tokens) >= length else None
            if place is not None:
                text = self._tokens[place : place + count]
                while len(text) < count:
                    text += text[: count - len(text)]
                return text
        return []


def repetitiveness(tokens: Sequence[int]) -> float:
    """Return the share of tokens, 0 to 1, that prompt lookup of three tokens would have drafted."""
    lookup = PromptLookup(LOOKUP_TOKENS[:1])
    right = 0
    for token in tokens:
        right += lookup.look_up(1) == [token]
        lookup.extend((token,))
    return right / len(tokens) if tokens else 0.0


class DraftTracker:
    """Turns the tokens that arrive at a first stage into rows: those not computed yet, and draft tokens behind them.

    `start`: rows before it are cached everywhere and never computed. `positions`: what the session may hold.
    `draft_tokens`: drafted at a time, at most; the number adapts to how many of the last ones were accepted.
    """

    def __init__(
        self, *, start: int = 0, positions: int, draft_tokens: int = 0, drafter: Drafter | None = None
    ) -> None:
        self._positions = positions
        self._drafter = drafter
        self._most = self._count = draft_tokens if drafter is not None else 0
        self._tokens: list[int] = []
        self._computed = start
        """Rows up to here are computed with the tokens that turned out to be right."""
        self._drafts: Sequence[int] = ()
        """Computed behind the tokens so far, and not verified yet."""
        self._is_pending = False
        """The drafter was asked; no rows may arrive meanwhile, as nothing was drawn that they could follow."""

    def feed(
        self, position: int, tokens: Sequence[int], draws: int, then: Callable[[int, list[int], Sequence[int]], None]
    ) -> None:
        """Take tokens, the first of which has `position`; call `then` with the rows to compute, at once or later.

        `then` gets the first row's position, the rows, and the draft tokens to compute behind them. There are no rows
        where all are computed already and nothing is drawn. Raises ValueError for tokens that do not follow.
        """
        if self._is_pending:
            raise ValueError("rows arrived where a token was to be drawn first")
        if position != len(self._tokens):
            raise ValueError(f"tokens from position {position} on do not follow the {len(self._tokens)} before")
        if self._drafts:  # the rows of those that were accepted are computed
            accepted = matching_prefix(self._drafts, tokens)
            self._computed = position + accepted
            self._count = min(self._most, 2 * accepted + 1)
            self._drafts = ()
        self._tokens.extend(tokens)
        first = min(max(self._computed, position), len(self._tokens) - draws)
        self._computed = max(self._computed, len(self._tokens))
        rows = self._tokens[first:]

        def proceed(drafts: Sequence[int]) -> None:
            self._is_pending = False
            self._drafts = drafts
            then(first, rows, drafts)

        if self._drafter is not None:
            self._drafter.extend(tokens)
            count = min(self._count, self._positions - 1 - len(self._tokens))
            if draws == 1 and count > 0:
                self._is_pending = True
                self._drafter.draft(count, proceed)
                return
        proceed(())

    def close(self) -> None:
        """Free the drafter."""
        if self._drafter is not None:
            self._drafter.close()
