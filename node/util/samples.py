"""A series of samples over any length of time, in bounded memory."""

from typing import Generic, TypeVar

T = TypeVar("T")


class Samples(Generic[T]):
    """Samples at equal intervals. When they are too many, every second one goes, and the interval doubles."""

    def __init__(self, limit: int) -> None:
        """`limit`: an even number."""
        self._limit = limit
        self._samples: list[T] = []
        self._stride = 1
        self._skipped = 0

    def add(self, sample: T) -> None:
        """Add the sample of the next interval, unless the series has become coarser than that."""
        if self._skipped + 1 < self._stride:
            self._skipped += 1
            return
        self._skipped = 0
        self._samples.append(sample)
        if len(self._samples) >= self._limit:
            del self._samples[1::2]
            self._skipped = self._stride  # the last one that stays is that long ago
            self._stride *= 2

    def all(self) -> list[T]:
        """Return the samples, the oldest first."""
        return list(self._samples)
