"""The stream multiplexer: yamux by its specification, robust against hostile and slow peers.

The library's own yamux loses a connection when a write is cancelled, resets a stream whose reader pauses for five
seconds, lets a peer ignore its windows, polls every 10 ms for a window, and blocks for ever at the 257th stream. This
one is handed to the library through `MuxerMultistream`; README.md in this folder lists each cure with its test.

One task reads the connection and sorts what arrives into the streams' buffers, which the windows we granted bound, so
that nobody who pauses or cancels a read loses a byte. Control frames never block their author: they gather in a small
buffer that goes out with the next write.
"""

import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio
from libp2p.abc import ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError, MuxedStreamReset
from multiaddr import Multiaddr

from node.network.throughput_meter import MIN_BURST_BYTES, Report, ThroughputMeter
from node.network.yamux_stream import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    INITIAL_WINDOW_BYTES,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    StreamMultiplexer,
    YamuxLimits,
    YamuxStream,
    shielded,
)

logger = logging.getLogger(__name__)

PROTOCOL_ID: Final = "/yamux/1.0.0"

MAX_SEND_WINDOW_BYTES: Final = 1 << 30
MAX_PENDING_CONTROL_BYTES: Final = 64 << 10
MIN_CHUNK_BYTES: Final = 1024

_NORMAL, _PROTOCOL_ERROR = 0, 1


class _PeerFaultError(Exception):
    """The peer broke the yamux protocol; the connection ends."""


