"""What follows from an epoch's contributions: members, their reputations, the replicas measured, and the table."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

from selector.consensus.reputation import Reputation
from selector.consensus.sortition import REPLICAS, Agenda, beacon_of, draw_assignments, draw_committee
from selector.consensus.table import (
    Entry,
    Replica,
    Replicas,
    agree_on,
    digest_of_table,
    needed_support,
    supports,
    table_of,
)
from selector.consensus.values import Cell, Commit, Digest, Reveal, Statement, digest_of

MAX_MEASURED: Final = 4096
"""Cells kept; those measured longest ago make room."""

MAX_JOINED: Final = 64
"""Newcomers in one epoch; of more, those with the smallest ids, and the others in the next."""

MAX_LEFT: Final = 48
MAX_EXPELLED: Final = 8
"""Members that leave, and that are expelled, in one epoch; of more, the others in the next. A statement is small."""

MAX_OUTLAWS: Final = 4096
"""Expelled peers remembered."""

MAX_ABSENCES: Final = 3
"""A member that was drawn so many times in a row and said nothing is one no longer."""

_ROUNDS: Final = 3
"""Medians and reputations depend on each other: so often they are computed from each other in one epoch."""


class Member(NamedTuple):
    """A member, what it is, and how it has fared."""

    peer: str
    hardware: str
    reputation: Reputation = Reputation()
    absences: int = 0


class Contribution(NamedTuple):
    """A commit and the reveal that opens it."""

    commit: Commit
    reveal: Reveal


@dataclass(frozen=True)
class State:
    """Everything that the next epoch is computed from. `members` ascend by peer, `expelled` ascend."""

    epoch: int
    members: tuple[Member, ...]
    measured: Mapping[Cell, Replicas]
    expelled: tuple[str, ...]
    set_digest: Digest

    @cached_property
    def weights(self) -> dict[str, int]:
        """The weight of each member's readings and votes."""
        return {member.peer: member.reputation.weight for member in self.members}

    @cached_property
    def table(self) -> dict[Cell, Entry]:
        """The agreed table."""
        return table_of(self.measured, self.weights, len(self.members))

    @cached_property
    def table_digest(self) -> Digest:
        """The digest of the agreed table."""
        return digest_of_table(self.table)

    @cached_property
    def digest(self) -> Digest:
        """The digest of it all."""
        measured = [(cell, self.measured[cell]) for cell in sorted(self.measured)]
        return digest_of("state", self.epoch, self.members, measured, self.expelled, self.set_digest)

    def peers(self) -> tuple[str, ...]:
        """Return the members' ids, ascending."""
        return tuple(member.peer for member in self.members)

    def assignments(self, parent: Digest, epoch: int, agenda: Agenda) -> dict[Cell, tuple[str, ...]]:
        """Return who measures what in an epoch after this state, which follows from the statement `parent`."""
        return draw_assignments(
            beacon_of(parent, epoch),
            [(member.peer, member.hardware) for member in self.members],
            agenda,
            {cell: replicas.epoch for cell, replicas in self.measured.items()},
        )


def initial_state(genesis: Digest) -> State:
    """Return the state before the first statement: nobody and nothing."""
    return State(-1, (), {}, (), digest_of("set", genesis))


class Outcome(NamedTuple):
    """What an epoch comes to."""

    statement: Statement
    state: State


def conclude(
    chain: Digest,
    parent: Digest,
    state: State,
    *,
    epoch: int,
    proposer: str,
    contributions: Sequence[Contribution],
    offenders: Iterable[str],
    agenda: Agenda,
    refounds: bool = False,
) -> Outcome:
    """Return the statement and the state that follow from contributions to an epoch, in whatever order they come.

    `offenders`: who was proven to have equivocated. `refounds`: the chain has lapsed, so that the members are those who
    contributed. Contributions of peers that were expelled count for nothing.
    """
    convicted = sorted({*offenders} & {*state.peers()})[:MAX_EXPELLED]
    outlaws = tuple(sorted({*state.expelled, *convicted})[:MAX_OUTLAWS])
    counted = sorted((c for c in contributions if c.commit.peer not in outlaws), key=lambda c: c.commit.peer)
    present = {contribution.commit.peer: contribution for contribution in counted}
    assignments = state.assignments(parent, epoch, agenda)
    fresh = _readings(assignments, present, epoch)
    if refounds:
        members = _founding_members(state, present)
    else:
        members = _members_after(state, parent, epoch, assignments, present, convicted)
    members = _judged(members, fresh)
    before = set() if refounds else {*state.peers()}
    remaining = {member.peer for member in members}
    commits = tuple(sorted(c.commit.id for c in counted if c.commit.peer in remaining))
    measured = _bounded({**state.measured, **_kept(state, assignments, fresh, epoch)})
    after = State(epoch, members, measured, outlaws, digest_of("set", state.set_digest, epoch, commits))
    statement = Statement(
        chain=chain,
        epoch=epoch,
        parent=parent,
        proposer=proposer,
        commits=commits,
        joined=tuple(sorted(remaining - before)),
        left=tuple(sorted(before - remaining - {*convicted})),
        expelled=tuple(convicted),
        set_digest=after.set_digest,
        table_digest=after.table_digest,
        state_digest=after.digest,
    )
    return Outcome(statement, after)


