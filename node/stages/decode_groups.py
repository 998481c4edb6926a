"""Which decoding sessions share a step: neither all at once, nor each when it comes. No clock, no I/O.

What one step computes arrives at the next stage together, so sessions go around the route in groups. Left alone, those
that began together stay one group for ever: while a stage computes for it, all other stages wait. Where a step takes
longer for more rows, as on a CPU, several smaller groups are faster, as every stage then has one (the micro-batches of
GPipe, arXiv 1811.06965). And sessions that began one after another never meet: two on one peer would take turns, each
in steps of its own, where a GPU reads the weights once for both. So a stage divides large groups, and waits a moment
for sessions that are about to be back, as far as its own times of steps say that this saves time.
"""

from typing import Final

from protocol.identity import SessionId
from protocol.limits import MAX_SLICES, MAX_STAGES

BETTER_BY: Final = 0.05
"""What another group must save of a round: each is another step, with its own messages."""

_SMOOTHING: Final = 0.1


class StepTimes:
    """A line through the times of steps over the numbers of sessions in them; older steps count less.

    Steps for equally many sessions say nothing of how the time grows: then it is taken to be proportional, so that
    others are tried.
    """

    FORGET: Final = 0.99
    ORIGIN_WEIGHT: Final = 0.001
    """Of an imagined empty step that takes no time, relative to a measured one."""

    def __init__(self) -> None:
        self._weight = self._count = self._took = self._count_count = self._count_took = 0.0

    def observe(self, count: int, took_s: float) -> None:
        """Record a step."""
        self._weight = self.FORGET * self._weight + 1
        self._count = self.FORGET * self._count + count
        self._took = self.FORGET * self._took + took_s
        self._count_count = self.FORGET * self._count_count + count * count
        self._count_took = self.FORGET * self._count_took + count * took_s

    @property
    def mean_count(self) -> float:
        """The number of sessions in a step; zero where none was measured."""
        return self._count / self._weight if self._weight else 0.0

    @property
    def mean_s(self) -> float:
        """The seconds that a step takes; zero where none was measured."""
        return self._took / self._weight if self._weight else 0.0

    def of(self, count: float) -> float:
        """Return the seconds of a step for so many sessions, by the line of the least squares."""
        weight = self._weight * (1 + self.ORIGIN_WEIGHT)
        mean, mean_s = self._count / weight, self._took / weight
        growth_s = (self._count_took / weight - mean * mean_s) / (self._count_count / weight - mean**2)
        return max(0.0, mean_s + max(0.0, growth_s) * (count - mean))


class DecodeGroups:
    """Divides the sessions that decode on a stage into groups."""

    def __init__(self) -> None:
        self._stages: dict[SessionId, int] = {}
        """Of the sessions that decode: the number of stages of the route."""
        self._away_s: dict[SessionId, float] = {}
        """Of those whose next rows are not here yet: when the last step for them ended."""
        self._elsewhere_s = 0.0
        """From there until the next rows are here."""
        self._times = StepTimes()

    def arrived(self, session: SessionId, now_s: float) -> None:
        """Record that the next rows of a session are here."""
        if (left_s := self._away_s.pop(session, None)) is not None:
            was_s = now_s - left_s
            self._elsewhere_s = _SMOOTHING * was_s + (1 - _SMOOTHING) * (self._elsewhere_s or was_s)

    def decoded(self, session: SessionId, stages: int, now_s: float) -> None:
        """Record that a step ended which drew for a session. `stages`: those of its route."""
        self._stages[session] = min(stages, MAX_STAGES)  # it is the coordinator's word
        self._away_s[session] = now_s

    def observe(self, count: int, took_s: float) -> None:
        """Record the time of a step that drew for so many sessions, and did nothing else."""
        self._times.observe(count, took_s)

    def remove(self, session: SessionId) -> None:
        """Forget a session that has ended."""
        self._stages.pop(session, None)
        self._away_s.pop(session, None)

    def size(self) -> int:
        """Return how many sessions the next step has at most: a group of the fastest division."""
        sessions, mean_s = len(self._stages), self._times.mean_s
        chosen, chosen_s = 1, float("inf")
        for groups in range(1, min(sessions, max(self._stages.values(), default=1)) + 1) if mean_s else ():
            step_s = self._times.of(sessions / groups)
            # The other stages are taken to be like this one.
            round_s = max(groups * step_s, step_s + self._elsewhere_s * step_s / mean_s)
            if round_s < (1 - BETTER_BY) * chosen_s:
                chosen, chosen_s = groups, round_s
        return MAX_SLICES if chosen == 1 else -(-sessions // chosen)

    def worth_waiting_s(self) -> float:
        """Return how long a step may wait for a session that is about to be back: less than a step of its own costs.

        Where it is alone in the next step it stays alone: two sessions on one peer would take turns for ever. None is
        saved where the engine is idle between the steps of a round.
        """
        times = self._times
        if not times.mean_s or not self._elsewhere_s:
            return 0.0
        round_s = self._elsewhere_s + times.mean_s
        if len(self._stages) / times.mean_count * times.mean_s < round_s:
            return 0.0
        return max(times.of(0), times.mean_s / 8)

    def is_expected(self, from_s: float, until_s: float) -> bool:
        """Return whether the rows of another session should be here in this time."""
        return any(from_s <= left_s + self._elsewhere_s <= until_s for left_s in self._away_s.values())
