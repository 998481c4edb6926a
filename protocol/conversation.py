"""A conversation: two parties that speak in turn over a stream, one message a frame. Bytes in, messages out, and back.

What the sync and the chain protocol have in common: a table says who may say what when, and is the same for both ends.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, Generic, NamedTuple, TypeVar

from protocol.canonical import Value, decode, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.fields import Fields
from protocol.framing import Frame, FrameReader, FrameType, encode_frame
from protocol.limits import MAX_CONTROL_BYTES
from protocol.states import Direction, Role

MAX_PAYLOAD_BYTES: Final = MAX_CONTROL_BYTES - (4 << 10)
"""What a message carries besides its own few bytes: answers, or envelopes."""

M = TypeVar("M")
S = TypeVar("S", bound=StrEnum)


class Transition(NamedTuple, Generic[S]):
    """Who says a message, and the state that follows."""

    speaker: Role
    next: S


class Conversation(Generic[M, S]):
    """One end of a stream on which two parties speak in turn."""

    def __init__(
        self,
        role: Role,
        table: Mapping[tuple[S, type[M]], Transition[S]],
        to_map: Callable[[M], dict[str, Value]],
        from_map: Callable[[Fields], M],
        *,
        first: S,
        closed: S,
        error: S,
    ) -> None:
        """Begin in the first state; `closed` follows the end of the stream, `error` what the remote did wrong.

        `to_map`, `from_map`: messages as they are encoded, and back; the latter raises RemoteProtocolError.
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
        """How far the conversation is; the same at both ends."""
        return self._state

    def send(self, message: M) -> bytes:
        """Return the bytes of a message. Raises LocalProtocolError, and changes nothing, when it may not be said."""
        following = self._following(message, Direction.SENT)
        try:
            frame = encode_frame(FrameType.CONTROL, encode(self._to_map(message)))
        except ValueError as error:
            raise LocalProtocolError(f"{type(message).__name__}: {error}") from None
        self._state = following
        self._note(message)
        return frame

    def receive_data(self, data: bytes) -> list[M]:
        """Return the messages that are complete with this data; b"" is the end of the stream, and may come any time.

        Raises RemoteProtocolError, then and ever after, when the remote broke the protocol.
        """
        if self._state is self._error:
            raise RemoteProtocolError("the remote has broken the protocol before")
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
            raise RemoteProtocolError(f"a {frame.type.name} frame where messages are spoken in turn")
        message = self._from_map(Fields(decode(frame.body, max_bytes=MAX_CONTROL_BYTES), "message"))
        following = self._following(message, Direction.RECEIVED)
        self._check(message)
        self._state = following
        self._note(message)
        return message

    def _following(self, message: M, direction: Direction) -> S:
        """Return the state that follows a message; raise the error of whoever is not to say it now."""
        transition = self._table.get((self._state, type(message)))
        if transition is None or (transition.speaker is self._role) is not (direction is Direction.SENT):
            error = LocalProtocolError if direction is Direction.SENT else RemoteProtocolError
            raise error(f"{type(message).__name__} {direction} while {self._state}")
        # Of an answer in several messages only the last gives the word back.
        return transition.next if getattr(message, "last", True) else self._state

    def _check(self, message: M) -> None:
        """Raise RemoteProtocolError for a message that came and does not fit what was said before."""
        return

    def _note(self, message: M) -> None:
        """Remember of a message that was said what `_check` needs."""
        return