def founders(contributions: Iterable[Contribution]) -> tuple[str, ...]:
    """Return who are the members when a chain is founded by those who contribute."""
    return tuple(sorted(contribution.commit.peer for contribution in contributions)[:MAX_JOINED])


def _readings(
    assignments: Mapping[Cell, Sequence[str]], present: Mapping[str, Contribution], epoch: int
) -> dict[Cell, Replicas]:
    """Return what was read of each cell by those who were to; nobody else's word about it counts."""
    revealed = {peer: dict(contribution.reveal.readings) for peer, contribution in present.items()}
    fresh: dict[Cell, Replicas] = {}
    for cell, peers in assignments.items():
        replicas = [Replica(peer, revealed[peer][cell]) for peer in sorted(peers) if cell in revealed.get(peer, {})]
        if replicas:
            fresh[cell] = Replicas(epoch, tuple(replicas))
    return fresh


def _kept(
    state: State, assignments: Mapping[Cell, Sequence[str]], fresh: Mapping[Cell, Replicas], epoch: int
) -> dict[Cell, Replicas]:
    """Return what there is of the cells that were drawn: what was read now, or what was read before.

    Too few readings do not take the place of more: else one liar could empty a cell while the others are busy. A cell
    that nobody could measure is marked as drawn all the same, so that it does not keep the others from their turn.
    """
    needed = needed_support(len(state.members))
    kept: dict[Cell, Replicas] = {}
    for cell in assignments:
        now = {replica.peer: replica for replica in fresh[cell].replicas} if cell in fresh else {}
        if len(now) < needed and cell in state.measured:
            for replica in state.measured[cell].replicas:
                if len(now) < REPLICAS:
                    now.setdefault(replica.peer, replica)
        kept[cell] = Replicas(epoch, tuple(now[peer] for peer in sorted(now)))
    return kept


def _founding_members(state: State, present: Mapping[str, Contribution]) -> tuple[Member, ...]:
    known = {member.peer: member for member in state.members}
    return tuple(
        known.get(peer, Member(peer, ""))._replace(hardware=present[peer].commit.hardware, absences=0)
        for peer in founders(present.values())
    )


def _members_after(
    state: State,
    parent: Digest,
    epoch: int,
    assignments: Mapping[Cell, Sequence[str]],
    present: Mapping[str, Contribution],
    convicted: Sequence[str],
) -> tuple[Member, ...]:
    """Return who was present, who was only not drawn or not absent for long, and who is new."""
    known = set(state.peers())
    drawn = {peer for peers in assignments.values() for peer in peers}
    drawn.update(draw_committee(beacon_of(parent, epoch), known))
    members = []
    for member in state.members:
        if (contribution := present.get(member.peer)) is not None:
            members.append(member._replace(hardware=contribution.commit.hardware, absences=0))
        elif member.peer not in convicted:
            members.append(member._replace(absences=member.absences + (member.peer in drawn)))
    gone = sorted((-m.absences, m.peer) for m in members if m.absences >= MAX_ABSENCES)[:MAX_LEFT]
    joining = sorted(peer for peer in present if peer not in known)[:MAX_JOINED]
    members += [Member(peer, present[peer].commit.hardware) for peer in joining]
    leaving = {peer for _, peer in gone}
    return tuple(sorted(member for member in members if member.peer not in leaving))


def _judged(members: Sequence[Member], fresh: Mapping[Cell, Replicas]) -> tuple[Member, ...]:
    """Return the members with the reputations that the epoch's cells leave them with."""
    before = {member.peer: member.reputation for member in members}
    after = dict(before)
    needed = needed_support(len(members))
    for _ in range(_ROUNDS):
        weights = {peer: reputation.weight for peer, reputation in after.items()}
        agreed: Counter[str] = Counter()
        deviated: Counter[str] = Counter()
        for _, replicas in fresh.values():
            entry = agree_on(replicas, weights, needed)
            # With fewer than three there is no saying who of two is wrong.
            if entry.firm and len(replicas) > 2:
                for peer, value in replicas:
                    (agreed if supports(value, entry.value) else deviated)[peer] += 1
        after = {peer: reputation.after(agreed[peer], deviated[peer]) for peer, reputation in before.items()}
    return tuple(member._replace(reputation=after[member.peer]) for member in members)


def _bounded(measured: Mapping[Cell, Replicas]) -> dict[Cell, Replicas]:
    if len(measured) <= MAX_MEASURED:
        return dict(measured)
    newest = sorted(measured, key=lambda cell: (-measured[cell].epoch, cell))
    return {cell: measured[cell] for cell in newest[:MAX_MEASURED]}
