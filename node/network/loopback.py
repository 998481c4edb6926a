"""A stream of a peer to itself: a local job takes the same path, over memory instead of a socket."""

import trio

from node.network.interface import StreamClosed
from protocol.identity import PeerId

CAPACITY = 64
"""Writes in flight in one direction before the writer waits."""


class LoopbackStream:
    """One end; implements `Stream`."""

    relay: PeerId | None = None

    def __init__(
        self,
        peer: PeerId,
        protocol: str,
        outgoing: trio.MemorySendChannel[bytes],
        incoming: trio.MemoryReceiveChannel[bytes],
    ) -> None:
        self.peer = peer
        self.protocol = protocol
        self._outgoing = outgoing
        self._incoming = incoming
        self._rest = memoryview(b"")

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """Return up to `max_bytes` bytes, or b"" at the end."""
        if not self._rest:
            try:
                self._rest = memoryview(await self._incoming.receive())
            except trio.EndOfChannel:
                return b""
            except trio.ClosedResourceError:
                raise StreamClosed("the stream was closed here") from None
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        data, self._rest = self._rest[:max_bytes], self._rest[max_bytes:]
        return bytes(data)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Hand everything to the other end."""
        if data:
            try:
                await self._outgoing.send(bytes(data))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                raise StreamClosed("the other end was closed") from None

    async def aclose(self) -> None:
        """Close in both directions."""
        self._outgoing.close()
        self._incoming.close()
        await trio.lowlevel.checkpoint()

    reset = aclose


def loopback_pair(peer: PeerId, protocol: str) -> tuple[LoopbackStream, LoopbackStream]:
    """Return the two ends of a stream of a peer to itself."""
    there = trio.open_memory_channel[bytes](CAPACITY)
    back = trio.open_memory_channel[bytes](CAPACITY)
    return LoopbackStream(peer, protocol, there[0], back[1]), LoopbackStream(peer, protocol, back[0], there[1])
