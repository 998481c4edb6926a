"""Throughput of a connection, measured passively from ordinary transfers. No I/O."""

import math
from collections.abc import Callable
from typing import Final

GAP_S: Final = 0.02
"""A pause this long is the sender's own: what comes after it is another burst."""

MIN_BURST_BYTES: Final = 64 << 10
"""A smaller write shows the latency of a connection and not its rate."""

Report = Callable[[int, float], None]
"""Called with transferred bytes and the seconds that they took."""


class ThroughputMeter:
    """Times one direction of a connection while its sender has more to send than the connection takes.

    Bytes are counted from one moment at which something is known to have arrived to the next, so that neither the
    latency of the connection nor what its buffers hold counts as speed. The first arrival of a burst only starts the
    clock, and whoever sends too little to fill the connection is not counted at all.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._last_s = -math.inf
        self._since_s: float | None = None
        self._writers = 0

    def begin(self, now_s: float) -> None:
        """Note that a large write begins; it continues the burst unless the sender has paused."""
        if not self._writers and now_s - self._last_s > GAP_S:
            self._since_s = None
        self._writers += 1

    def end(self, now_s: float) -> None:
        """Note that a large write is over."""
        self._writers -= 1
        self._last_s = now_s

    def arrived(self, size: int, now_s: float) -> None:
        """Count bytes that have arrived by now, if they belong to a burst."""
        if not self._writers and now_s - self._last_s > GAP_S:
            return
        if self._since_s is not None and size:
            self._report(size, now_s - self._since_s)
        self._since_s = now_s
