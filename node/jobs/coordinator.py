"""The coordinator: takes a job, finds a route, opens its stages, and turns the tokens that come back into text.

A stage that is lost in mid-job does not end the job: the tokens so far are replayed over another route, and since
greedy decoding is deterministic and sampling is keyed by position, the text goes on as if nothing had happened.
"""

import math
import random
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog
import trio

from node.jobs.interface import (
    Consensus,
    JobError,
    JobErrorCode,
    JobEvent,
    JobRequest,
    JobResult,
    JobStarted,
    MethodChoice,
    RouteStage,
    TextDelta,
    Timing,
    Usage,
    Vote,
)
from node.jobs.planner import Finder, Planner, RouteNeed
from node.jobs.recorder import Recorder
from node.jobs.route import Drawn, OpenRoute, Rejection, RouteLost, RouteRejected, Stop
from node.jobs.switchboard import Switchboard
from node.models.errors import ModelError
from node.models.library import KnownModel
from node.models.tokenizer import StopFinder, StreamDecoder
from protocol.identity import JobId, PeerId
from protocol.measurements import StageObservation
from protocol.messages import Closed, FinishReason, RefusalReason, Sampling
from selector.routing import Demand, Links, NoRouteError
from selector.task import METHODS, Method

DEFAULT_MAX_TOKENS = 512
"""New tokens of a job that names no limit, as far as the model's context allows."""

MAX_ATTEMPTS = 5
"""Routes tried for one job, the first included, while no token comes of them."""

STALL_LIMIT_S = 120.0
"""A job that gets no token for this long gives its route up, though every stage still answers pings."""

SHORT_PROMPT_CHARACTERS = 4096
"""Longer prompts, and conversations, whose templates may do anything, are tokenised in a thread."""

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


