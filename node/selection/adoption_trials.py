"""Adoption trials: a few short jobs of each method, taken alternately on the same route."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from node.coordinator.trial_runner import BenchmarkRunner, Run, TrialSpec, TrialWorkload
from node.selection.trial_scheduler import TrialRequest
from protocol.measurements import ObservationKind, QualityBound

ROUNDS: Final = 3
TOKENS: Final = 48
"""New tokens per job: fewer show a method's cost, but not that a text begins to repeat itself, and so not what
speculative decoding saves.
"""

MAX_JOBS: Final = 8
"""Concurrent jobs of one run, at most."""


class AdoptionTrials:
    """Implements TrialRunner by jobs of this node's coordinator."""

    def __init__(self, trials: BenchmarkRunner, *, rounds: int = ROUNDS) -> None:
        self._trials = trials
        self._rounds = rounds

    async def run(self, request: TrialRequest) -> Mapping[str, Sequence[float]]:
        """Compare methods with the baseline; see TrialRunner.

        The cost of a whole job is extrapolated from the short jobs' TTFT and TPOT.
        """
        context = request.context
        trial = await self._trials.run(
            TrialSpec(
                model=request.model,
                methods=[method.name for method in request.methods],
                workload=TrialWorkload(
                    concurrency=min(MAX_JOBS, context.concurrency),
                    prompt_tokens=context.prompt_tokens,
                    max_tokens=min(TOKENS, context.max_tokens),
                    shared_prefix_share=context.shared_prefix_share,
                    repetitiveness=min(context.repetitiveness, 1 - context.shared_prefix_share),
                ),
                rounds=self._rounds,
                kind=ObservationKind.PROBE,
                quality=QualityBound(context.quality),
            )
        )

        def log_cost(run: Run) -> float:
            return math.log(run.ttft_s + run.tpot_s * (context.max_tokens - 1))

        baseline = [log_cost(run) for run in trial.baseline.runs]
        return {
            tried.method.name: [log_cost(run) - base for run, base in zip(tried.runs, baseline, strict=True)]
            for tried in trial.methods
            if tried.error is None
        }
