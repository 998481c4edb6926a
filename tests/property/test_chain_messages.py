"""Chain messages and states survive the round trip, and messages out of turn are refused."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.chains import (
    PROTOCOL,
    ChainConnection,
    GetState,
    GetStatements,
    Inventory,
    Message,
    Records,
    Remaining,
    StatePart,
    decode_state,
    encode_state,
    fill_records,
    split_state,
)
from protocol.consensus_values import Cell, CellReadings, Member, PeerReading
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.half_duplex import Busy
from protocol.identity import PeerId, peer_id_from_public_key
from protocol.limits import MAX_CONTROL_BYTES
from protocol.states import Role

digests = st.binary(min_size=32, max_size=32)
peers = digests.map(peer_id_from_public_key)
words = st.text("abc|=", min_size=1, max_size=8)
counts = st.integers(0, 1 << 40)
members = st.builds(Member, peers, words, counts, counts, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
readings = st.builds(PeerReading, peers, st.integers(-20_000_000, 20_000_000))
cells = st.tuples(
    st.builds(Cell, words, words, words),
    st.builds(CellReadings, st.integers(0, 1 << 31), st.lists(readings, max_size=7).map(tuple)),
)
parts = st.builds(
    StatePart,
    members=st.lists(members, max_size=3).map(tuple),
    candidates=st.lists(members, max_size=3).map(tuple),
    cells=st.lists(cells, max_size=3).map(tuple),
    expelled=st.lists(peers, max_size=3).map(tuple),
    last=st.booleans(),
)
asks = st.builds(
    GetStatements, chain=digests, locator=st.lists(digests, min_size=1, max_size=40).map(tuple), digest=digests
)
haves = st.builds(
    Inventory, st.sets(st.binary(min_size=8, max_size=8), max_size=20).map(lambda found: tuple(sorted(found)))
)
items = st.builds(
    Records,
    envelopes=st.lists(st.binary(min_size=1, max_size=40), max_size=5).map(tuple),
    last=st.just(True),
    rest=st.sampled_from(Remaining),
)
busies = st.builds(Busy, retry_s=st.integers(0, 60))
answers: st.SearchStrategy[Message] = st.one_of(items, busies)


@given(asks, haves, digests, answers, st.lists(parts, max_size=3), st.integers(1, 50))
@settings(max_examples=60)
def test_messages_survive_fragmentation(
    ask: GetStatements, have: Inventory, statement: bytes, answer: Message, state: list[StatePart], size: int
) -> None:
    initiator, responder = ChainConnection(Role.INITIATOR), ChainConnection(Role.RESPONDER)
    replies: list[Message] = [*(StatePart(members=p.members, cells=p.cells) for p in state), StatePart(last=True)]
    exchange: list[tuple[ChainConnection, ChainConnection, Message]] = [
        (initiator, responder, ask),
        (responder, initiator, Records(envelopes=(b"x",), last=True)),
        (initiator, responder, have),
        (responder, initiator, Records(envelopes=(), last=True)),
        (initiator, responder, GetState(statement)),
        *((responder, initiator, reply) for reply in replies),
        (initiator, responder, ask),
        (responder, initiator, answer),
    ]
    for sender, receiver, message in exchange:
        data = sender.send(message)
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        assert [each for piece in pieces for each in receiver.receive_data(piece)] == [message]


@given(
    st.lists(members, max_size=400),
    st.lists(members, max_size=32),
    st.lists(cells, max_size=80),
    st.lists(peers, max_size=4),
)
@settings(max_examples=10)
def test_state_survives_the_round_trip(
    found: list[Member], coming: list[Member], table: list[tuple[Cell, CellReadings]], gone: list[PeerId]
) -> None:
    pieces = list(split_state(found, coming, table, gone))
    back = decode_state(encode_state(pieces))
    assert [member for part in back for member in part.members] == found
    assert [candidate for part in back for candidate in part.candidates] == coming
    assert [cell for part in back for cell in part.cells] == table
    assert [peer for part in back for peer in part.expelled] == gone
    assert [part.last for part in back] == [*[False] * (len(back) - 1), True]


@given(st.lists(st.integers(1, 30_000), max_size=40))
def test_envelopes_are_split_into_bounded_messages(sizes: list[int]) -> None:
    envelopes = [bytes(size) for size in sizes]
    messages = list(fill_records(envelopes, Remaining.RECENT))
    assert [envelope for message in messages for envelope in message.envelopes] == envelopes
    assert [message.last for message in messages] == [*[False] * (len(messages) - 1), True]
    responder = ChainConnection(Role.RESPONDER)
    responder.receive_data(
        ChainConnection(Role.INITIATOR).send(GetStatements(chain=bytes(32), locator=(), digest=bytes(32)))
    )
    assert all(len(responder.send(message)) <= MAX_CONTROL_BYTES + 8 for message in messages)


def test_message_out_of_turn_is_refused() -> None:
    initiator = ChainConnection(Role.INITIATOR)
    with pytest.raises(LocalProtocolError):
        initiator.send(Inventory(()))
    with pytest.raises(LocalProtocolError):
        initiator.send(Records(envelopes=(), last=True))
    ask = initiator.send(GetStatements(chain=bytes(32), locator=(bytes(32),), digest=bytes(32)))
    with pytest.raises(LocalProtocolError):
        initiator.send(GetState(bytes(32)))
    responder = ChainConnection(Role.RESPONDER)
    with pytest.raises(RemoteProtocolError):
        responder.receive_data(ask + ask)
    assert {speaker for speaker, _ in PROTOCOL.table.values()} == {Role.INITIATOR, Role.RESPONDER}


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_protocol_errors(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        ChainConnection(Role.RESPONDER).receive_data(data)
    with contextlib.suppress(RemoteProtocolError):
        decode_state(data)
