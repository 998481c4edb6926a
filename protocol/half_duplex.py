"""A half-duplex connection: both ends send in turn, one message a frame. Bytes to messages and back, without I/O.

Shared by the sync and the chain protocol. A table, the same for both ends, defines who may send which message when.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final, Generic, NamedTuple, TypeVar

from protocol.canonical import decode, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.framing import Frame, FrameReader, FrameType, encode_frame
from protocol.limits import MAX_BUSY_S, MAX_CONTROL_BYTES
from protocol.schema import Form, MessageTypes, Range, to_map
from protocol.states import Direction, Role

MAX_PAYLOAD_BYTES: Final = MAX_CONTROL_BYTES - (4 << 10)
"""Answers or envelopes in one message, next to its own few bytes."""

M = TypeVar("M")
S = TypeVar("S", bound=StrEnum)
_A = TypeVar("_A", bytes, str, int)


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """The responder refuses the session; the initiator may retry after this many seconds."""

    retry_s: Annotated[int, Range(0, MAX_BUSY_S)]


class Turn(NamedTuple, Generic[S]):
    """The sender of a message, and the state that follows."""

    sender: Role
    next: S


class HalfDuplexProtocol(NamedTuple, Generic[M, S]):
    """A half-duplex protocol."""

    messages: MessageTypes[M]
    table: Mapping[tuple[S, type[M]], Turn[S]]
    first: S
    closed: S
    """Follows the end of the stream."""
    error: S
    """Follows a violation by the remote."""

    def encode(self, message: M) -> bytes:
        """Return the frame of a message. Raises ValueError."""
        return encode_frame(
            FrameType.CONTROL, encode({"type": self.messages.name_of(type(message)), **to_map(message)})
        )

    def decode(self, frame: Frame) -> M:
        """Return the message in a frame. Raises RemoteProtocolError."""
        if frame.type is not FrameType.CONTROL:
            raise RemoteProtocolError(f"unexpected {frame.type.name} frame: only control frames are valid here")
        return self.messages.from_map(decode(frame.body, max_bytes=MAX_CONTROL_BYTES))


class HalfDuplexConnection(Generic[M, S]):
    """One end of a stream on which both ends send in turn."""

    def __init__(self, role: Role, protocol: HalfDuplexProtocol[M, S]) -> None:
        self._role = role
        self._protocol = protocol
        self._state = protocol.first
        self._reader = FrameReader()

    @property
    def state(self) -> S:
        """The state of the connection, the same at both ends."""
        return self._state

    def send(self, message: M) -> bytes:
        """Return the bytes of a message. Raises LocalProtocolError, and changes nothing, when it is out of turn."""
        following = self._following(message, Direction.SENT)
        try:
            frame = self._protocol.encode(message)
        except ValueError as error:
            raise LocalProtocolError(f"{type(message).__name__}: {error}") from None
        self._state = following
        self._record(message)
        return frame

    def receive_data(self, data: bytes) -> list[M]:
        """Return the messages that this data completes; b"" marks the end of the stream, which is valid at any time.

        Raises RemoteProtocolError, now and on every later call, once the remote violated the protocol.
        """
        if self._state is self._protocol.error:
            raise RemoteProtocolError("the remote violated the protocol before")
        if not data:
            self._state = self._protocol.closed
            return []
        try:
            return [self._receive_frame(frame) for frame in self._reader.receive_data(data)]
        except RemoteProtocolError:
            self._state = self._protocol.error
            raise

    def _receive_frame(self, frame: Frame) -> M:
        message = self._protocol.decode(frame)
        following = self._following(message, Direction.RECEIVED)
        self._check(message)
        self._state = following
        self._record(message)
        return message

    def _following(self, message: M, direction: Direction) -> S:
        """Return the state after a message; raise the error of the end that sent it out of turn."""
        turn = self._protocol.table.get((self._state, type(message)))
        if turn is None or (turn.sender is self._role) is not (direction is Direction.SENT):
            error = LocalProtocolError if direction is Direction.SENT else RemoteProtocolError
            raise error(f"{type(message).__name__} {direction} while {self._state}")
        # An answer in several messages ends the sender's turn with the last of them.
        return turn.next if getattr(message, "last", True) else self._state

    def _check(self, message: M) -> None:
        """Raise RemoteProtocolError for a received message that contradicts an earlier one."""

    def _record(self, message: M) -> None:
        """Store what `_check` needs of a message that was sent or received."""


def packed(size: int, max_count: int, *, min_count: int = 0, ascending: bool = False) -> Form:
    """Return the form of ids of equal length, which travel end to end."""

    def load(value: object, what: str) -> tuple[bytes, ...]:
        if type(value) is not bytes or len(value) % size or not min_count * size <= len(value) <= max_count * size:
            raise RemoteProtocolError(f"{what} are not {min_count} to {max_count} times {size} bytes")
        ids = tuple(value[start : start + size] for start in range(0, len(value), size))
        if ascending:
            require_ascending(ids, what)
        return ids

    return Form(load, b"".join)


def require_ascending(values: Sequence[_A], what: str) -> None:
    """Raise RemoteProtocolError unless the values ascend, and so are distinct."""
    if list(values) != sorted(set(values)):
        raise RemoteProtocolError(f"{what} do not ascend")
