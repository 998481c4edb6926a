"""Every message in every state of either end: the tables' transitions happen, and everything else is an error."""

import itertools
from collections.abc import Callable

import pytest

from protocol.connection import JobConnection
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.messages import (
    Begin,
    Close,
    Closed,
    Credit,
    Failed,
    Hello,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    Refused,
    Reroute,
    Step,
    TokenHistory,
)
from protocol.reports import Progress, ProgressRequest, Timings, TimingsRequest
from protocol.states import CONNECTION_TABLE, SESSION_TABLE, ConnectionState, Direction, Role, SessionState
from tests.unit.protocol.job_streams import (
    EVERY_MESSAGE,
    SESSION,
    begin,
    close,
    failed,
    greeted,
    hello,
    new_connection,
    open_message,
    opened,
    rows,
    wire,
)

# How each end gets into each state of a session.
ROADS: dict[SessionState, list[Message]] = {
    SessionState.IDLE: [],
    SessionState.OPENING: [open_message()],
    SessionState.OPEN: [open_message(), opened()],
    SessionState.BEGUN: [open_message(), opened(), begin(), rows(2)],
    SessionState.FORWARDED: [rows(2)],
    SessionState.CLOSING: [open_message(), opened(), close()],
    SessionState.FAILED: [open_message(), opened(), failed()],
}
FROM_INITIATOR = (Open, Begin, Step, Close, Ping)


def pass_on(connection: JobConnection, message: Message) -> None:
    """Have the connection send or receive a message, whichever is its part."""
    if isinstance(message, FROM_INITIATOR) == (connection.role is Role.INITIATOR):
        connection.send(message)
    else:
        connection.receive_data(wire(message))


def in_session_state(role: Role, state: SessionState) -> JobConnection:
    connection = greeted(role)
    for message in ROADS[state]:
        pass_on(connection, message)
    assert connection.session_state(SESSION) is state
    return connection


def in_connection_state(role: Role, state: ConnectionState) -> JobConnection:
    connection = new_connection(role)
    if state in {ConnectionState.HELLO_SENT, ConnectionState.OPEN}:
        connection.send_hello()
    if state in {ConnectionState.HELLO_RECEIVED, ConnectionState.OPEN}:
        connection.receive_data(wire(hello()))
    if state is ConnectionState.CLOSED:
        connection.receive_data(b"")
    if state is ConnectionState.ERROR:
        with pytest.raises(RemoteProtocolError):
            connection.receive_data(b"\xff" * 5)
    assert connection.state is state
    return connection


def assert_illegal(connection: JobConnection, message: Message, direction: Direction) -> None:
    state, session_state = connection.state, connection.session_state(SESSION)
    if direction is Direction.SENT:
        with pytest.raises(LocalProtocolError):
            connection.send(message)
        assert (connection.state, connection.session_state(SESSION)) == (state, session_state)
    else:
        # After the end of the stream it is our own fault to feed more of it.
        expected = LocalProtocolError if state is ConnectionState.CLOSED else RemoteProtocolError
        with pytest.raises(expected):
            connection.receive_data(wire(message))
        assert connection.state is (state if state is ConnectionState.CLOSED else ConnectionState.ERROR)


SESSION_MESSAGES = [message for message in EVERY_MESSAGE if not isinstance(message, (Hello, Ping, Pong))]
IN_EVERY_SESSION_STATE = pytest.mark.parametrize(
    ("role", "state", "message", "direction"),
    [
        pytest.param(*case, id="-".join((case[0], case[1], type(case[2]).__name__, case[3])))
        for case in itertools.product(Role, SessionState, SESSION_MESSAGES, Direction)
    ],
)
IN_EVERY_CONNECTION_STATE = pytest.mark.parametrize(
    ("role", "state", "message", "direction"),
    [
        pytest.param(*case, id="-".join((case[0], case[1], type(case[2]).__name__, case[3])).replace(" ", "_"))
        for case in itertools.product(Role, ConnectionState, EVERY_MESSAGE, Direction)
    ],
)


