"""What a job came to, when its route is closed: the result for whoever asked, and what is observed of it."""

from collections.abc import Iterable, Sequence

from node.coordinator.job import Job
from node.coordinator.planner import RouteTiming
from node.coordinator.recorder import ServedJob
from node.coordinator.route import OpenRoute
from node.coordinator.submission import Consensus, JobResult, MethodChoice, Timing, Usage, Vote
from protocol.identity import Stage
from protocol.measurements import StageObservation
from protocol.messages import Closed, FinishReason, Opened

MEASURED_ROUNDS = 3
"""Rounds after the first that a route must have taken for its speed to be measured;"""

MEASURED_ROWS = 8
"""and rows of a prompt."""


def result_of(
    job: Job, route: OpenRoute, closed: Sequence[Closed], text: str, finish: FinishReason, ended_s: float
) -> JobResult:
    """Return a job's result without what its choice turned out to be worth.

    `route`: the last one; `closed`: what its stages said at the end, one each; `ended_s`: when the last token came, on
    the clock of `job.began_s`.
    """
    method = route.method
    if method is None:
        raise AssertionError("a job that ends has begun")
    token_count = len(job.tokens)
    agreed = route.opening.agreed
    votes = tuple(
        Vote(peer=stage.peer, scores=dict(answer.votes))
        for stage, answer in zip(route.stages, route.answers, strict=True)
        if answer is not None and answer.votes
    )
    return JobResult(
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
        route=tuple(map(_observed, route.stages, closed)),
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


def served_of(job: Job, route: OpenRoute, closed: Sequence[Closed], result: JobResult) -> ServedJob:
    """Return what is recorded of a job that is done."""
    return ServedJob(
        result=result,
        request=job.request,
        manifest=job.model.manifest,
        job=route.job,
        concurrency=max((answer.load.sessions for answer in route.answers if answer), default=1),
        shared_prefix_share=job.shared_prefix_share,
        repetitiveness=job.context.repetitiveness,
        link_s=job.context.link_s,
    )


def timing_of(route: OpenRoute, closed: Sequence[Closed]) -> RouteTiming:
    """Return what the last route of a job showed of its stages' speed: of a few rounds at least, or nothing."""
    total_s = max(1e-9, route.last_heard_s - route.began_s)
    rounds = route.rounds - 1
    round_s = (route.last_heard_s - route.first_heard_s) / rounds if rounds >= MEASURED_ROUNDS else 0.0
    is_measured = max(route.begun_rows, default=0) >= MEASURED_ROWS
    return RouteTiming(
        round_s=round_s,
        prompt_s=route.first_heard_s - route.began_s if is_measured else 0.0,
        prompt_rows=route.begun_rows if is_measured else (),
        busy=tuple(min(1.0, (c.statistics.compute_s + c.statistics.queue_s) / total_s) for c in closed),
    )


def _observed(stage: Stage, closed: Closed) -> StageObservation:
    return StageObservation(
        peer=stage.peer,
        blocks=stage.blocks,
        hardware=closed.hardware,
        statistics=closed.statistics,
        countersignature=closed.countersignature,
    )


def _stage_policy(answers: Iterable[Opened | None]) -> dict[str, str]:
    """Return the stages' own switches; where they differ, all values there are, joined by "+"."""
    values: dict[str, set[str]] = {}
    for answer in answers:
        for switch, value in (answer.policy if answer else {}).items():
            values.setdefault(switch, set()).add(value)
    return {switch: "+".join(sorted(found)) for switch, found in values.items()}
