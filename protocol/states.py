"""State machines of a job stream: two tables from (role, state, message, direction) to the next state.

The first is of the connection: hello from both ends, then work from the initiator and answers from the responder. The
second is of each session on it. A message that is not in the tables is a fault of its sender.

Messages of the two ends cross on their way. The entries that allow for this are `quiet`: such a message is dropped when
it is received, and suppressed when it is to be sent. Three rules keep crossing messages unambiguous:

- Every Open is answered by exactly one final message: Refused, Failed or Closed. Close is a request; a responder that
  has sent Refused or Failed sends no further answer.
- After Failed both ends remember the session until the initiator's Close, which follows the rows that were still under
  way, so that answers to those are not mistaken for new ones.
- A session is not opened on a stream on which rows of it were sent before: an answer to those rows could be mistaken
  for one to the Open. Coordinators choose a new job id for every route.
"""

import enum
from collections.abc import Mapping
from typing import Final, NamedTuple, TypeAlias

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


class Role(enum.StrEnum):
    """An end of a stream."""

    INITIATOR = "initiator"
    """Opened the stream: sends work."""
    RESPONDER = "responder"
    """Answers with admission, credit and failures."""


class Direction(enum.StrEnum):
    """Which way a message goes, seen from us."""

    SENT = "sent"
    RECEIVED = "received"


class ConnectionState(enum.StrEnum):
    """State of a stream."""

    NEW = "new"
    """No Hello was sent."""
    HELLO_SENT = "hello sent"
    HELLO_RECEIVED = "hello received"
    OPEN = "open"
    CLOSED = "closed"
    """The remote ended the stream, between two messages."""
    ERROR = "error"
    """The remote broke the protocol."""


class SessionState(enum.StrEnum):
    """State of a session on one stream; the same peers may know it from other streams too."""

    IDLE = "idle"
    """Unknown on this stream."""
    OPENING = "opening"
    """Requested, not yet admitted."""
    OPEN = "open"
    """Admitted, not yet begun."""
    BEGUN = "begun"
    """The method is agreed: rows may flow."""
    FORWARDED = "forwarded"
    """Opened by another peer over another stream; rows of it were sent here and are not yet all credited."""
    CLOSING = "closing"
    """The initiator closes it, the responder has not yet confirmed."""
    FAILED = "failed"
    """The responder has lost it, the initiator has not yet confirmed by Close."""


class Transition(NamedTuple):
    """The next state, and whether the message is dropped or suppressed."""

    next: SessionState
    quiet: bool = False


MessageType: TypeAlias = type[Message]
_Following: TypeAlias = SessionState | Transition | None
_Events: TypeAlias = Mapping[MessageType, _Following]

_I, _R = Role.INITIATOR, Role.RESPONDER
_SENT, _RECEIVED = Direction.SENT, Direction.RECEIVED
_NEW, _HELLO_SENT, _HELLO_RECEIVED, _CONNECTED = (
    ConnectionState.NEW,
    ConnectionState.HELLO_SENT,
    ConnectionState.HELLO_RECEIVED,
    ConnectionState.OPEN,
)
_IDLE, _OPENING, _OPEN, _BEGUN, _FORWARDED, _CLOSING, _FAILED = SessionState

_HELLOS: Final = {
    (_NEW, Hello, _SENT): _HELLO_SENT,
    (_NEW, Hello, _RECEIVED): _HELLO_RECEIVED,
    (_HELLO_SENT, Hello, _RECEIVED): _CONNECTED,
    (_HELLO_RECEIVED, Hello, _SENT): _CONNECTED,
}
# The initiator need not await the responder's Hello, except for steps, which depend on its window.
_EARLY: Final = (Open, Close, Ping)
_WORK: Final = (Open, TokenHistory, Begin, Step, ProgressRequest, TimingsRequest, Close, Ping)
_ANSWERS: Final = (Opened, Refused, Credit, Progress, Timings, Reroute, Failed, Closed, Pong)

_ConnectionTable: TypeAlias = Mapping[tuple[Role, ConnectionState, MessageType, Direction], ConnectionState]


def _connection_rows(role: Role, half: ConnectionState, forth: Direction, back: Direction) -> _ConnectionTable:
    """Return the rows of one end: `half` of the hellos are exchanged, work goes `forth` and answers come `back`."""
    return {
        **{(role, *event): state for event, state in _HELLOS.items()},
        **{(role, half, message, forth): half for message in _EARLY},
        **{(role, _CONNECTED, message, forth): _CONNECTED for message in _WORK},
        **{(role, _CONNECTED, message, back): _CONNECTED for message in _ANSWERS},
    }


