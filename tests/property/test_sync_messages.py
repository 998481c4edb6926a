"""The sync protocol's bytes: what one end says the other hears, and nothing that comes from outside does harm."""

import contextlib
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.framing import FrameType, encode_frame
from protocol.half_duplex import Busy
from protocol.limits import MAX_BUCKET, MAX_BUSY_S, MAX_CONTROL_BYTES, MAX_COUNT, MAX_GET, MAX_QUERIES, MAX_RECORD_BYTES
from protocol.reconciliation import Answer, Equal, Listing, PackedIds, Split, Summary
from protocol.states import Role
from protocol.sync import (
    PROTOCOL,
    Answers,
    Compare,
    Get,
    Greeting,
    Items,
    Message,
    Put,
    SyncConnection,
    SyncState,
    Taken,
    Welcome,
)

ids = st.integers(0, 2**32).map(lambda number: hashlib.sha256(number.to_bytes(5, "big")).digest())
digests = st.binary(min_size=32, max_size=32)
counts = st.integers(0, MAX_COUNT)
prefixes = st.text("0123456789abcdef", max_size=71)
summaries = st.builds(Summary, prefixes, counts, digests)
envelopes = st.lists(st.binary(min_size=1, max_size=400), max_size=20).map(tuple)


@st.composite
def splits(draw: st.DrawFn, prefix: str) -> Split:
    stem = prefix + draw(st.text("0123456789abcdef", max_size=71 - len(prefix)))
    digits = sorted(draw(st.sets(st.sampled_from("0123456789abcdef"), min_size=1)))
    return Split(tuple(Summary(stem + digit, draw(st.integers(1, MAX_COUNT)), draw(digests)) for digit in digits))


@st.composite
def listings(draw: st.DrawFn) -> Listing:
    buckets = draw(st.dictionaries(st.integers(0, MAX_BUCKET), st.sets(ids, min_size=1, max_size=5), max_size=5))
    return Listing(tuple((bucket, PackedIds.of(buckets[bucket])) for bucket in sorted(buckets)))


@st.composite
def answers(draw: st.DrawFn, query: Summary) -> Answer:
    return draw(st.one_of(st.just(Equal()), splits(query.prefix), listings() if not query.prefix else st.nothing()))


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[Role, Message]]:
    """Messages that two honest ends may exchange, each with who says it."""
    initiator, responder = Role.INITIATOR, Role.RESPONDER
    root = draw(st.builds(Summary, st.just(""), counts, digests))
    greeting = Greeting(first_bucket=draw(st.integers(0, MAX_BUCKET)), count=root.count, digest=root.digest)
    if draw(st.booleans()):
        return [(initiator, greeting), (responder, Busy(retry_s=draw(st.integers(0, MAX_BUSY_S))))]
    welcome = Welcome(first_bucket=draw(st.integers(0, MAX_BUCKET)), answer=draw(answers(root)))
    said: list[tuple[Role, Message]] = [(initiator, greeting), (responder, welcome)]
    for request in draw(st.lists(st.sampled_from(["compare", "get", "put"]), max_size=4)):
        match request:
            case "compare":
                queries = draw(st.lists(summaries, min_size=1, max_size=4))
                answered = queries[: draw(st.integers(1, len(queries)))]
                said.append((initiator, Compare(tuple(queries))))
                said.append((responder, Answers(tuple(draw(answers(query)) for query in answered))))
            case "get":
                wanted = sorted(draw(st.sets(ids, min_size=1, max_size=20)))
                said.append((initiator, Get(tuple(wanted))))
                found = draw(st.lists(st.binary(min_size=1, max_size=400), max_size=len(wanted)))
                cut = draw(st.integers(0, len(found)))
                said.append((responder, Items(tuple(found[:cut]), last=False)))
                said.append((responder, Items(tuple(found[cut:]), last=True)))
            case "put":
                said.append((initiator, Put(draw(envelopes))))
                said.append((responder, Taken(count=draw(st.integers(0, MAX_GET)))))
    return said


