"""What is said on a chain stream is what is heard, out of turn nothing is, and states come back as they went."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.chains import (
    PROTOCOL,
    CellState,
    ChainConnection,
    GetState,
    GetStatements,
    Inventory,
    MemberState,
    Message,
    Records,
    Remaining,
    StatePart,
    decode_state,
    encode_state,
    fill_records,
    split_state,
)
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.half_duplex import Busy
from protocol.identity import peer_id_from_public_key
from protocol.limits import MAX_CONTROL_BYTES
from protocol.states import Role

digests = st.binary(min_size=32, max_size=32)
peers = digests.map(peer_id_from_public_key)
words = st.text("abc|=", min_size=1, max_size=8)
counts = st.integers(0, 1 << 40)
members = st.builds(MemberState, peers, words, counts, counts, st.integers(0, 9))
cells = st.builds(
    CellState,
    words,
    words,
    words,
    st.integers(0, 1 << 31),
    st.lists(st.tuples(peers, st.integers(-20_000_000, 20_000_000)), max_size=7).map(tuple),
)
parts = st.builds(
    StatePart,
    members=st.lists(members, max_size=3).map(tuple),
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
def test_a_conversation_is_heard_as_it_is_said_in_whatever_pieces(
    ask: GetStatements, have: Inventory, statement: bytes, answer: Message, state: list[StatePart], size: int
) -> None:
    initiator, responder = ChainConnection(Role.INITIATOR), ChainConnection(Role.RESPONDER)
    replies: list[Message] = [*(StatePart(members=p.members, cells=p.cells) for p in state), StatePart(last=True)]
    said: list[tuple[ChainConnection, ChainConnection, Message]] = [
        (initiator, responder, ask),
        (responder, initiator, Records(envelopes=(b"x",), last=True)),
        (initiator, responder, have),
        (responder, initiator, Records(envelopes=(), last=True)),
        (initiator, responder, GetState(statement)),
        *((responder, initiator, reply) for reply in replies),
        (initiator, responder, ask),
        (responder, initiator, answer),
    ]
    for speaker, hearer, message in said:
        data = speaker.send(message)
        heard = [m for start in range(0, len(data), size) for m in hearer.receive_data(data[start : start + size])]
        assert heard == [message]


@given(st.lists(members, max_size=400), st.lists(cells, max_size=80), st.lists(peers, max_size=4))
@settings(max_examples=10)
def test_a_state_comes_back_as_it_went(found: list[MemberState], table: list[CellState], gone: list[str]) -> None:
    pieces = list(split_state(found, table, gone))  # type: ignore[arg-type]
    back = decode_state(encode_state(pieces))
    assert [member for part in back for member in part.members] == found
    assert [cell for part in back for cell in part.cells] == table
    assert [peer for part in back for peer in part.expelled] == gone
    assert [part.last for part in back] == [*[False] * (len(back) - 1), True]


@given(st.lists(st.integers(1, 30_000), max_size=40))
def test_any_envelopes_fit_into_messages(sizes: list[int]) -> None:
    envelopes = [bytes(size) for size in sizes]
    messages = list(fill_records(envelopes, Remaining.RECENT))
    assert [envelope for message in messages for envelope in message.envelopes] == envelopes
    assert [message.last for message in messages] == [*[False] * (len(messages) - 1), True]
    responder = ChainConnection(Role.RESPONDER)
    responder.receive_data(
        ChainConnection(Role.INITIATOR).send(GetStatements(chain=bytes(32), locator=(), digest=bytes(32)))
    )
    assert all(len(responder.send(message)) <= MAX_CONTROL_BYTES + 8 for message in messages)


def test_nobody_speaks_out_of_turn() -> None:
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
def test_no_bytes_raise_anything_but_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        ChainConnection(Role.RESPONDER).receive_data(data)
    with contextlib.suppress(RemoteProtocolError):
        decode_state(data)
