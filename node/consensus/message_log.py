"""The verified messages of one chain: those of recent epochs, and the statements and signatures that prove the branch.

Other peers get them from here, and need not trust us. Bounded by kind, epoch and peer; past epochs are pruned.
"""

import hashlib
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

from protocol.chains import SHORT_ID_BYTES
from protocol.consensus import SignedMessage, epoch_of_equivocation, equivocator_of, is_equivocation
from protocol.consensus_values import Commit, EquivocationProof, Reveal, Signature, Statement
from protocol.forms import Digest
from protocol.identity import PeerId
from protocol.limits import MAX_HAVE
from selector.consensus.participant import MAX_REVEALS

MAX_OF_PEER: Final = {Commit: 4, Reveal: 4, Statement: 3, Signature: 3}
"""Messages of one peer in one epoch that are held. An honest one sends one of each, and again after another head."""

MAX_NEEDED: Final = {Commit: 1, Reveal: MAX_REVEALS}
"""Of these so many as can count now: the commit after the head, and its reveals. They displace others of the same peer:
it cannot fill its own places for some with what opens nothing, and send its true contribution to the rest."""

MAX_OF_UNKNOWN_PEER: Final = 2
"""The same of a peer that is neither a member nor a candidate."""

MAX_UNKNOWN_PEERS: Final = {Commit: 192, Reveal: 192, Statement: 16, Signature: 192}
"""Peers that are neither members nor candidates, of which there are 336 at most, whose messages of one epoch are held.
Identities are free: however many unknown peers send messages, there is room for those of the others. Of too many those
of the lowest rank stay, so that all peers hold the same, and the order of arrival excludes none."""

MAX_UNKNOWN_EQUIVOCATORS: Final = 256
"""Unknown peers against which proofs of equivocation are held that came in one epoch; for those against members and
candidates there is always room."""

MAX_EVIDENCE: Final = 4096
"""Statements, more than a chain has, beyond which evidence is pruned at once: a peer may send old ones without end."""

MAX_SPARE: Final = 64
"""Of those that the chain does not have, the newest, whose envelopes and signatures outlive a pruning: signatures may
come before their statement. Others are given of the branch what is in the database."""

MAX_SIGNATURES: Final = 512
"""Signatures held of a statement, more than a committee has: the committee may not be known yet."""


class _Place(NamedTuple):
    """Where the few messages are held that one peer sends of one kind in one epoch."""

    epoch: int
    kind: type
    peer: PeerId


