"""Trials before a method is adopted: a few short jobs of each, in turn, on the spot."""

import math
from typing import Final

from node.coordinator.trial_runner import Run, Trials, TrialSpec, TrialWorkload
from node.selection.chooser import TrialNeed, TrialResult
from protocol.measurements import ObservationKind, QualityBound

ROUNDS: Final = 3
TOKENS: Final = 48
"""New tokens of a trial's jobs: what one costs shows in fewer, but a text that begins to repeat itself, and so what
guesses are worth, does not.
"""

MAX_JOBS: Final = 8
"""Jobs of one run at a time, however many a kind of task has."""


class TrialProber:
    """Implements Prober: runs a trial of the kind of task that is asked about."""

    def __init__(self, trials: Trials, *, rounds: int = ROUNDS) -> None:
        self._trials = trials
        self._rounds = rounds

    async def probe(self, need: TrialNeed) -> TrialResult:
        """Compare methods with the baseline; see Prober.

        The jobs are short; what a whole one takes follows from their times to the first and for each further token.
        """
        context = need.context
        tokens = context.max_tokens
        trial = await self._trials.run(
            TrialSpec(
                model=need.model,
                methods=need.methods,
                workload=TrialWorkload(
                    concurrency=min(MAX_JOBS, context.concurrency),
                    prompt_tokens=context.prompt_tokens,
                    max_tokens=min(TOKENS, tokens),
                    shared_prefix_share=context.shared_prefix_share,
                    repetitiveness=min(context.repetitiveness, 1 - context.shared_prefix_share),
                ),
                rounds=self._rounds,
                kind=ObservationKind.PROBE,
                quality=QualityBound(context.quality),
            )
        )

        def log_cost(run: Run) -> float:
            return math.log(run.ttft_s + run.tpot_s * (tokens - 1))

        plain = [log_cost(run) for run in trial.baseline.runs]
        return TrialResult(
            {
                tried.method.name: [log_cost(run) - base for run, base in zip(tried.runs, plain, strict=True)]
                for tried in trial.methods
                if tried.error is None
            }
        )
