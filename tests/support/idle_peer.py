"""An idle peer that only holds a connection: for tests and benchmarks of connection limits."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID

from node.network.addresses import parse_peer_address
from node.network.transport import TcpStream, secure_upgrader


@asynccontextmanager
async def hold_idle_connection(
    multiaddr: str, source: str | None = None, *, secured: bool, limiter: trio.CapacityLimiter | None = None
) -> AsyncIterator[trio.Event]:
    """Hold a connection to a peer without sending anything; the event is set when the peer ends it.

    With `secured` its handshake is finished, under a new identity, and pings of the multiplexer are answered; without,
    it is bare TCP. `source` is the address that it comes from. At most `limiter` are being opened at a time.
    """
    peer, address = parse_peer_address(multiaddr)
    limiter = limiter or trio.CapacityLimiter(1)
    ended = trio.Event()
    async with trio.open_nursery() as nursery:
        async with limiter:
            stream = await trio.open_tcp_stream(address.host, address.port, local_address=source)
            serve: Callable[[], Awaitable[object]] = stream.receive_some
            if secured:
                upgrader = secure_upgrader(create_new_key_pair(os.urandom(32)))
                peer_id = ID.from_base58(peer)
                raw = RawConnection(TcpStream(stream), initiator=True)
                muxed = await upgrader.upgrade_connection(await upgrader.upgrade_security(raw, True, peer_id), peer_id)
                serve = muxed.start

        async def watch() -> None:
            with suppress(trio.BrokenResourceError):  # reset rather than closed
                await serve()
            ended.set()

        nursery.start_soon(watch)
        try:
            yield ended
        finally:
            nursery.cancel_scope.cancel()
            await trio.aclose_forcefully(stream)
