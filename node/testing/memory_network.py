"""The simulated network: `Network` in memory, for hundreds of peers in one process.

Byte streams behave as the real ones do: windows of 256 KiB, the same errors, the same timeouts.
"""

import hashlib
import heapq
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from node.network.addresses import AddressBook, TcpAddress, parse_peer_address
from node.network.broadcast import Broadcast
from node.network.interface import (
    ByteCounts,
    GossipMessage,
    GossipValidator,
    NetworkError,
    PeerConnected,
    PeerDisconnected,
    RecordSelector,
    RecordValidator,
    Stream,
    StreamHandler,
    Way,
)
from node.testing.memory_links import MemoryLinks
from node.testing.memory_stream import MemoryStream, Packet
from node.util.nursery import background_nursery
from protocol.announcements import Reachability
from protocol.identity import PeerId
from protocol.limits import MAX_RECORD_BYTES

REQUEST_TIMEOUT_S: Final = 10.0
DIAL_TIMEOUT_S: Final = 5.0
MAX_MESSAGE_BYTES: Final = 64 << 10
CAPACITY: Final = 1024
GOSSIP_FANOUT: Final = 8
SEEN_MESSAGES: Final = 8192
REPLICAS: Final = 20


@dataclass(slots=True)
class _Connection:
    number: int
    """The same at both ends."""
    streams: dict[MemoryStream, None] = field(default_factory=dict)


@dataclass(slots=True)
class _Topic:
    validator: GossipValidator
    readers: Broadcast[GossipMessage] = field(default_factory=lambda: Broadcast(CAPACITY))
    seen: dict[tuple[PeerId, int], None] = field(default_factory=dict)