CONNECTION_TABLE: Final[_ConnectionTable] = {
    **_connection_rows(_I, _HELLO_SENT, _SENT, _RECEIVED),
    **_connection_rows(_R, _HELLO_RECEIVED, _RECEIVED, _SENT),
}

_Q: Final = None
"""The message is quiet, and the state stays."""

# Of each role and state: what follows the messages that it may send, and those that it may receive.
_SESSIONS: Final[Mapping[tuple[Role, SessionState], tuple[_Events, _Events]]] = {
    # Credit and Failed answer rows of a session that we have forgotten meanwhile, or that had already failed.
    (_I, _IDLE): ({Open: _OPENING, Step: _FORWARDED}, {Credit: _Q, Failed: _Q}),
    (_I, _OPENING): ({Close: _CLOSING}, {Opened: _OPEN, Refused: _IDLE}),
    (_I, _OPEN): ({TokenHistory: _OPEN, Begin: _BEGUN, Close: _CLOSING}, {Failed: _FAILED}),
    (_I, _BEGUN): (
        {Step: _BEGUN, ProgressRequest: _BEGUN, TimingsRequest: _BEGUN, Close: _CLOSING},
        {Credit: _BEGUN, Progress: _BEGUN, Timings: _BEGUN, Reroute: _BEGUN, Failed: _FAILED},
    ),
    # Forwarded becomes idle by itself once everything sent has been credited.
    (_I, _FORWARDED): ({Step: _FORWARDED}, {Credit: _FORWARDED, Failed: _IDLE}),
    # Sent by the responder before our Close arrived; one of Refused, Failed and Closed comes, and is the last.
    (_I, _CLOSING): (
        {},
        {Opened: _Q, Credit: _Q, Progress: _Q, Timings: _Q, Reroute: _Q, Refused: _IDLE, Failed: _IDLE, Closed: _IDLE},
    ),
    (_I, _FAILED): ({Close: _IDLE}, {}),
    # Rows were consumed, or found to be of an unknown session, after it was forgotten: there is no credit to settle. A
    # Close comes from an initiator that has not yet received our Refused.
    (_R, _IDLE): (
        {Credit: _Q, Progress: _Q, Timings: _Q, Reroute: _Q, Failed: _Q},
        {Open: _OPENING, Step: _FORWARDED, Close: _Q},
    ),
    # Lost before it was admitted: the answer to the Open is still due, which is Refused.
    (_R, _OPENING): ({Opened: _OPEN, Refused: _IDLE, Failed: _Q}, {Close: _CLOSING}),
    (_R, _OPEN): ({Failed: _FAILED}, {TokenHistory: _OPEN, Begin: _BEGUN, Close: _CLOSING}),
    (_R, _BEGUN): (
        {Credit: _BEGUN, Progress: _BEGUN, Timings: _BEGUN, Reroute: _BEGUN, Failed: _FAILED},
        {Step: _BEGUN, ProgressRequest: _BEGUN, TimingsRequest: _BEGUN, Close: _CLOSING},
    ),
    (_R, _FORWARDED): ({Credit: _FORWARDED, Failed: _IDLE}, {Step: _FORWARDED}),
    # Rows that another task of the initiator sent late are delivered; no credit is due for them.
    (_R, _CLOSING): (
        {Opened: _Q, Credit: _Q, Progress: _Q, Timings: _Q, Reroute: _Q, Refused: _IDLE, Failed: _IDLE, Closed: _IDLE},
        {Step: _CLOSING},
    ),
    # TokenHistory, Begin, rows, requests of progress and timings and a second Failed or Reroute cross our Failed. The
    # Close that confirms it needs no answer.
    (_R, _FAILED): (
        {Credit: _Q, Progress: _Q, Timings: _Q, Reroute: _Q, Failed: _Q},
        {
            TokenHistory: _Q,
            Begin: _Q,
            Step: _FAILED,
            ProgressRequest: _Q,
            TimingsRequest: _Q,
            Close: Transition(_IDLE, quiet=True),
        },
    ),
}


def _transition(state: SessionState, following: _Following) -> Transition:
    if isinstance(following, Transition):
        return following
    return Transition(state, quiet=True) if following is None else Transition(following)


SESSION_TABLE: Final[Mapping[tuple[Role, SessionState, MessageType, Direction], Transition]] = {
    (role, state, message, direction): _transition(state, following)
    for (role, state), events in _SESSIONS.items()
    for direction, messages in zip(Direction, events, strict=True)
    for message, following in messages.items()
}
