import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from protocol.codec import encode_step_header
from protocol.connection import PROTOCOL_IDS, JobConnection
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.framing import FrameType, encode_chunks, encode_frame
from protocol.identity import SessionId
from protocol.limits import MAX_FRAME_BYTES, MAX_PINGS, MAX_SESSIONS, MAX_STEP_BYTES, MAX_WINDOW_BYTES
from protocol.messages import Close, Message, Ping, Pong, Sampling, Slice, Step
from protocol.states import ConnectionState, Role, SessionState
from protocol.tensors import DType, Tensor
from tests.unit.protocol.job_streams import (
    ROW_BYTES,
    SESSION,
    WINDOW,
    begin,
    close,
    closed,
    credit,
    failed,
    greeted,
    greeted_pair,
    hello,
    new_connection,
    open_message,
    opened,
    progress,
    progress_request,
    refused,
    reroute,
    rows,
    session_id,
    step_message,
    token_history,
    wire,
)

WINDOW_ROWS = WINDOW // ROW_BYTES


def carry(sender: JobConnection, receiver: JobConnection, *messages: Message) -> list[Message]:
    return receiver.receive_data(b"".join(piece for message in messages for piece in sender.send(message)))


# The course of a session


def test_session_lifecycle_from_hello_to_closed() -> None:
    initiator, responder = new_connection(Role.INITIATOR), new_connection(Role.RESPONDER)
    assert responder.receive_data(b"".join(initiator.send_hello())) == [hello()]
    assert initiator.receive_data(b"".join(responder.send_hello())) == [hello()]
    assert initiator.remote_hello == responder.remote_hello == hello()
    assert carry(initiator, responder, open_message()) == [open_message()]
    assert carry(responder, initiator, opened()) == [opened()]
    carry(initiator, responder, begin())
    assert carry(initiator, responder, rows(3), rows(1)) == [rows(3), rows(1)]
    assert carry(responder, initiator, credit(4)) == [credit(4)]
    assert carry(initiator, responder, close()) == [close()]
    assert carry(responder, initiator, closed()) == [closed()]
    assert initiator.session_count == responder.session_count == 0
    assert initiator.receive_data(b"") == responder.receive_data(b"") == []
    assert initiator.state is responder.state is ConnectionState.CLOSED


def test_open_may_precede_the_remote_hello_but_steps_may_not() -> None:
    initiator, responder = new_connection(Role.INITIATOR), new_connection(Role.RESPONDER)
    early = initiator.send_hello() + initiator.send(open_message()) + initiator.send(Ping(nonce=1))
    assert responder.receive_data(b"".join(early)) == [hello(), open_message(), Ping(nonce=1)]
    assert initiator.sendable_bytes(SESSION) == 0
    with pytest.raises(LocalProtocolError, match="hello sent"):
        initiator.send(rows(1, session_id(1)))
    with pytest.raises(LocalProtocolError, match="hello received"):
        responder.send(opened())
    responder.send_hello()
    with pytest.raises(RemoteProtocolError, match="hello sent"):
        initiator.receive_data(wire(opened(), hello()))


def test_rejects_hello_out_of_bounds() -> None:
    for agent, window_bytes in (("", 1), ("a", 0), ("a", MAX_WINDOW_BYTES + 1), ("a" * 1000, 1)):
        with pytest.raises(LocalProtocolError):
            JobConnection(Role.INITIATOR, agent=agent, window_bytes=window_bytes)


def test_local_error_leaves_the_connection_unchanged() -> None:
    initiator, _ = greeted_pair()
    initiator.send(open_message())
    for message in (open_message(), rows(1), opened(), Close(session=session_id(1))):
        with pytest.raises(LocalProtocolError):
            initiator.send(message)
    assert initiator.session_state(SESSION) is SessionState.OPENING
    initiator.receive_data(wire(opened()))
    initiator.send(begin())
    with pytest.raises(LocalProtocolError, match="window"):
        initiator.send(step_message((session_id(1), 1), (SESSION, WINDOW_ROWS + 1)))
    assert initiator.session_state(session_id(1)) is SessionState.IDLE
    assert initiator.sendable_bytes(SESSION) == WINDOW


