"""Between what was said on the wire and what the selector reckons with; neither knows the other."""

from collections.abc import Iterable, Iterator

from protocol.chains import CellState, MemberState, StatePart, split_state
from protocol.consensus import (
    CommitRecord,
    MeasuredCell,
    RevealRecord,
    Said,
    SignatureRecord,
    StatementRecord,
)
from protocol.identity import PeerId
from selector.consensus.reputation import Reputation
from selector.consensus.state import Member, State
from selector.consensus.table import Replica, Replicas
from selector.consensus.values import Cell, Commit, Digest, Reading, Reveal, Signature, Statement


def value_of(said: Said) -> Commit | Reveal | Statement | Signature | None:
    """Return what was said as the selector takes it; None for a proof of an equivocation."""
    match said.body:
        case CommitRecord() as body:
            return Commit(
                body.chain, body.epoch, body.parent, said.peer, body.hardware, body.commitment, body.observations
            )
        case RevealRecord() as body:
            readings = tuple(Reading(Cell(*reading[:3]), reading.value) for reading in body.readings)
            return Reveal(body.chain, body.epoch, said.peer, body.nonce, readings)
        case StatementRecord() as body:
            return Statement(
                chain=body.chain,
                epoch=body.epoch,
                parent=body.parent,
                proposer=said.peer,
                commits=body.commits,
                joined=body.joined,
                left=body.left,
                expelled=body.expelled,
                set_digest=body.set_digest,
                table_digest=body.table_digest,
                state_digest=body.state_digest,
            )
        case SignatureRecord() as body:
            return Signature(body.epoch, said.peer, body.statement)
        case _:
            return None


def record_of(
    value: Commit | Reveal | Statement | Signature, chain: Digest
) -> CommitRecord | RevealRecord | StatementRecord | SignatureRecord:
    """Return the record of a value of our own."""
    match value:
        case Commit():
            return CommitRecord(
                chain=chain,
                epoch=value.epoch,
                parent=value.parent,
                hardware=value.hardware,
                commitment=value.commitment,
                observations=value.observations,
            )
        case Reveal():
            readings = tuple(MeasuredCell(*reading.cell, reading.value) for reading in value.readings)
            return RevealRecord(chain=chain, epoch=value.epoch, nonce=value.nonce, readings=readings)
        case Statement():
            return StatementRecord(
                chain=chain,
                epoch=value.epoch,
                parent=value.parent,
                commits=value.commits,
                joined=_peers(value.joined),
                left=_peers(value.left),
                expelled=_peers(value.expelled),
                set_digest=value.set_digest,
                table_digest=value.table_digest,
                state_digest=value.state_digest,
            )
        case Signature():
            return SignatureRecord(chain=chain, epoch=value.epoch, statement=value.statement)


def parts_of(state: State) -> Iterator[StatePart]:
    """Yield a state as it travels."""
    return split_state(
        [
            MemberState(
                PeerId(member.peer),
                member.hardware,
                member.reputation.agreed,
                member.reputation.deviated,
                member.absences,
            )
            for member in state.members
        ],
        [
            CellState(*cell, measured.epoch, tuple((PeerId(peer), value) for peer, value in measured.replicas))
            for cell, measured in sorted(state.measured.items())
        ],
        _peers(state.expelled),
    )


def state_of(parts: Iterable[StatePart], statement: Statement) -> State:
    """Return the state after a statement, made of parts that may come from anybody: its digest tells whether it is."""
    members: list[Member] = []
    measured: dict[Cell, Replicas] = {}
    expelled: list[str] = []
    for part in parts:
        members += [
            Member(each.peer, each.hardware, Reputation(each.agreed, each.deviated), each.absences)
            for each in part.members
        ]
        for each in part.cells:
            replicas = tuple(Replica(peer, value) for peer, value in each.replicas)
            measured[Cell(each.hardware, each.workload, each.method)] = Replicas(each.epoch, replicas)
        expelled += part.expelled
    return State(statement.epoch, tuple(members), measured, tuple(expelled), statement.set_digest)


def _peers(peers: Iterable[str]) -> tuple[PeerId, ...]:
    return tuple(PeerId(peer) for peer in peers)
