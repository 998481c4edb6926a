"""What the coordinator asks of every stage of a route: the methods to vote on, the task, the sampling."""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from node.coordinator.job import Job
from node.coordinator.method_choice import Choice, Chooser, OverBudget, SelectionRequest
from node.coordinator.observation import model_facts, weight_type
from node.coordinator.planner import PlannedRoute, Planner, RouteNeed
from node.coordinator.prefix_sharing import RecentPrompts
from node.coordinator.refusals import over_budget
from node.coordinator.submission import AUTO
from node.coordinator.swarm_view import SwarmView
from node.links.link_pool import LinkPool
from node.stages.speculation import repetitiveness
from node.stages.voter import Agreement
from protocol.identity import ModelId, PeerId
from protocol.messages import Sampling
from protocol.tensors import DType
from selector.task import Method, TaskContext

LOOKED_AT_TOKENS = 2048
"""Tokens at the end of a prompt that are searched for repetition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """The request for a session on every stage of a route.

    `prices`: of the stages, when they were asked. `methods`: by name, the coordinator's preference first. `choice`:
    votes for the coordinator once the stages have. `agreed`: what the swarm has agreed about the model. `request_id`,
    `trace_parent`: see `Open`.
    """

    model: ModelId
    prices: tuple[float, ...]
    methods: Mapping[str, Method]
    choice: Choice
    context: TaskContext
    positions: int
    prefix: bytes
    sampling: Sampling
    hidden_size: int
    vocabulary_size: int
    background: bool = False
    agreed: Agreement | None = None
    request_id: str = ""
    trace_parent: str = ""

    @property
    def output_form(self) -> tuple[DType, tuple[int, ...]]:
        """The type and width of the rows that the last stage sends to the coordinator."""
        if self.sampling.pooling is not None:
            return DType.FLOAT32, (self.hidden_size,)
        return (DType.FLOAT32, (2 * self.sampling.logprobs,)) if self.sampling.logprobs else (DType.INT32, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteServices:
    """What every job's route is made with."""

    planner: Planner
    swarm: SwarmView
    link_pool: LinkPool
    chooser: Chooser
    prompts: RecentPrompts
    jitter: random.Random


async def plan_sessions(
    services: RouteServices,
    job: Job,
    needs: Sequence[RouteNeed],
    begun: Method | None = None,
    serving: Collection[PeerId] = (),
    *,
    may_explore: bool = False,
) -> tuple[PlannedRoute, SessionRequest]:
    """Return the route of the first need that stays within the job's budget, and what is asked of its stages.

    `begun`, `serving`: see `request_sessions`. Raises NoRouteError, JobError.
    """
    over: list[OverBudget] = []
    for need in needs:
        planned = await services.planner.route(need, may_explore=may_explore)
        if begun is None:
            job.limit_to_share(planned.loads)
        try:
            return planned, await request_sessions(services, job, planned, begun, serving)
        except OverBudget as error:
            over.append(error)
    raise over_budget(job, min(over, key=lambda error: error.cost))


async def request_sessions(
    services: RouteServices,
    job: Job,
    planned: PlannedRoute,
    begun: Method | None = None,
    serving: Collection[PeerId] = (),
) -> SessionRequest:
    """Return the request for a planned route.

    `begun`: the method with which the text began. It stays the same, also on the stages that replace lost ones,
    since another arithmetic could continue with another text. `serving`: the peers of the job's last route. Raises
    OverBudget.
    """
    context = _describe(services, job, planned, serving)
    admitted = job.admitted
    if begun is not None:  # a replacement may lack the draft model; speculation never changes the text
        admitted = [begun, begun.without_speculation] if begun.drafter == "draft" else [begun]
    selection = SelectionRequest(
        model=job.model.id,
        context=context,
        admitted=admitted,
        is_free=job.request.method == AUTO and begun is None,
        # A text that has begun is finished, whatever it costs, and nothing is asked of the prediction for the rest.
        budget=None if job.output.tokens else job.request.budget,
        stage_compute_s=() if job.output.tokens else planned.stage_compute_s,
        prices=() if job.output.tokens else planned.prices,
        stages=planned.stages,
    )
    choice = await services.chooser.choose(selection)
    uses_prefixes = any(method.prefix_cache for method in choice.order)
    agreed = services.swarm.agreed(job.model.id)
    return SessionRequest(
        model=job.model.id,
        prices=planned.prices,
        methods={method.name: method for method in choice.order},
        choice=choice,
        context=context,
        positions=len(job.prompt) + len(job.output.tokens) + job.tokens_left,
        prefix=b"".join(job.claim.pages) if uses_prefixes else b"",
        sampling=job.next_sampling(),
        hidden_size=job.model.hidden_size,
        vocabulary_size=job.model.vocabulary_size,
        background=job.request.background,
        agreed=agreed and agreed.for_task(context.task_kind),
        request_id=job.request_id,
        trace_parent=job.trace_parent,
    )


def _describe(services: RouteServices, job: Job, planned: PlannedRoute, serving: Collection[PeerId]) -> TaskContext:
    """Return the task context of a job on a route."""
    swarm, stages = services.swarm, planned.stages
    context = TaskContext.from_parts(
        model_facts(job.model.manifest),
        weight_type=weight_type(job.model.manifest),
        prompt_tokens=len(job.prompt),
        max_tokens=job.expected_tokens,
        shared_prefix_share=0.0 if job.kind.needs_every_row else job.claim.shared_share,
        repetitiveness=repetitiveness(job.prompt[-LOOKED_AT_TOKENS:]) if job.tokens_left else 0.0,
        concurrency=services.planner.concurrency(stages, planned.loads, serving),
        stage_count=max(1, len(stages)),
        stage_facts=swarm.stage_facts(stages),
        hardware="+".join(swarm.hardware(stage.peer) for stage in stages) or "unknown",
        link_s=services.planner.round_s(stages),
        transfer_s=services.planner.transfer_s(stages, job.need().demand),
        quality=job.request.quality.value,
        objective=job.request.objective.value,
        task_kind=job.kind.value,
    )
    return replace(context, **job.overrides)
