"""Watches a job's route for stragglers: a stage that holds it up is replaced within seconds, where others can."""

from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import pairwise
from statistics import median
from typing import TypeVar

import trio

from node.coordinator.job import Job
from node.coordinator.planner import Planner
from node.coordinator.refusals import RETRY_AFTER_S, RouteRejected, StageRefusal
from node.coordinator.route import OpenRoute, RouteLost
from node.coordinator.route_output import LastStageOutput
from node.coordinator.straggler_detector import Lag, StragglerDetector
from node.coordinator.submission import JobError, JobErrorCode
from node.links.outbound_link import SessionLost
from protocol.identity import PeerId
from protocol.messages import FailureReason

OPEN_LIMIT_S = 2.5
"""How long a stage may take to open while another peer could take its place;"""

SEND_LIMIT_S = 2.0
"""and the first stage to take a prompt."""

STALL_LIMIT_S = 120.0
"""How long a route without progress is kept where no stage is replaceable,"""

STALL_FACTOR = 6.0
"""or this multiple of what is expected of it."""

FIRST_TIMEOUT_S = 1.0
"""Wait for the first token: prefill takes its time, and asking for progress costs little."""

TIMEOUT_S = (0.4, 1.0)
"""Bounds for the other tokens: a stage does not gain time by slowing them down."""

TIMEOUT_FACTOR = 6.0

PROBE_TIMEOUT_S = 1.0
"""How long a stage may take to report its progress when a token is late;"""

POLL_S = 0.25
"""the interval at which it is asked again,"""

POLL_SHARE = 0.1
"""or, where a token has been late for longer, this share of it."""

FORGIVING_FACTOR = 4.0
"""After this multiple of the limit a stage is also replaced by peers that failed or lagged themselves."""

LENIENCY = 1.5
"""All limits are multiplied with this for each route that was lost since the last token."""

T = TypeVar("T")


