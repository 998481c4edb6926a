"""The switchboard: every job link of this node, and who here takes the rows of which session."""

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
import trio

from node.links.link import InboundLink, LinkBroken, LinkBuffers, OpenHandler, OutboundLink, Receiver
from node.network.interface import Network, NetworkError, Stream
from node.network.loopback import loopback_pair
from protocol.connection import PROTOCOL_ID, PROTOCOL_IDS
from protocol.identity import PeerId, SessionId

MAX_LINKS = 4
"""Links of one peer to us at a time. One is enough; a peer whose link broke may make another before we see that."""

_logger = structlog.get_logger(__name__)


class SessionRegistry:
    """The sessions whose rows this node takes."""

    def __init__(self) -> None:
        self._receivers: dict[SessionId, Receiver] = {}

    def __len__(self) -> int:
        return len(self._receivers)

    def add(self, session: SessionId, receiver: Receiver) -> None:
        """Take rows of a session from now on. Raises KeyError when somebody does already."""
        if session in self._receivers:
            raise KeyError(session)
        self._receivers[session] = receiver

    def remove(self, session: SessionId) -> None:
        """Take no more rows of a session."""
        self._receivers.pop(session, None)

    def get(self, session: SessionId) -> Receiver | None:
        """Return the receiver of a session, if there is one here."""
        return self._receivers.get(session)


class LinkPool:
    """Opens a link to a peer when it is first needed, keeps it, and accepts the links of others."""

    def __init__(self, network: Network, agent: str, stages: OpenHandler) -> None:
        self.receivers = SessionRegistry()
        self._network = network
        self._agent = agent
        self._buffers = LinkBuffers()
        self._inbound: defaultdict[PeerId, int] = defaultdict(int)
        """How many links of others to us there are."""
        self._stages = stages
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

    def is_linked(self, peer: PeerId) -> bool:
        """Whether there is a link to a peer that is not broken."""
        return (link := self._links.get(peer)) is not None and not link.broken

    async def link_to(self, peer: PeerId) -> OutboundLink:
        """Return the link to a peer, made if need be. Raises LinkBroken with the reason."""
        if (link := self._links.get(peer)) and not link.broken:
            await link.ready()
            return link
        lock = self._dialling[peer]
        try:
            async with lock:
                return await self._make_link(peer)
        finally:
            # Strangers may name any number of peers to send rows to; none of them stays here.
            if not lock.statistics().tasks_waiting:
                self._dialling.pop(peer, None)

    async def _make_link(self, peer: PeerId) -> OutboundLink:
        if (link := self._links.get(peer)) and not link.broken:
            await link.ready()
            return link
        if self._nursery is None:
            raise LinkBroken(peer, "this node is leaving")
        try:
            stream = await self._open_stream(peer)
        except NetworkError as error:
            raise LinkBroken(peer, str(error)) from None
        link = OutboundLink(stream, self._agent, self._buffers)
        self._nursery.start_soon(self._carry, link)
        await link.ready()
        return link

    async def _carry(self, link: OutboundLink) -> None:
        self._links[link.peer] = link
        try:
            await link.run()
        finally:
            if self._links.get(link.peer) is link:
                del self._links[link.peer]

    async def _open_stream(self, peer: PeerId) -> Stream:
        if peer != self._network.peer_id:
            return await self._network.open_stream(peer, *PROTOCOL_IDS)
        near, far = loopback_pair(peer, PROTOCOL_ID)
        if self._nursery is None:
            raise NetworkError("this node is leaving")
        self._nursery.start_soon(self._accept, far)
        return near

    async def _accept(self, stream: Stream) -> None:
        peer = stream.peer
        if self._inbound[peer] >= MAX_LINKS:
            _logger.warning("link refused", peer=peer, reason=f"there are {MAX_LINKS} of this peer already")
            await stream.reset()
            return
        self._inbound[peer] += 1
        try:
            await InboundLink(stream, self._agent, self.receivers, self._stages, self._buffers).run()
        finally:
            self._inbound[peer] -= 1
            if not self._inbound[peer]:
                del self._inbound[peer]