@IN_EVERY_SESSION_STATE
def test_session_table_for_every_message_and_state(
    role: Role, state: SessionState, message: Message, direction: Direction
) -> None:
    connection = in_session_state(role, state)
    transition = SESSION_TABLE.get((role, state, type(message), direction))
    if transition is None:
        assert_illegal(connection, message, direction)
        return
    if direction is Direction.SENT:
        assert connection.send(message) == ([] if transition.quiet else [wire(message)])
    else:
        assert connection.receive_data(wire(message)) == ([] if transition.quiet else [message])
    assert connection.session_state(SESSION) is transition.next
    assert connection.state is ConnectionState.OPEN


@IN_EVERY_CONNECTION_STATE
def test_connection_table_for_every_message_and_state(
    role: Role, state: ConnectionState, message: Message, direction: Direction
) -> None:
    connection = in_connection_state(role, state)
    following = CONNECTION_TABLE.get((role, state, type(message), direction))
    if following is None:
        assert_illegal(connection, message, direction)
        return
    if isinstance(message, Pong) or (role, SessionState.IDLE, type(message), direction) not in SESSION_TABLE:
        _prepare(connection, message)
    if direction is Direction.SENT:
        connection.send(message)
    else:
        connection.receive_data(wire(message))
    assert connection.state is following


def _prepare(connection: JobConnection, message: Message) -> None:
    """Bring about what a message needs in order to be legal on a connection in a state where it may be sent."""
    needs: dict[type[Message], list[Message]] = {
        Pong: [Ping(nonce=1)],
        Opened: [open_message()],
        Refused: [open_message()],
        Begin: [open_message(), opened()],
        Close: [open_message()],
        Closed: [open_message(), close()],
        TokenHistory: [open_message(), opened()],
        ProgressRequest: [open_message(), opened(), begin()],
        Progress: [open_message(), opened(), begin()],
        TimingsRequest: [open_message(), opened(), begin()],
        Timings: [open_message(), opened(), begin()],
        Reroute: [open_message(), opened(), begin()],
    }
    for earlier in needs.get(type(message), []):
        pass_on(connection, earlier)


def test_every_table_entry_is_reachable() -> None:
    sessions = {(role, state) for role, state, _, _ in SESSION_TABLE}
    assert sessions == set(itertools.product(Role, SessionState))
    connections = {(role, state) for role, state, _, _ in CONNECTION_TABLE}
    assert connections == set(
        itertools.product(Role, set(ConnectionState) - {ConnectionState.CLOSED, ConnectionState.ERROR})
    )


def test_sent_messages_are_accepted_by_the_other_end() -> None:
    """In equal states; what crosses on its way is the business of the tests of the whole stream."""
    for (role, state, message_type, direction), transition in SESSION_TABLE.items():
        if direction is Direction.SENT and not transition.quiet:
            other = Role.RESPONDER if role is Role.INITIATOR else Role.INITIATOR
            mirrored = SESSION_TABLE[other, state, message_type, Direction.RECEIVED]
            assert mirrored.next is transition.next, (role, state, message_type)


@pytest.mark.parametrize("make", [lambda: hello(1), lambda: Hello(agent="other", window_bytes=64)])
def test_refuses_to_send_another_hello(make: Callable[[], Hello]) -> None:
    connection = new_connection(Role.INITIATOR)
    with pytest.raises(LocalProtocolError, match="own"):
        connection.send(make())
    assert connection.send_hello() == [wire(hello())]


def test_only_credit_and_failed_are_sent_without_an_open() -> None:
    answers = {
        message_type
        for role, state, message_type, direction in SESSION_TABLE
        if role is Role.INITIATOR and state is SessionState.IDLE and direction is Direction.RECEIVED
    }
    assert answers == {Credit, Failed}
