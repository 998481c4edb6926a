"""How many threads compute a pass of few rows: as many as finish it soonest, found by trying.

A pass of one row has hundreds of operations of some microseconds, and after each all threads wait for the last. On a
machine of one's own two threads take three fifths of the time of one. Where other processes want the same cores, a wait
may last until the scheduler gives a thread its turn: then two take twice the time of one. Which it is changes while a
node runs, and how many threads pay depends on the model, too. Results do not depend on it: see `SpanContext`.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Final

MOST_ROWS: Final = 32
"""Passes of more rows, which wait little for what they compute, take all threads."""

COMPARED: Final = 5
"""Passes with another number of threads, each beside one with the number in use: others interrupt both alike."""

FIRST_INTERVAL: Final = 8
LONGEST_INTERVAL: Final = 256
"""Passes between two comparisons: twice as many after each that did not change the number."""

WORTHWHILE: Final = 0.93
"""A number of threads is changed for another that takes at most this share of the time."""

SLOWED: Final = 1.8
"""Passes that take so many times what they took have other processes beside them: a comparison is made at once."""


class ThreadTuner:
    """Chooses the threads of each pass, at most `limit`, from how long the passes before took."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counts = (*_powers_of_two(limit), limit)
        self._kinds: dict[Hashable, _Tuning] = {}
        self._level = len(self._counts) - 1

    def threads(self, rows: int, kind: Hashable = None) -> int:
        """Return how many threads compute the next pass of so many rows; `kind`: what else its cost depends on."""
        if rows > MOST_ROWS or len(self._counts) == 1:
            return self._limit
        return self._counts[self._kinds.setdefault((rows, kind), _Tuning(self._level)).next_level]

    def record(self, rows: int, seconds: float, kind: Hashable = None) -> None:
        """Learn how long the pass took that `threads` was asked for."""
        if rows <= MOST_ROWS and len(self._counts) > 1:
            tuning = self._kinds[rows, kind]
            tuning.record(seconds, len(self._counts))
            self._level = tuning.level


@dataclass(slots=True)
class _Tuning:
    """What is known of passes of one kind. `level`, `other`: indices of the numbers of threads, in use and compared."""

    level: int
    other: int | None = None
    is_up_next: bool = False
    interval: int = FIRST_INTERVAL
    until_comparison: int = FIRST_INTERVAL
    usual_s: float | None = None
    """Median of the last comparison with the number in use."""
    own_s: list[float] = field(default_factory=list)
    """Of the last passes with the number in use: in a comparison as many as with the other."""
    other_s: list[float] = field(default_factory=list)

    @property
    def next_level(self) -> int:
        return self.level if self.other is None or len(self.other_s) == len(self.own_s) else self.other

    def record(self, seconds: float, levels: int) -> None:
        if self.other is not None:
            (self.own_s if self.next_level == self.level else self.other_s).append(seconds)
            if len(self.other_s) == COMPARED:
                self._decide(self.other)
            return
        self.own_s = [*self.own_s[1 - COMPARED :], seconds]
        self.until_comparison -= 1
        if len(self.own_s) == COMPARED and self.usual_s is not None and median(self.own_s) > SLOWED * self.usual_s:
            self.interval, self.until_comparison = max(FIRST_INTERVAL, self.interval // 4), 0
        if self.until_comparison <= 0:
            self._compare(levels)

    def _compare(self, levels: int) -> None:
        neighbour = self.level + (1 if self.is_up_next else -1)
        if not 0 <= neighbour < levels:
            neighbour = 2 * self.level - neighbour
        self.is_up_next = neighbour < self.level
        self.other, self.own_s, self.other_s = neighbour, [], []

    def _decide(self, other: int) -> None:
        own_s, other_s = median(self.own_s), median(self.other_s)
        if other_s < WORTHWHILE * own_s:
            self.is_up_next = other > self.level  # on in the same direction
            self.level, self.usual_s, self.interval = other, other_s, FIRST_INTERVAL
        else:
            self.usual_s, self.interval = own_s, min(2 * self.interval, LONGEST_INTERVAL)
        self.other, self.own_s, self.until_comparison = None, [], self.interval


def _powers_of_two(limit: int) -> Iterator[int]:
    count = 1
    while count < limit:
        yield count
        count *= 2