def one_of_each() -> list[Message]:
    summary = Summary("", 1, bytes(32))
    return [
        Greeting(first_bucket=1, count=1, digest=bytes(32)),
        Welcome(first_bucket=1, answer=Equal()),
        Busy(retry_s=1),
        Compare((summary,)),
        Answers((Equal(),)),
        Get((bytes(32),)),
        Items((), last=True),
        Put((b"envelope",)),
        Taken(count=1),
    ]


@given(conversations(), st.integers(1, 4096))
def test_sync_messages_survive_fragmentation(said: list[tuple[Role, Message]], size: int) -> None:
    ends = {role: SyncConnection(role) for role in Role}
    for speaker, message in said:
        listener = ends[Role.RESPONDER if speaker is Role.INITIATOR else Role.INITIATOR]
        data = ends[speaker].send(message)
        assert len(data) <= MAX_CONTROL_BYTES + 5
        heard = [
            each for start in range(0, len(data), size) for each in listener.receive_data(data[start : start + size])
        ]
        assert heard == [message]
        assert ends[Role.INITIATOR].state == ends[Role.RESPONDER].state


@given(conversations(), st.data())
def test_mutated_bytes_raise_nothing_but_remote_protocol_errors(
    said: list[tuple[Role, Message]], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(said) - 1))
    ends = {role: SyncConnection(role) for role in Role}
    for number, (speaker, message) in enumerate(said):
        listener = ends[Role.RESPONDER if speaker is Role.INITIATOR else Role.INITIATOR]
        sent = bytearray(ends[speaker].send(message))
        if number < at:
            listener.receive_data(bytes(sent))
            continue
        for _ in range(data.draw(st.integers(1, 3))):
            sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
        try:
            listener.receive_data(bytes(sent))
        except RemoteProtocolError:
            with pytest.raises(RemoteProtocolError):
                listener.receive_data(b"more")
        return


@given(st.binary(max_size=200))
def test_garbage_raises_nothing_but_remote_protocol_errors(garbage: bytes) -> None:
    for data in (garbage, encode_frame(FrameType.CONTROL, garbage or b"\0")):
        with contextlib.suppress(RemoteProtocolError):
            SyncConnection(Role.RESPONDER).receive_data(data)


def connection_in(state: SyncState, role: Role) -> SyncConnection:
    """Return one end of a conversation that has come to a state by what the table allows."""
    ways: dict[SyncState, list[Message]] = {SyncState.NEW: []}
    for _ in SyncState:
        for (before, kind), transition in PROTOCOL.table.items():
            if before in ways and transition.next not in ways:
                ways[transition.next] = [*ways[before], next(each for each in one_of_each() if type(each) is kind)]
    ends = {each: SyncConnection(each) for each in Role}
    for message in ways[state]:
        speaker = PROTOCOL.table[ends[role].state, type(message)].sender
        listener = Role.RESPONDER if speaker is Role.INITIATOR else Role.INITIATOR
        ends[listener].receive_data(ends[speaker].send(message))
    assert ends[role].state is state
    return ends[role]


OPEN_STATES = [state for state in SyncState if state not in {SyncState.CLOSED, SyncState.ERROR}]