def test_connection_is_unusable_after_a_remote_error() -> None:
    initiator, _ = greeted_pair()
    initiator.send(open_message())
    with pytest.raises(RemoteProtocolError):
        initiator.receive_data(wire(opened()) + b"\xff" * 5)
    assert initiator.state is ConnectionState.ERROR
    assert initiator.sendable_bytes(session_id(1)) == 0
    for data in (wire(opened()), b""):
        with pytest.raises(RemoteProtocolError):
            initiator.receive_data(data)
    with pytest.raises(LocalProtocolError):
        initiator.send(close())


# Steps and their pieces


def test_control_messages_interleave_with_chunks_of_a_step() -> None:
    initiator, responder = greeted_pair(MAX_WINDOW_BYTES)
    width = 1 << 16
    tensor = Tensor(DType.INT8, (40, width), bytes(40 * width))
    message = Step(slices=(Slice(session=SESSION, position=0, rows=40),), tensor=tensor)
    first, second, *others = initiator.send(message)
    received = []
    for piece in (first, *initiator.send(Ping(nonce=1)), second, *initiator.send(open_message(session_id(1))), *others):
        received += responder.receive_data(piece)
    assert received == [Ping(nonce=1), open_message(session_id(1)), message]


def test_close_overtakes_the_chunks_of_the_last_step() -> None:
    initiator, responder = greeted_pair(MAX_WINDOW_BYTES)
    carry(initiator, responder, open_message())
    carry(responder, initiator, opened())
    carry(initiator, responder, begin())
    tensor = Tensor(DType.INT8, (20, 1 << 16), bytes(20 << 16))
    message = Step(slices=(Slice(session=SESSION, position=0, rows=20),), tensor=tensor)
    first, *others = initiator.send(message)
    data = b"".join([first, *initiator.send(close()), *others])
    assert responder.receive_data(data) == [close(), message]
    assert carry(responder, initiator, closed()) == [closed()]


def test_rejects_step_inside_a_step() -> None:
    responder = greeted(Role.RESPONDER)
    payload = step_message((SESSION, 2)).tensor.data
    header = encode_step_header(step_message((SESSION, 2)))
    begun = encode_frame(FrameType.STEP, len(header).to_bytes(4, "big"), header, payload[:9])
    assert responder.receive_data(begun) == []
    with pytest.raises(RemoteProtocolError, match="before the last one was complete"):
        responder.receive_data(wire(rows(1, session_id(1))))


@pytest.mark.parametrize("sent", [0, 1, 15, 16])
def test_rejects_step_payload_of_wrong_size(sent: int) -> None:
    responder = greeted(Role.RESPONDER)
    header = encode_step_header(step_message((SESSION, 2)))
    payload = bytes(range(ROW_BYTES)) * 2
    begun = encode_frame(FrameType.STEP, len(header).to_bytes(4, "big"), header, payload[:sent])
    rest = b"".join(encode_chunks(payload[sent:]))
    assert responder.receive_data(begun + rest) == [step_message((SESSION, 2))]
    with pytest.raises(RemoteProtocolError, match="without a step"):
        responder.receive_data(b"".join(encode_chunks(b"x")))
    responder = greeted(Role.RESPONDER)
    with pytest.raises(RemoteProtocolError, match=r"expected at most|without a step"):
        responder.receive_data(begun + b"".join(encode_chunks(payload[sent:] + b"x")))


@pytest.mark.parametrize("cut", [1, 4, 5, 20])
def test_rejects_end_of_stream_inside_a_message(cut: int) -> None:
    responder = greeted(Role.RESPONDER)
    responder.receive_data(wire(open_message())[:cut])
    with pytest.raises(RemoteProtocolError, match="middle"):
        responder.receive_data(b"")


def test_rejects_end_of_stream_inside_a_step() -> None:
    responder = greeted(Role.RESPONDER)
    header = encode_step_header(step_message((SESSION, 2)))
    responder.receive_data(encode_frame(FrameType.STEP, len(header).to_bytes(4, "big"), header))
    with pytest.raises(RemoteProtocolError, match="middle"):
        responder.receive_data(b"")


def test_refuses_data_after_the_end_of_the_stream() -> None:
    responder = greeted(Role.RESPONDER)
    assert responder.receive_data(b"") == []
    assert responder.receive_data(b"") == []
    with pytest.raises(LocalProtocolError, match="after the end"):
        responder.receive_data(wire(open_message()))


