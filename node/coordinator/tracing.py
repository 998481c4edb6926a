"""Traces a job: where the time of each token went on each stage of its route, as the stages measured it.

The stages' clocks start anywhere. Only the way between two stages depends on how they compare: for each stage the
exchange with the shortest round trip says how far its clock is from ours, to within half of that round trip. What a
token took from its draw to the next one's does not depend on it, as a round comes back to where it began.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import trio

from node.coordinator.route import OpenRoute
from node.coordinator.submission import JobTrace, StageTiming, TracedRound, TracedStage
from node.links.outbound_link import OutboundLink
from protocol.identity import SessionId, Stage
from protocol.reports import StepTiming, Timings

ANSWER_TIMEOUT_S: Final = 1.0
"""How long a stage may take to report; its part of the trace is missing otherwise."""

COLLECT_ROUNDS: Final = 256
"""Rounds after which the stages are asked: they retain few."""

MAX_ROUNDS: Final = 4096
"""Of a trace: the rest of a longer job is not traced."""

CLOCK_SAMPLES: Final = 8
"""Exchanges with each stage at the end of a job, when nothing else is under way."""


@dataclass(slots=True)
class _StageRecord:
    """What one stage has reported. `offset_s`: its clock minus ours, give or take `error_s`."""

    steps: list[StepTiming]
    offset_s: float = 0.0
    error_s: float = float("inf")
    dropped: int = 0
    next: int = 0
    """The first step that is not attributed to a round yet."""


class _Round(NamedTuple):
    """Tokens that arrived together, and the route that drew them."""

    stages: Sequence[Stage]
    route_began_s: float
    position: int
    tokens: int
    arrived_s: float


class JobTracer:
    """Collects the trace of one job over all of its routes."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s
        self._records: dict[Stage, _StageRecord] = {}
        self._rounds: list[_Round] = []
        self._asked_rounds = 0
        """How many rounds there were when the stages were asked last."""

    @property
    def is_due(self) -> bool:
        """Whether so many rounds have come that the stages should be asked."""
        return len(self._rounds) - self._asked_rounds >= COLLECT_ROUNDS

    def on_tokens(self, route: OpenRoute, position: int, tokens: int, now_s: float) -> None:
        """Record tokens of the last stage, the first at this position."""
        if len(self._rounds) < MAX_ROUNDS:
            self._rounds.append(_Round(route.stages, route.began_s, position, tokens, now_s))

    async def collect(self, route: OpenRoute, exchanges: int = 1) -> None:
        """Ask the stages of a begun route, which record from the first time on."""
        self._asked_rounds = len(self._rounds)

        async def ask(stage: Stage, session: SessionId, link: OutboundLink) -> None:
            record = self._records[stage]
            for _ in range(exchanges):
                asked_s = trio.current_time()
                if (timings := await link.request_timings(session, ANSWER_TIMEOUT_S)) is None:
                    return
                _take(record, timings, asked_s, trio.current_time())

        for stage in route.stages:  # in their order
            self._records.setdefault(stage, _StageRecord([]))
        async with trio.open_nursery() as nursery:
            for stage, session, link in route.linked_stages():
                nursery.start_soon(ask, stage, session, link)

    def trace(self) -> JobTrace:
        """Return the trace; afterwards nothing may be added."""
        numbers = {stage: number for number, stage in enumerate(self._records)}
        rounds: list[TracedRound] = []
        previous: _Round | None = None
        drawn_s: float | None = None
        for current in self._rounds:
            is_first = previous is None or previous.route_began_s != current.route_began_s
            sent_s = current.route_began_s if is_first else drawn_s
            timings, drawn_s = self._time_round(current, numbers, sent_s)
            rounds.append(
                TracedRound(
                    position=current.position,
                    tokens=current.tokens,
                    arrived_s=current.arrived_s - self._began_s,
                    has_prompt=is_first,
                    stages=timings,
                )
            )
            previous = current
        return JobTrace(
            stages=tuple(
                TracedStage(peer=stage.peer, blocks=stage.blocks, clock_error_s=record.error_s)
                if record.steps
                else TracedStage(peer=stage.peer, blocks=stage.blocks, clock_error_s=None)
                for stage, record in self._records.items()
            ),
            rounds=tuple(rounds),
            dropped_steps=sum(record.dropped for record in self._records.values()),
        )

    def _time_round(
        self, current: _Round, numbers: dict[Stage, int], sent_s: float | None
    ) -> tuple[tuple[StageTiming, ...], float | None]:
        """Return the timing of each stage that has reported the round, and when the last one had drawn its tokens.

        `sent_s`: when the input was sent to the first stage. Both by our clock, None where that is unknown.
        """
        found: list[tuple[int, Sequence[StepTiming]]] = []
        links_s: list[float | None] = []
        for stage in current.stages:
            record = self._records.get(stage)
            steps = [] if record is None else _steps_until(record, current.position - 1)
            if record is None or not steps:
                sent_s = None
                continue
            last = steps[-1]
            received_s = last.received_s - record.offset_s
            links_s.append(None if sent_s is None else received_s - sent_s)
            sent_s = received_s + last.queue_s + last.compute_s + last.serialise_s
            found.append((numbers[stage], steps))
        timings = tuple(
            StageTiming(
                stage=number,
                link_s=link_s,
                queue_s=_queue_s(steps),
                compute_s=sum(step.compute_s for step in steps),
                serialise_s=sum(step.serialise_s for step in steps),
            )
            for (number, steps), link_s in zip(found, _without_negatives(links_s), strict=True)
        )
        return timings, sent_s


def _take(record: _StageRecord, timings: Timings, asked_s: float, answered_s: float) -> None:
    record.steps += timings.steps
    record.dropped = max(record.dropped, timings.dropped)
    error_s = (answered_s - asked_s) / 2
    if error_s <= record.error_s:
        record.error_s, record.offset_s = error_s, timings.clock_s - (asked_s + answered_s) / 2


def _steps_until(record: _StageRecord, position: int) -> Sequence[StepTiming]:
    """Return a stage's further steps up to the one behind whose row of this position a round's tokens were drawn.

    It is the last that has the row: after a failover a row may be computed again. Later rounds start behind it.
    """
    steps, end = record.steps, record.next
    for number in range(record.next, len(steps)):
        if steps[number].position > position:
            break
        if position < steps[number].position + steps[number].rows:
            end = number + 1
    found = steps[record.next : end]
    record.next = end
    return found


def _queue_s(steps: Sequence[StepTiming]) -> float:
    """Return how long rows of a round waited, except for the steps of the session itself: a prompt may take several."""
    total_s, free_s = 0.0, float("-inf")
    for step in steps:
        began_s = step.received_s + step.queue_s
        total_s += max(0.0, began_s - max(step.received_s, free_s))
        free_s = began_s + step.compute_s + step.serialise_s
    return total_s


def _without_negatives(links_s: Sequence[float | None]) -> list[float | None]:
    """Return the times of a round's links with their sum, but none below 0, as clocks compare only so well."""
    known = [link_s for link_s in links_s if link_s is not None]
    positive_s = sum(link_s for link_s in known if link_s > 0)
    scale = max(0.0, sum(known)) / positive_s if positive_s else 0.0
    return [None if link_s is None else max(0.0, link_s) * scale for link_s in links_s]
