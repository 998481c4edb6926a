"""The blob protocol: ranges of files, named by the sha256 of the whole file, fetched over a stream.

The initiator requests one range at a time; the responder answers whether it has the file and sends the range's bytes.
Nothing here proves that the bytes are the file's: once the file is complete, the initiator compares its sha256.
"""

import enum
import re
from dataclasses import dataclass
from typing import Annotated, Final, Generic, TypeAlias, TypeVar

from protocol.canonical import decode, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.framing import Frame, FrameReader, FrameType, encode_chunks, encode_frame
from protocol.limits import MAX_BLOB_BYTES, MAX_CONTROL_BYTES
from protocol.schema import Form, MessageTypes, Range

PROTOCOL_ID: Final = "/metaswarm/blob/1.0.0"

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_M = TypeVar("_M")
_E = TypeVar("_E")


def _sha256(value: object, what: str) -> str:
    if type(value) is not str or _SHA256.fullmatch(value) is None:
        raise RemoteProtocolError(f"{what} is not a sha256: expected 64 hexadecimal digits")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRequest:
    """Request for `length` bytes of a file from `offset` on, or fewer at its end. `sha256`: 64 lower-case digits."""

    sha256: Annotated[str, Form(_sha256)]
    offset: Annotated[int, Range(0, MAX_BLOB_BYTES)]
    length: Annotated[int, Range(1, MAX_BLOB_BYTES)]

    def available(self, size: int) -> int:
        """Return the number of bytes in the answer to this request, for a file of `size` bytes."""
        return max(0, min(self.length, size - self.offset))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobFound:
    """The file has `size` bytes; `length` bytes of it follow: the requested range, cut at the end of the file."""

    size: Annotated[int, Range(0, MAX_BLOB_BYTES)]
    length: Annotated[int, Range(0, MAX_BLOB_BYTES)]


@dataclass(frozen=True, slots=True)
class BlobMissing:
    """The responder does not have the file."""


@dataclass(frozen=True, slots=True)
class BlobBusy:
    """The responder has the file, but serves too many peers: retry later or ask another peer."""


@dataclass(frozen=True, slots=True)
class BlobData:
    """The next bytes of the range; a view that is valid as long as the data it came from."""

    data: memoryview


BlobAnswer: TypeAlias = BlobFound | BlobMissing | BlobBusy
BlobEvent: TypeAlias = BlobAnswer | BlobData

_REQUESTS: Final = MessageTypes({"get": BlobRequest})
_ANSWERS: Final = MessageTypes[BlobAnswer]({"found": BlobFound, "missing": BlobMissing, "busy": BlobBusy})


class _State(enum.Enum):
    IDLE = "no request is under way"
    ASKED = "a request awaits its answer"
    SENDING = "a range is on its way"
    ERROR = "the stream broke the protocol"


class _End(Generic[_E]):
    """What both ends of a blob stream have in common. `_missing`: bytes of the range that are still to come."""

    def __init__(self) -> None:
        self._reader = FrameReader()
        self._state = _State.IDLE
        self._request: BlobRequest | None = None
        self._missing = 0

    def receive_data(self, data: bytes) -> list[_E]:
        """Return the events that the data completes; b"" is the end of the stream.

        Raises RemoteProtocolError for what breaks the protocol, and for everything after it.
        """
        if self._state is _State.ERROR:
            raise RemoteProtocolError(self._state.value)
        try:
            if not data:
                self._check_end()
            return [self._receive_frame(frame) for frame in self._reader.receive_data(data)]
        except RemoteProtocolError:
            self._state = _State.ERROR
            raise

    def _check_end(self) -> None:
        if not self._reader.at_boundary:
            raise RemoteProtocolError("the stream ended inside a frame")

    def _receive_frame(self, frame: Frame) -> _E:
        raise NotImplementedError

    def _unexpected(self, frame: Frame) -> RemoteProtocolError:
        return RemoteProtocolError(f"unexpected {frame.type.name} frame: {self._state.value}")

    def _check_range(self, answer: BlobFound) -> None:
        """Raise RemoteProtocolError unless the answer announces the requested range."""
        if self._request is None or answer.length != self._request.available(answer.size):
            raise RemoteProtocolError(f"{answer.length} bytes of {answer.size} are not the requested range")

    def _expect(self, length: int) -> None:
        """Count the bytes of the range that are still to come."""
        self._missing = length
        self._state = _State.SENDING if length else _State.IDLE


class BlobInitiator(_End[BlobEvent]):
    """The requesting end of a blob stream."""

    @property
    def idle(self) -> bool:
        """Whether the last request has been answered in full, so that the next may be sent."""
        return self._state is _State.IDLE

    def request(self, request: BlobRequest) -> bytes:
        """Return the bytes of a request. Raises LocalProtocolError while another one is under way."""
        if self._state is not _State.IDLE:
            raise LocalProtocolError(f"a request is not possible: {self._state.value}")
        data = _encode(_REQUESTS, request)
        self._state, self._request = _State.ASKED, request
        return data

    def _check_end(self) -> None:
        if self._state is not _State.IDLE or not self._reader.at_boundary:
            raise RemoteProtocolError("the stream ended before the answer was complete")

    def _receive_frame(self, frame: Frame) -> BlobEvent:
        if frame.type is FrameType.CONTROL and self._state is _State.ASKED:
            answer = _ANSWERS.from_map(decode(frame.body, max_bytes=MAX_CONTROL_BYTES))
            if isinstance(answer, BlobFound):
                self._check_range(answer)
            self._expect(answer.length if isinstance(answer, BlobFound) else 0)
            return answer
        if frame.type is FrameType.CHUNK and self._state is _State.SENDING:
            if len(frame.body) > self._missing:
                raise RemoteProtocolError("more bytes came than the answer announced")
            self._expect(self._missing - len(frame.body))
            return BlobData(frame.body)
        raise self._unexpected(frame)


class BlobResponder(_End[BlobRequest]):
    """The serving end of a blob stream."""

    def _receive_frame(self, frame: Frame) -> BlobRequest:
        if frame.type is not FrameType.CONTROL or self._state is not _State.IDLE:
            raise self._unexpected(frame)
        self._request = _REQUESTS.from_map(decode(frame.body, max_bytes=MAX_CONTROL_BYTES))
        self._state = _State.ASKED
        return self._request

    def answer(self, answer: BlobAnswer) -> bytes:
        """Return the bytes of an answer. Raises LocalProtocolError without a request, and for another range."""
        if self._state is not _State.ASKED:
            raise LocalProtocolError(f"an answer is not possible: {self._state.value}")
        data = _encode(_ANSWERS, answer)
        if isinstance(answer, BlobFound):
            try:
                self._check_range(answer)
            except RemoteProtocolError as error:
                raise LocalProtocolError(str(error)) from None
        self._expect(answer.length if isinstance(answer, BlobFound) else 0)
        return data

    def send_data(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """Return the next bytes of the range as frames. Raises LocalProtocolError for more than were announced."""
        if self._state is not _State.SENDING or len(data) > self._missing:
            raise LocalProtocolError(f"{len(data)} bytes cannot be sent: {self._missing} are left of the range")
        self._expect(self._missing - len(data))
        return encode_chunks(data)


def _encode(types: MessageTypes[_M], message: _M) -> bytes:
    try:
        return encode_frame(FrameType.CONTROL, encode(types.to_map(message)))
    except RemoteProtocolError as error:
        raise LocalProtocolError(str(error)) from None
