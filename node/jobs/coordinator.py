"""The coordinator: takes a job, finds a route, opens its stages, and turns the tokens that come back into text.

A stage that is lost in mid-job does not end the job: the tokens so far are replayed over another route, and since
greedy decoding is deterministic and sampling is keyed by position, the text goes on as if nothing had happened.
"""

import random
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

import structlog
import trio

from node.jobs.choosing import (
    Choice,
    Chooser,
    Ledger,
    NoLedger,
    Question,
    RuleChooser,
    admitted_methods,
    describe,
)
from node.jobs.interface import (
    AUTO,
    Agreed,
    Consensus,
    JobError,
    JobErrorCode,
    JobEvent,
    JobRequest,
    JobResult,
    JobStarted,
    MethodChoice,
    Outcome,
    RouteStage,
    TextDelta,
    Timing,
    Usage,
    Vote,
)
from node.jobs.patience import Patience
from node.jobs.planner import Finder, Planner, RouteNeed
from node.jobs.prefix import RecentPrefixes, Turn, page_hashes
from node.jobs.recorder import Recorder, ServedJob
from node.jobs.requests import prompt_tokens, sampling_of
from node.jobs.route import Drawn, Opening, OpenRoute, Rejection, RouteLost, RouteRejected, Stop
from node.jobs.switchboard import Switchboard
from node.models.errors import ModelError
from node.models.library import KnownModel
from node.models.tokenizer import StopFinder, StreamDecoder
from protocol.identity import BlockRange, JobId, ModelId, PeerId, SessionId
from protocol.measurements import StageObservation
from protocol.messages import Closed, FinishReason, Opened, RefusalReason, Sampling
from selector.routing import Demand, Links, NoRouteError
from selector.task import Method, TaskContext

MAX_ATTEMPTS = 5
"""Routes tried for a new job; also routes that a job under way may lose one after another without a token."""

RECOVERY_LIMIT_S = 90.0
"""How long a job under way waits for a route where there is none: what it has calculated is held meanwhile.

A peer that could take a lost stage's place may have to build the job's variant first (`span.BUILD_PATIENCE_S`, and the
building).
"""

BACKOFF_S = (0.05, 1.0)
"""First and longest pause, give or take half, before another route is tried."""

PROBE_TIMEOUT_S = 1.0
"""How long a stage may take to say that it is there, when a token is late."""

STALL_LIMIT_S = 120.0
"""A job that gets no token for this long gives its route up, though every stage still answers pings."""

SHORT_PROMPT_CHARACTERS = 4096
"""Longer prompts, and conversations, whose templates may do anything, are tokenised in a thread."""

LEADER_PATIENCE_S = 30.0
"""How long a job waits at most for another to compute what both prompts begin with."""

RETRY_AFTER_S = 2.0
"""What a client is told to wait where blocks are not served or peers are full."""

_logger = structlog.get_logger(__name__)


class Models(Protocol):
    """Knows the models of the swarm; `node.models.library` is the real one."""

    async def open(self, text: str) -> KnownModel:
        """Return the model that the user means. Raises ModelError with one line for the user."""
        ...


@dataclass(slots=True)
class CoordinatorStatistics:
    """Jobs of this node so far."""

    running: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """What a job would be served with: the task as described, the route, its votes, and what they come to."""

    model: ModelId
    context: TaskContext
    route: tuple[tuple[PeerId, BlockRange], ...]
    votes: tuple[Vote, ...]
    agreed: str
    choice: Choice


