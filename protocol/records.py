"""Signed, expiring records: how a peer's announcements are signed and verified, in the DHT and in gossip.

A record travels in an envelope, the canonical msgpack map {kind, public_key, payload, signature}. The signature covers
the kind as well, so that no record passes for one of another kind. Records carry a sequence number and an expiry of
their own, because stores of others' records guarantee neither freshness nor deletion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.announcements import HEARTBEAT_TOPIC as HEARTBEAT_TOPIC
from protocol.announcements import DhtRecord, Record
from protocol.announcements import Heartbeat as Heartbeat
from protocol.announcements import ServedSpan as ServedSpan
from protocol.canonical import Value, decode, decode_canonical, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError, UntimelyError
from protocol.fields import integer
from protocol.forms import Name, Signature
from protocol.identity import PeerId, peer_id_from_public_key
from protocol.limits import MAX_CLOCK_SKEW_S, MAX_INTEGER, MAX_RECORD_BYTES, MAX_RECORD_LIFETIME_S
from protocol.schema import Form, from_map, raw, to_map
from protocol.signatures import is_valid_signature

_R = TypeVar("_R", bound=Record)
_D = TypeVar("_D", bound=DhtRecord)


def _payload(value: object, what: str) -> bytes:
    if not isinstance(value, bytes):
        raise RemoteProtocolError(f"{what} is not bytes")
    return value


class Signed(NamedTuple):
    """The bytes of a payload with a valid signature, and the peer that signed it."""

    payload: bytes
    peer: PeerId


class Verified(NamedTuple):
    """A payload with a valid signature and valid times, and the peer that signed it."""

    payload: dict[str, object]
    peer: PeerId


@dataclass(frozen=True, slots=True)
class _Envelope:
    kind: Name
    public_key: Annotated[bytes, raw(32)]
    payload: Annotated[bytes, Form(_payload)]
    signature: Signature


class _Header(NamedTuple):
    """The fields in the payload of every kind."""

    sequence: int
    issued_at_s: int
    expires_at_s: int


def sign(kind: str, payload: dict[str, Value], private_key: Ed25519PrivateKey) -> bytes:
    """Return the envelope of a payload. Raises LocalProtocolError when it has no canonical form or is too large."""
    try:
        payload_bytes = encode(payload)
        envelope = encode(
            {
                "kind": kind,
                "public_key": private_key.public_key().public_bytes_raw(),
                "payload": payload_bytes,
                "signature": private_key.sign(_signed_bytes(kind, payload_bytes)),
            }
        )
    except ValueError as error:
        raise LocalProtocolError(f"{kind} record: {error}") from None
    if len(envelope) > MAX_RECORD_BYTES:
        raise LocalProtocolError(f"{kind} record of {len(envelope)} bytes exceeds {MAX_RECORD_BYTES}")
    return envelope


def verify(envelope: bytes, kind: str, now_s: float) -> Verified:
    """Return the payload and the signer of an envelope.

    `kind`: the expected kind. `now_s`: Unix time by our clock. Raises RemoteProtocolError for an invalid form, kind,
    signature or time (expired, issued in the future, too long a lifetime).
    """
    signed = verify_envelope(envelope, kind)
    payload = _decode_payload(signed.payload, kind)
    _check_times(_read_header(payload, kind), kind, now_s)
    return Verified(payload, signed.peer)


def verify_envelope(envelope: bytes, kind: str) -> Signed:
    """Return the signed bytes and the signer of an envelope of the expected kind; times are not checked.

    Raises RemoteProtocolError for an invalid form, kind or signature.
    """
    found = _parse(envelope)
    if found.kind != kind:
        raise RemoteProtocolError(f"a {found.kind} record where a {kind} record was expected")
    if not is_valid_signature(_signed_bytes(kind, found.payload), found.signature, found.public_key):
        raise RemoteProtocolError(f"{kind} record: the signature is invalid")
    return Signed(found.payload, peer_id_from_public_key(found.public_key))


def kind_of(envelope: bytes) -> str:
    """Return the kind of record in an envelope, not verified. Raises RemoteProtocolError."""
    return _parse(envelope).kind


def payload_of(envelope: bytes) -> bytes:
    """Return the payload of an envelope that was verified before. Raises RemoteProtocolError."""
    return from_map(_Envelope, decode(envelope, max_bytes=MAX_RECORD_BYTES), "record").payload


def seal(record: Record, private_key: Ed25519PrivateKey) -> bytes:
    """Return the signed envelope of a record.

    Raises LocalProtocolError for the key of another peer, and for a value out of bounds.
    """
    try:
        envelope = sign(record.kind, to_map(record), private_key)
        same = verify_record(type(record), envelope, record.issued_at_s) == record
    except (RemoteProtocolError, ValueError) as error:
        raise LocalProtocolError(str(error)) from None
    if not same:
        raise LocalProtocolError(f"{record.kind} record: the key is not that of {record.peer}")
    return envelope


def verify_record(record_type: type[_R], envelope: bytes, now_s: float) -> _R:
    """Return the record of this type in a signed envelope.

    `now_s`: Unix time by our clock. Raises RemoteProtocolError for an invalid one.
    """
    payload, peer = verify(envelope, record_type.kind, now_s)
    return from_map(record_type, payload, record_type.kind, peer=peer)


def verify_dht_record(record_type: type[_D], key: str, envelope: bytes, now_s: float) -> _D:
    """Return the record found under a DHT key. Raises RemoteProtocolError, also where it belongs under another key."""
    record = verify_record(record_type, envelope, now_s)
    if record.key != key:
        raise RemoteProtocolError(f"{record.kind} record of {record.peer} was stored under another key: {key[:200]!r}")
    return record


def issue_time(envelope: bytes, kind: str) -> int:
    """Return the issue time in an envelope, in Unix time, however far it is from now.

    Only the signature is verified. Raises RemoteProtocolError.
    """
    payload = _decode_payload(verify_envelope(envelope, kind).payload, kind)
    return _read_header(payload, kind).issued_at_s


def select(envelopes: Sequence[bytes], now_s: float) -> int:
    """Return the index of the best of several valid records about the same subject.

    One that has not expired wins, then the highest sequence number, then the latest issue, then the greatest bytes, so
    that all peers select the same in any order. Raises RemoteProtocolError for bytes that are not a record; signatures
    are not verified.
    """
    return max(range(len(envelopes)), key=lambda index: _precedence(envelopes[index], now_s))


def _signed_bytes(kind: str, payload: bytes) -> bytes:
    # A kind contains no newline, so that no two pairs of kind and payload have the same bytes.
    return f"metaswarm/1/{kind}\n".encode("ascii") + payload


def _parse(envelope: bytes) -> _Envelope:
    return from_map(_Envelope, decode_canonical(envelope, max_bytes=MAX_RECORD_BYTES), "record")


def _decode_payload(payload: bytes, kind: str) -> dict[str, object]:
    value = decode_canonical(payload, max_bytes=MAX_RECORD_BYTES)
    if not isinstance(value, dict):
        raise RemoteProtocolError(f"{kind} record: the payload is not a map")
    return value


def _read_header(payload: dict[str, object], kind: str) -> _Header:
    return _Header(*(integer(payload.get(key), 0, MAX_INTEGER, f"{kind} {key}") for key in _Header._fields))


def _check_times(header: _Header, kind: str, now_s: float) -> None:
    lifetime_s = header.expires_at_s - header.issued_at_s
    if not 0 < lifetime_s <= MAX_RECORD_LIFETIME_S:
        raise RemoteProtocolError(f"{kind} record has lifetime {lifetime_s} s: expected 1 to {MAX_RECORD_LIFETIME_S}")
    if header.issued_at_s > now_s + MAX_CLOCK_SKEW_S:
        raise UntimelyError(f"{kind} record was issued {header.issued_at_s - now_s:.0f} s in the future")
    if header.expires_at_s <= now_s:
        raise UntimelyError(f"{kind} record expired {now_s - header.expires_at_s:.0f} s ago")


def _precedence(envelope: bytes, now_s: float) -> tuple[bool, int, int, bytes]:
    header = _read_header(_decode_payload(_parse(envelope).payload, "any"), "record")
    return header.expires_at_s > now_s, header.sequence, header.issued_at_s, envelope
