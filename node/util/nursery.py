"""A nursery for the background tasks of a block."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background_nursery() -> AsyncIterator[trio.Nursery]:
    """Open a nursery that is cancelled when the block ends; an exception of the block is raised without a group."""
    fault: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:  # noqa: BLE001  # raised again below
            fault = error
        finally:
            nursery.cancel_scope.cancel()
    if fault is not None:
        raise fault