def test_step_of_64_mib_arrives_intact() -> None:
    initiator, responder = greeted_pair(MAX_WINDOW_BYTES)
    payload = random.Random(0).randbytes(MAX_STEP_BYTES)
    tensor = Tensor(DType.FLOAT32, (4096, 4096), payload)
    message = Step(slices=(Slice(session=SESSION, position=0, rows=4096, draws=0),), tensor=tensor)
    pieces = initiator.send(message)
    assert all(len(piece) <= MAX_FRAME_BYTES for piece in pieces)
    received: list[Message] = []
    for piece in pieces:
        for start in range(0, len(piece), 300_000):
            received += responder.receive_data(piece[start : start + 300_000])
    [step] = received
    assert isinstance(step, Step)
    assert step.slices == message.slices
    assert step.tensor.shape == tensor.shape
    assert step.tensor.data == payload


def test_announced_rows_allocate_no_memory_before_they_arrive() -> None:
    responder = greeted(Role.RESPONDER)
    large = Tensor(DType.INT8, (1024, 1 << 16), memoryview(bytes(1 << 26)))
    header = encode_step_header(Step(slices=(Slice(session=SESSION, position=0, rows=1024),), tensor=large))
    for window, connection in (("too small", responder), ("large", greeted_pair(MAX_WINDOW_BYTES)[1])):
        frame = encode_frame(FrameType.STEP, len(header).to_bytes(4, "big"), header, bytes(10))
        tracemalloc.start()
        if window == "large":
            assert connection.receive_data(frame) == []
        else:
            with pytest.raises(RemoteProtocolError, match="exceeds the window"):
                connection.receive_data(frame)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100_000


# Credit


def test_sender_stops_at_the_flow_control_window() -> None:
    initiator, responder = greeted_pair()
    carry(initiator, responder, open_message())
    assert initiator.sendable_bytes(SESSION) == 0
    carry(responder, initiator, opened())
    carry(initiator, responder, begin())
    assert initiator.sendable_bytes(SESSION) == WINDOW
    carry(initiator, responder, rows(WINDOW_ROWS - 1))
    assert initiator.sendable_bytes(SESSION) == ROW_BYTES
    with pytest.raises(LocalProtocolError, match="window"):
        initiator.send(rows(2))
    carry(initiator, responder, rows(1))
    assert initiator.sendable_bytes(SESSION) == 0
    carry(responder, initiator, credit(3))
    assert initiator.sendable_bytes(SESSION) == 3 * ROW_BYTES
    carry(initiator, responder, close())
    assert initiator.sendable_bytes(SESSION) == 0
    assert responder.sendable_bytes(SESSION) == 0


def test_flow_control_window_is_per_session() -> None:
    initiator, responder = greeted_pair()
    full, free = session_id(1), session_id(2)
    carry(initiator, responder, rows(WINDOW_ROWS, full))
    assert initiator.sendable_bytes(full) == 0
    assert initiator.sendable_bytes(free) == WINDOW
    assert carry(initiator, responder, rows(1, free)) == [rows(1, free)]
    with pytest.raises(LocalProtocolError, match="window"):
        initiator.send(step_message((free, 1), (full, 1)))
    assert initiator.sendable_bytes(free) == WINDOW - ROW_BYTES


def test_rejects_rows_beyond_the_flow_control_window() -> None:
    responder = greeted(Role.RESPONDER)
    responder.receive_data(wire(rows(WINDOW_ROWS)))
    with pytest.raises(RemoteProtocolError, match="exceeds the window by 8 bytes"):
        responder.receive_data(wire(rows(1)))


@pytest.mark.parametrize("is_open", [True, False])
def test_rejects_credit_for_bytes_that_were_not_sent(is_open: bool) -> None:
    initiator, responder = greeted_pair()
    if is_open:
        carry(initiator, responder, open_message())
        carry(responder, initiator, opened())
        carry(initiator, responder, begin())
    carry(initiator, responder, rows(2))
    with pytest.raises(LocalProtocolError, match="too much"):
        responder.send(credit(3))
    assert carry(responder, initiator, credit(1)) == [credit(1)]
    with pytest.raises(RemoteProtocolError, match="too much"):
        initiator.receive_data(wire(credit(2)))


def test_reroute_keeps_the_outstanding_bytes() -> None:
    initiator, responder = greeted_pair()
    carry(initiator, responder, open_message())
    carry(responder, initiator, opened())
    carry(initiator, responder, begin(), rows(2))
    carry(responder, initiator, reroute())
    assert initiator.sendable_bytes(SESSION) == WINDOW - 2 * ROW_BYTES
    assert carry(responder, initiator, credit(2)) == [credit(2)]
    assert initiator.sendable_bytes(SESSION) == WINDOW


