"""The signed messages of the consensus: commits, reveals, statements, signatures and proofs of equivocation.

They travel in the envelope of all records (`protocol.records`), do not expire, and belong to one chain and one epoch.
A message is one of `protocol.consensus_values` without its signer, which the envelope names.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from itertools import pairwise
from typing import Any, Final, NamedTuple, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.canonical import decode_canonical
from protocol.consensus_values import (
    MAX_COMMITTED,
    MAX_CONTRIBUTIONS,
    MAX_EPOCH,
    MAX_EXPELLED,
    MAX_JOINED,
    MAX_LEFT,
    MAX_READING,
    MAX_READINGS,
    NONCE_BYTES,
    Cell,
    Commit,
    EquivocationProof,
    Reading,
    Reveal,
    Signature,
    Statement,
)
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.fields import SHA256_BYTES, Fields, array, integer, name, peer_id, raw, tuple_of
from protocol.identity import PeerId, peer_id_from_public_key, public_key_of
from protocol.limits import MAX_HARDWARE_BYTES, MAX_NAME_BYTES, MAX_RECORD_BYTES
from protocol.records import open_envelope, sign

CONSENSUS_TOPIC: Final = "metaswarm/1/consensus"
"""The gossip topic of all these messages, in batches of envelopes as `protocol.history` encodes them."""

Body: TypeAlias = Commit | Reveal | Statement | Signature | EquivocationProof

KINDS: Final[Mapping[str, type[Body]]] = {
    "commit": Commit,
    "reveal": Reveal,
    "statement": Statement,
    "signature": Signature,
    "equivocation": EquivocationProof,
}
_KIND_OF: Final = {body_type: kind for kind, body_type in KINDS.items()}


class SignedMessage(NamedTuple):
    """A message whose signature was verified: the signer, the content, and the envelope that proves both."""

    peer: PeerId
    body: Body
    envelope: bytes

    @property
    def id(self) -> bytes:
        """The sha256 of the envelope, by which peers name the message to each other."""
        return hashlib.sha256(self.envelope).digest()

    @property
    def epoch(self) -> int:
        """The epoch of the message; -1 for a proof of equivocation, which belongs to none."""
        return -1 if isinstance(self.body, EquivocationProof) else self.body.epoch


def sign_message(body: Body, private_key: Ed25519PrivateKey) -> SignedMessage:
    """Return the signed message. Raises LocalProtocolError for one that other peers would refuse."""
    kind = _KIND_OF[type(body)]
    payload = {field: _FORMS[field].dump(getattr(body, field)) for field in _FIELDS[kind]}
    envelope = sign(kind, payload, private_key)
    try:
        message = verify_message(envelope)
    except RemoteProtocolError as error:
        raise LocalProtocolError(str(error)) from None
    if message.body != body:
        raise LocalProtocolError(f"the {kind} of another peer cannot be signed, or it does not survive encoding")
    return message


def verify_message(envelope: bytes) -> SignedMessage:
    """Return the message in an envelope. Raises RemoteProtocolError when form, bounds or signature are wrong."""
    kind = Fields(decode_canonical(envelope, max_bytes=MAX_RECORD_BYTES), "record").name("kind", MAX_NAME_BYTES)
    if kind not in KINDS:
        raise RemoteProtocolError(f"a {kind} record is not a consensus message")
    payload, peer = open_envelope(envelope, kind)
    taken = Fields(decode_canonical(payload, max_bytes=MAX_RECORD_BYTES), kind)
    values = {field: _FORMS[field].load(taken.take(field), f"{kind} {field}") for field in _FIELDS[kind]}
    taken.finish()
    if kind in _SIGNER_FIELD:
        values[_SIGNER_FIELD[kind]] = peer
    body = KINDS[kind](**values)
    if isinstance(body, EquivocationProof):
        equivocator_of(body)
    return SignedMessage(peer, body, envelope)


def equivocator_of(proof: EquivocationProof) -> PeerId:
    """Return the peer that a proof convicts. Raises RemoteProtocolError for a proof that does not hold."""
    first, second = verify_message(proof.first), verify_message(proof.second)
    if first.body.chain != proof.chain or not is_equivocation(first, second):
        raise RemoteProtocolError("the proof of equivocation does not hold")
    return first.peer


def is_equivocation(first: SignedMessage, second: SignedMessage) -> bool:
    """Return whether a peer signed two statements of one epoch, or two commits of one epoch and parent."""
    one, other = first.body, second.body
    if first.peer != second.peer or one == other or one.chain != other.chain:
        return False
    if isinstance(one, Signature) and isinstance(other, Signature):
        return one.epoch == other.epoch
    if isinstance(one, Commit) and isinstance(other, Commit):
        return (one.epoch, one.parent) == (other.epoch, other.parent)
    return False


# The fields on the wire. A field has the same form in every kind of message.


class _Form(NamedTuple):
    """How a field travels. `load` checks a decoded value and names it in errors; `dump` is its inverse."""

    load: Callable[[object, str], Any]
    dump: Callable[[Any], Any] = lambda value: value


def _load_digests(max_count: int, value: object, what: str) -> tuple[bytes, ...]:
    found = tuple(raw(each, SHA256_BYTES, what) for each in array(value, max_count, what))
    _require_ascending(found, what)
    return found


def _load_peers(max_count: int, value: object, what: str) -> tuple[PeerId, ...]:
    """Return peers, which travel as their public keys and ascend by their ids."""
    keys = [raw(each, SHA256_BYTES, what) for each in array(value, max_count, what)]
    found = tuple(peer_id(peer_id_from_public_key(public_key), what) for public_key in keys)
    _require_ascending(found, what)
    return found


def _load_readings(value: object, what: str) -> tuple[Reading, ...]:
    found = tuple(_load_reading(each) for each in array(value, MAX_READINGS, what))
    _require_ascending([reading.cell for reading in found], what)
    return found


def _load_reading(value: object) -> Reading:
    hardware, workload, method, measured = tuple_of(value, 4, "reading")
    cell = Cell(
        name(hardware, MAX_HARDWARE_BYTES, "reading hardware"),
        name(workload, MAX_NAME_BYTES, "reading workload"),
        name(method, MAX_NAME_BYTES, "reading method"),
    )
    return Reading(cell, integer(measured, -MAX_READING, MAX_READING, "reading value"))


def _load_envelope(value: object, what: str) -> bytes:
    if type(value) is not bytes or not 0 < len(value) <= MAX_RECORD_BYTES:
        raise RemoteProtocolError(f"{what} is not an envelope of at most {MAX_RECORD_BYTES} bytes")
    return value


def _require_ascending(values: Sequence[Any], what: str) -> None:
    if any(not before < after for before, after in pairwise(values)):
        raise RemoteProtocolError(f"{what} do not ascend")


def _dump_peers(peers: Sequence[PeerId]) -> list[bytes]:
    return [public_key_of(peer) for peer in peers]


_DIGEST: Final = _Form(lambda value, what: raw(value, SHA256_BYTES, what))
_ENVELOPE: Final = _Form(_load_envelope)

_FORMS: Final[Mapping[str, _Form]] = {
    "chain": _DIGEST,
    "epoch": _Form(lambda value, what: integer(value, 0, MAX_EPOCH, what)),
    "parent": _DIGEST,
    "hardware": _Form(lambda value, what: name(value, MAX_HARDWARE_BYTES, what)),
    "commitment": _DIGEST,
    "observations": _Form(partial(_load_digests, MAX_COMMITTED), list),
    "nonce": _Form(lambda value, what: raw(value, NONCE_BYTES, what)),
    "readings": _Form(_load_readings, lambda readings: [[*reading.cell, reading.value] for reading in readings]),
    "commits": _Form(partial(_load_digests, MAX_CONTRIBUTIONS), list),
    "joined": _Form(partial(_load_peers, MAX_JOINED), _dump_peers),
    "left": _Form(partial(_load_peers, MAX_LEFT), _dump_peers),
    "expelled": _Form(partial(_load_peers, MAX_EXPELLED), _dump_peers),
    "set_digest": _DIGEST,
    "table_digest": _DIGEST,
    "state_digest": _DIGEST,
    "statement": _DIGEST,
    "first": _ENVELOPE,
    "second": _ENVELOPE,
}

_SIGNER_FIELD: Final = {"commit": "peer", "reveal": "peer", "statement": "proposer", "signature": "peer"}
"""The field that the envelope gives, by kind; it does not travel."""

_FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    kind: tuple(field.name for field in fields(body_type) if field.name != _SIGNER_FIELD.get(kind))
    for kind, body_type in KINDS.items()
}
