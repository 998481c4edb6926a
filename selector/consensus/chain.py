"""Statements and signatures: which statements have their quorum, and which chain of them stands.

What is held is a growing set of statements and signatures; the head is a function of that set alone. Peers that hold
the same stand by the same, in whatever order they heard it.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from selector.consensus.sortition import beacon_of, draw_committee
from selector.consensus.values import Digest, Signature, Statement

GENESIS_EPOCH: Final = -1

FAULT_TOLERANT: Final = 4
"""Members from which on one of them may fail and the others still have a quorum."""

LAPSE_EPOCHS: Final = 12
SMALL_LAPSE_EPOCHS: Final = 2
"""After so many epochs without a statement a chain may be founded again by those who are left. A swarm too small to
bear the failure of one member does not wait long."""

KEPT: Final = 256
"""Statements between the root and the head; older ones are final, and branches from them are not looked at."""

MAX_CANDIDATES: Final = 512
"""Statements without a quorum that are remembered, and signatures of statements not heard yet."""


class InvalidStatement(ValueError):
    """A statement cannot follow from what it says that it follows from. The message says why."""


def quorum_of(committee_size: int) -> int:
    """Return how many of a committee make a quorum: more than two thirds."""
    return 2 * committee_size // 3 + 1


def has_lapsed(member_count: int, gap: int) -> bool:
    """Say whether a statement `gap` epochs after its parent founds the chain again: with members of its own alone."""
    lapse = LAPSE_EPOCHS if member_count >= FAULT_TOLERANT else SMALL_LAPSE_EPOCHS
    return not member_count or gap > lapse


@dataclass(eq=False)
class Link:
    """A statement in its place, and who signed it. The root has none: it is the genesis or what came before."""

    id: Digest
    epoch: int
    members: tuple[str, ...]
    parent: "Link | None" = None
    statement: Statement | None = None
    committee: tuple[str, ...] = ()
    signatures: set[str] = field(default_factory=set)
    children: list["Link"] = field(default_factory=list)

    @property
    def is_quorate(self) -> bool:
        """Whether enough of the committee have signed."""
        return self.parent is None or len(self.signatures) >= quorum_of(len(self.committee))

    def path(self) -> Iterator["Link"]:
        """Yield this link and those before it, back to the root."""
        link: Link | None = self
        while link is not None:
            yield link
            link = link.parent


class Chain:
    """A tree of statements, of which one branch stands."""

    def __init__(self, genesis: Digest, checkpoints: Collection[Digest] = ()) -> None:
        """Begin with nobody. `checkpoints`: a branch through one of these statements is stood by before any other."""
        self.genesis = genesis
        self.root = Link(genesis, GENESIS_EPOCH, ())
        self.head = self.root
        self._checkpoints = frozenset(checkpoints)
        self._links: dict[Digest, Link] = {genesis: self.root}
        self._early: dict[Digest, dict[str, Signature]] = {}

    def __contains__(self, statement: Digest) -> bool:
        return statement in self._links

    def link(self, statement: Digest) -> Link | None:
        """Return a statement in its place."""
        return self._links.get(statement)

    def statements(self) -> frozenset[Digest]:
        """Return the ids of all statements held, also of those without a quorum, which may find it yet."""
        return frozenset(self._links)

    def start_from(self, statement: Statement, members: Sequence[str]) -> None:
        """Trust a statement that was verified before, and what it makes of the members; forget what came before."""
        self.root = self.head = Link(statement.id, statement.epoch, tuple(sorted(members)), statement=statement)
        self._links = {statement.id: self.root}

    def add(self, statement: Statement) -> Link:
        """Take in a statement whose parent is here. Raises InvalidStatement; hearing it twice changes nothing."""
        if (known := self._links.get(statement.id)) is not None:
            return known
        parent = self._links.get(statement.parent)
        if parent is None:
            raise InvalidStatement("the statement before it is not known")
        link = _placed(statement, parent, self.genesis)
        self._make_room(link)
        self._links[link.id] = link
        parent.children.append(link)
        for signature in self._early.pop(link.id, {}).values():
            self._sign(link, signature)
        self._update()
        return link

    def sign(self, signature: Signature) -> None:
        """Take in a signature, whose maker was verified. One that does not count changes nothing."""
        link = self._links.get(signature.statement)
        if link is not None:
            self._sign(link, signature)
            self._update()
        elif len(self._early) < MAX_CANDIDATES:
            early = self._early.setdefault(signature.statement, {})
            if len(early) < MAX_CANDIDATES:
                early[signature.peer] = signature

    def candidates(self, epoch: int) -> list[Link]:
        """Return the statements of an epoch that follow the head, in the order of their proposers' turns."""
        links = [link for link in self.head.children if link.epoch == epoch]
        return sorted(links, key=lambda link: (link.committee.index(_proposer(link)), link.id))

    def standing(self) -> list[Link]:
        """Return the links from the first after the root to the head."""
        return list(self.head.path())[-2::-1]

    def quorate(self) -> list[Link]:
        """Return all links with a quorum except the root, parents before children."""
        found: list[Link] = []
        waiting = [self.root]
        while waiting:
            link = waiting.pop()
            children = [child for child in link.children if child.is_quorate]
            found += children
            waiting += children
        return found

    def forget_early(self) -> None:
        """Forget signatures of statements that never came."""
        self._early.clear()

    @staticmethod
    def _sign(link: Link, signature: Signature) -> None:
        if signature.epoch == link.epoch and signature.peer in link.committee:
            link.signatures.add(signature.peer)

    def _update(self) -> None:
        link = self.root
        while children := [child for child in link.children if child.is_quorate]:
            link = children[0] if len(children) == 1 else max(children, key=lambda child: self._rank(link, child))
        self.head = link
        path = list(link.path())
        if len(path) > 2 * KEPT:
            self._cut(path[KEPT])

    def _rank(self, link: Link, child: Link) -> tuple[bool, int, int, Digest]:
        """Return what decides between branches: the checkpoint, then the most signatures, then the digest.

        Signatures of the members at the fork come first: newcomers that one branch has made cannot outvote them.
        """
        signed: set[tuple[int, str]] = set()
        pinned = False
        waiting = [child]
        while waiting:
            each = waiting.pop()
            pinned |= each.id in self._checkpoints
            signed.update((each.epoch, peer) for peer in each.signatures)
            waiting += [later for later in each.children if later.is_quorate]
        members = set(link.members)
        established = sum(peer in members for _, peer in signed) if members else 0
        return pinned, established, len(signed), child.id

    def _cut(self, root: Link) -> None:
        """Make a later link the root; what does not follow from it is forgotten."""
        root.parent = None
        self.root = root
        kept = {root.id: root}
        waiting = [root]
        while waiting:
            link = waiting.pop()
            kept.update({child.id: child for child in link.children})
            waiting += link.children
        self._links = kept

    def _make_room(self, newcomer: Link) -> None:
        """Forget an old statement that found no quorum, where there are too many."""
        candidates = [link for link in self._links.values() if not link.is_quorate]
        if len(candidates) < MAX_CANDIDATES:
            return
        for link in sorted(candidates, key=lambda link: (link.epoch >= newcomer.epoch - 1, link.epoch, link.id)):
            if not link.children and link.parent is not None and link is not newcomer.parent:
                link.parent.children.remove(link)
                del self._links[link.id]
                return
        raise InvalidStatement("there are too many statements without a quorum")


