"""The state transition of an epoch: from contributions to members, reputations, measured cells and the table."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

from protocol.consensus_values import (
    MAX_EXPELLED,
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
from selector.consensus import inclusion
from selector.consensus.audit import credited
from selector.consensus.membership import Presence, found, succeed
from selector.consensus.reputation import weight_of
from selector.consensus.sortition import (
    BEACON_NONCES,
    READINGS_PER_CELL,
    MeasurementPlan,
    Sortition,
    beacon_of,
    draw,
    next_beacon,
)
from selector.consensus.table import AgreedCell, digest_of_table, needed_support, table_of

MAX_MEASURED: Final = 4096
"""Cells in the state; the oldest are evicted."""

MAX_BANNED: Final = 4096
"""Expelled peers remembered."""


class Contribution(NamedTuple):
    """A commit and the reveal that opens it."""

    commit: Commit
    reveal: Reveal

    @property
    def id(self) -> Digest:
        """The digest by which a statement names it. It covers the inclusion list, of which a peer may sign several."""
        return digest_of("contribution", self.commit.id, self.reveal.inclusion)


@dataclass(frozen=True)
class State:
    """Everything from which the next epoch is computed.

    `members` and `candidates` ascend by peer. `banned`: peers expelled for equivocation, ascending; they are never
    members again. `beacon`: of the statement.
    """

    epoch: int
    members: tuple[Member, ...]
    candidates: tuple[Member, ...]
    measured: Mapping[Cell, CellReadings]
    banned: tuple[PeerId, ...]
    beacon: Digest
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
        return digest_of("state", self.epoch, self.members, self.candidates, measured, self.banned, self.set_digest)

    @cached_property
    def hardware(self) -> dict[str, str]:
        """The hardware class of each member and candidate, as it stated it when it came."""
        return {each.peer: each.hardware for each in (*self.members, *self.candidates)}

    @cached_property
    def readings(self) -> dict[str, dict[Cell, int]]:
        """The last readings of each member."""
        found: dict[str, dict[Cell, int]] = {member.peer: {} for member in self.members}
        for cell, measured in self.measured.items():
            for peer, value in measured.readings:
                if peer in found:
                    found[peer][cell] = value
        return found

    def peers(self) -> tuple[PeerId, ...]:
        """Return the members' ids, ascending."""
        return tuple(member.peer for member in self.members)

    def draw(self, epoch: int, plan: MeasurementPlan) -> Sortition:
        """Return what is drawn for an epoch after this state. Takes long in large swarms."""
        measured = {cell: measured.epoch for cell, measured in self.measured.items()}
        return draw(beacon_of(self.beacon, epoch), self.members, self.candidates, plan, measured)


def initial_state(genesis: Digest) -> State:
    """Return the state before the first statement, without members."""
    return State(-1, (), (), {}, (), genesis, digest_of("set", genesis))


class EpochResult(NamedTuple):
    """The statement of an epoch and the state after it."""

    statement: Statement
    state: State


def conclude(
    chain: Digest,
    parent: Digest,
    state: State,
    sortition: Sortition,
    *,
    epoch: int,
    proposer: PeerId,
    contributions: Sequence[Contribution],
    equivocators: Iterable[PeerId],
    restart: bool = False,
) -> EpochResult:
    """Return the statement and the state that follow from contributions to an epoch, independent of their order.

    `sortition`: of the epoch, by `state`. `equivocators`: peers with a proof of equivocation. `restart`: the chain has
    stalled, so that its new members are the contributors.
    """
    known = {*state.hardware}
    expelled = sorted({*equivocators} & known)[:MAX_EXPELLED]
    banned = tuple(sorted({*state.banned, *expelled})[:MAX_BANNED])
    counted = sorted((c for c in contributions if counts(state, c) and c.commit.peer not in banned), key=_peer_of)
    beacon = beacon_after(state, sortition, counted, epoch, restart=restart)
    fresh = _fresh_readings(sortition.cells, counted, epoch)
    members, candidates = _members_after(state, sortition, counted, fresh, banned, beacon, epoch, restart=restart)
    remaining = {member.peer for member in members}
    is_continued = restart and not remaining.isdisjoint(state.peers())
    before = set() if restart else {*state.peers()}
    # Newcomers for whom there was no room change nothing, and are not named.
    taken = known | remaining | {candidate.peer for candidate in candidates}
    commits = tuple(sorted(c.id for c in counted if restart or c.commit.peer in taken))
    measured = _evict_oldest({**state.measured, **_merge_readings(state, sortition.cells, fresh, epoch)})
    set_digest = digest_of("set", state.set_digest, epoch, commits)
    after = State(epoch, members, candidates, measured, banned, beacon, set_digest)
    statement = Statement(
        chain=chain,
        epoch=epoch,
        parent=parent,
        proposer=proposer,
        commits=commits,
        joined=() if is_continued else tuple(sorted(remaining - before)),
        left=tuple(sorted(before - remaining - {*expelled})),
        expelled=tuple(expelled),
        beacon=beacon,
        set_digest=after.set_digest,
        table_digest=after.table_digest,
        state_digest=after.digest,
        remaining=inclusion.pack(remaining, state.peers()) if is_continued else b"",
    )
    return EpochResult(statement, after)


