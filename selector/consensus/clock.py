"""The phases of an epoch: measure and commit, reveal, propose and sign. Clocks may differ by a small part of it."""

from dataclasses import dataclass
from typing import Final, Literal

EPOCH_S: Final = 600.0
"""The length of an epoch, seconds; epoch 0 began at Unix time 0."""

COMMIT_UNTIL: Final = 0.6
"""The fraction of the epoch for measuring and committing."""

LIST_UNTIL: Final = 0.65
"""A commit received by then is put on the inclusion list."""

REVEAL_FROM: Final = 0.7
"""Reveals begin; a commit received later does not count, because its signer may have seen others' readings."""

REVEAL_UNTIL: Final = 0.75
"""A reveal received by then cannot be left out. What one honest peer received by now, or by LIST_UNTIL, has reached all
others when the next step begins: what one of them requires is required by no one who lacks it."""

PROPOSE_FROM: Final = 0.8
TURN: Final = 0.05
TURNS: Final = 4
"""The first of the committee proposes; without a valid proposal the second, and so on, until the epoch ends. A turn is
as long as a message may take."""

Phase = Literal["measure", "reveal", "propose"]


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
        """Return when the time for measuring and committing ends."""
        return (epoch + COMMIT_UNTIL) * self.epoch_s

    def lists_end_s(self, epoch: int) -> float:
        """Return until when a commit must be received to be put on the inclusion list."""
        return (epoch + LIST_UNTIL) * self.epoch_s

    def reveals_end_s(self, epoch: int) -> float:
        """Return until when a reveal must be received that cannot be left out."""
        return (epoch + REVEAL_UNTIL) * self.epoch_s

    def reveals_begin_s(self, epoch: int) -> float:
        """Return when readings are revealed."""
        return (epoch + REVEAL_FROM) * self.epoch_s

    def proposes_s(self, epoch: int, turn: int) -> float:
        """Return when a member of the committee may propose; `turn` counts from 0."""
        return (epoch + PROPOSE_FROM + TURN * turn) * self.epoch_s

    def phase_at(self, now_s: float) -> Phase:
        """Return what members do at a time."""
        epoch = self.epoch_at(now_s)
        if now_s < self.reveals_begin_s(epoch):
            return "measure"
        return "reveal" if now_s < self.proposes_s(epoch, 0) else "propose"

    def phase_ends_s(self) -> dict[Phase, float]:
        """Return when each phase ends, in order, in seconds after the epoch's beginning."""
        return {"measure": REVEAL_FROM * self.epoch_s, "reveal": PROPOSE_FROM * self.epoch_s, "propose": self.epoch_s}

    def turns(self) -> int:
        """Return how many members of the committee get their turn in an epoch."""
        return TURNS

    def next_phase_s(self, now_s: float) -> float:
        """Return when the next phase begins or the next proposer's turn comes."""
        epoch = self.epoch_at(now_s)
        turns = (self.proposes_s(epoch, turn) for turn in range(self.turns()))
        phases = (self.commits_end_s(epoch), self.reveals_begin_s(epoch), *turns, self.starts_s(epoch + 1))
        return min(phase for phase in phases if phase > now_s)
