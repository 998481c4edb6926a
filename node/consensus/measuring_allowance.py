"""Bounds what measurements for the swarm cost: a share of the computing that users had done here, and a rate."""

import math
from collections.abc import Callable
from typing import Final

import trio

from node.util.token_bucket import Allowance

RATE: Final = Allowance(per_s=2 / 60, burst=20.0)
"""Processor seconds on all stages of the measured routes: of computing, times the threads that do it.

Stages report the duration of their steps, which is longer where other processes have the processors.
"""

INITIAL_S: Final = 60.0
"""Processor seconds before users had any computing done, so that a new swarm can begin."""


class MeasuringAllowance:
    """What is left for measurements: a node that nobody uses does not measure for ever."""

    def __init__(self, share: float, served_s: Callable[[], float]) -> None:
        """`share`: of the computing for users, 0 for no measurements at all. `served_s`: processor seconds of it."""
        self.lock = trio.Lock()
        """Held while something is measured, from the question what is left until it is charged."""
        self._share = share
        self._served_s = served_s
        self._spent_s = 0.0
        self._has_measured = False
        self._bucket = RATE.bucket(trio.current_time())

    @property
    def is_left(self) -> bool:
        """Whether a measurement may begin."""
        return self._bucket.level(trio.current_time()) > 0 and self.left_s > 0

    @property
    def limit_s(self) -> float:
        """The processor seconds that a measurement may take: the first one as many as it needs, which it may then owe.

        Else a node with a large model, of which one cell takes more than there is at first, would never join.
        """
        return self.left_s if self._has_measured else math.inf

    @property
    def left_s(self) -> float:
        """The processor seconds that are left, in whatever time."""
        if self._share <= 0:
            return 0.0
        return max(0.0, INITIAL_S + self._share * self._served_s() - self._spent_s)

    def spend(self, seconds: float, *, is_done: bool = True) -> None:
        """Record the processor seconds that a measurement took; what it took too much delays the next ones.

        `is_done`: whether it gave a reading: else the next one is still the first.
        """
        self._has_measured |= is_done
        self._spent_s += seconds
        self._bucket.spend(seconds, trio.current_time())