def _members_after(
    state: State,
    sortition: Sortition,
    contributions: Sequence[Contribution],
    fresh: Mapping[Cell, CellReadings],
    banned: Collection[PeerId],
    beacon: Digest,
    epoch: int,
    *,
    restart: bool,
) -> tuple[tuple[Member, ...], tuple[Member, ...]]:
    """Return the members and candidates after an epoch, with their reputations."""
    audited = _readings_of(contributions, sortition.audits)
    members, candidates, firm = credited(
        [member for member in state.members if member.peer not in banned],
        [candidate for candidate in state.candidates if candidate.peer not in banned],
        fresh,
        audited,
        state.table,
    )
    presence = Presence(
        hardware={each.commit.peer: each.commit.hardware for each in contributions},
        lists={each.commit.peer: each.reveal.inclusion for each in contributions},
        compared=frozenset(cell.hardware for cell in firm),
        evading=frozenset(
            peer for peer, cells in sortition.audits.items() if firm & {*cells} and not audited.get(peer)
        ),
    )
    if restart:
        return found(members, presence, beacon, epoch), ()
    remaining, waiting = succeed(members, candidates, sortition, presence, beacon, epoch)
    return remaining, tuple(waiting)


def counts(state: State, contribution: Contribution) -> bool:
    """Return whether a contribution counts: of a known peer, or of a newcomer that states its hardware class."""
    commit = contribution.commit
    return commit.peer not in state.banned and (commit.peer in state.hardware or bool(commit.hardware))


def beacon_after(
    state: State, sortition: Sortition, contributions: Iterable[Contribution], epoch: int, *, restart: bool
) -> Digest:
    """Return the beacon after an epoch: of the nonces of the first of the committee, or of all that restart it.

    Of the former those count that are listed, by lists of peers that are listed themselves: what came too late for the
    lists could be left out, or withheld, at no cost.
    """
    reveals = {each.commit.peer: each.reveal for each in contributions}
    if restart:
        counted = {*state.peers()} & reveals.keys() or {*reveals}
    else:
        lists = {peer: reveals[peer].inclusion for peer in sortition.committee if peer in reveals}
        for _ in ("by any list", "by those of the listed"):
            listed = inclusion.listed(lists.values(), sortition.expected, len(sortition.committee))
            lists = {peer: each for peer, each in lists.items() if peer in listed}
        counted = listed & {*sortition.committee[:BEACON_NONCES]} & reveals.keys()
    return next_beacon(state.beacon, epoch, {peer: reveals[peer].nonce for peer in counted})


def _peer_of(contribution: Contribution) -> PeerId:
    return contribution.commit.peer


def _readings_of(
    contributions: Iterable[Contribution], cells: Mapping[PeerId, Sequence[Cell]]
) -> dict[PeerId, dict[Cell, int]]:
    """Return the readings of peers of the cells that were assigned to them; others do not count."""
    return {
        commit.peer: {cell: value for cell, value in reveal.readings if cell in cells[commit.peer]}
        for commit, reveal in contributions
        if commit.peer in cells
    }


def _fresh_readings(
    cells: Mapping[Cell, Sequence[PeerId]], contributions: Sequence[Contribution], epoch: int
) -> dict[Cell, CellReadings]:
    """Return the readings of each cell by the members that were assigned to it; others' readings do not count."""
    revealed = {commit.peer: dict(reveal.readings) for commit, reveal in contributions}
    fresh: dict[Cell, CellReadings] = {}
    for cell, peers in cells.items():
        readings = [PeerReading(peer, revealed[peer][cell]) for peer in sorted(peers) if cell in revealed.get(peer, {})]
        if readings:
            fresh[cell] = CellReadings(epoch, tuple(readings))
    return fresh


def _merge_readings(
    state: State, cells: Mapping[Cell, Sequence[PeerId]], fresh: Mapping[Cell, CellReadings], epoch: int
) -> dict[Cell, CellReadings]:
    """Return the readings of the assigned cells: the fresh ones, completed by earlier ones where they are too few.

    Otherwise one liar could empty a cell while the other peers are busy. A cell without any reading is entered as well,
    so that other cells get their turn.
    """
    needed = needed_support(len(state.members))
    merged: dict[Cell, CellReadings] = {}
    for cell in cells:
        now = {reading.peer: reading for reading in fresh[cell].readings} if cell in fresh else {}
        if len(now) < needed and cell in state.measured:
            for reading in state.measured[cell].readings:
                if len(now) < READINGS_PER_CELL:
                    now.setdefault(reading.peer, reading)
        merged[cell] = CellReadings(epoch, tuple(now[peer] for peer in sorted(now)))
    return merged


def _evict_oldest(measured: Mapping[Cell, CellReadings]) -> dict[Cell, CellReadings]:
    if len(measured) <= MAX_MEASURED:
        return dict(measured)
    newest = sorted(measured, key=lambda cell: (-measured[cell].epoch, cell))
    return {cell: measured[cell] for cell in newest[:MAX_MEASURED]}
