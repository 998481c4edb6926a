"""Hole punching: upgrades a connection through a relay to a direct one, by DCUtR (`/libp2p/dcutr`).

The peer that was reached through the relay begins. Both tell at which addresses others see them; then both dial at the
same moment from the port that those addresses map, so that each dial opens the way in its own NAT for the other. The
kernel makes one connection of both dials: who began the exchange is the responder in it (Noise, yamux), the other the
initiator.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Final

import trio
from cachetools import TTLCache
from libp2p.abc import INetStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.transport.exceptions import OpenConnectionError
from multiaddr import Multiaddr

from node.network.addresses import TcpAddress, parse_address
from node.network.dial_rate_limit import MAX_ADDRESSES, few_hosts
from node.network.guarded_host import GuardedHost
from node.network.message_stream import MessageStream
from node.network.protobuf import MalformedMessage
from node.network.relay_messages import DCUTR_PROTOCOL, HolePunch, HolePunchType
from node.network.transport import Tcp, TcpStream, reason
from node.network.yamux import Yamux

logger = logging.getLogger(__name__)

TRIES: Final = 3
MESSAGE_TIMEOUT_S: Final = 5.0
PUNCH_TIMEOUT_S: Final = 3.0
"""How long one try may take: the handshake of a connection that both sides have opened included."""

REFUSED_PAUSE_S: Final = 0.02
"""Pause before an address is dialled again whose gateway refused: our dial arrived before the other side's left."""

REFUSED_DIALS: Final = 20
REFUSED_DIALS_PER_TRY: Final = 8
"""Refusals of one exchange and of one of its tries, after which a refused address is not dialled again. Few: the
address is the peer's word, and may be somebody else's."""

ENTERED_S: Final = 0.2
FAILED_S: Final = 600.0
MAX_AT_ONCE: Final = 16
MAX_RETRIES_AT_ONCE: Final = 8


class Rationed(OpenConnectionError):
    """This node has dialled enough for now that peers named: it says nothing of the peer's NAT."""


class Refusals:
    """Counts the dials of one exchange that were refused."""

    def __init__(self) -> None:
        self._left = REFUSED_DIALS
        self._left_of_try = 0
        self.rationed = False
        """Whether this node's own rate limit has ended a dial."""

    def begin_try(self) -> None:
        """Allow some more."""
        self._left_of_try = min(self._left, REFUSED_DIALS_PER_TRY)

    def may_dial_again(self) -> bool:
        """Count a refusal; return whether the address may be dialled again."""
        self._left -= 1
        self._left_of_try -= 1
        return self._left_of_try > 0


