import hashlib
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.announcements import (
    Heartbeat,
    Placement,
    Record,
    ServedSpan,
    SpanRecord,
    blob_provider_key,
    provider_key,
    span_key,
)
from protocol.canonical import decode_canonical, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.identity import BlockRange, ModelId, peer_id_from_public_key
from protocol.limits import (
    MAX_ADDRESSES,
    MAX_CLOCK_SKEW_S,
    MAX_INTEGER,
    MAX_NAME_BYTES,
    MAX_RECORD_BYTES,
    MAX_RECORD_LIFETIME_S,
    MAX_SPANS,
)
from protocol.messages import Load
from protocol.records import seal, select, sign, verify, verify_dht_record, verify_record

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PEER = peer_id_from_public_key(KEY.public_key().public_bytes_raw())
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER_PEER = peer_id_from_public_key(OTHER_KEY.public_key().public_bytes_raw())
MODEL = ModelId("5a" * 32)
NOW_S = 1_700_000_000

SPAN = SpanRecord(
    peer=PEER,
    model=MODEL,
    blocks=(BlockRange(0, 8), BlockRange(16, 24)),
    sequence=7,
    issued_at_s=NOW_S,
    expires_at_s=NOW_S + 600,
)
HEARTBEAT = Heartbeat(
    peer=PEER,
    sequence=8,
    issued_at_s=NOW_S,
    expires_at_s=NOW_S + 60,
    interval_ms=2500,
    multiaddrs=(f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}",),
    agent="metaswarm/0.1.0",
    spans=(ServedSpan(model=MODEL, blocks=BlockRange(0, 8), load=Load(sessions=1, step_s=0.5)),),
    placements=(Placement(model=MODEL, blocks=BlockRange(0, 8), rate=12.5, movable=True),),
    placed_at_ms=NOW_S * 1000,
    leaving=True,
)


PLACEMENT_FIELDS = {"model": bytes(32), "blocks": [0, 1], "rate": 1.0, "movable": True}
SPAN_FIELDS = {
    "model": bytes(32),
    "blocks": [0, 1],
    "load": {"sessions": 0, "queued_rows": 0, "free_positions": 0, "step_s": 0.0},
}


def forged(signed_kind: str, payload: Any, /, **changes: Any) -> bytes:
    """Return an envelope with a right signature over whatever payload, then changed."""
    payload_bytes = payload if isinstance(payload, bytes) else encode(payload)
    envelope: dict[str, Any] = {
        "kind": signed_kind,
        "public_key": KEY.public_key().public_bytes_raw(),
        "payload": payload_bytes,
        "signature": KEY.sign(f"metaswarm/1/{signed_kind}\n".encode() + payload_bytes),
    }
    return encode({**envelope, **changes})


def payload_of(record: Record) -> dict[str, Any]:
    return dict(verify(seal(record, KEY), record.kind, NOW_S).payload)


@pytest.mark.parametrize("record", [SPAN, HEARTBEAT, replace(SPAN, blocks=()), replace(HEARTBEAT, spans=())])
def test_record_round_trip(record: Record) -> None:
    envelope = seal(record, KEY)
    assert verify_record(type(record), envelope, NOW_S) == record
    assert verify(envelope, record.kind, NOW_S).peer == PEER


def test_largest_heartbeat_fits_a_record() -> None:
    load = Load(sessions=MAX_INTEGER, queued_rows=MAX_INTEGER, free_positions=MAX_INTEGER, step_s=0.1)
    largest = replace(
        HEARTBEAT,
        sequence=MAX_INTEGER,
        multiaddrs=("/" + "a" * (MAX_NAME_BYTES - 1),) * MAX_ADDRESSES,
        agent="a" * MAX_NAME_BYTES,
        spans=(ServedSpan(model=MODEL, blocks=BlockRange(1000, 1024), load=load),) * MAX_SPANS,
        placements=(Placement(model=MODEL, blocks=BlockRange(1000, 1024), rate=0.1, movable=True),) * MAX_SPANS,
        placed_at_ms=MAX_INTEGER,
    )
    assert verify_record(Heartbeat, seal(largest, KEY), NOW_S) == largest


def test_signature_covers_the_kind_of_record() -> None:
    with pytest.raises(RemoteProtocolError, match="a span record where a heartbeat record was expected"):
        verify_record(Heartbeat, seal(SPAN, KEY), NOW_S)
    relabelled = forged("span", payload_of(SPAN), kind="heartbeat")
    with pytest.raises(RemoteProtocolError, match="signature is invalid"):
        verify(relabelled, "heartbeat", NOW_S)


