"""A yamux stream: flow-control windows, receive buffer, and the tasks that wait for them."""

import struct
from abc import abstractmethod
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamClosed, MuxedStreamEOF, MuxedStreamReset

from node.network.throughput_meter import MIN_BURST_BYTES, ThroughputMeter

INITIAL_WINDOW_BYTES: Final = 256 << 10
"""Initial window of a stream in either direction, by the specification."""

MAX_FRAME_BYTES: Final = 4 * 65519 - 12
"""With its header, a frame fills exactly four Noise messages."""

HEADER = struct.Struct("!BBHII")
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8


@dataclass(frozen=True, slots=True)
class YamuxLimits:
    """Resources that one connection may use, and how long its peer is waited for."""

    max_streams: int = 200
    """Streams open at a time, counted apart for those we opened and those the peer opened."""
    max_window_bytes: int = 2 << 20
    """Largest receive window of a stream that is read quickly."""
    max_window_growth_bytes: int = 32 << 20
    """Growth of all windows of the connection together, beyond their initial sizes."""
    write_timeout_s: float = 10.0
    """A peer that accepts no byte for this long is disconnected: the stream without a window, else the connection."""
    keepalive_s: float = 10.0
    """A peer silent for this long is pinged, and disconnected if it stays silent for as long again."""
    linger_s: float = 60.0
    """How long the peer may leave its half of a stream open, and we read nothing of it, after we closed ours."""


def shielded(timeout_s: float) -> trio.CancelScope:
    """Return a cancel scope that is shielded, for at most `timeout_s`."""
    scope = trio.move_on_after(timeout_s)
    scope.shield = True
    return scope


class StreamMultiplexer(IMuxedConn):
    """What a stream needs of the connection that carries it."""

    limits: YamuxLimits
    write_lock: trio.Lock
    uploads: ThroughputMeter

    @abstractmethod
    def get_remote_address(self) -> tuple[str, int] | None:
        """Return host and port of the peer."""

    @abstractmethod
    async def write_frame(self, header: bytes, payload: memoryview | bytes = b"") -> None:
        """Write a frame; the caller holds `write_lock`."""

    @abstractmethod
    def queue_control(self, kind: int, flags: int, stream_id: int, value: int) -> None:
        """Queue a frame without payload."""

    @abstractmethod
    def consumed(self, stream: "YamuxStream", size: int) -> None:
        """Account for bytes that were read, and grant new window."""

    @abstractmethod
    def forget(self, stream: "YamuxStream") -> None:
        """Drop a stream that is closed in both directions."""


