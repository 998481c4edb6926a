"""Failover: replaces stages that are lost, lag or leave, and replays the job on the new route.

A lost stage does not end a job: the tokens so far are replayed on another route, and since greedy decoding is
deterministic and sampling is keyed by position, the text continues unchanged. Stages that still hold the session go on
with it; only what the lost stage had computed is computed again.
"""

from array import array
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from typing import NamedTuple

import structlog
import trio

from node.coordinator.blame import Blame
from node.coordinator.budget import needs_of
from node.coordinator.job import Job
from node.coordinator.planner import PlannedRoute, RouteNeed
from node.coordinator.refusals import RouteRejected, StageRefusal, no_route
from node.coordinator.route import OpenRoute, RouteLost
from node.coordinator.route_output import LastStageOutput, PromptScores, SampledToken
from node.coordinator.route_search import RouteSearch
from node.coordinator.session_request import RouteServices, SessionRequest, plan_sessions
from node.coordinator.straggler_monitor import StragglerMonitor
from node.coordinator.submission import JobError, JobErrorCode, JobTrace
from node.coordinator.tracing import CLOCK_SAMPLES, JobTracer
from node.engine.interface import parts_of
from node.links.outbound_link import SessionLost
from node.util.backoff import backoff_s
from protocol.identity import PeerId, SessionId, Stage
from protocol.messages import Closed, FailureReason, RefusalReason
from protocol.tensors import TokenLogprobs
from selector.routing import NoRouteError
from selector.task import Method

MAX_ATTEMPTS = 5
"""Routes tried for a new job; also routes that a running job may lose in a row without a token in between."""

BACKOFF_S = (0.1, 1.0)
"""First and longest pause before another route is tried."""

SEARCH_S = 10.0, 2.0
"""Where no known peer could replace a stage, others are searched for: at this interval, for at most this long."""

_logger = structlog.get_logger(__name__)


class ClosedRoute(NamedTuple):
    """The last route of a job that is done, and what all of its routes add up to.

    `request`: of the first one that was begun. `closed`: the final word of each stage, None where it did not come.
    `rounds`: messages with tokens on all routes. `replays`: stages that were lost and replaced. `cached_tokens`: of the
    prompt, found in prefix caches by the first route. `accusers`: stages that blamed others without proof.
    `trace`: where the job asked for one.
    """

    route: OpenRoute
    request: SessionRequest
    closed: tuple[Closed | None, ...]
    rounds: int
    replays: int
    cached_tokens: int
    accusers: Collection[PeerId] = ()
    trace: JobTrace | None = None


