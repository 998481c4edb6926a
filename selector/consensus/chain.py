"""The tree of statements, their quorums, and the fork choice: which branch is canonical.

The chain holds a growing set of statements and signatures, and its head is a function of that set and the epoch alone.
Peers that hold the same set have the same head, in whatever order they received it.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from protocol.consensus_values import Signature, Statement
from protocol.forms import Digest
from protocol.identity import PeerId
from selector.consensus import inclusion
from selector.consensus.sortition import beacon_of, select_committee

GENESIS_EPOCH: Final = -1

FAULT_TOLERANT: Final = 4
"""The smallest number of members that still has a quorum when one of them fails."""

STALL_EPOCHS: Final = 12
SMALL_STALL_EPOCHS: Final = 2
"""Epochs without a statement after which the contributors may restart the chain. A swarm too small to tolerate one
failure does not wait long."""

ABANDONED_EPOCHS: Final = 1008
"""A week of epochs without a statement, after which non-members may restart a chain: its own may be gone for good."""

RETAINED_ENTRIES: Final = 256
"""Entries between the root and the head. Older statements are final: branches from them are not considered."""

MAX_CANDIDATES: Final = 512
"""Statements without a quorum, those with one beside the canonical branch, and those with early signatures, that are
remembered."""


class InvalidStatement(ValueError):
    """A statement cannot follow from its parent. The message says why."""


def quorum_size(committee_size: int) -> int:
    """Return how many signatures of a committee are a quorum: more than two thirds."""
    return 2 * committee_size // 3 + 1


def is_stalled(member_count: int, gap: int) -> bool:
    """Return whether a statement `gap` epochs after its parent restarts the chain, with only its own members."""
    limit = STALL_EPOCHS if member_count >= FAULT_TOLERANT else SMALL_STALL_EPOCHS
    return not member_count or gap > limit


def restart_size(committee_size: int, gap: int) -> int:
    """Return how many of the committee of the former members at least restart a stalled chain.

    Half of them at first, fewer as time goes on: otherwise a single one could, while the others are cut off for a
    while.
    """
    limit = STALL_EPOCHS if committee_size >= FAULT_TOLERANT else SMALL_STALL_EPOCHS
    return max(1, math.ceil(committee_size * limit / (2 * gap)))


def is_abandoned(member_count: int, gap: int) -> bool:
    """Return whether non-members may restart a chain: one too small to tolerate a failure, or stalled for a week."""
    return is_stalled(member_count, gap) and (member_count < FAULT_TOLERANT or gap > ABANDONED_EPOCHS)


@dataclass(eq=False)
class ChainEntry:
    """A statement in its position, and its signers. The root is the genesis, without a statement, or a final one."""

    id: Digest
    epoch: int
    members: tuple[PeerId, ...]
    beacon: Digest
    parent: "ChainEntry | None" = None
    statement: Statement | None = None
    committee: tuple[PeerId, ...] = ()
    signers: set[PeerId] = field(default_factory=set)
    children: list["ChainEntry"] = field(default_factory=list)

    @property
    def has_quorum(self) -> bool:
        """Whether enough of the committee have signed."""
        return self.parent is None or len(self.signers) >= quorum_size(len(self.committee))

    def path(self) -> Iterator["ChainEntry"]:
        """Yield this entry and its ancestors, back to the root."""
        entry: ChainEntry | None = self
        while entry is not None:
            yield entry
            entry = entry.parent

    def count_signature(self, signature: Signature) -> None:
        """Count a vote of a member of the committee; ignore any other."""
        if signature.epoch == self.epoch and signature.peer in self.committee:
            self.signers.add(signature.peer)


class Chain:
    """A tree of statements with one canonical branch, which ends in `head`."""

    def __init__(self, genesis: Digest, checkpoints: Collection[Digest] = ()) -> None:
        """`checkpoints`: a branch through one of these statements is preferred to any other."""
        self.genesis = genesis
        self.root = ChainEntry(genesis, GENESIS_EPOCH, (), genesis)
        self.head = self.root
        self.latest_epoch: float = math.inf
        """Statements of later epochs are not followed."""
        self._checkpoints = frozenset(checkpoints)
        self._entries: dict[Digest, ChainEntry] = {genesis: self.root}
        self._early: dict[Digest, dict[PeerId, Signature]] = {}

    def __contains__(self, statement: Digest) -> bool:
        return statement in self._entries

    def entry(self, statement: Digest) -> ChainEntry | None:
        """Return the entry of a statement."""
        return self._entries.get(statement)

    def statement_ids(self) -> frozenset[Digest]:
        """Return the ids of all statements, including those without a quorum, which may still reach it."""
        return frozenset(self._entries)

    def start_from(self, statement: Statement, members: Sequence[PeerId]) -> None:
        """Make a statement that was verified before the root, with the members after it; drop everything else."""
        ordered = tuple(sorted(members))
        self.root = self.head = ChainEntry(
            statement.id, statement.epoch, ordered, statement.beacon, statement=statement
        )
        self._entries = {statement.id: self.root}

    def start_anew(self) -> None:
        """Drop everything but the genesis."""
        self.root = self.head = ChainEntry(self.genesis, GENESIS_EPOCH, (), self.genesis)
        self._entries = {self.genesis: self.root}

    def follow_until(self, epoch: int) -> None:
        """Do not follow statements of later epochs, which only a wrong clock can have signed, or ours is behind.

        They stay in the tree, in case it is ours.
        """
        if epoch != self.latest_epoch:
            self.latest_epoch = epoch
            self._choose_head()

    def add(self, statement: Statement) -> ChainEntry:
        """Add a statement whose parent is known; a known one changes nothing. Raises InvalidStatement."""
        if (known := self._entries.get(statement.id)) is not None:
            return known
        parent = self._entries.get(statement.parent)
        if parent is None:
            raise InvalidStatement("its parent is not known")
        entry = _entry_after(statement, parent, self.genesis)
        self._make_room(entry)
        self._entries[entry.id] = entry
        parent.children.append(entry)
        for signature in self._early.pop(entry.id, {}).values():
            entry.count_signature(signature)
        self._choose_head()
        return entry

    def add_signature(self, signature: Signature) -> None:
        """Add a verified signature, which may arrive before its statement. One that does not count changes nothing."""
        entry = self._entries.get(signature.statement)
        if entry is not None:
            entry.count_signature(signature)
            self._choose_head()
        elif len(self._early) < MAX_CANDIDATES:
            early = self._early.setdefault(signature.statement, {})
            if len(early) < MAX_CANDIDATES:
                early[signature.peer] = signature

    def candidates(self, epoch: int) -> list[ChainEntry]:
        """Return the statements of an epoch that follow the head, in the order of their proposers' turns."""
        entries = [entry for entry in self.head.children if entry.epoch == epoch]
        return sorted(entries, key=lambda entry: (entry.committee.index(_proposer(entry)), entry.id))

    def canonical(self) -> list[ChainEntry]:
        """Return the canonical branch, from the first entry after the root to the head."""
        return list(self.head.path())[-2::-1]

    def drop_early_signatures(self) -> None:
        """Drop the signatures of statements that never arrived."""
        self._early.clear()

    def _choose_head(self) -> None:
        """Apply the fork choice from the root on: follow the only child with a quorum, or that of the highest rank."""
        entry = self.root
        while children := self._followed(entry):
            entry = children[0] if len(children) == 1 else max(children, key=lambda child: self._rank(entry, child))
        self.head = entry
        path = list(entry.path())
        if len(path) > 2 * RETAINED_ENTRIES:
            self._prune_to(path[RETAINED_ENTRIES])

    def _followed(self, entry: ChainEntry) -> list[ChainEntry]:
        return [child for child in entry.children if child.has_quorum and child.epoch <= self.latest_epoch]

    def _rank(self, fork: ChainEntry, child: ChainEntry) -> tuple[bool, int, int, int, Digest]:
        """Return the rank of a branch in the fork choice: checkpoint, then signers, then signatures, then the digest.

        Those of the members at the fork come first, so that newcomers of one branch cannot outvote them. Signers come
        before signatures, so that a few members who restart the chain in secret cannot sign more often than the others.
        """
        signed: set[tuple[int, PeerId]] = set()
        pinned = False
        waiting = [child]
        while waiting:
            each = waiting.pop()
            pinned |= each.id in self._checkpoints
            signed.update((each.epoch, peer) for peer in each.signers)
            waiting += self._followed(each)
        members = set(fork.members)
        established = [peer for _, peer in signed if peer in members]
        return pinned, len({*established}), len(established), len(signed), child.id

    def _prune_to(self, root: ChainEntry) -> None:
        """Make a later entry the root; drop everything that does not descend from it."""
        root.parent = None
        self.root = root
        retained = {root.id: root}
        waiting = [root]
        while waiting:
            entry = waiting.pop()
            retained.update({child.id: child for child in entry.children})
            waiting += entry.children
        self._entries = retained

    def _make_room(self, newcomer: ChainEntry) -> None:
        """Evict an old statement without a quorum, or beside the canonical branch, where there are too many."""
        canonical = {entry.id for entry in self.head.path()}
        aside = [entry for entry in self._entries.values() if entry.id not in canonical]
        for candidates in (
            [each for each in aside if not each.has_quorum],
            [each for each in aside if each.has_quorum],
        ):
            if len(candidates) >= MAX_CANDIDATES:
                self._evict_one(candidates, newcomer)

    def _evict_one(self, candidates: Sequence[ChainEntry], newcomer: ChainEntry) -> None:
        """Evict the statement with the fewest signers, those of before first. Raises InvalidStatement."""

        def order(entry: ChainEntry) -> tuple[bool, int, int, Digest]:
            signers = len(entry.signers) if entry.has_quorum else 0
            return entry.epoch >= newcomer.epoch - 1, signers, entry.epoch, entry.id

        for entry in sorted(candidates, key=order):
            if not entry.children and entry.parent is not None and entry is not newcomer.parent:
                entry.parent.children.remove(entry)
                del self._entries[entry.id]
                return
        raise InvalidStatement("there are too many statements beside the canonical branch")


