"""Link pool: every job link of this node, opened on first use."""

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
import trio

from node.links.base_link import LinkBroken
from node.links.buffers import LinkBuffers
from node.links.inbound_link import InboundLink, RowReceiver, SessionHandler
from node.links.outbound_link import OutboundLink
from node.network.interface import Network, NetworkError, Stream
from node.network.loopback import loopback_pair
from protocol.connection import PROTOCOL_ID, PROTOCOL_IDS
from protocol.identity import PeerId, SessionId

MAX_LINKS = 4
"""Links of one peer to us at a time. One is enough; a peer whose link broke may make another before we see that."""

REPLACED_IDLE_S = 30.0
REPLACED_ROUND_S = 5.0
"""How long a link through a relay is kept without sessions that a direct one has replaced, and how often that is seen:
a session may have been given it that has not begun."""

_logger = structlog.get_logger(__name__)


class LinkPool:
    """Opens a link to a peer on first use, reuses it, and accepts the links of others."""

    def __init__(self, network: Network, agent: str, handler: SessionHandler) -> None:
        self.receivers: dict[SessionId, RowReceiver] = {}
        """The receivers of the sessions whose rows this node takes."""
        self._network = network
        self._agent = agent
        self._handler = handler
        self._buffers = LinkBuffers()
        self._inbound: defaultdict[PeerId, int] = defaultdict(int)
        """Inbound links by peer."""
        self._links: dict[PeerId, OutboundLink] = {}
        self._dialling: defaultdict[PeerId, trio.Lock] = defaultdict(trio.Lock)
        self._nursery: trio.Nursery | None = None
        for protocol in PROTOCOL_IDS:
            network.set_stream_handler(protocol, self._accept)

    @property
    def peer_id(self) -> PeerId:
        """Our own id."""
        return self._network.peer_id

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Carry links inside the block; break them all at its end."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                yield
            finally:
                self._nursery = None
                nursery.cancel_scope.cancel()

    def counts(self) -> tuple[int, int]:
        """Return the numbers of links to peers and from them."""
        return len(self._links), sum(self._inbound.values())

    def is_linked(self, peer: PeerId) -> bool:
        """Whether there is a link to a peer that is not broken."""
        link = self._links.get(peer)
        return link is not None and not link.broken

    async def link_to(self, peer: PeerId) -> OutboundLink:
        """Return the link to a peer, opened if need be. Raises LinkBroken with the reason."""
        if (link := self._link_for_new_sessions(peer)) is not None:
            await link.ready()
            return link
        lock = self._dialling[peer]
        try:
            async with lock:
                link = self._link_for_new_sessions(peer) or await self._start_link(peer)
                await link.ready()
                return link
        finally:
            # Peers may name any number of others to send rows to; no lock of theirs stays here.
            if not lock.locked() and not lock.statistics().tasks_waiting:
                self._dialling.pop(peer, None)

    def _link_for_new_sessions(self, peer: PeerId) -> OutboundLink | None:
        """Return the link that is not broken, and not through a relay where there is a direct connection by now."""
        link = self._links.get(peer)
        return None if link is None or link.broken or (link.is_relayed and self._is_direct(peer)) else link

    def _is_direct(self, peer: PeerId) -> bool:
        way = self._network.way_to(peer)
        return way is not None and way.relay is None

    async def _start_link(self, peer: PeerId) -> OutboundLink:
        try:
            stream = await self._open_stream(peer, self._running_nursery())
            nursery = self._running_nursery()
        except NetworkError as error:
            raise LinkBroken(peer, str(error)) from None
        if self.is_linked(peer):  # through a relay: its sessions end on it
            nursery.start_soon(_end_when_idle, self._links[peer])
        link = OutboundLink(stream, self._agent, self._buffers)
        nursery.start_soon(self._carry, link)
        return link

    async def _carry(self, link: OutboundLink) -> None:
        self._links[link.peer] = link
        try:
            await link.run()
        finally:
            if self._links.get(link.peer) is link:
                del self._links[link.peer]

    def _running_nursery(self) -> trio.Nursery:
        if self._nursery is None:
            raise NetworkError("this node is shutting down")
        return self._nursery

    async def _open_stream(self, peer: PeerId, nursery: trio.Nursery) -> Stream:
        if peer != self._network.peer_id:
            return await self._network.open_stream(peer, *PROTOCOL_IDS)
        near, far = loopback_pair(peer, PROTOCOL_ID)
        nursery.start_soon(self._accept, far)
        return near

    async def _accept(self, stream: Stream) -> None:
        peer = stream.peer
        if self._inbound[peer] >= MAX_LINKS:
            _logger.warning("link refused", peer=peer, reason=f"{MAX_LINKS} links of this peer are open already")
            await stream.reset()
            return
        self._inbound[peer] += 1
        try:
            await InboundLink(stream, self._agent, self.receivers, self._handler, self._buffers).run()
        finally:
            self._inbound[peer] -= 1
            if not self._inbound[peer]:
                del self._inbound[peer]


async def _end_when_idle(link: OutboundLink) -> None:
    """End a link that another has replaced, once it has carried no session for a while."""
    idle_s = 0.0
    while idle_s < REPLACED_IDLE_S and not link.broken:
        await trio.sleep(REPLACED_ROUND_S)
        idle_s = 0.0 if link.is_in_use else idle_s + REPLACED_ROUND_S
    link.end("replaced by a direct connection")
