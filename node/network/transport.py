"""TCP transport for the library, and the upgrade to a secured, multiplexed connection: Noise and yamux, nothing else.

The library's own listener binds with SO_REUSEPORT, so that a second daemon on a taken port starts without a word, and
runs in a task outside of every nursery of ours; its default host also accepts plaintext.
"""

import errno
import logging
import os
import socket
from collections.abc import Callable
from typing import Final

import trio
from cachetools import LRUCache
from libp2p.abc import IListener, IMuxedConn, IRawConnection, ISecureConn, ITransport
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import THandler, TProtocol
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from node.network.addresses import TcpAddress, parse_address
from node.network.admission import HandshakeLimiter
from node.network.interface import ByteCounts, NetworkError
from node.network.yamux import PROTOCOL_ID as YAMUX_PROTOCOL_ID
from node.network.yamux import Yamux
from node.network.yamux_stream import shielded
from node.util.text import one_line

logger = logging.getLogger(__name__)

READ_BYTES: Final = 256 << 10
LISTEN_BACKLOG: Final = 4096
"""Listen backlog: a dial that finds it full is retried by its system only after a second."""

UPGRADE_TIMEOUT_S: Final = 5
MAX_UNMAPPED: Final = 1024
FROM_PORT_TIMEOUT_S: Final = 2.5
"""How long a dial from our port may take before another port is tried: half of the time that a dial has. A NAT that
still has the last connection between the two ports, which the other side had opened, drops it without a word."""


