"""Our `Stream` over a stream of the library."""

from collections.abc import Awaitable, Callable
from typing import cast

import trio
from libp2p.abc import INetStream
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError

from node.network.interface import Stream, StreamClosed
from node.network.yamux import Yamux
from node.network.yamux_stream import YamuxStream, shielded
from protocol.identity import PeerId


class Libp2pStream:
    """Implements `Stream`.

    It reads and writes the multiplexer's stream directly: the library's wrapper around it adds two locks to every call,
    and is kept only for the library's own accounts.
    """

    def __init__(self, stream: INetStream) -> None:
        self.peer = PeerId(stream.muxed_conn.peer_id.to_base58())
        self.protocol = str(stream.get_protocol())
        self._stream = stream
        # All streams run over our multiplexer; the library's type does not know.
        self._muxed = cast("YamuxStream", stream.muxed_stream)  # type: ignore[attr-defined]
        self._closed = False
        self._sending = False
        if isinstance(self._muxed.muxed_conn, Yamux):
            self._muxed.muxed_conn.users += 1

    @property
    def relay(self) -> PeerId | None:
        """The relay that it passes; None where the connection is direct."""
        connection = self._muxed.muxed_conn
        relay = connection.relay if isinstance(connection, Yamux) else None
        return None if relay is None else PeerId(relay)

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """Return between 1 and `max_bytes` bytes, or b"" at the end of the stream; raise StreamClosed when it broke."""
        if max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        if self._closed:
            raise StreamClosed("the stream was closed on this side")
        try:
            return await self._muxed.read(max_bytes)
        except MuxedStreamEOF:
            return b""
        except MuxedStreamError as error:
            raise StreamClosed(f"the stream from {self.peer} broke: {error}") from error

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything, or raise StreamClosed. A peer that accepts nothing for too long is disconnected."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await self._muxed.write(data)
        except MuxedStreamError as error:
            raise StreamClosed(f"the stream to {self.peer} broke: {error}") from error
        finally:
            self._sending = False

    async def aclose(self) -> None:
        """Close in both directions, within a bounded time, also under cancellation."""
        self._muxed.close_now(discard=True)
        await self._release()

    async def reset(self) -> None:
        """Reset at once: the other side sees a broken stream."""
        self._muxed.reset_now()
        await self._release()

    async def _release(self) -> None:
        if self._closed:
            return
        self._closed = True
        if isinstance(self._muxed.muxed_conn, Yamux):
            self._muxed.muxed_conn.users -= 1
        self._muxed.readable.unpark_all()
        with shielded(1):
            await self._stream.remove()  # type: ignore[attr-defined]  # every stream of the library's swarm has it


def serve(handler: Callable[[Stream], Awaitable[None]]) -> Callable[[INetStream], Awaitable[None]]:
    """Return a handler of the library's kind for one of ours; the stream is closed at the end.

    If it raises, `isolate_errors` around all handlers resets the stream.
    """

    async def run(stream: INetStream) -> None:
        ours = Libp2pStream(stream)
        try:
            await handler(ours)
            await ours.aclose()
        except BaseException:
            await ours.reset()
            raise

    return run
