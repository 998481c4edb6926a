"""A replica holds and proves the same as all others, whatever a hostile peer sends it first."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.consensus import message_log
from node.consensus.chain_replica import ChainReplica
from node.consensus.environment import ConsensusRules
from node.identity import Identity
from protocol.consensus import SignedMessage, sign_message
from protocol.consensus_values import Commit, EquivocationProof, Reveal, Signature, digest_of
from protocol.forms import Digest
from protocol.identity import PeerId, peer_id_from_public_key
from selector.consensus.participant import MAX_REVEALS
from tests.support.agreement import CLOCK, GENESIS, HARDWARE, PLAN
from tests.support.statements import founding_statement

EPOCH = 1000
NOW_S = CLOCK.starts_s(EPOCH) + 1


def key(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))


def peer(number: int) -> PeerId:
    return peer_id_from_public_key(key(number).public_key().public_bytes_raw())


def new_replica() -> ChainReplica:
    return ChainReplica(Identity(b"7" * 32), ConsensusRules(swarm=b"swarm", plan=PLAN, clock=CLOCK), GENESIS)


def conflicting_votes(number: int, epoch: int = EPOCH) -> tuple[SignedMessage, SignedMessage]:
    one, other = (Signature(GENESIS, epoch, peer(number), bytes([each]) * 32) for each in range(2))
    return sign_message(one, key(number)), sign_message(other, key(number))


def proof_against(number: int, epoch: int = EPOCH) -> SignedMessage:
    one, other = conflicting_votes(number, epoch)
    return sign_message(EquivocationProof(GENESIS, one.envelope, other.envelope), key(9000))


def test_old_equivocation_convicts_no_stranger() -> None:
    replica = new_replica()
    for message in (*conflicting_votes(1, EPOCH - 2), *conflicting_votes(2, EPOCH + 2), proof_against(3, EPOCH - 2)):
        assert replica.apply(message, NOW_S) is None
    replica.hold(proof_against(4, EPOCH - 2), NOW_S)  # our own, of before a restart
    assert not replica.log.equivocators
    assert not replica.participant.equivocators
    first, second = conflicting_votes(1)
    assert replica.apply(first, NOW_S) is None
    assert replica.apply(second, NOW_S) is not None
    assert replica.participant.equivocators.keys() == replica.log.equivocators.keys() == {peer(1)}


@pytest.mark.parametrize("is_received", [False, True], ids=["proven here", "received"])
def test_of_too_many_strangers_the_same_are_convicted_in_whatever_order(
    monkeypatch: pytest.MonkeyPatch, *, is_received: bool
) -> None:
    monkeypatch.setattr(message_log, "MAX_UNKNOWN_EQUIVOCATORS", 4)
    convicted = []
    numbers = range(1, 13)
    for order in (numbers, numbers[::-1]):
        replica, own = new_replica(), []
        for number in order:
            for message in [proof_against(number)] if is_received else conflicting_votes(number):
                own.append(replica.apply(message, NOW_S))
        for proof in own:
            if proof is not None:
                replica.hold(proof, NOW_S)
        assert replica.participant.equivocators.keys() == replica.log.equivocators.keys()
        convicted.append({*replica.log.equivocators})
    assert convicted[0] == convicted[1]
    assert len(convicted[0]) == 4


def reveal_of(number: int, nonce: int, inclusion: bytes = b"") -> SignedMessage:
    return sign_message(Reveal(GENESIS, EPOCH, peer(number), nonce.to_bytes(32, "big"), (), inclusion), key(number))


def commit_to(reveal: SignedMessage, parent: Digest = GENESIS, epoch: int = EPOCH) -> SignedMessage:
    assert isinstance(reveal.body, Reveal)
    number = next(each for each in range(10) if peer(each) == reveal.peer)
    return sign_message(Commit(GENESIS, epoch, parent, reveal.peer, HARDWARE, reveal.body.commitment), key(number))


def fill_places(replica: ChainReplica, number: int) -> None:
    """Send as many commits and reveals as are taken that count for nothing."""
    for nonce in range(100, 110):
        replica.apply(commit_to(reveal_of(number, nonce), digest_of(nonce)), NOW_S)
        replica.apply(reveal_of(number, nonce + 100), NOW_S)


def test_equivocation_is_proven_though_the_peer_has_filled_its_places() -> None:
    first, second = reveal_of(1, 1, b"\1"), reveal_of(1, 1, b"\2")
    for pair in ((commit_to(first), commit_to(reveal_of(1, 2))), (first, second)):
        replica = new_replica()
        fill_places(replica, 1)
        replica.apply(commit_to(first), NOW_S)
        replica.apply(pair[0], NOW_S)
        proof = replica.apply(pair[1], NOW_S)
        assert proof is not None
        assert proof.body == EquivocationProof(GENESIS, pair[0].envelope, pair[1].envelope)


def test_commit_that_came_before_its_time_is_taken_when_its_epoch_is_here() -> None:
    replica, commit = new_replica(), commit_to(reveal_of(1, 1))
    replica.apply(commit, CLOCK.starts_s(EPOCH - 3))
    fill_places(replica, 1)
    assert not replica.participant.unconfirmed(NOW_S)
    replica.apply(commit, NOW_S)
    assert replica.participant.unconfirmed(NOW_S) == [commit.body]
    assert commit in replica.log.recent().values()


def follow_founder(replica: ChainReplica, number: int) -> Digest:
    """Let a peer found the chain, so that it is its only member; return the head."""
    own = peer(number)
    statement = founding_statement(GENESIS, own, EPOCH - 1)
    for body in (statement, Signature(GENESIS, EPOCH - 1, own, statement.id)):
        replica.apply(sign_message(body, key(number)), NOW_S)
    assert replica.chain.head.id == statement.id
    return statement.id


@pytest.mark.parametrize("is_member", [False, True], ids=["newcomer", "member"])
def test_what_counts_displaces_what_does_not_and_a_peer_gets_no_more_places(*, is_member: bool) -> None:
    replica = new_replica()
    head = follow_founder(replica, 1) if is_member else GENESIS
    most = message_log.MAX_OF_PEER[Reveal] if is_member else message_log.MAX_OF_UNKNOWN_PEER
    reveals = [reveal_of(1, 1, bytes([number])) for number in range(1, 6)]
    commit = commit_to(reveals[0], head)
    fill_places(replica, 1)
    for message in (commit, *reveals):
        replica.apply(message, NOW_S)
    fill_places(replica, 1)
    held = [each for each in replica.log.recent().values() if each.epoch == EPOCH]
    assert {commit.id, *(each.id for each in reveals[:MAX_REVEALS])} <= {each.id for each in held}
    assert len([each for each in held if isinstance(each.body, Commit)]) == most
    assert len([each for each in held if isinstance(each.body, Reveal)]) == most
    assert replica.participant.unconfirmed(NOW_S) == [commit.body]


def test_what_gave_way_is_taken_again_once_it_counts() -> None:
    replica, early, late = new_replica(), reveal_of(2, 1), reveal_of(2, 2)
    head = follow_founder(new_replica(), 1)
    contribution = (commit_to(late, head), late)
    for message in contribution:
        replica.apply(message, NOW_S)
    fill_places(replica, 2)
    for message in (commit_to(early), early):
        replica.apply(message, NOW_S)
    assert replica.participant.unconfirmed(NOW_S) == [commit_to(early).body]
    follow_founder(replica, 1)
    assert not replica.participant.unconfirmed(NOW_S)
    for message in contribution:
        replica.apply(message, NOW_S)
    assert replica.participant.unconfirmed(NOW_S) == [commit_to(late, head).body]
    assert {*contribution} <= {*replica.log.recent().values()}


def test_contribution_to_an_epoch_that_has_its_statement_is_not_displaced() -> None:
    replica, opening = new_replica(), reveal_of(2, 1)
    commit = commit_to(opening, epoch=EPOCH - 1)
    replica.apply(commit, NOW_S)
    head = follow_founder(replica, 1)
    for nonce in range(2, 5):
        for parent in (digest_of(nonce), head):
            replica.apply(commit_to(reveal_of(2, nonce), parent, EPOCH - 1), NOW_S)
    assert commit in replica.log.recent().values()
