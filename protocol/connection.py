"""The job stream without I/O: bytes in, messages out, and back.

Feed the stream's bytes to `receive_data`, and write what `send` returns. Each piece that `send` returns is one frame.
Pieces are written in the order in which they were returned, except that control messages may overtake the pieces of a
step after its first, so that a Close need not wait behind 64 MiB of rows.

`protocol.states` defines who may send which message when. A fault of the remote raises RemoteProtocolError, after which
the connection rejects everything; a fault of ours raises LocalProtocolError and changes nothing.

Flow control: for each session both ends count the step payload that is sent and not yet consumed. It never exceeds the
responder's `Hello.window_bytes`, so that one session can neither fill the responder's memory nor stall the others.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from protocol.codec import StepHeader, decode_control, decode_step_header, encode_control, encode_step_header
from protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from protocol.framing import Frame, FrameReader, FrameType, encode_frame, encode_step, split_step
from protocol.identity import SessionId
from protocol.limits import MAX_PINGS, MAX_SESSIONS
from protocol.messages import LATEST_MINOR, ControlMessage, Credit, Hello, Message, Ping, Pong, SessionMessage, Step
from protocol.states import (
    CONNECTION_TABLE,
    SESSION_TABLE,
    ConnectionState,
    Direction,
    MessageType,
    Role,
    SessionState,
    Transition,
)

__all__ = ["PROTOCOL_ID", "PROTOCOL_IDS", "ConnectionState", "Direction", "JobConnection", "Role", "SessionState"]

PROTOCOL_IDS: Final = tuple(f"/metaswarm/job/1.{minor}.0" for minor in range(LATEST_MINOR, -1, -1))
"""The supported versions of the job protocol, the latest first."""

PROTOCOL_ID: Final = PROTOCOL_IDS[0]

_ACCOUNTED: Final = frozenset({SessionState.BEGUN, SessionState.FORWARDED})
"""States in which rows are counted against the window."""


@dataclass(slots=True)
class _Session:
    state: SessionState
    outstanding_bytes: int = 0


Admission: TypeAlias = Callable[[StepHeader], Sequence[bool]]
"""Decides for each slice of a step whether its rows are kept; called with the header, before the payload arrives."""


class _PartialStep:
    """A step whose payload is arriving. Slices that were not admitted are counted and discarded."""

    def __init__(self, header: StepHeader, admitted: Sequence[bool]) -> None:
        self.missing = header.payload_bytes
        self._payload = bytearray()
        self._header = header
        self._parts = deque[tuple[bool, int]]()
        """Where not all slices were admitted: whether the next bytes are kept, and their number."""
        if not all(admitted):
            sizes = (part.rows * header.row_bytes for part in header.slices)
            self._parts.extend(zip(admitted, sizes, strict=True))
            slices = tuple(part for part, keep in zip(header.slices, admitted, strict=True) if keep)
            shape = (sum(part.rows for part in slices), *header.shape[1:])
            self._header = replace(header, slices=slices, shape=shape)

    def extend(self, data: memoryview) -> None:
        """Append bytes of the payload."""
        self.missing -= len(data)
        if not self._parts:
            self._payload += data
        while self._parts and data:
            keep, size = self._parts.popleft()
            here, data = data[:size], data[size:]
            if keep:
                self._payload += here
            if len(here) < size:
                self._parts.appendleft((keep, size - len(here)))

    def step(self) -> Step | None:
        """Return the complete step; None where none of its slices was admitted."""
        return self._header.step(self._payload) if self._header.slices else None


class JobConnection:
    """One end of a job stream.

    `agent`: our software and version. `window_bytes`: the unconsumed step payload of any one session that we hold.
    `protocol`: the negotiated id, one of PROTOCOL_IDS. `admission`: decides which slices of steps are kept; it may call
    `send`, and raise RemoteProtocolError. Raises LocalProtocolError for values out of bounds.
    """

    def __init__(
        self,
        role: Role,
        *,
        agent: str,
        window_bytes: int,
        protocol: str = PROTOCOL_ID,
        admission: Admission | None = None,
    ) -> None:
        if protocol not in PROTOCOL_IDS:
            raise LocalProtocolError(f"{protocol} is not a version of the job protocol")
        self.role: Final = role
        self.minor: Final = LATEST_MINOR - PROTOCOL_IDS.index(protocol)
        """The negotiated version is 1.`minor`."""
        self._admission = admission
        self._hello = Hello(agent=agent, window_bytes=window_bytes)
        encode_control(self._hello)
        self._remote_hello: Hello | None = None
        self._state = ConnectionState.NEW
        self._sessions: dict[SessionId, _Session] = {}
        self._pings: deque[int] = deque()
        self._reader = FrameReader()
        self._step: _PartialStep | None = None

    @property
    def state(self) -> ConnectionState:
        """State of the stream."""
        return self._state

    @property
    def remote_hello(self) -> Hello | None:
        """The Hello of the other end, once received."""
        return self._remote_hello

    @property
    def session_count(self) -> int:
        """Number of sessions with a state on this stream; at most MAX_SESSIONS."""
        return len(self._sessions)

    @property
    def held_bytes(self) -> int:
        """Buffered bytes of an incomplete frame."""
        return self._reader.held_bytes

    def session_state(self, session: SessionId) -> SessionState:
        """Return the state of a session on this stream."""
        entry = self._sessions.get(session)
        return SessionState.IDLE if entry is None else entry.state

    def sendable_bytes(self, session: SessionId) -> int:
        """Return the credit of a session: the step payload that may be sent now; 0 where no Step may be sent at all."""
        state = self.session_state(session)
        if (
            self._remote_hello is None
            or (self.role, self._state, Step, Direction.SENT) not in CONNECTION_TABLE
            or (self.role, state, Step, Direction.SENT) not in SESSION_TABLE
            or (state is SessionState.IDLE and len(self._sessions) >= MAX_SESSIONS)
        ):
            return 0
        return self._remote_hello.window_bytes - self._outstanding_bytes(session)

    def send_hello(self) -> list[bytes]:
        """Return the pieces of our Hello, which precede everything else."""
        return self.send(self._hello)

    def send(self, message: Message) -> list[bytes]:
        """Return the pieces of a message, each a whole frame; none if what it answers is already over.

        Raises LocalProtocolError, and changes nothing, where the state or a bound does not allow the message.
        """
        if isinstance(message, Step):
            header = encode_step_header(message)
            self._apply_step(StepHeader.of(message), Direction.SENT)
            return encode_step(header, message.tensor.data)
        body = encode_control(message, self.minor)
        if not self._apply_control(message, Direction.SENT):
            return []
        return [encode_frame(FrameType.CONTROL, body)]

    def receive_data(self, data: bytes) -> list[Message]:
        """Return the messages that this data completes; b"" is the end of the stream.

        Raises RemoteProtocolError once the remote has broken the protocol; nothing of `data` is then accepted.
        """
        if self._state is ConnectionState.ERROR:
            raise RemoteProtocolError("the remote has already broken the protocol")
        if self._state is ConnectionState.CLOSED and data:
            raise LocalProtocolError("data was fed after the end of the stream")
        try:
            return self._receive(data)
        except RemoteProtocolError:
            self._state = ConnectionState.ERROR
            self._step = None
            self._reader = FrameReader()
            self._sessions.clear()
            raise

    def forget(self, session: SessionId) -> None:
        """Drop the state of a forwarded session that its coordinator has closed over another stream.

        No rows of it may be sent afterwards. Unknown sessions are ignored. Raises LocalProtocolError for a session that
        was opened over this stream, which ends by Close.
        """
        state = self.session_state(session)
        if state is SessionState.FORWARDED:
            del self._sessions[session]
        elif state is not SessionState.IDLE:
            raise LocalProtocolError(f"a session that is {state} on this stream cannot be forgotten")

    def _receive(self, data: bytes) -> list[Message]:
        if not data:
            if self._step is not None or not self._reader.at_boundary:
                raise RemoteProtocolError("the stream ended in the middle of a message")
            self._state = ConnectionState.CLOSED
            return []
        received = (self._receive_frame(frame) for frame in self._reader.receive_data(data))
        return [message for message in received if message is not None]

    def _receive_frame(self, frame: Frame) -> Message | None:
        """Return the message that this frame completes, unless it is dropped."""
        if frame.type is FrameType.CONTROL:
            message = decode_control(frame.body, self.minor)
            return message if self._apply_control(message, Direction.RECEIVED) else None
        if frame.type is FrameType.STEP:
            if self._step is not None:
                raise RemoteProtocolError("a step began before the last one was complete")
            header_bytes, part = split_step(frame.body)
            header = decode_step_header(header_bytes)
            # Before the payload arrives: it must not be kept without credit.
            self._apply_step(header, Direction.RECEIVED)
            admitted = self._admission(header) if self._admission else [True] * len(header.slices)
            step = self._step = _PartialStep(header, admitted)
        else:
            if self._step is None:
                raise RemoteProtocolError("a chunk came without a step in progress")
            step, part = self._step, frame.body
        if len(part) > step.missing:
            raise RemoteProtocolError(f"a step brought {len(part)} bytes: expected at most {step.missing}")
        step.extend(part)
        if step.missing:
            return None
        self._step = None
        return step.step()

    def _apply_control(self, message: ControlMessage, direction: Direction) -> bool:
        """Apply a message to the state; return False where it is dropped or suppressed."""
        state = self._next_connection_state(type(message), direction)
        quiet = False
        match message:
            case Hello():
                self._apply_hello(message, direction)
            case Ping():
                if len(self._pings) >= MAX_PINGS:
                    raise _fault(direction, f"more than {MAX_PINGS} pings await their pong")
                self._pings.append(message.nonce)
            case Pong():
                if not self._pings or self._pings[0] != message.nonce:
                    raise _fault(direction, "a pong does not answer the oldest ping")
                self._pings.popleft()
            case _:
                quiet = self._apply_session(message, direction)
        self._state = state
        return not quiet

    def _apply_hello(self, message: Hello, direction: Direction) -> None:
        if direction is Direction.RECEIVED:
            self._remote_hello = message
        elif message != self._hello:
            raise LocalProtocolError("a Hello other than this connection's own")

    def _apply_session(self, message: SessionMessage, direction: Direction) -> bool:
        """Apply a message to its session; return whether it is dropped or suppressed."""
        session = message.session
        transition = self._next_session_state(session, type(message), direction)
        if session not in self._sessions and transition.next is not SessionState.IDLE:
            self._check_room(1, direction)
        outstanding = self._outstanding_bytes(session) if transition.next in _ACCOUNTED else 0
        if isinstance(message, Credit) and not transition.quiet:
            outstanding -= message.consumed_bytes
            if outstanding < 0:
                raise _fault(direction, f"credit for {message.consumed_bytes} bytes is {-outstanding} too much")
        over = transition.next is SessionState.FORWARDED and outstanding == 0
        if over or transition.next is SessionState.IDLE:
            self._sessions.pop(session, None)
        else:
            self._sessions[session] = _Session(transition.next, outstanding)
        return transition.quiet

    def _apply_step(self, header: StepHeader, direction: Direction) -> None:
        """Apply a step to its sessions and count its rows against their windows."""
        state = self._next_connection_state(Step, direction)
        receiver = self._hello if direction is Direction.RECEIVED else self._remote_hello
        window = 0 if receiver is None else receiver.window_bytes
        entries: dict[SessionId, _Session] = {}
        for part in header.slices:
            following = self._next_session_state(part.session, Step, direction).next
            outstanding = 0
            if following in _ACCOUNTED:
                outstanding = self._outstanding_bytes(part.session) + part.rows * header.row_bytes
                if outstanding > window:
                    raise _fault(direction, f"a step exceeds the window by {outstanding - window} bytes")
            entries[part.session] = _Session(following, outstanding)
        self._check_room(len(entries.keys() - self._sessions.keys()), direction)
        self._sessions.update(entries)
        self._state = state

    def _next_connection_state(self, message_type: MessageType, direction: Direction) -> ConnectionState:
        try:
            return CONNECTION_TABLE[self.role, self._state, message_type, direction]
        except KeyError:
            raise _fault(
                direction, f"{message_type.__name__} cannot be {direction} by the {self.role}: {self._state}"
            ) from None

    def _next_session_state(self, session: SessionId, message_type: MessageType, direction: Direction) -> Transition:
        state = self.session_state(session)
        try:
            return SESSION_TABLE[self.role, state, message_type, direction]
        except KeyError:
            raise _fault(
                direction,
                f"{message_type.__name__} cannot be {direction} by the {self.role}: session {session} is {state}",
            ) from None

    def _check_room(self, new_sessions: int, direction: Direction) -> None:
        if len(self._sessions) + new_sessions > MAX_SESSIONS:
            raise _fault(direction, f"more than {MAX_SESSIONS} sessions on one stream")

    def _outstanding_bytes(self, session: SessionId) -> int:
        entry = self._sessions.get(session)
        return 0 if entry is None else entry.outstanding_bytes


def _fault(direction: Direction, text: str) -> ProtocolError:
    """Return the error for a forbidden message: ours if it was to be sent, the remote's if it was received."""
    return LocalProtocolError(text) if direction is Direction.SENT else RemoteProtocolError(text)
