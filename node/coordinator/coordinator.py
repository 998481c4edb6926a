"""The coordinator: takes a job, finds a route, opens its stages, and turns the tokens that come back into text.

A stage that is lost in mid-job does not end the job: the tokens so far are replayed over another route, and since
greedy decoding is deterministic and sampling is keyed by position, the text goes on as if nothing had happened.
"""

import random
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

import structlog
import trio

from node.coordinator.failover import StragglerMonitor
from node.coordinator.job import Job
from node.coordinator.method_choice import (
    Choice,
    Chooser,
    HeuristicChooser,
    NullQualityStore,
    QualityStore,
    SelectionRequest,
    admitted_methods,
    describe,
)
from node.coordinator.planner import Finder, PeerRecord, PlannedRoute, Planner
from node.coordinator.prefix_sharing import RecentPrompts, page_hashes
from node.coordinator.prompt import prompt_tokens, sampling_of
from node.coordinator.recorder import Recorder, ServedJob
from node.coordinator.result import result_of, served_of, timing_of
from node.coordinator.route import Opening, OpenRoute, RouteLost, RouteRejected, SampledToken, StageRefusal
from node.coordinator.submission import (
    AUTO,
    CLIENT_MISTAKES,
    JobError,
    JobErrorCode,
    JobEvent,
    JobRequest,
    JobResult,
    JobStarted,
    Outcome,
    TextDelta,
    Vote,
)
from node.links.link_pool import LinkPool
from node.models.errors import ModelError
from node.models.library import KnownModel
from node.models.streaming import StopFinder, StreamDecoder
from node.stages.voting import Agreement
from protocol.identity import BlockRange, JobId, ModelId, PeerId, Stage
from protocol.messages import FailureReason, FinishReason, RefusalReason
from selector.routing import Links, NoRouteError
from selector.task import Method, TaskContext

MAX_ATTEMPTS = 5
"""Routes tried for a new job; also routes that a job under way may lose one after another without a token."""

RECOVERY_LIMIT_S = 90.0
"""How long a job under way waits for a route while peers are known that could take a lost stage's place.

They may have to build the job's variant first (`span.BUILD_PATIENCE_S`, and the building), to load their blocks again,
or to end other jobs. What was calculated is held meanwhile.
"""

HOPELESS_LIMIT_S = 4.0
"""How long it waits where nobody is known that could: who was just lost may be back, or be heard of, within it."""

BACKOFF_S = (0.05, 1.0)
"""First and longest pause, give or take half, before another route is tried."""

VOTE_LIMIT_S = 120.0
"""How long the stages may take to vote about a task that is not run."""

LEADER_PATIENCE_S = 30.0
"""How long a job waits at most for another to compute what both prompts begin with."""

_logger = structlog.get_logger(__name__)


class Models(Protocol):
    """Knows the models of the swarm; `node.models.library` is the real one."""

    async def open(self, text: str) -> KnownModel:
        """Return the model that the user means. Raises ModelError with one line for the user."""
        ...


@dataclass(slots=True)
class CoordinatorStatistics:
    """Jobs of this node so far. `running` are all of them; `rejected` were the client's mistake, not a failure."""

    running: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0
    trials_running: int = 0
    trials_done: int = 0
    trials_failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """What a job would be served with: the task as described, the route, its votes, and what they come to."""

    model: ModelId
    context: TaskContext
    route: tuple[Stage, ...]
    votes: tuple[Vote, ...]
    agreed: str
    choice: Choice


