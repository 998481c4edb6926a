"""Stage policy: fits the row budget of chunked prefill to the load, slowly, as every change disturbs the sessions."""

from typing import Final

from node.stages.scheduler import Batching, StagePolicy

STALL_BOUND_S: Final = 0.25
"""What a chunk of a new prompt may add to the step of decoding sessions."""

HOLD_S: Final = 5.0
"""How long another policy must have been better before it takes effect."""

STEP_ROWS: Final = (32, 64, 128, 256, 512)
"""Row budgets to choose from."""

_SMOOTHING: Final = 0.2
_MIN_ROWS: Final = 16
"""Steps with fewer rows show little of the cost of a row."""


class PolicyController:
    """Measures the cost of rows and chooses the policy; one that the operator fixed stays."""

    def __init__(self, *, batching: Batching | None = None, step_rows: int | None = None) -> None:
        self._fixed_step_rows = step_rows
        self.policy = StagePolicy(batching or Batching.CONTINUOUS, step_rows or StagePolicy().step_rows)
        self._row_s = 0.0
        self._better: int | None = None
        self._better_since_s = 0.0

    def observe(self, rows: int, compute_s: float, now_s: float) -> StagePolicy:
        """Record a step, and return the policy for the next."""
        if rows >= _MIN_ROWS:
            row_s = compute_s / rows
            self._row_s = row_s if not self._row_s else self._row_s + _SMOOTHING * (row_s - self._row_s)
        if self._row_s and self._fixed_step_rows is None:
            self._settle(self._fitting(), now_s)
        return self.policy

    def _fitting(self) -> int:
        """Return the largest row budget within the stall bound."""
        return max((rows for rows in STEP_ROWS if rows * self._row_s <= STALL_BOUND_S), default=STEP_ROWS[0])

    def _settle(self, step_rows: int, now_s: float) -> None:
        if step_rows == self.policy.step_rows:
            self._better = None
        elif step_rows != self._better:
            self._better, self._better_since_s = step_rows, now_s
        elif now_s - self._better_since_s >= HOLD_S:
            self.policy = StagePolicy(self.policy.batching, step_rows)
            self._better = None
