"""What peers say to agree on an epoch: signed commits, reveals, statements, signatures, and proofs of equivocation.

They travel in the envelope of all records (`protocol.records`), never expire by themselves, and count for one chain
and one epoch. What follows from them is the selector's business; here is what they may look like, and who said them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.canonical import Value, decode_canonical
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.fields import SHA256_BYTES, Fields, array, integer, name, peer_id, raw, tuple_of
from protocol.identity import PeerId, peer_id_from_public_key, public_key_of
from protocol.limits import MAX_HARDWARE_BYTES, MAX_NAME_BYTES, MAX_RECORD_BYTES
from protocol.records import open_envelope, sign

CONSENSUS_TOPIC: Final = "metaswarm/1/consensus"
"""The gossip topic of all of these. A message is a batch of envelopes, as `protocol.history` encodes it."""

MAX_EPOCH: Final = (1 << 32) - 1
MAX_COMMITTED: Final = 128
"""Observations that one commit names."""
MAX_READINGS: Final = 8
MAX_READING: Final = 20_000_000
"""A reading in millionths of a natural logarithm, either sign."""
MAX_CONTRIBUTIONS: Final = 304
MAX_JOINED: Final = 64
MAX_LEFT: Final = 48
MAX_EXPELLED: Final = 8
NONCE_BYTES: Final = 32


class MeasuredCell(NamedTuple):
    """A cell and what was read of it, in millionths of the natural logarithm of the ratio to the baseline."""

    hardware: str
    workload: str
    method: str
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """A peer commits itself to readings that it does not tell yet, and names observations that it has given out."""

    chain: bytes
    epoch: int
    parent: bytes
    hardware: str
    commitment: bytes
    observations: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RevealRecord:
    """The readings that were committed to; ascending by cell."""

    chain: bytes
    epoch: int
    nonce: bytes
    readings: tuple[MeasuredCell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementRecord:
    """What an epoch comes to, as one of the committee proposes it. Peers and digests ascend."""

    chain: bytes
    epoch: int
    parent: bytes
    commits: tuple[bytes, ...]
    joined: tuple[PeerId, ...]
    left: tuple[PeerId, ...]
    expelled: tuple[PeerId, ...]
    set_digest: bytes
    table_digest: bytes
    state_digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureRecord:
    """A peer's signature under a statement, named by its digest. A peer signs one statement in an epoch."""

    chain: bytes
    epoch: int
    statement: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EquivocationRecord:
    """Two envelopes of one peer that contradict each other; whoever finds them may tell."""

    chain: bytes
    first: bytes
    second: bytes


Body: TypeAlias = CommitRecord | RevealRecord | StatementRecord | SignatureRecord | EquivocationRecord

KINDS: Final[dict[str, type[Body]]] = {
    "commit": CommitRecord,
    "reveal": RevealRecord,
    "statement": StatementRecord,
    "signature": SignatureRecord,
    "equivocation": EquivocationRecord,
}
_KIND_OF: Final = {record_type: kind for kind, record_type in KINDS.items()}


class Said(NamedTuple):
    """A record whose signature is right: who said what, and the envelope that proves it."""

    peer: PeerId
    body: Body
    envelope: bytes

    @property
    def id(self) -> bytes:
        """The sha256 of the envelope: names what was said, to those who exchange it."""
        return hashlib.sha256(self.envelope).digest()


def say(body: Body, private_key: Ed25519PrivateKey) -> Said:
    """Return a signed record. Raises LocalProtocolError for one that others would not take."""
    envelope = sign(_KIND_OF[type(body)], _to_map(body), private_key)
    try:
        said = open_said(envelope)
    except RemoteProtocolError as error:
        raise LocalProtocolError(str(error)) from None
    if said.body != body:
        raise LocalProtocolError(f"a {_KIND_OF[type(body)]} is not what it would be taken for")
    return said


def open_said(envelope: bytes) -> Said:
    """Return what was said in an envelope, and by whom. Raises RemoteProtocolError when anything is wrong with it."""
    kind = Fields(decode_canonical(envelope, max_bytes=MAX_RECORD_BYTES), "record").name("kind", MAX_NAME_BYTES)
    if kind not in KINDS:
        raise RemoteProtocolError(f"a {kind} record says nothing about an epoch")
    payload, peer = open_envelope(envelope, kind)
    fields = Fields(decode_canonical(payload, max_bytes=MAX_RECORD_BYTES), kind)
    body = _FROM_FIELDS[kind](fields)
    fields.finish()
    return Said(peer, body, envelope)


def offender_of(proof: EquivocationRecord) -> PeerId:
    """Return whom a proof convicts. Raises RemoteProtocolError for one that proves nothing."""
    first, second = open_said(proof.first), open_said(proof.second)
    if first.body.chain != proof.chain or not contradicts(first, second):
        raise RemoteProtocolError("the proof of an equivocation proves nothing")
    return first.peer


def contradicts(first: Said, second: Said) -> bool:
    """Whether one peer said two things where it may say one: signatures of an epoch, commits of an epoch and parent."""
    one, other = first.body, second.body
    if first.peer != second.peer or one == other or one.chain != other.chain:
        return False
    if isinstance(one, SignatureRecord) and isinstance(other, SignatureRecord):
        return one.epoch == other.epoch
    if isinstance(one, CommitRecord) and isinstance(other, CommitRecord):
        return (one.epoch, one.parent) == (other.epoch, other.parent)
    return False


