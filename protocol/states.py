"""Who may say what when on a job stream: two tables from (role, state, message, direction) to what follows.

The first is of the connection: hello from both ends, then work from the initiator and answers from the responder. The
second is of each session on it. What is not in a table is a fault of whoever said it.

Messages of the two ends cross on their way. The entries that allow for this are `quiet`: such a message is not passed
on when it is received, and not put on the wire when we are about to send it. Three rules keep what crosses unambiguous:

- Every Open is answered by exactly one end: Refused, Failed or Closed. Close is a request; a responder that has already
  said Refused or Failed says nothing more.
- After Failed both ends remember the session until the initiator's Close, which follows whatever rows were still under
  way, so that nothing said about those is taken for something new.
- A session is not opened on a stream on which rows of it were sent before: an answer to those rows could be taken for
  one to the Open. Coordinators have no need to, because they choose a fresh job id for every route.
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
    """Which end of the stream we are."""

    INITIATOR = "initiator"
    """Opened the stream: sends work."""
    RESPONDER = "responder"
    """Answers with admission, credit and failures."""


class Direction(enum.StrEnum):
    """Which way a message goes, seen from us."""

    SENT = "sent"
    RECEIVED = "received"


class ConnectionState(enum.StrEnum):
    """How far the stream is."""

    NEW = "new"
    """Nobody has said hello."""
    HELLO_SENT = "hello sent"
    HELLO_RECEIVED = "hello received"
    OPEN = "open"
    CLOSED = "closed"
    """The remote ended the stream, between two messages."""
    ERROR = "error"
    """The remote broke the protocol."""


class SessionState(enum.StrEnum):
    """How far a session is on this stream; the same peers may know it by other streams too."""

    IDLE = "idle"
    """Nothing is known of it here."""
    OPENING = "opening"
    """Asked for, not yet admitted."""
    OPEN = "open"
    """Admitted; it has yet to begin."""
    BEGUN = "begun"
    """The method is agreed: rows may flow."""
    LENT = "lent"
    """Opened by somebody else over another stream; rows of it were sent here and are not yet all consumed."""
    CLOSING = "closing"
    """The initiator wants it closed, the responder has not yet confirmed."""
    FAILED = "failed"
    """The responder has given it up, the initiator has not yet confirmed by Close."""


class Transition(NamedTuple):
    """The state that follows, and whether the message is kept quiet."""

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
_IDLE, _OPENING, _OPEN, _BEGUN, _LENT, _CLOSING, _FAILED = SessionState

CONNECTION_TABLE: Final[Mapping[tuple[Role, ConnectionState, MessageType, Direction], ConnectionState]] = {
    (_I, _NEW, Hello, _SENT): _HELLO_SENT,
    (_I, _NEW, Hello, _RECEIVED): _HELLO_RECEIVED,
    (_I, _HELLO_SENT, Hello, _RECEIVED): _CONNECTED,
    (_I, _HELLO_RECEIVED, Hello, _SENT): _CONNECTED,
    # The initiator need not wait for the responder's hello, save with steps: they need to know the window.
    (_I, _HELLO_SENT, Open, _SENT): _HELLO_SENT,
    (_I, _HELLO_SENT, Close, _SENT): _HELLO_SENT,
    (_I, _HELLO_SENT, Ping, _SENT): _HELLO_SENT,
    (_I, _CONNECTED, Open, _SENT): _CONNECTED,
    (_I, _CONNECTED, TokenHistory, _SENT): _CONNECTED,
    (_I, _CONNECTED, Begin, _SENT): _CONNECTED,
    (_I, _CONNECTED, Step, _SENT): _CONNECTED,
    (_I, _CONNECTED, ProgressRequest, _SENT): _CONNECTED,
    (_I, _CONNECTED, Close, _SENT): _CONNECTED,
    (_I, _CONNECTED, Ping, _SENT): _CONNECTED,
    (_I, _CONNECTED, Opened, _RECEIVED): _CONNECTED,
    (_I, _CONNECTED, Refused, _RECEIVED): _CONNECTED,
    (_I, _CONNECTED, Credit, _RECEIVED): _CONNECTED,
    (_I, _CONNECTED, Progress, _RECEIVED): _CONNECTED,
    (_I, _CONNECTED, Reroute, _RECEIVED): _CONNECTED,
    (_I, _CONNECTED, Failed, _RECEIVED): _CONNECTED,
    (_I, _CONNECTED, Closed, _RECEIVED): _CONNECTED,
    (_I, _CONNECTED, Pong, _RECEIVED): _CONNECTED,
    (_R, _NEW, Hello, _SENT): _HELLO_SENT,
    (_R, _NEW, Hello, _RECEIVED): _HELLO_RECEIVED,
    (_R, _HELLO_SENT, Hello, _RECEIVED): _CONNECTED,
    (_R, _HELLO_RECEIVED, Hello, _SENT): _CONNECTED,
    (_R, _HELLO_RECEIVED, Open, _RECEIVED): _HELLO_RECEIVED,
    (_R, _HELLO_RECEIVED, Close, _RECEIVED): _HELLO_RECEIVED,
    (_R, _HELLO_RECEIVED, Ping, _RECEIVED): _HELLO_RECEIVED,
    (_R, _CONNECTED, Open, _RECEIVED): _CONNECTED,
    (_R, _CONNECTED, TokenHistory, _RECEIVED): _CONNECTED,
    (_R, _CONNECTED, Begin, _RECEIVED): _CONNECTED,
    (_R, _CONNECTED, Step, _RECEIVED): _CONNECTED,
    (_R, _CONNECTED, ProgressRequest, _RECEIVED): _CONNECTED,
    (_R, _CONNECTED, Close, _RECEIVED): _CONNECTED,
    (_R, _CONNECTED, Ping, _RECEIVED): _CONNECTED,
    (_R, _CONNECTED, Opened, _SENT): _CONNECTED,
    (_R, _CONNECTED, Refused, _SENT): _CONNECTED,
    (_R, _CONNECTED, Credit, _SENT): _CONNECTED,
    (_R, _CONNECTED, Progress, _SENT): _CONNECTED,
    (_R, _CONNECTED, Reroute, _SENT): _CONNECTED,
    (_R, _CONNECTED, Failed, _SENT): _CONNECTED,
    (_R, _CONNECTED, Closed, _SENT): _CONNECTED,
    (_R, _CONNECTED, Pong, _SENT): _CONNECTED,
}

SESSION_TABLE: Final[Mapping[tuple[Role, SessionState, MessageType, Direction], Transition]] = {
    (_I, _IDLE, Open, _SENT): Transition(_OPENING),
    (_I, _IDLE, Step, _SENT): Transition(_LENT),
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
    # Lent ends in idle by itself once everything sent has been credited.
    (_I, _LENT, Step, _SENT): Transition(_LENT),
    (_I, _LENT, Credit, _RECEIVED): Transition(_LENT),
    (_I, _LENT, Failed, _RECEIVED): Transition(_IDLE),
    # What the responder said before our Close reached it; one of Refused, Failed and Closed comes, and is the last.
    (_I, _CLOSING, Opened, _RECEIVED): Transition(_CLOSING, quiet=True),
    (_I, _CLOSING, Credit, _RECEIVED): Transition(_CLOSING, quiet=True),
    (_I, _CLOSING, Progress, _RECEIVED): Transition(_CLOSING, quiet=True),
    (_I, _CLOSING, Reroute, _RECEIVED): Transition(_CLOSING, quiet=True),
    (_I, _CLOSING, Refused, _RECEIVED): Transition(_IDLE),
    (_I, _CLOSING, Failed, _RECEIVED): Transition(_IDLE),
    (_I, _CLOSING, Closed, _RECEIVED): Transition(_IDLE),
    (_I, _FAILED, Close, _SENT): Transition(_IDLE),
    (_R, _IDLE, Open, _RECEIVED): Transition(_OPENING),
    (_R, _IDLE, Step, _RECEIVED): Transition(_LENT),
    # The initiator had not yet seen our Refused.
    (_R, _IDLE, Close, _RECEIVED): Transition(_IDLE, quiet=True),
    # Rows were consumed, or found to belong to nobody, after the session was forgotten: there is nothing to settle.
    (_R, _IDLE, Credit, _SENT): Transition(_IDLE, quiet=True),
    (_R, _IDLE, Progress, _SENT): Transition(_IDLE, quiet=True),
    (_R, _IDLE, Reroute, _SENT): Transition(_IDLE, quiet=True),
    (_R, _IDLE, Failed, _SENT): Transition(_IDLE, quiet=True),
    (_R, _OPENING, Opened, _SENT): Transition(_OPEN),
    (_R, _OPENING, Refused, _SENT): Transition(_IDLE),
    (_R, _OPENING, Close, _RECEIVED): Transition(_CLOSING),
    # Lost before it was admitted: whoever found that out still owes the answer to the Open, which is Refused.
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
    (_R, _LENT, Step, _RECEIVED): Transition(_LENT),
    (_R, _LENT, Credit, _SENT): Transition(_LENT),
    (_R, _LENT, Failed, _SENT): Transition(_IDLE),
    # Rows that another of the initiator's tasks sent late. They are delivered; credit for them is nobody's concern.
    (_R, _CLOSING, Step, _RECEIVED): Transition(_CLOSING),
    (_R, _CLOSING, Opened, _SENT): Transition(_CLOSING, quiet=True),
    (_R, _CLOSING, Credit, _SENT): Transition(_CLOSING, quiet=True),
    (_R, _CLOSING, Progress, _SENT): Transition(_CLOSING, quiet=True),
    (_R, _CLOSING, Reroute, _SENT): Transition(_CLOSING, quiet=True),
    (_R, _CLOSING, Refused, _SENT): Transition(_IDLE),
    (_R, _CLOSING, Failed, _SENT): Transition(_IDLE),
    (_R, _CLOSING, Closed, _SENT): Transition(_IDLE),
    # The tokens so far, Begin, rows, a question and a second complaint cross our Failed; the Close that confirms it
    # needs no answer.
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
