"""A stage's vote on the method of a job, and the agreed history that weighs the votes."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from selector.heuristic import predicted_cost
from selector.task import Method, TaskContext


class Agreement(Protocol):
    """What the swarm has agreed about a model's methods; see `selector.consensus`."""

    @property
    def epoch(self) -> int:
        """The epoch of the statement that stands."""
        ...

    @property
    def statement(self) -> bytes:
        """The id of that statement."""
        ...

    @property
    def weights(self) -> Mapping[str, int]:
        """The weight of each member's word."""
        ...

    @property
    def table_digest(self) -> bytes:
        """The digest of the agreed table."""
        ...


class Voter(Protocol):
    """A stage's own opinion."""

    async def vote(self, context: TaskContext, methods: Sequence[Method]) -> Mapping[str, float]:
        """Return for every method given, by name, the natural logarithm of what it is expected to cost."""
        ...


class HeuristicVoter:
    """Votes as the hand-written rule predicts: what a peer without a history goes by."""

    async def vote(self, context: TaskContext, methods: Sequence[Method]) -> Mapping[str, float]:
        """Return the rule's predictions; see Voter."""
        return {method.name: predicted_cost(context, method) for method in methods}
