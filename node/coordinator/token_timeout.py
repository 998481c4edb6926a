"""Adaptive timeout for the next token: a multiple of the median inter-token time."""

from collections import deque
from statistics import median

FIRST_S = 1.0
"""Before the first token: prefill takes its time, and asking for progress costs little."""

LEAST_S = 0.4
MOST_S = 1.0
"""Upper bound: a stage does not gain time by slowing tokens down."""

FACTOR = 6.0


class AdaptiveTimeout:
    """The wait after which a job's token is late, learned from its inter-token times."""

    def __init__(self) -> None:
        self._waits_s: deque[float] = deque(maxlen=16)

    @property
    def seconds(self) -> float:
        """The current timeout."""
        return min(MOST_S, max(LEAST_S, FACTOR * median(self._waits_s))) if self._waits_s else FIRST_S

    def learn(self, wait_s: float) -> None:
        """Record an inter-token time."""
        self._waits_s.append(wait_s)
