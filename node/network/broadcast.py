"""One writer, many readers, without backpressure: a reader that lags loses the oldest items."""

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class _Reader(Generic[T]):
    def __init__(self, capacity: int) -> None:
        self.items: deque[T] = deque(maxlen=capacity)
        self.arrived = trio.lowlevel.ParkingLot()
        self.ended = False

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self.items:
            if self.ended:
                raise StopAsyncIteration
            await self.arrived.park()
        return self.items.popleft()


class Broadcast(Generic[T]):
    """Passes every item to all current readers, each of which may lag by up to `capacity` items."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._readers: list[_Reader[T]] = []

    def put(self, item: T) -> None:
        """Hand the item to every reader."""
        for reader in self._readers:
            reader.items.append(item)
            reader.arrived.unpark_all()

    def end(self) -> None:
        """End the readers after the items they have."""
        for reader in self._readers:
            reader.ended = True
            reader.arrived.unpark_all()

    @asynccontextmanager
    async def reader(self) -> AsyncIterator[AsyncIterator[T]]:
        """Read the items put while the block lasts."""
        reader: _Reader[T] = _Reader(self._capacity)
        self._readers.append(reader)
        try:
            yield reader
        finally:
            self._readers.remove(reader)
