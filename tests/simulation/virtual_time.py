"""Runs a program under virtual time, the same way every time: what trio leaves to chance is drawn from a seed.

The switch is private to trio. `test_virtual_time.py` fails on the day that it means something else.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar
from unittest.mock import patch

import trio
from trio._core import _run as trio_scheduler
from trio.testing import MockClock

T = TypeVar("T")


def run(program: Callable[[], Awaitable[T]], *, seed: int) -> T:
    """Return what a program comes to. Whenever all its tasks sleep, the clock jumps to the next deadline."""
    state = trio_scheduler._r.getstate()
    trio_scheduler._r.seed(seed)
    try:
        with patch.object(trio_scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", new=True):
            return trio.run(program, clock=MockClock(autojump_threshold=0))
    finally:
        trio_scheduler._r.setstate(state)
