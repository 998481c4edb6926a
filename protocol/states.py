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
    Progress,
    ProgressRequest,
    Refused,
    Reroute,
    Step,
    TokenHistory,
)


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
_WORK: Final = (Open, TokenHistory, Begin, Step, ProgressRequest, Close, Ping)
_ANSWERS: Final = (Opened, Refused, Credit, Progress, Reroute, Failed, Closed, Pong)

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

SESSION_TABLE: Final[Mapping[tuple[Role, SessionState, MessageType, Direction], Transition]] = {
    (_I, _IDLE, Open, _SENT): Transition(_OPENING),
    (_I, _IDLE, Step, _SENT): Transition(_FORWARDED),
    # Answers to rows of a session that we have forgotten meanwhile, or that had already failed.
    (_I, _IDLE, Credit, _RECEIVED): Transition(_IDLE, quiet=True),
    (_I, _IDLE, Failed, _RECEIVED): Transition(_IDLE, quiet=True),
    (_I, _OPENING, Opened, _RECEIVED): Transition(_OPEN),
    (_I, _OPENING, Refused, _RECEIVED): Transition(_IDLE),
    (_I, _OPENING, Close, _SENT): Transition(_CLOSING),
    (_I, _OPEN, TokenHistory, _SENT): Transition(_OPEN),
    (_I, _OPEN, Begin, _SENT): Transition(_BEGUN),
    (_I, _OPEN, Failed, _RECEIVED): Transition(_FAILED),
    (_I, _OPEN, Close, _SENT): Transition(_CLOSING),
    (_I, _BEGUN, Step, _SENT): Transition(_BEGUN),
    (_I, _BEGUN, Credit, _RECEIVED): Transition(_BEGUN),
    (_I, _BEGUN, ProgressRequest, _SENT): Transition(_BEGUN),
    (_I, _BEGUN, Progress, _RECEIVED): Transition(_BEGUN),
    (_I, _BEGUN, Reroute, _RECEIVED): Transition(_BEGUN),
    (_I, _BEGUN, Failed, _RECEIVED): Transition(_FAILED),
    (_I, _BEGUN, Close, _SENT): Transition(_CLOSING),
    # Forwarded becomes idle by itself once everything sent has been credited.
    (_I, _FORWARDED, Step, _SENT): Transition(_FORWARDED),
    (_I, _FORWARDED, Credit, _RECEIVED): Transition(_FORWARDED),
    (_I, _FORWARDED, Failed, _RECEIVED): Transition(_IDLE),
    # Sent by the responder before our Close arrived; one of Refused, Failed and Closed comes, and is the last.
    (_I, _CLOSING, Opened, _RECEIVED): Transition(_CLOSING, quiet=True),
    (_I, _CLOSING, Credit, _RECEIVED): Transition(_CLOSING, quiet=True),
    (_I, _CLOSING, Progress, _RECEIVED): Transition(_CLOSING, quiet=True),
    (_I, _CLOSING, Reroute, _RECEIVED): Transition(_CLOSING, quiet=True),
    (_I, _CLOSING, Refused, _RECEIVED): Transition(_IDLE),
    (_I, _CLOSING, Failed, _RECEIVED): Transition(_IDLE),
    (_I, _CLOSING, Closed, _RECEIVED): Transition(_IDLE),
    (_I, _FAILED, Close, _SENT): Transition(_IDLE),
    (_R, _IDLE, Open, _RECEIVED): Transition(_OPENING),
    (_R, _IDLE, Step, _RECEIVED): Transition(_FORWARDED),
    # The initiator had not yet seen our Refused.
    (_R, _IDLE, Close, _RECEIVED): Transition(_IDLE, quiet=True),
    # Rows were consumed, or found to be of an unknown session, after it was forgotten: there is no credit to settle.
    (_R, _IDLE, Credit, _SENT): Transition(_IDLE, quiet=True),
    (_R, _IDLE, Progress, _SENT): Transition(_IDLE, quiet=True),
    (_R, _IDLE, Reroute, _SENT): Transition(_IDLE, quiet=True),
    (_R, _IDLE, Failed, _SENT): Transition(_IDLE, quiet=True),
    (_R, _OPENING, Opened, _SENT): Transition(_OPEN),
    (_R, _OPENING, Refused, _SENT): Transition(_IDLE),
    (_R, _OPENING, Close, _RECEIVED): Transition(_CLOSING),
    # Lost before it was admitted: the answer to the Open is still due, which is Refused.
    (_R, _OPENING, Failed, _SENT): Transition(_OPENING, quiet=True),
    (_R, _OPEN, TokenHistory, _RECEIVED): Transition(_OPEN),
    (_R, _OPEN, Begin, _RECEIVED): Transition(_BEGUN),
    (_R, _OPEN, Failed, _SENT): Transition(_FAILED),
    (_R, _OPEN, Close, _RECEIVED): Transition(_CLOSING),
    (_R, _BEGUN, Step, _RECEIVED): Transition(_BEGUN),
    (_R, _BEGUN, Credit, _SENT): Transition(_BEGUN),
    (_R, _BEGUN, ProgressRequest, _RECEIVED): Transition(_BEGUN),
    (_R, _BEGUN, Progress, _SENT): Transition(_BEGUN),
    (_R, _BEGUN, Reroute, _SENT): Transition(_BEGUN),
    (_R, _BEGUN, Failed, _SENT): Transition(_FAILED),
    (_R, _BEGUN, Close, _RECEIVED): Transition(_CLOSING),
    (_R, _FORWARDED, Step, _RECEIVED): Transition(_FORWARDED),
    (_R, _FORWARDED, Credit, _SENT): Transition(_FORWARDED),
    (_R, _FORWARDED, Failed, _SENT): Transition(_IDLE),
    # Rows that another task of the initiator sent late. They are delivered; no credit is due for them.
    (_R, _CLOSING, Step, _RECEIVED): Transition(_CLOSING),
    (_R, _CLOSING, Opened, _SENT): Transition(_CLOSING, quiet=True),
    (_R, _CLOSING, Credit, _SENT): Transition(_CLOSING, quiet=True),
    (_R, _CLOSING, Progress, _SENT): Transition(_CLOSING, quiet=True),
    (_R, _CLOSING, Reroute, _SENT): Transition(_CLOSING, quiet=True),
    (_R, _CLOSING, Refused, _SENT): Transition(_IDLE),
    (_R, _CLOSING, Failed, _SENT): Transition(_IDLE),
    (_R, _CLOSING, Closed, _SENT): Transition(_IDLE),
    # TokenHistory, Begin, rows, ProgressRequest and a second Failed or Reroute cross our Failed; the Close that
    # confirms it needs no answer.
    (_R, _FAILED, TokenHistory, _RECEIVED): Transition(_FAILED, quiet=True),
    (_R, _FAILED, Begin, _RECEIVED): Transition(_FAILED, quiet=True),
    (_R, _FAILED, Step, _RECEIVED): Transition(_FAILED),
    (_R, _FAILED, Credit, _SENT): Transition(_FAILED, quiet=True),
    (_R, _FAILED, ProgressRequest, _RECEIVED): Transition(_FAILED, quiet=True),
    (_R, _FAILED, Progress, _SENT): Transition(_FAILED, quiet=True),
    (_R, _FAILED, Reroute, _SENT): Transition(_FAILED, quiet=True),
    (_R, _FAILED, Failed, _SENT): Transition(_FAILED, quiet=True),
    (_R, _FAILED, Close, _RECEIVED): Transition(_IDLE, quiet=True),
}
