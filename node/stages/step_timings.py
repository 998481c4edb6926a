"""Where the time of a session's steps goes on this stage, for a coordinator that traces its job."""

from collections import deque
from typing import Any, Final

from node.stages.scheduler import Work
from protocol.identity import SessionId
from protocol.limits import MAX_TIMED_STEPS
from protocol.reports import StepTiming, Timings

RETAINED_STEPS: Final = 2 * MAX_TIMED_STEPS
"""Steps of a session that await the next request."""


def step_timing(work: Work[Any], began_s: float, compute_s: float, now_s: float) -> StepTiming:
    """Return where the time of a step went that began at `began_s` and whose outputs are handed to the links now."""
    queue_s, rest_s = began_s - work.received_s, now_s - began_s - compute_s
    return StepTiming(work.part.position, work.rows, work.received_s, queue_s, compute_s, max(0.0, rest_s))


class StepTimings:
    """The timing of one session's steps since its coordinator last asked for it."""

    def __init__(self) -> None:
        self._steps: deque[StepTiming] = deque(maxlen=RETAINED_STEPS)
        self._dropped = 0

    def add(self, step: StepTiming) -> None:
        """Append a step; the oldest that was not collected is dropped for it, if need be."""
        self._dropped += len(self._steps) == self._steps.maxlen
        self._steps.append(step)

    def collect(self, session: SessionId, clock_s: float) -> Timings:
        """Return, and forget, the oldest steps, as many as fit into one message."""
        count = min(len(self._steps), MAX_TIMED_STEPS)
        steps = tuple(self._steps.popleft() for _ in range(count))
        return Timings(session=session, clock_s=clock_s, steps=steps, dropped=self._dropped)