class TcpStream(ReadWriteCloser):
    """A TCP connection that reads ahead, so that a small Noise message costs one system call and not two."""

    def __init__(self, stream: trio.SocketStream, counts: ByteCounts | None = None) -> None:
        self.socket_stream = stream
        self._counts = counts or ByteCounts()
        self._ahead = bytearray()
        self.closed = trio.Event()
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host, port, *_ = stream.socket.getpeername()
        self._remote = (str(host), int(port))

    async def read(self, n: int | None = None) -> bytes:
        """Return up to `n` bytes, or b"" at the end."""
        if n == 0:
            return b""
        if not self._ahead:
            try:
                data = await self.socket_stream.receive_some(READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise ConnectionClosedError("the TCP connection is gone", transport="tcp") from error
            self._counts.received += len(data)
            if n is None or len(data) <= n:
                return bytes(data)
            self._ahead += data
        ahead = bytes(self._ahead[:n])
        del self._ahead[:n]
        return ahead

    async def write(self, data: bytes) -> None:
        """Send everything."""
        try:
            self._counts.sent += len(data)
            await self.socket_stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError("the TCP connection is gone", transport="tcp") from error

    async def close(self) -> None:
        """Close the socket."""
        self.closed.set()
        await self.socket_stream.aclose()

    def get_remote_address(self) -> tuple[str, int]:
        """Return host and port of the peer."""
        return self._remote


class TcpListener(IListener):
    """Serves sockets that `bind` has opened, in the nursery of the host."""

    def __init__(self, transport: "Tcp", handler: THandler) -> None:
        self._transport = transport
        self._handler = handler
        self._scope = trio.CancelScope()
        self._addresses: tuple[Multiaddr, ...] = ()

    async def listen(self, maddr: Multiaddr) -> None:
        """Serve the sockets bound for this address."""
        listeners = self._transport.bound.pop(str(maddr))
        self._addresses = tuple(_address_of(listener.socket) for listener in listeners)
        self._transport.nursery.start_soon(self._run, listeners)
        await trio.lowlevel.checkpoint()

    async def _run(self, listeners: list[trio.SocketListener]) -> None:
        with self._scope:
            await trio.serve_listeners(self._serve, listeners)

    async def _serve(self, socket_stream: trio.SocketStream) -> None:
        try:
            stream = TcpStream(socket_stream, self._transport.counts)
        except OSError:
            return  # closed already
        host, _ = stream.get_remote_address()
        try:
            with self._transport.handshakes.place(host) as scope:
                with trio.fail_after(UPGRADE_TIMEOUT_S):
                    await trio.lowlevel.wait_readable(socket_stream.socket)  # a silent client costs no handshake
                    await self._transport.handshakes.wait_turn(host)
                await self._handler(stream)
            if not scope.cancelled_caught:
                await stream.closed.wait()
        except Exception as error:  # noqa: BLE001  # a peer's handshake through the library's decoders
            logger.debug("inbound connection from %s failed: %r", host, error)
        finally:
            with shielded(1):
                await stream.close()

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        """Return the addresses with their real ports."""
        return self._addresses

    async def close(self) -> None:
        """Stop listening."""
        self._scope.cancel()
        await trio.lowlevel.checkpoint()


class Tcp(ITransport):
    """Dials and listens.

    While `dials_from_port`, dials to public addresses leave from the port that we listen on: so a NAT maps that port,
    others observe the mapping, and a hole can be punched through it. A peer that can be dialled does without, as two
    that dial each other from their ports at the same moment would get a single connection in which both began.
    """

    def __init__(
        self, nursery: trio.Nursery, bound: dict[str, list[trio.SocketListener]], handshakes: int, counts: ByteCounts
    ) -> None:
        self.nursery = nursery
        self.counts = counts
        self.handshakes = HandshakeLimiter(handshakes)
        self.bound = bound
        """The listening sockets of each address."""
        self.dials_from_port = True
        self._sources: dict[str, tuple[str, int]] = {}
        """From where dials leave, by the kind of their addresses."""
        self._unmapped: LRUCache[tuple[str, int], None] = LRUCache(MAX_UNMAPPED)
        """Endpoints dialled from another port: what they observe says nothing of ours."""
        for listener in (each for listeners in bound.values() for each in listeners):
            # Only now: a second daemon on the port was refused, and our own dials may share it.
            listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            host, port, *_ = listener.socket.getsockname()
            self._sources.setdefault("ip6" if listener.socket.family == socket.AF_INET6 else "ip4", (host, port))

    def maps_port(self, remote: tuple[str, int] | None) -> bool:
        """Return whether a connection that we opened to an endpoint left from the port that we listen on."""
        return remote is not None and remote not in self._unmapped

    async def connect_from_port(self, address: TcpAddress) -> TcpStream:
        """Return a TCP connection from the port that we listen on. Raises OSError, also where that is not possible."""
        if (source := self._sources.get(address.kind)) is None:
            raise OSError(errno.EADDRNOTAVAIL, f"this node does not listen on {address.kind}")
        sock = trio.socket.socket(socket.AF_INET6 if address.kind == "ip6" else socket.AF_INET)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            await sock.bind(source)
            await sock.connect((address.host, address.port))
            stream = TcpStream(trio.SocketStream(sock), self.counts)
        except BaseException:
            sock.close()
            raise
        self._unmapped.pop(stream.get_remote_address(), None)
        return stream

    async def _connect(self, address: TcpAddress) -> TcpStream:
        if self.dials_from_port and address.is_public:
            try:
                with trio.move_on_after(FROM_PORT_TIMEOUT_S):
                    return await self.connect_from_port(address)
            except OSError as error:
                # The port is bound to another address, or the last connection between the two endpoints is not over.
                if error.errno not in {errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EINVAL, errno.ENETUNREACH}:
                    raise
        stream = TcpStream(await trio.open_tcp_stream(address.host, address.port), self.counts)
        self._unmapped[stream.get_remote_address()] = None
        return stream

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """Connect; raise OpenConnectionError with the reason."""
        try:
            return RawConnection(await self._connect(parse_address(str(maddr))), initiator=True)
        except (OSError, ValueError) as error:
            raise OpenConnectionError(reason(error)) from error

    def create_listener(self, handler_function: THandler) -> TcpListener:
        """Return a listener that hands each connection to the function."""
        return TcpListener(self, handler_function)

    def can_dial(self, maddr: Multiaddr) -> bool:
        """Return whether this is plain TCP."""
        try:
            return parse_address(str(maddr)).relay is None
        except ValueError:
            return False

    can_listen = can_dial

    def protocols(self) -> list[str]:
        """Return the names of the protocols served."""
        return ["tcp"]


async def bind(address: TcpAddress) -> list[trio.SocketListener]:
    """Open listening sockets; raise NetworkError with one line, for instance when the port is taken.

    None for `::` where this machine has no IPv6: a node listens there by default.
    """
    try:
        return list(await trio.open_tcp_listeners(address.port, host=address.host, backlog=LISTEN_BACKLOG))
    except OSError as error:
        if address.host == "::" and error.errno in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}:
            logger.info("not listening on %s: %s", address.endpoint, reason(error))
            return []
        raise NetworkError(f"cannot listen on {address.endpoint}: {reason(error)}") from error


class YamuxMultistream(MuxerMultistream):
    """Negotiates yamux with our multiplexer: the library's class has its own built in."""

    def __init__(self, multiplex: Callable[[ISecureConn, ID], Yamux]) -> None:
        super().__init__({TProtocol(YAMUX_PROTOCOL_ID): Yamux})
        self._multiplex = multiplex

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """Return the multiplexed connection."""
        await self.select_transport(conn)
        return self._multiplex(conn, peer_id)


def secure_upgrader(key_pair: KeyPair, multiplex: Callable[[ISecureConn, ID], Yamux] = Yamux) -> TransportUpgrader:
    """Return the upgrader from TCP to streams: Noise, then yamux, which `multiplex` makes."""
    noise = NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)
    upgrader = TransportUpgrader({NOISE_PROTOCOL_ID: noise}, {TProtocol(YAMUX_PROTOCOL_ID): Yamux})
    upgrader.muxer_multistream = YamuxMultistream(multiplex)
    return upgrader


def _address_of(sock: trio.socket.SocketType) -> Multiaddr:
    host, port, *_ = sock.getsockname()
    kind = "ip6" if sock.family == socket.AF_INET6 else "ip4"
    return Multiaddr(f"/{kind}/{host}/tcp/{port}")


def reason(error: BaseException) -> str:
    """Return the root cause of an exception as one line."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            break
    if isinstance(error, trio.TooSlowError):
        return "timed out"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    return one_line(error, 200)
