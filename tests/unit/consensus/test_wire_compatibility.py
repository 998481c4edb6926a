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
RELEASED = "3938dc8de78c15b30fe5861e2aed44b0ddcdaa7b96dba096d47706b3fd822686"
"""The sha256 of six epochs as they are signed and stored since the rules `metaswarm/4`."""


def contribution(number: int, peer: PeerId, epoch: int, parent: bytes, cells: list[Cell]) -> Contribution:
    deviation = epoch * 900_000 if number == 2 else 0
    readings = (
        Reading(cell, number * 37 + len(cell.method + cell.workload) * 1000 + deviation) for cell in sorted(cells)
    )
    reveal = Reveal(GENESIS, epoch, peer, bytes([number]) * 32, tuple(readings), b"\x1f" if epoch else b"")
    named = (bytes([number]) * 32,)
    hardware = "" if epoch else f"hw{number % 2}"
    return Contribution(Commit(GENESIS, epoch, parent, peer, hardware, reveal.commitment, named), reveal)


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
        sortition = state.draw(epoch, PLAN)
        contributions = [
            contribution(number, peer, epoch, parent, [*sortition.cells_of(peer)]) for number, peer in enumerate(PEERS)
        ]
        statement, state = conclude(
            GENESIS,
            parent,
            state,
            sortition,
            epoch=epoch,
            proposer=PEERS[0],
            contributions=contributions,
            equivocators=[PEERS[4]] if epoch == 4 else [],
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