# Sessions that somebody else opened


def test_rows_of_an_unknown_session_fail_only_that_session() -> None:
    initiator, responder = greeted_pair()
    assert carry(initiator, responder, rows(WINDOW_ROWS)) == [rows(WINDOW_ROWS)]
    assert carry(responder, initiator, failed()) == [failed()]
    assert initiator.session_count == responder.session_count == 0
    assert initiator.sendable_bytes(SESSION) == WINDOW
    # Two steps, both complained about.
    assert carry(initiator, responder, rows(1), rows(1)) == [rows(1), rows(1)]
    assert carry(responder, initiator, failed()) == [failed()]
    assert responder.send(failed()) == []


def test_forwarded_session_ends_with_its_last_credit() -> None:
    initiator, responder = greeted_pair()
    carry(initiator, responder, rows(2))
    carry(responder, initiator, credit(1))
    assert initiator.session_state(SESSION) is responder.session_state(SESSION) is SessionState.FORWARDED
    carry(responder, initiator, credit(1))
    assert initiator.session_count == responder.session_count == 0


def test_forgets_forwarded_session_at_either_end() -> None:
    initiator, responder = greeted_pair()
    carry(initiator, responder, rows(2))
    initiator.forget(SESSION)
    assert initiator.session_state(SESSION) is SessionState.IDLE
    # What the responder says before it forgets, too, crosses.
    assert carry(responder, initiator, credit(1), failed()) == []
    carry(initiator, responder, rows(2, session_id(1)))
    responder.forget(session_id(1))
    assert responder.session_count == 0
    assert responder.send(credit(2, session_id(1))) == []
    responder.forget(session_id(2))


def test_refuses_to_forget_an_opened_session() -> None:
    initiator, _ = greeted_pair()
    initiator.send(open_message())
    with pytest.raises(LocalProtocolError, match="cannot be forgotten"):
        initiator.forget(SESSION)


def test_rejects_open_of_a_forwarded_session() -> None:
    initiator, responder = greeted_pair()
    carry(initiator, responder, rows(3))
    with pytest.raises(LocalProtocolError, match="forwarded"):
        initiator.send(open_message())
    with pytest.raises(RemoteProtocolError, match="forwarded"):
        responder.receive_data(wire(open_message()))


# Messages that cross


def test_close_may_cross_every_answer_to_open() -> None:
    initiator, responder = greeted_pair()
    for answer, heard in ((opened(), []), (refused(), [refused()])):
        carry(initiator, responder, open_message())
        answer_pieces = responder.send(answer)
        close_pieces = initiator.send(close())
        assert initiator.receive_data(b"".join(answer_pieces)) == heard
        assert responder.receive_data(b"".join(close_pieces)) == ([close()] if not heard else [])
        if not heard:
            assert carry(responder, initiator, closed()) == [closed()]
        assert initiator.session_count == responder.session_count == 0


def test_close_may_cross_credit_and_failed() -> None:
    initiator, responder = greeted_pair()
    carry(initiator, responder, open_message())
    carry(responder, initiator, opened())
    carry(initiator, responder, begin())
    carry(initiator, responder, rows(2))
    answers = responder.send(credit(1)) + responder.send(failed())
    request = initiator.send(close())
    assert initiator.receive_data(b"".join(answers)) == [failed()]
    assert responder.receive_data(b"".join(request)) == []
    assert initiator.session_count == responder.session_count == 0


def test_session_lost_before_admission_is_refused() -> None:
    initiator, responder = greeted_pair()
    carry(initiator, responder, open_message())
    assert responder.send(failed()) == []
    assert carry(responder, initiator, refused()) == [refused()]
    assert initiator.session_count == responder.session_count == 0


def test_suppresses_late_answers() -> None:
    initiator, responder = greeted_pair()
    carry(initiator, responder, open_message(), close())
    assert responder.send(opened()) == responder.send(credit(1)) == []
    assert carry(responder, initiator, refused()) == [refused()]
    assert initiator.session_count == responder.session_count == 0


