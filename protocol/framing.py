"""Framing of streams: control messages in msgpack, and raw tensor or file bytes.

    u32 big-endian length of the body | u8 type | body

A length is compared with its limit before a byte of the body is buffered. A frame is also the unit of interleaving:
frames of other messages may come between any two frames of a step.
"""

import enum
import struct
from typing import Final, NamedTuple

from protocol.errors import RemoteProtocolError
from protocol.limits import MAX_CONTROL_BYTES, MAX_FRAME_BYTES

_PREFIX: Final = struct.Struct(">IB")
_HEADER_LENGTH: Final = struct.Struct(">I")

PREFIX_BYTES: Final = _PREFIX.size
"""Length and type before each body."""


class FrameType(enum.IntEnum):
    """The content of a frame's body."""

    CONTROL = 1
    """A msgpack map."""
    STEP = 2
    """u32 big-endian header length | msgpack header | the first bytes of the tensor."""
    CHUNK = 3
    """Raw bytes that continue the step, or the file, in progress."""


# The shortest and the longest body of each type. Empty chunks would only cost their reader time.
_BODY_BYTES: Final = {
    FrameType.CONTROL: (1, MAX_CONTROL_BYTES),
    FrameType.STEP: (_HEADER_LENGTH.size + 1, MAX_FRAME_BYTES),
    FrameType.CHUNK: (1, MAX_FRAME_BYTES),
}


class Frame(NamedTuple):
    """One received frame. `body` is a view, of the received data itself where that contains the whole frame."""

    type: FrameType
    body: memoryview


class FrameReader:
    """Splits a byte stream into frames. Buffers at most one frame, and of that only received bytes."""

    def __init__(self) -> None:
        self._prefix = bytearray()
        self._type: FrameType | None = None
        self._missing = 0
        self._body = bytearray()

    @property
    def held_bytes(self) -> int:
        """Buffered bytes of an incomplete frame."""
        return len(self._body)

    @property
    def at_boundary(self) -> bool:
        """Whether all received data has been returned as frames, so that the stream may end here."""
        return self._type is None and not self._prefix

    def receive_data(self, data: bytes) -> list[Frame]:
        """Return the frames that are complete with this data. Raises RemoteProtocolError for an illegal prefix."""
        frames: list[Frame] = []
        view = memoryview(data)
        while view:
            view = self._receive_prefix(view) if self._type is None else self._receive_body(self._type, view, frames)
        return frames

    def _receive_prefix(self, view: memoryview) -> memoryview:
        """Consume bytes of the prefix, check it once it is complete, and return the remaining data."""
        taken = PREFIX_BYTES - len(self._prefix)
        self._prefix += view[:taken]
        if len(self._prefix) == PREFIX_BYTES:
            length, code = _PREFIX.unpack(self._prefix)
            self._prefix.clear()
            if code not in _BODY_BYTES:
                raise RemoteProtocolError(f"unknown frame type {code}")
            frame_type = FrameType(code)
            shortest, longest = _BODY_BYTES[frame_type]
            if not shortest <= length <= longest:
                raise RemoteProtocolError(
                    f"{frame_type.name} frame of {length} bytes: expected {shortest} to {longest}"
                )
            self._type, self._missing = frame_type, length
        return view[taken:]

    def _receive_body(self, frame_type: FrameType, view: memoryview, frames: list[Frame]) -> memoryview:
        """Consume bytes of the body, append the frame to `frames` once complete, and return the remaining data."""
        part, rest = view[: self._missing], view[self._missing :]
        self._missing -= len(part)
        if self._missing:
            self._body += part
            return rest
        if self._body:
            self._body += part
            part = memoryview(self._body)
            self._body = bytearray()
        self._type = None
        frames.append(Frame(frame_type, part))
        return rest


def encode_frame(frame_type: FrameType, *parts: bytes | bytearray | memoryview) -> bytes:
    """Return one frame with the joined parts as its body. Raises ValueError for a body too short or too long."""
    length = sum(len(part) for part in parts)
    shortest, longest = _BODY_BYTES[frame_type]
    if not shortest <= length <= longest:
        raise ValueError(f"{frame_type.name} frame of {length} bytes: expected {shortest} to {longest}")
    return b"".join((_PREFIX.pack(length, frame_type), *parts))


def encode_step(header: bytes, payload: bytes | bytearray | memoryview) -> list[bytes]:
    """Return the frames of a step: one STEP frame, then CHUNK frames, each at most MAX_FRAME_BYTES with its prefix."""
    view = memoryview(payload).cast("B")
    first = MAX_FRAME_BYTES - PREFIX_BYTES - _HEADER_LENGTH.size - len(header)
    frames = [encode_frame(FrameType.STEP, _HEADER_LENGTH.pack(len(header)), header, view[:first])]
    frames += encode_chunks(view[first:])
    return frames


def encode_chunks(data: bytes | bytearray | memoryview) -> list[bytes]:
    """Return raw bytes as CHUNK frames, each at most MAX_FRAME_BYTES with its prefix."""
    view = memoryview(data).cast("B")
    size = MAX_FRAME_BYTES - PREFIX_BYTES
    return [encode_frame(FrameType.CHUNK, view[start : start + size]) for start in range(0, len(view), size)]


def split_step(body: memoryview) -> tuple[memoryview, memoryview]:
    """Return the header and the first tensor bytes in the body of a STEP frame. Raises RemoteProtocolError."""
    (length,) = _HEADER_LENGTH.unpack_from(body)
    if not 1 <= length <= min(MAX_CONTROL_BYTES, len(body) - _HEADER_LENGTH.size):
        raise RemoteProtocolError(f"step header of {length} bytes in a frame of {len(body)}")
    header_end = _HEADER_LENGTH.size + length
    return body[_HEADER_LENGTH.size : header_end], body[header_end:]
