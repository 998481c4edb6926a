"""How a method is chosen: what a job admits, what it depends on, and who has a say.

The coordinator lists the methods that the job admits, the most promising first; every stage votes; the tally decides.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from node.coordinator.submission import AUTO, JobError, JobErrorCode, JobOutcome, JobRequest, Selection
from node.models.library import KnownModel
from protocol.identity import ModelId
from protocol.limits import MAX_VOTES
from protocol.measurements import QualityBound
from selector.heuristic import predicted_cost, preference
from selector.task import (
    PORTFOLIO,
    MeasuredQuality,
    Method,
    MethodError,
    TaskContext,
    admits,
    parse_method,
)

MEASURING_RETRY_S = 10.0
"""What a client is told to wait where the quality of a method is being measured."""


class Asked(enum.Enum):
    """What became of the wish to have a model measured."""

    KNOWN = enum.auto()
    """What can be known of it is known."""
    UNDER_WAY = enum.auto()
    """It is being measured, or soon will be."""
    NEVER = enum.auto()
    """Nobody here measures."""


class QualityStore(Protocol):
    """Knows what lossy methods do to a model's answers."""

    def ask(self, model: KnownModel) -> Asked:
        """Have a model measured unless it was, and return at once: what is not known yet is not waited for."""
        ...

    def quality(self, model: ModelId, method: Method) -> MeasuredQuality | None:
        """Return what was measured; None where nothing was."""
        ...


class NullQualityStore:
    """Knows nothing, so that only exact methods are admitted."""

    def ask(self, model: KnownModel) -> Asked:
        """Return NEVER; see Ledger."""
        del model
        return Asked.NEVER

    def quality(self, model: ModelId, method: Method) -> MeasuredQuality | None:
        """Return None; see Ledger."""
        del model, method
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionRequest:
    """What is to be chosen: one of the methods that a job admits, for a task.

    `is_free`: whether the user left the choice to us, and no text has begun yet that must go on as it began.
    """

    model: ModelId
    context: TaskContext
    admitted: Sequence[Method]
    is_free: bool = True


class Choice(Protocol):
    """The choice for one job in the making."""

    @property
    def order(self) -> Sequence[Method]:
        """The admitted methods with the most promising first; it decides between equal scores."""
        ...

    def ballot(self, votes: Sequence[Mapping[str, float]], weights: Sequence[int] | None = None) -> Mapping[str, float]:
        """Return the coordinator's own scores, once those of the stages are known, and what all votes weigh.

        What is left out is not accepted. Where all stages offer a method at all, one of those is accepted.
        """
        ...


class Chooser(Protocol):
    """The coordinator's side of the choice, which sees the prediction, the votes and what came of it."""

    async def choose(self, question: SelectionRequest) -> Choice:
        """Return the choice, at once: what is not known yet is not waited for."""
        ...

    def served(self, choice: Choice, outcome: JobOutcome) -> Selection | None:
        """Take note of what a job took, and return what the choice looked like; None where nothing was predicted."""
        ...


@dataclass(frozen=True, slots=True)
class HeuristicChoice:
    """The hand-written rule's opinion: it accepts whatever the job admits."""

    context: TaskContext
    order: Sequence[Method]

    def ballot(self, votes: Sequence[Mapping[str, float]], weights: Sequence[int] | None = None) -> Mapping[str, float]:
        """Return the rule's predictions; see Choice."""
        del votes, weights
        return {method.name: predicted_cost(self.context, method) for method in self.order}


class HeuristicChooser:
    """Prefers what the hand-written rule does, and learns nothing."""

    async def choose(self, question: SelectionRequest) -> Choice:
        """Return the methods by the rule's prediction; see Chooser."""
        return HeuristicChoice(question.context, preference(question.context, question.admitted))

    def served(self, choice: Choice, outcome: JobOutcome) -> None:
        """Take no note; see Chooser."""
        del choice, outcome


def admitted_methods(request: JobRequest, model: KnownModel, ledger: QualityStore) -> list[Method]:
    """Return the methods that a job may be served with: one where it names it, else all within its quality bound.

    A model whose quality is not known yet is asked for; until then lossy methods are not admitted.
    Raises JobError, with one line, for a method that there is not or that the bound does not admit.
    """
    bound = request.quality
    asked = Asked.NEVER if bound is QualityBound.EXACT else ledger.ask(model)
    if request.method == AUTO:
        admitted = [each for each in PORTFOLIO.values() if admits(bound, each, ledger.quality(model.id, each))]
        return admitted[:MAX_VOTES]
    try:
        named = parse_method(request.method)
    except MethodError as error:
        raise JobError(JobErrorCode.INVALID, f"{error}; or use auto") from None
    quality = ledger.quality(model.id, named)
    if not admits(bound, named, quality):
        if quality is None and asked is Asked.UNDER_WAY:
            message = f"what {named.name} does to {model.name}'s answers is being measured; try again in a few minutes"
            raise JobError(JobErrorCode.MEASURING, message, retry_after_s=MEASURING_RETRY_S)
        raise JobError(JobErrorCode.INVALID, _why_not(named, bound, quality))
    return [named]


def _why_not(method: Method, bound: QualityBound, quality: MeasuredQuality | None) -> str:
    if quality is None and bound is not QualityBound.EXACT:
        return f"{method.name} was not measured for this model, so its quality is unknown: choose another method"
    wider = [each for each in QualityBound if admits(each, method, quality)]
    if wider:
        return f"{method.name} is not exact: it needs --quality {wider[0]}"
    if quality is None:
        return f"{method.name} is not exact: it needs --quality near or any"
    change = f"{quality.perplexity_change:+.1%}"
    return f"{method.name} changes this model's perplexity by {change}: too much for any quality bound"