def test_rows_crossing_failed_do_not_affect_a_later_session() -> None:
    initiator, responder = greeted_pair()
    carry(initiator, responder, open_message())
    carry(responder, initiator, opened())
    carry(initiator, responder, begin())
    late = initiator.send(rows(WINDOW_ROWS))
    verdict = responder.send(failed())
    assert initiator.receive_data(b"".join(verdict)) == [failed()]
    with pytest.raises(LocalProtocolError):
        initiator.send(open_message())  # not before the failure is confirmed
    again = initiator.send(close()) + initiator.send(open_message())
    assert responder.receive_data(b"".join(late)) == [rows(WINDOW_ROWS)]
    assert responder.send(failed()) == []  # has been said before
    assert responder.receive_data(b"".join(again)) == [open_message()]
    assert carry(responder, initiator, opened()) == [opened()]
    carry(initiator, responder, begin())
    assert carry(initiator, responder, rows(WINDOW_ROWS)) == [rows(WINDOW_ROWS)]


# Bounds


def test_bounds_the_sessions_of_a_stream() -> None:
    initiator, responder = greeted_pair()
    for number in range(MAX_SESSIONS - 1):
        carry(initiator, responder, open_message(session_id(number)))
    carry(initiator, responder, rows(1, session_id(MAX_SESSIONS)))
    assert initiator.session_count == responder.session_count == MAX_SESSIONS
    one_more = session_id(MAX_SESSIONS + 1)
    assert initiator.sendable_bytes(one_more) == 0
    assert initiator.sendable_bytes(session_id(MAX_SESSIONS)) == WINDOW - ROW_BYTES
    for message in (open_message(one_more), rows(1, one_more)):
        with pytest.raises(LocalProtocolError, match="1024 sessions"):
            initiator.send(message)
    carry(responder, initiator, refused(session_id(0)))
    assert carry(initiator, responder, open_message(one_more)) == [open_message(one_more)]
    with pytest.raises(RemoteProtocolError, match="1024 sessions"):
        responder.receive_data(wire(rows(1, session_id(0))))


def test_step_with_too_many_new_sessions_changes_nothing() -> None:
    initiator, _ = greeted_pair()
    for number in range(MAX_SESSIONS - 1):
        initiator.send(open_message(session_id(number)))
    with pytest.raises(LocalProtocolError, match="1024 sessions"):
        initiator.send(step_message((session_id(5000), 1), (session_id(5001), 1)))
    assert initiator.session_count == MAX_SESSIONS - 1


def test_pongs_answer_pings_in_order() -> None:
    initiator, responder = greeted_pair()
    carry(initiator, responder, Ping(nonce=1), Ping(nonce=2))
    with pytest.raises(LocalProtocolError, match="does not answer"):
        responder.send(Pong(nonce=2))
    assert carry(responder, initiator, Pong(nonce=1), Pong(nonce=2)) == [Pong(nonce=1), Pong(nonce=2)]
    with pytest.raises(LocalProtocolError, match="does not answer"):
        responder.send(Pong(nonce=2))
    with pytest.raises(RemoteProtocolError, match="does not answer"):
        initiator.receive_data(wire(Pong(nonce=2)))


def test_bounds_outstanding_pings() -> None:
    initiator, responder = greeted_pair()
    for nonce in range(MAX_PINGS):
        carry(initiator, responder, Ping(nonce=nonce))
    with pytest.raises(LocalProtocolError, match="pings"):
        initiator.send(Ping(nonce=99))
    with pytest.raises(RemoteProtocolError, match="pings"):
        responder.receive_data(wire(Ping(nonce=99)))


LATER = [
    token_history(),
    progress_request(),
    progress(),
    replace(open_message(), sampling=Sampling(max_tokens=10, repetition_penalty=1.1)),
    replace(open_message(), sampling=Sampling(max_tokens=10, min_length=1)),
]


@pytest.mark.parametrize("protocol", PROTOCOL_IDS[1:])
@pytest.mark.parametrize("sampling", [Sampling(max_tokens=10, logprobs=1), Sampling(max_tokens=10, json_schema="{}")])
def test_earlier_versions_reject_additions_of_1_2(protocol: str, sampling: Sampling) -> None:
    responder = JobConnection(Role.RESPONDER, agent="test", window_bytes=WINDOW, protocol=protocol)
    responder.send_hello()
    responder.receive_data(wire(hello()))
    with pytest.raises(RemoteProtocolError, match="version 1"):
        responder.receive_data(wire(replace(open_message(), sampling=sampling)))


