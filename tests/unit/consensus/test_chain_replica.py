"""A replica holds and proves the same as all others, whatever a hostile peer sends it first."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.consensus import message_log
from node.consensus.chain_replica import ChainReplica
from node.consensus.environment import ConsensusRules
from node.identity import Identity
from protocol.consensus import SignedMessage, sign_message
from protocol.consensus_values import EquivocationProof, Signature
from protocol.identity import PeerId, peer_id_from_public_key
from tests.support.agreement import CLOCK, GENESIS, PLAN

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
