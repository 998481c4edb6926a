"""The library's swarm, the connections of a host, such that nothing a peer does ends the process or locks others out.

Subclasses and wrappers, no patches. README.md in this folder lists each fault with its cure and its test.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, Final

import trio
from libp2p.abc import IMuxedConn, INetConn, IRawConnection, ITransport
from libp2p.connection_types import ConnectionType
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.security.pnet.psk_conn import PskConn
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from node.network.addresses import AddressBook, TcpAddress, parse_address
from node.network.admission import NoRoom, choose_eviction
from node.network.dial_rate_limit import DialRateLimit, few_hosts
from node.network.limits import NetworkLimits
from node.network.peerstore import BoundedPeerStore
from node.network.transport import UPGRADE_TIMEOUT_S, reason
from node.network.yamux import Yamux
from protocol.identity import PeerId

logger = logging.getLogger(__name__)

DIAL_STAGGER_S: Final = 0.25
"""Head start of each address of a peer over the next one (happy eyeballs)."""

CIRCUIT_STAGGER_S: Final = 1.0
"""Head start of a public address over a relay: on a busy machine a circuit must not win by accident."""

MAX_CONCURRENT_DIALS: Final = 32
SIMULTANEOUS_S: Final = 5.0
"""Two connections between the same peers within this time were opened at the same time."""

KEEP_S: Final = 2.0
"""How long a connection is kept that another has replaced, for what is still on its way."""

MAX_DIALLED: Final = 8
MAX_CIRCUITS_DIALLED: Final = 3
"""Addresses of one peer that are dialled."""


class _IdleAutoConnector(AutoConnector):
    """Dials no one: node/swarm decides that. The library would dial every peer it has ever heard of."""

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        """Do nothing."""

    async def maybe_connect(self) -> None:
        """Do nothing."""


class _Dial:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.failure = ""


class GuardedSwarm(Swarm):
    """Connections to peers, with dialling of our own."""

    def __init__(
        self,
        peer_id: ID,
        upgrader: TransportUpgrader,
        transports: Sequence[ITransport],
        *,
        book: AddressBook,
        limits: NetworkLimits,
        psk: str | None,
        on_connected: Callable[[ID], None],
        on_disconnected: Callable[[ID], None],
    ) -> None:
        config = ConnectionConfig(
            max_connections=limits.max_connections,
            min_connections=0,
            # Eviction happens when a connection arrives: see `add_conn`.
            low_watermark=limits.max_connections,
            high_watermark=limits.max_connections,
            inbound_upgrade_timeout=UPGRADE_TIMEOUT_S,
            outbound_upgrade_timeout=UPGRADE_TIMEOUT_S,
        )
        super().__init__(peer_id, BoundedPeerStore(), upgrader, list(transports), connection_config=config)
        self._swarm_key = psk
        self.own_transports: Callable[[], set[str]] = set
        """The endpoints at which to dial would be to dial ourselves."""
        self.book = book
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._inbound = limits.inbound
        self._dial_timeout_s = limits.dial_timeout_s
        self._dials: dict[ID, _Dial] = {}
        self._dial_limiter = trio.CapacityLimiter(MAX_CONCURRENT_DIALS)
        self.named_dials = DialRateLimit(trio.current_time())
        """Of addresses that a peer names, while there is a circuit to it."""

    def _init_connection_management(self) -> None:
        super()._init_connection_management()
        self.auto_connector = _IdleAutoConnector(self)

    async def _handle_inbound_connection(self, read_write_closer: ReadWriteCloser, maddr: Multiaddr) -> None:
        """Admit a connection; return when it is secured.

        The library's own version returns only when the host ends, and holds one of about 250 places until then: a host
        is deaf for good after so many connections, however short they were.
        """
        await self.upgrade_inbound_raw_conn(RawConnection(read_write_closer, initiator=False), maddr)

    async def upgrade_outbound_raw_conn(
        self, raw_conn: IRawConnection, peer_id: ID, pre_scope: Any = None
    ) -> SwarmConn:
        """Secure a connection that we opened, and add it."""
        return await super().upgrade_outbound_raw_conn(self.protected(raw_conn), peer_id, pre_scope)

    async def upgrade_inbound_raw_conn(self, raw_conn: IRawConnection, maddr: Multiaddr) -> IMuxedConn:
        """Secure a connection that a peer opened, and add it."""
        return await super().upgrade_inbound_raw_conn(self.protected(raw_conn), maddr)

    def protected(self, raw_conn: IRawConnection) -> IRawConnection:
        """Return a connection that only those with the swarm's key understand, where there is one."""
        return raw_conn if self._swarm_key is None else ProtectedConnection(raw_conn, self._swarm_key)

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> SwarmConn:
        """Add an established connection; an idle one may be evicted for it."""
        if direction == "inbound" and isinstance(muxed_conn, Yamux):
            # Typed as the library's, but all run over our multiplexer.
            held = [one.muxed_conn for one in self.get_connections() if isinstance(one.muxed_conn, Yamux)]
            inbound = [one for one in held if not one.is_initiator and not one.is_closed]
            try:
                victim = choose_eviction(muxed_conn, inbound, self._inbound, trio.current_time())
            except NoRoom as error:
                await muxed_conn.close()
                raise SwarmException(str(error)) from None
            if victim is not None:
                victim.abort()
        return await super().add_conn(muxed_conn, direction)

    async def notify_connected(self, conn: INetConn) -> None:
        """Report a new connection, to us first."""
        self._on_connected(conn.muxed_conn.peer_id)
        await super().notify_connected(conn)

    async def notify_disconnected(self, conn: INetConn) -> None:
        """Report the end of a connection, to us first."""
        self._on_disconnected(conn.muxed_conn.peer_id)
        await super().notify_disconnected(conn)

    def _select_connection(self, connections: list[INetConn], peer_id: ID) -> INetConn:
        """Choose a direct connection before one through a relay, and the latest one.

        An older one may be left over from a peer that has crashed and come back. Of two that the peers opened at the
        same time, to each other, both choose the same: that of the peer with the lower id.
        """
        muxed = [(each, each.muxed_conn) for each in connections]
        ours = [(each, one) for each, one in muxed if isinstance(one, Yamux)]
        direct = [pair for pair in ours if pair[1].relay is None] or ours
        if not direct:
            return connections[-1]
        latest_s = max(one.established_s for _, one in direct)
        is_lower = self.self_id.to_bytes() < peer_id.to_bytes()

        def order(pair: tuple[INetConn, Yamux]) -> tuple[bool, bool, float]:
            _, one = pair
            is_late = one.established_s > latest_s - SIMULTANEOUS_S
            return is_late, is_late and one.is_initiator is is_lower, one.established_s

        return max(direct, key=order)[0]

    def surplus(self) -> list[Yamux]:
        """Return connections that others have replaced, and that carry no stream of our own protocols any more."""
        now_s = trio.current_time()
        found: list[Yamux] = []
        for peer_id in list(self.connections):
            live = self.live_connections(peer_id)
            if len(live) < 2:
                continue
            kept = self._select_connection(live, peer_id).muxed_conn
            if isinstance(kept, Yamux) and now_s - kept.established_s > KEEP_S:
                others = [each.muxed_conn for each in live if each.muxed_conn is not kept]
                found += [one for one in others if isinstance(one, Yamux) and not one.users]
        return found

    def multiplexers(self) -> list[Yamux]:
        """Return the multiplexers of all open connections."""
        found = [connection.muxed_conn for connection in self.get_connections() if not connection.is_closed]
        return [each for each in found if isinstance(each, Yamux)]

    def live_connections(self, peer_id: ID) -> list[INetConn]:
        """Return the open connections to a peer."""
        return [connection for connection in self.get_connections(peer_id) if not connection.is_closed]

    def best_connection(self, peer_id: ID) -> INetConn | None:
        """Return the connection that new streams to a peer take."""
        live = self.live_connections(peer_id)
        return self._select_connection(live, peer_id) if live else None

    def direct_connection(self, peer_id: ID) -> INetConn | None:
        """Return the latest open connection to a peer that does not pass a relay."""
        return next(filter(_is_direct, reversed(self.live_connections(peer_id))), None)

    def relayed_peers(self) -> list[ID]:
        """Return the peers that are connected through relays only."""
        return [each for each in self.connections if self.live_connections(each) and not self.direct_connection(each)]

    def circuits_of(self, peer_id: ID) -> list[Yamux]:
        """Return the connections that a peer has opened to us through relays."""
        muxed = [each.muxed_conn for each in self.live_connections(peer_id)]
        return [one for one in muxed if isinstance(one, Yamux) and one.relay is not None and not one.is_initiator]

    def is_own(self, address: TcpAddress) -> bool:
        """Return whether to dial an address would be to dial ourselves."""
        return address.relay is None and address.transport in self.own_transports()

    async def dial_direct(
        self, peer_id: ID, addresses: Sequence[TcpAddress], limit: DialRateLimit | None = None
    ) -> bool:
        """Dial the public ones of addresses that a peer has named, at first over a relay.

        Return whether there is a direct connection now. `limit`: in place of that of new circuits.
        """
        limit = limit or self.named_dials
        named = few_hosts(each for each in addresses if each.relay is None and each.is_public and not self.is_own(each))
        with trio.move_on_after(self._dial_timeout_s):
            async with trio.open_nursery() as nursery:

                async def dial_one(address: TcpAddress) -> None:
                    try:
                        await self._dial_addr_single_attempt(Multiaddr(address.transport), peer_id)
                    except Exception as error:  # noqa: BLE001  # a dozen types for a dial that failed
                        logger.debug("no direct connection to %s at %s: %s", peer_id, address, reason(error))
                    else:
                        nursery.cancel_scope.cancel()

                for address in named:
                    if limit.take(address, trio.current_time()):
                        nursery.start_soon(dial_one, address)
        return self.direct_connection(peer_id) is not None

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """Return connections to a peer, dialling it if there are none; raise SwarmException with the reason.

        Concurrent calls for one peer share a dial. The library's own lookups, which would try every dead peer again,
        are refused for a minute after a failure; `unblock_peer` lifts that.
        """
        if connections := self.live_connections(peer_id):
            return connections
        if self._negative_peer_cache.is_blocked(str(peer_id)):
            raise SwarmException("a dial failed less than a minute ago")
        dial = self._dials.get(peer_id)
        if dial is None:
            dial = self._dials[peer_id] = _Dial()
            self.manager.run_task(self._run_dial, peer_id, dial)
        await dial.done.wait()
        if connections := self.live_connections(peer_id):
            return connections
        raise SwarmException(dial.failure or "the connection closed at once")

    def block_redial(self, peer_id: ID) -> None:
        """Refuse dials of a peer by the library's own lookups for a minute."""
        self._negative_peer_cache.mark_failed(str(peer_id))

    async def _run_dial(self, peer_id: ID, dial: _Dial) -> None:
        dial.failure = "the dial was cancelled"
        try:
            async with self._dial_limiter:
                await self._dial_addresses(peer_id, dial)
            if not dial.failure:
                self._negative_peer_cache.evict(str(peer_id))
            elif addresses := self._dialable(peer_id):
                self.block_redial(peer_id)
                # The library's lookups must not try them; our own address book keeps them.
                self.book.add(PeerId(peer_id.to_base58()), map(str, addresses))
                self.peerstore.clear_addrs(peer_id)
        finally:
            del self._dials[peer_id]
            dial.done.set()

    async def _dial_addresses(self, peer_id: ID, dial: _Dial) -> None:
        addresses = self._dialable(peer_id)
        if not addresses:
            dial.failure = "no address of the peer is known"
            return
        dial.failure = f"{addresses[0]} did not answer within {self._dial_timeout_s:g} s"
        failures: list[str] = []

        async def dial_one(address: Multiaddr, failed: trio.Event) -> None:
            try:
                await self._dial_addr_single_attempt(address, peer_id)
            except Exception as error:  # noqa: BLE001  # a dozen types for a dial that failed
                failures.append(f"{address}: {reason(error)}")
                failed.set()
            else:
                dial.failure = ""
                nursery.cancel_scope.cancel()

        with trio.move_on_after(self._dial_timeout_s):
            async with trio.open_nursery() as nursery:
                for address, following in zip_longest(addresses, addresses[1:]):
                    failed = trio.Event()
                    nursery.start_soon(dial_one, address, failed)
                    with trio.move_on_after(_head_start_s(address, following)):
                        await failed.wait()
        if dial.failure and len(failures) == len(addresses):
            dial.failure = "; ".join(failures)

    def _dialable(self, peer_id: ID) -> list[Multiaddr]:
        """Return the addresses to dial for a peer: first public ones, then private ones, then circuits.

        Without our own: a private address may be that of two machines in two networks.
        """
        try:
            known = self.peerstore.addrs(peer_id)
        except PeerStoreError:
            return []
        own, found = self.own_transports(), dict[str, TcpAddress]()
        for multiaddr in known:
            try:
                address = parse_address(str(multiaddr))
            except ValueError:
                continue
            if address.relay is not None or address.transport not in own:
                found[address.endpoint] = address
        direct = [address for address in found.values() if address.relay is None]
        circuits = [address for address in found.values() if address.relay is not None]
        # Loopback last: on another machine it means that machine.
        direct.sort(key=lambda address: (address.is_loopback, not address.is_public))
        peer = PeerId(peer_id.to_base58())
        return [
            *(Multiaddr(address.endpoint) for address in direct[:MAX_DIALLED]),
            *(Multiaddr(address.of(peer)) for address in circuits[:MAX_CIRCUITS_DIALLED]),
        ]


def _head_start_s(address: Multiaddr, following: Multiaddr | None) -> float:
    """Return how long one address of a peer is dialled before the following one is, too."""
    if following is None:
        return 0
    this, following_one = parse_address(str(address)), parse_address(str(following))
    is_last_direct = this.relay is None and following_one.relay is not None
    return CIRCUIT_STAGGER_S if is_last_direct and this.is_public else DIAL_STAGGER_S


def _is_direct(connection: INetConn) -> bool:
    muxed = connection.muxed_conn
    return not isinstance(muxed, Yamux) or muxed.relay is None


class ProtectedConnection(PskConn):
    """A connection in a private swarm. The library's forgets who has opened it, and whether it passes a relay."""

    def __init__(self, conn: IRawConnection, psk: str) -> None:
        super().__init__(conn, psk)
        self.is_initiator = conn.is_initiator

    def get_transport_addresses(self) -> list[Multiaddr]:
        """Return the addresses of the connection below."""
        return self._conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Return whether the connection below passes a relay."""
        return self._conn.get_connection_type()
