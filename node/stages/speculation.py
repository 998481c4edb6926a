"""Guessing the tokens that follow, at the first stage; the last stage checks all of them in one pass of the route.

Prompt lookup (Saxena, 2023): where the last few tokens stood before, what followed then may follow again. A draft model
(`node.stages.draft_model`) says itself what it would say next. Checking is exact: a token is drawn from the model's own
logits, keyed by seed and position, whether or not it was guessed.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

LOOKUP_TOKENS: Final = (3, 2)
"""Lengths of the pieces that are looked up, the more telling one first."""


class Drafter(Protocol):
    """Guesses what follows the tokens it was given."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Take note of tokens that have come."""
        ...

    def draft(self, count: int, then: Callable[[Sequence[int]], None]) -> None:
        """Call `then`, at once or later, with at most `count` guesses of the tokens that follow."""
        ...

    def close(self) -> None:
        """Guess no more; who waits for guesses is not told."""
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

    def draft(self, count: int, then: Callable[[Sequence[int]], None]) -> None:
        """Guess at once; see Drafter."""
        then(self.look_up(count))

    def close(self) -> None:
        """Do nothing; see Drafter."""

    def look_up(self, count: int) -> list[int]:
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
        right += lookup.look_up(1) == [token]
        lookup.extend((token,))
    return right / len(tokens) if tokens else 0.0


class TokenFeed:
    """What the first stage makes of tokens that arrive: rows that it has not computed yet, and guesses behind them.

    `start`: rows before it are cached everywhere and never computed. `positions`: what the session may hold.
    `draft_tokens`: how many guesses are of use at a time, at most; the number follows what became of the last ones.
    """

    def __init__(self, *, start: int = 0, positions: int, draft_tokens: int = 0) -> None:
        self._positions = positions
        self._most = draft_tokens
        self._count = draft_tokens
        self._tokens: list[int] = []
        self._computed = start
        """Rows up to here are computed with the tokens that turned out to be right."""
        self._drafts: list[int] = []
        """The guesses that were computed behind the tokens so far."""
        self.drafted = 0
        self.accepted = 0

    def take(self, position: int, tokens: Sequence[int], draws: int) -> tuple[int, list[int]]:
        """Take tokens, the first of which has `position`; return the first row's position, and the rows.

        There are none where all of them are computed already and nothing is to be drawn. Raises ValueError for tokens
        that do not follow those before.
        """
        if position != len(self._tokens):
            raise ValueError(f"tokens from position {position} on do not follow the {len(self._tokens)} before")
        self._check_guesses(position, tokens)
        self._tokens.extend(tokens)
        first = min(max(self._computed, position), len(self._tokens) - draws)
        self._computed = max(self._computed, len(self._tokens))
        return first, self._tokens[first:]

    @property
    def wanted(self) -> int:
        """How many guesses behind the tokens so far would be of use."""
        return max(0, min(self._count, self._positions - 1 - len(self._tokens)))

    @property
    def guesses(self) -> tuple[int, ...]:
        """What is guessed to follow the tokens so far."""
        return tuple(self._drafts)

    def guess(self, drafts: Sequence[int]) -> None:
        """Take note of guesses that are computed behind the tokens so far."""
        self._drafts = list(drafts)

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
