"""Watches over a job's route: whoever holds it up is replaced within seconds, where somebody else can do its work."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import pairwise
from typing import TypeVar

import structlog
import trio

from node.coordinator.job import RETRY_AFTER_S, Job
from node.coordinator.planner import Planner
from node.coordinator.route import OpenRoute, RouteLost, RouteRejected, SampledToken, StageRefusal
from node.coordinator.straggler_detector import Lag, StragglerDetector
from node.coordinator.submission import JobError, JobErrorCode
from node.links.outbound_link import SessionLost
from protocol.identity import PeerId, Stage
from protocol.messages import FailureReason
from selector.routing import NoRouteError

OPEN_LIMIT_S = 2.5
"""How long a stage may take to open while another peer could take its place;"""

SEND_LIMIT_S = 2.0
"""and the first stage to take a prompt."""

STALL_LIMIT_S = 120.0
"""How long a route is held on to that shows no progress, where nobody could take anybody's place,"""

STALL_FACTOR = 6.0
"""or so many times what is expected of it."""

PROBE_TIMEOUT_S = 1.0
"""How long a stage may take to say that it is there, when a token is late;"""

POLL_S = 0.25
"""how soon it is asked again,"""

POLL_SHARE = 0.1
"""or, where a token has been late for longer, after this share of it."""

SEARCH_S = 10.0, 2.0
"""Where nobody who is known could take a stage's place, others are looked for: so often, and for so long."""

FORGIVING_FACTOR = 4.0
"""After so many times the limit a stage is also replaced by peers that failed or lagged themselves."""

T = TypeVar("T")

_logger = structlog.get_logger(__name__)


