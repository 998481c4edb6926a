"""Compares this machine's clock with those of connected peers, by the times of issue in their heartbeats.

Peers refuse what a wrong clock signed, and a wrong clock refuses what they sign: nothing else would tell.
"""

import math
import statistics
from collections.abc import Callable, Collection
from typing import NamedTuple

import structlog
import trio

from protocol.identity import PeerId
from protocol.limits import MAX_CLOCK_SKEW_S, MAX_HEARTBEAT_INTERVAL_MS

RECENT_S = 2 * MAX_HEARTBEAT_INTERVAL_MS / 1000
"""A heartbeat counts for this long."""

TOLERANCE_S = MAX_CLOCK_SKEW_S / 2
"""Half of the skew that peers accept: heartbeats take seconds, and clocks drift on."""

SETTLE_S = 60.0
"""For so long after the clock has jumped, as when it is set or the machine wakes up, heartbeats do not tell that it is
wrong: they may have waited since before, in a buffer of ours or of a peer that still believed in the connection."""

_logger = structlog.get_logger(__name__)


class _Heard(NamedTuple):
    ahead_s: float
    """How far our clock was ahead."""
    at_s: float


class ClockCheck:
    """The last heartbeat of each connected peer, timely or not: there is one vote for each connection."""

    def __init__(self, connected: Callable[[], Collection[PeerId]], wall_clock: Callable[[], float]) -> None:
        self._connected = connected
        self._wall_clock = wall_clock
        self._heard: dict[PeerId, _Heard] = {}
        self._is_off = False
        self._start_s = self._start_of_clock()
        self._settled_at_s = -math.inf

    def on_heartbeat(self, peer: PeerId, issued_at_s: int) -> None:
        """Note a heartbeat that a peer signed; only those of connected peers count."""
        self._notice_jump()
        ahead_s = self._wall_clock() - issued_at_s - 0.5  # the time of issue is in whole seconds
        is_credible = abs(ahead_s) <= TOLERANCE_S or trio.current_time() >= self._settled_at_s
        if peer in self._connected() and is_credible:
            self._heard[peer] = _Heard(ahead_s, trio.current_time())

    def _start_of_clock(self) -> float:
        """Return the Unix time at which trio's clock, which stands still in sleep, was 0."""
        return self._wall_clock() - trio.current_time()

    def _notice_jump(self) -> None:
        """Forget what was heard by another time than the present one."""
        before_s, self._start_s = self._start_s, self._start_of_clock()
        if abs(self._start_s - before_s) > TOLERANCE_S:
            self._heard.clear()
            self._settled_at_s = trio.current_time() + SETTLE_S

    def _recent(self) -> list[_Heard]:
        self._notice_jump()
        connected, now_s = set(self._connected()), trio.current_time()
        self._heard = {
            peer: each for peer, each in self._heard.items() if peer in connected and now_s - each.at_s < RECENT_S
        }
        return list(self._heard.values())

    def ahead_s(self) -> float | None:
        """Return how far our clock is ahead of those of connected peers: the median, None while none was heard."""
        return statistics.median(each.ahead_s for each in heard) if (heard := self._recent()) else None

    def warn(self) -> None:
        """Log once when our clock differs too much from those of connected peers."""
        ahead_s = self.ahead_s()
        was_off, self._is_off = self._is_off, ahead_s is not None and abs(ahead_s) > TOLERANCE_S
        if self._is_off and not was_off and ahead_s is not None:
            _logger.warning(describe_skew(ahead_s), connected_peers_heard=len(self._heard))

    def is_confirmed(self) -> bool:
        """Return whether connected peers agree with our clock, which was not set since they were heard."""
        heard = self._recent()
        return bool(heard) and abs(statistics.median(each.ahead_s for each in heard)) <= MAX_CLOCK_SKEW_S

    def agrees(self) -> bool | None:
        """Return whether peers agree with our clock; None where that is not known, False if most clocks differ.

        Ours counts, too: one wrong clock among three does not make the others doubt theirs.
        """
        if self.is_confirmed():
            return True
        heard = self._recent()
        differing = sum(abs(each.ahead_s) > MAX_CLOCK_SKEW_S for each in heard)
        return False if 2 * differing > len(heard) + 1 else None


def describe_skew(ahead_s: float) -> str:
    """Return what is wrong with this machine's clock, and what to do."""
    return (
        f"this machine's clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} those of connected "
        f"peers, which accept at most {MAX_CLOCK_SKEW_S} s: set the clock"
    )
