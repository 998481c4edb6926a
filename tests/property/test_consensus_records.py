"""Consensus messages survive the round trip, tampering is detected, and proofs convict equivocators only."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.consensus import Body, equivocator_of, sign_message, verify_message
from protocol.consensus_values import (
    MAX_CONTRIBUTIONS,
    MAX_EXPELLED,
    MAX_JOINED,
    MAX_LEFT,
    MAX_REMAINING_BYTES,
    Cell,
    Commit,
    EquivocationProof,
    Reading,
    Reveal,
    Signature,
    Statement,
)
from protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from protocol.identity import PeerId, peer_id_from_public_key

KEY, OTHER_KEY = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
PEER, OTHER_PEER = (peer_id_from_public_key(key.public_key().public_bytes_raw()) for key in (KEY, OTHER_KEY))
CHAIN = bytes(32)

digests = st.binary(min_size=32, max_size=32)
epochs = st.integers(0, (1 << 32) - 1)
words = st.text("abc=|", min_size=1, max_size=8)
peers = st.binary(min_size=32, max_size=32).map(peer_id_from_public_key)


def ascending(values: st.SearchStrategy[bytes], max_size: int) -> st.SearchStrategy[tuple[bytes, ...]]:
    return st.sets(values, max_size=max_size).map(lambda found: tuple(sorted(found)))


several_peers = st.sets(peers, max_size=4).map(lambda found: tuple(sorted(found)))
commits = st.builds(
    Commit,
    chain=digests,
    epoch=epochs,
    parent=digests,
    peer=st.just(PEER),
    hardware=words,
    commitment=digests,
    observations=ascending(digests, 5),
)
readings = st.dictionaries(st.tuples(words, words, words), st.integers(-20_000_000, 20_000_000), max_size=8).map(
    lambda found: tuple(Reading(Cell(*cell), value) for cell, value in sorted(found.items()))
)
reveals = st.builds(
    Reveal,
    chain=digests,
    epoch=epochs,
    peer=st.just(PEER),
    nonce=digests,
    readings=readings,
    inclusion=st.binary(max_size=48),
)
statements = st.builds(
    Statement,
    chain=digests,
    epoch=epochs,
    parent=digests,
    proposer=st.just(PEER),
    commits=ascending(digests, 5),
    joined=several_peers,
    left=several_peers,
    expelled=several_peers,
    beacon=digests,
    set_digest=digests,
    table_digest=digests,
    state_digest=digests,
)
signatures = st.builds(Signature, chain=digests, epoch=epochs, peer=st.just(PEER), statement=digests)
bodies: st.SearchStrategy[Body] = st.one_of(commits, reveals, statements, signatures)


@given(bodies)
@settings(max_examples=60)
def test_message_survives_the_round_trip(body: Body) -> None:
    message = sign_message(body, KEY)
    assert message.body == body
    assert message.peer == PEER
    assert verify_message(message.envelope) == message


@given(bodies, st.data())
@settings(max_examples=100)
def test_tampered_envelope_is_refused(body: Body, data: st.DataObject) -> None:
    envelope = bytearray(sign_message(body, KEY).envelope)
    envelope[data.draw(st.integers(0, len(envelope) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RemoteProtocolError):
        verify_message(bytes(envelope))


@given(signatures, digests)
def test_two_votes_in_an_epoch_prove_equivocation(one: Signature, statement: bytes) -> None:
    other = replace(one, statement=statement)
    proof = EquivocationProof(one.chain, sign_message(one, KEY).envelope, sign_message(other, KEY).envelope)
    if one == other:
        with pytest.raises(RemoteProtocolError):
            equivocator_of(proof)
    else:
        assert equivocator_of(proof) == sign_message(one, KEY).peer
        assert verify_message(sign_message(proof, OTHER_KEY).envelope).body == proof


SIGNATURE = Signature(chain=CHAIN, epoch=3, peer=PEER, statement=b"a" * 32)
COMMIT = Commit(chain=CHAIN, epoch=3, parent=CHAIN, peer=PEER, hardware="x", commitment=b"a" * 32)


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (replace(SIGNATURE, statement=b"b" * 32, peer=OTHER_PEER), OTHER_KEY),
        (replace(SIGNATURE, statement=b"b" * 32, epoch=4), KEY),
        (replace(SIGNATURE, statement=b"b" * 32, chain=b"c" * 32), KEY),
        (COMMIT, KEY),
    ],
    ids=["another peer", "another epoch", "another chain", "another kind"],
)
def test_proof_of_allowed_messages_is_refused(other: Body, key: Ed25519PrivateKey) -> None:
    proof = EquivocationProof(CHAIN, sign_message(SIGNATURE, KEY).envelope, sign_message(other, key).envelope)
    with pytest.raises(LocalProtocolError):
        sign_message(proof, KEY)


def test_two_commits_after_one_statement_prove_equivocation() -> None:
    def convicts(other: Commit) -> bool:
        proof = EquivocationProof(CHAIN, sign_message(COMMIT, KEY).envelope, sign_message(other, KEY).envelope)
        try:
            return equivocator_of(proof) == sign_message(COMMIT, KEY).peer
        except RemoteProtocolError:
            return False

    assert convicts(replace(COMMIT, commitment=b"b" * 32))
    assert not convicts(replace(COMMIT, commitment=b"b" * 32, parent=b"p" * 32))


def numbered(count: int) -> tuple[bytes, ...]:
    return tuple(number.to_bytes(32) for number in range(count))


def numbered_peers(count: int) -> tuple[PeerId, ...]:
    return tuple(sorted(peer_id_from_public_key(key) for key in numbered(count)))


FULL = Statement(
    chain=CHAIN,
    epoch=(1 << 32) - 1,
    parent=CHAIN,
    proposer=PEER,
    commits=numbered(MAX_CONTRIBUTIONS),
    joined=numbered_peers(MAX_JOINED),
    left=numbered_peers(MAX_LEFT),
    expelled=numbered_peers(MAX_EXPELLED),
    beacon=CHAIN,
    set_digest=CHAIN,
    table_digest=CHAIN,
    state_digest=CHAIN,
)


RESTART = replace(FULL, joined=(), left=(), remaining=b"\xff" * MAX_REMAINING_BYTES)


@pytest.mark.parametrize("body", [FULL, RESTART])
def test_largest_statement_fits_into_one_record(body: Statement) -> None:
    assert verify_message(sign_message(body, KEY).envelope).body == body


@pytest.mark.parametrize(
    "body",
    [
        replace(FULL, commits=numbered(MAX_CONTRIBUTIONS + 1)),
        replace(FULL, joined=numbered_peers(MAX_JOINED + 1)),
        replace(RESTART, remaining=bytes(MAX_REMAINING_BYTES + 1)),
        replace(RESTART, joined=numbered_peers(1)),
        replace(FULL, commits=numbered(2)[::-1]),
        replace(FULL, commits=numbered(1) * 2),
        replace(FULL, epoch=1 << 32),
        replace(SIGNATURE, statement=b"short"),
        replace(SIGNATURE, peer=OTHER_PEER),
        Reveal(CHAIN, 1, PEER, CHAIN, (Reading(Cell("h", "w", "m"), 20_000_001),)),
        Reveal(CHAIN, 1, PEER, CHAIN, (Reading(Cell("h", "w", "m"), 1),) * 2),
    ],
)
def test_message_out_of_bounds_is_not_signed(body: Body) -> None:
    with pytest.raises(ProtocolError):
        sign_message(body, KEY)
