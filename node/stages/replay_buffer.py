"""Replay buffer: outputs that a stage has sent, retained so that a replacement stage can be re-fed after a failover.

And the plan of a failover: from which position each stage of the new route resumes; and the state of a session that the
one which continues it takes over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from node.engine.interface import KvCompatibilityKey
from node.stages.step_timings import StepTimings
from protocol.messages import SessionStatistics
from protocol.tensors import Tensor
from selector.task import Method

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


@dataclass(slots=True)
class SessionCounters:
    """What a session has cost so far; see SessionStatistics."""

    steps: int = 0
    rows: int = 0
    compute_s: float = 0.0
    queue_s: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0

    def statistics(self) -> SessionStatistics:
        """Return the counts as they are now."""
        return SessionStatistics(**asdict(self))


@dataclass(slots=True)
class ResumableState:
    """What the engine and the replay buffer hold of a session.

    `method`: how the engine calculates it. `computed`: positions that the engine holds. `reserved_positions`: KV memory
    that is reserved, or about to be; more than a session asks for where it continues a larger one.
    """

    replay: ReplayBuffer
    method: Method | None = None
    cached: Mapping[KvCompatibilityKey, int] = field(default_factory=dict)
    computed: int = 0
    reserved_positions: int = 0
    short_idle_s: float = 0.0
    """How long it was idle while its peer held most of the KV memory that others were refused."""
    counters: SessionCounters = field(default_factory=SessionCounters)
    timings: StepTimings | None = None
    """Once the coordinator has asked for them."""
    reported_bytes: tuple[int, int] = 0, 0
    """What came in and went out for sessions of it that have ended: counters go on when another continues one."""

    def report_bytes(self) -> tuple[int, int]:
        """Return what came in and went out since the last report."""
        (before_in, before_out), counters = self.reported_bytes, self.counters
        self.reported_bytes = counters.bytes_in, counters.bytes_out
        return counters.bytes_in - before_in, counters.bytes_out - before_out

    @property
    def replay_from(self) -> int:
        """The outputs from there to `computed` can be replayed."""
        return min(self.replay.start, self.computed) if self.replay.end >= self.computed else self.computed