class Coordinator:
    """Takes jobs submitted at this node; implements `Submitter`."""

    def __init__(
        self,
        models: Models,
        finder: Finder,
        link_pool: LinkPool,
        jitter: random.Random,
        links: Links,
        recorder: Recorder | None = None,
        *,
        chooser: Chooser | None = None,
        ledger: QualityStore | None = None,
        hardware: Callable[[PeerId], str] = lambda peer: "unknown",
        agreed: Callable[[ModelId], Agreement | None] = lambda model: None,
        bandwidth: Callable[[PeerId], float | None] = lambda peer: None,
        expected: Callable[[ModelId], Iterable[BlockRange]] = lambda model: (),
    ) -> None:
        """Take no job yet.

        `links`: between any two peers; `recorder` is told of every job that was done; `chooser` is our own preference
        among methods; `ledger` says what lossy methods do to a model's answers; `hardware` is the class of a peer's;
        `agreed` says what the swarm has agreed about a model; `bandwidth` is what a peer says of its memory, in bytes
        a second; `expected` are the blocks of a model that live peers mean to serve, and may be loading.
        """
        self.draining = False
        self._chooser = chooser or HeuristicChooser()
        self._ledger = ledger or NullQualityStore()
        self._hardware = hardware
        self._agreed = agreed
        self._salt = secrets.token_bytes(16)
        self._recent = RecentPrompts()
        self._recorder = recorder
        self._models = models
        self._jobs: dict[JobId, Job] = {}
        self._expected = expected
        self._planner = Planner(
            finder, links, link_pool.peer_id, rng=jitter, bandwidth=bandwidth, in_flight=self._in_flight
        )
        self._watcher = StragglerMonitor(self._planner)
        self._link_pool = link_pool
        self._jitter = jitter
        self._statistics = CoordinatorStatistics()
        self._idle = trio.Event()
        self._idle.set()

    def statistics(self) -> CoordinatorStatistics:
        """Return the counts of this node's jobs."""
        return self._statistics

    def peer_record(self, peer: PeerId) -> PeerRecord:
        """Return what this node's own jobs have shown of a peer: served, failed, lagged, its speed and its penalty."""
        return self._planner.record(peer)

    def peer_records(self) -> dict[PeerId, PeerRecord]:
        """Return the record of every peer of which something is remembered: a bounded number."""
        return self._planner.records()

    def _in_flight(self) -> Counter[PeerId]:
        """Return how many jobs of this node each peer has now."""
        return Counter(peer for job in self._jobs.values() for peer in {stage.peer for stage in job.stages})

    async def wait_idle(self) -> None:
        """Wait until no job is under way."""
        await self._idle.wait()

    async def model(self, text: str) -> KnownModel:
        """Return the model that a user means. Raises JobError."""
        try:
            return await self._models.open(text)
        except ModelError as error:
            raise JobError(JobErrorCode.MODEL_NOT_FOUND, str(error)) from None

    @asynccontextmanager
    async def submit(
        self, request: JobRequest, on_served: Callable[[ServedJob], None] | None = None
    ) -> AsyncIterator[AsyncIterator[JobEvent]]:
        """Run a job inside the block; see `Submitter`.

        `on_served` is told of the job once it is done, which then leaves no observation of its own.
        """
        if self.draining:
            raise JobError(JobErrorCode.LEAVING, "this node is about to leave; submit at another peer")
        is_trial = on_served is not None or request.background
        self._count(running=1, trials_running=is_trial)
        outcome = "cancelled"
        job: Job | None = None
        try:
            job = await self._prepare(request)
            self._jobs[job.id] = job
            job.on_served = on_served
            await self._await_leader(job)
            await self._open_route(job)
            async with aclosing(self._events(job)) as events:
                yield events
            outcome = "done" if job.route is None else "cancelled"
        except JobError as error:
            gives_way = request.background and error.code is JobErrorCode.FULL
            mistaken = error.code in CLIENT_MISTAKES
            outcome = "cancelled" if gives_way else "rejected" if mistaken else "failed"
            raise
        finally:
            if job is not None:
                self._jobs.pop(job.id, None)
                self._recent.end_turn(job.turn)
                job.set_aside()
                await job.close_former()
            if is_trial:
                outcome = "trials_done" if outcome == "done" else "trials_failed"
            self._count(running=-1, trials_running=-is_trial, **{outcome: 1})

    async def consider(self, request: JobRequest, told: Mapping[str, Any]) -> Considered:
        """Ask what a job would be served with now: the stages vote, and nothing is computed.

        `told`: fields of the task's context that are to be as told. Raises JobError.
        """
        job = await self._prepare(request)
        self._recent.end_turn(job.turn)  # nothing of it is computed
        job.told = told
        try:
            planned = await self._planner.route(job.need(), ())
        except NoRouteError as error:
            raise job.no_route(error) from None
        route = OpenRoute(planned.stages, self._link_pool, await self._opening(job, planned))
        try:
            with trio.fail_after(VOTE_LIMIT_S):
                await route.open()
                method, ballots = route.agree()
        except RouteRejected as rejected:
            job.avoided.update({rejection.peer: rejection for rejection in rejected.rejections})
            raise job.no_route(NoRouteError(())) from None
        except trio.TooSlowError:
            raise JobError(JobErrorCode.FAILED, f"the stages did not vote within {VOTE_LIMIT_S:.0f} s") from None
        finally:
            await route.close()
        if job.choice is None:
            raise AssertionError("a route is opened with a choice")
        names = tuple(route.opening.methods)
        votes = tuple(
            Vote(peer=ballot.peer, scores={n: s for n, s in zip(names, ballot.scores, strict=True) if s is not None})
            for ballot in ballots[:-1]
        )
        return Considered(
            model=job.model.id,
            context=job.context,
            route=planned.stages,
            votes=votes,
            agreed=method.name,
            choice=job.choice,
        )

    def _count(self, **changes: int) -> None:
        for name, change in changes.items():
            setattr(self._statistics, name, getattr(self._statistics, name) + change)
        if self._statistics.running == 0:
            self._idle.set()
        elif self._idle.is_set():
            self._idle = trio.Event()

    async def _prepare(self, request: JobRequest) -> Job:
        """Turn a request into a job: model, token ids and sampling, all within the model's limits."""
        began_s = trio.current_time()
        model = await self.model(request.model)
        prompt = await prompt_tokens(request, model)
        sampling = sampling_of(request, model, len(prompt))
        admitted = admitted_methods(request, model, self._ledger)
        job = Job(JobId(secrets.token_hex(16)), request, model, prompt, sampling, admitted, began_s)
        job.prefix = page_hashes(prompt, self._salt)
        job.turn = self._recent.take_turn(job.prefix, len(prompt))
        job.shared_prefix_share = self._recent.meet(job.prefix, len(prompt))
        return job

    async def _await_leader(self, job: Job) -> None:
        """Wait while another job computes most of this one's prompt: then it is found cached, and computed once."""
        if job.turn.leader is not None and any(method.prefix_cache for method in job.admitted):
            with trio.move_on_after(LEADER_PATIENCE_S):
                await job.turn.leader.over.wait()

    async def _open_route(self, job: Job) -> None:
        """Open a route for what is left of a job and send the tokens so far; try others where stages do not open.

        Stages that hold what they have calculated for the job go on with it; the routes before are closed when that is
        so. A job under way waits where there is no route, and forgives whom it has avoided, as long as somebody is
        known that could make one.
        """
        job.set_aside()
        waiting = _Waiting(trio.current_time())
        for attempt in count():
            if attempt:
                first_s, longest_s = BACKOFF_S
                await trio.sleep(self._jitter.uniform(0.5, 1.5) * min(longest_s, first_s * 2 ** min(attempt, 16)))
            is_patient = job.accepted and trio.current_time() < waiting.began_s + RECOVERY_LIMIT_S
            # Neither what nobody waits for nor what compares methods on one route tries out a peer.
            may_explore = not (job.accepted or attempt or job.request.background or job.on_served)
            try:
                planned = await self._planner.route(
                    job.need(), job.avoided, like=job.stages, held=job.held, may_explore=may_explore
                )
            except NoRouteError as error:
                waiting.reasons |= job.avoided
                if not is_patient or await self._is_hopeless(job, waiting, error):
                    job.avoided = waiting.reasons
                    raise job.no_route(error) from None
                job.avoided.clear()
                continue
            if await self._try_route(job, planned):
                job.stages = planned.stages
                break
            job.set_aside()
            # Peers of an older version are found out one by one, and cost the job no attempt.
            if not is_patient and attempt + 1 - len(job.outdated) >= MAX_ATTEMPTS:
                raise job.no_route(NoRouteError(()))
        if waiting.said:
            _logger.info("route found again", job=job.id, waited_s=round(trio.current_time() - waiting.began_s, 1))
        job.accepted = True
        await job.close_former()

    async def _is_hopeless(self, job: Job, waiting: "_Waiting", error: NoRouteError) -> bool:
        """Return whether nobody has been known for a while who could serve what is missing; say once what is."""
        if not waiting.said:
            waiting.said = True
            missing = ", ".join(map(str, error.missing))
            _logger.warning("no route left; waiting for a peer", job=job.id, model=job.model.name, blocks=missing)
        if self._planner.could_serve(job.need(), self._expected(job.model.id)):
            waiting.hopeless_since_s = trio.current_time()
            return False
        return trio.current_time() - waiting.hopeless_since_s >= HOPELESS_LIMIT_S

    async def _try_route(self, job: Job, planned: PlannedRoute) -> bool:
        """Open a route and send the tokens so far; say whether that went well. If not, it is known whom to avoid."""
        job.route = route = OpenRoute(planned.stages, self._link_pool, await self._opening(job, planned), job.held)
        tokens = [*job.prompt, *job.tokens]
        try:
            await self._watcher.open(job, route)
            job.method = route.begin(tokens)
            if not job.method.prefix_cache:
                self._recent.end_turn(job.turn)  # nobody will find what it computes
            if not job.accepted:
                job.cached_tokens = min(*route.starts, len(job.prompt) - 1)
            self._watcher.begin(job, route)
            await self._watcher.send_prompt(job, route, tokens)
        except RouteRejected as rejected:
            for rejection in rejected.rejections:
                self._avoid(job, rejection)
        except RouteLost as lost:
            self._blame(job, route, lost)
        else:
            return True
        return False

    async def _opening(self, job: Job, planned: PlannedRoute) -> Opening:
        """Return what the stages are asked for: methods in our order of preference, and the task they vote about."""
        left = job.sampling.max_tokens - len(job.tokens)
        context = describe(
            job.request,
            job.model,
            job.prompt,
            left,
            shared_prefix_share=job.shared_prefix_share,
            loads=planned.loads,
            hardware=[self._hardware(stage.peer) for stage in planned.stages],
            link_s=self._planner.round_s(planned.stages),
            transfer_s=self._planner.transfer_s(planned.stages, job.need().demand),
        )
        context = replace(context, **job.told)
        # A text goes on as it began: arithmetic is fixed for a job, also on the stages that replace lost ones.
        begun = job.method
        choice = await self._chooser.choose(
            SelectionRequest(
                model=job.model.id,
                context=context,
                admitted=_as_begun(begun) if begun else job.admitted,
                is_free=job.request.method == AUTO and not begun,
            )
        )
        if not begun:
            job.context, job.choice = context, choice
        ordered = choice.order
        return Opening(
            model=job.model.id,
            methods={method.name: method for method in ordered},
            ballot=choice.ballot,
            context=context.values(),
            positions=len(job.prompt) + job.sampling.max_tokens,
            prefix=job.prefix if any(method.prefix_cache for method in ordered) else b"",
            sampling=replace(job.sampling, max_tokens=left),
            background=job.request.background,
            agreed=self._agreed(job.model.id),
        )

    def _avoid(self, job: Job, rejection: StageRefusal) -> None:
        """Keep a job away from a peer; one that cannot be reached is taken for dead until it is heard again."""
        peer = rejection.peer
        log = _logger.debug if peer in job.unavailable else _logger.info
        log("stage not available", job=job.id, peer=peer, reason=rejection.message)
        job.unavailable.add(peer)
        if rejection.outdated:
            job.outdated[peer] = rejection
            return
        job.avoided[peer] = rejection
        if rejection.reason is None:
            self._planner.failed(peer, dead=not rejection.lagged, lagged=rejection.lagged)

    def _blame(self, job: Job, route: OpenRoute, lost: RouteLost) -> None:
        """Go on without whom a stage blames if it is on the route, else without itself: nobody may slander outsiders.

        Taken for dead is only whom we cannot reach ourselves: an engine that failed will be back, and of two peers that
        do not reach each other both live.
        """
        culprit = lost.blamed if lost.blamed in {stage.peer for stage in route.stages} else lost.reporter
        _logger.info("stage lost", job=job.id, peer=culprit, reason=lost.reason, message=lost.message)
        job.avoided[culprit] = StageRefusal(culprit, None, lost.message, lagged=lost.lagged)
        is_ours = lost.reason is FailureReason.EXPIRED or lost.blamed == self._link_pool.peer_id != culprit
        if not is_ours:
            # A stage that says that we are at fault may be right: the job goes on elsewhere, and that is all.
            self._planner.failed(culprit, dead=not self._link_pool.is_linked(culprit), lagged=lost.lagged)
        job.set_aside()
        job.held = {stage: session for stage, session in job.held.items() if stage.peer != culprit}

    async def _events(self, job: Job) -> AsyncGenerator[JobEvent, None]:
        """Yield the job's events; at the end the route is closed and `job.route` None."""
        yield JobStarted(
            job_id=job.id,
            model=job.model.id,
            model_name=job.model.name,
            prompt_tokens=len(job.prompt),
            created_s=int(time.time()),
        )
        decoder = StreamDecoder(job.model.tokenizer)
        finder = StopFinder(job.request.stop)
        text: list[str] = []
        finish: FinishReason | None = None
        while finish is None:
            drawn = await self._next_token(job)
            job.first_token_s = job.first_token_s or trio.current_time()
            self._recent.end_turn(job.turn)
            job.tokens.append(drawn.token)
            job.fruitless = 0
            finish = drawn.finish_reason
            if finish is None and len(job.tokens) >= job.sampling.max_tokens:
                finish = FinishReason.LENGTH  # the last stage should have said so
            try:
                # A stop token is none of the text, and a stop string counts once there are min_tokens.
                piece = "" if finish is FinishReason.STOP else await decoder.feed(drawn.token)
                if len(job.tokens) > job.request.min_tokens:
                    piece = finder.feed(piece)
                if finder.found:
                    finish = FinishReason.STOP
                elif finish:
                    piece += finder.feed(await decoder.finish()) + finder.finish()
            except ModelError as error:
                raise JobError(JobErrorCode.FAILED, str(error)) from None
            text.append(piece)
            yield TextDelta(text=piece, token_ids=(drawn.token,))
        ended_s = trio.current_time()
        yield await self._finish(job, "".join(text), finish, ended_s)

    async def _next_token(self, job: Job) -> SampledToken:
        """Wait for the next token; where a stage is lost, or would like to go, take another route first."""
        while True:
            route = job.route
            if route is None:
                raise AssertionError("a job under way has a route")
            if leaving := route.leaving - job.bound:
                await self._hand_over(job, leaving)
                continue
            try:
                return await self._watcher.token(job, route)
            except RouteLost as lost:
                job.replays += 1
                job.fruitless += 1
                if job.fruitless > MAX_ATTEMPTS:
                    raise JobError(JobErrorCode.FAILED, f"stages were lost too often, last {lost}") from None
                self._blame(job, route, lost)
                await self._open_route(job)

    async def _hand_over(self, job: Job, leaving: Collection[PeerId]) -> None:
        """Let others take the places of peers that would like to go, if there are any."""
        job.bound.update(leaving)
        without = {*job.avoided, *leaving}
        held = job.route.held() if job.route else {}
        try:
            await self._planner.route(job.need(), without, like=job.stages, held=held)
        except NoRouteError:
            _logger.info("nobody to take the place of a peer that leaves", job=job.id, peers=sorted(leaving))
            return
        job.replays += 1
        for peer in leaving:
            job.avoided[peer] = StageRefusal(peer, RefusalReason.LEAVING, "is about to leave")
        await self._open_route(job)

    async def _finish(self, job: Job, text: str, finish: FinishReason, ended_s: float) -> JobResult:
        route = job.route
        if route is None:
            raise AssertionError("a job that ends has a route")
        closed = await route.close()
        job.route = None
        self._planner.served(stage.peer for stage in route.stages)
        self._planner.measured(job.need(), route.stages, route.loads(), timing_of(route, closed))
        result = result_of(job, route, closed, text, finish, ended_s)
        if job.choice is not None:
            outcome = Outcome(
                job_id=job.id,
                method=result.method.name,
                completion_tokens=len(job.tokens),
                total_s=result.timing.total_s,
                replays=job.replays,
            )
            result = replace(result, selection=self._chooser.served(job.choice, outcome))
        served = served_of(job, route, closed, result)
        if job.on_served is not None:
            job.on_served(served)
        elif self._recorder is not None:
            await self._recorder.record(served)
        return result


@dataclass(slots=True)
class _Waiting:
    """A job's search for a route: since when, since when nobody is known who could make one, and whether it was said.

    `reasons`: why peers were not used.
    """

    began_s: float
    hopeless_since_s: float = 0.0
    said: bool = False
    reasons: dict[PeerId, StageRefusal] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hopeless_since_s = self.began_s


def _as_begun(method: Method) -> list[Method]:
    """Return how a text may go on: as it began, or without guesses where whoever takes over has no draft model."""
    return [method, method.without_guesses] if method.drafter == "draft" else [method]