class StragglerMonitor:
    """Opens routes, sends prompts and waits for tokens, each with an eye on whoever keeps it waiting."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    async def open(self, job: Job, route: OpenRoute) -> None:
        """Open a route's stages. Raises RouteRejected, also for stages that take too long."""

        async def watch() -> None:
            limit_s = OPEN_LIMIT_S
            while True:
                await trio.sleep(limit_s)
                late = route.opening_late()
                if late and await self._replaceable(job, late, job.stages, job.held):
                    for peer in late:
                        why = f"did not open the session within {limit_s:.1f} s"
                        route.give_up_opening(StageRefusal(peer, None, why, lagged=True))
                    return
                limit_s *= 2

        await _beside(watch, route.open)

    async def send_prompt(self, job: Job, route: OpenRoute, tokens: list[int]) -> None:
        """Send the prompt. Raises RouteLost, also where the first stage does not take it."""
        first = route.stages[0].peer

        async def watch() -> None:
            limit_s = SEND_LIMIT_S
            while True:
                await trio.sleep(limit_s)
                if await self._replaceable(job, {first}, route.stages, route.held()):
                    route.lose(_lagging(first, f"did not take the prompt within {limit_s:.1f} s"))
                    return
                limit_s *= 2

        await _beside(watch, lambda: route.send_prompt(tokens, job.model.hidden_size))

    def begin(self, job: Job, route: OpenRoute) -> None:
        """Begin to watch a route that has just begun."""
        need, stages, loads = job.need(), route.stages, route.loads()
        round_s = self._planner.round_s(stages)

        def expected_s(stage: int, rows: int) -> float:
            compute_s = self._planner.expected_s(need, stages[stage], rows, loads[stage])
            way_s = self._planner.way_s(need, stages[stage - 1], stages[stage], rows) if stage else 0.0
            return compute_s + way_s + round_s / len(stages)

        tokens = len(job.prompt) + len(job.tokens)
        # Its row may wait on the link behind a step of other sessions.
        step_s = [self._planner.step_way_s(before, stage) for before, stage in pairwise(stages)]
        route.watch = StragglerDetector(
            route.starts, tokens, expected_s, trio.current_time(), route.mute(), [0.0, *step_s]
        )
        route.watch.leniency = 1.5**job.fruitless

    async def token(self, job: Job, route: OpenRoute) -> SampledToken:
        """Wait for the next token. Raises RouteLost where a stage is lost or lags, JobError for a stall."""
        watch, asked_s = route.watch, trio.current_time()
        if watch is None:
            raise AssertionError("a route is watched once it has begun")
        if not route.has_token:
            watch.wait(asked_s)
        with trio.move_on_after(job.patience.seconds):
            drawn = await route.next_token()
            job.patience.learn(trio.current_time() - asked_s)
            return drawn
        drawn = await _beside(lambda: self._watch(job, route, watch), route.next_token)
        job.patience.learn(trio.current_time() - asked_s)
        return drawn

    async def _watch(self, job: Job, route: OpenRoute, watch: StragglerDetector) -> None:
        """Ask the stages of a route how far they are, until one of them is lost for it."""
        began_s = trio.current_time()
        while True:
            await route.ask_progress(PROBE_TIMEOUT_S)
            now_s = trio.current_time()
            if (lag := watch.find(now_s)) is not None:
                peer, disputed, message = self._blamed(job, route, lag)
                only_trusted = lag.waited_s < FORGIVING_FACTOR * lag.limit_s
                if await self._replaceable(job, {peer}, route.stages, route.held(), only_trusted=only_trusted):
                    job.disputed |= disputed
                    route.lose(_lagging(peer, message))
                    return
            if watch.still_s(now_s) > max(STALL_LIMIT_S, STALL_FACTOR * watch.total_s()):
                why = f"no stage made any progress for {watch.still_s(now_s):.0f} s, and no other peer could take over"
                route.stall(JobError(JobErrorCode.UNCOVERED, f"{why}; try again later", retry_after_s=RETRY_AFTER_S))
                return
            await trio.sleep(max(POLL_S, POLL_SHARE * (now_s - began_s)))

    def _blamed(self, job: Job, route: OpenRoute, lag: Lag) -> tuple[PeerId, set[PeerId], str]:
        """Return which peer to replace, who is in a dispute with it, and why.

        Of two that contradict each other it is the later; the earlier if it was in such a dispute before. Of several
        that nothing tells apart it is the one that has shown least so far.
        """
        disputed = set() if lag.earlier is None else {route.stages[lag.earlier].peer}
        for earlier in disputed & job.disputed:
            return earlier, set(), "says it has sent what never arrives at the next stage"
        peer = self._planner.proven_least(job.model.id, [route.stages[stage].peer for stage in lag.suspects])
        return peer, disputed, f"made no progress for {lag.waited_s:.1f} s"

    async def _replaceable(
        self,
        job: Job,
        peers: Collection[PeerId],
        like: Sequence[Stage],
        held: Collection[Stage],
        *,
        only_trusted: bool = True,
    ) -> bool:
        """Return whether somebody could take the places of peers on a route; now and then look for others who could."""
        need, without = job.need(), {*job.avoided, *peers}
        kept = [stage for stage in held if stage.peer not in peers]
        if self._planner.knows_route(need, without, like=like, held=kept, only_trusted=only_trusted):
            return True
        interval_s, limit_s = SEARCH_S
        if trio.current_time() < job.searched_s + interval_s:
            return False
        with trio.move_on_after(limit_s):
            try:
                await self._planner.route(need, without, like=like, held=kept, only_trusted=only_trusted)
            except NoRouteError:
                pass
            else:
                return True
            finally:
                job.searched_s = trio.current_time()
        return False


def _lagging(peer: PeerId, message: str) -> SessionLost:
    return SessionLost(peer, peer, FailureReason.DOWNSTREAM, message, lagged=True)


async def _beside(watch: Callable[[], Awaitable[None]], act: Callable[[], Awaitable[T]]) -> T:
    """Return what an action comes to, with a watch beside it; what either raises passes as it is."""
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