class ResilientRoute:
    """The route of one job, which outlives its stages."""

    def __init__(self, job: Job, services: RouteServices) -> None:
        self._job = job
        self._planner = services.planner
        self._services = services
        self._tracer = JobTracer(job.began_s) if job.request.trace else None
        self._blame = Blame(services.planner, services.link_pool)
        self._monitor = StragglerMonitor(job, services.planner, self._is_replaceable)
        self._log = _logger.bind(job=job.id, request_id=job.request_id)
        self._route: OpenRoute | None = None
        self._method: Method | None = None
        """What the votes agreed on; kept on every later route, without speculation once a drafter was missing."""
        self._request: SessionRequest | None = None
        """Of the first route that was begun: it was made when the method was still open."""
        self._is_accepted = False
        """A route was open and had the prompt."""
        self._cached_tokens = 0
        self._stages: Sequence[Stage] = ()
        """Of the last route that was open, also of one that was lost."""
        self._previous_routes: list[OpenRoute] = []
        """Not closed yet: their stages' sessions may be continued."""
        self._held: dict[Stage, SessionId] = {}
        """The newest session of the job at each stage that is believed to hold one."""
        self._rounds = 0
        self._replays = 0
        self._failures_since_token = 0
        self._avoided: dict[PeerId, StageRefusal] = {}
        self._reconnected: dict[PeerId, StageRefusal] = {}
        self._outdated: dict[PeerId, StageRefusal] = {}
        """Peers that may serve any stage but the last."""
        self._logged: set[PeerId] = set()
        """Peers whose refusal was logged already."""
        self._bad_request: SessionLost | None = None
        """What a last stage said that found the request impossible."""
        self._asked_to_leave: set[PeerId] = set()
        self._leaving: set[PeerId] = set()
        """Those of them that others are to replace now."""
        self.is_finished = False
        self._searched_s = float("-inf")
        """When a replacement for a lagging stage was last searched for."""

    @property
    def stages(self) -> Sequence[Stage]:
        """The stages of the last route that was open."""
        return self._stages

    @property
    def peers(self) -> set[PeerId]:
        """The peers that serve the job now."""
        return {stage.peer for stage in self._stages}

    @property
    def method(self) -> Method | None:
        """The method in use; None before the votes."""
        return self._method

    @property
    def replays(self) -> int:
        """Stages that were lost and replaced so far; not those that were reached again."""
        return self._replays

    @property
    def is_background(self) -> bool:
        """Whether the job gives way to others."""
        return self._job.request.background

    async def open(self) -> None:
        """Open a route for the rest of the job and send the tokens so far; try others where stages refuse.

        A running job waits where there is no route, and forgives the peers that it avoided, as long as known peers
        could serve it; a new one, for a shorter time, where links broke. Previous routes are closed once their sessions
        are continued. Raises JobError.
        """
        self._retire_route()
        search = RouteSearch(self._job, is_running=self._is_accepted)
        is_eased = False  # what is asked of the route: then nothing is waited for
        for attempt in count():
            if attempt and not is_eased:
                await trio.sleep(backoff_s(attempt, BACKOFF_S, self._services.jitter))
            # Background jobs and trials, which compare methods on one route, do not explore peers.
            may_explore = not (attempt or self._is_accepted or self._job.request.background or self._job.on_served)
            try:
                planned, request = await self._plan(search, may_explore=may_explore)
            except NoRouteError as error:
                if self._bad_request is not None:
                    raise self._invalid(self._bad_request) from None
                if is_eased := bool(self._leaving) or self._shorten(search):
                    self._leaving.clear()  # they hold the session, and stay where no other peer takes over
                    continue
                if not search.may_wait() or self._is_hopeless(search, error):
                    raise no_route(self._job, error, search.refusals, self._outdated) from None
                self._avoided.clear()
                continue
            if is_eased := search.restore(planned.stages, self._held.keys() & planned.stages):
                continue
            if await self._try_route(planned, request):
                self._replays += len(set(self._stages) - set(planned.stages))
                self._stages = planned.stages
                self._leaving.clear()
                break
            self._retire_route()
            is_eased = False
            # Peers of an older version are found out one by one, and cost the job no attempt.
            is_last = attempt + 1 - len(self._outdated) >= MAX_ATTEMPTS or bool(self._job.request.stages)
            if not search.may_wait() and is_last and not (is_eased := self._shorten(search)):
                raise no_route(self._job, None, search.refusals, self._outdated)
        if search.is_told:
            self._log.info("route found again", waited_s=round(trio.current_time() - search.began_s, 1))
        self._is_accepted = True
        self._job.output.routed_s = self._job.output.routed_s or trio.current_time()
        await self._close_previous()

    async def next_token(self) -> SampledToken:
        """Wait for the next token; see `_next_output`."""
        output = await self._next_output()
        assert isinstance(output, SampledToken)
        return output

    async def score(self) -> list[TokenLogprobs]:
        """Wait until all tokens of the prompt are scored; see `_next_output`. A new route begins anew."""
        scores: list[TokenLogprobs] = []
        while self._job.scores_left:
            route = self._open_route()
            output = await self._next_output()
            if route is not self._open_route():
                scores.clear()
            assert isinstance(output, PromptScores)
            scores += output.tokens
            self._job.output.scored = len(scores)
        return scores

    async def embedding(self) -> "array[float]":
        """Wait for the prompt's embedding; see `_next_output`."""
        output = await self._next_output()
        assert isinstance(output, array)
        return output

    async def _next_output(self) -> LastStageOutput:
        """Wait for the last stage; where a stage is lost or wants to leave, replace it first. Raises JobError."""
        while True:
            route = self._open_route()
            leaving = route.leaving - self._asked_to_leave
            if leaving and self._job.is_resumable and not route.is_complete:
                await self._replace_leaving(leaving)
                continue
            try:
                output = await self._monitor.output(route)
            except RouteLost as lost:
                self._failures_since_token += 1
                if self._failures_since_token > MAX_ATTEMPTS:
                    message = f"{self._failures_since_token} routes were lost in a row, the last at {lost}; try again"
                    raise JobError(JobErrorCode.FAILED, message) from None
                self._remove_lost(route, lost.session)
                await self.open()
            else:
                if not isinstance(output, PromptScores):  # those begin anew on another route: they are not progress
                    self._failures_since_token = 0
                    self._reconnected.clear()
                if self._tracer is not None and self._tracer.is_due:
                    await self._tracer.collect(route)
                return output

    async def finish(self) -> ClosedRoute:
        """Close the route of a job that is done."""
        route = self._open_route()
        trace: JobTrace | None = None
        if self._tracer is not None:
            await self._tracer.collect(route, CLOCK_SAMPLES)
            trace = self._tracer.trace()
        closed = await route.close(is_done=True)
        self._route = None
        self.is_finished = True
        if self._bad_request is not None:  # another stage could do what this one said was impossible
            self._planner.failed(self._bad_request.reporter, dead=False)
        request, rounds = self._request or route.request, self._rounds + route.rounds
        accusers = frozenset(self._blame.accused_by)
        return ClosedRoute(route, request, closed, rounds, self._replays, self._cached_tokens, accusers, trace)

    async def close(self) -> None:
        """Close all routes that are still open."""
        self._retire_route()
        await self._close_previous()

    def _open_route(self) -> OpenRoute:
        if self._route is None:
            raise AssertionError("a running job has a route")
        return self._route

    def _need(self, leaving: Collection[PeerId] = (), begun: OpenRoute | None = None) -> RouteNeed:
        """Return what the job needs of the next route: without some peers, and like the route begun, or else before."""
        like: Sequence[Stage] = begun.stages if begun else self._stages or self._job.request.stages
        held: Collection[Stage] = begun.held() if begun else self._held if self._stages else like
        need = self._job.need()
        if self._method is not None:  # routes are asked for this one only
            need = replace(need, parts=parts_of(self._method.engine))
        return replace(
            need,
            not_last=frozenset(self._outdated),
            without={*self._avoided, *self._leaving, *leaving},
            like=like,
            held=held,
        )

    async def _plan(self, search: RouteSearch, *, may_explore: bool) -> tuple[PlannedRoute, SessionRequest]:
        """Return the best route and what is asked of its stages; within the job's budget until it has tokens.

        Raises NoRouteError, JobError.
        """
        job = self._job
        serving = () if self.is_background else self.peers  # jobs in the background are not counted anywhere
        needs = [self._need()] if job.output.tokens else needs_of(job.request, self._need())
        try:
            return await plan_sessions(self._services, job, needs, self._method, serving, may_explore=may_explore)
        except JobError as error:
            # Full or lost: within the budget, but not now.
            left_out = search.refusals | self._reconnected | self._avoided
            is_for_good = all(refusal.reason is RefusalReason.UNABLE for refusal in left_out.values())
            if error.code is not JobErrorCode.OVER_BUDGET or is_for_good:
                raise
            raise NoRouteError(()) from None

    async def _try_route(self, planned: PlannedRoute, request: SessionRequest) -> bool:
        """Open a route and send the tokens so far; return whether that succeeded. If not, peers to avoid are noted."""
        self._route = route = OpenRoute(planned.stages, self._services.link_pool, request, self._held)
        tokens = self._job.tokens
        try:
            await self._monitor.open(route)
            self._begin(route, tokens)
            if self._tracer is not None:
                route.on_tokens = partial(self._tracer.on_tokens, route)
                route.is_kept_open = True  # for the timings of the last tokens
                await self._tracer.collect(route)
            await self._monitor.send_prompt(route, tokens)
        except RouteRejected as rejected:
            for refusal in rejected.refusals:
                self._avoid(refusal)
        except RouteLost as lost:
            self._remove_lost(route, lost.session)
        else:
            return True
        return False

    def _begin(self, route: OpenRoute, tokens: Sequence[int]) -> None:
        """Begin on all stages with the method that the votes agree on."""
        self._method = route.begin(tokens)
        self._request = self._request or route.request
        if not self._method.prefix_cache:
            self._services.prompts.release(self._job.claim)  # its pages will not be cached
        if not self._is_accepted:
            self._cached_tokens = min(*route.starts, len(self._job.prompt) - 1)
        self._monitor.begin(route, self._failures_since_token)

    def _avoid(self, refusal: StageRefusal) -> None:
        """Keep the job away from a peer; an unreachable one counts as dead until its next heartbeat."""
        peer = refusal.peer
        log = self._log.debug if peer in self._logged else self._log.info
        log("stage not available", peer=peer, reason=refusal.message)
        self._logged.add(peer)
        if refusal.outdated:
            self._outdated[peer] = refusal
            return
        self._avoided[peer] = refusal
        if refusal.reason is None:
            self._planner.failed(peer, dead=not refusal.lagged, lagged=refusal.lagged)

    def _remove_lost(self, route: OpenRoute, lost: SessionLost) -> None:
        """Avoid the peer that is to blame for a lost stage. Raises JobError where the request is at fault."""
        if self._is_bad_request(route, lost):
            self._ask_another(route, lost)
            return
        on_route = {stage.peer for stage in route.stages}
        culprit = self._blame.charge(lost, on_route, lambda peer: self._planner.knows_route(self._need({peer})))
        self._log.info("stage lost", peer=culprit, reason=lost.reason, message=lost.message)
        refusal = StageRefusal(culprit, None, lost.message, lagged=lost.lagged)
        is_broken = lost.reason is FailureReason.DOWNSTREAM and not lost.lagged
        # Maybe only the way there is lost, as that through a relay: it is tried once again before others are searched.
        if not is_broken or culprit in self._reconnected or self._planner.knows_route(self._need({culprit})):
            self._avoided[culprit] = refusal
        self._reconnected[culprit] = refusal
        self._retire_route()
        # Another stage rejected its rows: those before may be wrong, too, and all behind it have computed with them.
        is_wrong = lost.reason is FailureReason.ENGINE and lost.reporter != culprit
        first = min((stage.blocks.start for stage in route.stages if stage.peer == culprit), default=0)
        self._held = {
            stage: session
            for stage, session in self._held.items()
            if stage.peer != culprit and not (is_wrong and stage.blocks.start > first)
        }

    def _is_bad_request(self, route: OpenRoute, lost: SessionLost) -> bool:
        """Return whether the last stage says that no text follows the JSON Schema; other stages cannot know."""
        is_last = lost.reporter == route.stages[-1].peer
        return lost.reason is FailureReason.REQUEST and bool(self._job.request.json_schema) and is_last

    def _ask_another(self, route: OpenRoute, lost: SessionLost) -> None:
        """Have another last stage try a request that one found impossible. Raises JobError where both agree.

        One alone could end every job with a schema. It is not held against the first unless the other succeeds.
        """
        if self._bad_request is not None and self._bad_request.reporter != lost.reporter:
            raise self._invalid(lost)
        self._log.info("request refused by the last stage", peer=lost.reporter, message=lost.message)
        self._bad_request = lost
        self._avoided[lost.reporter] = StageRefusal(lost.reporter, RefusalReason.UNABLE, lost.message)
        self._retire_route()
        self._held = {stage: session for stage, session in self._held.items() if stage.peer != lost.reporter}

    def _invalid(self, lost: SessionLost) -> JobError:
        return JobError(JobErrorCode.INVALID, lost.message, param=self._job.request.json_schema_param)

    async def _replace_leaving(self, leaving: Collection[PeerId]) -> None:
        """Replace peers that want to leave, where others can serve their blocks."""
        self._asked_to_leave.update(leaving)
        self._leaving.update(leaving)
        try:
            await self._planner.route(self._need(begun=self._open_route()))
        except NoRouteError:
            self._leaving.clear()
            self._log.info("leaving peer not replaced: no other serves its blocks", peers=sorted(leaving))
        else:
            await self.open()

    async def _is_replaceable(self, peers: Collection[PeerId], only_trusted: bool) -> bool:
        """Return whether others could take the places of peers on the route; at intervals search for more peers."""
        route = self._open_route()
        need = self._need(peers, route if route.method else None)
        if self._planner.knows_route(need, only_trusted=only_trusted):
            return True
        interval_s, limit_s = SEARCH_S
        if trio.current_time() < self._searched_s + interval_s:
            return False
        is_found = False
        with trio.move_on_after(limit_s), suppress(NoRouteError):
            await self._planner.route(need, only_trusted=only_trusted)
            is_found = True
        self._searched_s = trio.current_time()
        return is_found

    def _shorten(self, search: RouteSearch) -> bool:
        """Note why peers were not used; return whether they are to be tried again with a shorter text."""
        if is_shorter := search.shorten(self._reconnected | self._avoided):
            self._avoided.clear()
        return is_shorter

    def _is_hopeless(self, search: RouteSearch, error: NoRouteError) -> bool:
        """Return whether a running job waits for nobody; tell once that it waits."""
        job = self._job
        if search.is_running and not search.is_told:
            search.is_told = True
            self._log.warning("no route left; waiting for a peer", model=job.model.name, reason=str(error))
        expected = self._services.swarm.expected(job.model.id)
        return search.is_hopeless(has_candidates=self._planner.could_serve(job.need(), expected))

    def _retire_route(self) -> None:
        """Make the open route a previous one, whose stages are continued as far as they still hold the session."""
        if self._route is None:
            return
        holding = self._route.held() if self._job.is_resumable else {}
        for stage, answer in zip(self._route.stages, self._route.answers, strict=True):
            if stage in holding:
                self._held[stage] = holding[stage]
            elif answer is not None:
                self._held.pop(stage, None)
        self._rounds += self._route.rounds
        self._previous_routes.append(self._route)
        self._route = None

    async def _close_previous(self) -> None:
        """Close the previous routes; sessions that were continued are over already."""
        previous, self._previous_routes = self._previous_routes, []
        async with trio.open_nursery() as nursery:
            for route in previous:
                nursery.start_soon(route.close)
