"""The coordinator: takes a job, has its tokens generated over a route of stages, and turns them into text.

A stage that is lost is replaced by `node.coordinator.failover`.
"""

import math
import random
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import trio

from node.coordinator.budget import cost_of, needs_of
from node.coordinator.failover import ClosedRoute, ResilientRoute
from node.coordinator.job import Job
from node.coordinator.job_report import JobObserver, NoJobObserver, RunningJob
from node.coordinator.method_choice import Choice, Chooser, QualityStore, admitted_methods
from node.coordinator.observation import Recorder, ServedJob
from node.coordinator.output_text import OutputText
from node.coordinator.planner import Planner
from node.coordinator.prefix_sharing import RecentPrompts
from node.coordinator.prompt import chat_format_of, prompt_text, read_prompt, sampling_of, tokenizer_unavailable
from node.coordinator.recent_jobs import JobState, RecentJob, RecentJobs
from node.coordinator.refusals import RouteRejected, no_route
from node.coordinator.result import result_of, served_of, timing_of, votes_of, without_impossible_statistics
from node.coordinator.route import OpenRoute
from node.coordinator.session_request import RouteServices, plan_sessions
from node.coordinator.submission import (
    CLIENT_MISTAKES,
    Cost,
    JobError,
    JobErrorCode,
    JobEvent,
    JobOutcome,
    JobRequest,
    JobResult,
    JobStarted,
    ModelCapabilities,
    Selection,
    Vote,
)
from node.coordinator.swarm_view import SwarmView
from node.links.link_pool import LinkPool
from node.models.errors import ModelError, TokenizerUnavailableError
from node.models.library import KnownModel
from node.util.text import one_line
from protocol.identity import JobId, ModelId, PeerId, Stage
from protocol.measurements import TaskKind, compute_s_of
from protocol.messages import FinishReason
from selector.reliability import PeerRecord
from selector.routing import NoRouteError
from selector.task import TaskContext

VOTE_LIMIT_S = 120.0
"""Time limit for the stages' vote about a task that is not run."""

OWNER_LIMIT_S = 30.0
"""How long a job waits at most for the owner of its prefix to compute it."""