def test_refuses_to_sign_for_another_peer() -> None:
    with pytest.raises(LocalProtocolError, match="not that of"):
        seal(SPAN, OTHER_KEY)
    theirs = OTHER_KEY.public_key().public_bytes_raw()
    with pytest.raises(RemoteProtocolError, match="signature is invalid"):
        verify(forged("span", payload_of(SPAN), public_key=theirs), "span", NOW_S)


@pytest.mark.parametrize(
    "changes",
    [
        {"public_key": bytes(31)},
        {"public_key": bytes(32)},
        {"public_key": b"\xff" * 32},
        {"signature": bytes(63)},
        {"signature": bytes(64)},
        {"signature": "x"},
        {"payload": "x"},
        {"payload": b""},
        {"kind": ""},
        {"kind": 1},
        {"more": 1},
    ],
)
def test_rejects_damaged_envelopes(changes: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        verify(forged("span", payload_of(SPAN), **changes), "span", NOW_S)


@pytest.mark.parametrize("data", [b"", b"\xc0", b"\x80", b"\x84", bytes(MAX_RECORD_BYTES + 1)])
def test_rejects_malformed_envelopes(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        verify(data, "span", NOW_S)
    with pytest.raises(RemoteProtocolError):
        select([data], NOW_S)


def test_rejects_non_canonical_payload() -> None:
    payload = encode(payload_of(SPAN))
    longer = payload.replace(b"sequence\x07", b"sequence\xcc\x07")
    assert longer != payload
    with pytest.raises(RemoteProtocolError, match="canonical"):
        verify(forged("span", longer), "span", NOW_S)
    with pytest.raises(RemoteProtocolError, match="not a map"):
        verify(forged("span", []), "span", NOW_S)


@pytest.mark.parametrize(
    ("issued_at_s", "expires_at_s", "valid"),
    [
        (NOW_S, NOW_S + 1, True),
        (NOW_S - 100, NOW_S + 1, True),
        (NOW_S - 100, NOW_S, False),
        (NOW_S + MAX_CLOCK_SKEW_S, NOW_S + MAX_CLOCK_SKEW_S + 1, True),
        (NOW_S + MAX_CLOCK_SKEW_S + 1, NOW_S + MAX_CLOCK_SKEW_S + 2, False),
        (NOW_S, NOW_S + MAX_RECORD_LIFETIME_S, True),
        (NOW_S, NOW_S + MAX_RECORD_LIFETIME_S + 1, False),
        (NOW_S + 10, NOW_S + 10, False),
        (NOW_S + 20, NOW_S + 10, False),
        (0, MAX_INTEGER, False),
    ],
)
def test_record_is_valid_between_issue_and_expiry(issued_at_s: int, expires_at_s: int, valid: bool) -> None:
    envelope = forged("span", {**payload_of(SPAN), "issued_at_s": issued_at_s, "expires_at_s": expires_at_s})
    if valid:
        assert verify_record(SpanRecord, envelope, NOW_S).expires_at_s == expires_at_s
    else:
        with pytest.raises(RemoteProtocolError, match=r"expired|future|lifetime"):
            verify_record(SpanRecord, envelope, NOW_S)


def test_accepts_records_signed_by_other_implementations() -> None:
    """The ground of the test below: what it spoils is right."""
    for record in (SPAN, HEARTBEAT):
        assert verify_record(type(record), forged(record.kind, payload_of(record)), NOW_S) == record
    heartbeat = verify_record(Heartbeat, forged("heartbeat", {**payload_of(HEARTBEAT), "spans": [SPAN_FIELDS]}), NOW_S)
    assert heartbeat.spans == (ServedSpan(model=ModelId("00" * 32), blocks=BlockRange(0, 1), load=Load()),)


@pytest.mark.parametrize(
    ("record", "key", "value"),
    [
        (SPAN, "sequence", -1),
        (SPAN, "sequence", MAX_INTEGER + 1),
        (SPAN, "sequence", True),
        (SPAN, "issued_at_s", 1.5),
        (SPAN, "model", MODEL),
        (SPAN, "blocks", [[0, 0]]),
        (SPAN, "blocks", [[0, 1]] * (MAX_SPANS + 1)),
        (SPAN, "more", 1),
        (HEARTBEAT, "multiaddrs", ["/a"] * (MAX_ADDRESSES + 1)),
        (HEARTBEAT, "multiaddrs", ["ip4/1.2.3.4"]),
        (HEARTBEAT, "multiaddrs", [""]),
        (HEARTBEAT, "multiaddrs", ["/" + "a" * MAX_NAME_BYTES]),
        (HEARTBEAT, "agent", ""),
        (HEARTBEAT, "agent", "a\n"),
        (HEARTBEAT, "leaving", 0),
        (HEARTBEAT, "spans", [{}]),
        (HEARTBEAT, "spans", [{**SPAN_FIELDS, "more": 1}]),
        (HEARTBEAT, "spans", [[]]),
        (HEARTBEAT, "placements", [{**PLACEMENT_FIELDS, "rate": -1.0}]),
        (HEARTBEAT, "placements", [{**PLACEMENT_FIELDS, "rate": 2e9}]),
        (HEARTBEAT, "placements", [{**PLACEMENT_FIELDS, "movable": 1}]),
        (HEARTBEAT, "placed_at_ms", -1),
    ],
)
def test_rejects_signed_records_with_fields_out_of_bounds(record: Record, key: str, value: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        verify_record(type(record), forged(record.kind, {**payload_of(record), key: value}), NOW_S)


@pytest.mark.parametrize(
    "record",
    [
        replace(SPAN, sequence=-1),
        replace(SPAN, expires_at_s=NOW_S),
        replace(SPAN, expires_at_s=NOW_S + MAX_RECORD_LIFETIME_S + 1),
        replace(SPAN, blocks=(BlockRange(0, 1),) * (MAX_SPANS + 1)),
        replace(SPAN, model=ModelId("z")),
        replace(HEARTBEAT, agent=""),
        replace(HEARTBEAT, multiaddrs=("localhost",)),
    ],
)
def test_refuses_to_sign_records_out_of_bounds(record: Record) -> None:
    with pytest.raises(LocalProtocolError):
        seal(record, KEY)


def test_refuses_to_sign_oversized_records() -> None:
    with pytest.raises(LocalProtocolError, match="exceeds"):
        sign("span", {"x": bytes(MAX_RECORD_BYTES)}, KEY)


def test_select_prefers_a_record_that_has_not_expired() -> None:
    held = seal(replace(SPAN, sequence=SPAN.sequence + 1_000_000), KEY)
    new = seal(replace(SPAN, issued_at_s=SPAN.expires_at_s, expires_at_s=SPAN.expires_at_s + 1), KEY)
    assert select([held, new], SPAN.expires_at_s - 1) == 0
    assert select([held, new], SPAN.expires_at_s) == 1


def test_select_prefers_the_newest_record() -> None:
    low, high = seal(SPAN, KEY), seal(replace(SPAN, sequence=8, issued_at_s=NOW_S - 5), KEY)
    assert select([low, high], NOW_S) == 1
    assert select([high, low], NOW_S) == 0
    # Of records with equal sequence numbers, whichever bytes are the greater.
    for blocks in ((), SPAN.blocks, (BlockRange(1000, 1024),)):
        later = seal(replace(SPAN, issued_at_s=NOW_S + 1, blocks=blocks), KEY)
        assert select([later, low], NOW_S) == 0
        assert select([low, later], NOW_S) == 1
    fewer = seal(replace(SPAN, blocks=()), KEY)
    assert [low, fewer][select([low, fewer], NOW_S)] == max(low, fewer)
    assert select([low, low], NOW_S) == 0


def test_span_record_is_bound_to_its_dht_key() -> None:
    key = span_key(MODEL, PEER)
    assert key == f"/metaswarm/span/{MODEL}/{PEER}"
    envelope = seal(SPAN, KEY)
    assert verify_dht_record(SpanRecord, key, envelope, NOW_S) == SPAN
    for other in (span_key(MODEL, OTHER_PEER), span_key(ModelId("00" * 32), PEER), "", key + "/"):
        with pytest.raises(RemoteProtocolError, match="under another key"):
            verify_dht_record(SpanRecord, other, envelope, NOW_S)


def test_provider_keys_are_sha256() -> None:
    assert provider_key(MODEL) == hashlib.sha256(b"metaswarm/model/" + MODEL.encode()).digest()
    assert blob_provider_key(MODEL) == bytes.fromhex(MODEL)
    for text in ("", "5a", "z" * 64):
        with pytest.raises(ValueError, match=r"sha256|hexadecimal"):
            blob_provider_key(text)


def test_an_envelope_is_canonical_msgpack() -> None:
    envelope = seal(SPAN, KEY)
    fields = decode_canonical(envelope, max_bytes=MAX_RECORD_BYTES)
    assert isinstance(fields, dict)
    assert list(fields) == ["kind", "payload", "public_key", "signature"]
    unordered = b"\x84" + b"".join(encode(part) for key in reversed(fields) for part in (key, fields[key]))
    with pytest.raises(RemoteProtocolError, match="canonical"):
        verify(unordered, "span", NOW_S)