@dataclass(slots=True)
class _Job:
    """A job under way."""

    id: JobId
    request: JobRequest
    model: KnownModel
    prompt: tuple[int, ...]
    sampling: Sampling
    admitted: list[Method]
    began_s: float
    on_served: Callable[[ServedJob], None] | None = None
    """Who is told instead of the recorder when the job is done."""
    prefix: bytes = b""
    turn: Turn = field(default_factory=lambda: Turn((), None))
    shared_prefix_share: float = 0.0
    context: TaskContext = field(default_factory=TaskContext)
    """As described for the first route that opened; and what was chosen from for it."""
    choice: Choice | None = None
    told: Mapping[str, Any] = field(default_factory=dict)
    """Of the context, what is taken as told and not as it is."""
    method: Method | None = None
    """What the votes came to; kept on every later route that can."""
    cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    first_token_s: float = 0.0
    replays: int = 0
    fruitless: int = 0
    """Routes that were lost since the last token."""
    rounds: int = 0
    """Rounds of the routes before this one."""
    avoided: dict[PeerId, Rejection] = field(default_factory=dict)
    bound: set[PeerId] = field(default_factory=set)
    """Peers that would like to go, and were asked for."""
    stops: list[Stop] = field(default_factory=list)
    """Of the last route that was open, also of one that was lost."""
    route: OpenRoute | None = None
    former: list[OpenRoute] = field(default_factory=list)
    """Routes before this one, not closed yet: what their stages hold may be continued."""
    held: dict[Stop, SessionId] = field(default_factory=dict)
    """The newest session of the job at each stage that is thought to hold one."""
    accepted: bool = False
    """A route was open once."""
    patience: Patience = field(default_factory=Patience)

    def need(self) -> RouteNeed:
        """Return what is needed of a route for what is left of the job."""
        rows = len(self.prompt) + len(self.tokens)
        new_tokens = self.sampling.max_tokens - len(self.tokens)
        demand = Demand(
            block_count=self.model.block_count,
            prompt_rows=rows,
            new_tokens=new_tokens,
            row_bytes=4 * self.model.hidden_size,
        )
        return RouteNeed(model=self.model.id, demand=demand)

    def set_aside(self) -> None:
        """Take the route for a former one, whose stages are to be continued as far as they are there."""
        if self.route is None:
            return
        holding = self.route.held()
        for stop, answer in zip(self.route.stops, self.route.answers, strict=True):
            if stop in holding:
                self.held[stop] = holding[stop]
            elif answer is not None:
                self.held.pop(stop, None)
        self.rounds += self.route.rounds
        self.former.append(self.route)
        self.route = None


