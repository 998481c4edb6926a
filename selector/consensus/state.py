"""The state transition of an epoch: from contributions to members, reputations, measured cells and the table."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

from protocol.consensus_values import (
    MAX_EXPELLED,
    MAX_JOINED,
    MAX_LEFT,
    Cell,
    CellReadings,
    Commit,
    Member,
    PeerReading,
    Reveal,
    Statement,
    digest_of,
)
from protocol.forms import Digest
from protocol.identity import PeerId
from selector.consensus.reputation import updated, weight_of
from selector.consensus.sortition import READINGS_PER_CELL, MeasurementPlan, assign_cells, beacon_of, select_committee
from selector.consensus.table import AgreedCell, agree_on, digest_of_table, needed_support, supports, table_of

MAX_MEASURED: Final = 4096
"""Cells in the state; the oldest are evicted."""

MAX_BANNED: Final = 4096
"""Expelled peers remembered."""

MAX_ABSENCES: Final = 3
"""Absences in a row after which a member is removed."""

_ROUNDS: Final = 3
"""Iterations between medians and reputations, which depend on each other."""


class Contribution(NamedTuple):
    """A commit and the reveal that opens it."""

    commit: Commit
    reveal: Reveal


@dataclass(frozen=True)
class State:
    """Everything from which the next epoch is computed.

    `members` ascend by peer. `banned`: peers expelled for equivocation, ascending; they are never members again.
    """

    epoch: int
    members: tuple[Member, ...]
    measured: Mapping[Cell, CellReadings]
    banned: tuple[PeerId, ...]
    set_digest: Digest

    @cached_property
    def weights(self) -> dict[str, int]:
        """The weight of each member's readings and votes."""
        return {member.peer: weight_of(member) for member in self.members}

    @cached_property
    def table(self) -> dict[Cell, AgreedCell]:
        """The agreed table."""
        return table_of(self.measured, self.weights, len(self.members))

    @cached_property
    def table_digest(self) -> Digest:
        """The digest of the agreed table."""
        return digest_of_table(self.table)

    @cached_property
    def digest(self) -> Digest:
        """The digest of the whole state."""
        measured = [(cell, self.measured[cell]) for cell in sorted(self.measured)]
        members = [(each.peer, each.hardware, (each.agreed, each.deviated), each.absences) for each in self.members]
        return digest_of("state", self.epoch, members, measured, self.banned, self.set_digest)

    def peers(self) -> tuple[PeerId, ...]:
        """Return the members' ids, ascending."""
        return tuple(member.peer for member in self.members)

    def assignments(self, parent: Digest, epoch: int, plan: MeasurementPlan) -> dict[Cell, tuple[PeerId, ...]]:
        """Return which peers measure which cells in an epoch after this state, which follows statement `parent`."""
        return assign_cells(
            beacon_of(parent, epoch),
            [(member.peer, member.hardware) for member in self.members],
            plan,
            {cell: measured.epoch for cell, measured in self.measured.items()},
        )


def initial_state(genesis: Digest) -> State:
    """Return the state before the first statement, without members."""
    return State(-1, (), {}, (), digest_of("set", genesis))


class EpochResult(NamedTuple):
    """The statement of an epoch and the state after it."""

    statement: Statement
    state: State


def conclude(
    chain: Digest,
    parent: Digest,
    state: State,
    *,
    epoch: int,
    proposer: PeerId,
    contributions: Sequence[Contribution],
    equivocators: Iterable[PeerId],
    plan: MeasurementPlan,
    restart: bool = False,
) -> EpochResult:
    """Return the statement and the state that follow from contributions to an epoch, independent of their order.

    `equivocators`: peers with a proof of equivocation. `restart`: the chain has stalled, so that its new members are
    the contributors. Contributions of banned peers do not count.
    """
    expelled = sorted({*equivocators} & {*state.peers()})[:MAX_EXPELLED]
    banned = tuple(sorted({*state.banned, *expelled})[:MAX_BANNED])
    counted = sorted((c for c in contributions if c.commit.peer not in banned), key=lambda c: c.commit.peer)
    present = {contribution.commit.peer: contribution for contribution in counted}
    assignments = state.assignments(parent, epoch, plan)
    fresh = _fresh_readings(assignments, present, epoch)
    if restart:
        members = _founding_members(state, present)
    else:
        members = _members_after(state, parent, epoch, assignments, present, expelled)
    members = _update_reputations(members, fresh)
    before = set() if restart else {*state.peers()}
    remaining = {member.peer for member in members}
    commits = tuple(sorted(c.commit.id for c in counted if c.commit.peer in remaining))
    measured = _evict_oldest({**state.measured, **_merge_readings(state, assignments, fresh, epoch)})
    after = State(epoch, members, measured, banned, digest_of("set", state.set_digest, epoch, commits))
    statement = Statement(
        chain=chain,
        epoch=epoch,
        parent=parent,
        proposer=proposer,
        commits=commits,
        joined=tuple(sorted(remaining - before)),
        left=tuple(sorted(before - remaining - {*expelled})),
        expelled=tuple(expelled),
        set_digest=after.set_digest,
        table_digest=after.table_digest,
        state_digest=after.digest,
    )
    return EpochResult(statement, after)