@pytest.mark.parametrize("fields", [{"reasoning_end": 3}, {"json_schema": "{}", "reasoning_begin": 3}])
def test_reasoning_without_json_behind_it_is_rejected(fields: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError, match="reasoning_end belongs to a JSON Schema"):
        wire(replace(open_message(), sampling=Sampling(max_tokens=10, **fields)))


@pytest.mark.parametrize("message", LATER, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("role", Role)
def test_version_1_0_rejects_additions_of_1_1(role: Role, message: Message) -> None:
    connection = JobConnection(role, agent="test", window_bytes=WINDOW, protocol="/metaswarm/job/1.0.0")
    connection.send_hello()
    connection.receive_data(wire(hello()))
    with pytest.raises(LocalProtocolError, match=r"version 1\.0"):
        connection.send(message)
    with pytest.raises(RemoteProtocolError, match=r"version 1\.0"):
        connection.receive_data(wire(message))


def test_neutral_sampling_is_the_same_in_every_version() -> None:
    sent = set()
    for protocol in PROTOCOL_IDS:
        initiator = JobConnection(Role.INITIATOR, agent="test", window_bytes=WINDOW, protocol=protocol)
        initiator.send_hello()
        initiator.receive_data(wire(hello()))
        sent.add(b"".join(initiator.send(open_message())))
    assert len(sent) == 1


def test_explicit_neutral_sampling_field_is_refused() -> None:
    responder = greeted(Role.RESPONDER)
    named = wire(replace(open_message(), sampling=Sampling(max_tokens=10, top_k=1)))
    with pytest.raises(RemoteProtocolError, match="top_k"):
        responder.receive_data(named.replace(b"\xa5top_k\x01", b"\xa5top_k\x00"))


# Rows that are not taken


def greeted_responder(admitted: Callable[[SessionId], bool], window_bytes: int) -> JobConnection:
    """Return a responder that takes rows of some sessions only."""
    responder = JobConnection(
        Role.RESPONDER,
        agent="test",
        window_bytes=window_bytes,
        admission=lambda header: [admitted(part.session) for part in header.slices],
    )
    responder.send_hello()
    responder.receive_data(wire(hello(window_bytes)))
    return responder


def test_rows_that_are_not_admitted_are_dropped_from_their_step() -> None:
    wanted = {session_id(1), session_id(3)}
    counts = [(session_id(number), number + 1) for number in range(5)]
    step = step_message(*counts)
    data = wire(step)
    for size in (1, 7, len(data)):
        responder = greeted_responder(wanted.__contains__, WINDOW)
        heard = [m for start in range(0, len(data), size) for m in responder.receive_data(data[start : start + size])]
        (got,) = heard
        assert isinstance(got, Step)
        assert [part.session for part in got.slices] == [session_id(1), session_id(3)]
        starts = {number: sum(range(number + 1)) for number in range(5)}
        right = b"".join(bytes(step.tensor.cut(starts[n], starts[n] + n + 1).data) for n in (1, 3))
        assert bytes(got.tensor.data) == right
        assert responder.receive_data(wire(Ping(nonce=1))) == [Ping(nonce=1)]


def test_steps_that_are_not_admitted_are_not_buffered() -> None:
    responder = greeted_responder(lambda _: False, MAX_WINDOW_BYTES)
    shape = (MAX_STEP_BYTES // 4096, 1024)
    pieces = [bytes(1 << 20)] * (MAX_STEP_BYTES >> 20)
    part = Slice(session=SESSION, position=0, rows=shape[0], draws=0)
    header = encode_step_header(Step(slices=(part,), tensor=Tensor(DType.FLOAT32, shape, bytes(MAX_STEP_BYTES))))
    tracemalloc.start()
    try:
        step_frame = encode_frame(FrameType.STEP, len(header).to_bytes(4, "big"), header, b"\0")
        assert responder.receive_data(step_frame) == []
        left = MAX_STEP_BYTES - 1
        for piece in pieces[:-1]:
            for chunk in encode_chunks(piece):
                assert responder.receive_data(chunk) == []
            left -= len(piece)
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
        for chunk in encode_chunks(bytes(left)):
            assert responder.receive_data(chunk) == []
        assert responder.receive_data(wire(Ping(nonce=1))) == [Ping(nonce=1)]
    finally:
        tracemalloc.stop()