@pytest.mark.parametrize("state", OPEN_STATES)
@pytest.mark.parametrize("message", one_of_each(), ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("role", list(Role))
def test_sync_message_out_of_turn_is_refused(state: SyncState, message: Message, role: Role) -> None:
    transition = PROTOCOL.table.get((state, type(message)))
    other = Role.RESPONDER if role is Role.INITIATOR else Role.INITIATOR
    speaker = connection_in(state, role)
    if transition is None or transition.sender is not role:
        with pytest.raises(LocalProtocolError):
            speaker.send(message)
        assert speaker.state is state
        # What a faultless end does not say, a hostile one may: the listener refuses it.
        data = forged(message)
        with pytest.raises(RemoteProtocolError):
            connection_in(state, other).receive_data(data)
    else:
        connection_in(state, other).receive_data(speaker.send(message))
        assert speaker.state is transition.next


def forged(message: Message) -> bytes:
    """Return the bytes of a message whoever may say it when."""
    for (state, kind), transition in PROTOCOL.table.items():
        if kind is type(message):
            return connection_in(state, transition.sender).send(message)
    raise AssertionError("every message is in the table")


def answered(query: Summary, answer: Answer) -> None:
    """Have an initiator ask and a hostile responder answer."""
    initiator, responder = connection_in(SyncState.IDLE, Role.INITIATOR), connection_in(SyncState.IDLE, Role.RESPONDER)
    responder.receive_data(initiator.send(Compare((query,))))
    initiator.receive_data(responder.send(Answers((answer,))))


ID = bytes.fromhex("ab" * 32)
INSIDE = Summary("00000007ab", 3, bytes(32))


@pytest.mark.parametrize(
    "answer",
    [
        Split((Summary("00000008a", 1, bytes(32)),)),
        Split((Summary("00000007ab", 1, bytes(32)),)),
        Split((Summary("00000007", 1, bytes(32)),)),
        Split((Summary("00000007ab1", 1, bytes(32)), Summary("00000007ab1", 1, bytes(32)))),
        Split((Summary("00000007ab2", 1, bytes(32)), Summary("00000007ab1", 1, bytes(32)))),
        Split((Summary("00000007ab1", 0, bytes(32)),)),
        Split((Summary("00000007ab1", MAX_COUNT + 1, bytes(32)),)),
        Split((Summary("00000007ab1", 1, bytes(31)),)),
        Listing(((8, PackedIds(ID)),)),
        Listing(((7, PackedIds(bytes(32))),)),
        Listing(((7, PackedIds(ID + ID)),)),
        Listing(((7, PackedIds(ID[:31])),)),
        Listing(((7, PackedIds(b"")),)),
        Listing(((7, PackedIds(ID)), (7, PackedIds(ID)))),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_answer_outside_the_queried_prefix_is_refused(answer: Answer) -> None:
    with pytest.raises(RemoteProtocolError):
        answered(INSIDE, answer)


def test_answer_within_the_queried_prefix_is_accepted() -> None:
    answered(INSIDE, Listing(((7, PackedIds(ID)),)))
    answered(INSIDE, Split((Summary("00000007ab1", 1, bytes(32)), Summary("00000007abf", 2, bytes(32)))))


def test_more_answers_or_envelopes_than_requested_are_refused() -> None:
    initiator, responder = connection_in(SyncState.IDLE, Role.INITIATOR), connection_in(SyncState.IDLE, Role.RESPONDER)
    responder.receive_data(initiator.send(Get((ID,))))
    initiator.receive_data(responder.send(Items((b"one",), last=False)))
    with pytest.raises(RemoteProtocolError):
        initiator.receive_data(responder.send(Items((b"two",), last=True)))
    initiator, responder = connection_in(SyncState.IDLE, Role.INITIATOR), connection_in(SyncState.IDLE, Role.RESPONDER)
    responder.receive_data(initiator.send(Compare((INSIDE,))))
    with pytest.raises(RemoteProtocolError):
        initiator.receive_data(responder.send(Answers((Equal(), Equal()))))


def test_oversized_messages_are_neither_sent_nor_accepted() -> None:
    with pytest.raises(LocalProtocolError):
        connection_in(SyncState.IDLE, Role.INITIATOR).send(Put((bytes(MAX_RECORD_BYTES),) * 5))
    responder = connection_in(SyncState.IDLE, Role.RESPONDER)
    with pytest.raises(RemoteProtocolError):
        responder.receive_data(connection_in(SyncState.IDLE, Role.INITIATOR).send(Put((bytes(MAX_RECORD_BYTES + 1),))))
    queries = (INSIDE,) * (MAX_QUERIES + 1)
    responder = connection_in(SyncState.IDLE, Role.RESPONDER)
    with pytest.raises(RemoteProtocolError):
        responder.receive_data(connection_in(SyncState.IDLE, Role.INITIATOR).send(Compare(queries)))


def test_a_stream_may_end_at_any_time() -> None:
    for state in OPEN_STATES:
        for role in Role:
            connection = connection_in(state, role)
            assert connection.receive_data(b"") == []
            assert connection.state is SyncState.CLOSED
