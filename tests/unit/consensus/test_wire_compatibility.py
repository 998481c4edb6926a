"""Messages, digests and stored states are unchanged, byte for byte: all peers must compute the same."""

import hashlib

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.consensus.chain_replica import state_parts
from protocol.chains import encode_state
from protocol.consensus import Body, sign_message
from protocol.consensus_values import Cell, Commit, EquivocationProof, Reading, Reveal, Signature, Statement, genesis_of
from protocol.identity import PeerId, peer_id_from_public_key
from selector.consensus.sortition import MeasurementPlan
from selector.consensus.state import Contribution, State, conclude, initial_state

GENESIS = genesis_of(b"s", "m", "r")
PLAN = MeasurementPlan(("a", "b"), ("x", "y", "z"))
KEYS = {
    peer_id_from_public_key(key.public_key().public_bytes_raw()): key
    for key in (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, 6))
}
PEERS = sorted(KEYS)
RELEASED = "57f506395c95c3e196e0ed260d73db19b720bb48ff94d21970ec8913b286e3e4"
"""The sha256 of six epochs, as commit b371453 signs and stores them."""


def contribution(number: int, peer: PeerId, epoch: int, parent: bytes, cells: list[Cell]) -> Contribution:
    deviation = epoch * 900_000 if number == 2 else 0
    readings = (
        Reading(cell, number * 37 + len(cell.method + cell.workload) * 1000 + deviation) for cell in sorted(cells)
    )
    reveal = Reveal(GENESIS, epoch, peer, bytes([number]) * 32, tuple(readings))
    named = (bytes([number]) * 32,)
    return Contribution(Commit(GENESIS, epoch, parent, peer, f"hw{number % 2}", reveal.commitment, named), reveal)


def messages_of(epoch: int, statement: Statement) -> list[tuple[Body, PeerId]]:
    proposer, voter, accuser, *_ = PEERS
    votes = [Signature(GENESIS, epoch, voter, each) for each in (statement.id, GENESIS)]
    first, second = (sign_message(vote, KEYS[voter]).envelope for vote in votes)
    return [(statement, proposer), (votes[0], voter), (EquivocationProof(GENESIS, first, second), accuser)]


def test_six_epochs_are_keep_their_bytes() -> None:
    hashed = hashlib.sha256()
    state: State = initial_state(GENESIS)
    parent = GENESIS
    for epoch in range(6):
        assignments = state.assignments(parent, epoch, PLAN)
        contributions = [
            contribution(number, peer, epoch, parent, [cell for cell, peers in assignments.items() if peer in peers])
            for number, peer in enumerate(PEERS)
        ]
        statement, state = conclude(
            GENESIS,
            parent,
            state,
            epoch=epoch,
            proposer=PEERS[0],
            contributions=contributions,
            equivocators=[PEERS[4]] if epoch == 4 else [],
            plan=PLAN,
        )
        parent = statement.id
        bodies: list[tuple[Body, PeerId]] = [
            (each, peer) for pair, peer in zip(contributions, PEERS, strict=True) for each in pair
        ]
        for body, signer in (*bodies, *messages_of(epoch, statement)):
            hashed.update(sign_message(body, KEYS[signer]).envelope)
        hashed.update(encode_state(state_parts(state)))
    assert state.banned == (PEERS[4],)
    assert hashed.hexdigest() == RELEASED
