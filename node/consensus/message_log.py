"""The verified messages of one chain: those of recent epochs, and the statements and signatures that prove the branch.

Other peers get them from here, and need not trust us. Bounded by kind, epoch and peer; past epochs are pruned.
"""

import hashlib
from collections import Counter
from collections.abc import Collection
from typing import Final

from protocol.chains import SHORT_ID_BYTES
from protocol.consensus import SignedMessage, equivocator_of, is_equivocation
from protocol.consensus_values import Commit, EquivocationProof, Reveal, Signature, Statement
from protocol.forms import Digest
from protocol.identity import PeerId
from protocol.limits import MAX_HAVE

MAX_OF_PEER: Final = {Commit: 4, Reveal: 4, Statement: 3, Signature: 3}
"""Messages of one peer in one epoch that are held. An honest one sends one of each, and again after another head."""

MAX_OF_UNKNOWN_PEERS: Final = {Commit: 192, Reveal: 192, Statement: 16, Signature: 192}
"""Messages of all peers in one epoch that are neither members nor candidates, of which there are 336 at most.
Identities are free: however many unknown peers send messages, there is room for those of the others."""

MAX_EQUIVOCATORS: Final = 256

MAX_EVIDENCE: Final = 2048
"""Statements whose envelopes and signatures are held, the newest ones."""

MAX_SIGNATURES: Final = 512
"""Signatures held of a statement, more than a committee has: the committee may not be known yet."""


class MessageLog:
    """The messages of one chain."""

    def __init__(self) -> None:
        self.statements: dict[Digest, SignedMessage] = {}
        """By the statement's digest."""
        self.signatures: dict[Digest, dict[PeerId, SignedMessage]] = {}
        """By statement, then by signer."""
        self.equivocators: dict[PeerId, SignedMessage] = {}
        """The proof against each peer."""
        self._recent: dict[bytes, SignedMessage] = {}
        self._unique: dict[tuple[object, ...], SignedMessage] = {}
        """The first message of which a peer may sign only one."""
        self._counts: Counter[tuple[int, type, PeerId | None]] = Counter()
        """By epoch, kind and peer; None for all unknown peers."""

    def add(self, message: SignedMessage, current_epoch: int, *, is_known: bool = True) -> EquivocationProof | None:
        """Add a message; return the proof of the equivocation that it completes.

        Old statements and signatures are accepted as evidence; all other messages only for the current epoch, the one
        before and the one after, because clocks differ. `is_known`: whether a member or a candidate sent it.
        """
        body = message.body
        if isinstance(body, EquivocationProof):
            if len(self.equivocators) < MAX_EQUIVOCATORS:
                self.equivocators.setdefault(equivocator_of(body), message)
            return None
        proof = self._prove_equivocation(message)
        is_recent = abs(body.epoch - current_epoch) <= 1
        if is_recent and message.id not in self._recent and not self.is_full(message, is_known=is_known):
            self._recent[message.id] = message
            self._counts[body.epoch, type(body), message.peer] += 1
            if not is_known:
                self._counts[body.epoch, type(body), None] += 1
        if isinstance(body, Signature):
            held = self.signatures.setdefault(body.statement, {})
            if len(held) < MAX_SIGNATURES:
                held.setdefault(message.peer, message)
        return proof

    @property
    def is_overfull(self) -> bool:
        """Whether there is so much evidence that it must be pruned now: a peer may send old statements without end."""
        return max(len(self.statements), len(self.signatures)) > 2 * MAX_EVIDENCE

    def is_full(self, message: SignedMessage, *, is_known: bool) -> bool:
        """Return whether no more messages of this kind and epoch are accepted from this peer, or from unknown peers."""
        body = message.body
        if isinstance(body, EquivocationProof):
            return len(self.equivocators) >= MAX_EQUIVOCATORS
        kind = type(body)
        if self._counts[body.epoch, kind, message.peer] >= MAX_OF_PEER[kind]:
            return True
        return not is_known and self._counts[body.epoch, kind, None] >= MAX_OF_UNKNOWN_PEERS[kind]

    def prune(self, current_epoch: int, needed: Collection[Digest]) -> None:
        """Drop past epochs, and the oldest evidence of statements that are not `needed`."""
        oldest = current_epoch - 1
        self._recent = {key: message for key, message in self._recent.items() if message.epoch >= oldest}
        self._unique = {key: message for key, message in self._unique.items() if message.epoch >= oldest}
        self._counts = Counter({key: count for key, count in self._counts.items() if key[0] >= oldest})
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
        match message.body:
            case Signature() as body:
                key: tuple[object, ...] = (message.peer, body.epoch)
            case Commit() as body:
                key = (message.peer, body.epoch, body.parent)
            case Reveal() as body:
                key = (message.peer, body.epoch, body.commitment)
            case _:
                return None
        first = self._unique.get(key)
        if first is None:
            if len(self._unique) < 4 * MAX_HAVE:
                self._unique[key] = message
            return None
        return (
            EquivocationProof(first.body.chain, first.envelope, message.envelope)
            if is_equivocation(first, message)
            else None
        )