class HolePuncher:
    """Both sides of the protocol."""

    def __init__(
        self,
        nursery: trio.Nursery,
        host: GuardedHost,
        tcp: Tcp,
        *,
        observed: Callable[[], Sequence[TcpAddress]],
        known: Callable[[ID], Sequence[TcpAddress]],
    ) -> None:
        """`observed`: where others see this node. `known`: the addresses of a peer."""
        self._nursery = nursery
        self._host = host
        self._tcp = tcp
        self._observed = observed
        self._known = known
        self._busy: dict[ID, trio.CancelScope | None] = {}
        """Peers with an upgrade under way; of one that this node begins, what cancels it."""
        self._settled: dict[ID, trio.Event] = {}
        """Set when it is known whether there is a direct connection to a peer,"""
        self._arrived: dict[ID, trio.Event] = {}
        """and when there is one."""
        self._failed: TTLCache[ID, None] = TTLCache(1024, FAILED_S, trio.current_time)
        """Peers to which no hole could be punched,"""
        self._awaited: TTLCache[ID, None] = TTLCache(1024, FAILED_S, trio.current_time)
        """and those whose hole was waited for in vain: it may come yet."""

    def circuit_opened(self, connection: Yamux, *, is_retry: bool = False) -> None:
        """Begin to upgrade a connection that a peer has opened to us through a relay.

        Not where that failed a while ago, nor beside another upgrade: call again later for a circuit that stays
        (`is_retry`), whose peer was dialled in vain. Half of the places are kept for new circuits.
        """
        peer_id, most = connection.peer_id, MAX_RETRIES_AT_ONCE if is_retry else MAX_AT_ONCE
        if peer_id not in self._busy and peer_id not in self._failed and len(self._busy) < most:
            self._busy[peer_id] = scope = trio.CancelScope()
            self._nursery.start_soon(self._upgrade, connection, scope, is_retry)

    async def _upgrade(self, connection: Yamux, scope: trio.CancelScope, is_retry: bool) -> None:
        peer_id = connection.peer_id
        try:
            with scope:
                if not is_retry and await self._host.swarm.dial_direct(peer_id, self._known(peer_id)):
                    logger.info("connected to %s directly", peer_id)
                else:
                    await self._begin(connection)
        except Exception as error:  # noqa: BLE001  # the peer's messages, and a dozen types for dials that failed
            logger.debug("no direct connection to %s: %s", peer_id, reason(error))
        finally:
            if self._busy.get(peer_id) is scope:
                del self._busy[peer_id]

    async def _begin(self, connection: Yamux) -> None:
        """Begin the exchange: the first side."""
        peer_id = connection.peer_id
        swarm = self._host.swarm
        held = next(each for each in swarm.live_connections(peer_id) if each.muxed_conn is connection)
        refusals = Refusals()
        async with MessageStream(await self._host.open_stream_on(held, DCUTR_PROTOCOL)) as messages:
            for _ in range(TRIES):
                if swarm.direct_connection(peer_id) is not None:
                    return
                started_s = trio.current_time()
                await self._tell(messages)
                theirs = await _receive(messages, HolePunchType.CONNECT)
                round_trip_s = trio.current_time() - started_s
                await messages.send(HolePunch(type=HolePunchType.SYNC))
                await trio.sleep(round_trip_s / 2)
                if await self._punch(peer_id, theirs, refusals, initiator=False):
                    return
        self._failed[peer_id] = None
        logger.info("no hole could be punched to %s", peer_id)

    async def handle(self, stream: INetStream) -> None:
        """Serve the exchange: the second side.

        Only over a circuit that we have opened, as the protocol has it: a message says whom we dial, so whoever opens
        a circuit to us must not be able to send as many as it likes.
        """
        async with MessageStream(stream) as messages:
            peer_id = messages.connection.peer_id
            if messages.connection.relay is None or not messages.connection.is_initiator:
                raise OpenConnectionError("there is nothing to upgrade")
            if peer_id in self._failed or not self._may_serve(peer_id):
                raise OpenConnectionError("not now")
            self._busy[peer_id] = None
            refusals = Refusals()
            try:
                for _ in range(TRIES):
                    theirs = await _receive(messages, HolePunchType.CONNECT)
                    await self._tell(messages)
                    await _receive(messages, HolePunchType.SYNC)
                    if await self._punch(peer_id, theirs, refusals, initiator=True):
                        return
                self._failed[peer_id] = None
            finally:
                del self._busy[peer_id]

    def _may_serve(self, peer_id: ID) -> bool:
        """Return whether there is room for an exchange that a peer begins.

        Where two peers have opened circuits to each other, both begin: the one with the lower id gives its own up. The
        other's runs over the circuit that stays, as the swarm chooses.
        """
        if peer_id not in self._busy:
            return len(self._busy) < MAX_AT_ONCE
        own = self._busy[peer_id]
        if own is None or self._host.swarm.self_id.to_bytes() > peer_id.to_bytes():
            return False
        own.cancel()
        return True

    def connected(self, peer_id: ID) -> None:
        """Note that there is a direct connection to a peer."""
        self.gave_up(peer_id)
        self._failed.pop(peer_id, None)
        self._awaited.pop(peer_id, None)
        if (event := self._arrived.pop(peer_id, None)) is not None:
            direct = self._host.swarm.direct_connection(peer_id)
            if direct is not None and isinstance(direct.muxed_conn, Yamux):
                direct.muxed_conn.punched = True
            event.set()

    def gave_up(self, peer_id: ID) -> None:
        """Note that a peer is reached through its relay for now."""
        if (event := self._settled.pop(peer_id, None)) is not None:
            event.set()

    async def wait(self, peer_id: ID, timeout_s: float) -> None:
        """Wait a moment until the peer to which we opened a circuit has upgraded it, or has given up.

        Not where that failed a short while ago: NATs rarely change.
        """
        if peer_id in self._failed or peer_id in self._awaited:
            return
        try:
            with trio.move_on_after(timeout_s):
                await self._settled.setdefault(peer_id, trio.Event()).wait()
            if self._host.swarm.direct_connection(peer_id) is None:
                self._awaited[peer_id] = None
        finally:
            self.gave_up(peer_id)

    async def _tell(self, messages: MessageStream) -> None:
        own = [Multiaddr(each.transport).to_bytes() for each in self._observed()[:MAX_ADDRESSES]]
        await messages.send(HolePunch(type=HolePunchType.CONNECT, addrs=tuple(own)))

    async def _punch(self, peer_id: ID, message: HolePunch, refusals: "Refusals", *, initiator: bool) -> bool:
        """Dial all of a peer's addresses from our port; return whether there is a direct connection now.

        Raises Rationed where there is none, and not all could be dialled.
        """
        targets = punch_targets(message, self._host.swarm.is_own)
        if not targets:
            return False
        refusals.begin_try()
        arrived = self._arrived.setdefault(peer_id, trio.Event())
        try:
            with trio.move_on_after(PUNCH_TIMEOUT_S):
                async with trio.open_nursery() as nursery:

                    async def punch_one(address: TcpAddress) -> None:
                        try:
                            stream = await self._connect(address, refusals)
                            await self._secure(stream, peer_id, initiator=initiator)
                        except Exception as error:  # noqa: BLE001  # a dozen types for a dial that failed
                            logger.debug("no hole to %s at %s: %s", peer_id, address.transport, reason(error))
                        else:
                            logger.info("punched a hole to %s at %s", peer_id, address.transport)
                            nursery.cancel_scope.cancel()

                    for address in targets:
                        nursery.start_soon(punch_one, address)
                    # The other side's dial may arrive at our listener. A moment more, for our own to be entered.
                    if self._host.swarm.direct_connection(peer_id) is None:
                        await arrived.wait()
                    await trio.sleep(ENTERED_S)
                    nursery.cancel_scope.cancel()
        finally:
            self._arrived.pop(peer_id, None)
        if self._host.swarm.direct_connection(peer_id) is not None:
            return True
        if refusals.rationed:
            raise Rationed("this node has dialled enough that peers named")
        return False

    async def _connect(self, address: TcpAddress, refusals: "Refusals") -> TcpStream:
        """Dial from our port, again for a moment where a gateway refuses."""
        while self._host.swarm.named_dials.take(address, trio.current_time()):
            try:
                return await self._tcp.connect_from_port(address)
            except (ConnectionRefusedError, ConnectionResetError):
                if not refusals.may_dial_again():
                    raise
                await trio.sleep(REFUSED_PAUSE_S)
        refusals.rationed = True
        raise Rationed("this node has dialled enough that peers named")

    async def _secure(self, stream: TcpStream, peer_id: ID, *, initiator: bool) -> None:
        raw = RawConnection(stream, initiator=initiator)
        swarm = self._host.swarm
        try:
            if initiator:
                muxed = (await swarm.upgrade_outbound_raw_conn(raw, peer_id)).muxed_conn
            else:
                muxed = await swarm.upgrade_inbound_raw_conn(raw, Multiaddr("/ip4/0.0.0.0/tcp/0"))
        except BaseException:
            await trio.aclose_forcefully(stream.socket_stream)
            raise
        if not isinstance(muxed, Yamux) or muxed.peer_id != peer_id:
            await muxed.close()
            raise OpenConnectionError(f"another peer answered: {muxed.peer_id}")


def punch_targets(message: HolePunch, is_own: Callable[[TcpAddress], bool]) -> list[TcpAddress]:
    """Return where to dial of what a peer tells: a few addresses of a host or two that the internet routes."""
    found: list[TcpAddress] = []
    for data in message.addrs:
        try:
            address = parse_address(str(Multiaddr(data)))
        except Exception:  # noqa: BLE001, S112  # the bytes are a peer's, and the codecs raise what they like
            continue
        if is_target(address) and not is_own(address):
            found.append(address)
    return few_hosts(found)


def is_target(address: TcpAddress) -> bool:
    """Return whether an address may be dialled on a peer's word."""
    return address.relay is None and address.kind in {"ip4", "ip6"} and address.is_public and address.port > 0


async def _receive(messages: MessageStream, kind: HolePunchType) -> HolePunch:
    with trio.fail_after(MESSAGE_TIMEOUT_S + PUNCH_TIMEOUT_S):
        message = await messages.receive(HolePunch)
    if message.type is not kind:
        raise MalformedMessage(f"expected {kind.name}")
    return message