def restart_refused(members: Collection[PeerId], present: Collection[PeerId], drawn: Digest, gap: int) -> str | None:
    """Return why these peers cannot restart the chain of some members that stalled, None where they can.

    `drawn`: what the last beacon draws for the epoch.
    """
    if is_abandoned(len(members), gap):
        return None
    if not {*present} <= {*members}:
        return "non-members restart the chain"
    committee = select_committee(drawn, members)
    if len({*committee} & {*present}) < restart_size(len(committee), gap):
        return "too few of its members restart the chain"
    return None


def members_after(
    members: Sequence[PeerId], epoch: int, beacon: Digest, statement: Statement
) -> tuple[tuple[PeerId, ...], bool]:
    """Return the members after a statement, and whether it restarts the chain.

    `members`, `epoch`, `beacon`: of its parent. Raises InvalidStatement.
    """
    if statement.epoch <= epoch:
        raise InvalidStatement(f"epoch {statement.epoch} does not come after {epoch}")
    restart = is_stalled(len(members), statement.epoch - epoch)
    if statement.remaining and not restart:
        raise InvalidStatement("it restarts a chain that has not stalled")
    before = set() if restart else set(members)
    joined, gone = {*statement.joined}, {*statement.left, *statement.expelled}
    if statement.remaining:
        try:
            joined = inclusion.unpack(statement.remaining, members)
        except ValueError as error:
            raise InvalidStatement(f"its list of remaining members is not valid: {error}") from None
    if joined & before or not {*statement.left} <= before or joined & gone:
        raise InvalidStatement("its list of members does not follow from the one before")
    if restart and members:
        drawn = beacon_of(beacon, statement.epoch)
        if reason := restart_refused(members, joined, drawn, statement.epoch - epoch):
            raise InvalidStatement(reason)
    if not (following := (before | joined) - gone):
        raise InvalidStatement("it leaves no members")
    return tuple(sorted(following)), restart


def _proposer(entry: ChainEntry) -> PeerId:
    assert entry.statement is not None
    return entry.statement.proposer


def _entry_after(statement: Statement, parent: ChainEntry, chain: Digest) -> ChainEntry:
    """Return the entry of a statement after its parent. Raises InvalidStatement."""
    if statement.chain != chain:
        raise InvalidStatement("it belongs to another chain")
    members, restart = members_after(parent.members, parent.epoch, parent.beacon, statement)
    voters = members if restart else parent.members
    committee = select_committee(beacon_of(parent.beacon, statement.epoch), voters)
    if statement.proposer not in committee:
        raise InvalidStatement("its proposer is not in the committee")
    return ChainEntry(statement.id, statement.epoch, members, statement.beacon, parent, statement, committee)