class StragglerMonitor:
    """Opens one job's routes, sends its prompt and waits for its tokens; gives up stages that delay it."""

    def __init__(
        self, job: Job, planner: Planner, is_replaceable: Callable[[Collection[PeerId], bool], Awaitable[bool]]
    ) -> None:
        """`is_replaceable`: whether others, trusted ones only or any, could take the places of peers on the route."""
        self._job = job
        self._planner = planner
        self._is_replaceable = is_replaceable
        self._waits_s: deque[float] = deque(maxlen=16)
        """Inter-token times, from which the timeout for the next token is learned."""
        self._disputed: set[PeerId] = set()
        """Peers that claim to have sent rows that never arrived at the next stage, which was replaced for it."""

    async def open(self, route: OpenRoute) -> None:
        """Open a route's stages. Raises RouteRejected, also for stages that take too long."""

        async def watch() -> None:
            limit_s = OPEN_LIMIT_S
            while True:
                await trio.sleep(limit_s)
                late = route.opening_late()
                if late and await self._is_replaceable(late, True):
                    late &= route.opening_late()  # others have answered during the search
                    for peer in late:
                        why = f"did not open the session within {limit_s:.1f} s"
                        route.give_up_opening(StageRefusal(peer, None, why, lagged=True))
                    if late:
                        return
                limit_s *= 2

        await _run_watched(watch, route.open)

    async def send_prompt(self, route: OpenRoute, tokens: Sequence[int]) -> None:
        """Send the prompt. Raises RouteLost, also where the first stage does not take it."""
        first = route.stages[0].peer

        async def watch() -> None:
            limit_s = SEND_LIMIT_S
            while True:
                await trio.sleep(limit_s)
                if await self._is_replaceable({first}, True):
                    route.lose(_lagging(first, f"did not take the prompt within {limit_s:.1f} s"))
                    return
                limit_s *= 2

        await _run_watched(watch, lambda: route.send_prompt(tokens, self._job.model.hidden_size))

    def begin(self, route: OpenRoute, failures: int) -> None:
        """Begin to watch a route that has just begun. `failures`: routes lost since the last token."""
        need, stages, loads = self._job.need(), route.stages, route.loads()
        round_s, last = self._planner.round_s(stages), len(stages) - 1
        is_scored = route.request.sampling.prompt_logprobs

        def expected_s(stage: int, rows: int) -> float:
            compute_s = self._planner.expected_s(need, stages[stage], rows, loads[stage])
            if is_scored and stage == last:
                compute_s *= self._job.scoring_factor(len(stages[stage].blocks))
            way_s = self._planner.way_s(need, stages[stage - 1], stages[stage], rows) if stage else 0.0
            return compute_s + way_s + round_s / len(stages)

        # Its row may wait on the link behind a step of other sessions.
        floors_s = [self._planner.step_way_s(before, stage) for before, stage in pairwise(stages)]
        route.detector = StragglerDetector(
            route.starts,
            need.demand.prompt_rows,
            expected_s,
            trio.current_time(),
            unreporting=route.unreporting(),
            floors_s=[0.0, *floors_s],
            leniency=LENIENCY**failures,
        )

    @property
    def _timeout_s(self) -> float:
        """The wait after which the next token is late: a multiple of the median inter-token time."""
        if not self._waits_s:
            return FIRST_TIMEOUT_S
        least_s, most_s = TIMEOUT_S
        return min(most_s, max(least_s, TIMEOUT_FACTOR * median(self._waits_s)))

    async def output(self, route: OpenRoute) -> LastStageOutput:
        """Wait for the last stage. Raises RouteLost where a stage is lost or lags, JobError for a stall."""
        detector, asked_s = route.detector, trio.current_time()
        if detector is None:
            raise AssertionError("a route is watched once it has begun")
        if not route.has_output:
            detector.wait(asked_s)
        output: LastStageOutput | None = None
        with trio.move_on_after(self._timeout_s):
            output = await route.next_output()
        if output is None:
            output = await _run_watched(lambda: self._watch(route, detector), route.next_output)
        self._waits_s.append(trio.current_time() - asked_s)
        return output

    async def _watch(self, route: OpenRoute, detector: StragglerDetector) -> None:
        """Ask the stages of a route for their progress, until one of them is given up."""
        began_s = trio.current_time()
        while True:
            await route.ask_progress(PROBE_TIMEOUT_S)
            now_s = trio.current_time()
            # A measurement waits while its stages serve users, and is compared on one route: none is replaced.
            if (lag := detector.find(now_s)) is not None and not self._job.request.background:
                peer, disputed, message = self._blamed(route, lag)
                if await self._is_replaceable({peer}, lag.waited_s < FORGIVING_FACTOR * lag.limit_s):
                    if trio.current_time() - now_s > POLL_S and not await self._still_lags(route, detector, peer):
                        continue
                    self._disputed |= disputed
                    route.lose(_lagging(peer, message))
                    return
            if detector.still_s(now_s) > max(STALL_LIMIT_S, STALL_FACTOR * detector.total_s()):
                why = f"no stage made progress for {detector.still_s(now_s):.0f} s, and no other peer could take over"
                route.stall(JobError(JobErrorCode.UNCOVERED, f"{why}: try again later", retry_after_s=RETRY_AFTER_S))
                return
            await trio.sleep(max(POLL_S, POLL_SHARE * (now_s - began_s)))

    async def _still_lags(self, route: OpenRoute, detector: StragglerDetector, peer: PeerId) -> bool:
        """Ask again, after a search for another peer, whether this one is to be replaced."""
        await route.ask_progress(PROBE_TIMEOUT_S)
        lag = detector.find(trio.current_time())
        return lag is not None and self._blamed(route, lag)[0] == peer

    def _blamed(self, route: OpenRoute, lag: Lag) -> tuple[PeerId, set[PeerId], str]:
        """Return the peer to replace, the peer that it is in a dispute with, and the reason.

        Of two that contradict each other it is the later; the earlier if it was in such a dispute before. Of several
        that nothing tells apart it is the least proven one.
        """
        disputed = set() if lag.earlier is None else {route.stages[lag.earlier].peer}
        for earlier in disputed & self._disputed:
            return earlier, set(), "claims to have sent what never arrives at the next stage"
        peer = self._planner.proven_least(self._job.model.id, [route.stages[stage].peer for stage in lag.suspects])
        return peer, disputed, f"made no progress for {lag.waited_s:.1f} s"


def _lagging(peer: PeerId, message: str) -> SessionLost:
    return SessionLost(peer, peer, FailureReason.DOWNSTREAM, message, lagged=True)


async def _run_watched(watch: Callable[[], Awaitable[None]], act: Callable[[], Awaitable[T]]) -> T:
    """Run an action with a watcher beside it, which may make it fail; its exceptions are not wrapped in groups."""
    fault: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            result = await act()
        except (JobError, RouteLost, RouteRejected) as error:
            fault = error
        nursery.cancel_scope.cancel()
    if fault is not None:
        raise fault
    return result
