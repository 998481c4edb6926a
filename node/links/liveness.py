"""Pings under way on a link: they tell a dead peer from one that is still receiving what was sent before."""

from collections import deque
from typing import Final

from protocol.messages import Ping

PONG_LIMIT_S: Final = 8.0
"""A link on which a ping is unanswered for this long is broken, whatever else trickles in."""

MAX_PENDING_PINGS: Final = 8
"""Pings that await their pong; more are of no use."""

UNACKED_BYTES: Final = 256 << 10
"""After this much a ping is sent, whose pong confirms that it has arrived."""

SLOWEST_BYTES_PER_S: Final = 500e3
"""What has not arrived is still in flight at this rate, and a pong behind it: a home's upstream of 4 Mb/s."""


class PingTracker:
    """Pings that await their pong, and how much of what was sent the pongs have confirmed."""

    def __init__(self) -> None:
        self._count = 0
        self._pending: deque[tuple[float, int]] = deque()
        """When each ping was sent, and how much had been sent before it."""
        self._pinged_bytes = 0
        """What had been sent before the last ping,"""
        self._acked_bytes = 0
        """and before the last that was answered."""

    @property
    def is_pending(self) -> bool:
        """Whether a pong is due."""
        return bool(self._pending)

    def is_due(self, sent_bytes: int) -> bool:
        """Whether so much was sent since the last ping that another should follow."""
        return sent_bytes - self._pinged_bytes > UNACKED_BYTES

    def ping(self, sent_bytes: int, now_s: float) -> Ping | None:
        """Return the next ping to send, unless enough are pending."""
        if len(self._pending) >= MAX_PENDING_PINGS:
            return None
        self._count += 1
        self._pending.append((now_s, sent_bytes))
        self._pinged_bytes = sent_bytes
        return Ping(nonce=self._count)

    def on_pong(self) -> None:
        """Take the answer to the oldest pending ping: they come in order."""
        _, self._acked_bytes = self._pending.popleft()

    def pending_s(self, now_s: float) -> float:
        """Return for how long the oldest ping has been unanswered."""
        return now_s - self._pending[0][0] if self._pending else 0.0

    def in_flight_s(self, sent_bytes: int) -> float:
        """Return how long what was sent may still be in flight: a ping behind it is answered no sooner."""
        return max(0, sent_bytes - self._acked_bytes - UNACKED_BYTES) / SLOWEST_BYTES_PER_S
