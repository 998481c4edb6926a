"""Messages of the libp2p protocols of relays and reachability on a stream."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self, TypeVar

from libp2p.abc import INetStream
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from node.network.protobuf import FrameReader, MalformedMessage, Message
from node.network.yamux import Yamux
from node.network.yamux_stream import YamuxStream, shielded

M = TypeVar("M", bound=Message)


class MessageStream:
    """Sends and receives messages. Reads no byte beyond the last message: what follows may be a circuit's.

    At the end of its block the stream is closed for sending, or reset where the block raised.
    """

    def __init__(self, stream: INetStream | YamuxStream) -> None:
        """`stream`: of the library, or of a connection that it does not know."""
        muxed = stream if isinstance(stream, YamuxStream) else getattr(stream, "muxed_stream", None)
        connection = stream.muxed_conn
        if not isinstance(muxed, YamuxStream) or not isinstance(connection, Yamux):
            raise TypeError("the stream runs over another multiplexer")
        self._stream = None if isinstance(stream, YamuxStream) else stream
        self.muxed = muxed
        self.connection = connection

    async def send(self, message: Message) -> None:
        """Send a message. Raises MuxedStreamError."""
        await self.muxed.write(message.framed())

    async def receive(self, kind: type[M]) -> M:
        """Return the next message. Raises MalformedMessage, also at the end of the stream, and MuxedStreamError."""
        reader = FrameReader(kind.max_bytes)
        while True:
            try:
                data = await self.muxed.read(reader.missing)
            except MuxedStreamEOF:
                raise MalformedMessage("the stream ended before a message") from None
            if (message := reader.feed(data)) is not None:
                return kind.decode(message)

    async def release(self) -> None:
        """Take the stream out of the library's accounts."""
        with shielded(1):
            if self._stream is not None:
                await self._stream.remove()  # type: ignore[attr-defined]  # every stream of the library's swarm has it

    @asynccontextmanager
    async def undone_on_error(self) -> AsyncIterator[None]:
        """Reset the stream where the block raises, and leave it open otherwise."""
        try:
            yield
        except BaseException:
            self.muxed.reset_now()
            await self.release()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.muxed.close_now(discard=False)
        else:
            self.muxed.reset_now()
        await self.release()
