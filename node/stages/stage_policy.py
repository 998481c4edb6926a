"""The stage policy that fits the load: changes slowly, because every change disturbs the sessions there are."""

from typing import Final

from node.stages.scheduler import Batching, StagePolicy

STALL_BOUND_S: Final = 0.25
"""What a newcomer's prompt may add to the step of those who decode."""

HOLD_S: Final = 5.0
"""How long another policy must have been the better one before it comes into force."""

STEP_ROWS: Final = (32, 64, 128, 256, 512)
"""Row budgets to choose from."""

_SMOOTHING: Final = 0.2
_MIN_ROWS: Final = 16
"""Steps with fewer rows say little about what a row costs."""


class PolicyController:
    """Watches what rows cost and says which policy is in force; one that the operator fixed stays."""

    def __init__(self, *, batching: Batching | None = None, step_rows: int | None = None) -> None:
        self._fixed_step_rows = step_rows
        self.policy = StagePolicy(batching or Batching.CONTINUOUS, step_rows or StagePolicy().step_rows)
        self._row_s = 0.0
        self._better: int | None = None
        self._better_since_s = 0.0

    def observe(self, rows: int, compute_s: float, now_s: float) -> StagePolicy:
        """Take note of a step, and return the policy for the next."""
        if rows >= _MIN_ROWS:
            row_s = compute_s / rows
            self._row_s = row_s if not self._row_s else self._row_s + _SMOOTHING * (row_s - self._row_s)
        if self._row_s and self._fixed_step_rows is None:
            self._settle(self._fitting(), now_s)
        return self.policy

    def _fitting(self) -> int:
        """Return the largest budget that keeps to the bound."""
        return max((rows for rows in STEP_ROWS if rows * self._row_s <= STALL_BOUND_S), default=STEP_ROWS[0])

    def _settle(self, step_rows: int, now_s: float) -> None:
        if step_rows == self.policy.step_rows:
            self._better = None
        elif step_rows != self._better:
            self._better, self._better_since_s = step_rows, now_s
        elif now_s - self._better_since_s >= HOLD_S:
            self.policy = StagePolicy(self.policy.batching, step_rows)
            self._better = None
