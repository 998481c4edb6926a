"""The verified messages of one chain: those of recent epochs, and the statements and signatures that prove the branch.

Other peers get them from here, and need not trust us. Bounded by kind, epoch and peer; past epochs are pruned.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection
from typing import Final

from protocol.chains import SHORT_ID_BYTES
from protocol.consensus import SignedMessage, epoch_of_equivocation, equivocator_of, is_equivocation
from protocol.consensus_values import Commit, EquivocationProof, Reveal, Signature, Statement
from protocol.forms import Digest
from protocol.identity import PeerId
from protocol.limits import MAX_HAVE

MAX_OF_PEER: Final = {Commit: 4, Reveal: 4, Statement: 3, Signature: 3}
"""Messages of one peer in one epoch that are held. An honest one sends one of each, and again after another head. What
this epoch needs is held beside them, so that a peer cannot fill its own places for some with what opens nothing."""

MAX_OF_UNKNOWN_PEER: Final = 2
"""The same of a peer that is neither a member nor a candidate."""

MAX_UNKNOWN_PEERS: Final = {Commit: 192, Reveal: 192, Statement: 16, Signature: 192}
"""Peers that are neither members nor candidates, of which there are 336 at most, whose messages of one epoch are held.
Identities are free: however many unknown peers send messages, there is room for those of the others. Of too many those
of the lowest rank stay, so that all peers hold the same, and the order of arrival excludes none."""

MAX_UNKNOWN_EQUIVOCATORS: Final = 256
"""Unknown peers against which proofs of equivocation are held that came in one epoch; for those against members and
candidates there is always room."""

MAX_EVIDENCE: Final = 2048
"""Statements whose envelopes and signatures are held, the newest ones."""

MAX_SIGNATURES: Final = 512
"""Signatures held of a statement, more than a committee has: the committee may not be known yet."""

MAX_UNIQUE: Final = 4 * MAX_HAVE
"""Messages that are remembered to prove equivocations."""


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
        self._recent: dict[bytes, SignedMessage] = {}
        self._unique: dict[tuple[object, ...], SignedMessage] = {}
        """The first message of which a peer may sign only one."""
        self._counts: Counter[tuple[int, type, PeerId]] = Counter()
        """By epoch, kind and peer."""
        self._unknown: dict[tuple[int, type], dict[PeerId, bytes]] = {}
        """The ranks of unknown peers, by epoch and kind."""
        self.evicted: list[SignedMessage] = []
        """Messages of unknown peers that gave way to others since this was last cleared."""

    def add(
        self, message: SignedMessage, current_epoch: int, unknown_rank: bytes | None = None, head: Digest | None = None
    ) -> EquivocationProof | None:
        """Add a message; return the proof of the equivocation that it completes.

        Old statements and signatures are accepted as evidence; all other messages only for the current epoch, the one
        before and the one after, because clocks differ. `unknown_rank`: of a peer that is neither a member nor a
        candidate; for a proof, of the one that it convicts. `head`: the statement that commits are to follow.
        """
        body = message.body
        if isinstance(body, EquivocationProof):
            self.convict(equivocator_of(body), message, current_epoch, unknown_rank)
            return None
        is_full = self.is_full(message, unknown_rank, head)
        proof = self._prove_equivocation(message)
        is_recent = abs(body.epoch - current_epoch) <= 1
        if is_recent and message.id not in self._recent and not is_full:
            self._recent[message.id] = message
            self._counts[body.epoch, type(body), message.peer] += 1
            if unknown_rank is not None:
                self._add_unknown(message, unknown_rank)
        if isinstance(body, Signature):
            held = self.signatures.setdefault(body.statement, {})
            if len(held) < MAX_SIGNATURES:
                held.setdefault(message.peer, message)
        return proof

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
        """Whether there is so much evidence that it must be pruned now: a peer may send old statements without end."""
        return max(len(self.statements), len(self.signatures)) > 2 * MAX_EVIDENCE

    def is_full(self, message: SignedMessage, unknown_rank: bytes | None = None, head: Digest | None = None) -> bool:
        """Return whether no more messages of this kind and epoch are accepted from this peer or rank."""
        body = message.body
        if isinstance(body, EquivocationProof):
            return False
        kind = type(body)
        most = MAX_OF_PEER[kind] if unknown_rank is None else MAX_OF_UNKNOWN_PEER
        if self._counts[body.epoch, kind, message.peer] >= most and not self._is_needed(message, head):
            return True
        ranks = self._unknown.get((body.epoch, kind), {})
        if unknown_rank is None or message.peer in ranks or len(ranks) < MAX_UNKNOWN_PEERS[kind]:
            return False
        return unknown_rank > max(ranks.values())

    def _is_needed(self, message: SignedMessage, head: Digest | None) -> bool:
        """Return whether it is the first commit of its peer after the head, or the first reveal of a commit held."""
        match message.body:
            case Commit() as commit:
                is_expected = commit.parent == head
            case Reveal() as reveal:
                is_expected = any(
                    isinstance(each.body, Commit)
                    and (each.peer, each.body.epoch, each.body.commitment)
                    == (message.peer, reveal.epoch, reveal.commitment)
                    for each in self._recent.values()
                )
            case _:
                return False
        return is_expected and _only_one_of(message) not in self._unique and len(self._unique) < MAX_UNIQUE

    def _add_unknown(self, message: SignedMessage, rank: bytes) -> None:
        """Note the rank of an unknown peer; evict the messages of the one with the highest, if there are too many."""
        kind = type(message.body)
        ranks = self._unknown.setdefault((message.epoch, kind), {})
        ranks[message.peer] = rank
        if len(ranks) <= MAX_UNKNOWN_PEERS[kind]:
            return
        last = max(ranks, key=lambda peer: ranks[peer])
        del ranks[last], self._counts[message.epoch, kind, last]
        of = (last, kind, message.epoch)
        gone = [each for each in self._recent.values() if (each.peer, type(each.body), each.epoch) == of]
        self.evicted += gone
        for each in gone:
            del self._recent[each.id]

    def prune(self, current_epoch: int, needed: Collection[Digest], knows: Callable[[PeerId], bool]) -> None:
        """Drop past epochs, and the oldest evidence of statements that are not `needed`.

        `knows`: whether a peer is a member or a candidate by now, against whom an old proof stays.
        """
        oldest = current_epoch - 1
        for peer in [each for each, epoch in self._offences.items() if abs(epoch - current_epoch) > 1]:
            if not knows(peer):
                self._acquit(peer)
        self._recent = {key: message for key, message in self._recent.items() if message.epoch >= oldest}
        self._unique = {key: message for key, message in self._unique.items() if message.epoch >= oldest}
        self._counts = Counter({key: count for key, count in self._counts.items() if key[0] >= oldest})
        self._unknown = {key: ranks for key, ranks in self._unknown.items() if key[0] >= oldest}
        for evidence in (self.statements, self.signatures):
            for statement in [each for each in evidence if each not in needed][: max(0, len(evidence) - MAX_EVIDENCE)]:
                del evidence[statement]

    def recent(self) -> dict[bytes, SignedMessage]:
        """Return the messages of recent epochs by their short ids, ascending."""
        found = {message.id[:SHORT_ID_BYTES]: message for message in self._recent.values()}
        found |= {message.id[:SHORT_ID_BYTES]: message for message in self.equivocators.values()}
        return {key: found[key] for key in sorted(found)[:MAX_HAVE]}

    def digest(self) -> Digest:
        """Return the digest of the recent messages' short ids."""
        return hashlib.sha256(b"".join(self.recent())).digest()

    def _prove_equivocation(self, message: SignedMessage) -> EquivocationProof | None:
        key = _only_one_of(message)
        if key is None:
            return None
        first = self._unique.get(key)
        if first is None:
            if len(self._unique) < MAX_UNIQUE:
                self._unique[key] = message
            return None
        return (
            EquivocationProof(first.body.chain, first.envelope, message.envelope)
            if is_equivocation(first, message)
            else None
        )


def _only_one_of(message: SignedMessage) -> tuple[object, ...] | None:
    """Return of what a peer may sign only one message; None for a kind that is not so."""
    match message.body:
        case Signature() as body:
            return message.peer, body.epoch
        case Commit() as body:
            return message.peer, body.epoch, body.parent
        case Reveal() as body:
            return message.peer, body.epoch, body.commitment
        case _:
            return None