class MemoryNetwork:
    """Implements `Network` for one peer of a simulation; made by `MemoryNetworkHub.network`."""

    def __init__(self, hub: "MemoryLinks[MemoryNetwork]", peer_id: PeerId, address: TcpAddress) -> None:
        self.hub = hub
        self.peer_id = peer_id
        self.connections: dict[PeerId, _Connection] = {}
        self.address = address
        self.byte_counts = ByteCounts()
        self.position = _position(peer_id.encode())
        self._book = hub.address_book or AddressBook()
        self._handlers: dict[str, StreamHandler] = {}
        self._topics: dict[str, _Topic] = {}
        self._namespaces: dict[str, tuple[RecordValidator, RecordSelector]] = {}
        self.records: dict[str, bytes] = {}
        """The records of the DHT that are stored here, by key."""
        self.providers: defaultdict[bytes, dict[PeerId, None]] = defaultdict(dict)
        self._events: Broadcast[PeerConnected | PeerDisconnected] = Broadcast(CAPACITY)
        self._nursery: trio.Nursery | None = None
        self.transmit: Callable[[Packet], None] = hub.send
        # These implement their part of `Network` themselves.
        self.add_addresses = self._book.add
        self.events = self._events.reader

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        """Our address in the simulation; none while not running."""
        return (self.address.of(self.peer_id),) if self._nursery is not None else ()

    @property
    def reachability(self) -> Reachability:
        """Nothing is known: all peers of a simulation can dial each other."""
        return Reachability()

    def way_to(self, peer: PeerId) -> Way | None:
        """Return how new streams reach a peer; None without a connection."""
        return Way() if peer in self.connections else None

    @property
    def alive(self) -> bool:
        """Whether the network runs."""
        return self._nursery is not None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run inside the block."""
        async with background_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self.hub.carry)
            try:
                yield
            finally:
                self.crash()

    def crash(self) -> None:
        """Crash: every connection breaks, what runs inside `running` is cancelled, further calls fail."""
        if self._nursery is None:
            return
        nursery, self._nursery = self._nursery, None
        self._events.end()
        for topic in self._topics.values():
            topic.readers.end()
        for peer in list(self.connections):
            self.lose_connection(peer)
        nursery.cancel_scope.cancel()

    async def _round_trips(self, peer: PeerId, count: float, timeout_s: float, what: str) -> "MemoryNetwork":
        """Wait as long as so many round trips take; return the peer, or raise NetworkError if it does not answer."""
        self._require_running()
        other = self.hub.networks.get(peer)
        if self.hub.blocked(self.peer_id, peer):
            await trio.sleep(timeout_s)
            raise NetworkError(f"{what}: no answer within {timeout_s:g} s")
        delay = sum(self.hub.latency(self.peer_id, peer) for _ in range(round(2 * count)))
        await trio.sleep(min(delay, timeout_s))
        self._require_running()
        if other is None or other is not self.hub.networks.get(peer) or not other.alive:
            raise NetworkError(f"{what}: connection refused")
        return other

    def _require_running(self) -> None:
        if self._nursery is None:
            raise NetworkError("the network is not running")

    # Connections

    async def connect(self, multiaddr: str) -> PeerId:
        """Dial an address that ends in /p2p/<id>; return the id. Raises NetworkError with the reason."""
        peer, address = parse_peer_address(multiaddr)
        self._require_running()
        if peer == self.peer_id:
            raise NetworkError(f"{multiaddr} is this peer itself")
        self._book.add(peer, [address.endpoint])
        await self._dial(peer)
        return peer

    async def _dial(self, peer: PeerId) -> None:
        self._require_running()
        if peer in self.connections:
            return
        failures = []
        for address in self._book.of(peer):
            network = self.hub.by_endpoint.get(address.endpoint)
            what = address.endpoint
            if network is None:
                failures.append(f"{what}: connection refused")
                continue
            try:
                other = await self._round_trips(network.peer_id, 2.5, DIAL_TIMEOUT_S, what)
            except NetworkError as error:
                failures.append(str(error))
                continue
            if other.peer_id != peer:
                failures.append(f"{what}: another peer answered")
                continue
            if peer not in self.connections:
                number = next(self.hub.connection_numbers)
                self.add_connection(other, number)
                other.add_connection(self, number)
            return
        raise NetworkError(f"cannot reach {peer}: {'; '.join(failures) or 'no address of the peer is known'}")

    def add_connection(self, other: "MemoryNetwork", number: int) -> None:
        """Note a new connection; its peer's address is learned, as identify would tell it."""
        replaced = self.connections.get(other.peer_id)
        self.connections[other.peer_id] = _Connection(number)
        if replaced is not None:  # the peer had given up a connection that we still believed in
            for stream in list(replaced.streams):
                stream.break_off(tell=False)
            return
        self._book.add(other.peer_id, other.multiaddrs)
        self._events.put(PeerConnected(other.peer_id))

    def lose_connection(self, peer: PeerId, number: int | None = None) -> None:
        """End a connection here, and soon at the other end; with a number, only if it is still that one."""
        connection = self.connections.get(peer)
        if connection is None or number not in {None, connection.number}:
            return
        del self.connections[peer]
        for stream in list(connection.streams):
            stream.break_off(tell=False)
        self._events.put(PeerDisconnected(peer))
        other = self.hub.networks.get(peer)
        if other is not None and peer != self.peer_id:
            self.hub.send(Packet(self.peer_id, peer, lambda: other.lose_connection(self.peer_id, connection.number)))

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to the peer."""
        self._require_running()
        self.lose_connection(peer)
        await trio.lowlevel.checkpoint()

    def connected_peers(self) -> tuple[PeerId, ...]:
        """Peers with a live connection now."""
        return tuple(self.connections)

    def addresses_of(self, peer: PeerId) -> tuple[str, ...]:
        """Multiaddrs (each with /p2p/) at which the peer is known."""
        return tuple(address.of(peer) for address in self._book.of(peer))

    async def ping(self, peer: PeerId) -> float:
        """Return the round-trip time in seconds. Raises NetworkError."""
        await self._dial(peer)
        started = trio.current_time()
        await self._round_trips(peer, 1, REQUEST_TIMEOUT_S, f"ping of {peer}")
        return trio.current_time() - started

    # Streams

    def set_stream_handler(self, protocol: str, handler: StreamHandler) -> None:
        """Serve inbound streams of the protocol."""
        self._handlers[protocol] = handler

    async def open_stream(self, peer: PeerId, *protocols: str) -> Stream:
        """Open a stream to a peer, dialling known addresses if need be. Raises NetworkError."""
        if peer == self.peer_id:
            raise NetworkError("a peer opens no streams to itself")
        await self._dial(peer)
        what = f"cannot open a stream of {' or '.join(protocols)} to {peer}"
        other = await self._round_trips(peer, 1, REQUEST_TIMEOUT_S, what)
        if peer not in self.connections:
            raise NetworkError(f"{what}: the connection broke")
        for protocol in protocols:
            ours, theirs = MemoryStream(self, peer, protocol), MemoryStream(other, self.peer_id, protocol)
            ours.other, theirs.other = theirs, ours
            if other.accept(theirs):
                self.connections[peer].streams[ours] = None
                return ours
        raise NetworkError(f"{what}: it does not serve that")

    def accept(self, stream: MemoryStream) -> bool:
        """Start serving a stream that a peer opened, if we serve its protocol."""
        handler = self._handlers.get(stream.protocol)
        if handler is None or self._nursery is None or stream.peer not in self.connections:
            return False
        self.connections[stream.peer].streams[stream] = None
        self._nursery.start_soon(self._serve, handler, stream)
        return True

    async def _serve(self, handler: StreamHandler, stream: MemoryStream) -> None:
        try:
            await handler(stream)
        except Exception:  # noqa: BLE001  # a handler may not harm the host
            await stream.reset()
        else:
            await stream.aclose()

    def forget_stream(self, stream: MemoryStream) -> None:
        """Drop a stream that is over."""
        if (connection := self.connections.get(stream.peer)) is not None:
            connection.streams.pop(stream, None)

    # Gossip: flooding with a bounded number of neighbours each

    def join_topic(self, topic: str, validator: GossipValidator) -> None:
        """Join a gossip topic from the start. Called before `running`."""
        self._topics[topic] = _Topic(validator)

    def _topic(self, name: str) -> _Topic:
        if name not in self._topics:
            raise NetworkError(f"the topic {name} was not joined")
        return self._topics[name]

    def subscribe(self, topic: str) -> AbstractAsyncContextManager[AsyncIterator[GossipMessage]]:
        """Subscribe to a joined topic. Bounded: a reader that lags loses the oldest."""
        return self._topic(topic).readers.reader()

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip a message on a joined topic, best effort."""
        self._topic(topic)
        self._require_running()
        if len(data) > MAX_MESSAGE_BYTES:
            raise NetworkError(f"a gossip message has at most {MAX_MESSAGE_BYTES} bytes, not {len(data)}")
        await trio.lowlevel.checkpoint()
        message = GossipMessage(self.peer_id, bytes(data))
        self.receive_gossip(topic, message, next(self.hub.message_numbers), self.peer_id)

    def receive_gossip(self, name: str, message: GossipMessage, number: int, forwarder: PeerId) -> None:
        """Take in a message for the first time, and forward it."""
        topic = self._topics.get(name)
        if topic is None or (message.source, number) in topic.seen:
            return
        topic.seen[message.source, number] = None
        if len(topic.seen) > SEEN_MESSAGES:
            del topic.seen[next(iter(topic.seen))]
        try:
            if not topic.validator(message.source, message.data):
                return
        except Exception:  # noqa: BLE001  # a validator that raises refuses
            return
        if message.source != self.peer_id:
            topic.readers.put(message)
        neighbours = [peer for peer in self.connections if peer not in {forwarder, message.source}]
        if len(neighbours) > GOSSIP_FANOUT:
            neighbours = self.hub.rng.sample(neighbours, GOSSIP_FANOUT)
        for peer in neighbours:
            if (other := self.hub.networks.get(peer)) is not None:
                deliver = partial(other.receive_gossip, name, message, number, self.peer_id)
                self.hub.send(Packet(self.peer_id, peer, deliver, len(message.data), droppable=True))

    # DHT: every record at the peers nearest to its key, found at once but after the time that a lookup takes

    def register_record(self, namespace: str, validator: RecordValidator, selector: RecordSelector) -> None:
        """Accept DHT records under `/<namespace>/…`. Called before `running`."""
        self._namespaces[namespace] = (validator, selector)

    def _nearest(self, key: bytes) -> list["MemoryNetwork"]:
        if not self.connections:
            return []
        target = _position(key)
        reachable = [
            network
            for network in self.hub.networks.values()
            if network is not self and network.alive and not self.hub.blocked(self.peer_id, network.peer_id)
        ]
        return heapq.nsmallest(REPLICAS, reachable, key=lambda network: network.position ^ target)

    async def _look_up(self, key: bytes) -> list["MemoryNetwork"]:
        self._require_running()
        nearest = self._nearest(key)
        slowest = max((self.hub.latency(self.peer_id, network.peer_id) for network in nearest), default=0.0)
        await trio.sleep(6 * slowest)
        self._require_running()
        return [network for network in nearest if network.alive]

    def store_record(self, key: str, value: bytes) -> bool:
        """Store a record here if it is valid and no worse than the one that we have; return whether we did."""
        parts = key.split("/", 2)
        namespace = self._namespaces.get(parts[1]) if len(parts) == 3 and not parts[0] else None
        if namespace is None:
            return False
        validator, selector = namespace
        held = self.records.get(key)
        try:
            if not validator(key, value):
                return False
            if held is not None and held != value and selector(key, [held, value]) == 0:
                return False
        except Exception:  # noqa: BLE001  # a validator that raises refuses
            return False
        self.records[key] = value
        return True

    async def put_record(self, key: str, value: bytes) -> None:
        """Store a record at the peers nearest to its key, and here."""
        if len(value) > MAX_RECORD_BYTES:
            raise NetworkError(f"a record has at most {MAX_RECORD_BYTES} bytes, not {len(value)}")
        nearest = await self._look_up(key.encode())
        if not self.store_record(key, bytes(value)):
            raise NetworkError(f"storing {key} failed: not a valid record, or a newer one is stored already")
        for network in nearest:
            network.store_record(key, bytes(value))

    async def get_record(self, key: str) -> bytes | None:
        """Return the best record under the key that we or the peers nearest to it hold."""
        for network in await self._look_up(key.encode()):
            if (value := network.records.get(key)) is not None:
                self.store_record(key, value)
        return self.records.get(key)

    async def provide(self, key: bytes) -> None:
        """Announce that we provide the content with this key (a sha256)."""
        for network in [self, *await self._look_up(key)]:
            network.providers[key][self.peer_id] = None

    async def find_providers(self, key: bytes, limit: int = 20) -> tuple[PeerId, ...]:
        """Return peers (without duplicates, without us) that announced the key; their addresses are learned."""
        found: dict[PeerId, None] = {}
        for network in [self, *await self._look_up(key)]:
            found.update(network.providers[key])
        found.pop(self.peer_id, None)
        for peer in found:
            if (other := self.hub.networks.get(peer)) is not None:
                self._book.add(peer, [other.address.endpoint])
        return tuple(found)[:limit]


class MemoryNetworkHub(MemoryLinks[MemoryNetwork]):
    """Makes the networks of a simulation's peers and connects them; peers are killed, stopped and partitioned here."""

    def network(self, peer_id: PeerId) -> MemoryNetwork:
        """Make the network of a peer; again for one that was killed and comes back."""
        number = len(self.by_endpoint) + 1
        address = TcpAddress("ip4", f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", 4001, peer_id)
        network = MemoryNetwork(self, peer_id, address)
        self.networks[peer_id] = network
        self.by_endpoint[address.endpoint] = network
        return network

    def kill(self, peer: PeerId) -> None:
        """Crash a peer: its own calls fail from now on, and the others see their connections to it break."""
        self.networks[peer].crash()


def _position(key: bytes) -> int:
    """Return the place of a key in the DHT, where distances are XORs."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big")