@dataclass(slots=True)
class _Job:
    """A job under way."""

    id: JobId
    request: JobRequest
    model: KnownModel
    prompt: tuple[int, ...]
    sampling: Sampling
    method: Method
    began_s: float
    tokens: list[int] = field(default_factory=list)
    first_token_s: float = 0.0
    replays: int = 0
    avoided: dict[PeerId, Rejection] = field(default_factory=dict)
    route: OpenRoute | None = None

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
    ) -> None:
        """Take no job yet. `links`: between any two peers; `recorder` is told of every job that was done."""
        self.draining = False
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

    @asynccontextmanager
    async def submit(self, request: JobRequest) -> AsyncIterator[AsyncIterator[JobEvent]]:
        """Run a job inside the block; see `Submitter`."""
        if self.draining:
            raise JobError(JobErrorCode.LEAVING, "this node is about to leave; submit at another peer")
        self._count(running=1)
        outcome = "cancelled"
        job: _Job | None = None
        try:
            job = await self._prepare(request)
            await self._open_route(job)
            async with aclosing(self._events(job)) as events:
                yield events
            outcome = "done" if job.route is None else "cancelled"
        except JobError:
            outcome = "failed"
            raise
        finally:
            if job is not None and job.route is not None:
                await job.route.close()
            self._count(running=-1, **{outcome: 1})

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
        method = _method_of(request)
        try:
            model = await self._models.open(request.model)
        except ModelError as error:
            raise JobError(JobErrorCode.MODEL_NOT_FOUND, str(error)) from None
        if request.messages is not None or len(request.prompt or "") > SHORT_PROMPT_CHARACTERS:
            prompt = await trio.to_thread.run_sync(_prompt_tokens, request, model)
        else:
            prompt = _prompt_tokens(request, model)
        sampling = _sampling_of(request, model, len(prompt))
        return _Job(JobId(secrets.token_hex(16)), request, model, prompt, sampling, method, began_s)

    async def _open_route(self, job: _Job) -> None:
        """Open a route for what is left of a job and send the tokens so far; try others where stages do not open."""
        left = job.sampling.max_tokens - len(job.tokens)
        sampling = replace(job.sampling, max_tokens=left)
        positions = len(job.prompt) + job.sampling.max_tokens
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                await trio.sleep(self._jitter.uniform(0.5, 1.5) * 0.05 * 2**attempt)
            try:
                stops = await self._planner.route(job.need(), job.avoided)
            except NoRouteError as error:
                raise _no_route(job, error) from None
            route = OpenRoute(stops, self._switchboard, sampling)
            job.route = route
            try:
                with trio.fail_after(STALL_LIMIT_S):
                    await route.open(job.model.id, job.method.name, positions, sampling)
                    await route.send_prompt([*job.prompt, *job.tokens], job.model.hidden_size)
            except RouteRejected as rejected:
                for rejection in rejected.rejections:
                    self._avoid(job, rejection)
            except RouteLost as lost:
                self._avoid_culprit(job, route, lost)
            except trio.TooSlowError:
                self._avoid(job, Rejection(stops[0].peer, None, f"took nothing for {STALL_LIMIT_S:.0f} s"))
            else:
                return
            await route.close()
            job.route = None
        raise _no_route(job, NoRouteError(()))

    def _avoid(self, job: _Job, rejection: Rejection) -> None:
        """Keep a job away from a peer; one that cannot be reached is taken for dead until it is heard again."""
        _logger.info("stage not available", job=job.id, peer=rejection.peer, reason=rejection.message)
        job.avoided[rejection.peer] = rejection
        if rejection.reason is None:
            self._planner.failed(rejection.peer, dead=True)

    def _avoid_culprit(self, job: _Job, route: OpenRoute, lost: RouteLost) -> None:
        """Avoid whom a stage blames if it is on the route, else the stage itself: nobody may slander outsiders."""
        culprit = lost.blamed if lost.blamed in {stop.peer for stop in route.stops} else lost.reporter
        self._avoid(job, Rejection(culprit, None, lost.message))

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
            job.tokens.append(drawn.token)
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
        """Wait for the next token; where a stage is lost, replay over another route first."""
        while True:
            if job.route is None:
                raise AssertionError("a job under way has a route")
            try:
                with trio.fail_after(STALL_LIMIT_S):
                    return await job.route.next_token()
            except trio.TooSlowError:
                raise JobError(JobErrorCode.FAILED, f"no token came for {STALL_LIMIT_S:.0f} s; gave up") from None
            except RouteLost as lost:
                job.replays += 1
                if job.replays > MAX_ATTEMPTS:
                    raise JobError(JobErrorCode.FAILED, f"stages were lost too often, last {lost}") from None
                self._avoid_culprit(job, job.route, lost)
                await job.route.close()
                job.route = None
                await self._open_route(job)

    async def _finish(self, job: _Job, text: str, finish: FinishReason, ended_s: float) -> JobResult:
        route = job.route
        if route is None:
            raise AssertionError("a job that ends has a route")
        closed = await route.close()
        job.route = None
        self._planner.served(stop.peer for stop in route.stops)
        count = len(job.tokens)
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
            usage=Usage(prompt_tokens=len(job.prompt), completion_tokens=count),
            timing=Timing(
                ttft_s=job.first_token_s - job.began_s,
                tpot_s=(ended_s - job.first_token_s) / (count - 1) if count > 1 else 0.0,
                total_s=ended_s - job.began_s,
            ),
            route=tuple(map(_stage_of, route.stops, closed)),
            method=MethodChoice(
                name=job.method.name, switches=dict(job.method.session), stage_policy=dict(job.method.stage)
            ),
            consensus=Consensus(votes=votes, agreed=job.method.name, epoch=None, table_digest=None),
            replays=job.replays,
        )
        if self._recorder is not None:
            await self._recorder.record(
                result,
                job.request,
                job.model.manifest,
                job=route.job,
                route=tuple(map(_observed, route.stops, closed)),
                concurrency=max((answer.load.sessions for answer in route.answers if answer), default=1),
            )
        return result


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


