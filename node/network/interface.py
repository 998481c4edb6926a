"""The network as the rest of the node sees it, for the real one (`host.py`) and the simulated one (`node.testing`).

No type and no exception of the library, and no workaround for its faults, passes this interface.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from protocol.announcements import Reachability
from protocol.identity import PeerId


class NetworkError(Exception):
    """A peer cannot be reached, a stream broke, or a lookup failed. The message is one line, fit for a user."""


class StreamClosed(NetworkError):
    """The stream ended, was reset, or its connection died."""


class Stream(Protocol):
    """A byte stream to one authenticated peer. One task may receive while another sends.

    Cancelling a receive loses no byte; cancelling a send half-way resets the stream.
    """

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""

    @property
    def protocol(self) -> str:
        """The negotiated protocol id."""

    @property
    def relay(self) -> PeerId | None:
        """The peer through which the stream is relayed; None where the connection is direct."""

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """Return between 1 and `max_bytes` bytes, or b"" at the end of the stream; raise StreamClosed when it broke."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything, or raise StreamClosed. A peer that accepts nothing for too long is disconnected."""

    async def aclose(self) -> None:
        """Close in both directions, within a bounded time, also under cancellation."""

    async def reset(self) -> None:
        """Reset at once: the other side sees a broken stream."""


StreamHandler = Callable[[Stream], Awaitable[None]]
"""Serves one inbound stream, which is closed when it returns and reset when it raises. It may not harm the host."""


@dataclass(slots=True)
class ByteCounts:
    """Bytes that all connections have sent and received since the start."""

    sent: int = 0
    received: int = 0


@dataclass(frozen=True, slots=True)
class GossipMessage:
    """A message that passed the topic's validator."""

    source: PeerId
    """Who published it, verified by its signature."""
    data: bytes


GossipValidator = Callable[[PeerId, bytes], bool]
"""Returns whether a message (publisher, payload) is accepted and forwarded. Runs on the event loop; raising means no.

No honest neighbour forwards what makes it raise RemoteProtocolError, so that lowers the neighbour's score; False and
UntimelyError do not.
"""

RecordValidator = Callable[[str, bytes], bool]
"""Returns whether the bytes are a valid record under the key. Raising means no."""

RecordSelector = Callable[[str, Sequence[bytes]], int]
"""Returns the index of the best of several valid records under a key."""


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A connection to the peer is up (the first one, if there are several)."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The last connection to the peer is gone."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Way:
    """How a peer is connected. `relay`: the peer that relays, None for a direct connection."""

    relay: PeerId | None = None
    punched: bool = False
    """Whether a hole was punched through a NAT for the direct connection."""
    range: str | None = None
    """The public range of the address to which a direct connection leads."""


TransferReport = Callable[[PeerId, int, float], None]
"""Takes a peer, the bytes of a transfer that filled the connection, and the seconds that it took."""


class Network(Protocol):
    """The host of one peer: an identity, connections, streams, gossip and the DHT."""

    @property
    def peer_id(self) -> PeerId:
        """Our own id."""

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        """Addresses, each ending in /p2p/<our id>, at which others may dial us."""

    @property
    def byte_counts(self) -> ByteCounts:
        """What all connections have carried; a simulated network counts nothing."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Listen and serve inside the block; close all connections at its end. Handlers and topics are set before."""

    def set_stream_handler(self, protocol: str, handler: StreamHandler) -> None:
        """Serve inbound streams of the protocol."""

    async def connect(self, multiaddr: str) -> PeerId:
        """Dial an address that ends in /p2p/<id>; return the id. Raises NetworkError with the reason."""

    async def open_stream(self, peer: PeerId, *protocols: str) -> Stream:
        """Open a stream to a peer, dialling known addresses if need be. Raises NetworkError.

        `protocols`: ids, preferred first; the stream speaks the first one that the peer serves, its `protocol`.
        """

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to the peer."""

    def connected_peers(self) -> tuple[PeerId, ...]:
        """Peers with a live connection now."""

    def way_to(self, peer: PeerId) -> Way | None:
        """Return how new streams reach a peer; None without a connection."""

    @property
    def reachability(self) -> Reachability:
        """How this node can be reached, as far as it is known."""

    def addresses_of(self, peer: PeerId) -> tuple[str, ...]:
        """Multiaddrs (each with /p2p/) at which the peer is known."""

    def add_addresses(self, peer: PeerId, multiaddrs: Sequence[str]) -> None:
        """Learn addresses of a peer. Malformed ones are dropped."""

    async def ping(self, peer: PeerId) -> float:
        """Return the round-trip time in seconds by the libp2p ping protocol. Raises NetworkError."""

    def events(self) -> AbstractAsyncContextManager[AsyncIterator[PeerConnected | PeerDisconnected]]:
        """Subscribe to connections coming and going. Bounded: a reader that lags loses the oldest."""

    def join_topic(self, topic: str, validator: GossipValidator) -> None:
        """Join a gossip topic from the start. Called before `running`."""

    def subscribe(self, topic: str) -> AbstractAsyncContextManager[AsyncIterator[GossipMessage]]:
        """Subscribe to a joined topic. Bounded: a reader that lags loses the oldest."""

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip a message on a joined topic, best effort."""

    def register_record(self, namespace: str, validator: RecordValidator, selector: RecordSelector) -> None:
        """Accept DHT records under `/<namespace>/…`. Called before `running`."""

    async def put_record(self, key: str, value: bytes) -> None:
        """Store a record at the peers nearest to its key, and here."""

    async def get_record(self, key: str) -> bytes | None:
        """Return the best record under the key that we or the peers nearest to it hold."""

    async def provide(self, key: bytes) -> None:
        """Announce that we provide the content with this key (a sha256)."""

    async def find_providers(self, key: bytes, limit: int = 20) -> tuple[PeerId, ...]:
        """Return peers (without duplicates, without us) that announced the key; their addresses are learned."""
