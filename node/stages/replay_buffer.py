"""Replay buffer: outputs that a stage has sent, retained so that a replacement stage can be re-fed after a failover.

And the plan of a failover: from which position each stage of the new route resumes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from protocol.tensors import Tensor

REPLAY_BYTES: Final = 512 << 20
"""Limit of the replay buffers of a span's sessions together: the rows of 200,000 positions of 640 elements."""

REPLAY_SHARE: Final = 1 / 16
"""Of a span's memory, where that is less. A position's output is a small part of its keys and values."""


def replay_bytes_of(memory_bytes: int) -> int:
    """Return how much of a span's memory replay buffers may take."""
    return min(REPLAY_BYTES, int(memory_bytes * REPLAY_SHARE))


class ReplayMemory:
    """Bytes that the replay buffers of a span share."""

    def __init__(self, limit_bytes: int = REPLAY_BYTES) -> None:
        self._free_bytes = limit_bytes

    def take(self, count: int) -> bool:
        """Take bytes (less than 0: return them); return whether there were enough."""
        if count > self._free_bytes:
            return False
        self._free_bytes -= count
        return True


class ReplayBuffer:
    """The contiguous outputs of one session, as they were sent. Copied: a batch's outputs share memory."""

    def __init__(self, memory: ReplayMemory) -> None:
        self.start = 0
        """The first position retained."""
        self._memory = memory
        self._data = bytearray()
        self._like: Tensor | None = None

    @property
    def end(self) -> int:
        """The position after the last one retained."""
        return self.start + (len(self._data) // self._like.row_bytes if self._like else 0)

    def write(self, position: int, rows: Tensor) -> None:
        """Retain rows, replacing those from their position on. Drops everything when the memory is short."""
        if not self.start <= position <= self.end:
            self.drop(position)
        before = len(self._data)
        del self._data[(position - self.start) * rows.row_bytes :]
        # Returned here if it is less than before.
        if not self._memory.take(len(self._data) + len(rows.data) - before):
            self._memory.take(-before)
            self._data.clear()
            self.start = position + rows.rows
            return
        self._data += rows.data
        self._like = rows.cut(0, 0)

    def drop(self, start: int = 0) -> None:
        """Drop everything, and start anew at a position."""
        self._memory.take(-len(self._data))
        self._data.clear()
        self.start = start

    def read(self, start: int, end: int) -> Tensor:
        """Return a copy of the outputs of positions `start` to `end`. Raises ValueError when they are not retained."""
        if self._like is None or not self.start <= start <= end <= self.end:
            raise ValueError(f"positions {start} to {end} are not in the replay buffer, {self.start} to {self.end}")
        row_bytes = self._like.row_bytes
        data = bytes(self._data[(start - self.start) * row_bytes : (end - self.start) * row_bytes])
        return Tensor(self._like.dtype, (end - start, *self._like.shape[1:]), data)


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What a stage holds of a session before it begins.

    `positions`, from the first on, need not be computed there; the outputs from `replay_from` on can be replayed.
    """

    positions: int
    replay_from: int


def plan_resume(stages: Sequence[ResumePoint], last: int) -> list[int]:
    """Return for each stage, in order, the first position whose row it computes: as late as possible.

    Position `last`, whose row draws the next token, is computed by all. A stage whose next one starts earlier replays
    the outputs between, or else it starts as early.
    """
    starts: list[int] = []
    following = last
    for stage in reversed(stages):
        start = min(stage.positions, last)
        if following < start and stage.replay_from > following:
            start = following
        starts.append(start)
        following = start
    return starts[::-1]
