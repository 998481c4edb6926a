"""The byte streams of the simulated network, with the windows, errors and time-outs of the real ones."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from node.network.interface import StreamClosed
from protocol.identity import PeerId

WINDOW_BYTES: Final = 256 << 10
PIECE_BYTES: Final = 64 << 10
WRITE_TIMEOUT_S: Final = 10.0


@dataclass(slots=True)
class Packet:
    """Something that happens at its receiver when it arrives."""

    sender: PeerId
    receiver: PeerId
    deliver: Callable[[], None]
    size: int = 0
    droppable: bool = False


class StreamOwner(Protocol):
    """The network whose end of a stream it is."""

    peer_id: PeerId
    transmit: Callable[[Packet], None]
    """Puts a packet on its way."""

    def forget_stream(self, stream: "MemoryStream") -> None:
        """Drop a stream that is over."""


class MemoryStream:
    """One end of a stream; `other` is the far end."""

    other: "MemoryStream"
    relay: PeerId | None = None

    def __init__(self, owner: StreamOwner, peer: PeerId, protocol: str) -> None:
        self.peer = peer
        self.protocol = protocol
        self._owner = owner
        self._window = WINDOW_BYTES
        self._arriving: deque[bytes | str] = deque()
        self._chunks: deque[bytes] = deque()
        self._readable = trio.lowlevel.ParkingLot()
        self._writable = trio.lowlevel.ParkingLot()
        self._finished = self._broken = self._send_closed = self._closed = self._sending = False

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """Return between 1 and `max_bytes` bytes, or b"" at the end of the stream; raise StreamClosed when it broke."""
        if max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._chunks or self._closed:
            if self._closed:
                raise StreamClosed("the stream was closed on this side")
            if self._finished:
                return b""
            if self._broken:
                raise StreamClosed(f"the stream from {self.peer} broke")
            await self._readable.park()
        chunk = self._chunks[0]
        if len(chunk) <= max_bytes:
            self._chunks.popleft()
        else:
            self._chunks[0] = chunk[max_bytes:]
            chunk = chunk[:max_bytes]
        self.other.grant(len(chunk))
        return chunk

    def grant(self, size: int) -> None:
        """Let the writer here send more."""
        self._window += size
        self._writable.unpark_all()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything, or raise StreamClosed. A peer that takes nothing for too long is cut off."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        view = memoryview(data)
        started = False
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            while view:
                await self._wait_for_window()
                size = min(self._window, PIECE_BYTES, len(view))
                self._window -= size
                self._transmit(bytes(view[:size]))
                view = view[size:]
                started = True
                await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            if started and view:
                self.break_off(tell=True)
            raise
        finally:
            self._sending = False

    async def _wait_for_window(self) -> None:
        with trio.move_on_after(WRITE_TIMEOUT_S):
            while self._window == 0 and not self._broken and not self._send_closed:
                await self._writable.park()
        if self._broken or self._send_closed:
            raise StreamClosed(f"the stream to {self.peer} broke")
        if self._window == 0:
            self.break_off(tell=True)
            raise StreamClosed(f"the stream to {self.peer} broke: the peer accepted nothing for {WRITE_TIMEOUT_S:g} s")

    def _transmit(self, item: bytes | str) -> None:
        self.other.expect(item)
        size = len(item) if isinstance(item, bytes) else 0
        self._owner.transmit(Packet(self._owner.peer_id, self.peer, self.other.arrive, size))

    def expect(self, item: bytes | str) -> None:
        """Note what is under way to this end; packets overtake each other, their contents do not."""
        self._arriving.append(item)

    def arrive(self) -> None:
        """Take the next of what is under way."""
        item = self._arriving.popleft()
        if self._broken:
            return
        if item == "fin":
            self._finished = True
            if self._send_closed:
                self._owner.forget_stream(self)
        elif item == "reset":
            self.break_off(tell=False)
        elif self._closed:
            self.break_off(tell=True)
        elif isinstance(item, bytes):
            self._chunks.append(item)
        self._readable.unpark_all()

    def break_off(self, *, tell: bool) -> None:
        """End both directions; only what was complete before may still be read."""
        if tell and not self._broken and not (self._send_closed and self._finished):
            self._transmit("reset")
        self._broken = self._send_closed = True
        if not self._finished:
            self._chunks.clear()
        self._owner.forget_stream(self)
        self._readable.unpark_all()
        self._writable.unpark_all()

    async def aclose(self) -> None:
        """Close in both directions, within a bounded time, also under cancellation."""
        self._closed = True
        self._chunks.clear()
        if not self._send_closed:
            self._send_closed = True
            self._transmit("fin")
            if self._finished:
                self._owner.forget_stream(self)
        self._readable.unpark_all()
        self._writable.unpark_all()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def reset(self) -> None:
        """Tear the stream down at once: the other side sees a broken stream."""
        self._closed = True
        self.break_off(tell=True)
        self._chunks.clear()
        await trio.lowlevel.checkpoint_if_cancelled()
