"""The relay: serves reservations and circuits to others (circuit relay v2, the `hop` side).

A circuit is two streams, to the peer that asked for it and to the one with the reservation, and what arrives on one is
written to the other. Backpressure passes through: a stream that is not read grants no window to the other. The two
peers authenticate each other through it, so that the relay sees nothing but encrypted bytes.
"""

import logging
import time
from collections.abc import Callable
from typing import Final

import trio
from cachetools import LRUCache
from libp2p.abc import INetStream
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError
from multiaddr import Multiaddr

from node.network.addresses import TcpAddress, origin
from node.network.guarded_host import GuardedHost
from node.network.message_stream import MessageStream
from node.network.protobuf import MalformedMessage
from node.network.relay_ledger import RelayLedger, RelayLimits, RelayRefusal
from node.network.relay_messages import (
    STOP_PROTOCOL,
    HopMessage,
    HopType,
    Limit,
    Peer,
    Reservation,
    Status,
    StopMessage,
    StopType,
)
from node.network.transport import reason
from node.network.yamux_stream import YamuxStream
from node.util.token_bucket import TokenBucket
from protocol.identity import PeerId, parse_peer_id

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S: Final = 10.0
CHUNK_BYTES: Final = 128 << 10
WINDOW_BYTES: Final = 1 << 20
"""Largest window of one direction of a circuit: what the peers of 64 circuits can make a relay hold is bounded."""

IDENTIFY_WAIT_S: Final = 2.0
"""How long a request waits until its peer is identified: one that asks at once is of this swarm as well."""

MAX_ADDRESSES: Final = 8
MEMBER_PREFIX: Final = "/metaswarm/"
"""Of the protocols of the peers of this swarm: others may use the relay as well, and get little."""


