"""`POST /swarm/bench`: measures methods against the baseline under one workload, one cell of a grid.

The measurement is cancelled when the client disconnects. A grid takes one request a cell, so that finished cells are
kept when it is interrupted.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from node.api.access import begin_answers
from node.api.endpoint import until_disconnect
from node.api.fields import (
    Fields,
    count_between,
    number_between,
    parse_count,
    parse_json,
    parse_method,
    parse_object,
    parse_quality,
    parse_text,
    refuse,
)
from node.coordinator.trial_runner import MethodTrial, Run, Trial, TrialSpec, TrialWorkload
from protocol.measurements import Objective, QualityBound

MAX_ROUNDS: Final = 100
MAX_CONCURRENCY: Final = 64
MAX_METHODS: Final = 64

BENCH_FIELDS: Final = frozenset({"model", "methods", "workload", "rounds", "quality", "seed"})
WORKLOAD_FIELDS: Final = frozenset(
    {"concurrency", "prompt_tokens", "max_tokens", "shared_prefix_share", "repetitiveness"}
)


class BenchEndpoint:
    """The ASGI application of `/swarm/bench`."""

    def __init__(self, measure: Callable[[TrialSpec], Awaitable[Trial]]) -> None:
        self._measure = measure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ApiError before the response starts."""
        spec = parse_spec(await Request(scope, receive).body())
        begin_answers(scope)

        async def answer() -> None:
            await JSONResponse(describe_trial(await self._measure(spec)))(scope, receive, send)

        await until_disconnect(receive, answer)


def parse_spec(body: bytes) -> TrialSpec:
    """Return the trial. Raises ApiError."""
    fields = Fields(parse_json(body))
    fields.refuse_unless_known(BENCH_FIELDS)
    model = fields.get("model", parse_text)
    if not model:
        refuse("model", "is missing")
    workload = Fields(fields.get("workload", parse_object) or {}, "workload.")
    workload.refuse_unless_known(WORKLOAD_FIELDS)
    plain = TrialWorkload()
    return TrialSpec(
        model=model,
        methods=fields.get("methods", _parse_methods) or (),
        workload=TrialWorkload(
            concurrency=workload.get("concurrency", count_between(1, MAX_CONCURRENCY)) or plain.concurrency,
            prompt_tokens=workload.get("prompt_tokens", parse_count) or plain.prompt_tokens,
            max_tokens=workload.get("max_tokens", parse_count) or plain.max_tokens,
            shared_prefix_share=workload.get("shared_prefix_share", number_between(0, 1)) or 0.0,
            repetitiveness=workload.get("repetitiveness", number_between(0, 1)) or 0.0,
        ),
        rounds=fields.get("rounds", count_between(1, MAX_ROUNDS)) or 3,
        quality=fields.get("quality", parse_quality) or QualityBound.EXACT,
        seed=fields.get("seed", count_between(1, 2**31 - 1)),
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
        "log_ratios": {objective.value: trial.log_ratios(tried, objective) for objective in Objective},
        "ttft_s": mean(lambda run: run.ttft_s),
        "tpot_s": mean(lambda run: run.tpot_s),
        "tokens_per_s": mean(lambda run: run.tokens_per_s),
        "makespan_s": mean(lambda run: run.makespan_s),
    }


def _parse_methods(param: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_METHODS:
        refuse(param, f"must be a list of 1 to {MAX_METHODS} methods")
    return [parse_method(f"{param}[{index}]", each) for index, each in enumerate(value)]
