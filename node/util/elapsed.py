"""How long ago something was done, also where the machine slept or its clock was set meanwhile."""

import math
import time
from collections.abc import Callable

import trio


class Elapsed:
    """Seconds by the clock that says more: the monotonic one stands still in sleep, the wall clock may be set back.

    A wall clock that was set back counts as time that has passed: what was signed by it is of the future now.
    """

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._wall_clock = wall_clock
        self._since_s: tuple[float, float] | None = None

    def restart(self) -> None:
        """Count from now on."""
        self._since_s = trio.current_time(), self._wall_clock()

    def seconds(self) -> float:
        """Return the seconds since the last `restart`; infinite before the first."""
        if self._since_s is None:
            return math.inf
        monotonic_s, wall_s = self._since_s
        return max(trio.current_time() - monotonic_s, abs(self._wall_clock() - wall_s))
