"""Adoption trials: a few short jobs of each method, taken alternately on the same route."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from node.coordinator.observation import ServedJob
from node.coordinator.trial import Run, Spending, TrialSpec
from node.coordinator.trial_runner import BenchmarkRunner
from node.selection.trial_scheduler import TrialRequest
from protocol.measurements import Objective, ObservationKind, QualityBound, TaskKind
from selector.adoption import ROUNDS_WITH_LOOKS, believed, is_decided
from selector.task import TaskContext, baseline_of
from selector.workloads import TrialWorkload

MIN_ROUNDS: Final = min(ROUNDS_WITH_LOOKS)
TOKENS: Final = 48
"""New tokens per job: fewer show a method's cost, but not that a text begins to repeat itself, and so not what
speculative decoding saves.
"""

MAX_JOBS: Final = 8
"""Concurrent jobs of one run, at most."""


class AdoptionTrials:
    """Implements TrialRunner by jobs of this node's coordinator."""

    def __init__(self, trials: BenchmarkRunner) -> None:
        self._trials = trials

    async def run(self, request: TrialRequest, spending: Spending) -> Mapping[str, Sequence[float]]:
        """Compare methods with the baseline; see TrialRunner.

        The cost of a whole job is extrapolated from the short jobs' TTFT and TPOT. Computing is what the stages state
        of themselves, `believed` within limits.
        """
        context = request.context
        # At given prices the cheapest method is the one that computes least.
        is_latency = context.objective == Objective.LATENCY
        objective = Objective.LATENCY if is_latency else Objective.THROUGHPUT

        def whole_s(run: Run) -> float:
            return run.ttft_s + run.tpot_s * (context.max_tokens - 1)

        def log_ratios(name: str, runs: Sequence[Run], plain: Sequence[Run]) -> list[float]:
            def ratios(cost_s: Callable[[Run], float]) -> list[float]:
                return [math.log(cost_s(run) / cost_s(base)) for run, base in zip(runs, plain, strict=True)]

            if is_latency:
                return ratios(whole_s)
            stated = ratios(lambda run: run.cost_s(objective))
            measured = ratios(lambda run: run.cost_s(Objective.LATENCY))
            return believed(stated, measured, is_used=name == request.in_use)

        def other_hardware(job: ServedJob) -> str | None:
            is_other = job.context.hardware != context.hardware
            return "the stages of the jobs are gone, and others have other hardware" if is_other else None

        def enough(rounds: Sequence[Mapping[str, Run]]) -> bool:
            runs = {name: [each[name] for each in rounds] for name in rounds[0]}
            plain = runs.pop(baseline_of(request.in_use).name)
            return is_decided(request.in_use, {name: log_ratios(name, of, plain) for name, of in runs.items()})

        trial = await self._trials.run(
            TrialSpec(
                model=request.model,
                methods=[method.name for method in request.methods],
                workload=_workload_of(context),
                rounds=MIN_ROUNDS,
                is_decided=enough,
                spending=spending,
                objectives=[objective],
                kind=ObservationKind.PROBE,
                quality=QualityBound(context.quality),
                stages=request.stages,
                route_for=Objective(context.objective),
                route_fault=other_hardware,
            )
        )

        return {
            tried.method.name: log_ratios(tried.method.name, tried.runs, trial.baseline.runs)
            for tried in trial.methods
            if tried.error is None
        }


def _workload_of(context: TaskContext) -> TrialWorkload:
    """Return short jobs like those of a context."""
    return TrialWorkload(
        concurrency=min(MAX_JOBS, context.concurrency),
        prompt_tokens=context.prompt_tokens,
        max_tokens=min(TOKENS, context.max_tokens),
        shared_prefix_share=context.shared_prefix_share,
        repetitiveness=min(context.repetitiveness, 1 - context.shared_prefix_share),
        task_kind=TaskKind(context.task_kind),
    )
