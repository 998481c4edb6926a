"""The signed messages of the consensus: commits, reveals, statements, signatures and proofs of equivocation.

They travel in the envelope of all records (`protocol.records`), do not expire, and belong to one chain and one epoch.
A message is one of `protocol.consensus_values` without its signer, which the envelope names.
"""

import hashlib
from collections.abc import Mapping
from typing import Final, NamedTuple, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.canonical import decode_canonical
from protocol.consensus_values import Commit, EquivocationProof, Reveal, Signature, Statement
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.identity import PeerId
from protocol.limits import MAX_RECORD_BYTES
from protocol.records import kind_of, sign, verify_envelope
from protocol.schema import from_map, to_map

CONSENSUS_TOPIC: Final = "metaswarm/4/consensus"
"""The gossip topic of all these messages, in batches of envelopes as `protocol.history` encodes them."""

Body: TypeAlias = Commit | Reveal | Statement | Signature | EquivocationProof

KINDS: Final[Mapping[str, type[Body]]] = {
    "commit": Commit,
    "reveal": Reveal,
    "statement": Statement,
    "signature": Signature,
    "equivocation": EquivocationProof,
}
_SIGNER_FIELDS: Final = {"commit": "peer", "reveal": "peer", "statement": "proposer", "signature": "peer"}
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
    envelope = sign(kind, to_map(body), private_key)
    try:
        message = verify_message(envelope)
    except RemoteProtocolError as error:
        raise LocalProtocolError(str(error)) from None
    if message.body != body:
        raise LocalProtocolError(f"the {kind} of another peer cannot be signed, or it does not survive encoding")
    return message


def verify_message(envelope: bytes) -> SignedMessage:
    """Return the message in an envelope. Raises RemoteProtocolError when form, bounds or signature are wrong."""
    kind = kind_of(envelope)
    if kind not in KINDS:
        raise RemoteProtocolError(f"a {kind} record is not a consensus message")
    payload, peer = verify_envelope(envelope, kind)
    signer = {_SIGNER_FIELDS[kind]: peer} if kind in _SIGNER_FIELDS else {}
    body = from_map(KINDS[kind], decode_canonical(payload, max_bytes=MAX_RECORD_BYTES), kind, **signer)
    if isinstance(body, EquivocationProof):
        equivocator_of(body)
    return SignedMessage(peer, body, envelope)


def equivocator_of(proof: EquivocationProof) -> PeerId:
    """Return the peer that a proof convicts. Raises RemoteProtocolError for a proof that does not hold."""
    first, second = verify_message(proof.first), verify_message(proof.second)
    if first.body.chain != proof.chain or not is_equivocation(first, second):
        raise RemoteProtocolError("the proof of equivocation does not hold")
    return first.peer


def epoch_of_equivocation(proof: EquivocationProof) -> int:
    """Return the epoch in which the convicted peer contradicted itself."""
    return verify_message(proof.first).epoch


def is_equivocation(first: SignedMessage, second: SignedMessage) -> bool:
    """Return whether a peer signed two statements of one epoch, two commits of one epoch and parent, or two reveals.

    Two reveals of one commit differ in their inclusion lists.
    """
    one, other = first.body, second.body
    if first.peer != second.peer or one == other or one.chain != other.chain:
        return False
    if isinstance(one, Signature) and isinstance(other, Signature):
        return one.epoch == other.epoch
    if isinstance(one, Commit) and isinstance(other, Commit):
        return (one.epoch, one.parent) == (other.epoch, other.parent)
    if isinstance(one, Reveal) and isinstance(other, Reveal):
        return (one.epoch, one.commitment) == (other.epoch, other.commitment)
    return False