class MessageLog:
    """The messages of one chain."""

    def __init__(self) -> None:
        self.statements: dict[Digest, SignedMessage] = {}
        """By the statement's digest."""
        self.signatures: dict[Digest, dict[PeerId, SignedMessage]] = {}
        """By statement, then by signer."""
        self.equivocators: dict[PeerId, SignedMessage] = {}
        """The proof against each peer,"""
        self._offences: dict[PeerId, int] = {}
        """and the epoch of what it proves."""
        self._held: dict[_Place, dict[bytes, SignedMessage]] = {}
        """The messages of recent epochs, by id."""
        self._unknown: dict[tuple[int, type], dict[PeerId, bytes]] = {}
        """The ranks of unknown peers, by epoch and kind."""
        self.evicted: list[SignedMessage] = []
        """Commits, reveals and others that gave way since this was last cleared."""

    def add(
        self, message: SignedMessage, current_epoch: int, unknown_rank: bytes | None = None, head: Digest | None = None
    ) -> bool:
        """Add a message; return whether it may count: not if its peer has sent too many, or ranks behind too many.

        Old statements and signatures are accepted as evidence; all other messages only for the current epoch, the one
        before and the one after, because clocks differ. `unknown_rank`: of a peer that is neither a member nor a
        candidate; for a proof, of the one that it convicts. `head`: the statement that commits of this message's epoch
        are to follow, if there is none of that epoch yet.
        """
        body = message.body
        if isinstance(body, EquivocationProof):
            return self.convict(equivocator_of(body), message, current_epoch, unknown_rank)
        if abs(body.epoch - current_epoch) <= 1 and not self._hold(message, unknown_rank, head):
            return False
        if isinstance(body, Signature):
            held = self.signatures.setdefault(body.statement, {})
            if len(held) < MAX_SIGNATURES:
                held.setdefault(message.peer, message)
        return True

    def prove_equivocation(self, message: SignedMessage) -> EquivocationProof | None:
        """Return the proof of the equivocation that a message completes with one that is held."""
        for first in self._held.get(_place_of(message), {}).values():
            if is_equivocation(first, message):
                return EquivocationProof(first.body.chain, first.envelope, message.envelope)
        return None

    def convict(self, peer: PeerId, proof: SignedMessage, current_epoch: int, unknown_rank: bytes | None) -> bool:
        """Hold the proof against a peer; of too many against unknown ones, those of the lowest rank, as of messages.

        An old one says nothing of an unknown peer: others may have dropped it, and all are to agree on who may join.
        Return whether the peer is convicted.
        """
        assert isinstance(proof.body, EquivocationProof)
        if peer in self.equivocators:
            return True
        epoch = epoch_of_equivocation(proof.body)
        if unknown_rank is not None and abs(epoch - current_epoch) > 1:
            return False
        self.equivocators[peer] = proof
        self._offences[peer] = epoch
        if unknown_rank is not None:
            ranks = self._unknown.setdefault((current_epoch, EquivocationProof), {})
            ranks[peer] = unknown_rank
            if len(ranks) > MAX_UNKNOWN_EQUIVOCATORS:
                last = max(ranks, key=lambda each: ranks[each])
                del ranks[last]
                self._acquit(last)
        return peer in self.equivocators

    def _acquit(self, peer: PeerId) -> None:
        self.equivocators.pop(peer, None)
        self._offences.pop(peer, None)

    @property
    def is_overfull(self) -> bool:
        """Whether there is so much evidence that it must be pruned now."""
        return max(len(self.statements), len(self.signatures)) > MAX_EVIDENCE

    def _hold(self, message: SignedMessage, unknown_rank: bytes | None, head: Digest | None) -> bool:
        """Hold a message of a recent epoch; return whether there is a place for it."""
        place = _place_of(message)
        held = self._held.get(place, {})
        if message.id in held:
            return True
        if unknown_rank is not None and not self._admit(place, unknown_rank):
            return False
        most = MAX_OF_PEER[type(message.body)] if unknown_rank is None else MAX_OF_UNKNOWN_PEER
        if len(held) >= most:
            displaced = self._displaced_by(message, head)
            if displaced is None:
                return False
            self.evicted.append(held.pop(displaced))
        self._held.setdefault(place, {})[message.id] = message
        return True

    def _displaced_by(self, message: SignedMessage, head: Digest | None) -> bytes | None:
        """Return the id of what cannot count after the head and gives way to a message of the same peer that can."""
        purpose, needed = _purpose_of(message), {head}
        if isinstance(message.body, Reveal):
            commits = [each.body for each in self._held.get(_Place(message.epoch, Commit, message.peer), {}).values()]
            needed = {each.commitment for each in commits if isinstance(each, Commit) and each.parent == head}
        purposes = {key: _purpose_of(each) for key, each in self._held[_place_of(message)].items()}
        is_needed = purpose is not None and purpose in needed
        if not is_needed or [*purposes.values()].count(purpose) >= MAX_NEEDED[type(message.body)]:
            return None
        return next((key for key, each in purposes.items() if each not in needed), None)

    def _admit(self, place: _Place, rank: bytes) -> bool:
        """Note the rank of an unknown peer; of too many the last loses its places. Return whether this one has any."""
        ranks = self._unknown.setdefault((place.epoch, place.kind), {})
        ranks[place.peer] = rank
        if len(ranks) <= MAX_UNKNOWN_PEERS[place.kind]:
            return True
        last = max(ranks, key=lambda peer: ranks[peer])
        del ranks[last]
        self.evicted += self._held.pop(place._replace(peer=last), {}).values()
        return last != place.peer

    def prune(self, current_epoch: int, needed: Collection[Digest], knows: Callable[[PeerId], bool]) -> None:
        """Drop all but this epoch and its neighbours, and all but the newest evidence of statements not `needed`.

        `knows`: whether a peer is a member or a candidate by now, against whom an old proof stays.
        """
        for peer in [each for each, epoch in self._offences.items() if abs(epoch - current_epoch) > 1]:
            if not knows(peer):
                self._acquit(peer)
        self._held = {place: held for place, held in self._held.items() if abs(place.epoch - current_epoch) <= 1}
        self._unknown = {key: ranks for key, ranks in self._unknown.items() if abs(key[0] - current_epoch) <= 1}
        for evidence in (self.statements, self.signatures):
            for statement in [each for each in evidence if each not in needed][:-MAX_SPARE]:
                del evidence[statement]

    def recent(self) -> dict[bytes, SignedMessage]:
        """Return the messages of recent epochs by their short ids, ascending."""
        found = {key[:SHORT_ID_BYTES]: message for held in self._held.values() for key, message in held.items()}
        found |= {message.id[:SHORT_ID_BYTES]: message for message in self.equivocators.values()}
        return {key: found[key] for key in sorted(found)[:MAX_HAVE]}

    def digest(self) -> Digest:
        """Return the digest of the recent messages' short ids."""
        return hashlib.sha256(b"".join(self.recent())).digest()


def _place_of(message: SignedMessage) -> _Place:
    return _Place(message.epoch, type(message.body), message.peer)


def _purpose_of(message: SignedMessage) -> Digest | None:
    """Return the statement that a commit follows, or the commitment that a reveal opens; None for others."""
    match message.body:
        case Commit() as commit:
            return commit.parent
        case Reveal() as reveal:
            return reveal.commitment
        case _:
            return None
