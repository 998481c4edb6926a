"""The job stream without I/O: bytes in, messages out, and back.

Feed `receive_data` with what the stream brings, write what `send` returns. Each piece that `send` returns is one frame.
Pieces go out in the order in which they were returned, save that control messages may overtake the pieces of a step
after its first, so that a Close need not wait behind 64 MiB of rows.

`protocol.states` says who may send what when. A fault of the remote raises RemoteProtocolError, after which the
connection refuses everything; a fault of ours raises LocalProtocolError and changes nothing.

Credit: for each session both ends count the step payload that is sent and not yet consumed. It never exceeds the
responder's `Hello.window_bytes`, so that one session cannot fill the responder's memory nor stop the others.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from protocol.codec import (
    StepHeader,
    decode_control,
    decode_step_header,
    encode_control,
    encode_step_header,
)
from protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from protocol.framing import Frame, FrameReader, FrameType, encode_frame, encode_step, split_step
from protocol.identity import SessionId
from protocol.limits import MAX_PINGS, MAX_SESSIONS
from protocol.messages import (
    LATEST_MINOR,
    ControlMessage,
    Credit,
    Hello,
    Message,
    Ping,
    Pong,
    SessionMessage,
    Step,
)
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
"""Every version of the job stream that is spoken here, the latest first."""

PROTOCOL_ID: Final = PROTOCOL_IDS[0]

_ACCOUNTED: Final = frozenset({SessionState.BEGUN, SessionState.LENT})
"""States in which rows are counted against the window."""


@dataclass(slots=True)
class _Session:
    state: SessionState
    outstanding_bytes: int = 0


Admission: TypeAlias = Callable[[StepHeader], Sequence[bool]]
"""Says of each slice whether its rows are to be kept; asked when the header is there and the payload is yet to come."""


class _PartialStep:
    """A step whose payload is coming. What was not admitted of it is counted and not kept."""

    def __init__(self, header: StepHeader, admitted: Sequence[bool]) -> None:
        self.missing = header.payload_bytes
        self._payload = bytearray()
        self._header = header
        self._parts = deque[tuple[bool, int]]()
        """Where not all slices were admitted: whether the next bytes are to be kept, and how many they are."""
        if not all(admitted):
            sizes = (part.rows * header.row_bytes for part in header.slices)
            self._parts.extend(zip(admitted, sizes, strict=True))
            slices = tuple(part for part, keep in zip(header.slices, admitted, strict=True) if keep)
            shape = (sum(part.rows for part in slices), *header.shape[1:])
            self._header = replace(header, slices=slices, shape=shape)

    def extend(self, data: memoryview) -> None:
        """Take bytes of the payload."""
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
        """Return the step, once nothing is missing; None where nothing of it was admitted."""
        return self._header.step(self._payload) if self._header.slices else None


class JobConnection:
    """One end of a job stream.

    `agent`: our software and version. `window_bytes`: the step payload of any one session that we hold unconsumed.
    `protocol`: the id that both ends agreed on, one of PROTOCOL_IDS. `admission`: which slices of steps are kept; it
    may call `send`, and raise RemoteProtocolError. Raises LocalProtocolError when these break a limit.
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
        self._minor = LATEST_MINOR - PROTOCOL_IDS.index(protocol)
        self._role = role
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
    def role(self) -> Role:
        """Which end we are."""
        return self._role

    @property
    def minor(self) -> int:
        """The version that is spoken: 1.`minor`."""
        return self._minor

    @property
    def state(self) -> ConnectionState:
        """How far the stream is."""
        return self._state

    @property
    def remote_hello(self) -> Hello | None:
        """What the other end said of itself, once it has."""
        return self._remote_hello

    @property
    def session_count(self) -> int:
        """Sessions of which something is remembered here; at most MAX_SESSIONS."""
        return len(self._sessions)

    @property
    def held_bytes(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return self._reader.held_bytes

    def session_state(self, session: SessionId) -> SessionState:
        """Return how far a session is on this stream."""
        entry = self._sessions.get(session)
        return SessionState.IDLE if entry is None else entry.state

    def sendable_bytes(self, session: SessionId) -> int:
        """Return how much step payload of a session may be sent now; 0 as well where no Step may be sent at all."""
        state = self.session_state(session)
        if (
            self._remote_hello is None
            or (self._role, self._state, Step, Direction.SENT) not in CONNECTION_TABLE
            or (self._role, state, Step, Direction.SENT) not in SESSION_TABLE
            or (state is SessionState.IDLE and len(self._sessions) >= MAX_SESSIONS)
        ):
            return 0
        return self._remote_hello.window_bytes - self._outstanding_bytes(session)

    def send_hello(self) -> list[bytes]:
        """Return the pieces of our Hello, which go out before anything else."""
        return self.send(self._hello)

    def send(self, message: Message) -> list[bytes]:
        """Return the pieces, each a whole frame, that say a message; none if what it answers is already over.

        Raises LocalProtocolError, and changes nothing, when the state or a limit does not allow the message.
        """
        if isinstance(message, Step):
            header = encode_step_header(message)
            self._follow_step(StepHeader.of(message), Direction.SENT)
            return encode_step(header, message.tensor.data)
        body = encode_control(message, self._minor)
        if not self._follow_control(message, Direction.SENT):
            return []
        return [encode_frame(FrameType.CONTROL, body)]

    def receive_data(self, data: bytes) -> list[Message]:
        """Return the messages that are complete with this data; b"" is the end of the stream.

        Raises RemoteProtocolError when the remote broke the protocol, now or before; then nothing of `data` counts.
        """
        if self._state is ConnectionState.ERROR:
            raise RemoteProtocolError("the remote has broken the protocol before")
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
        """Drop what is remembered of a lent session that is over, because its coordinator closed it elsewhere.

        No more rows of it may be sent afterwards. A session that is not known here is no error; one that was opened
        over this stream raises LocalProtocolError, because it ends by Close.
        """
        state = self.session_state(session)
        if state is SessionState.LENT:
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
        """Return the message that is complete with this frame, if there is one to pass on."""
        if frame.type is FrameType.CONTROL:
            message = decode_control(frame.body, self._minor)
            return message if self._follow_control(message, Direction.RECEIVED) else None
        if frame.type is FrameType.STEP:
            if self._step is not None:
                raise RemoteProtocolError("a step began before the last one was complete")
            header_bytes, part = split_step(frame.body)
            header = decode_step_header(header_bytes)
            # Before the payload comes: it must not be kept unless there is credit for it.
            self._follow_step(header, Direction.RECEIVED)
            admitted = self._admission(header) if self._admission else [True] * len(header.slices)
            step = self._step = _PartialStep(header, admitted)
        else:
            if self._step is None:
                raise RemoteProtocolError("a chunk came without a step in progress")
            step, part = self._step, frame.body
        if len(part) > step.missing:
            raise RemoteProtocolError(f"a step brought {len(part)} bytes where {step.missing} were missing")
        step.extend(part)
        if step.missing:
            return None
        self._step = None
        return step.step()

    def _follow_control(self, message: ControlMessage, direction: Direction) -> bool:
        """Move on with a message; return False if it is to be kept quiet."""
        state = self._next_connection_state(type(message), direction)
        quiet = False
        match message:
            case Hello():
                self._follow_hello(message, direction)
            case Ping():
                if len(self._pings) >= MAX_PINGS:
                    raise _fault(direction, f"more than {MAX_PINGS} pings await their pong")
                self._pings.append(message.nonce)
            case Pong():
                if not self._pings or self._pings[0] != message.nonce:
                    raise _fault(direction, "a pong answers no ping")
                self._pings.popleft()
            case _:
                quiet = self._follow_session(message, direction)
        self._state = state
        return not quiet

    def _follow_hello(self, message: Hello, direction: Direction) -> None:
        if direction is Direction.RECEIVED:
            self._remote_hello = message
        elif message != self._hello:
            raise LocalProtocolError("a Hello other than this connection's own")

    def _follow_session(self, message: SessionMessage, direction: Direction) -> bool:
        """Move a session on; return whether the message is to be kept quiet."""
        session = message.session
        transition = self._next_session_state(session, type(message), direction)
        if session not in self._sessions and transition.next is not SessionState.IDLE:
            self._check_room(1, direction)
        outstanding = self._outstanding_bytes(session) if transition.next in _ACCOUNTED else 0
        if isinstance(message, Credit) and not transition.quiet:
            outstanding -= message.consumed_bytes
            if outstanding < 0:
                raise _fault(direction, f"credit for {message.consumed_bytes} bytes is {-outstanding} too much")
        over = transition.next is SessionState.LENT and outstanding == 0
        if over or transition.next is SessionState.IDLE:
            self._sessions.pop(session, None)
        else:
            self._sessions[session] = _Session(transition.next, outstanding)
        return transition.quiet

    def _follow_step(self, header: StepHeader, direction: Direction) -> None:
        """Move on with a step and count its rows against the windows."""
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
            return CONNECTION_TABLE[self._role, self._state, message_type, direction]
        except KeyError:
            raise _fault(
                direction, f"{message_type.__name__} cannot be {direction} by the {self._role}: {self._state}"
            ) from None

    def _next_session_state(self, session: SessionId, message_type: MessageType, direction: Direction) -> Transition:
        state = self.session_state(session)
        try:
            return SESSION_TABLE[self._role, state, message_type, direction]
        except KeyError:
            raise _fault(
                direction,
                f"{message_type.__name__} cannot be {direction} by the {self._role}: session {session} is {state}",
            ) from None

    def _check_room(self, new_sessions: int, direction: Direction) -> None:
        if len(self._sessions) + new_sessions > MAX_SESSIONS:
            raise _fault(direction, f"more than {MAX_SESSIONS} sessions on one stream")

    def _outstanding_bytes(self, session: SessionId) -> int:
        entry = self._sessions.get(session)
        return 0 if entry is None else entry.outstanding_bytes


def _fault(direction: Direction, text: str) -> ProtocolError:
    """Return the error for a message that may not be: ours if it was to be sent, the remote's if it was received."""
    return LocalProtocolError(text) if direction is Direction.SENT else RemoteProtocolError(text)
