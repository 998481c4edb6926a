"""A set of epochs of bounded size, which may grow by itself but never forgets one."""

from collections.abc import Iterable
from typing import Final, NamedTuple

MAX_RANGES: Final = 64


class EpochRange(NamedTuple):
    """Consecutive epochs, both ends included."""

    first: int
    last: int


class EpochSet:
    """Epochs as a few ranges: of too many the two that are closest become one, with the epochs between them."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self.ranges: tuple[EpochRange, ...] = ()
        """Ascending, and apart from each other."""
        self.update(ranges)

    def __contains__(self, epoch: int) -> bool:
        return any(each.first <= epoch <= each.last for each in self.ranges)

    def add(self, *epochs: int) -> None:
        """Add epochs."""
        self.update((epoch, epoch) for epoch in epochs)

    def update(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Add ranges of epochs."""
        united: list[EpochRange] = []
        for first, last in sorted((*self.ranges, *ranges)):
            if united and first <= united[-1].last + 1:
                united[-1] = EpochRange(united[-1].first, max(last, united[-1].last))
            else:
                united.append(EpochRange(first, last))
        while len(united) > MAX_RANGES:
            closest = min(range(1, len(united)), key=lambda at: united[at].first - united[at - 1].last)
            united[closest - 1 : closest + 1] = [EpochRange(united[closest - 1].first, united[closest].last)]
        self.ranges = tuple(united)


class SignedEpochs:
    """The epochs in which we signed, for a clock that may be set: we never sign two statements of one epoch."""

    def __init__(self) -> None:
        self.voted: set[int] = set()
        """Recent epochs in which we voted, and those ahead of the clock. They forbid no other."""
        self.closed = EpochSet()
        """Earlier epochs: what we signed in them is not held any more."""

    def may_vote(self, epoch: int) -> bool:
        """Return whether we have not voted in an epoch, as far as we know."""
        return epoch not in self.voted and epoch not in self.closed

    def prune(self, oldest: int) -> None:
        """Close the epochs before one."""
        self.closed.add(*(epoch for epoch in self.voted if epoch < oldest))
        self.voted = {epoch for epoch in self.voted if epoch >= oldest}
