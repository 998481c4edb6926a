"""This node's copy of one chain: applies verified messages to the participant and the log, and proves equivocations."""

from collections.abc import Sequence
from typing import Final

import structlog

from node.consensus.environment import ConsensusRules
from node.consensus.message_log import MessageLog
from node.identity import Identity
from node.util.signal import Signal
from protocol.chains import StatePart, split_state
from protocol.consensus import SignedMessage, equivocator_of, sign_message
from protocol.consensus_values import Commit, EquivocationProof, Reveal, Signature, Statement
from protocol.errors import LocalProtocolError
from protocol.forms import Digest
from protocol.identity import PeerId
from selector.consensus.chain import Chain, InvalidStatement
from selector.consensus.participant import Participant
from selector.consensus.state import State

MAX_ORPHANS: Final = 256
"""Statements that wait for their parent."""

_logger = structlog.get_logger(__name__)


class ChainReplica:
    """The participant of one chain with the messages that it decided by."""

    def __init__(self, identity: Identity, rules: ConsensusRules, genesis: Digest) -> None:
        chain = Chain(genesis, rules.checkpoints)
        self.log = MessageLog()
        self.participant = Participant(identity.peer_id, chain, rules.clock, rules.plan)
        self.needs_sync = Signal()
        """Set when something is missing that only other peers have."""
        self._private_key = identity.private_key
        self._clock = rules.clock
        self._orphans: dict[Digest, Statement] = {}

    @property
    def chain(self) -> Chain:
        """The tree of statements."""
        return self.participant.chain

    def sign(self, body: Commit | Reveal | Statement | Signature | EquivocationProof) -> SignedMessage | None:
        """Return a signed message of our own; None where other peers would refuse it."""
        try:
            return sign_message(body, self._private_key)
        except LocalProtocolError as error:
            _logger.warning("could not sign a consensus message", kind=type(body).__name__, reason=str(error))
            return None

    def apply(self, message: SignedMessage, now_s: float) -> SignedMessage | None:
        """Apply a message that was received; return our proof where it completes an equivocation."""
        epoch = self._clock.epoch_at(now_s)
        entry = self.chain.entry(message.body.statement) if isinstance(message.body, Signature) else None
        if entry is not None and message.peer not in entry.committee:
            return None  # it does not count, and must not take the room of those that do
        rank = self._unknown_rank(message, epoch)
        # However many it has sent: else a peer could make room for contradictions.
        found = self.log.prove_equivocation(message)
        proof = self._accuse(message.peer, found, now_s) if found else None
        head = self.chain.head
        if not self.log.add(message, epoch, rank, head.id if message.epoch > head.epoch else None):
            return proof
        for evicted in self.log.evicted:
            if isinstance(evicted.body, Commit | Reveal):
                self.participant.forget(evicted.body)
        self.log.evicted.clear()
        match message.body:
            case Commit() as commit:
                self.participant.on_commit(commit, now_s)
            case Reveal() as reveal:
                self.participant.on_reveal(reveal, now_s)
            case Signature() as signature:
                self.chain.add_signature(signature)
            case Statement() as statement if statement.epoch <= epoch + 1:
                self.apply_statement(message, statement)
            case EquivocationProof():
                self._take_up_proofs(now_s)
            case _:
                pass
        if self.log.is_overfull:
            self.log.prune(epoch, self.chain.statement_ids() | self._orphans.keys(), self.participant.knows)
        return proof

    def hold(self, message: SignedMessage, now_s: float) -> None:
        """Hold a message of our own, for others to fetch: a proof only where others hold it, too, the rest always."""
        epoch = self._clock.epoch_at(now_s)
        is_proof = isinstance(message.body, EquivocationProof)
        self.log.add(message, epoch, self._unknown_rank(message, epoch) if is_proof else None)
        self._take_up_proofs(now_s)

    def apply_statement(self, message: SignedMessage, statement: Statement) -> None:
        """Add a statement to the chain, and the orphans that follow it; without its parent it becomes an orphan."""
        self.log.statements.setdefault(statement.id, message)
        waiting = [statement]
        while waiting:
            each = waiting.pop()
            if each.parent not in self.chain:
                if len(self._orphans) < MAX_ORPHANS:
                    self._orphans[each.id] = each
                self.needs_sync.set()
                continue
            self._orphans.pop(each.id, None)
            try:
                self.chain.add(each)
            except InvalidStatement as error:
                _logger.info("statement refused", epoch=each.epoch, proposer=each.proposer, reason=str(error))
                continue
            # Signatures may have arrived before their statement.
            for signed in self.log.signatures.get(each.id, {}).values():
                if isinstance(signed.body, Signature):
                    self.chain.add_signature(signed.body)
            waiting += [orphan for orphan in self._orphans.values() if orphan.parent == each.id]

    def prune(self, now_s: float) -> None:
        """Drop the messages of past epochs."""
        self.participant.prune(now_s)
        if self._orphans:
            _logger.debug("orphan statements dropped", epochs=sorted({each.epoch for each in self._orphans.values()}))
        self._orphans.clear()
        self.log.prune(self._clock.epoch_at(now_s), self.chain.statement_ids(), self.participant.knows)
        self._take_up_proofs(now_s)

    def locator(self) -> tuple[Digest, ...]:
        """Return statements of the canonical branch, newest first, in growing steps, and at last the genesis."""
        path = [entry.id for entry in self.chain.head.path()]
        steps, position = [], 0
        while position < len(path):
            steps.append(path[position])
            position += 1 if len(steps) < 8 else 1 << (len(steps) - 7)
        return (*dict.fromkeys((*steps, path[-1], self.chain.genesis)),)

    def is_state_missing(self) -> bool:
        """Return whether the state after the head is not known, so that another peer must send it."""
        return self.chain.head.statement is not None and self.participant.state() is None

    def adopt_state(self, parts: Sequence[StatePart]) -> bool:
        """Adopt the state after the head, in parts from any peer; return whether it is that."""
        statement = self.chain.head.statement
        return statement is not None and self.participant.adopt_state(join_state(parts, statement))

    def _unknown_rank(self, message: SignedMessage, epoch: int) -> Digest | None:
        """Return the rank of the peer that a message is of or, if it is a proof, against; None for a known one."""
        if isinstance(message.body, EquivocationProof):
            return self.participant.unknown_rank(equivocator_of(message.body), epoch)
        return self.participant.unknown_rank(message.peer, message.epoch)

    def _accuse(self, peer: PeerId, proof: EquivocationProof, now_s: float) -> SignedMessage | None:
        """Return a signed proof of equivocation; None where the peer is convicted already, or others hold no proof."""
        message = None if peer in self.log.equivocators else self.sign(proof)
        if message is None:
            return None
        epoch = self._clock.epoch_at(now_s)
        if not self.log.convict(peer, message, epoch, self.participant.unknown_rank(peer, epoch)):
            return None
        _logger.warning("equivocation proven", peer=peer)
        self._take_up_proofs(now_s)
        return message

    def _take_up_proofs(self, now_s: float) -> None:
        """Let the participant go by the proofs that are held, and by no others."""
        self.participant.on_equivocations(self.log.equivocators, now_s)
        for peer in self.participant.equivocators.keys() - self.log.equivocators.keys():
            del self.participant.equivocators[peer]


def state_parts(state: State) -> list[StatePart]:
    """Return a state in the parts in which it travels."""
    return list(split_state(state.members, state.candidates, sorted(state.measured.items()), state.banned))


def join_state(parts: Sequence[StatePart], statement: Statement) -> State:
    """Return the state after a statement from its parts, which any peer may have sent: its digest must be checked."""
    return State(
        statement.epoch,
        tuple(member for part in parts for member in part.members),
        tuple(candidate for part in parts for candidate in part.candidates),
        {cell: measured for part in parts for cell, measured in part.cells},
        tuple(peer for part in parts for peer in part.expelled),
        statement.beacon,
        statement.set_digest,
    )
