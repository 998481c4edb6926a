"""`POST /swarm/bench`: measures methods against the baseline under one workload, one cell of a grid.

The measurement is cancelled when the client disconnects. A grid takes one request a cell, so that finished cells are
kept when it is interrupted.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from node.api.access import begin_answers
from node.api.endpoint import until_disconnect
from node.api.explanation import MAX_TOKENS, PROMPT_TOKENS, REPETITIVENESS, SHARED_PREFIX_SHARE, TASK_KIND, new_tokens
from node.api.fields import Field, ObjectForm, count_between, list_of, parse_json, parse_method
from node.api.request_body import parse_counted
from node.api.shared_fields import MODEL, QUALITY
from node.coordinator.trial import MethodTrial, Run, Trial, TrialSpec
from protocol.measurements import Objective, QualityBound, TaskKind
from selector.workloads import TrialWorkload

MAX_ROUNDS: Final = 100
MAX_CONCURRENCY: Final = 64
MAX_METHODS: Final = 64
OBJECTIVES: Final = (Objective.LATENCY, Objective.THROUGHPUT)
"""The costs that are measured. At given prices the cheapest method is the one that computes least."""

_CONCURRENCY: Final = Field("concurrency", count_between(1, MAX_CONCURRENCY))
_METHODS: Final = Field("methods", list_of(parse_method, "methods", MAX_METHODS, least=1))
_ROUNDS: Final = Field("rounds", count_between(1, MAX_ROUNDS))
_SEED: Final = Field("seed", count_between(1, 2**31 - 1))
WORKLOAD: Final = ObjectForm(TASK_KIND, _CONCURRENCY, PROMPT_TOKENS, MAX_TOKENS, SHARED_PREFIX_SHARE, REPETITIVENESS)
_WORKLOAD: Final = Field("workload", WORKLOAD.form)
BENCH: Final = ObjectForm(MODEL, _METHODS, _WORKLOAD, _ROUNDS, QUALITY, _SEED, required=[MODEL])


class BenchEndpoint:
    """The ASGI application of `/swarm/bench`."""

    def __init__(self, measure: Callable[[TrialSpec], Awaitable[Trial]]) -> None:
        self._measure = measure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ApiError before the response starts."""
        spec = await parse_counted(scope, receive, lambda body, _: parse_spec(body))
        param = f"{_WORKLOAD.name}.{_CONCURRENCY.name}"
        count = partial(begin_answers, scope, spec.workload.concurrency, param)

        async def answer() -> None:
            trial = await self._measure(replace(spec, on_jobs_known=count))
            await JSONResponse(describe_trial(trial))(scope, receive, send)

        await until_disconnect(receive, answer)


def parse_spec(body: bytes) -> TrialSpec:
    """Return the trial. Raises ApiError."""
    fields = BENCH.read(parse_json(body))
    model, workload = fields.require(MODEL), fields.get(_WORKLOAD) or WORKLOAD.read({})
    plain, kind = TrialWorkload(), workload.get(TASK_KIND) or TaskKind.GENERATE
    return TrialSpec(
        model=model,
        methods=fields.get(_METHODS) or (),
        workload=TrialWorkload(
            concurrency=workload.get(_CONCURRENCY) or plain.concurrency,
            prompt_tokens=workload.get(PROMPT_TOKENS) or plain.prompt_tokens,
            max_tokens=new_tokens(workload, kind, plain.max_tokens),
            task_kind=kind,
            shared_prefix_share=workload.get(SHARED_PREFIX_SHARE) or 0.0,
            repetitiveness=workload.get(REPETITIVENESS) or 0.0,
        ),
        rounds=fields.get(_ROUNDS) or 3,
        objectives=OBJECTIVES,
        quality=fields.get(QUALITY) or QualityBound.EXACT,
        seed=fields.get(_SEED),
    )


def describe_trial(trial: Trial) -> dict[str, Any]:
    """Return the JSON document of a trial. Times in seconds; logarithms of speed-ups, one a round."""
    return {
        "baseline": _describe(trial, trial.baseline),
        "methods": [_describe(trial, tried) for tried in trial.methods],
        "observations": trial.observations,
    }


def _describe(trial: Trial, tried: MethodTrial) -> dict[str, Any]:
    def mean(figure: Callable[[Run], float]) -> float | None:
        return sum(map(figure, tried.runs)) / len(tried.runs) if tried.runs else None

    return {
        "method": tried.method.name,
        "error": tried.error,
        "log_ratios": {objective.value: trial.log_ratios(tried, objective) for objective in OBJECTIVES},
        "ttft_s": mean(lambda run: run.ttft_s),
        "tpot_s": mean(lambda run: run.tpot_s),
        "tokens_per_s": mean(lambda run: run.tokens_per_s),
        "makespan_s": mean(lambda run: run.makespan_s),
    }
