"""Method selection by the heuristic alone, for tests that need no learning: chooser, voter and quality store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from node.coordinator.method_choice import Choice, SelectionRequest, Votes, WeighVotes
from node.coordinator.submission import JobOutcome
from node.models.library import KnownModel
from node.stages.voter import StageVote, TableVersion
from protocol.identity import ModelId
from selector.heuristic import predicted_cost, preference
from selector.quality import MeasuredQuality
from selector.task import Method, TaskContext


class NullQualityStore:
    """Measures nothing, so that only exact methods are admitted."""

    def request(self, model: KnownModel) -> bool:
        del model
        return False

    def quality(self, model: ModelId, method: Method) -> MeasuredQuality | None:
        del model, method
        return None

    def failure(self, model: ModelId) -> str | None:
        del model
        return None


@dataclass(frozen=True, slots=True)
class HeuristicChoice:
    """A choice by the heuristic, which accepts all methods that the job admits."""

    context: TaskContext
    order: Sequence[Method]
    learned_from: TableVersion | None = None

    def predicted_cost(self, method: str) -> None:
        """Predict nothing; see Choice."""
        del method

    def ballot(self, votes: Votes, weigh: WeighVotes) -> Mapping[str, float]:
        """Return the heuristic's predictions; see Choice."""
        del votes, weigh
        return {method.name: predicted_cost(self.context, method) for method in self.order}


class HeuristicChooser:
    """Chooses by the heuristic, and learns nothing."""

    async def choose(self, question: SelectionRequest) -> Choice:
        """Return the methods in the heuristic's order; see Chooser."""
        return HeuristicChoice(question.context, preference(question.context, question.admitted))

    def served(self, choice: Choice, outcome: JobOutcome) -> None:
        """Ignore the outcome; see Chooser."""
        del choice, outcome


class HeuristicVoter:
    """Votes by the hand-written cost model: for a peer without a history."""

    async def vote(self, model: ModelId, context: TaskContext, methods: Sequence[Method]) -> StageVote:
        """Return the predictions of the cost model; see Voter."""
        del model
        return StageVote({method.name: predicted_cost(context, method) for method in methods})