def founders(contributions: Iterable[Contribution]) -> tuple[PeerId, ...]:
    """Return the members of a chain that starts or restarts with these contributions."""
    return tuple(sorted(contribution.commit.peer for contribution in contributions)[:MAX_JOINED])


def _fresh_readings(
    assignments: Mapping[Cell, Sequence[PeerId]], present: Mapping[PeerId, Contribution], epoch: int
) -> dict[Cell, CellReadings]:
    """Return the readings of each cell by the peers that were assigned to it; others' readings do not count."""
    revealed = {peer: dict(contribution.reveal.readings) for peer, contribution in present.items()}
    fresh: dict[Cell, CellReadings] = {}
    for cell, peers in assignments.items():
        readings = [PeerReading(peer, revealed[peer][cell]) for peer in sorted(peers) if cell in revealed.get(peer, {})]
        if readings:
            fresh[cell] = CellReadings(epoch, tuple(readings))
    return fresh


def _merge_readings(
    state: State, assignments: Mapping[Cell, Sequence[PeerId]], fresh: Mapping[Cell, CellReadings], epoch: int
) -> dict[Cell, CellReadings]:
    """Return the readings of the assigned cells: the fresh ones, completed by earlier ones where they are too few.

    Otherwise one liar could empty a cell while the other peers are busy. A cell without any reading is entered as well,
    so that other cells get their turn.
    """
    needed = needed_support(len(state.members))
    merged: dict[Cell, CellReadings] = {}
    for cell in assignments:
        now = {reading.peer: reading for reading in fresh[cell].readings} if cell in fresh else {}
        if len(now) < needed and cell in state.measured:
            for reading in state.measured[cell].readings:
                if len(now) < READINGS_PER_CELL:
                    now.setdefault(reading.peer, reading)
        merged[cell] = CellReadings(epoch, tuple(now[peer] for peer in sorted(now)))
    return merged


def _founding_members(state: State, present: Mapping[PeerId, Contribution]) -> tuple[Member, ...]:
    known = {member.peer: member for member in state.members}
    return tuple(
        known.get(peer, Member(peer, ""))._replace(hardware=present[peer].commit.hardware, absences=0)
        for peer in founders(present.values())
    )


def _members_after(
    state: State,
    parent: Digest,
    epoch: int,
    assignments: Mapping[Cell, Sequence[PeerId]],
    present: Mapping[PeerId, Contribution],
    expelled: Sequence[PeerId],
) -> tuple[Member, ...]:
    """Return the members that contributed, were not selected, or are not absent for too long; and newcomers."""
    known = set(state.peers())
    selected = {peer for peers in assignments.values() for peer in peers}
    selected.update(select_committee(beacon_of(parent, epoch), known))
    members = []
    for member in state.members:
        if (contribution := present.get(member.peer)) is not None:
            members.append(member._replace(hardware=contribution.commit.hardware, absences=0))
        elif member.peer not in expelled:
            members.append(member._replace(absences=member.absences + (member.peer in selected)))
    absent = sorted((-m.absences, m.peer) for m in members if m.absences >= MAX_ABSENCES)[:MAX_LEFT]
    leaving = {peer for _, peer in absent}
    joining = sorted(peer for peer in present if peer not in known)[:MAX_JOINED]
    members += [Member(peer, present[peer].commit.hardware) for peer in joining]
    return tuple(sorted(member for member in members if member.peer not in leaving))


def _update_reputations(members: Sequence[Member], fresh: Mapping[Cell, CellReadings]) -> tuple[Member, ...]:
    """Return the members with their reputations after the epoch's readings."""
    after = members
    needed = needed_support(len(members))
    for _ in range(_ROUNDS):
        weights: dict[str, int] = {member.peer: weight_of(member) for member in after}
        agreed: Counter[PeerId] = Counter()
        deviated: Counter[PeerId] = Counter()
        for _, readings in fresh.values():
            entry = agree_on(readings, weights, needed)
            # Of two readings that differ, neither is known to be wrong.
            if entry.firm and len(readings) > 2:
                for peer, value in readings:
                    (agreed if supports(value, entry.value) else deviated)[peer] += 1
        after = [updated(member, agreed[member.peer], deviated[member.peer]) for member in members]
    return tuple(after)


def _evict_oldest(measured: Mapping[Cell, CellReadings]) -> dict[Cell, CellReadings]:
    if len(measured) <= MAX_MEASURED:
        return dict(measured)
    newest = sorted(measured, key=lambda cell: (-measured[cell].epoch, cell))
    return {cell: measured[cell] for cell in newest[:MAX_MEASURED]}
