"""What is held of an epoch is bounded, and strangers cannot take the room of members."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.consensus.message_log import MAX_OF_OTHERS, MessageLog
from protocol.consensus import CommitRecord, RevealRecord, Said, SignatureRecord, say
from protocol.limits import MAX_HAVE

CHAIN = bytes(32)


def key(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))


def commit(number: int, epoch: int = 7, commitment: bytes = bytes(32)) -> Said:
    body = CommitRecord(chain=CHAIN, epoch=epoch, parent=CHAIN, hardware="two cores", commitment=commitment)
    return say(body, key(number + 1))


def test_however_many_strangers_speak_members_are_heard() -> None:
    minutes = MessageLog()
    bound = MAX_OF_OTHERS[CommitRecord]
    for number in range(bound + 20):
        minutes.add(commit(number), 7, is_member=False)
    assert len(minutes.recent()) == bound
    stranger, member = commit(5000), commit(5001)
    assert minutes.is_full(stranger, is_member=False)
    assert not minutes.is_full(member, is_member=True)
    minutes.add(member, 7, is_member=True)
    assert member in minutes.recent().values()
    assert bound + 1 < MAX_HAVE


def test_the_same_records_have_the_same_digest_in_whatever_order_they_came() -> None:
    one, other = MessageLog(), MessageLog()
    said = [commit(number) for number in range(5)]
    for each in said:
        one.add(each, 7)
    for each in reversed(said):
        other.add(each, 7)
        other.add(each, 7)
    assert one.digest() == other.digest()
    assert MessageLog().digest() != one.digest()


def test_who_says_two_things_is_found_out_and_other_epochs_are_not_held_against_it() -> None:
    minutes = MessageLog()
    assert minutes.add(commit(1), 7) is None
    assert minutes.add(commit(1), 7) is None
    assert minutes.add(commit(1, epoch=8), 7) is None
    contradiction = minutes.add(commit(1, commitment=bytes([1]) * 32), 7)
    assert contradiction is not None
    assert contradiction.first == commit(1)


def test_epochs_that_are_over_are_forgotten_but_not_the_evidence_that_is_needed() -> None:
    minutes = MessageLog()
    signature = say(SignatureRecord(chain=CHAIN, epoch=7, statement=CHAIN), key(1))
    reveal = say(RevealRecord(chain=CHAIN, epoch=7, nonce=bytes(32), readings=()), key(1))
    for said in (signature, reveal, commit(0)):
        minutes.add(said, 7)
    minutes.prune(9, {CHAIN})
    assert not minutes.recent()
    assert minutes.signatures[CHAIN][signature.peer] == signature