def _method_of(request: JobRequest) -> Method:
    name = "baseline" if request.method == "auto" else request.method
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise JobError(JobErrorCode.INVALID, f"there is no method {name!r}; known are auto, {known}")
    return METHODS[name]


def _prompt_tokens(request: JobRequest, model: KnownModel) -> tuple[int, ...]:
    """Return the prompt as token ids; the request gives it as text, as a conversation, or as ids."""
    given = [form for form in (request.prompt, request.prompt_tokens, request.messages) if form is not None]
    if len(given) != 1:
        raise JobError(JobErrorCode.INVALID, "give exactly one of prompt, prompt tokens and messages")
    try:
        if request.messages is not None:
            turns = [{"role": message.role, "content": message.content} for message in request.messages]
            tokens = tuple(model.tokenizer.render_chat(turns))
        elif request.prompt is not None:
            tokens = tuple(model.tokenizer.encode(request.prompt))
        else:
            tokens = request.prompt_tokens or ()
    except (ValueError, ModelError) as error:
        raise JobError(JobErrorCode.INVALID, str(error)) from None
    if not tokens:
        raise JobError(JobErrorCode.INVALID, "the prompt is empty")
    if not all(0 <= token < model.vocabulary_size for token in tokens):
        raise JobError(JobErrorCode.INVALID, f"token ids of this model are 0 to {model.vocabulary_size - 1}")
    return tokens


def _sampling_of(request: JobRequest, model: KnownModel, prompt_length: int) -> Sampling:
    room = model.max_positions - prompt_length
    wanted = request.max_tokens
    if room < 1 or (wanted is not None and wanted > room):
        raise JobError(
            JobErrorCode.CONTEXT_LENGTH,
            f"the prompt has {prompt_length} tokens and {wanted or 'some'} new ones are asked for, "
            f"but the model's context holds {model.max_positions}: shorten the prompt or ask for fewer",
        )
    if wanted is not None and wanted < 1:
        raise JobError(JobErrorCode.INVALID, "max_tokens must be at least 1")
    if not (math.isfinite(request.temperature) and 0 <= request.temperature <= 100 and 0 < request.top_p <= 1):
        raise JobError(JobErrorCode.INVALID, "temperature must be at least 0, and top_p above 0 and at most 1")
    return Sampling(
        temperature=request.temperature,
        top_p=request.top_p,
        seed=secrets.randbits(32) if request.seed is None else request.seed & (2**64 - 1),
        max_tokens=min(room, DEFAULT_MAX_TOKENS) if wanted is None else wanted,
        stop_tokens=() if request.ignore_eos else model.tokenizer.stop_tokens,
    )


def _no_route(job: _Job, error: NoRouteError) -> JobError:
    """Say why no route was found: blocks that nobody serves, or peers that would not or could not take the job."""
    if job.avoided:
        reasons = "; ".join(f"{r.peer}: {r.message}" for r in job.avoided.values())
        if any(rejection.reason is RefusalReason.FULL for rejection in job.avoided.values()):
            message = f"the peers that serve {job.model.name} have no room now ({reasons}); try again later"
            return JobError(JobErrorCode.FULL, message, retry_after_s=RETRY_AFTER_S)
        missing = _ranges(error) or "some blocks"
        message = f"no peer is left to serve {missing} of {job.model.name} ({reasons})"
        return JobError(JobErrorCode.UNCOVERED, message, retry_after_s=RETRY_AFTER_S)
    if error.missing:
        message = f"no peer serves {_ranges(error)} of {job.model.name}; a node started with --serve would"
    else:
        message = f"every block of {job.model.name} is served, but the spans do not join without overlap"
    return JobError(JobErrorCode.UNCOVERED, message, retry_after_s=RETRY_AFTER_S)


def _ranges(error: NoRouteError) -> str:
    if not error.missing:
        return ""
    return "blocks " + ", ".join(f"{start}-{end}" for start, end in error.missing)
