import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import decode_control, decode_step_header, encode_control, encode_step_header
from protocol.connection import JobConnection
from protocol.errors import RemoteProtocolError
from protocol.framing import Frame, FrameReader, FrameType
from protocol.limits import MAX_CONTROL_BYTES
from protocol.messages import ControlMessage, Message, Step
from protocol.states import ConnectionState, Role, SessionState
from tests.property.strategies import control_messages, pieces, steps
from tests.unit.protocol.job_streams import (
    SESSION,
    begin,
    close,
    closed,
    credit,
    hello,
    new_connection,
    open_message,
    opened,
    rows,
    session_id,
    step_message,
    wire,
)


@given(control_messages)
def test_control_message_round_trip(message: ControlMessage) -> None:
    body = encode_control(message)
    assert len(body) <= MAX_CONTROL_BYTES
    assert decode_control(body) == message


@given(steps())
def test_step_round_trip(step: Step) -> None:
    assert decode_step_header(encode_step_header(step)).step(bytes(step.tensor.data)) == step


@given(st.lists(control_messages, max_size=5), st.data())
def test_frames_survive_any_fragmentation(messages: list[ControlMessage], data: st.DataObject) -> None:
    reader = FrameReader()
    frames: list[Frame] = []
    for piece in data.draw(pieces(wire(*messages))):
        frames += reader.receive_data(piece)
    assert reader.at_boundary
    assert [decode_control(frame.body) for frame in frames] == messages
    assert {frame.type for frame in frames} <= {FrameType.CONTROL}


@given(steps(), st.data())
def test_steps_survive_any_fragmentation(step: Step, data: st.DataObject) -> None:
    initiator, responder = new_connection(Role.INITIATOR), new_connection(Role.RESPONDER, 1 << 20)
    initiator.send_hello()
    initiator.receive_data(b"".join(responder.send_hello()))
    received: list[Message] = []
    for piece in data.draw(pieces(wire(hello()) + b"".join(initiator.send(step)))):
        received += responder.receive_data(piece)
    assert received == [hello(), step]


# What a peer may get to read in the course of a session, for each role.
TO_RESPONDER = wire(
    hello(), open_message(), step_message((session_id(1), 2), (session_id(2), 1)), rows(1, session_id(1)), close()
)
TO_INITIATOR = wire(hello(), opened(), credit(1), closed())


def reader_of(role: Role) -> JobConnection:
    connection = new_connection(role)
    connection.send_hello()
    if role is Role.INITIATOR:
        connection.send(open_message())
    return connection


def feed(role: Role, chunks: list[bytes]) -> JobConnection:
    """Feed a connection to the end of the stream, and play the application's part so that the bytes are legal."""
    connection = reader_of(role)
    for chunk in chunks:
        for message in connection.receive_data(chunk):
            if message == open_message() and connection.session_state(SESSION) is SessionState.OPENING:
                connection.send(opened())
            if message == opened():
                connection.send(begin())
                connection.send(rows(1))
                connection.send(close())
    connection.receive_data(b"")
    return connection


@given(st.sampled_from(Role), st.data())
def test_damaged_bytes_raise_only_remote_errors(role: Role, data: st.DataObject) -> None:
    damaged = bytearray(TO_RESPONDER if role is Role.RESPONDER else TO_INITIATOR)
    for _ in range(data.draw(st.integers(1, 3))):
        if not damaged:
            break
        position = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.sampled_from(["change", "insert", "delete", "cut"])):
            case "change":
                damaged[position] = data.draw(st.integers(0, 255))
            case "insert":
                damaged[position:position] = data.draw(st.binary(max_size=8))
            case "delete":
                del damaged[position : position + data.draw(st.integers(1, 8))]
            case _:
                del damaged[position + 1 :]
    with suppress(RemoteProtocolError):
        feed(role, data.draw(pieces(bytes(damaged))))


@settings(max_examples=50)
@given(st.sampled_from(Role), st.binary(max_size=2000), st.data())
def test_garbage_allocates_little_memory(role: Role, garbage: bytes, data: st.DataObject) -> None:
    chunks = data.draw(pieces(wire(hello()) + garbage))
    tracemalloc.start()
    try:
        with suppress(RemoteProtocolError):
            feed(role, chunks)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("role", Role)
def test_undamaged_bytes_are_accepted(role: Role) -> None:
    """The ground of the tests above: what they damage is legal."""
    data = TO_RESPONDER if role is Role.RESPONDER else TO_INITIATOR
    connection = feed(role, [data[place : place + 1] for place in range(len(data))])
    assert connection.state is ConnectionState.CLOSED
