"""The real network: `Libp2pNetwork` implements `Network` over py-libp2p."""

import logging
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Final

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from libp2p.abc import ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.ping import ID as PING_PROTOCOL
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from multiaddr import Multiaddr

from node.network.addresses import AddressBook, TcpAddress, address_range, parse_address, parse_peer_address
from node.network.broadcast import Broadcast
from node.network.dht import Dht
from node.network.gossip import Gossip
from node.network.guarded_host import GuardedHost, silence_library_log, start_service
from node.network.guarded_swarm import GuardedSwarm
from node.network.interface import (
    ByteCounts,
    NetworkError,
    PeerConnected,
    PeerDisconnected,
    Stream,
    StreamHandler,
    TransferReport,
    Way,
)
from node.network.limits import NetworkLimits
from node.network.own_addresses import OwnAddresses
from node.network.streams import Libp2pStream, serve
from node.network.transport import Tcp, bind, reason, secure_upgrader
from node.network.traversal import Traversal, TraversalOptions
from node.network.unread_limit import bound_unread
from node.network.yamux import Yamux
from node.network.yamux_stream import shielded
from node.util.nursery import background_nursery
from protocol.announcements import Reachability
from protocol.identity import PeerId, peer_id_from_public_key

logger = logging.getLogger(__name__)

PING_BYTES: Final = 32
ADDRESS_LIFETIME_S: Final = 600
PEERSTORE_SWEEP_S: Final = 60
EVENT_CAPACITY: Final = 1024
OPEN_TRIES: Final = 2
"""The connection may end while a stream is opened, as that of a relay that dies; there may be another way."""

_SWARM_KEY = re.compile(r"[0-9a-f]{64}", re.IGNORECASE)


