"""Guessing the tokens that follow, at the first stage; the last stage checks all of them in one pass of the route.

Prompt lookup (Saxena, 2023): where the last few tokens stood before, what followed then may follow again. Checking is
exact: a token is drawn from the model's own logits, keyed by seed and position, whether or not it was guessed.
"""

from collections.abc import Sequence
from typing import Final, Protocol

LOOKUP_TOKENS: Final = (3, 2)
"""Lengths of the pieces that are looked up, the more telling one first."""


class Drafter(Protocol):
    """Guesses what follows the tokens it was given."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Take note of tokens that have come."""
        ...

    def draft(self, count: int) -> Sequence[int]:
        """Return at most `count` guesses of the tokens that follow."""
        ...


class PromptLookup:
    """Finds what followed the last few tokens when they stood in the text before. Each token costs a constant time."""

    def __init__(self, lengths: Sequence[int] = LOOKUP_TOKENS) -> None:
        self._tokens: list[int] = []
        # By length, by piece: where the token stands that followed it last.
        self._followed: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in lengths}

    def extend(self, tokens: Sequence[int]) -> None:
        """Take note of tokens that have come; see Drafter."""
        for token in tokens:
            place = len(self._tokens)
            for length, followed in self._followed.items():
                if place >= length:
                    followed[tuple(self._tokens[place - length :])] = place
            self._tokens.append(token)

    def draft(self, count: int) -> list[int]:
        """Return what followed before; where that reaches the end of the text, it goes on with itself."""
        for length, followed in self._followed.items():
            place = followed.get(tuple(self._tokens[-length:])) if len(self._tokens) >= length else None
            if place is not None:
                text = self._tokens[place : place + count]
                while len(text) < count:
                    text += text[: count - len(text)]
                return text
        return []


def repetitiveness(tokens: Sequence[int]) -> float:
    """Return the share of tokens, 0 to 1, that looking up the three before them would have guessed."""
    lookup = PromptLookup(LOOKUP_TOKENS[:1])
    right = 0
    for token in tokens:
        right += lookup.draft(1) == [token]
        lookup.extend((token,))
    return right / len(tokens) if tokens else 0.0


class TokenFeed:
    """What the first stage makes of tokens that arrive: rows that it has not computed yet, and guesses behind them.

    `start`: rows before it are cached everywhere and never computed. `positions`: what the session may hold.
    `drafter` guesses up to `draft_tokens` at a time; the number follows what became of the last guesses.
    """

    def __init__(
        self, *, start: int = 0, positions: int, drafter: Drafter | None = None, draft_tokens: int = 0
    ) -> None:
        self._positions = positions
        self._drafter = drafter
        self._most = draft_tokens
        self._count = draft_tokens
        self._tokens: list[int] = []
        self._computed = start
        """Rows up to here are computed with the tokens that turned out to be right."""
        self._drafts: list[int] = []
        """The guesses that were computed behind the tokens so far."""
        self.drafted = 0
        self.accepted = 0

    def take(self, position: int, tokens: Sequence[int], draws: int) -> tuple[int, list[int], tuple[int, ...]]:
        """Take tokens, the first of which has `position`; return the first row's position, the rows, the drafts.

        The drafts are the last of the rows. There are no rows where all of them are computed already and nothing is to
        be drawn. Raises ValueError for tokens that do not follow those before.
        """
        if position != len(self._tokens):
            raise ValueError(f"tokens from position {position} on do not follow the {len(self._tokens)} before")
        self._check_guesses(position, tokens)
        self._tokens.extend(tokens)
        if self._drafter is not None:
            self._drafter.extend(tokens)
        first = min(max(self._computed, position), len(self._tokens) - draws)
        self._computed = max(self._computed, len(self._tokens))
        self._drafts = self._guess() if draws == 1 else []
        return first, [*self._tokens[first:], *self._drafts], tuple(self._drafts)

    def _check_guesses(self, position: int, tokens: Sequence[int]) -> None:
        """See how many of the guesses were right: their rows are computed."""
        if not self._drafts:
            return
        right = 0
        for guess, token in zip(self._drafts, tokens, strict=False):
            if guess != token:
                break
            right += 1
        self.drafted += len(self._drafts)
        self.accepted += right
        self._computed = position + right
        self._count = min(self._most, 2 * right + 1)
        self._drafts = []

    def _guess(self) -> list[int]:
        count = min(self._count, self._positions - 1 - len(self._tokens))
        return list(self._drafter.draft(count)) if self._drafter is not None and count > 0 else []
