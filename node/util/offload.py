"""Where work that takes long is done: beside the event loop, or, in virtual time, at once."""

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import trio

_T = TypeVar("_T")


class Offload(Protocol):
    """Does work and returns what it returns."""

    def __call__(self, work: Callable[[], _T], /) -> Awaitable[_T]:
        """Do it somewhere."""


async def run_in_thread(work: Callable[[], _T]) -> _T:
    """Do it beside the event loop, which goes on meanwhile."""
    return await trio.to_thread.run_sync(work)


async def run_inline(work: Callable[[], _T]) -> _T:
    """Do it at once: in virtual time a thread would be overtaken by the clock."""
    await trio.lowlevel.checkpoint()
    return work()
