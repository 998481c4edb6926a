"""The messages of relays and reachability: they survive the wire, and garbage is refused."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.relay.circuit_v2.pb import circuit_pb2, dcutr_pb2

from node.network.autonat_messages import AutonatMessage, DialRequest, DialResponse, DialStatus, ResponseStatus
from node.network.protobuf import MAX_VARINT, FrameReader, MalformedMessage, decode_varint, encode_varint
from node.network.relay_messages import (
    HolePunch,
    HolePunchType,
    HopMessage,
    HopType,
    Limit,
    Peer,
    Reservation,
    Status,
    StopMessage,
    StopType,
)

INTEGERS = st.integers(0, MAX_VARINT)
RAW = st.binary(max_size=64)
LIMITS = st.builds(Limit, duration=st.none() | st.integers(0, 2**32 - 1), data=st.none() | INTEGERS)
PEERS = st.builds(Peer, id=RAW, addrs=st.lists(RAW, max_size=3).map(tuple))
RESERVATIONS = st.builds(Reservation, expire=INTEGERS, addrs=st.lists(RAW, max_size=3).map(tuple), voucher=RAW)
HOPS = st.builds(
    HopMessage,
    type=st.sampled_from(HopType),
    peer=st.none() | PEERS,
    reservation=st.none() | RESERVATIONS,
    limit=st.none() | LIMITS,
    status=st.none() | st.sampled_from(Status),
)
AUTONAT = st.builds(
    AutonatMessage,
    dial_request=st.none() | st.builds(DialRequest, addrs=st.lists(RAW, max_size=4).map(tuple), nonce=INTEGERS),
    dial_response=st.none()
    | st.builds(
        DialResponse,
        status=st.sampled_from(ResponseStatus),
        addr_index=st.integers(0, 2**32 - 1),
        dial_status=st.sampled_from(DialStatus),
    ),
)


@given(HOPS)
def test_hop_message_survives_the_wire(message: HopMessage) -> None:
    assert HopMessage.decode(message.encode()) == message


@given(AUTONAT)
def test_autonat_message_survives_the_wire(message: AutonatMessage) -> None:
    assert AutonatMessage.decode(message.encode()) == message


@given(HOPS)
def test_another_implementation_reads_the_same(message: HopMessage) -> None:
    theirs = circuit_pb2.HopMessage()
    theirs.ParseFromString(message.encode())
    assert int(theirs.type) == message.type
    assert theirs.peer.id == ((message.peer and message.peer.id) or b"")
    assert list(theirs.reservation.addrs) == list(message.reservation.addrs if message.reservation else [])
    assert theirs.limit.data == ((message.limit and message.limit.data) or 0)


def test_messages_of_another_implementation_are_read() -> None:
    stop = circuit_pb2.StopMessage(
        type=circuit_pb2.StopMessage.CONNECT, peer=circuit_pb2.PeerId(id=b"abc"), limit=circuit_pb2.Limit(data=7)
    )
    assert StopMessage.decode(stop.SerializeToString()) == StopMessage(
        type=StopType.CONNECT, peer=Peer(id=b"abc"), limit=Limit(data=7)
    )
    punch = dcutr_pb2.HolePunch(type=dcutr_pb2.HolePunch.SYNC, ObsAddrs=[b"x", b"y"])
    assert HolePunch.decode(punch.SerializeToString()) == HolePunch(type=HolePunchType.SYNC, addrs=(b"x", b"y"))


@given(st.binary(max_size=200))
def test_garbage_is_read_or_refused(data: bytes) -> None:
    for kind in (HopMessage, AutonatMessage):
        with suppress(MalformedMessage):
            kind.decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",  # cut off
        b"\x08" + b"\xff" * 10,  # more than 64 bits
        b"\x00\x00",  # the field number 0
        b"\x0b",  # a group
        b"\x0a\x01\x00",  # bytes where an integer is expected
        b"\x12\x05ab",  # bytes cut off
        b"\x40\x00" * 300,  # too many fields
    ],
)
def test_malformed_message_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        HopMessage.decode(data)


def test_unknown_fields_and_values_are_skipped() -> None:
    known = HopMessage(type=HopType.STATUS, status=Status.OK).encode()
    assert HopMessage.decode(known + b"\xa2\x06\x01x\xa9\x06" + bytes(8)) == HopMessage.decode(known)
    assert HopMessage.decode(b"\x28\xe7\x07").status is None


@given(INTEGERS)
def test_varint_survives(value: int) -> None:
    data = encode_varint(value)
    assert decode_varint(data + b"rest", 0) == (value, len(data))


@given(st.lists(HOPS, min_size=1, max_size=3), st.binary(max_size=8))
def test_reader_takes_no_byte_beyond_a_message(messages: list[HopMessage], rest: bytes) -> None:
    data = b"".join(message.framed() for message in messages) + rest
    reader = FrameReader(4096)
    position = 0
    for message in messages:
        while True:
            chunk = data[position : position + reader.missing]
            position += len(chunk)
            if (found := reader.feed(chunk)) is not None:
                break
        assert HopMessage.decode(found) == message
    assert data[position:] == rest


def test_reader_refuses_a_long_message_before_it_arrives() -> None:
    reader = FrameReader(100)
    assert reader.feed(b"\x80") is None
    with pytest.raises(MalformedMessage):
        reader.feed(b"\x01")