class Coordinator:
    """Takes jobs submitted at this node; implements `Submitter`."""

    def __init__(
        self,
        models: Models,
        finder: Finder,
        switchboard: Switchboard,
        jitter: random.Random,
        links: Links,
        recorder: Recorder | None = None,
        *,
        chooser: Chooser | None = None,
        ledger: Ledger | None = None,
        hardware: Callable[[PeerId], str] = lambda peer: "unknown",
        agreed: Callable[[ModelId], Agreed | None] = lambda model: None,
    ) -> None:
        """Take no job yet.

        `links`: between any two peers; `recorder` is told of every job that was done; `chooser` is our own preference
        among methods; `ledger` says what lossy methods do to a model's answers; `hardware` is the class of a peer's;
        `agreed` says what the swarm has agreed about a model.
        """
        self.draining = False
        self._chooser = chooser or RuleChooser()
        self._ledger = ledger or NoLedger()
        self._hardware = hardware
        self._agreed = agreed
        self._salt = secrets.token_bytes(16)
        self._recent = RecentPrefixes()
        self._recorder = recorder
        self._models = models
        self._planner = Planner(finder, links, switchboard.peer_id)
        self._switchboard = switchboard
        self._jitter = jitter
        self._statistics = CoordinatorStatistics()
        self._idle = trio.Event()
        self._idle.set()

    def statistics(self) -> CoordinatorStatistics:
        """Return the counts of this node's jobs."""
        return self._statistics

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
        self._count(running=1)
        outcome = "cancelled"
        job: _Job | None = None
        try:
            job = await self._prepare(request)
            job.on_served = on_served
            await self._await_leader(job)
            await self._open_route(job)
            async with aclosing(self._events(job)) as events:
                yield events
            outcome = "done" if job.route is None else "cancelled"
        except JobError:
            outcome = "failed"
            raise
        finally:
            if job is not None:
                self._recent.end_turn(job.turn)
                job.set_aside()
                await _close_former(job)
            self._count(running=-1, **{outcome: 1})

    async def consider(self, request: JobRequest, told: Mapping[str, Any]) -> Considered:
        """Ask what a job would be served with now: the stages vote, and nothing is computed.

        `told`: fields of the task's context that are to be as told. Raises JobError.
        """
        job = await self._prepare(request)
        self._recent.end_turn(job.turn)  # nothing of it is computed
        job.told = told
        try:
            stops = await self._planner.route(job.need(), ())
        except NoRouteError as error:
            raise _no_route(job, error) from None
        route = OpenRoute(stops, self._switchboard, await self._opening(job, stops))
        try:
            with trio.fail_after(STALL_LIMIT_S):
                await route.open()
                method, ballots = route.agree()
        except RouteRejected as rejected:
            job.avoided.update({rejection.peer: rejection for rejection in rejected.rejections})
            raise _no_route(job, NoRouteError(())) from None
        except trio.TooSlowError:
            raise JobError(JobErrorCode.FAILED, f"the stages did not vote within {STALL_LIMIT_S:.0f} s") from None
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
            route=tuple((stop.peer, stop.blocks) for stop in stops),
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

    async def _prepare(self, request: JobRequest) -> _Job:
        """Turn a request into a job: model, token ids and sampling, all within the model's limits."""
        began_s = trio.current_time()
        model = await self.model(request.model)
        if request.messages is not None or len(request.prompt or "") > SHORT_PROMPT_CHARACTERS:
            prompt = await trio.to_thread.run_sync(prompt_tokens, request, model)
        else:
            prompt = prompt_tokens(request, model)
        sampling = sampling_of(request, model, len(prompt))
        admitted = admitted_methods(request, model, self._ledger)
        job = _Job(JobId(secrets.token_hex(16)), request, model, prompt, sampling, admitted, began_s)
        job.prefix = page_hashes(prompt, self._salt)
        job.turn = self._recent.take_turn(job.prefix, len(prompt))
        job.shared_prefix_share = self._recent.meet(job.prefix, len(prompt))
        return job

    async def _await_leader(self, job: _Job) -> None:
        """Wait while another job computes most of this one's prompt: then it is found cached, and computed once."""
        if job.turn.leader is not None and any(method.prefix_cache for method in job.admitted):
            with trio.move_on_after(LEADER_PATIENCE_S):
                await job.turn.leader.over.wait()

    async def _open_route(self, job: _Job) -> None:
        """Open a route for what is left of a job and send the tokens so far; try others where stages do not open.

        Stages that hold what they have calculated for the job go on with it; the routes before are closed when that is
        so. A job under way waits for a while where there is no route, and forgives whom it has avoided.
        """
        job.set_aside()
        limit_s = trio.current_time() + RECOVERY_LIMIT_S
        for attempt in count():
            if attempt:
                first_s, longest_s = BACKOFF_S
                await trio.sleep(self._jitter.uniform(0.5, 1.5) * min(longest_s, first_s * 2**attempt))
            is_patient = job.accepted and trio.current_time() < limit_s
            try:
                stops = await self._planner.route(job.need(), job.avoided, like=job.stops, held=job.held)
            except NoRouteError as error:
                if not is_patient:
                    raise _no_route(job, error) from None
                job.avoided.clear()
                continue
            if await self._try_route(job, stops):
                job.stops = stops
                break
            job.set_aside()
            if not is_patient and attempt + 1 >= MAX_ATTEMPTS:
                raise _no_route(job, NoRouteError(()))
        job.accepted = True
        await _close_former(job)

    async def _try_route(self, job: _Job, stops: list[Stop]) -> bool:
        """Open a route and send the tokens so far; say whether that went well. If not, it is known whom to avoid."""
        job.route = route = OpenRoute(stops, self._switchboard, await self._opening(job, stops), job.held)
        tokens = [*job.prompt, *job.tokens]
        try:
            with trio.fail_after(STALL_LIMIT_S):
                await route.open()
                job.method = route.begin(tokens)
                if not job.method.prefix_cache:
                    self._recent.end_turn(job.turn)  # nobody will find what it computes
                if not job.accepted:
                    job.cached_tokens = min(*route.starts, len(job.prompt) - 1)
                await route.send_prompt(tokens, job.model.hidden_size)
        except RouteRejected as rejected:
            for rejection in rejected.rejections:
                self._avoid(job, rejection)
        except RouteLost as lost:
            self._blame(job, route, lost)
        except trio.TooSlowError:
            self._avoid(job, Rejection(stops[0].peer, None, f"took nothing for {STALL_LIMIT_S:.0f} s"))
        else:
            return True
        return False

    async def _opening(self, job: _Job, stops: Sequence[Stop]) -> Opening:
        """Return what the stages are asked for: methods in our order of preference, and the task they vote about."""
        left = job.sampling.max_tokens - len(job.tokens)
        context = describe(
            job.request,
            job.model,
            job.prompt,
            left,
            shared_prefix_share=job.shared_prefix_share,
            loads=[stop.load for stop in stops],
            hardware=[self._hardware(stop.peer) for stop in stops],
            link_s=self._planner.round_s(stops),
        )
        context = replace(context, **job.told)
        # A text goes on as it began: arithmetic is fixed for a job, also on the stages that replace lost ones.
        begun = job.method is not None and job.method in job.admitted
        choice = await self._chooser.choose(
            Question(
                model=job.model.id,
                context=context,
                admitted=[job.method] if job.method is not None and begun else job.admitted,
                is_free=job.request.method == AUTO and not begun,
                may_explore=job.request.budget is None,
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

    def _avoid(self, job: _Job, rejection: Rejection) -> None:
        """Keep a job away from a peer; one that cannot be reached is taken for dead until it is heard again."""
        _logger.info("stage not available", job=job.id, peer=rejection.peer, reason=rejection.message)
        job.avoided[rejection.peer] = rejection
        if rejection.reason is None:
            self._planner.failed(rejection.peer, dead=True)

    def _blame(self, job: _Job, route: OpenRoute, lost: RouteLost) -> None:
        """Go on without whom a stage blames if it is on the route, else without itself: nobody may slander outsiders.

        Taken for dead is only whom we cannot reach ourselves: an engine that failed will be back, and of two peers that
        do not reach each other both live.
        """
        culprit = lost.blamed if lost.blamed in {stop.peer for stop in route.stops} else lost.reporter
        _logger.info("stage lost", job=job.id, peer=culprit, reason=lost.reason, message=lost.message)
        job.avoided[culprit] = Rejection(culprit, None, lost.message)
        self._planner.failed(culprit, dead=not self._switchboard.is_linked(culprit))
        job.set_aside()
        job.held = {stop: session for stop, session in job.held.items() if stop.peer != culprit}

    async def _events(self, job: _Job) -> AsyncGenerator[JobEvent, None]:
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
            piece = finder.feed(decoder.feed(drawn.token))
            if finder.found:
                finish = FinishReason.STOP
            elif finish:
                piece += finder.feed(decoder.finish()) + finder.finish()
            text.append(piece)
            yield TextDelta(text=piece, token_ids=(drawn.token,))
        ended_s = trio.current_time()
        yield await self._finish(job, "".join(text), finish, ended_s)

    async def _next_token(self, job: _Job) -> Drawn:
        """Wait for the next token; where a stage is lost, or would like to go, take another route first."""
        while True:
            route = job.route
            if route is None:
                raise AssertionError("a job under way has a route")
            if leaving := route.leaving - job.bound:
                await self._hand_over(job, leaving)
                continue
            try:
                with trio.fail_after(STALL_LIMIT_S):
                    return await self._patient_token(job, route)
            except trio.TooSlowError:
                raise JobError(JobErrorCode.FAILED, f"no token came for {STALL_LIMIT_S:.0f} s; gave up") from None
            except RouteLost as lost:
                job.replays += 1
                job.fruitless += 1
                if job.fruitless > MAX_ATTEMPTS:
                    raise JobError(JobErrorCode.FAILED, f"stages were lost too often, last {lost}") from None
                self._blame(job, route, lost)
                await self._open_route(job)

    async def _hand_over(self, job: _Job, leaving: Collection[PeerId]) -> None:
        """Let others take the places of peers that would like to go, if there are any."""
        job.bound.update(leaving)
        without = {*job.avoided, *leaving}
        held = job.route.held() if job.route else {}
        try:
            await self._planner.route(job.need(), without, like=job.stops, held=held)
        except NoRouteError:
            _logger.info("nobody to take the place of a peer that leaves", job=job.id, peers=sorted(leaving))
            return
        job.replays += 1
        for peer in leaving:
            job.avoided[peer] = Rejection(peer, RefusalReason.LEAVING, "is about to leave")
        await self._open_route(job)

    async def _patient_token(self, job: _Job, route: OpenRoute) -> Drawn:
        """Wait for the next token; while it is late, see that no stage has fallen silent."""
        asked_s = trio.current_time()
        while True:
            with trio.move_on_after(job.patience.seconds):
                drawn = await route.next_token()
                job.patience.learn(trio.current_time() - asked_s)
                return drawn
            await route.probe(PROBE_TIMEOUT_S)

    async def _finish(self, job: _Job, text: str, finish: FinishReason, ended_s: float) -> JobResult:
        route = job.route
        if route is None:
            raise AssertionError("a job that ends has a route")
        closed = await route.close()
        job.route = None
        self._planner.served(stop.peer for stop in route.stops)
        method = route.method
        if method is None:
            raise AssertionError("a job that ends has begun")
        token_count = len(job.tokens)
        agreed = route.opening.agreed
        votes = tuple(
            Vote(peer=stop.peer, scores=dict(answer.votes))
            for stop, answer in zip(route.stops, route.answers, strict=True)
            if answer is not None and answer.votes
        )
        result = JobResult(
            job_id=job.id,
            model=job.model.id,
            model_name=job.model.name,
            text=text,
            token_ids=tuple(job.tokens),
            finish_reason=finish,
            usage=Usage(
                prompt_tokens=len(job.prompt),
                completion_tokens=token_count,
                cached_tokens=job.cached_tokens,
                accepted_draft_tokens=max(0, token_count - job.rounds - route.rounds),
            ),
            timing=Timing(
                ttft_s=job.first_token_s - job.began_s,
                tpot_s=(ended_s - job.first_token_s) / (token_count - 1) if token_count > 1 else 0.0,
                total_s=ended_s - job.began_s,
            ),
            route=tuple(map(_stage_of, route.stops, closed)),
            method=MethodChoice(
                name=method.name, switches=dict(method.switches), stage_policy=_stage_policy(route.answers)
            ),
            consensus=Consensus(
                votes=votes,
                agreed=method.name,
                weighed=route.weighs(),
                epoch=agreed.epoch if agreed else None,
                table_digest=agreed.table_digest.hex() if agreed else None,
            ),
            replays=job.replays,
        )
        if job.choice is not None:
            outcome = Outcome(
                job_id=job.id,
                method=method.name,
                completion_tokens=token_count,
                total_s=result.timing.total_s,
                replays=job.replays,
            )
            result = replace(result, selection=self._chooser.served(job.choice, outcome))
        served = ServedJob(
            result=result,
            request=job.request,
            manifest=job.model.manifest,
            job=route.job,
            route=tuple(map(_observed, route.stops, closed)),
            concurrency=max((answer.load.sessions for answer in route.answers if answer), default=1),
            shared_prefix_share=job.shared_prefix_share,
            repetitiveness=job.context.repetitiveness,
            link_s=job.context.link_s,
        )
        if job.on_served is not None:
            job.on_served(served)
        elif self._recorder is not None:
            await self._recorder.record(served)
        return result


async def _close_former(job: _Job) -> None:
    """Close the routes before the one in force; what has been continued of them is over already."""
    former, job.former = job.former, []
    async with trio.open_nursery() as nursery:
        for route in former:
            nursery.start_soon(route.close)


def _observed(stop: Stop, closed: Closed) -> StageObservation:
    return StageObservation(
        peer=stop.peer,
        blocks=stop.blocks,
        hardware=closed.hardware,
        statistics=closed.statistics,
        countersignature=closed.countersignature,
    )


def _stage_of(stop: Stop, closed: Closed) -> RouteStage:
    statistics = closed.statistics
    return RouteStage(peer=stop.peer, blocks=stop.blocks, compute_s=statistics.compute_s, queue_s=statistics.queue_s)


def _stage_policy(answers: Iterable[Opened | None]) -> dict[str, str]:
    """Return the stages' own switches; where they differ, all values there are, joined by "+"."""
    values: dict[str, set[str]] = {}
    for answer in answers:
        for switch, value in (answer.policy if answer else {}).items():
            values.setdefault(switch, set()).add(value)
    return {switch: "+".join(sorted(found)) for switch, found in values.items()}


def _no_route(job: _Job, error: NoRouteError) -> JobError:
    """Say why no route was found: blocks that nobody serves, or peers that would not or could not take the job."""
    if job.avoided:
        reasons = "; ".join(f"{r.peer}: {r.message}" for r in job.avoided.values())
        if any(rejection.reason is RefusalReason.FULL for rejection in job.avoided.values()):
            message = f"the peers that serve {job.model.name} have no room now ({reasons}); try again later"
            return JobError(JobErrorCode.FULL, message, retry_after_s=RETRY_AFTER_S)
        if any(rejection.reason is RefusalReason.NOT_READY for rejection in job.avoided.values()):
            names = " or ".join(method.name for method in job.admitted)
            message = f"{names} is not ready on the peers that serve {job.model.name} ({reasons}); try again later"
            return JobError(JobErrorCode.UNCOVERED, message, retry_after_s=RETRY_AFTER_S)
        missing = _ranges(error) or "some blocks"
        message = f"no peer is left to serve {missing} of {job.model.name} ({reasons})"
        return JobError(JobErrorCode.UNCOVERED, message, retry_after_s=RETRY_AFTER_S)
    message = f"no peer serves {_ranges(error)} of {job.model.name}; a node started with --serve would"
    return JobError(JobErrorCode.UNCOVERED, message, retry_after_s=RETRY_AFTER_S)


def _ranges(error: NoRouteError) -> str:
    if not error.missing:
        return ""
    return "blocks " + ", ".join(f"{start}-{end}" for start, end in error.missing)
