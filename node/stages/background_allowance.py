"""Bounds what trials and measurements of other peers compute here.

Those peers bound themselves, but each of them for itself, and by what is computed for users on its own machine. What
all of them together take from this one is for this node to say.
"""

from collections.abc import Callable
from typing import Final

import trio

from node.util.token_bucket import Allowance, TokenBucket

RATE: Final = Allowance(per_s=2 / 60, burst=120.0)
"""Processor seconds. The burst is what a few trials take over a route of which this node is a part."""

USUAL_SHARE: Final = 0.1
"""Of the computing for users, which comes on top."""


class BackgroundAllowance:
    """What is left for other peers' trials and measurements: two processor seconds a minute, and a share of the use."""

    def __init__(self, share: float, threads: Callable[[], int] = lambda: 1) -> None:
        """`share`: of the computing for users here, 0 for no trials of others at all. `threads`: busy ones."""
        self._share = share
        self._threads = threads
        self._bucket: TokenBucket | None = None

    @property
    def is_left(self) -> bool:
        """Whether a session may be opened."""
        return self._share > 0 and self._filled().level(trio.current_time()) > 0

    def charge(self, seconds: float) -> None:
        """Record that other peers' measurements had an engine compute for so long."""
        self._filled().spend(self._threads() * seconds, trio.current_time())

    def earn(self, seconds: float) -> None:
        """Record that users had an engine compute for so long."""
        self._filled().spend(-self._share * self._threads() * seconds, trio.current_time())

    def _filled(self) -> TokenBucket:
        if self._bucket is None:
            self._bucket = RATE.bucket(trio.current_time())
        return self._bucket