class RelayServer:
    """Relays between peers while `serves` says so. It never dials: both peers are connected already."""

    def __init__(
        self,
        host: GuardedHost,
        limits: RelayLimits,
        *,
        private_swarm: bool,
        serves: Callable[[], bool],
        addresses: Callable[[], list[TcpAddress]],
    ) -> None:
        """`private_swarm`: who connects knows the swarm's key. `addresses`: where this node can be dialled."""
        self.ledger = RelayLedger(limits)
        self.relayed_bytes = 0
        self._host = host
        self._limits = limits
        self._private_swarm = private_swarm
        self._serves = serves
        self._addresses = addresses
        self._connects: LRUCache[str, TokenBucket] = LRUCache(1024)
        self._rate = TokenBucket(limits.bytes_per_s, max(limits.bytes_per_s / 4, CHUNK_BYTES), trio.current_time())

    async def handle(self, stream: INetStream) -> None:
        """Serve one stream of the `hop` protocol."""
        async with MessageStream(stream) as messages:
            try:
                with trio.fail_after(REQUEST_TIMEOUT_S):
                    message = await messages.receive(HopMessage)
            except MalformedMessage:
                await _answer(messages, Status.MALFORMED_MESSAGE)
                return
            await self._serve(messages, message)

    async def _serve(self, messages: MessageStream, message: HopMessage) -> None:
        if messages.connection.relay is not None or not self._serves():
            await _answer(messages, Status.PERMISSION_DENIED)
        elif message.type is HopType.CONNECT:
            now_s = trio.current_time()
            asked = self._connects.setdefault(
                origin(messages.connection.host or ""), self._limits.requests.bucket(now_s)
            )
            if asked.take(1, now_s):
                await self._connect(messages, message)
            else:
                await _answer(messages, Status.RESOURCE_LIMIT_EXCEEDED)
        elif message.type is HopType.RESERVE:
            await self._reserve(messages)
        else:
            unknown = message.type is None
            await _answer(messages, Status.MALFORMED_MESSAGE if unknown else Status.UNEXPECTED_MESSAGE)

    def disconnected(self, peer: PeerId) -> None:
        """End the reservation of a peer that has no direct connection any more."""
        self.ledger.release(peer)

    async def _reserve(self, messages: MessageStream) -> None:
        """Reserve for the peer at the other end of the connection, whatever the message says."""
        peer_id = messages.connection.peer_id
        status = self.ledger.reserve(_peer(peer_id), messages.connection.host or "", trio.current_time())
        if status is not Status.OK:
            await _answer(messages, status)
            return
        own = _peer(self._host.get_id())
        addresses = [Multiaddr(address.of(own)).to_bytes() for address in self._addresses()[:MAX_ADDRESSES]]
        reservation = Reservation(expire=int(time.time()) + self._limits.reservation_s, addrs=tuple(addresses))
        limit = await self._limit([peer_id])
        await messages.send(HopMessage(type=HopType.STATUS, status=Status.OK, reservation=reservation, limit=limit))

    async def _connect(self, messages: MessageStream, message: HopMessage) -> None:
        source = messages.connection.peer_id
        try:
            target = ID((message.peer and message.peer.id) or b"")
            parse_peer_id(target.to_base58())
        except ValueError:
            await _answer(messages, Status.MALFORMED_MESSAGE)
            return
        if self._host.swarm.direct_connection(target) is None:
            await _answer(messages, Status.NO_RESERVATION)
            return
        try:
            limit = await self._limit([source, target])
            with self.ledger.circuit(
                _peer(source),
                messages.connection.host or "",
                _peer(target),
                trio.current_time(),
                outsider=limit is not None,
            ):
                async with await self._reach(source, target, limit) as onward:
                    await messages.send(HopMessage(type=HopType.STATUS, status=Status.OK, limit=limit))
                    await self._carry(messages.muxed, onward.muxed, limit)
        except RelayRefusal as refusal:
            logger.debug("refused a circuit from %s to %s: %s", source, target, refusal)
            await _answer(messages, refusal.status)

    async def _reach(self, source: ID, target: ID, limit: Limit | None) -> MessageStream:
        """Return a stream to the peer with the reservation, which has accepted the circuit. Raises RelayRefusal."""
        connection = self._host.swarm.direct_connection(target)
        if connection is None:
            raise RelayRefusal(Status.NO_RESERVATION)
        try:
            with trio.fail_after(REQUEST_TIMEOUT_S):
                onward = MessageStream(await self._host.open_stream_on(connection, STOP_PROTOCOL))
                async with onward.undone_on_error():
                    peer = Peer(id=source.to_bytes())
                    await onward.send(StopMessage(type=StopType.CONNECT, peer=peer, limit=limit))
                    answer = await onward.receive(StopMessage)
        except Exception as error:
            logger.debug("a circuit from %s to %s failed: %s", source, target, reason(error))
            raise RelayRefusal(Status.CONNECTION_FAILED) from error
        async with onward.undone_on_error():
            if answer.type is not StopType.STATUS or answer.status is not Status.OK:
                raise RelayRefusal(Status.CONNECTION_FAILED)  # what it said is between it and its relay
        return onward

    async def _carry(self, near: YamuxStream, far: YamuxStream, limit: Limit | None) -> None:
        """Pass on what arrives, until both sides have ended, or nothing came for long, or a limit is reached.

        The latter two reset both streams.
        """
        near.max_window_bytes = far.max_window_bytes = WINDOW_BYTES
        most_bytes = (limit.data if limit else None) or None
        try:
            with trio.move_on_after((limit.duration if limit else None) or float("inf")):
                async with trio.open_nursery() as nursery:
                    nursery.cancel_scope.deadline = trio.current_time() + self._limits.idle_s
                    nursery.start_soon(self._pass_on, near, far, most_bytes, nursery.cancel_scope)
                    nursery.start_soon(self._pass_on, far, near, most_bytes, nursery.cancel_scope)
        finally:
            # Of streams that have ended in both directions nothing is left to reset.
            near.reset_now()
            far.reset_now()

    async def _pass_on(
        self, source: YamuxStream, target: YamuxStream, most_bytes: int | None, both: trio.CancelScope
    ) -> None:
        passed_bytes = 0
        try:
            while True:
                data = await source.read_available(CHUNK_BYTES)
                passed_bytes += len(data)
                if most_bytes is not None and passed_bytes > most_bytes:
                    both.cancel()
                    return
                await trio.sleep(self._rate.spend(len(data), trio.current_time()))
                self.relayed_bytes += len(data)
                await target.write(data)
                both.deadline = trio.current_time() + self._limits.idle_s
        except MuxedStreamEOF:
            target.close_now(discard=False)
        except MuxedStreamError:
            both.cancel()

    async def _limit(self, peers: list[ID]) -> Limit | None:
        """Return the limit of a circuit between peers: none where all of them are of this swarm."""
        if self._private_swarm:
            return None
        with trio.move_on_after(IDENTIFY_WAIT_S):
            for peer in peers:
                if not self._protocols(peer):
                    await self._host.wait_identified(peer)
        if all(any(each.startswith(MEMBER_PREFIX) for each in self._protocols(peer)) for peer in peers):
            return None
        return Limit(duration=self._limits.outsider_s, data=self._limits.outsider_bytes)

    def _protocols(self, peer_id: ID) -> list[str]:
        """Return what a peer speaks; nothing of one that is not identified yet."""
        try:
            return list(map(str, self._host.get_peerstore().get_protocols(peer_id)))
        except PeerStoreError:
            return []


async def _answer(messages: MessageStream, status: Status) -> None:
    await messages.send(HopMessage(type=HopType.STATUS, status=status))


def _peer(peer_id: ID) -> PeerId:
    return PeerId(peer_id.to_base58())
