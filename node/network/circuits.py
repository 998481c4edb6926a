"""Circuits through relays, as connections: a transport that dials through a relay, and the `stop` side of a relay.

By circuit relay v2. What passes a circuit is an ordinary connection: Noise and yamux between the two peers.
"""

import logging
from collections.abc import Callable, Collection
from typing import Any, Final

import trio
from libp2p.abc import IListener, INetStream, IRawConnection, ITransport
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import THandler
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError
from libp2p.transport.exceptions import OpenConnectionError
from multiaddr import Multiaddr

from node.network.addresses import TcpAddress, parse_address
from node.network.guarded_host import GuardedHost
from node.network.message_stream import MessageStream
from node.network.relay_messages import HOP_PROTOCOL, HopMessage, HopType, Peer, Status, StopMessage, StopType
from node.network.transport import Tcp, reason
from node.network.yamux import Yamux
from protocol.identity import PeerId, parse_peer_id

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S: Final = 10.0
RELAY_LIFETIME_S: Final = 600
"""How long the address of a relay is remembered that was dialled for a circuit."""


class CircuitStream(ReadWriteCloser):
    """A stream to a relay, as the byte stream to the peer behind it."""

    def __init__(self, messages: MessageStream) -> None:
        self._messages = messages
        self._muxed = messages.muxed

    async def read(self, n: int | None = None) -> bytes:
        """Return up to `n` bytes, or b"" at the end."""
        try:
            return await self._muxed.read(n)
        except MuxedStreamEOF:
            return b""
        except MuxedStreamError as error:
            raise ConnectionClosedError("the circuit is gone", transport="relay") from error

    async def write(self, data: bytes) -> None:
        """Send everything."""
        try:
            await self._muxed.write(data)
        except MuxedStreamError as error:
            raise ConnectionClosedError("the circuit is gone", transport="relay") from error

    async def close(self) -> None:
        """End the circuit."""
        self._muxed.close_now(discard=True)
        await self._messages.release()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return None: the peer is wherever it is, and the relay's address is not its own."""
        return None


class Circuits(ITransport):
    """Dials through relays, and accepts circuits from those where this node has a reservation."""

    def __init__(
        self, tcp: Tcp, reserved: Callable[[], Collection[PeerId]], on_circuit: Callable[[Yamux], None]
    ) -> None:
        """`reserved`: the relays with a reservation. `on_circuit` takes each new connection from a peer."""
        self._tcp = tcp
        self._reserved = reserved
        self._on_circuit = on_circuit
        self.host: GuardedHost | None = None
        """Set before the host serves: it needs its transports first."""

    def _running_host(self) -> GuardedHost:
        if self.host is None:
            raise OpenConnectionError("the network is not running")
        return self.host

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """Open a circuit; raise OpenConnectionError with the reason."""
        host = self._running_host()
        address = parse_address(str(maddr))
        if address.relay is None or address.peer is None or address.peer == address.relay:
            raise OpenConnectionError(f"{maddr} is not the address of a peer behind a relay")
        try:
            messages = await self._open(host, address, ID.from_base58(address.peer))
        except Exception as error:
            raise OpenConnectionError(f"relay {address.relay}: {reason(error)}") from error
        return _raw_connection(messages, address.relay, initiator=True)

    async def _open(self, host: GuardedHost, address: TcpAddress, target: ID) -> MessageStream:
        relay = ID.from_base58(address.relay or "")
        swarm = host.swarm
        if relay == swarm.self_id:
            raise OpenConnectionError("it is this node itself, and the peer is not connected")
        if swarm.direct_connection(relay) is None:
            swarm.peerstore.add_addrs(relay, [Multiaddr(address.transport)], RELAY_LIFETIME_S)
            swarm.unblock_peer(relay)
            await swarm.dial_peer(relay)
        connection = swarm.direct_connection(relay)
        if connection is None:
            raise OpenConnectionError("it is itself behind a relay")
        with trio.fail_after(REQUEST_TIMEOUT_S):
            messages = MessageStream(await host.open_stream_on(connection, HOP_PROTOCOL))
            async with messages.undone_on_error():
                await messages.send(HopMessage(type=HopType.CONNECT, peer=Peer(id=target.to_bytes())))
                answer = await messages.receive(HopMessage)
                _check(answer)
        return messages

    async def handle_stop(self, stream: INetStream) -> None:
        """Accept a circuit; return when it has ended."""
        host, messages = self._running_host(), MessageStream(stream)
        relay = PeerId(messages.connection.peer_id.to_base58())
        async with messages.undone_on_error():
            with trio.fail_after(REQUEST_TIMEOUT_S):
                message = await messages.receive(StopMessage)
            source = ID((message.peer and message.peer.id) or b"")
            parse_peer_id(source.to_base58())
        if (
            messages.connection.relay is not None
            or message.type is not StopType.CONNECT
            or relay not in self._reserved()
        ):
            async with messages:
                await messages.send(StopMessage(type=StopType.STATUS, status=Status.PERMISSION_DENIED))
            return
        async with messages.undone_on_error():
            with self._tcp.handshakes.place(f"relay {relay}") as scope:
                await self._tcp.handshakes.wait_turn(f"relay {relay}")
                muxed = await self._accept(host, messages, relay, source)
            if scope.cancelled_caught:
                raise OpenConnectionError("too many circuits arrive through this relay")
            self._on_circuit(muxed)
            await muxed.event_closed.wait()

    async def _accept(self, host: GuardedHost, messages: MessageStream, relay: PeerId, source: ID) -> Yamux:
        await messages.send(StopMessage(type=StopType.STATUS, status=Status.OK))
        raw = _raw_connection(messages, relay, initiator=False)
        muxed = await host.swarm.upgrade_inbound_raw_conn(raw, Multiaddr(f"/p2p/{relay}/p2p-circuit"))
        if not isinstance(muxed, Yamux) or muxed.peer_id != source:
            await muxed.close()
            raise OpenConnectionError(f"the relay announced {source}, and {muxed.peer_id} came")
        return muxed

    def create_listener(self, handler_function: THandler) -> IListener:
        """Refuse: circuits arrive as streams."""
        raise NotImplementedError("circuits arrive as streams of the relay")

    def can_dial(self, maddr: Multiaddr) -> bool:
        """Return whether this is the address of a peer behind a relay."""
        try:
            return parse_address(str(maddr)).relay is not None
        except ValueError:
            return False

    def can_listen(self, maddr: Multiaddr) -> bool:
        """Return False: circuits arrive as streams."""
        return False

    def protocols(self) -> list[str]:
        """Return the names of the protocols served."""
        return ["p2p-circuit"]


def _raw_connection(messages: MessageStream, relay: str, *, initiator: bool) -> RawConnection:
    addresses: list[Any] = [Multiaddr(f"/p2p/{relay}/p2p-circuit")]
    return RawConnection(
        CircuitStream(messages), initiator=initiator, connection_type=ConnectionType.RELAYED, addresses=addresses
    )


_REFUSALS: Final = {
    Status.NO_RESERVATION: "the peer has no reservation there any more",
    Status.PERMISSION_DENIED: "it does not relay",
    Status.RESOURCE_LIMIT_EXCEEDED: "it carries as many circuits as it may",
    Status.CONNECTION_FAILED: "it could not reach the peer",
}


def _check(answer: HopMessage) -> None:
    if answer.type is not HopType.STATUS or answer.status is not Status.OK:
        raise OpenConnectionError(_REFUSALS.get(answer.status or Status.OK, f"it refused: {answer.status}"))