# The way out


def _to_map(body: Body) -> dict[str, Value]:
    match body:
        case CommitRecord():
            return {
                "chain": body.chain,
                "epoch": body.epoch,
                "parent": body.parent,
                "hardware": body.hardware,
                "commitment": body.commitment,
                "observations": list(body.observations),
            }
        case RevealRecord():
            return {
                "chain": body.chain,
                "epoch": body.epoch,
                "nonce": body.nonce,
                "readings": [list(reading) for reading in body.readings],
            }
        case StatementRecord():
            return {
                "chain": body.chain,
                "epoch": body.epoch,
                "parent": body.parent,
                "commits": list(body.commits),
                "joined": [public_key_of(peer) for peer in body.joined],
                "left": [public_key_of(peer) for peer in body.left],
                "expelled": [public_key_of(peer) for peer in body.expelled],
                "set_digest": body.set_digest,
                "table_digest": body.table_digest,
                "state_digest": body.state_digest,
            }
        case SignatureRecord():
            return {"chain": body.chain, "epoch": body.epoch, "statement": body.statement}
        case EquivocationRecord():
            return {"chain": body.chain, "first": body.first, "second": body.second}


# The way in


def _commit(fields: Fields) -> CommitRecord:
    return CommitRecord(
        chain=fields.raw("chain", SHA256_BYTES),
        epoch=fields.integer("epoch", 0, MAX_EPOCH),
        parent=fields.raw("parent", SHA256_BYTES),
        hardware=fields.name("hardware", MAX_HARDWARE_BYTES),
        commitment=fields.raw("commitment", SHA256_BYTES),
        observations=_digests(fields, "observations", MAX_COMMITTED),
    )


def _reveal(fields: Fields) -> RevealRecord:
    record = RevealRecord(
        chain=fields.raw("chain", SHA256_BYTES),
        epoch=fields.integer("epoch", 0, MAX_EPOCH),
        nonce=fields.raw("nonce", NONCE_BYTES),
        readings=tuple(_reading(value) for value in fields.array("readings", MAX_READINGS)),
    )
    cells = [reading[:3] for reading in record.readings]
    if cells != sorted(set(cells)):
        raise RemoteProtocolError("reveal readings do not ascend by cell")
    return record


def _reading(value: object) -> MeasuredCell:
    hardware, workload, method, measured = tuple_of(value, 4, "reading")
    return MeasuredCell(
        name(hardware, MAX_HARDWARE_BYTES, "reading hardware"),
        name(workload, MAX_NAME_BYTES, "reading workload"),
        name(method, MAX_NAME_BYTES, "reading method"),
        integer(measured, -MAX_READING, MAX_READING, "reading value"),
    )


def _statement(fields: Fields) -> StatementRecord:
    return StatementRecord(
        chain=fields.raw("chain", SHA256_BYTES),
        epoch=fields.integer("epoch", 0, MAX_EPOCH),
        parent=fields.raw("parent", SHA256_BYTES),
        commits=_digests(fields, "commits", MAX_CONTRIBUTIONS),
        joined=_peers(fields, "joined", MAX_JOINED),
        left=_peers(fields, "left", MAX_LEFT),
        expelled=_peers(fields, "expelled", MAX_EXPELLED),
        set_digest=fields.raw("set_digest", SHA256_BYTES),
        table_digest=fields.raw("table_digest", SHA256_BYTES),
        state_digest=fields.raw("state_digest", SHA256_BYTES),
    )


def _signature(fields: Fields) -> SignatureRecord:
    return SignatureRecord(
        chain=fields.raw("chain", SHA256_BYTES),
        epoch=fields.integer("epoch", 0, MAX_EPOCH),
        statement=fields.raw("statement", SHA256_BYTES),
    )


def _equivocation(fields: Fields) -> EquivocationRecord:
    def envelope(key: str) -> bytes:
        value = fields.take(key)
        if type(value) is not bytes or not 0 < len(value) <= MAX_RECORD_BYTES:
            raise RemoteProtocolError(f"equivocation {key} is no envelope")
        return value

    proof = EquivocationRecord(
        chain=fields.raw("chain", SHA256_BYTES), first=envelope("first"), second=envelope("second")
    )
    offender_of(proof)
    return proof


_FROM_FIELDS: Final[dict[str, Callable[[Fields], Body]]] = {
    "commit": _commit,
    "reveal": _reveal,
    "statement": _statement,
    "signature": _signature,
    "equivocation": _equivocation,
}


def _digests(fields: Fields, key: str, max_count: int) -> tuple[bytes, ...]:
    what = f"{fields.what} {key}"
    found = tuple(raw(value, SHA256_BYTES, what) for value in array(fields.take(key), max_count, what))
    _require_ascending(found, what)
    return found


def _peers(fields: Fields, key: str, max_count: int) -> tuple[PeerId, ...]:
    """Return peers, which travel as their public keys and ascend by their ids."""
    what = f"{fields.what} {key}"
    keys = [raw(value, SHA256_BYTES, what) for value in array(fields.take(key), max_count, what)]
    found = tuple(peer_id(peer_id_from_public_key(public_key), what) for public_key in keys)
    _require_ascending(found, what)
    return found


def _require_ascending(values: Sequence[str] | Sequence[bytes], what: str) -> None:
    if any(not before < after for before, after in pairwise(values)):  # type: ignore[operator]
        raise RemoteProtocolError(f"{what} do not ascend")
