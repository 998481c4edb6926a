"""The result of a job whose route is closed, and what is recorded of it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import structlog

from node.coordinator.failover import ClosedRoute
from node.coordinator.job import Job
from node.coordinator.observation import ServedJob
from node.coordinator.planner import RouteTiming
from node.coordinator.route import OpenRoute
from node.coordinator.submission import Consensus, JobResult, Timing, Usage, Vote
from protocol.errors import RemoteProtocolError
from protocol.identity import PeerId, Stage
from protocol.measurements import MethodInForce, StageObservation, check_statistics
from protocol.messages import Closed, FinishReason, Opened, SessionStatistics

_logger = structlog.get_logger(__name__)

MEASURED_ROUNDS = 3
"""Rounds after the first from which on a route's speed is measured;"""

MEASURED_ROWS = 8
"""and rows of a prompt."""

MOST_AHEAD = 16
"""Tokens that may be drawn behind the end of a text, or an eighth of it, where what stages state still counts."""


def result_of(job: Job, done: ClosedRoute, text: str, finish: FinishReason) -> JobResult:
    """Return a job's result, without the assessment of its method selection."""
    route, output = done.route, job.output
    method = route.method
    if method is None:
        raise AssertionError("a job that ends has begun")
    token_count = len(output.tokens)
    table = route.learned_from
    decode_s = output.last_token_s - output.first_token_s
    return JobResult(
        job_id=job.id,
        model=job.model.id,
        model_name=job.model.name,
        text=text,
        token_ids=tuple(output.tokens),
        finish_reason=finish,
        usage=Usage(
            prompt_tokens=len(job.prompt),
            completion_tokens=token_count,
            cached_tokens=done.cached_tokens,
            accepted_draft_tokens=max(0, token_count - done.rounds),
        ),
        timing=Timing(
            ttft_s=output.first_token_s - job.began_s,
            tpot_s=decode_s / (token_count - 1) if token_count > 1 else 0.0,
            total_s=output.last_token_s - job.began_s,
        ),
        route=tuple(map(_observed, route.stages, _closed_with(done, token_count))),
        method=MethodInForce(switches=dict(method.switches), stage_policy=_stage_policy(route.answers)),
        consensus=Consensus(
            votes=votes_of(route),
            agreed=method.name,
            weighed=route.is_weighted(),
            epoch=table.epoch if table else None,
            table_digest=table.digest.hex() if table else None,
        ),
        replays=done.replays,
        is_replayed=done.request is not done.route.request,
        trace=done.trace,
    )


def _closed_with(done: ClosedRoute, tokens: int) -> Sequence[Closed | None]:
    """Return the final words of the stages of a job with so many tokens, none of them where they speak of far more.

    A stop string is found once the client reads it: if it reads slowly, stages have gone on long behind the text's end.
    """
    is_ahead = done.route.unread > max(MOST_AHEAD, tokens // 8)
    return (None,) * len(done.closed) if is_ahead else done.closed


def _observed(stage: Stage, closed: Closed | None) -> StageObservation:
    """Return what is known of a stage's part in a job: nothing of its cost where its final word did not come."""
    if closed is None:
        return StageObservation(
            peer=stage.peer, blocks=stage.blocks, hardware="unknown", statistics=SessionStatistics()
        )
    return StageObservation(
        peer=stage.peer,
        blocks=stage.blocks,
        hardware=closed.hardware,
        statistics=closed.statistics,
        countersignature=closed.countersignature,
    )


def without_impossible_statistics(result: JobResult) -> tuple[JobResult, set[PeerId]]:
    """Return a job's result without statistics that no stage of it can have, and the peers that stated them.

    Such a stage counts as one that stated nothing, so that no prediction is learned from it.
    """
    usage, liars = result.usage, set[PeerId]()

    def checked(stage: StageObservation) -> StageObservation:
        try:
            tokens = usage.prompt_tokens + usage.completion_tokens
            check_statistics(stage.statistics, result.timing.total_s, tokens)
        except RemoteProtocolError as error:
            _logger.warning("statistics of a stage ignored", job=result.job_id, peer=stage.peer, reason=str(error))
            liars.add(stage.peer)
            return replace(stage, statistics=SessionStatistics(), countersignature=None)
        return stage

    return replace(result, route=tuple(map(checked, result.route))), liars


def votes_of(route: OpenRoute) -> tuple[Vote, ...]:
    """Return the votes of a route's stages."""
    return tuple(
        Vote(
            peer=stage.peer,
            scores=dict(answer.votes),
            table_digest=answer.table_digest.hex() if answer.table_digest else None,
        )
        for stage, answer in zip(route.stages, route.answers, strict=True)
        if answer is not None and answer.votes
    )


def served_of(job: Job, done: ClosedRoute, result: JobResult) -> ServedJob:
    """Return what is recorded of a job that is done."""
    concurrency = max((answer.load.sessions for answer in done.route.answers if answer), default=1)
    context = replace(done.request.context, concurrency=max(1, concurrency))
    return ServedJob(result=result, manifest=job.model.manifest, job=done.route.job, context=context)


def timing_of(done: ClosedRoute, result: JobResult) -> RouteTiming:
    """Return the times that measure the stages' speed, where there were enough rounds or rows to measure."""
    route = done.route
    total_s = max(1e-9, route.last_token_s - route.began_s)
    rounds = route.rounds - 1
    round_s = (route.last_token_s - route.first_token_s) / rounds if rounds >= MEASURED_ROUNDS else 0.0
    is_measured = max(route.begun_rows, default=0) >= MEASURED_ROWS
    return RouteTiming(
        round_s=round_s,
        prompt_s=route.first_token_s - route.began_s if is_measured else 0.0,
        prompt_rows=route.begun_rows if is_measured else (),
        busy=tuple(min(1.0, (s.statistics.compute_s + s.statistics.queue_s) / total_s) for s in result.route),
    )


def _stage_policy(answers: Iterable[Opened | None]) -> dict[str, str]:
    """Return the stages' own switches; where they differ, all values joined by "+"."""
    values: dict[str, set[str]] = {}
    for answer in answers:
        for switch, value in (answer.policy if answer else {}).items():
            values.setdefault(switch, set()).add(value)
    return {switch: "+".join(sorted(found)) for switch, found in values.items()}
