"""Consensus records come back as they went, no changed byte passes, and a proof convicts nobody but its offender."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.consensus import (
    MAX_CONTRIBUTIONS,
    MAX_EXPELLED,
    MAX_JOINED,
    MAX_LEFT,
    Body,
    CommitRecord,
    EquivocationRecord,
    MeasuredCell,
    RevealRecord,
    SignatureRecord,
    StatementRecord,
    offender_of,
    open_said,
    say,
)
from protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from protocol.identity import PeerId, peer_id_from_public_key

KEY, OTHER_KEY = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
CHAIN = bytes(32)

digests = st.binary(min_size=32, max_size=32)
epochs = st.integers(0, (1 << 32) - 1)
words = st.text("abc=|", min_size=1, max_size=8)
peers = st.binary(min_size=32, max_size=32).map(peer_id_from_public_key)


def ascending(values: st.SearchStrategy[bytes], max_size: int) -> st.SearchStrategy[tuple[bytes, ...]]:
    return st.sets(values, max_size=max_size).map(lambda found: tuple(sorted(found)))


several_peers = st.sets(peers, max_size=4).map(lambda found: tuple(sorted(found)))
commits = st.builds(
    CommitRecord,
    chain=digests,
    epoch=epochs,
    parent=digests,
    hardware=words,
    commitment=digests,
    observations=ascending(digests, 5),
)
readings = st.dictionaries(st.tuples(words, words, words), st.integers(-20_000_000, 20_000_000), max_size=8).map(
    lambda found: tuple(MeasuredCell(*cell, value) for cell, value in sorted(found.items()))
)
reveals = st.builds(RevealRecord, chain=digests, epoch=epochs, nonce=digests, readings=readings)
statements = st.builds(
    StatementRecord,
    chain=digests,
    epoch=epochs,
    parent=digests,
    commits=ascending(digests, 5),
    joined=several_peers,
    left=several_peers,
    expelled=several_peers,
    set_digest=digests,
    table_digest=digests,
    state_digest=digests,
)
signatures = st.builds(SignatureRecord, chain=digests, epoch=epochs, statement=digests)
bodies: st.SearchStrategy[Body] = st.one_of(commits, reveals, statements, signatures)


@given(bodies)
@settings(max_examples=60)
def test_what_is_said_is_what_is_heard(body: Body) -> None:
    said = say(body, KEY)
    assert said.body == body
    assert said.peer == peer_id_from_public_key(KEY.public_key().public_bytes_raw())
    assert open_said(said.envelope) == said


@given(bodies, st.data())
@settings(max_examples=100)
def test_no_changed_byte_passes(body: Body, data: st.DataObject) -> None:
    envelope = bytearray(say(body, KEY).envelope)
    envelope[data.draw(st.integers(0, len(envelope) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RemoteProtocolError):
        open_said(bytes(envelope))


@given(signatures, digests)
def test_two_signatures_in_an_epoch_convict_their_maker(one: SignatureRecord, statement: bytes) -> None:
    other = replace(one, statement=statement)
    proof = EquivocationRecord(chain=one.chain, first=say(one, KEY).envelope, second=say(other, KEY).envelope)
    if one == other:
        with pytest.raises(RemoteProtocolError):
            offender_of(proof)
    else:
        assert offender_of(proof) == say(one, KEY).peer
        assert open_said(say(proof, OTHER_KEY).envelope).body == proof


SIGNATURE = SignatureRecord(chain=CHAIN, epoch=3, statement=b"a" * 32)
COMMIT = CommitRecord(chain=CHAIN, epoch=3, parent=CHAIN, hardware="x", commitment=b"a" * 32)


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (replace(SIGNATURE, statement=b"b" * 32), OTHER_KEY),
        (replace(SIGNATURE, statement=b"b" * 32, epoch=4), KEY),
        (replace(SIGNATURE, statement=b"b" * 32, chain=b"c" * 32), KEY),
        (COMMIT, KEY),
    ],
    ids=["another peer", "another epoch", "another chain", "another kind"],
)
def test_nobody_is_convicted_of_what_is_allowed(other: Body, key: Ed25519PrivateKey) -> None:
    proof = EquivocationRecord(chain=CHAIN, first=say(SIGNATURE, KEY).envelope, second=say(other, key).envelope)
    with pytest.raises(LocalProtocolError):
        say(proof, KEY)


def test_two_commits_after_one_statement_convict_and_after_two_do_not() -> None:
    def convicts(other: CommitRecord) -> bool:
        proof = EquivocationRecord(chain=CHAIN, first=say(COMMIT, KEY).envelope, second=say(other, KEY).envelope)
        try:
            return offender_of(proof) == say(COMMIT, KEY).peer
        except RemoteProtocolError:
            return False

    assert convicts(replace(COMMIT, commitment=b"b" * 32))
    assert not convicts(replace(COMMIT, commitment=b"b" * 32, parent=b"p" * 32))


def numbered(count: int) -> tuple[bytes, ...]:
    return tuple(number.to_bytes(32) for number in range(count))


def numbered_peers(count: int) -> tuple[PeerId, ...]:
    return tuple(sorted(peer_id_from_public_key(key) for key in numbered(count)))


FULL = StatementRecord(
    chain=CHAIN,
    epoch=(1 << 32) - 1,
    parent=CHAIN,
    commits=numbered(MAX_CONTRIBUTIONS),
    joined=numbered_peers(MAX_JOINED),
    left=numbered_peers(MAX_LEFT),
    expelled=numbered_peers(MAX_EXPELLED),
    set_digest=CHAIN,
    table_digest=CHAIN,
    state_digest=CHAIN,
)


def test_the_largest_statement_is_one_record() -> None:
    assert open_said(say(FULL, KEY).envelope).body == FULL


@pytest.mark.parametrize(
    "body",
    [
        replace(FULL, commits=numbered(MAX_CONTRIBUTIONS + 1)),
        replace(FULL, joined=numbered_peers(MAX_JOINED + 1)),
        replace(FULL, commits=numbered(2)[::-1]),
        replace(FULL, commits=numbered(1) * 2),
        replace(FULL, epoch=1 << 32),
        replace(SIGNATURE, statement=b"short"),
        RevealRecord(chain=CHAIN, epoch=1, nonce=CHAIN, readings=(MeasuredCell("h", "w", "m", 20_000_001),)),
        RevealRecord(chain=CHAIN, epoch=1, nonce=CHAIN, readings=(MeasuredCell("h", "w", "m", 1),) * 2),
    ],
)
def test_what_breaks_a_bound_is_not_said(body: Body) -> None:
    with pytest.raises(ProtocolError):
        say(body, KEY)
