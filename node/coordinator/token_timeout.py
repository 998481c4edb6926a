"""How long to wait for a token before the stages are asked how far they are: a multiple of what tokens take."""

from collections import deque
from statistics import median

FIRST_S = 1.0
"""Before any token has come: a prompt takes its time, and asking costs next to nothing."""

LEAST_S = 0.4
MOST_S = 1.0
"""However slow the tokens of a job are: whoever makes them slow is not to gain time by it."""

FACTOR = 6.0


class AdaptiveTimeout:
    """Learns what a job's tokens take."""

    def __init__(self) -> None:
        self._waits_s: deque[float] = deque(maxlen=16)

    @property
    def seconds(self) -> float:
        """The wait after which a token is late."""
        return min(MOST_S, max(LEAST_S, FACTOR * median(self._waits_s))) if self._waits_s else FIRST_S

    def learn(self, wait_s: float) -> None:
        """Take note of how long a token took."""
        self._waits_s.append(wait_s)
