"""The numbers that order what this node signs."""

from collections.abc import Callable, Iterator


class SequenceNumbers(Iterator[int]):
    """Ascending numbers: Unix time in milliseconds, wherever that is higher.

    So a restarted node continues above its earlier numbers without having stored them. Of two nodes with one key, as of
    a copied data directory, the one that is left is heard again at once: neither began above all numbers to come.
    """

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self.last = 0

    def __next__(self) -> int:
        self.skip_to(int(self._wall_clock() * 1000))
        self.last += 1
        return self.last

    def skip_to(self, number: int) -> None:
        """Continue above a number."""
        self.last = max(self.last, number)
