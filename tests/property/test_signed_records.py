from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.announcements import Heartbeat, Placement, Record, ServedSpan, SpanRecord
from protocol.errors import RemoteProtocolError
from protocol.identity import BlockRange, ModelId, peer_id_from_public_key
from protocol.limits import MAX_HEARTBEAT_INTERVAL_MS, MAX_INTEGER, MAX_RECORD_LIFETIME_S
from protocol.messages import Load
from protocol.records import seal, select, verify, verify_record
from tests.property.strategies import block_ranges, loads, model_ids, names

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PEER = peer_id_from_public_key(KEY.public_key().public_bytes_raw())
MODEL = ModelId("5a" * 32)
NOW_S = 1_700_000_000

HEADER = {
    "peer": st.just(PEER),
    "sequence": st.integers(0, MAX_INTEGER),
    "issued_at_s": st.integers(NOW_S - 10, NOW_S + 10),
    "expires_at_s": st.integers(NOW_S + 11, NOW_S - 10 + MAX_RECORD_LIFETIME_S),
}
RECORDS: st.SearchStrategy[Record] = st.one_of(
    st.builds(SpanRecord, **HEADER, model=model_ids, blocks=st.lists(block_ranges, max_size=4).map(tuple)),
    st.builds(
        Heartbeat,
        **HEADER,
        interval_ms=st.integers(1, MAX_HEARTBEAT_INTERVAL_MS),
        multiaddrs=st.lists(names.map(lambda name: "/" + name), max_size=3).map(tuple),
        agent=names,
        spans=st.lists(st.builds(ServedSpan, model=model_ids, blocks=block_ranges, load=loads), max_size=3).map(tuple),
        placements=st.lists(
            st.builds(Placement, model=model_ids, blocks=block_ranges, rate=st.floats(0, 1e9), movable=st.booleans()),
            max_size=3,
        ).map(tuple),
        placed_at_ms=st.integers(0, MAX_INTEGER),
        leaving=st.booleans(),
    ),
)

EXAMPLES: list[Record] = [
    SpanRecord(
        peer=PEER, model=MODEL, blocks=(BlockRange(0, 15),), sequence=300, issued_at_s=NOW_S, expires_at_s=NOW_S + 600
    ),
    Heartbeat(
        peer=PEER,
        sequence=1,
        issued_at_s=NOW_S,
        expires_at_s=NOW_S + 60,
        interval_ms=2500,
        multiaddrs=("/ip4/127.0.0.1/tcp/4001",),
        agent="metaswarm/0.1.0",
        spans=(ServedSpan(model=MODEL, blocks=BlockRange(0, 15), load=Load()),),
    ),
]


@given(RECORDS)
def test_record_round_trip(record: Record) -> None:
    assert verify_record(type(record), seal(record, KEY), NOW_S) == record


@pytest.mark.parametrize("record", EXAMPLES)
def test_rejects_envelope_with_any_bit_flipped(record: Record) -> None:
    envelope = seal(record, KEY)
    assert verify(envelope, record.kind, NOW_S).peer == PEER
    for position in range(len(envelope)):
        for bit in range(8):
            damaged = bytearray(envelope)
            damaged[position] ^= 1 << bit
            with pytest.raises(RemoteProtocolError):
                verify(bytes(damaged), record.kind, NOW_S)


@given(st.binary(max_size=300))
def test_rejects_unsigned_bytes(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        verify(data, "span", NOW_S)
    with pytest.raises(RemoteProtocolError):
        select([data], NOW_S)


def versions() -> st.SearchStrategy[bytes]:
    """Records about the same thing, often of equal sequence and time."""
    fields: dict[str, Any] = {
        "peer": st.just(PEER),
        "model": st.just(MODEL),
        "sequence": st.integers(0, 2),
        "issued_at_s": st.integers(NOW_S, NOW_S + 1),
        "expires_at_s": st.just(NOW_S + 60),
        "blocks": st.integers(1, 3).map(lambda end: (BlockRange(0, end),)),
    }
    return st.builds(SpanRecord, **fields).map(lambda record: seal(record, KEY))


def better(one: bytes, other: bytes) -> bytes:
    return (one, other)[select((one, other), NOW_S)]


@settings(max_examples=60)
@given(versions(), versions(), versions())
def test_select_is_independent_of_order(one: bytes, two: bytes, three: bytes) -> None:
    assert better(one, one) == one
    assert better(one, two) == better(two, one)
    best = better(better(one, two), three)
    assert best == better(one, better(two, three))
    for order in ((one, two, three), (three, one, two), (two, one, three)):
        assert order[select(order, NOW_S)] == best