class YamuxStream(IMuxedStream):
    """One stream. The library uses read/write/close/reset; our own code the same, through `Libp2pStream`."""

    def __init__(self, connection: StreamMultiplexer, stream_id: int, *, ours: bool) -> None:
        self.muxed_conn: StreamMultiplexer = connection
        self.stream_id = stream_id
        self.ours = ours
        self.send_window = INITIAL_WINDOW_BYTES
        self.outstanding = 0
        """Bytes sent that the peer has not acknowledged by granting new window."""
        self.receive_window = INITIAL_WINDOW_BYTES
        self.target_window = INITIAL_WINDOW_BYTES
        self.max_window_bytes = connection.limits.max_window_bytes
        self.consumed = 0
        self.last_update = trio.current_time()
        self.chunks: deque[bytes] = deque()
        self.send_closed = False
        self.finished = False
        self.broken = False
        self.closed_at: float | None = None
        """When we closed our half, or last read of the other."""
        self.discarding = False
        self.readable = trio.lowlevel.ParkingLot()
        self.writable = trio.lowlevel.ParkingLot()

    async def read(self, n: int | None = None) -> bytes:
        """Return what has arrived, at most `n` bytes; raise MuxedStreamEOF at the end. Cancelling it loses nothing."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self.chunks:
            if self.finished and not self.discarding:
                raise MuxedStreamEOF("end of stream")
            if self.broken or self.discarding:
                raise MuxedStreamReset("stream was reset")
            await self.readable.park()
        return self._take(n)

    async def read_available(self, n: int) -> bytes:
        """Return what `read` would, and what has arrived behind it: whoever passes it on needs fewer frames."""
        data = await self.read(n)
        while len(data) < n and self.chunks:
            data += self._take(n - len(data))
        return data

    def _take(self, n: int | None) -> bytes:
        chunk = self.chunks[0]
        if n is None or n < 0 or len(chunk) <= n:
            self.chunks.popleft()
        else:
            self.chunks[0] = chunk[n:]
            chunk = chunk[:n]
        self.muxed_conn.consumed(self, len(chunk))
        if self.closed_at is not None:
            self.closed_at = trio.current_time()
        return chunk

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything. When it is cancelled half-way the stream is reset, and only the stream."""
        view = memoryview(data)
        started = False
        uploads = self.muxed_conn.uploads if len(view) >= MIN_BURST_BYTES else None
        if uploads is not None:
            uploads.begin(trio.current_time())
        try:
            while view:
                size = await self._wait_for_window()
                async with self.muxed_conn.write_lock:
                    # Another writer may have had the window, or the stream may have ended, while we queued.
                    size = min(size, self.send_window, MAX_FRAME_BYTES, len(view))
                    self._raise_if_unwritable()
                    if size == 0:
                        continue
                    self.send_window -= size
                    self.outstanding += size
                    started = True
                    await self.muxed_conn.write_frame(HEADER.pack(0, DATA, 0, self.stream_id, size), view[:size])
                view = view[size:]
            await trio.lowlevel.checkpoint_if_cancelled()
        except trio.Cancelled:
            if started and view:
                self.reset_now()
            raise
        finally:
            if uploads is not None:
                uploads.end(trio.current_time())

    async def _wait_for_window(self) -> int:
        self._raise_if_unwritable()
        if self.send_window == 0:
            with trio.move_on_after(self.muxed_conn.limits.write_timeout_s):
                while self.send_window == 0 and not self.broken and not self.send_closed:
                    await self.writable.park()
            self._raise_if_unwritable()
            if self.send_window == 0:
                self.reset_now()
                raise MuxedStreamReset(f"the peer accepted nothing for {self.muxed_conn.limits.write_timeout_s:g} s")
        return self.send_window

    def _raise_if_unwritable(self) -> None:
        if self.broken:
            raise MuxedStreamReset("stream was reset")
        if self.send_closed:
            raise MuxedStreamClosed("stream is closed for sending")

    async def close(self) -> None:
        """Close the sending half. The peer may still send: the library's protocols expect that."""
        self.close_now(discard=False)
        await trio.lowlevel.checkpoint_if_cancelled()

    def close_now(self, *, discard: bool) -> None:
        """Close without waiting: the last frame goes out with the next write. `discard`: reset if more data arrives."""
        if discard:
            self.discarding = True
            self.chunks.clear()
        if self.send_closed or self.broken:
            return
        self.send_closed = True
        self.closed_at = trio.current_time()
        self.muxed_conn.queue_control(WINDOW_UPDATE, FIN, self.stream_id, 0)
        self.writable.unpark_all()
        if self.finished:
            self.muxed_conn.forget(self)

    async def reset(self) -> None:
        """Reset the stream in both directions."""
        self.reset_now()
        await trio.lowlevel.checkpoint_if_cancelled()

    def reset_now(self) -> None:
        """Reset without waiting."""
        if self.broken:
            return  # the library resets every stream of a lost connection: a complete one may still be read
        if not (self.send_closed and self.finished):
            self.muxed_conn.queue_control(WINDOW_UPDATE, RST, self.stream_id, 0)
        self.chunks.clear()
        self.break_off()

    def break_off(self) -> None:
        """Mark the stream broken and wake its waiters. A stream that had ended may still be read."""
        self.broken = self.send_closed = True
        if not self.finished:
            self.chunks.clear()
        self.muxed_conn.forget(self)
        self.readable.unpark_all()
        self.writable.unpark_all()

    @property
    def is_closed(self) -> bool:
        """Whether nothing more can pass in either direction."""
        return self.broken or (self.send_closed and self.finished and not self.chunks)

    def set_deadline(self, ttl: int) -> None:
        """Yamux has no deadlines; callers use cancel scopes."""
        raise NotImplementedError("use a cancel scope")

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return host and port of the peer."""
        return self.muxed_conn.get_remote_address()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
