"""Straggler detection: which stage delays a job, judged by progress and not by liveness. Pure: no clock, no I/O.

Positions run through a route in order: a stage cannot compute a row that the one before has not. So the first stage on
the route that has its input and does not advance is the one that all others wait for. A stage's report is checked
against its neighbours: one that claims to have computed what the next one never received is in a dispute with it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

SILENT_LIMIT: Final = 2.0, 3.0
"""A stage without progress may take this many seconds, or this multiple of the expected time;"""

REPORTING_LIMIT: Final = 3.0, 8.0
"""one that reports that it computes may take longer, since the expected time may be far off, and so may one of an
older version that cannot report, and one whose input is still at the stage before;"""

MOST_LIMIT_S: Final = 60.0
"""and none longer than this, whatever is expected of it, while another peer could do its work."""

PACE_LIMIT: Final = 15.0, 30.0
"""Even while positions advance, a token may take this many seconds, or this multiple of the expected time of all."""


class Progress(NamedTuple):
    """A stage's report: the first position that it has not received, not computed, and not sent."""

    received: int
    computed: int
    sent: int


@dataclass(frozen=True, slots=True)
class Lag:
    """Stages one of which has its input and makes no progress; more than one where nothing tells them apart.

    `earlier`: the stage before, if it claims to have sent what the suspect denies or does not report.
    """

    suspects: tuple[int, ...]
    earlier: int | None
    waited_s: float
    limit_s: float


class StragglerDetector:
    """The progress of each stage of an open route."""

    def __init__(
        self,
        starts: Sequence[int],
        end: int,
        expected_s: Callable[[int, int], float],
        now_s: float,
        *,
        unreporting: Collection[int] = (),
        floors_s: Sequence[float] = (),
        leniency: float = 1.0,
    ) -> None:
        """Begin when the route does.

        `starts`: the first position that each stage computes. `end`: the position after the last row that is sent to
        the first stage. `expected_s`: expected time of a stage for a number of rows, their transfer to it included.
        `unreporting`: stages that cannot report. `floors_s`: each stage's lower limit. `leniency`: multiplies all
        limits.
        """
        self._leniency = leniency
        self._expected_s = expected_s
        self._unreporting = frozenset(unreporting)
        self._floors_s = tuple(floors_s) or (0.0,) * len(starts)
        self._end = end
        self._has_token = False
        """A token came: from then on the first stage's input comes from the last one."""
        self._computed = list(starts)
        self._reports: list[Progress | None] = [None] * len(starts)
        self._reported: set[int] = set()
        """Stages that have reported since the last token."""
        self._began_s = now_s
        self._since_s = [now_s] * len(starts)
        """When each stage last advanced."""
        self._moved_s = now_s
        self._whole_s: float | None = None
        """Expected time of all stages together until the next token; None until it is needed."""

    def token(self, position: int, now_s: float, *, is_fed_back: bool = True) -> None:
        """Record the token for a position: every stage has computed the rows before it.

        `is_fed_back`: whether it goes to the first stage, too, as one of the text.
        """
        self._end = max(self._end, position + 1)
        self._has_token = self._has_token or is_fed_back
        self._computed = [max(computed, position) for computed in self._computed]
        self._wait_from(now_s)
        self._began_s = self._moved_s = now_s

    def wait(self, now_s: float) -> None:
        """Begin to wait for the next token: time before now counts against no stage."""
        self._wait_from(now_s)
        self._began_s = max(self._began_s, now_s)
        self._moved_s = max(self._moved_s, now_s)
        self._whole_s = None

    def report(self, stage: int, progress: Progress, now_s: float) -> None:
        """Record a stage's report; it counts as progress where it goes beyond the one before."""
        self._whole()  # before it moves
        before = [(has, self._done(number)) for number, has in enumerate(self._inputs())]
        known, is_first = self._reports[stage], stage not in self._reported
        self._reported.add(stage)
        reported = Progress(*(min(self._end, max(pair)) for pair in zip(progress, known or (0, 0, 0), strict=True)))
        self._reports[stage] = reported
        if is_first:  # it may have come so far long ago
            return
        if reported != known:
            self._since_s[stage] = self._moved_s = now_s
        if known is not None and reported.sent > known.sent and stage + 1 < len(self._since_s):
            self._since_s[stage + 1] = now_s  # its input is on its way
        after = [(has, self._done(number)) for number, has in enumerate(self._inputs())]
        for number, (stood, stands) in enumerate(zip(before, after, strict=True)):
            if stands != stood:
                self._since_s[number] = self._moved_s = now_s

    def still_s(self, now_s: float) -> float:
        """Return the time since any stage last advanced."""
        return now_s - self._moved_s

    def total_s(self) -> float:
        """Return the expected time of all stages together for the rows that they have left."""
        return sum(self._expected_s(number, max(1, rows)) for number, rows in enumerate(self._rows_left()))

    def find(self, now_s: float) -> Lag | None:
        """Return the straggler, if a stage has delayed the route beyond its limit."""
        inputs, left = self._inputs(), self._rows_left()
        expected_s = 0.0
        for number, rows in enumerate(left):
            expected_s += self._expected_s(number, max(1, rows))
            if rows > 0 or number == len(left) - 1:
                break
        report = self._reports[number]
        suspects = [number]
        if report is None:
            for following in range(number + 1, len(left)):
                if self._reports[following] is not None:
                    break
                suspects.append(following)
                expected_s += self._expected_s(following, max(1, inputs[number] - self._done(following)))
        computes = report is not None and report.received >= inputs[number] > report.computed
        before = self._reports[number - 1] if number else None
        is_held_back = before is not None and before.sent < min(before.computed, inputs[number])
        may_take_longer = computes or is_held_back or not self._unreporting.isdisjoint(suspects)
        least_s, factor = REPORTING_LIMIT if may_take_longer else SILENT_LIMIT
        limit_s = max(least_s, factor * expected_s, *(self._floors_s[suspect] for suspect in suspects))
        pace_s = max(PACE_LIMIT[0], PACE_LIMIT[1] * self._whole())
        limit_s = self._leniency * min(MOST_LIMIT_S, limit_s)
        waited_s, passed_s = now_s - self._since_s[number], now_s - self._began_s
        if waited_s < limit_s and passed_s < self._leniency * pace_s:
            return None
        earlier = None
        if not computes and rows > 0 and (number or self._has_token):
            earlier = (number - 1) % len(left)
        return Lag(tuple(suspects), None if earlier in suspects else earlier, max(waited_s, passed_s), limit_s)

    def _whole(self) -> float:
        """Return the expected time of all stages when the wait for the token began; lazily, as most are not late."""
        if self._whole_s is None:
            self._whole_s = self.total_s()
        return self._whole_s

    def _wait_from(self, now_s: float) -> None:
        self._reported.clear()
        self._since_s = [now_s] * len(self._since_s)

    def _done(self, stage: int) -> int:
        """Return the first position that a stage has not computed, by its own reports and those of the stages after."""
        report = self._reports[stage]
        shown = [self._computed[stage], *([report.computed] if report else [])]
        shown += [later.received for later in self._reports[stage + 1 :] if later]
        return min(self._end, max(shown))

    def _inputs(self) -> list[int]:
        """Return, for each stage, the position after the last row that the one before has computed."""
        return [self._end, *(self._done(stage) for stage in range(len(self._computed) - 1))]

    def _rows_left(self) -> list[int]:
        return [max(0, has - self._done(stage)) for stage, has in enumerate(self._inputs())]
