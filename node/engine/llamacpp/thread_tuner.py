"""How many threads compute a pass of few rows: as many as finish it soonest, found by trying.

A pass of one row has hundreds of operations of some microseconds, and after each all threads wait for the last. On a
machine of one's own two threads take three fifths of the time of one. Where other processes want the same cores, a wait
may last until the scheduler gives a thread its turn: then two take twice the time of one. Which it is changes while a
node runs, and how many threads pay depends on the model, too. Results do not depend on it: see `SpanContext`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

MOST_ROWS: Final = 32
"""Passes of more rows, which wait little for what they compute, take all threads."""

TRIED_PASSES: Final = 3
"""In a row with another number of threads; the shortest counts, as others may have been interrupted."""

FIRST_INTERVAL: Final = 4
LONGEST_INTERVAL: Final = 128
"""Passes between two tries: twice as many after each that did not change the number."""

WORTHWHILE: Final = 0.95
"""A number of threads is changed for another that takes at most this share of the time."""

SLOWED: Final = 1.5
"""Passes that take so many times what they took have other processes beside them: something is tried at once."""


class ThreadTuner:
    """Chooses the threads of each pass, at most `limit`, from how long the passes before took."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counts = (*_powers_of_two(limit), limit)
        self._by_rows: dict[int, _Tuning] = {}
        self._level = len(self._counts) - 1

    def threads(self, rows: int) -> int:
        """Return how many threads are to compute the next pass of so many rows."""
        if rows > MOST_ROWS:
            return self._limit
        tuning = self._by_rows.setdefault(rows, _Tuning(self._level))
        return self._counts[tuning.level if tuning.tried is None else tuning.tried]

    def record(self, rows: int, seconds: float) -> None:
        """Learn how long the pass took that `threads` was asked for."""
        if rows <= MOST_ROWS and len(self._counts) > 1:
            tuning = self._by_rows[rows]
            tuning.record(seconds, len(self._counts))
            self._level = tuning.level


@dataclass(slots=True)
class _Tuning:
    """What is known of passes of one number of rows. `level`, `tried`: indices of the numbers of threads."""

    level: int
    tried: int | None = None
    is_up_next: bool = False
    interval: int = FIRST_INTERVAL
    passes: int = 0
    """Since the last try."""
    latest_s: list[float] = field(default_factory=list)
    """Of the last passes with the number in use."""
    tried_s: list[float] = field(default_factory=list)
    usual_s: float | None = None
    """What a pass takes with the number in use."""

    def record(self, seconds: float, levels: int) -> None:
        if self.tried is not None:
            self.tried_s.append(seconds)
            if len(self.tried_s) == TRIED_PASSES:
                self._judge(self.tried)
            return
        self.latest_s = [*self.latest_s[1 - TRIED_PASSES :], seconds]
        self.passes += 1
        if len(self.latest_s) < TRIED_PASSES:
            return
        now_s = min(self.latest_s)
        if self.usual_s is not None and now_s > SLOWED * self.usual_s:
            self.interval = 1
        self.usual_s = now_s
        if self.passes >= self.interval:
            self._try_other(levels)

    def _try_other(self, levels: int) -> None:
        neighbour = self.level + (1 if self.is_up_next else -1)
        if not 0 <= neighbour < levels:
            neighbour = 2 * self.level - neighbour
        self.is_up_next = neighbour < self.level
        self.tried, self.tried_s, self.passes = neighbour, [], 0

    def _judge(self, tried: int) -> None:
        assert self.usual_s is not None
        least_s = min(self.tried_s)
        if least_s < WORTHWHILE * self.usual_s:
            self.is_up_next = tried > self.level  # on in the same direction
            self.level, self.usual_s, self.latest_s, self.interval = tried, least_s, [], FIRST_INTERVAL
        else:
            self.interval = min(2 * self.interval, LONGEST_INTERVAL)
        self.tried = None


def _powers_of_two(limit: int) -> Iterator[int]:
    count = 1
    while count < limit:
        yield count
        count *= 2
