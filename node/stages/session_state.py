"""State of a session that outlives it: a session of another route that continues it takes it over."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from node.engine.interface import KvCompatibilityKey
from node.stages.replay_buffer import ReplayBuffer
from protocol.messages import SessionStatistics
from selector.task import Method


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
    counters: SessionCounters = field(default_factory=SessionCounters)

    @property
    def replay_from(self) -> int:
        """The outputs from there to `computed` can be replayed."""
        return min(self.replay.start, self.computed) if self.replay.end >= self.computed else self.computed
