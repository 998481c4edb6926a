"""The blob protocol: ranges of files, named by the sha256 of the whole file, fetched over a stream.

The initiator asks for one range at a time; the responder answers whether it has the file and then sends the range's
bytes. Nothing here proves that the bytes are the file's: whoever fetched all of it compares its sha256.
"""

import enum
import re
from dataclasses import dataclass
from typing import Final

from protocol.canonical import Value, decode, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.fields import Fields
from protocol.framing import Frame, FrameReader, FrameType, encode_chunks, encode_frame
from protocol.limits import MAX_BLOB_BYTES, MAX_CONTROL_BYTES

PROTOCOL_ID: Final = "/metaswarm/blob/1.0.0"

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRequest:
    """Send `length` bytes of the file from `offset` on, or as many as there are.

    `sha256`: 64 lower-case hexadecimal digits. Raises ValueError for what no responder would take.
    """

    sha256: str
    offset: int
    length: int

    def __post_init__(self) -> None:
        if _SHA256.fullmatch(self.sha256) is None:
            raise ValueError(f"{self.sha256[:80]!r} is no sha256: expected 64 hexadecimal digits")
        if not 0 <= self.offset <= MAX_BLOB_BYTES or not 1 <= self.length <= MAX_BLOB_BYTES:
            raise ValueError(f"{self.length} bytes from {self.offset} on are outside of what a file may have")

    def available(self, size: int) -> int:
        """Return how many bytes of a file of `size` bytes the answer to this request carries."""
        return max(0, min(self.length, size - self.offset))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobFound:
    """The file has `size` bytes in all; `length` bytes of it follow: the range asked for, cut at the file's end."""

    size: int
    length: int

    def __post_init__(self) -> None:
        if not 0 <= self.length <= self.size <= MAX_BLOB_BYTES:
            raise ValueError(f"{self.length} bytes of a file of {self.size}: a file has at most {MAX_BLOB_BYTES}")


@dataclass(frozen=True, slots=True)
class BlobMissing:
    """The responder does not have the file."""


@dataclass(frozen=True, slots=True)
class BlobBusy:
    """The responder has the file, but serves too many others now: come back later or ask somebody else."""


@dataclass(frozen=True, slots=True)
class BlobData:
    """The next bytes of the range; a view that is good until the data it came from is let go."""

    data: memoryview


BlobAnswer = BlobFound | BlobMissing | BlobBusy
BlobEvent = BlobFound | BlobMissing | BlobBusy | BlobData


class _State(enum.Enum):
    IDLE = "no request is under way"
    ASKED = "a request awaits its answer"
    SENDING = "a range is on its way"
    ERROR = "the stream broke the protocol"


class BlobInitiator:
    """The asking end of a blob stream."""

    def __init__(self) -> None:
        self._reader = FrameReader()
        self._state = _State.IDLE
        self._request: BlobRequest | None = None
        self._missing = 0

    @property
    def idle(self) -> bool:
        """Whether the last request has been answered in full, so that the next may be made."""
        return self._state is _State.IDLE

    def request(self, request: BlobRequest) -> bytes:
        """Return the bytes that ask for a range. Raises LocalProtocolError while another request is under way."""
        if self._state is not _State.IDLE:
            raise LocalProtocolError(f"no request can be made: {self._state.value}")
        self._state, self._request = _State.ASKED, request
        return _control({"type": "get", "sha256": request.sha256, "offset": request.offset, "length": request.length})

    def receive_data(self, data: bytes) -> list[BlobEvent]:
        """Return what the data says; b"" is the end of the stream. Raises RemoteProtocolError, then and ever after."""
        if self._state is _State.ERROR:
            raise RemoteProtocolError(self._state.value)
        try:
            return self._receive(data)
        except RemoteProtocolError:
            self._state = _State.ERROR
            raise

    def _receive(self, data: bytes) -> list[BlobEvent]:
        if not data and not (self._state is _State.IDLE and self._reader.at_boundary):
            raise RemoteProtocolError("the stream ended before the answer was complete")
        return [self._receive_frame(frame) for frame in self._reader.receive_data(data)]

    def _receive_frame(self, frame: Frame) -> BlobEvent:
        if frame.type is FrameType.CONTROL and self._state is _State.ASKED:
            answer = _decode_answer(frame.body)
            self._state = _State.IDLE
            if isinstance(answer, BlobFound):
                self._check_range(answer)
                self._missing = answer.length
                self._state = _State.SENDING if answer.length else _State.IDLE
            return answer
        if frame.type is FrameType.CHUNK and self._state is _State.SENDING:
            if len(frame.body) > self._missing:
                raise RemoteProtocolError("more bytes came than the answer promised")
            self._missing -= len(frame.body)
            if not self._missing:
                self._state = _State.IDLE
            return BlobData(frame.body)
        raise RemoteProtocolError(f"unexpected {frame.type.name} frame: {self._state.value}")

    def _check_range(self, answer: BlobFound) -> None:
        if self._request is not None and answer.length != self._request.available(answer.size):
            raise RemoteProtocolError(f"{answer.length} bytes announced: not the range that was asked for")