class Yamux(StreamMultiplexer):
    """One connection with many streams, over a secured connection."""

    def __init__(
        self,
        conn: ISecureConn,
        peer_id: ID,
        limits: YamuxLimits | None = None,
        on_fault: Callable[[str], None] = lambda reason: None,
        on_sent: Report = lambda size, seconds: None,
        on_received: Report = lambda size, seconds: None,
    ) -> None:
        """Wrap `conn`, which is authenticated as `peer_id`.

        `on_fault` is called with the reason when we disconnect the peer; `on_sent` and `on_received` with the size and
        duration of bursts, as the peer's grants and our reads show them.
        """
        self.secured_conn = conn
        self.peer_id = peer_id
        self.limits = limits or YamuxLimits()
        self.write_lock = trio.Lock()
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        # SwarmConn hangs its own hook here; it learns of the end through accept_stream just as well.
        self.on_close: Callable[[], Awaitable[None]] | None = None
        self._on_fault = on_fault
        self._streams: dict[int, YamuxStream] = {}
        self._ours = self._theirs = 0
        self._next_id = 1 if conn.is_initiator else 2
        self._window_growth = 0
        self._control = bytearray()
        self._control_pending = trio.lowlevel.ParkingLot()
        self._arrivals, self._new_streams = trio.open_memory_channel[YamuxStream](self.limits.max_streams)
        self._scope = trio.CancelScope()
        self._writing: trio.CancelScope | None = None
        self._received_frames = 0
        self.uploads = ThroughputMeter(on_sent)
        self._downloads = ThroughputMeter(on_received)
        self.established_s = trio.current_time()
        self.last_data_s: float | None = None
        """When the peer last sent data on a stream; None before the first."""
        self.punched = False
        """Whether a hole was punched for it."""
        self.identified = False
        """Whether the peer was asked over it who it is, and where it sees us."""
        self.users = 0
        """Streams of our own protocols, in either direction: those of the library are recreated elsewhere."""
        self._ping_sent = 0.0
        self._round_trip_s = 0.0

    @property
    def is_initiator(self) -> bool:
        """Whether we dialled."""
        return self.secured_conn.is_initiator

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return self.event_started.is_set() and not self.event_closed.is_set()

    @property
    def is_closed(self) -> bool:
        """Whether the connection is gone."""
        return self.event_closed.is_set()

    def rtt(self) -> float:
        """Return the last measured round-trip time in seconds, 0 before the first."""
        return self._round_trip_s

    def get_transport_addresses(self) -> list[Multiaddr]:
        """Return the addresses of the transport below."""
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Return how the peers are connected."""
        return self.secured_conn.get_connection_type()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return host and port of the peer."""
        return self.secured_conn.get_remote_address()

    @property
    def host(self) -> str | None:
        """The address of the peer; None when it is reached through a relay."""
        address = self.get_remote_address()
        return None if address is None else address[0]

    @property
    def relay(self) -> str | None:
        """The id of the relay through which the peer is reached; None for a direct connection."""
        if self.get_connection_type() is not ConnectionType.RELAYED:
            return None
        return next((str(each).split("/")[2] for each in self.get_transport_addresses()), "")

    async def start(self) -> None:
        """Serve the connection until it ends. Raises nothing but Cancelled."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._flush_control)
                    nursery.start_soon(self._keep_alive)
                    self.event_started.set()
                    await self._serve()
        finally:
            self._end()
            with shielded(1):
                await self._close_secured()

    async def close(self) -> None:
        """Send GO_AWAY, if the peer reads, and end the connection, within a second."""
        if not self.event_closed.is_set():
            with shielded(0.5):
                self.queue_control(GO_AWAY, 0, 0, _NORMAL)
                await self._flush()
        self.abort()
        with shielded(0.5):
            await self._close_secured()

    def abort(self, fault: str | None = None) -> None:
        """End the connection at once; `fault` is what the peer did wrong."""
        if fault is not None and not self.event_closed.is_set():
            self._on_fault(fault)
        self._end()
        self._scope.cancel()

    def _end(self) -> None:
        self.event_closed.set()
        self._arrivals.close()
        for stream in list(self._streams.values()):
            stream.break_off()
        self._control_pending.unpark_all()
        if self._writing is not None:
            self._writing.cancel()

    async def _close_secured(self) -> None:
        # The layers below raise a dozen types for a dead socket.
        with contextlib.suppress(Exception):
            await self.secured_conn.close()

    # Streams

    async def open_stream(self) -> YamuxStream:
        """Open a stream; its first frame goes out with the first write."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.event_closed.is_set():
            raise MuxedStreamError("the connection is closed")
        if self._ours >= self.limits.max_streams:
            raise MuxedStreamError(f"{self._ours} streams to this peer are open already")
        stream = YamuxStream(self, self._next_id, ours=True)
        self._next_id += 2
        self._streams[stream.stream_id] = stream
        self._ours += 1
        self.queue_control(WINDOW_UPDATE, SYN, stream.stream_id, 0)
        return stream

    async def accept_stream(self) -> YamuxStream:
        """Wait for a stream that the peer opens."""
        try:
            return await self._new_streams.receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable("the connection is closed") from None

    def unread_bytes(self) -> int:
        """Return how much of what has arrived was not read yet."""
        # What of a window is neither left nor consumed.
        return sum(
            each.target_window - each.receive_window - each.consumed for each in self._streams.values() if each.chunks
        )

    def forget(self, stream: YamuxStream) -> None:
        """Drop a stream that is closed in both directions."""
        if self._streams.pop(stream.stream_id, None) is None:
            return
        self._window_growth -= stream.target_window - INITIAL_WINDOW_BYTES
        if stream.ours:
            self._ours -= 1
        else:
            self._theirs -= 1

    def consumed(self, stream: YamuxStream, size: int) -> None:
        """Grant the peer new window for bytes that were read, in portions of half a window."""
        if stream.finished or stream.broken:
            return
        stream.consumed += size
        if stream.consumed < stream.target_window // 2:
            return
        now = trio.current_time()
        # As in other implementations: a window used up within four round trips is what limits the sender.
        if now - stream.last_update < 4 * max(self._round_trip_s, 0.001):
            growth = min(stream.target_window, stream.max_window_bytes - stream.target_window)
            growth = min(growth, self.limits.max_window_growth_bytes - self._window_growth)
            if growth > 0:
                stream.target_window += growth
                stream.consumed += growth
                self._window_growth += growth
        stream.last_update = now
        stream.receive_window += stream.consumed
        self.queue_control(WINDOW_UPDATE, 0, stream.stream_id, stream.consumed)
        stream.consumed = 0

    # Writing

    def queue_control(self, kind: int, flags: int, stream_id: int, value: int) -> None:
        """Queue a frame without payload for the next write, or until the connection is free."""
        if self.event_closed.is_set():
            return
        if len(self._control) >= MAX_PENDING_CONTROL_BYTES:
            self.abort("it does not read the answers it asks for")
            return
        self._control += HEADER.pack(0, kind, flags, stream_id, value)
        self._control_pending.unpark_all()

    async def write_frame(self, header: bytes, payload: memoryview | bytes = b"") -> None:
        """Write pending control frames and then this one. The caller holds `write_lock`.

        Shielded, for a frame that is cut off would ruin the connection for all streams; a peer that takes nothing for
        `write_timeout_s` loses the connection instead.
        """
        if self.event_closed.is_set():
            raise MuxedStreamReset("the connection is closed")
        data = b"".join((self._control, header, payload))
        self._control.clear()
        with shielded(self.limits.write_timeout_s) as scope:
            self._writing = scope
            try:
                await self.secured_conn.write(data)
            except Exception as error:  # the layers below raise a dozen types for a dead socket
                self.abort()
                raise MuxedStreamReset(f"the connection broke: {error}") from error
            finally:
                self._writing = None
        if self.event_closed.is_set():
            raise MuxedStreamReset("the connection was closed")
        if scope.cancelled_caught:
            reason = f"it accepted nothing for {self.limits.write_timeout_s:g} s"
            self.abort(reason)
            raise MuxedStreamReset(f"the connection was closed: the peer accepted nothing ({reason})")

    async def _flush_control(self) -> None:
        while not self.event_closed.is_set():
            if not self._control:
                await self._control_pending.park()
            await self._flush()

    async def _flush(self) -> None:
        async with self.write_lock:
            if self._control:
                with contextlib.suppress(MuxedStreamError):  # the connection is closed then
                    await self.write_frame(b"")

    async def _keep_alive(self) -> None:
        while True:
            before = self._received_frames
            self._ping_sent = trio.current_time()
            self.queue_control(PING, SYN, 0, 0)
            await trio.sleep(self.limits.keepalive_s)
            if self._received_frames == before:
                self.abort(f"it was silent for {self.limits.keepalive_s:g} s after a ping")
            overdue = trio.current_time() - self.limits.linger_s
            for stream in list(self._streams.values()):
                if stream.closed_at is not None and stream.closed_at < overdue:
                    stream.reset_now()

    # Reading

    async def _serve(self) -> None:
        try:
            await self._receive_frames()
        except _PeerFaultError as fault:
            self._on_fault(str(fault))
            self.queue_control(GO_AWAY, 0, 0, _PROTOCOL_ERROR)
            with trio.move_on_after(0.5):
                await self._flush()
        except Exception as error:  # noqa: BLE001  # the layers below raise a dozen types when they end
            logger.debug("connection to %s ended: %r", self.peer_id, error)
        self.abort()

    async def _receive_frames(self) -> None:
        buffer = bytearray()
        while True:
            while len(buffer) < HEADER.size:
                buffer += await self.secured_conn.read(None)
            version, kind, flags, stream_id, value = HEADER.unpack_from(buffer)
            del buffer[: HEADER.size]
            self._received_frames += 1
            if version != 0:
                raise _PeerFaultError("it speaks another version of yamux")
            if kind == DATA:
                stream = self._incoming_stream(flags, stream_id)
                self._admit(stream, stream_id, value)
                await self._receive_data(stream, value, buffer)
                self._handle_flags(stream, flags)
            elif kind == WINDOW_UPDATE:
                stream = self._incoming_stream(flags, stream_id)
                if stream is not None:
                    self._widen_window(stream, value)
                self._handle_flags(stream, flags)
            elif kind == PING:
                self._handle_ping(flags, value)
            elif kind == GO_AWAY:
                return
            else:
                raise _PeerFaultError(f"it sent a frame of the unknown type {kind}")

    async def _receive_data(self, stream: YamuxStream | None, size: int, buffer: bytearray) -> None:
        """Take the payload of a frame, of which `buffer` holds the beginning."""
        self.last_data_s = trio.current_time()
        burst = size >= MIN_BURST_BYTES
        if burst:
            self._downloads.begin(self.last_data_s)
        missing = size
        while missing:
            if not buffer:
                buffer += await self.secured_conn.read(None)
            chunk = bytes(buffer[:missing])
            del buffer[:missing]
            missing -= len(chunk)
            # The stream may end while its frame is still arriving.
            if stream is not None and not (stream.finished or stream.broken or stream.discarding):
                # Of tiny frames each would take a hundred times its size.
                if stream.chunks and len(stream.chunks[-1]) + len(chunk) <= MIN_CHUNK_BYTES:
                    stream.chunks[-1] += chunk
                else:
                    stream.chunks.append(chunk)
                stream.readable.unpark_all()
        if burst:
            self.last_data_s = trio.current_time()
            self._downloads.arrived(size, self.last_data_s)
            self._downloads.end(self.last_data_s)

    def _widen_window(self, stream: YamuxStream, size: int) -> None:
        stream.send_window = min(stream.send_window + size, MAX_SEND_WINDOW_BYTES)
        stream.writable.unpark_all()
        # A grant may also enlarge the window: no more has arrived than was sent.
        arrived = min(size, stream.outstanding)
        stream.outstanding -= arrived
        if arrived >= MIN_BURST_BYTES:
            self.uploads.arrived(arrived, trio.current_time())

    def _incoming_stream(self, flags: int, stream_id: int) -> YamuxStream | None:
        """Return the stream of a frame, opening it if the frame says so; None for one that is gone or not admitted."""
        if not flags & SYN:
            return self._streams.get(stream_id)
        if stream_id in self._streams or stream_id == 0 or stream_id % 2 == self._next_id % 2:
            raise _PeerFaultError(f"it opened stream {stream_id} out of turn")
        if self._theirs < self.limits.max_streams:
            stream = YamuxStream(self, stream_id, ours=False)
            with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError):
                self._arrivals.send_nowait(stream)
                self._streams[stream_id] = stream
                self._theirs += 1
                self.queue_control(WINDOW_UPDATE, ACK, stream_id, 0)
                return stream
        self.queue_control(WINDOW_UPDATE, RST, stream_id, 0)
        return None

    def _admit(self, stream: YamuxStream | None, stream_id: int, size: int) -> None:
        """Charge a data frame to the window of its stream."""
        if stream is None:
            # A stream that we broke off: what was under way when we did is dropped, within a window's worth.
            if size > self.limits.max_window_bytes:
                raise _PeerFaultError(f"it sent {size} bytes on a closed stream")
            if size:
                self.queue_control(WINDOW_UPDATE, RST, stream_id, 0)
            return
        stream.receive_window -= size
        if stream.receive_window < 0:
            raise _PeerFaultError("it sent more than the window of a stream allows")
        if size and stream.discarding:
            stream.reset_now()

    def _handle_flags(self, stream: YamuxStream | None, flags: int) -> None:
        if stream is None:
            return
        if flags & RST:
            stream.break_off()
        elif flags & FIN:
            stream.finished = True
            stream.readable.unpark_all()
            if stream.send_closed:
                self.forget(stream)

    def _handle_ping(self, flags: int, value: int) -> None:
        if flags & SYN:
            self.queue_control(PING, ACK, 0, value)
        elif flags & ACK and self._ping_sent:
            self._round_trip_s = trio.current_time() - self._ping_sent
            self._ping_sent = 0.0
