"""How the peers of a route agree on a job's method, in three steps without an extra round trip.

1. Vote: a stage that opens a session answers with the cost of each method that it predicts from its own history
   (`Opened.votes`, made by a `Voter`).
2. Tally: the coordinator adds its own ballot, takes the method that `selector.voting.tally` returns for all ballots,
   and sends it with the ballots (`Begin`). They weigh the same, unless all stages stand by one agreed statement of the
   swarm, whose members then have the weights that it gives them; a ballot against what was measured has none.
3. Verify: every stage repeats the tally before it begins (`tally_fault`), so that a coordinator can neither alter a
   vote nor choose another method.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from protocol.consensus_values import Cell
from protocol.forms import Digest
from protocol.identity import ModelId, PeerId
from protocol.measurements import TaskKind
from protocol.messages import Begin
from selector.consensus.table import AgreedCell
from selector.task import Method, TaskContext
from selector.voting import bound_weights, tally

Vote: TypeAlias = Mapping[str, float] | Mapping[str, float | None]
"""The log cost of methods; None, or nothing, for one that is not offered."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a chain's head says of a model's methods.

    `weights`: of the members' ballots. `table`: the agreed cells. `hardware`: the class of each member. `readings`: the
    last ones of each member.
    """

    epoch: int
    statement: Digest
    table_digest: Digest
    weights: dict[str, int]
    table: dict[Cell, AgreedCell]
    hardware: Mapping[str, str] = field(default_factory=dict)
    readings: Mapping[str, Mapping[Cell, int]] = field(default_factory=dict)

    def for_task(self, task_kind: str) -> "Agreement":
        """Return what binds votes on tasks of a kind: cells are measured by tasks that generate."""
        return self if task_kind == TaskKind.GENERATE else replace(self, table={}, readings={})

    def weigh(self, methods: Sequence[str], votes: Iterable[tuple[str, Vote]]) -> tuple[int, ...]:
        """Return the weight of each peer's vote on these methods."""
        return bound_weights(methods, [*votes], self.weights, self._measured)

    def _measured(self, peer: str) -> dict[Cell, int]:
        """Return the agreed values on a member's hardware, and where there are none its own readings.

        In this order: who reports false readings does not vote by them.
        """
        kind = self.hardware.get(peer)
        agreed = {cell: each.value for cell, each in self.table.items() if each.firm and cell.hardware == kind}
        return dict(self.readings.get(peer, {})) | agreed


@dataclass(frozen=True, slots=True)
class TableVersion:
    """Names the agreed table that predictions were learned from."""

    epoch: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class StageVote:
    """The natural logarithm of the expected cost of each method, by name. `learned_from`: None for no agreed table."""

    scores: Mapping[str, float]
    learned_from: TableVersion | None = None


class Voter(Protocol):
    """Predicts what methods cost."""

    async def vote(self, model: ModelId, context: TaskContext, methods: Sequence[Method]) -> StageVote:
        """Return a vote on every method given."""


def tally_fault(
    message: Begin,
    *,
    own_ballot: tuple[PeerId, Mapping[str, float]],
    coordinator: PeerId,
    methods: Sequence[str],
    agreement: Agreement | None,
) -> str | None:
    """Return why a Begin does not follow from the ballots, if it does not.

    `own_ballot`: who voted here, and how. `methods`: of the session, in its order. `agreement`: when it was opened.
    """
    ballots, stage = message.ballots, message.session.stage
    peer, votes = own_ballot
    own_scores = tuple(votes.get(name) for name in methods)
    if not ballots or ballots[-1].peer != coordinator:
        return "the coordinator's own ballot is not the last"
    if stage >= len(ballots) - 1 or ballots[stage].peer != peer or ballots[stage].scores != own_scores:
        return "the vote given here is not among the ballots as it was given"
    weights = None
    if message.statement is not None:
        if agreement is None or agreement.statement != message.statement:
            return "the votes were weighed by a statement that this peer did not stand by"
        if any(len(ballot.scores) != len(methods) for ballot in ballots):
            return "a ballot does not score every method"
        scored = ((ballot.peer, dict(zip(methods, ballot.scores, strict=True))) for ballot in ballots)
        weights = agreement.weigh(methods, scored)
    try:
        agreed = tally(methods, [ballot.scores for ballot in ballots], weights)
    except ValueError as error:
        return str(error)
    if agreed != message.method:
        return f"the ballots come to {agreed}, not to {message.method}"
    return None
