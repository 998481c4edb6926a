"""`POST /swarm/explain`: the task in a body, and documents of the choice, of the state of learning, and of the past."""

import math
import statistics
from collections.abc import Collection
from typing import Any, Final

import trio

from node.api.fields import (
    Field,
    Fields,
    Form,
    ObjectForm,
    count_between,
    number_between,
    one_of,
    parse_count,
    parse_json,
    refuse,
)
from node.api.interface import ExplainedMethod, Explanation, PastDecision, PastDecisions, SelectionStatus
from node.api.shared_fields import BUDGET, MODEL, OBJECTIVE, QUALITY
from node.coordinator.coordinator import Considered
from node.coordinator.submission import JobOutcome, JobRequest, Selection
from node.selection.chooser import LearnedChoice, LearnedChooser
from node.selection.learner import ModelStatus
from protocol.limits import MAX_PARALLEL_JOBS, MAX_POSITIONS
from protocol.measurements import MIN_TOTAL_S, Objective, QualityBound, TaskKind
from protocol.schema import to_map
from protocol.tensors import Pooling
from selector.confidence import INTERVAL
from selector.task import baseline_of

RECENT: Final = 20
"""Past choices that are listed."""

DEFAULT_TOKENS: Final = 64
"""Default length of prompt and text."""

_TOKEN_IDS: Final = 256
"""Distinct ids in the prompt, which is never computed."""

PROMPT_TOKENS: Final = Field("prompt_tokens", parse_count)
MAX_TOKENS: Final = Field("max_tokens", count_between(0, MAX_POSITIONS))
SHARED_PREFIX_SHARE: Final = Field("shared_prefix_share", number_between(0, 1))
REPETITIVENESS: Final = Field("repetitiveness", number_between(0, 1))
_CONCURRENCY: Final = Field("concurrency", count_between(1, MAX_PARALLEL_JOBS))
_kind: Final = one_of(*TaskKind)
TASK_KIND: Final = Field("task", Form(lambda param, value: TaskKind(_kind(param, value)), _kind.schema))
TASK: Final = ObjectForm(
    MODEL, TASK_KIND, PROMPT_TOKENS, MAX_TOKENS, SHARED_PREFIX_SHARE, REPETITIVENESS, _CONCURRENCY, QUALITY, OBJECTIVE,
    BUDGET, required=[MODEL],
)  # fmt: skip


def parse_task(body: bytes) -> tuple[JobRequest, dict[str, Any]]:
    """Return the job, and the fields of its context that are overridden. Raises ApiError."""
    fields = TASK.read(parse_json(body))
    model, prompt_tokens = fields.require(MODEL), fields.get(PROMPT_TOKENS) or DEFAULT_TOKENS
    kind = fields.get(TASK_KIND) or TaskKind.GENERATE
    request = JobRequest(
        model=model,
        prompt_tokens=tuple(place % _TOKEN_IDS for place in range(prompt_tokens)),
        max_tokens=new_tokens(fields, kind, DEFAULT_TOKENS),
        prompt_logprobs=kind is TaskKind.SCORE,
        pooling=Pooling.MEAN if kind is TaskKind.EMBED else None,
        quality=fields.get(QUALITY) or QualityBound.EXACT,
        objective=fields.get(OBJECTIVE) or Objective.LATENCY,
        budget=fields.get(BUDGET),
    )
    overrides: dict[str, Any] = {
        field.name: fields.get(field) or 0.0 for field in (SHARED_PREFIX_SHARE, REPETITIVENESS)
    }
    concurrency = fields.get(_CONCURRENCY)
    if concurrency is not None:
        overrides["concurrency"] = concurrency
    return request, overrides


def new_tokens(fields: Fields, kind: TaskKind, default: int) -> int:
    """Return how many new tokens a task is to have. Raises ApiError."""
    given = fields.get(MAX_TOKENS)
    if given is None:
        return default if kind is TaskKind.GENERATE else 0
    if kind is TaskKind.EMBED and given:
        refuse(MAX_TOKENS.name, "must be 0 for an embedding, which has no text")
    if kind is TaskKind.GENERATE and not given:
        refuse(MAX_TOKENS.name, "must be at least 1 for a text")
    return given


def selection_status(chooser: LearnedChooser, model: ModelStatus | None) -> SelectionStatus:
    """Return the state of learning."""
    allowance, sample_count = chooser.allowance, chooser.predictions.sample_count
    return {
        "basis": "model" if sample_count else "rule",
        "model_version": model.version if model else 0,
        "experiences": sample_count,
        "training_s": round(model.training_s, 3) if model else None,
        "trained_ago_s": round(trio.current_time() - model.trained_s, 3) if model else None,
        "jobs": allowance.jobs,
        "explored_jobs": allowance.explored_jobs,
        "regret_s": round(allowance.regret_s, 3),
        "trials": allowance.trials,
        "trial_s": round(allowance.trial_s, 3),
        "budget_left_s": round(allowance.left_s, 3),
    }