class BlobResponder:
    """The serving end of a blob stream."""

    def __init__(self) -> None:
        self._reader = FrameReader()
        self._state = _State.IDLE
        self._request: BlobRequest | None = None
        self._missing = 0

    def receive_data(self, data: bytes) -> list[BlobRequest]:
        """Return the request, if the data completes one; b"" is the end of the stream.

        Raises RemoteProtocolError, then and ever after, also for a request made before the last one was answered.
        """
        if self._state is _State.ERROR:
            raise RemoteProtocolError(self._state.value)
        try:
            return self._receive(data)
        except RemoteProtocolError:
            self._state = _State.ERROR
            raise

    def _receive(self, data: bytes) -> list[BlobRequest]:
        if not data and not self._reader.at_boundary:
            raise RemoteProtocolError("the stream ended inside a frame")
        return [self._receive_frame(frame) for frame in self._reader.receive_data(data)]

    def _receive_frame(self, frame: Frame) -> BlobRequest:
        if frame.type is not FrameType.CONTROL or self._state is not _State.IDLE:
            raise RemoteProtocolError(f"unexpected {frame.type.name} frame: {self._state.value}")
        self._request = _decode_request(frame.body)
        self._state = _State.ASKED
        return self._request

    def answer(self, answer: BlobAnswer) -> bytes:
        """Return the bytes of an answer. Raises LocalProtocolError without a request or for another range than its."""
        if self._state is not _State.ASKED or self._request is None:
            raise LocalProtocolError(f"nothing can be answered: {self._state.value}")
        if isinstance(answer, BlobFound):
            if answer.length != self._request.available(answer.size):
                raise LocalProtocolError(f"{answer.length} bytes are not the range that was asked for")
            self._missing = answer.length
            self._state = _State.SENDING if answer.length else _State.IDLE
            return _control({"type": "found", "size": answer.size, "length": answer.length})
        self._state = _State.IDLE
        return _control({"type": "missing" if isinstance(answer, BlobMissing) else "busy"})

    def send_data(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """Return the next bytes of the range as frames. Raises LocalProtocolError for more than was promised."""
        if self._state is not _State.SENDING or len(data) > self._missing:
            raise LocalProtocolError(f"{len(data)} bytes cannot be sent: {self._missing} are left of the range")
        self._missing -= len(data)
        if not self._missing:
            self._state = _State.IDLE
        return encode_chunks(data)


def _control(value: Value) -> bytes:
    return encode_frame(FrameType.CONTROL, encode(value))


def _decode_request(body: memoryview) -> BlobRequest:
    fields = Fields(decode(body, max_bytes=MAX_CONTROL_BYTES), "get")
    kind = fields.name("type", 16)
    if kind != "get":
        raise RemoteProtocolError(f"unknown request {kind!r}")
    sha256 = fields.name("sha256", 64)
    offset = fields.integer("offset", 0, MAX_BLOB_BYTES)
    length = fields.integer("length", 1, MAX_BLOB_BYTES)
    fields.finish()
    try:
        return BlobRequest(sha256=sha256, offset=offset, length=length)
    except ValueError as error:
        raise RemoteProtocolError(str(error)) from None


def _decode_answer(body: memoryview) -> BlobAnswer:
    fields = Fields(decode(body, max_bytes=MAX_CONTROL_BYTES), "answer")
    kind = fields.name("type", 16)
    answer: BlobAnswer
    if kind == "found":
        size = fields.integer("size", 0, MAX_BLOB_BYTES)
        answer = BlobFound(size=size, length=fields.integer("length", 0, size))
    elif kind == "missing":
        answer = BlobMissing()
    elif kind == "busy":
        answer = BlobBusy()
    else:
        raise RemoteProtocolError(f"unknown answer {kind!r}")
    fields.finish()
    return answer