class Libp2pNetwork:
    """A libp2p host on trio: TCP, Noise, yamux, GossipSub and Kademlia."""

    def __init__(
        self,
        seed: bytes,
        *,
        listen: Sequence[str] = ("/ip4/0.0.0.0/tcp/0",),
        announce: Sequence[str] = (),
        swarm_key: str | None = None,
        limits: NetworkLimits | None = None,
        traversal: TraversalOptions | None = None,
        on_sent: TransferReport = lambda peer, size, seconds: None,
        on_received: TransferReport = lambda peer, size, seconds: None,
    ) -> None:
        """Describe a host; `running` starts it. Raises ValueError, with one line, for a malformed address or key.

        Args:
            seed: the Ed25519 private key, 32 bytes.
            listen: TCP multiaddrs to listen on; port 0 takes a free port, 0.0.0.0 and :: mean every interface.
            announce: multiaddrs that others are told besides those we listen on, such as a forwarded port of a NAT.
            swarm_key: 64 hexadecimal characters shared by the peers of a private swarm, which then speak to no others.
            limits: bounds on what peers may cost.
            traversal: relaying for others, and port mapping.
            on_sent: called with transfers to peers that filled the connection, as they happen.
            on_received: the same of transfers from peers.
        """
        if len(seed) != 32:
            raise ValueError(f"an Ed25519 seed has 32 bytes, not {len(seed)}")
        if swarm_key is not None and _SWARM_KEY.fullmatch(swarm_key) is None:
            raise ValueError("a swarm key has 64 hexadecimal characters")
        self._seed = seed
        self.peer_id = peer_id_from_public_key(
            Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
        )
        self._listen = [parse_address(text) for text in listen]
        self._own = OwnAddresses(announce)
        self._traversal = Traversal(traversal or TraversalOptions(), self._own, private_swarm=swarm_key is not None)
        self._swarm_key = swarm_key
        self._limits = limits or NetworkLimits()
        self._on_sent = on_sent
        self._on_received = on_received
        self.byte_counts = ByteCounts()
        self._book = AddressBook()
        self._handlers: dict[str, StreamHandler] = {}
        self._events: Broadcast[PeerConnected | PeerDisconnected] = Broadcast(EVENT_CAPACITY)
        self._connected: dict[PeerId, None] = {}
        self._host: GuardedHost | None = None
        self._swarm: GuardedSwarm | None = None
        self._gossip = Gossip()
        self._dht = Dht(self._limits.request_timeout_s, self._book.add)
        # These implement their part of `Network` themselves.
        self.add_addresses = self._book.add
        self.events = self._events.reader
        self.join_topic = self._gossip.join_topic
        self.subscribe = self._gossip.subscribe
        self.publish = self._gossip.publish
        self.register_record = self._dht.register_record
        self.put_record = self._dht.put_record
        self.get_record = self._dht.get_record
        self.provide = self._dht.provide
        self.find_providers = self._dht.find_providers

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        """Addresses, each ending in /p2p/<our id>, at which others may dial us; empty while not running."""
        return () if self._host is None else tuple(address.of(self.peer_id) for address in self._own.advertised())

    @property
    def reachability(self) -> Reachability:
        """How this node can be reached, as far as it is known."""
        return self._traversal.reachability()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Listen and serve inside the block; leave politely at its end."""
        silence_library_log()
        bound: dict[str, list[trio.SocketListener]] = {}
        with ExitStack() as cleanup:
            cleanup.callback(self._stopped)
            for address in self._listen:
                if listeners := await bind(address):
                    bound[str(Multiaddr(address.endpoint))] = listeners
                for listener in listeners:
                    cleanup.callback(listener.socket.close)
            async with background_nursery() as nursery:
                await self._start(nursery, bound)
                try:
                    yield
                finally:
                    await self._close_connections()

    async def _start(self, nursery: trio.Nursery, bound: dict[str, list[trio.SocketListener]]) -> None:
        addresses = [Multiaddr(text) for text in bound]
        key_pair = create_new_key_pair(self._seed)
        tcp = Tcp(nursery, bound, self._limits.handshakes, self.byte_counts)
        circuits = self._traversal.circuits(tcp)
        swarm = GuardedSwarm(
            ID.from_pubkey(key_pair.public_key),
            secure_upgrader(key_pair, self._multiplex),
            [tcp, circuits],
            book=self._book,
            limits=self._limits,
            psk=self._swarm_key,
            on_connected=self._on_connected,
            on_disconnected=self._on_disconnected,
        )
        swarm.own_transports = self._own.transports
        swarm.peerstore.add_key_pair(swarm.self_id, key_pair)
        host = GuardedHost(swarm, nursery, self._endpoints, self._traversal.observer)
        for protocol, handler in self._handlers.items():
            host.set_stream_handler(TProtocol(protocol), serve(handler))
        self._host, self._swarm = host, swarm
        self._own.listening = host.get_transport_addrs
        self._traversal.start(nursery, host, circuits, self._known_addresses)
        nursery.start_soon(swarm.peerstore.start_cleanup_task, PEERSTORE_SWEEP_S)
        nursery.start_soon(bound_unread, swarm.multiplexers, self._limits.max_unread_bytes)
        await start_service(nursery, swarm)
        await self._gossip.start(nursery, host)
        await self._dht.start(nursery, host)
        # Only now: every handler is in place.
        await swarm.listen(*addresses)
        self._traversal.listening(nursery)

    def _endpoints(self) -> list[str]:
        return [address.endpoint for address in self._own.advertised()]

    def _known_addresses(self, peer_id: ID) -> list[TcpAddress]:
        return [parse_address(text) for text in self.addresses_of(PeerId(peer_id.to_base58()))]

    async def _close_connections(self) -> None:
        """Close every connection at once, within a second, also under cancellation."""
        self._events.end()
        if self._swarm is None:
            return
        with shielded(1):
            async with trio.open_nursery() as nursery:
                for connection in self._swarm.get_connections():
                    nursery.start_soon(connection.muxed_conn.close)

    def _stopped(self) -> None:
        self._host = self._swarm = None
        self._traversal.stopped()
        self._connected.clear()
        self._gossip.stopped()
        self._dht.stopped()

    # Connections

    def _multiplex(self, conn: ISecureConn, peer_id: ID) -> Yamux:
        peer = PeerId(peer_id.to_base58())
        return Yamux(
            conn,
            peer_id,
            self._limits.streams,
            on_fault=partial(logger.warning, "disconnected %s: %s", peer),
            on_sent=partial(self._on_sent, peer),
            on_received=partial(self._on_received, peer),
        )

    def _on_connected(self, peer_id: ID) -> None:
        peer = PeerId(peer_id.to_base58())
        self._traversal.connected(peer_id)
        if peer not in self._connected:
            self._connected[peer] = None
            self._events.put(PeerConnected(peer))
            self._dht.peer_connected()

    def _on_disconnected(self, peer_id: ID) -> None:
        peer = PeerId(peer_id.to_base58())
        if self._swarm is None:
            return
        if self._swarm.direct_connection(peer_id) is None:
            self._traversal.disconnected(peer)
        if peer in self._connected and not self._swarm.live_connections(peer_id):
            del self._connected[peer]
            self._events.put(PeerDisconnected(peer))

    # Streams

    def set_stream_handler(self, protocol: str, handler: StreamHandler) -> None:
        """Serve inbound streams of the protocol."""
        self._handlers[protocol] = handler
        if self._host is not None:
            self._host.set_stream_handler(TProtocol(protocol), serve(handler))

    async def connect(self, multiaddr: str) -> PeerId:
        """Dial an address that ends in /p2p/<id>; return the id. Raises NetworkError with the reason."""
        peer, address = parse_peer_address(multiaddr)
        if peer == self.peer_id:
            raise NetworkError(f"{multiaddr} is this peer itself")
        self._book.add(peer, [address.endpoint])
        await self._dial(peer)
        return peer

    async def _dial(self, peer: PeerId) -> None:
        swarm = self._running_swarm()
        peer_id = ID.from_base58(peer)
        if swarm.live_connections(peer_id):
            return
        if known := self._book.of(peer):
            swarm.peerstore.add_addrs(peer_id, [Multiaddr(address.endpoint) for address in known], ADDRESS_LIFETIME_S)
        swarm.unblock_peer(peer_id)
        try:
            # Twice: once for dials queued before it.
            with trio.fail_after(2 * self._limits.dial_timeout_s):
                await swarm.dial_peer(peer_id)
        except Exception as error:
            raise NetworkError(f"cannot reach {peer}: {reason(error)}") from error
        if swarm.direct_connection(peer_id) is None:
            await self._traversal.wait_for_hole(peer_id)

    def _running_swarm(self) -> GuardedSwarm:
        if self._swarm is None:
            raise NetworkError("the network is not running")
        return self._swarm

    async def open_stream(self, peer: PeerId, *protocols: str) -> Stream:
        """Open a stream to a peer, dialling known addresses if need be. Raises NetworkError."""
        if peer == self.peer_id:
            raise NetworkError("a peer cannot open a stream to itself")
        what = f"cannot open a stream of {' or '.join(protocols)} to {peer}"
        for tries in range(1, OPEN_TRIES + 1):
            await self._dial(peer)
            assert self._host is not None
            way = self.way_to(peer)
            try:
                with trio.fail_after(self._limits.request_timeout_s):
                    stream = await self._host.new_stream(ID.from_base58(peer), list(map(TProtocol, protocols)))
                    return Libp2pStream(stream)
            except Exception as error:
                # Maybe only the relay has died. A peer that a direct connection has lost would be dialled in vain.
                is_final = tries == OPEN_TRIES or way is None or way.relay is None
                if is_final or self._running_swarm().live_connections(ID.from_base58(peer)):
                    raise NetworkError(f"{what}: {reason(error)}") from error
        raise AssertionError  # the last try returns or raises

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to the peer."""
        swarm = self._running_swarm()
        peer_id = ID.from_base58(peer)
        swarm.block_redial(peer_id)
        with shielded(2):
            async with trio.open_nursery() as nursery:
                for connection in swarm.get_connections(peer_id):
                    nursery.start_soon(connection.close)
        await trio.lowlevel.checkpoint()

    def connected_peers(self) -> tuple[PeerId, ...]:
        """Peers with a live connection now."""
        return tuple(self._connected)

    def way_to(self, peer: PeerId) -> Way | None:
        """Return how new streams reach a peer; None without a connection."""
        peer_id = ID.from_base58(peer)
        live = self._swarm.live_connections(peer_id) if self._swarm is not None else []
        if self._swarm is None or not live:
            return None
        muxed = (self._swarm.direct_connection(peer_id) or live[-1]).muxed_conn
        if not isinstance(muxed, Yamux):
            return Way()
        return Way(
            relay=None if muxed.relay is None else PeerId(muxed.relay),
            punched=muxed.punched,
            range=None if muxed.host is None else address_range(muxed.host),
        )

    def addresses_of(self, peer: PeerId) -> tuple[str, ...]:
        """Multiaddrs (each with /p2p/) of the peer: from the address book, then from identify."""
        found: dict[str, None] = {address.of(peer): None for address in self._book.of(peer)}
        if self._swarm is not None:
            try:
                for multiaddr in self._swarm.peerstore.addrs(ID.from_base58(peer)):
                    found[parse_address(str(multiaddr)).of(peer)] = None
            except (PeerStoreError, ValueError):
                pass  # no identify yet, or addresses that cannot be dialled
        return tuple(found)

    async def ping(self, peer: PeerId) -> float:
        """Return the round-trip time in seconds by the libp2p ping protocol. Raises NetworkError."""
        stream = await self.open_stream(peer, PING_PROTOCOL)
        try:
            with trio.fail_after(self._limits.request_timeout_s):
                started = trio.current_time()
                await stream.send_all(bytes(PING_BYTES))
                missing = PING_BYTES
                while missing:
                    echo = await stream.receive_some(missing)
                    if not echo:
                        raise NetworkError(f"{peer} closed the ping stream")
                    missing -= len(echo)
                return trio.current_time() - started
        except trio.TooSlowError:
            raise NetworkError(f"{peer} did not answer a ping within {self._limits.request_timeout_s:g} s") from None
        finally:
            await stream.aclose()