def members_after(members: Sequence[str], epoch: int, statement: Statement) -> tuple[tuple[str, ...], bool]:
    """Return who are the members after a statement, and whether it founds the chain again.

    `members`, `epoch`: of the statement before it. Raises InvalidStatement.
    """
    if statement.epoch <= epoch:
        raise InvalidStatement(f"epoch {statement.epoch} does not come after {epoch}")
    founds = has_lapsed(len(members), statement.epoch - epoch)
    before = set() if founds else set(members)
    joined, gone = {*statement.joined}, {*statement.left, *statement.expelled}
    if joined & before or not {*statement.left} <= before or joined & gone:
        raise InvalidStatement("its list of members does not follow from the one before")
    if not (following := (before | joined) - gone):
        raise InvalidStatement("it leaves no members")
    return tuple(sorted(following)), founds


def _proposer(link: Link) -> str:
    assert link.statement is not None
    return link.statement.proposer


def _placed(statement: Statement, parent: Link, chain: Digest) -> Link:
    """Return a statement in its place after another. Raises InvalidStatement."""
    if statement.chain != chain:
        raise InvalidStatement("it belongs to another chain")
    members, founds = members_after(parent.members, parent.epoch, statement)
    signers = members if founds else parent.members
    committee = draw_committee(beacon_of(parent.id, statement.epoch), signers)
    if statement.proposer not in committee:
        raise InvalidStatement("its proposer is not of the committee")
    return Link(statement.id, statement.epoch, members, parent, statement, committee)
