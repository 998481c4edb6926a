"""The message log is bounded, and unknown peers cannot take the room of members."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.consensus.message_log import MAX_OF_PEER, MAX_SPARE, MAX_UNKNOWN_EQUIVOCATORS, MAX_UNKNOWN_PEERS, MessageLog
from protocol.consensus import SignedMessage, equivocator_of, sign_message
from protocol.consensus_values import Commit, EquivocationProof, Reveal, Signature, digest_of
from protocol.identity import PeerId, peer_id_from_public_key
from protocol.limits import MAX_HAVE

CHAIN = bytes(32)


def key(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))


def peer(number: int) -> PeerId:
    return peer_id_from_public_key(key(number).public_key().public_bytes_raw())


def commit(number: int, epoch: int = 7, commitment: bytes = bytes(32)) -> SignedMessage:
    body = Commit(CHAIN, epoch, CHAIN, peer(number + 1), "two cores", commitment)
    return sign_message(body, key(number + 1))


def rank(number: int) -> bytes:
    return digest_of(number)


def test_strangers_cannot_crowd_out_members() -> None:
    log = MessageLog()
    bound = MAX_UNKNOWN_PEERS[Commit]
    for number in range(bound + 20):
        log.add(commit(number), 7, rank(number))
    assert len(log.recent()) == bound
    stranger, member = commit(5000), commit(5001)
    assert not log.add(stranger, 7, b"\xff" * 32)
    assert log.add(member, 7)
    assert member in log.recent().values()
    assert bound + 1 < MAX_HAVE


def test_of_too_many_strangers_all_peers_hold_the_same_in_whatever_order_they_come() -> None:
    one, other = MessageLog(), MessageLog()
    messages = [(commit(number), rank(number)) for number in range(MAX_UNKNOWN_PEERS[Commit] + 30)]
    for message, of in messages:
        one.add(message, 7, of)
    for message, of in reversed(messages):
        other.add(message, 7, of)
    assert one.digest() == other.digest()
    assert len(one.recent()) == MAX_UNKNOWN_PEERS[Commit]
    assert {each.id for each in one.evicted} | {each.id for each in other.evicted}
    assert not {each.id for each in one.evicted} & {each.id for each in one.recent().values()}
    last = max(messages, key=lambda pair: pair[1])[0]
    assert last not in one.recent().values()


def test_one_member_cannot_crowd_out_others() -> None:
    log = MessageLog()
    for number in range(600):
        body = Reveal(CHAIN, 7, peer(1), number.to_bytes(32, "big"), ())
        log.add(sign_message(body, key(1)), 7)
    assert len(log.recent()) == MAX_OF_PEER[Reveal]
    other = sign_message(Reveal(CHAIN, 7, peer(2), bytes(32), ()), key(2))
    assert log.add(other, 7)
    assert other in log.recent().values()


def test_digest_does_not_depend_on_the_order() -> None:
    one, other = MessageLog(), MessageLog()
    messages = [commit(number) for number in range(5)]
    for each in messages:
        one.add(each, 7)
    for each in reversed(messages):
        other.add(each, 7)
        other.add(each, 7)
    assert one.digest() == other.digest()
    assert MessageLog().digest() != one.digest()


def test_detects_equivocation_in_one_epoch_only() -> None:
    log = MessageLog()
    log.add(commit(1), 7)
    assert log.prove_equivocation(commit(1)) is None
    assert log.prove_equivocation(commit(1, epoch=8)) is None
    equivocation = log.prove_equivocation(commit(1, commitment=bytes([1]) * 32))
    assert equivocation is not None
    assert equivocator_of(equivocation) == peer(2)


def proof_against(number: int) -> SignedMessage:
    one, other = commit(number), commit(number, commitment=bytes([1]) * 32)
    return sign_message(EquivocationProof(CHAIN, one.envelope, other.envelope), key(9000))


def test_strangers_that_equivocate_leave_room_for_proofs_against_members() -> None:
    log = MessageLog()
    for number in range(MAX_UNKNOWN_EQUIVOCATORS + 5):
        log.add(proof_against(number), 7, rank(number))
    assert len(log.equivocators) == MAX_UNKNOWN_EQUIVOCATORS
    log.add(proof_against(5000), 7)
    log.add(proof_against(5001), 7, b"")
    assert {peer(5001), peer(5002)} <= log.equivocators.keys()
    assert len(log.equivocators) == MAX_UNKNOWN_EQUIVOCATORS + 1
    members = {peer(5001), peer(5002)}
    log.prune(9, (), members.__contains__)
    assert log.equivocators.keys() == members, "of a member, and of a stranger that became one"


def test_proof_against_a_peer_that_is_no_member_any_more_is_dropped_and_not_taken_again() -> None:
    log = MessageLog()
    log.add(proof_against(1), 7)
    log.prune(9, (), {peer(2)}.__contains__)
    assert log.equivocators.keys() == {peer(2)}
    log.prune(9, (), lambda _: False)
    assert not log.equivocators
    log.add(proof_against(1), 9, rank(1))  # from a peer that has not dropped it yet
    assert not log.equivocators
    log.add(proof_against(1), 9)  # a member again: all hold what convicts it
    assert log.equivocators.keys() == {peer(2)}


def test_member_cannot_fill_its_own_places_to_hide_what_it_sends_to_others() -> None:
    log, head = MessageLog(), digest_of("head")

    def reveal(number: int, inclusion: bytes = b"") -> SignedMessage:
        return sign_message(Reveal(CHAIN, 7, peer(1), number.to_bytes(32, "big"), (), inclusion), key(1))

    def commit_to(opening: SignedMessage, parent: bytes) -> SignedMessage:
        assert isinstance(opening.body, Reveal)
        return sign_message(Commit(CHAIN, 7, parent, peer(1), "two cores", opening.body.commitment), key(1))

    for number in range(9):
        log.add(commit_to(reveal(number), digest_of(number)), 7, head=head)
        log.add(reveal(100 + number), 7, head=head)  # opens nothing
    opening = reveal(1000)
    true = commit_to(opening, head)
    log.add(true, 7, head=head)
    log.add(opening, 7, head=head)
    assert {true.id, opening.id} <= {each.id for each in log.recent().values()}
    held = len(log.recent())
    for number in range(1, 9):  # of what counts a peer may sign one
        log.add(commit_to(reveal(number), head), 7, head=head)
        log.add(reveal(1000, inclusion=bytes([number])), 7, head=head)
    assert len(log.recent()) == held


def test_evidence_that_the_chain_does_not_need_any_more_is_pruned() -> None:
    """However many epochs ago it was pruned last."""
    log = MessageLog()
    statements = [digest_of(number) for number in range(3 * MAX_SPARE)]
    for statement in statements:
        log.add(sign_message(Signature(CHAIN, 7, peer(1), statement), key(1)), 700)
    log.prune(700, statements[:5], lambda _: False)
    assert [*log.signatures] == statements[:5] + statements[-MAX_SPARE:]
    log.prune(701, statements[-5:], lambda _: False)
    assert len(log.signatures) <= MAX_SPARE + 5


def test_prunes_past_epochs_but_not_needed_evidence() -> None:
    log = MessageLog()
    signature = sign_message(Signature(CHAIN, 7, peer(1), CHAIN), key(1))
    reveal = sign_message(Reveal(CHAIN, 7, peer(1), bytes(32), ()), key(1))
    for message in (signature, reveal, commit(0)):
        log.add(message, 7)
    log.prune(9, {CHAIN}, lambda _: False)
    assert not log.recent()
    assert log.signatures[CHAIN][signature.peer] == signature
