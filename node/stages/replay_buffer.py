"""What stages keep so that a lost one can be replaced: the outputs they have sent. And from where each goes on then."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.tensors import Tensor

KEPT_BYTES: Final = 512 << 20
"""What the outputs kept by a span's sessions may take together: the rows of 200,000 positions of 640 elements."""

KEPT_SHARE: Final = 1 / 16
"""Of a span's memory, where that is less. A position's output takes a small part of what its keys and values take."""


def kept_bytes_of(memory_bytes: int) -> int:
    """Return what kept outputs may take of a span's memory."""
    return min(KEPT_BYTES, int(memory_bytes * KEPT_SHARE))


class Budget:
    """Bytes that many may take from, and give back."""

    def __init__(self, limit_bytes: int = KEPT_BYTES) -> None:
        self._free_bytes = limit_bytes

    def take(self, count: int) -> bool:
        """Take bytes (less than 0: give them back); say whether there were so many."""
        if count > self._free_bytes:
            return False
        self._free_bytes -= count
        return True


class ReplayBuffer:
    """The outputs of one session, end to end, as they were sent. Copied: what they come in is shared with others."""

    def __init__(self, budget: Budget) -> None:
        self.start = 0
        """The first position kept."""
        self._budget = budget
        self._data = bytearray()
        self._like: Tensor | None = None

    @property
    def end(self) -> int:
        """The position after the last that is kept."""
        return self.start + (len(self._data) // self._like.row_bytes if self._like else 0)

    def keep(self, position: int, rows: Tensor) -> None:
        """Keep rows, instead of those that were kept from their position on. Without room for them all is given up."""
        if not self.start <= position <= self.end:
            self.drop(position)
        before = len(self._data)
        del self._data[(position - self.start) * rows.row_bytes :]
        # Given back here if it is less than before.
        if not self._budget.take(len(self._data) + len(rows.data) - before):
            self._budget.take(-before)
            self._data.clear()
            self.start = position + rows.rows
            return
        self._data += rows.data
        self._like = rows.cut(0, 0)

    def drop(self, start: int = 0) -> None:
        """Give up everything, and begin anew at a position."""
        self._budget.take(-len(self._data))
        self._data.clear()
        self.start = start

    def pieces(self, start: int, end: int, rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yield positions `start` to `end`, `rows` at a time, each with its first position."""
        if self._like is None or not self.start <= start <= end <= self.end:
            raise ValueError(f"positions {start} to {end} are not among those kept, {self.start} to {self.end}")
        row_bytes = self._like.row_bytes
        for first in range(start, end, rows):
            last = min(first + rows, end)
            data = bytes(self._data[(first - self.start) * row_bytes : (last - self.start) * row_bytes])
            yield first, Tensor(self._like.dtype, (last - first, *self._like.shape[1:]), data)


@dataclass(frozen=True, slots=True)
class Held:
    """What a stage has of a session before it begins.

    `positions`, from the first on, need not be computed there; the outputs from `kept_from` on can be sent again.
    """

    positions: int
    kept_from: int


def starts_of(stages: Sequence[Held], last: int) -> list[int]:
    """Return for each stage, in order, the first position whose row it is to compute: as late as can be.

    Position `last`, whose row draws the next token, is computed by all. A stage whose next one starts earlier has kept
    the outputs between, or else it starts as early.
    """
    starts: list[int] = []
    following = last
    for stage in reversed(stages):
        start = min(stage.positions, last)
        if following < start and stage.kept_from > following:
            start = following
        starts.append(start)
        following = start
    return starts[::-1]