@dataclass(slots=True)
class CoordinatorStatistics:
    """Jobs of this node so far. `running`: all of them; `rejected`: failed by the client's mistake."""

    running: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0
    trials_running: int = 0
    trials_done: int = 0
    trials_failed: int = 0
    trials_cancelled: int = 0
    trials_rejected: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """How a job would be served: its task context, the route, the votes, and the method that they agree on."""

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
        open_model: Callable[[str], Awaitable[KnownModel]],
        swarm: SwarmView,
        link_pool: LinkPool,
        jitter: random.Random,
        recorder: Recorder | None,
        *,
        chooser: Chooser,
        quality_store: QualityStore,
    ) -> None:
        """`open_model`: returns the model that a user means, or raises ModelError with one line for the user."""
        self.draining = False
        self.observer: JobObserver = NoJobObserver()
        self._open_model = open_model
        self._link_pool = link_pool
        self._recorder = recorder
        self._chooser = chooser
        self._quality_store = quality_store
        self._prompts = RecentPrompts(secrets.token_bytes(16))
        self._planner = Planner(swarm, link_pool.peer_id, rng=jitter, in_flight=self._in_flight)
        self._services = RouteServices(
            planner=self._planner,
            swarm=swarm,
            link_pool=link_pool,
            chooser=chooser,
            prompts=self._prompts,
            jitter=jitter,
        )
        self._routes: dict[JobId, ResilientRoute] = {}
        self.statistics = CoordinatorStatistics()
        self.recent_jobs = RecentJobs()
        self._idle = trio.Event()
        self._idle.set()
        self._has_left = False
        self._waiting: set[trio.CancelScope] = set()
        """Of each job that waits for its route or its stages."""
        self._users_seen_s = -math.inf
        """When a user's job last began or ended."""

    def peer_records(self) -> dict[PeerId, PeerRecord]:
        """Return the records of all remembered peers: jobs served, failed and lagged, and their speed."""
        return self._planner.records()

    def _in_flight(self) -> Counter[PeerId]:
        """Return the number of this node's jobs on each peer, without those that give way to others."""
        routes = [route for route in self._routes.values() if not route.is_background]
        return Counter(peer for route in routes for peer in route.peers)

    async def wait_idle(self) -> None:
        """Wait until no job is running."""
        await self._idle.wait()

    def end_jobs(self) -> None:
        """End all jobs with an error, for this node leaves: its clients then know that there is more to the text."""
        self._has_left = True
        for scope in self._waiting:
            scope.cancel()

    @contextmanager
    def _until_left(self) -> Iterator[None]:
        """Run the block until this node leaves. Raises JobError then."""
        with trio.CancelScope() as scope:
            self._waiting.add(scope)
            try:
                if self._has_left:
                    scope.cancel()
                yield
            finally:
                self._waiting.discard(scope)
        if scope.cancelled_caught:
            message = "this node shut down before the job was done: submit it at another peer"
            raise JobError(JobErrorCode.LEAVING, message)

    async def _events_until_left(self, events: AsyncIterator[JobEvent]) -> AsyncGenerator[JobEvent, None]:
        """Yield the events until this node leaves. Raises JobError then."""
        while True:
            with self._until_left():
                event = await anext(events, None)
            if event is None:
                return
            yield event

    async def model(self, text: str) -> KnownModel:
        """Return the model that a user means. Raises JobError."""
        try:
            return await self._open_model(text)
        except TokenizerUnavailableError as error:
            raise tokenizer_unavailable(error) from None
        except ModelError as error:
            raise JobError(JobErrorCode.MODEL_NOT_FOUND, str(error)) from None

    async def count_tokens(self, request: JobRequest) -> int:
        """Return how many tokens the prompt of a request has. Raises JobError."""
        return len((await read_prompt(request, await self.model(request.model))).tokens)

    async def capabilities_of(self, model: str) -> ModelCapabilities:
        """Return what can be asked of the model that a user means. Raises JobError."""
        known = await self.model(model)
        chat_format = chat_format_of(known) if known.tokenizer.has_chat_template else None
        return ModelCapabilities(
            max_positions=known.max_positions, chat_format=chat_format, chat_template=known.tokenizer.chat_template
        )

    @asynccontextmanager
    async def submit(
        self, request: JobRequest, on_served: Callable[[ServedJob], None] | None = None
    ) -> AsyncIterator[AsyncIterator[JobEvent]]:
        """Run a job inside the block; see `Submitter`.

        `on_served`: receives the job once it is done, in place of the recorder.
        """
        if self.draining:
            raise _leaving()
        is_trial = on_served is not None or request.background
        trace_parent = self.observer.start_trace(request.origin.trace_parent)
        running = RunningJob(request=request, is_trial=is_trial, trace_parent=trace_parent, began_s=trio.current_time())
        self._count(running=1, trials_running=is_trial)
        outcome = "cancelled"
        code: JobErrorCode | None = None
        reason = loggable = ""
        entry: RecentJob | None = None
        try:
            with self._until_left():
                prepared = await self._prepare(request, on_served=on_served)
            running.job = job = replace(prepared, trace_parent=trace_parent)
            running.prepared_s = trio.current_time()
            entry = self.recent_jobs.begin(
                job.id, job.model.id, job.model.name, is_trial=is_trial, prompt_tokens=len(job.prompt), task=job.kind
            )
            async with (
                self._routed(job, running) as route,
                aclosing(self._events(job, route, entry)) as events,
                aclosing(self._events_until_left(events)) as ours,
            ):
                yield ours
                outcome = "done" if route.is_finished else "cancelled"
        except JobError as fault:
            error = self._presented(fault)
            code, reason = error.code, error.message
            loggable = "" if fault.may_quote else fault.message
            is_preempted = request.background and fault.code is JobErrorCode.FULL
            outcome = "cancelled" if is_preempted else "rejected" if code in CLIENT_MISTAKES else "failed"
            raise error from None
        except Exception as error:
            outcome, code, reason = "failed", JobErrorCode.FAILED, one_line(error)
            loggable = f"unexpected {type(error).__name__}"
            raise
        finally:
            counted = f"trials_{outcome}" if is_trial else outcome
            self._count(running=-1, trials_running=-is_trial, **{counted: 1})
            if entry is not None:
                state = JobState.FAILED if outcome == "rejected" else JobState(outcome)
                self.recent_jobs.end(entry, state, reason or None)
            self.observer.on_job_ended(running.report(outcome, trio.current_time(), code, loggable))

    def _presented(self, fault: JobError) -> JobError:
        """Return the error for the client: at a node that drains it is useless to retry, or to start another node."""
        return _leaving() if self.draining and fault.retry_after_s is not None else fault

    async def consider(self, request: JobRequest, overrides: Mapping[str, Any]) -> Considered:
        """Have the stages vote on a job without running it. `overrides`: context fields to replace. Raises JobError."""
        job = await self._prepare(request, overrides)
        self._prompts.release(job.claim)  # nothing of it is computed
        try:
            planned, session_request = await plan_sessions(self._services, job, needs_of(request, job.need()))
        except NoRouteError as error:
            raise no_route(job, error, {}, {}) from None
        route = OpenRoute(planned.stages, self._link_pool, session_request)
        try:
            with trio.fail_after(VOTE_LIMIT_S):
                await route.open()
                method, _ = route.agree()
        except RouteRejected as rejected:
            refusals = {refusal.peer: refusal for refusal in rejected.refusals}
            raise no_route(job, None, refusals, {}) from None
        except trio.TooSlowError:
            message = f"the stages did not vote within {VOTE_LIMIT_S:.0f} s: try again later"
            raise JobError(JobErrorCode.FAILED, message) from None
        finally:
            await route.close()
        return Considered(
            model=job.model.id,
            context=session_request.context,
            route=planned.stages,
            votes=votes_of(route),
            agreed=method.name,
            choice=session_request.choice,
        )

    def _count(self, **changes: int) -> None:
        if not changes["trials_running"]:
            self._users_seen_s = trio.current_time()
        for name, change in changes.items():
            setattr(self.statistics, name, getattr(self.statistics, name) + change)
        if self.statistics.running == 0:
            self._idle.set()
        elif self._idle.is_set():
            self._idle = trio.Event()

    async def _prepare(
        self,
        request: JobRequest,
        overrides: Mapping[str, Any] | None = None,
        on_served: Callable[[ServedJob], None] | None = None,
    ) -> Job:
        """Turn a request into a job: model, token ids and sampling, all within the model's limits. Raises JobError."""
        began_s = trio.current_time()
        model = await self.model(request.model)
        prompt = await read_prompt(request, model)
        return Job(
            id=JobId(secrets.token_hex(16)),
            request=request,
            model=model,
            prompt=prompt.tokens,
            chat_format=prompt.chat_format,
            sampling=sampling_of(request, model, prompt),
            admitted=admitted_methods(request, model, self._quality_store),
            claim=self._prompts.record_prompt(model.id, prompt.tokens, request.origin.key_sha256),
            began_s=began_s,
            overrides=overrides or {},
            on_served=on_served,
        )

    @asynccontextmanager
    async def _routed(self, job: Job, running: RunningJob) -> AsyncIterator[ResilientRoute]:
        """Open a job's route, and close it after the block."""
        running.route = route = ResilientRoute(job, self._services)
        self._routes[job.id] = route
        try:
            with self._until_left():
                if job.claim.owner is not None and any(method.prefix_cache for method in job.admitted):
                    with trio.move_on_after(OWNER_LIMIT_S):  # then most of the prompt is found in the prefix cache
                        await job.claim.owner.released.wait()
                await route.open()
            yield route
        finally:
            del self._routes[job.id]
            self._prompts.release(job.claim)
            await route.close()

    async def _events(self, job: Job, route: ResilientRoute, entry: RecentJob) -> AsyncGenerator[JobEvent, None]:
        """Yield the job's events; after the last one the route is closed."""
        self._record_progress(job, route, entry)
        yield JobStarted(
            job_id=job.id,
            model=job.model.id,
            model_name=job.model.name,
            prompt_tokens=len(job.prompt),
            created_s=int(time.time()),
            echo=await prompt_text(job.request, job.model) if job.request.echo else "",
            chat_format=job.chat_format,
        )
        output = OutputText(job.request, job.model, job.prompt)
        if job.kind is TaskKind.SCORE:
            async with aclosing(output.scored(job.prompt[0], await route.score())) as pieces:
                async for scored in pieces:
                    yield scored
        if not job.tokens_left:
            entry.result = await self._prefilled(job, route)
            yield entry.result
            return
        finish: FinishReason | None = None
        while finish is None:
            sampled = await route.next_token()
            job.output.add(sampled.token, sampled.arrived_s)  # the client may be slow to read it
            self._record_progress(job, route, entry)
            self._prompts.release(job.claim)
            finish = sampled.finish_reason
            if finish is None and len(job.output.tokens) >= job.sampling.max_tokens:
                finish = FinishReason.LENGTH  # the last stage should have reported it
            delta, finish = await output.add(sampled, finish)
            yield delta
        entry.result = await self._finish(job, route, output.text, finish)
        yield replace(entry.result, stop_string=output.stop_string)

    def _record_progress(self, job: Job, route: ResilientRoute, entry: RecentJob) -> None:
        method = route.method.name if route.method else None
        self.recent_jobs.progress(
            entry, stages=route.stages, method=method, tokens=len(job.output.tokens), replays=route.replays
        )

    async def _prefilled(self, job: Job, route: ResilientRoute) -> JobResult:
        """Return the result of a job that wants no text, with the embedding if it wants that."""
        is_embedding = job.kind is TaskKind.EMBED
        embedding = await route.embedding() if is_embedding else None
        finish = FinishReason.STOP if is_embedding else FinishReason.LENGTH
        return replace(await self._finish(job, route, "", finish), embedding=embedding)

    async def _finish(self, job: Job, route: ResilientRoute, text: str, finish: FinishReason) -> JobResult:
        """Close the route, learn from the job, record it, and return its result."""
        done = await route.finish()
        if not job.output.tokens:  # then the embedding or the last scores count
            job.output.first_token_s = job.output.last_token_s = done.route.last_token_s or trio.current_time()
        stages = done.route.stages
        result, liars = without_impossible_statistics(result_of(job, done, text, finish))
        stated = {stage.peer for stage, closed in zip(stages, done.closed, strict=True) if closed is not None}
        self._planner.served(stated - liars - set(done.accusers))
        for peer in liars:
            self._planner.failed(peer, dead=False)
        is_background = job.request.background  # then it waits for users' jobs, which says nothing of the stages
        is_scored = job.kind is TaskKind.SCORE  # its rows take longer on the last stage
        # Of a job that was replayed stages may have stated what they did on other routes, too.
        if result.is_stated and not (result.is_replayed or is_scored or is_background):
            self._planner.measured(job.need(), stages, done.route.loads(), timing_of(done, result))
        is_measured = bool(
            job.kind is not TaskKind.SCORE or job.output.scored or job.output.tokens
        )  # one token has none
        is_paced = is_background and self._has_users_since(job.began_s)
        selection = self._assess(job, done, result) if is_measured and not is_paced else None
        cost = Cost(
            objective=job.request.objective,
            budget=job.request.budget,
            predicted=done.request.choice.predicted_cost(result.method.name),
            actual=cost_of(result.route, done.route.request.prices) if result.is_stated else None,
        )
        result = replace(result, selection=selection, cost=cost)
        job.output.result = result
        served = served_of(job, done, result)
        if job.on_served is not None:
            job.on_served(served)
        elif self._recorder is not None and is_measured and result.is_stated:
            await self._recorder.record(served)
        return result

    def _has_users_since(self, time_s: float) -> bool:
        """Return whether users' jobs of this node were under way since a time."""
        return self.statistics.running > self.statistics.trials_running or self._users_seen_s > time_s

    def _assess(self, job: Job, done: ClosedRoute, result: JobResult) -> Selection | None:
        """Learn from a job's outcome; return how its selection looks now."""
        outcome = JobOutcome(
            job_id=job.id,
            method=result.method.name,
            completion_tokens=len(job.output.tokens),
            total_s=result.timing.total_s,
            is_replayed=result.is_replayed,
            compute_s=compute_s_of(result.route),
        )
        return self._chooser.served(done.request.choice, outcome)


def _leaving() -> JobError:
    return JobError(JobErrorCode.LEAVING, "this node is shutting down: submit the job at another peer")
