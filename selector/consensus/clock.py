"""When in an epoch what is due. Clocks of peers may differ by a small part of an epoch."""

from dataclasses import dataclass
from typing import Final

EPOCH_S: Final = 600.0
"""The length of an epoch, seconds; the first began with Unix time."""

COMMIT_UNTIL: Final = 0.6
"""The part of the epoch for measuring; what was measured by then is committed to."""

REVEAL_FROM: Final = 0.7
"""Nobody reveals before; and no commit that came later counts, because its maker may have seen what others revealed."""

PROPOSE_FROM: Final = 0.8
TURN: Final = 0.04
"""The first of the committee proposes, then, where nothing valid came, the second, and so on."""


@dataclass(frozen=True, slots=True)
class EpochClock:
    """Epochs and their phases. All times are Unix times in seconds."""

    epoch_s: float = EPOCH_S

    def epoch_at(self, now_s: float) -> int:
        """Return the number of the epoch at a time."""
        return int(now_s // self.epoch_s)

    def starts_s(self, epoch: int) -> float:
        """Return when an epoch begins."""
        return epoch * self.epoch_s

    def commits_end_s(self, epoch: int) -> float:
        """Return until when to measure and commit."""
        return (epoch + COMMIT_UNTIL) * self.epoch_s

    def reveals_begin_s(self, epoch: int) -> float:
        """Return when readings are revealed."""
        return (epoch + REVEAL_FROM) * self.epoch_s

    def proposes_s(self, epoch: int, turn: int) -> float:
        """Return when a member of the committee may propose; `turn` counts from 0."""
        return (epoch + PROPOSE_FROM + TURN * turn) * self.epoch_s

    def turns(self) -> int:
        """Return how many members of the committee get their turn before the epoch ends."""
        return int((1 - PROPOSE_FROM) / TURN)