def explain(considered: Considered, chooser: LearnedChooser, model: ModelStatus | None) -> Explanation:
    """Return which method a task would be served with, and why. The choice is of this chooser."""
    choice = considered.choice
    if not isinstance(choice, LearnedChoice):
        raise TypeError("a choice of another chooser")
    selection = chooser.describe(choice, considered.agreed)
    trials = chooser.adoption.trials(choice.bucket)
    deviations = _deviations_of_speedups(selection)
    methods: list[ExplainedMethod] = [
        {
            "name": name,
            "predicted_s": predicted.cost_s,
            "predicted_speedup": predicted.speedup,
            "speedup_low": predicted.speedup * math.exp(-INTERVAL * deviations[name]),
            "speedup_high": predicted.speedup * math.exp(INTERVAL * deviations[name]),
            "votes": {vote.peer: vote.scores[name] for vote in considered.votes if name in vote.scores},
            "accepted": name in choice.accepted,
            "trial_speedup": math.exp(-trials[name].log_ratio) if name in trials else None,
        }
        for name, predicted in selection.predictions.items()
    ]
    return {
        "model": considered.model,
        "task": considered.context.values(),
        "route": _describe_route(considered),
        "selection": selection_status(chooser, model),
        "methods": methods,
        "not_offered": [name for name in choice.log_costs if name not in selection.predictions],
        "agreed": considered.agreed,
        "reason": _reason(considered.agreed, next(iter(selection.predictions)), choice),
        "confidence": selection.confidence,
        "probes": list(selection.probes),
        "table_digest": choice.learned_from.digest.hex() if choice.learned_from else None,
        "past": past_decisions(chooser.decisions, RECENT),
    }


def _deviations_of_speedups(selection: Selection) -> dict[str, float]:
    """Return the standard deviation of each method's predicted speed-up, as a logarithm: of both costs in it."""
    predictions = selection.predictions
    plain = predictions.get(baseline_of(next(iter(predictions))).name)
    of_plain = plain.deviation if plain else 0.0
    return {name: 0.0 if each is plain else math.hypot(each.deviation, of_plain) for name, each in predictions.items()}


def _describe_route(considered: Considered) -> list[dict[str, Any]]:
    """Return the stages with the facts of their machines and links, where these are known."""
    stages: list[dict[str, Any]] = [
        {"peer": stage.peer, "start": stage.blocks.start, "end": stage.blocks.end} for stage in considered.route
    ]
    for stage, facts in zip(stages, considered.context.stage_facts, strict=False):
        stage.update(to_map(facts))
    return stages


def _reason(chosen: str, best: str, choice: LearnedChoice) -> str:
    """Return why a method was chosen, and not the one that is predicted to be best."""
    trials = choice.adoption.trials(choice.bucket)
    if choice.explored is not None:
        return "this job would explore it: it may be better than the method in use"
    if chosen in choice.agreed_better:
        return "better by what the swarm agreed on; a trial here will confirm or reject it"
    if chosen == best:
        return "lowest predicted cost" + (", and confirmed by a trial here" if chosen in trials else "")
    if best not in trials:
        return "in use for tasks like this one; what is predicted to be better is used once it won a trial here"
    if trials[best].log_ratio > trials[chosen].log_ratio if chosen in trials else False:
        is_fastest = choice.request.context.objective == Objective.LATENCY
        least = "the fastest" if is_fastest else "the one that computes least"
        return f"{least} in a trial here of tasks like this one, whatever is predicted"
    return "the best of the methods that all stages offer and that this node accepts"


def past_decisions(decisions: Collection[tuple[JobOutcome, Selection]], limit: int) -> PastDecisions:
    """Return how past choices turned out, with the last `limit` ones."""
    recent: list[PastDecision] = [
        {
            "job_id": outcome.job_id,
            "method": outcome.method,
            "basis": selection.basis,
            "explored": selection.explored,
            "predicted_s": selection.predicted_s,
            "actual_s": outcome.total_s,
            "regret_s": selection.regret_s,
        }
        for outcome, selection in reversed(list(decisions)[-limit:])
    ]
    errors = [abs(_log(outcome.total_s) - _log(selection.predicted_s)) for outcome, selection in decisions]
    return {
        "jobs": len(decisions),
        "typical_error": math.expm1(statistics.median(errors)) if errors else None,
        "mean_regret_s": statistics.fmean(selection.regret_s for _, selection in decisions) if decisions else 0.0,
        "recent": recent,
    }


def _log(seconds: float) -> float:
    return math.log(max(MIN_TOTAL_S, seconds))
