"""Multiplexers over memory: two ends of a connection without sockets, and a peer by hand that may break every rule."""

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import PrivateKey, PublicKey
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.stream_muxer.yamux.yamux import Yamux as LibraryYamux
from multiaddr import Multiaddr

from node.network.throughput_meter import Report
from node.network.yamux import Yamux
from node.network.yamux_stream import YamuxLimits

KEY = create_new_key_pair(bytes(32))
PEER = ID.from_pubkey(KEY.public_key)

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8


class PipeConnection(ISecureConn):
    """A secured connection over a pair of memory streams. It writes in two halves, as a socket may."""

    def __init__(self, stream: trio.StapledStream[Any, Any], *, initiator: bool) -> None:
        self.stream = stream
        self.is_initiator = initiator
        self.gate = trio.Event()
        """Between the halves of a write: open unless a test replaces it."""
        self.gate.set()

    async def read(self, n: int | None = None) -> bytes:
        try:
            data = bytes(await self.stream.receive_some(n or 65536))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        if not data:
            raise ConnectionClosedError("the end")
        return data

    async def write(self, data: bytes) -> None:
        half = len(data) // 2
        try:
            await self.stream.send_all(data[:half])
            await self.gate.wait()
            await self.stream.send_all(data[half:])
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise ConnectionClosedError("the end") from None

    async def close(self) -> None:
        await self.stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return ("192.0.2.1", 4001)

    def get_transport_addresses(self) -> list[Multiaddr]:
        return []

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT

    def get_local_peer(self) -> ID:
        return PEER

    def get_local_private_key(self) -> PrivateKey:
        return KEY.private_key

    def get_remote_peer(self) -> ID:
        return PEER

    def get_remote_public_key(self) -> PublicKey:
        return KEY.public_key


def ours(
    connection: PipeConnection, limits: YamuxLimits | None = None, faults: list[str] | None = None, **reports: Report
) -> Yamux:
    return Yamux(connection, PEER, limits, faults.append if faults is not None else lambda reason: None, **reports)


def librarys(connection: PipeConnection) -> LibraryYamux:
    return LibraryYamux(connection, PEER, is_initiator=connection.is_initiator)


def connection_pair(*, lockstep: bool = False) -> tuple[PipeConnection, PipeConnection]:
    """Return two ends. With `lockstep` a write waits until the other end has read it."""
    make = trio.testing.lockstep_stream_pair if lockstep else trio.testing.memory_stream_pair
    left, right = make()
    return PipeConnection(left, initiator=True), PipeConnection(right, initiator=False)


@asynccontextmanager
async def started(*muxers: IMuxedConn) -> AsyncIterator[None]:
    """Run multiplexers inside the block, for two hours at most: of a virtual clock that is an instant."""
    with trio.fail_after(7200):
        async with trio.open_nursery() as nursery:
            for muxer in muxers:
                nursery.start_soon(muxer.start)
                await muxer.event_started.wait()
            yield
            nursery.cancel_scope.cancel()


class RawPeer:
    """The other end, frame by frame, bound by no rule."""

    def __init__(self, connection: PipeConnection) -> None:
        self._connection = connection
        self._buffer = bytearray()

    async def send(self, kind: int, flags: int, stream_id: int, value: int, payload: bytes = b"") -> None:
        await self._connection.write(struct.pack("!BBHII", 0, kind, flags, stream_id, value) + payload)

    async def receive(self) -> tuple[int, int, int, int, bytes]:
        """Return kind, flags, stream, value and payload of the next frame that is no ping."""
        while True:
            _, kind, flags, stream_id, value = struct.unpack("!BBHII", await self._exactly(12))
            payload = await self._exactly(value) if kind == DATA else b""
            if kind != PING:
                return kind, flags, stream_id, value, payload

    async def receive_kind(self, wanted: int, flags: int = 0) -> tuple[int, int, int, int, bytes]:
        """Skip to the next frame of a kind with these flags."""
        while True:
            frame = await self.receive()
            if frame[0] == wanted and frame[1] & flags == flags:
                return frame

    async def closed(self) -> None:
        """Return when the other side has closed the connection."""
        try:
            while True:
                await self._connection.read(65536)
        except ConnectionClosedError:
            pass

    async def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._buffer += await self._connection.read(65536)
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data
