"""Signed, expiring records: what a peer says of itself to everybody, in the DHT and by gossip.

A record travels in an envelope, the canonical msgpack map {kind, public_key, payload, signature}. The signature covers
the kind as well, so that no record can be passed off as one of another kind. Records carry a sequence number and an
expiry of their own, because whoever keeps them for others promises neither freshness nor oblivion.

A new kind of record is a subclass of `Record`.
"""

import abc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple, Self, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.canonical import Value, decode_canonical, encode
from protocol.codec import load_from, load_to_map
from protocol.errors import LocalProtocolError, RemoteProtocolError, UntimelyError
from protocol.fields import SHA256_BYTES, Fields, block_range, model_id, name
from protocol.identity import (
    BlockRange,
    ModelId,
    PeerId,
    parse_model_id,
    parse_peer_id,
    peer_id_from_public_key,
)
from protocol.limits import (
    MAX_ADDRESSES,
    MAX_CLOCK_SKEW_S,
    MAX_HEARTBEAT_INTERVAL_MS,
    MAX_INTEGER,
    MAX_NAME_BYTES,
    MAX_RATE,
    MAX_RECORD_BYTES,
    MAX_RECORD_LIFETIME_S,
    MAX_SPANS,
    SIGNATURE_BYTES,
)
from protocol.messages import Load
from protocol.signatures import is_signed

DHT_NAMESPACE: Final = "metaswarm"
"""The first part of every DHT key of ours."""

HEARTBEAT_TOPIC: Final = "metaswarm/1/heartbeats"
"""The gossip topic of heartbeats."""

_PUBLIC_KEY_BYTES: Final = 32

_R = TypeVar("_R", bound="Record")


class Signed(NamedTuple):
    """The bytes of a payload whose signature is right, and the peer that signed it."""

    payload: bytes
    peer: PeerId


class Verified(NamedTuple):
    """A payload whose signature and times are right, and the peer that signed it."""

    payload: dict[str, object]
    peer: PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(abc.ABC):
    """What every record says.

    `sequence`: higher than in any earlier record of this kind and subject by this peer, also across restarts; Unix time
    in milliseconds will do. `issued_at_s`, `expires_at_s`: Unix time in whole seconds.
    """

    kind: ClassVar[str]

    peer: PeerId
    sequence: int
    issued_at_s: int
    expires_at_s: int

    @abc.abstractmethod
    def body(self) -> dict[str, Value]:
        """Return the fields of this kind as they travel."""

    @classmethod
    @abc.abstractmethod
    def from_fields(cls, peer: PeerId, header: "Header", fields: Fields) -> Self:
        """Return the record made of the fields of this kind, all of which are taken. Raises RemoteProtocolError."""


