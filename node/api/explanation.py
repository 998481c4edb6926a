"""Documents of method selection: state of learning, explanation of a choice, and past choices."""

import math
import statistics
from collections.abc import Collection
from typing import Final

import trio

from node.api.interface import ExplainedMethod, Explanation, PastDecision, PastDecisions, SelectionStatus
from node.coordinator.coordinator import Considered
from node.coordinator.submission import JobOutcome, Selection
from node.selection.chooser import LearnedChoice, LearnedChooser
from node.selection.learner import ModelStatus

RECENT: Final = 20
"""Past choices that are listed."""


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
    methods: list[ExplainedMethod] = [
        {
            "name": name,
            "predicted_s": predicted.cost_s,
            "predicted_speedup": predicted.speedup,
            "speedup_low": predicted.speedup * math.exp(-predicted.deviation),
            "speedup_high": predicted.speedup * math.exp(predicted.deviation),
            "votes": {vote.peer: vote.scores[name] for vote in considered.votes if name in vote.scores},
            "accepted": name in choice.accepted,
            "trial_speedup": math.exp(-trials[name].log_ratio) if name in trials else None,
        }
        for name, predicted in selection.predictions.items()
    ]
    return {
        "model": considered.model,
        "task": {name: value for name, value in considered.context.values().items() if name != "objective"},
        "route": [
            {"peer": stage.peer, "start": stage.blocks.start, "end": stage.blocks.end} for stage in considered.route
        ],
        "selection": selection_status(chooser, model),
        "methods": methods,
        "agreed": considered.agreed,
        "past": past_decisions(chooser.decisions),
    }


def past_decisions(decisions: Collection[tuple[JobOutcome, Selection]]) -> PastDecisions:
    """Return past choices and their outcome."""
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
        for outcome, selection in reversed(list(decisions)[-RECENT:])
    ]
    errors = [abs(math.log(outcome.total_s / selection.predicted_s)) for outcome, selection in decisions]
    return {
        "jobs": len(decisions),
        "typical_error": math.expm1(statistics.median(errors)) if errors else None,
        "mean_regret_s": statistics.fmean(selection.regret_s for _, selection in decisions) if decisions else 0.0,
        "recent": recent,
    }
