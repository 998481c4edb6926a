"""A half-duplex connection: both ends send in turn, one message a frame. Bytes to messages and back, without I/O.

Shared by the sync and the chain protocol. A table, the same for both ends, defines who may send which message when.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Generic, NamedTuple, TypeVar

from protocol.canonical import Value, decode, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.fields import Fields
from protocol.framing import Frame, FrameReader, FrameType, encode_frame
from protocol.limits import MAX_CONTROL_BYTES, MAX_RECORD_BYTES
from protocol.states import Direction, Role

MAX_PAYLOAD_BYTES: Final = MAX_CONTROL_BYTES - (4 << 10)
"""Answers or envelopes in one message, next to its own few bytes."""

M = TypeVar("M")
S = TypeVar("S", bound=StrEnum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """The responder refuses the session; the initiator may retry after this many seconds."""

    retry_s: int


class Turn(NamedTuple, Generic[S]):
    """The sender of a message, and the state that follows."""

    sender: Role
    next: S


class HalfDuplexConnection(Generic[M, S]):
    """One end of a stream on which both ends send in turn."""

    def __init__(
        self,
        role: Role,
        table: Mapping[tuple[S, type[M]], Turn[S]],
        to_map: Callable[[M], dict[str, Value]],
        from_map: Callable[[Fields], M],
        *,
        first: S,
        closed: S,
        error: S,
    ) -> None:
        """Start in the first state; `closed` follows the end of the stream, `error` a violation by the remote.

        `to_map`, `from_map`: encode and decode a message; the latter raises RemoteProtocolError.
        """
        self._role = role
        self._table = table
        self._to_map = to_map
        self._from_map = from_map
        self._state = first
        self._closed = closed
        self._error = error
        self._reader = FrameReader()

    @property
    def state(self) -> S:
        """The state of the connection, the same at both ends."""
        return self._state

    def send(self, message: M) -> bytes:
        """Return the bytes of a message. Raises LocalProtocolError, and changes nothing, when it is out of turn."""
        following = self._following(message, Direction.SENT)
        try:
            frame = encode_frame(FrameType.CONTROL, encode(self._to_map(message)))
        except ValueError as error:
            raise LocalProtocolError(f"{type(message).__name__}: {error}") from None
        self._state = following
        self._record(message)
        return frame

    def receive_data(self, data: bytes) -> list[M]:
        """Return the messages that this data completes; b"" marks the end of the stream, which is valid at any time.

        Raises RemoteProtocolError, now and on every later call, once the remote violated the protocol.
        """
        if self._state is self._error:
            raise RemoteProtocolError("the remote violated the protocol before")
        if not data:
            self._state = self._closed
            return []
        try:
            return [self._receive_frame(frame) for frame in self._reader.receive_data(data)]
        except RemoteProtocolError:
            self._state = self._error
            raise

    def _receive_frame(self, frame: Frame) -> M:
        if frame.type is not FrameType.CONTROL:
            raise RemoteProtocolError(f"unexpected {frame.type.name} frame: only control frames are valid here")
        message = self._from_map(Fields(decode(frame.body, max_bytes=MAX_CONTROL_BYTES), "message"))
        following = self._following(message, Direction.RECEIVED)
        self._check(message)
        self._state = following
        self._record(message)
        return message

    def _following(self, message: M, direction: Direction) -> S:
        """Return the state after a message; raise the error of the end that sent it out of turn."""
        turn = self._table.get((self._state, type(message)))
        if turn is None or (turn.sender is self._role) is not (direction is Direction.SENT):
            error = LocalProtocolError if direction is Direction.SENT else RemoteProtocolError
            raise error(f"{type(message).__name__} {direction} while {self._state}")
        # An answer in several messages ends the sender's turn with the last of them.
        return turn.next if getattr(message, "last", True) else self._state

    def _check(self, message: M) -> None:
        """Raise RemoteProtocolError for a received message that contradicts an earlier one."""

    def _record(self, message: M) -> None:
        """Store what `_check` needs of a message that was sent or received."""


def envelopes(taken: Fields, max_count: int) -> tuple[bytes, ...]:
    """Return the signed envelopes in a message. Raises RemoteProtocolError."""
    found = []
    for envelope in taken.array("envelopes", max_count):
        if type(envelope) is not bytes or not 0 < len(envelope) <= MAX_RECORD_BYTES:
            raise RemoteProtocolError(f"an envelope is not 1 to {MAX_RECORD_BYTES} bytes")
        found.append(envelope)
    return tuple(found)