class Header(NamedTuple):
    """The fields that the payload of every kind has."""

    sequence: int
    issued_at_s: int
    expires_at_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanRecord(Record):
    """Which blocks of a model a peer serves; no blocks means that it serves none any more."""

    kind: ClassVar[str] = "span"

    model: ModelId
    blocks: tuple[BlockRange, ...]

    def body(self) -> dict[str, Value]:
        """Return the fields of this kind as they travel."""
        return {"model": bytes.fromhex(self.model), "blocks": [[span.start, span.end] for span in self.blocks]}

    @classmethod
    def from_fields(cls, peer: PeerId, header: Header, fields: Fields) -> Self:
        """Return the record made of the fields of this kind. Raises RemoteProtocolError."""
        return cls(
            peer=peer,
            sequence=header.sequence,
            issued_at_s=header.issued_at_s,
            expires_at_s=header.expires_at_s,
            model=model_id(fields.take("model"), "span model"),
            blocks=tuple(block_range(span, "span blocks") for span in fields.array("blocks", MAX_SPANS)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSpan:
    """Blocks of a model that a peer serves now, and how busy it is with them."""

    model: ModelId
    blocks: BlockRange
    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Blocks of a model that a peer means to serve, even while it still loads them.

    `rate`: tokens a second through all of these blocks. `movable`: the peer chose them by itself, and will serve others
    where the swarm lacks those more.
    """

    model: ModelId
    blocks: BlockRange
    rate: float
    movable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(Record):
    """A peer is alive: where it is reached, what it runs and serves, and whether it is about to leave.

    `interval_ms`: how long it will be, about, until the peer says so again. `placed_at_ms`: since when, in Unix time,
    the peer says these `placements`; whoever plans for all looks at what was said until one moment.
    """

    kind: ClassVar[str] = "heartbeat"

    interval_ms: int
    multiaddrs: tuple[str, ...]
    agent: str
    spans: tuple[ServedSpan, ...] = ()
    placements: tuple[Placement, ...] = ()
    placed_at_ms: int = 0
    leaving: bool = False

    def body(self) -> dict[str, Value]:
        """Return the fields of this kind as they travel."""
        return {
            "interval_ms": self.interval_ms,
            "multiaddrs": list(self.multiaddrs),
            "agent": self.agent,
            "spans": [
                {
                    "model": bytes.fromhex(span.model),
                    "blocks": [span.blocks.start, span.blocks.end],
                    "load": load_to_map(span.load),
                }
                for span in self.spans
            ],
            "placements": [
                {
                    "model": bytes.fromhex(placement.model),
                    "blocks": [placement.blocks.start, placement.blocks.end],
                    "rate": placement.rate,
                    "movable": placement.movable,
                }
                for placement in self.placements
            ],
            "placed_at_ms": self.placed_at_ms,
            "leaving": self.leaving,
        }

    @classmethod
    def from_fields(cls, peer: PeerId, header: Header, fields: Fields) -> Self:
        """Return the record made of the fields of this kind. Raises RemoteProtocolError."""
        return cls(
            peer=peer,
            sequence=header.sequence,
            issued_at_s=header.issued_at_s,
            expires_at_s=header.expires_at_s,
            interval_ms=fields.integer("interval_ms", 1, MAX_HEARTBEAT_INTERVAL_MS),
            multiaddrs=tuple(_multiaddr(address) for address in fields.array("multiaddrs", MAX_ADDRESSES)),
            agent=fields.name("agent", MAX_NAME_BYTES),
            spans=tuple(_served_span(span) for span in fields.array("spans", MAX_SPANS)),
            placements=tuple(_placement(value) for value in fields.array("placements", MAX_SPANS)),
            placed_at_ms=fields.integer("placed_at_ms", 0, MAX_INTEGER),
            leaving=fields.flag("leaving"),
        )


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

    `kind`: the kind that is expected. `now_s`: Unix time by our clock. Raises RemoteProtocolError when anything is
    wrong: form, kind, signature, or times (expired, issued in the future, living too long).
    """
    signed = open_envelope(envelope, kind)
    payload = _decode_payload(signed.payload, kind)
    _check_times(_take_header(Fields(payload, kind)), kind, now_s)
    return Verified(payload, signed.peer)


def open_envelope(envelope: bytes, kind: str) -> Signed:
    """Return the bytes that were signed, and by whom, of an envelope of the expected kind.

    For records that never expire, which have times of their own. Raises RemoteProtocolError when form, kind or
    signature are wrong.
    """
    fields = _open_envelope(envelope, kind)
    public_key = fields.raw("public_key", _PUBLIC_KEY_BYTES)
    payload = _payload_bytes(fields)
    signature = fields.raw("signature", SIGNATURE_BYTES)
    fields.finish()
    if not is_signed(_signed_bytes(kind, payload), signature, public_key):
        raise RemoteProtocolError(f"{kind} record: the signature is wrong")
    return Signed(payload, peer_id_from_public_key(public_key))


def seal(record: Record, private_key: Ed25519PrivateKey) -> bytes:
    """Return the signed envelope of a record.

    Raises LocalProtocolError when the key is not the record's peer's, or when a value breaks a limit.
    """
    header: dict[str, Value] = {
        "sequence": record.sequence,
        "issued_at_s": record.issued_at_s,
        "expires_at_s": record.expires_at_s,
    }
    try:
        envelope = sign(record.kind, {**header, **record.body()}, private_key)
        same = unseal(type(record), envelope, record.issued_at_s) == record
    except (RemoteProtocolError, ValueError) as error:
        raise LocalProtocolError(str(error)) from None
    if not same:
        raise LocalProtocolError(f"{record.kind} record: the key is not that of {record.peer}")
    return envelope


def unseal(record_type: type[_R], envelope: bytes, now_s: float) -> _R:
    """Return the record of this type in a signed envelope.

    `now_s`: Unix time by our clock. Raises RemoteProtocolError when anything is wrong with it.
    """
    payload, peer = verify(envelope, record_type.kind, now_s)
    fields = Fields(payload, record_type.kind)
    record = record_type.from_fields(peer, _take_header(fields), fields)
    fields.finish()
    return record


def issue_time(envelope: bytes, kind: str) -> int:
    """Return when an envelope says it was issued, in Unix time, however far that is from now.

    Its signature is looked at and nothing else. Raises RemoteProtocolError.
    """
    payload = _decode_payload(open_envelope(envelope, kind).payload, kind)
    return _take_header(Fields(payload, kind)).issued_at_s


def select(envelopes: Sequence[bytes]) -> int:
    """Return the index of the best of several valid records about the same thing.

    The higher sequence number wins, then the later issue, then the greater bytes: everybody chooses the same, in
    whatever order they come. Raises RemoteProtocolError for what is no record at all; signatures are not looked at.
    """
    return max(range(len(envelopes)), key=lambda index: _precedence(envelopes[index]))


def span_key(model: ModelId, peer: PeerId) -> str:
    """Return the DHT key of a peer's span record."""
    return f"/{DHT_NAMESPACE}/span/{model}/{peer}"


def parse_span_key(key: str) -> tuple[ModelId, PeerId]:
    """Return the model and the peer in the DHT key of a span record; raise ValueError for any other key."""
    parts = key.split("/")
    if len(parts) != 5 or parts[:3] != ["", DHT_NAMESPACE, "span"]:
        raise ValueError(f"{key[:200]!r} is no key of a span record")
    return parse_model_id(parts[3]), parse_peer_id(parts[4])


def unseal_span(key: str, envelope: bytes, now_s: float) -> SpanRecord:
    """Return the span record found under a DHT key. Raises RemoteProtocolError, also when it belongs elsewhere."""
    record = unseal(SpanRecord, envelope, now_s)
    if span_key(record.model, record.peer) != key:
        raise RemoteProtocolError(f"span record of {record.peer} for model {record.model} lies under another key")
    return record


def provider_key(model: ModelId) -> bytes:
    """Return the key under which peers that serve any block of a model announce themselves as providers."""
    return hashlib.sha256(f"metaswarm/model/{model}".encode("ascii")).digest()


def blob_provider_key(sha256: str) -> bytes:
    """Return the key under which peers that have a file announce themselves: the sha256 itself, 64 hex digits."""
    key = bytes.fromhex(sha256)
    if len(key) != SHA256_BYTES:
        raise ValueError(f"{sha256[:80]!r} is no sha256")
    return key


def _signed_bytes(kind: str, payload: bytes) -> bytes:
    # The newline cannot be in a kind, so that no kind and payload read like another pair.
    return f"metaswarm/1/{kind}\n".encode("ascii") + payload


def _open_envelope(envelope: bytes, kind: str | None = None) -> Fields:
    fields = Fields(decode_canonical(envelope, max_bytes=MAX_RECORD_BYTES), "record")
    found = fields.name("kind", MAX_NAME_BYTES)
    if kind is not None and found != kind:
        raise RemoteProtocolError(f"a {found} record where a {kind} record was expected")
    return fields


def _payload_bytes(fields: Fields) -> bytes:
    payload = fields.take("payload")
    if not isinstance(payload, bytes):
        raise RemoteProtocolError("record payload is not bytes")
    return payload


def _decode_payload(payload: bytes, kind: str) -> dict[str, object]:
    value = decode_canonical(payload, max_bytes=MAX_RECORD_BYTES)
    if not isinstance(value, dict):
        raise RemoteProtocolError(f"{kind} record: the payload is no map")
    return value


def _take_header(fields: Fields) -> Header:
    return Header(
        sequence=fields.integer("sequence", 0, MAX_INTEGER),
        issued_at_s=fields.integer("issued_at_s", 0, MAX_INTEGER),
        expires_at_s=fields.integer("expires_at_s", 0, MAX_INTEGER),
    )


def _check_times(header: Header, kind: str, now_s: float) -> None:
    lifetime_s = header.expires_at_s - header.issued_at_s
    if not 0 < lifetime_s <= MAX_RECORD_LIFETIME_S:
        raise RemoteProtocolError(f"{kind} record lives {lifetime_s} s: expected 1 to {MAX_RECORD_LIFETIME_S}")
    if header.issued_at_s > now_s + MAX_CLOCK_SKEW_S:
        raise UntimelyError(f"{kind} record was issued {header.issued_at_s - now_s:.0f} s in the future")
    if header.expires_at_s <= now_s:
        raise UntimelyError(f"{kind} record expired {now_s - header.expires_at_s:.0f} s ago")


def _precedence(envelope: bytes) -> tuple[int, int, bytes]:
    payload = _decode_payload(_payload_bytes(_open_envelope(envelope)), "any")
    header = _take_header(Fields(payload, "record"))
    return header.sequence, header.issued_at_s, envelope


def _multiaddr(value: object) -> str:
    address = name(value, MAX_NAME_BYTES, "heartbeat multiaddr")
    if not address.startswith("/"):
        raise RemoteProtocolError(f"heartbeat multiaddr {address!r} does not begin with /")
    return address


def _served_span(value: object) -> ServedSpan:
    fields = Fields(value, "heartbeat span")
    span = ServedSpan(
        model=model_id(fields.take("model"), "heartbeat span model"),
        blocks=block_range(fields.take("blocks"), "heartbeat span blocks"),
        load=load_from(fields.take("load"), "heartbeat span load"),
    )
    fields.finish()
    return span


def _placement(value: object) -> Placement:
    fields = Fields(value, "heartbeat placement")
    placement = Placement(
        model=model_id(fields.take("model"), "heartbeat placement model"),
        blocks=block_range(fields.take("blocks"), "heartbeat placement blocks"),
        rate=fields.number("rate", 0, MAX_RATE),
        movable=fields.flag("movable"),
    )
    fields.finish()
    return placement
