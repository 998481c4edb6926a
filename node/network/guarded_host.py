"""The library's host and swarm, such that nothing a peer does ends the process or locks others out.

Subclasses and wrappers, no patches. README.md in this folder lists each fault with its cure and its test.
"""

import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import trio
from cachetools import TTLCache
from libp2p.abc import IMuxedConn, INetConn, INetStream
from libp2p.host.basic_host import BasicHost
from libp2p.host.defaults import get_default_protocols
from libp2p.identity.identify.identify import ID as IDENTIFY_PROTOCOL
from libp2p.identity.identify_push.identify_push import ID_PUSH as IDENTIFY_PUSH_PROTOCOL
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.tools.anyio_service import Service
from libp2p.tools.anyio_service.trio_manager import TrioManager
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from node.network.addresses import AddressBook, TcpAddress, parse_address
from node.network.admission import NoRoom, choose_eviction
from node.network.limits import NetworkLimits
from node.network.peerstore import BoundedPeerStore
from node.network.transport import UPGRADE_TIMEOUT_S, Tcp, reason
from node.network.yamux import Yamux
from node.network.yamux_stream import YamuxStream, shielded
from protocol.identity import PeerId

logger = logging.getLogger(__name__)

DIAL_STAGGER_S: Final = 0.25
"""Head start of each address of a peer over the next one (happy eyeballs)."""

MAX_CONCURRENT_DIALS: Final = 32
RESTART_DELAY_S: Final = 1.0
ADDRESS_CACHE_S: Final = 10.0
REQUEST_TIMEOUT_S: Final = 30.0
"""How long a peer may occupy one of the library's handlers of short requests."""
MAX_REQUESTS_PER_PEER: Final = 16

StreamHandler = Callable[[INetStream], Awaitable[None]]
AsyncFunction = Callable[..., Awaitable[Any]]


def isolate_errors(handler: StreamHandler) -> StreamHandler:
    """Wrap a stream handler so that it raises nothing but Cancelled: an error costs the stream."""

    async def isolated(stream: INetStream) -> None:
        try:
            await handler(stream)
        except Exception as error:  # noqa: BLE001  # a peer's bytes reach every decoder of the library through here
            logger.debug("a stream of %s failed: %r", stream.muxed_conn.peer_id, error)
            await reset(stream)

    return isolated


def limit_requests(handler: StreamHandler) -> StreamHandler:
    """Wrap a handler of short requests with limits for each peer: duration and concurrency."""
    busy: Counter[ID] = Counter()

    async def limited(stream: INetStream) -> None:
        peer = stream.muxed_conn.peer_id
        if busy[peer] >= MAX_REQUESTS_PER_PEER:
            await reset(stream)
            return
        busy[peer] += 1
        try:
            with trio.fail_after(REQUEST_TIMEOUT_S):
                await handler(stream)
        finally:
            busy[peer] -= 1
            if not busy[peer]:
                del busy[peer]

    return limited


async def reset(stream: INetStream) -> None:
    """Reset a stream, whatever state the library believes it to be in."""
    with shielded(1):
        muxed = getattr(stream, "muxed_stream", None)
        if isinstance(muxed, YamuxStream):
            muxed.reset_now()
        await stream.reset()


class GuardedManager(TrioManager):
    """Runs a service of the library whose background tasks may fail without ending the process.

    The library ends a service, and with it the program, on the first exception of any of its tasks, and many of them
    handle peers' data. Here a short task that fails is dropped, and a daemon task is restarted.
    """

    def run_task(
        self,
        async_fn: AsyncFunction,
        *args: Any,
        daemon: bool = False,
        name: str | None = None,
        _internal: bool = False,
    ) -> None:
        """Start a task in the nursery of the service."""
        if self._task_nursery is None or not self.is_running:
            return  # the service is ending
        guard = self._run_restarting if daemon else self._run_once
        run = async_fn if _internal else partial(guard, async_fn)
        self._task_nursery.start_soon(run, *args, name=name or getattr(async_fn, "__qualname__", None))

    def run_daemon_task(self, async_fn: AsyncFunction, *args: Any, name: str | None = None) -> None:
        """Start a task that should never return."""
        self.run_task(async_fn, *args, daemon=True, name=name)

    async def _run_once(self, async_fn: AsyncFunction, *args: Any) -> None:
        try:
            await async_fn(*args)
        except Exception as error:  # what a peer sent made a task of the library fail
            logger.debug("%s: a task failed: %r", self._service, error, exc_info=True)

    async def _run_restarting(self, async_fn: AsyncFunction, *args: Any) -> None:
        while not self.is_cancelled:
            try:
                await async_fn(*args)
            except Exception as error:  # as above
                logger.warning("%s: a task failed and is restarted: %r", self._service, error, exc_info=True)
            await trio.sleep(RESTART_DELAY_S)


async def start_service(nursery: trio.Nursery, service: Service) -> None:
    """Run a service of the library in the nursery; return when it has started."""
    manager = GuardedManager(service)
    service._manager = manager  # noqa: SLF001  # as the library's own background_trio_service does
    nursery.start_soon(manager.run)
    await manager.wait_started()


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
        tcp: Tcp,
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
        super().__init__(peer_id, BoundedPeerStore(), upgrader, [tcp], connection_config=config, psk=psk)
        self._book = book
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._inbound = limits.inbound
        self._dial_timeout_s = limits.dial_timeout_s
        self._dials: dict[ID, _Dial] = {}
        self._dial_limiter = trio.CapacityLimiter(MAX_CONCURRENT_DIALS)

    def _init_connection_management(self) -> None:
        super()._init_connection_management()
        self.auto_connector = _IdleAutoConnector(self)

    async def _handle_inbound_connection(self, read_write_closer: ReadWriteCloser, maddr: Multiaddr) -> None:
        """Admit a connection; return when it is secured.

        The library's own version returns only when the host ends, and holds one of about 250 places until then: a host
        is deaf for good after so many connections, however short they were.
        """
        await self.upgrade_inbound_raw_conn(RawConnection(read_write_closer, initiator=False), maddr)

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
        """Choose the latest connection: an older one may be left over from a peer that has crashed and come back."""
        return connections[-1]

    def live_connections(self, peer_id: ID) -> list[INetConn]:
        """Return the open connections to a peer."""
        return [connection for connection in self.get_connections(peer_id) if not connection.is_closed]

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
                self._book.add(PeerId(peer_id.to_base58()), map(str, addresses))
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
                for address in addresses:
                    failed = trio.Event()
                    nursery.start_soon(dial_one, address, failed)
                    with trio.move_on_after(DIAL_STAGGER_S if address is not addresses[-1] else 0):
                        await failed.wait()
        if dial.failure and len(failures) == len(addresses):
            dial.failure = "; ".join(failures)

    def _dialable(self, peer_id: ID) -> list[Multiaddr]:
        """Return the addresses to dial for a peer, loopback last: on another machine it means that machine."""
        try:
            known = self.peerstore.addrs(peer_id)
        except PeerStoreError:
            return []
        found: dict[str, TcpAddress] = {}
        for multiaddr in known:
            try:
                address = parse_address(str(multiaddr))
            except ValueError:
                continue
            found[address.endpoint] = address
        ordered = sorted(found.values(), key=lambda address: address.host in {"127.0.0.1", "::1"})
        return [Multiaddr(address.endpoint) for address in ordered[:8]]


class GuardedHost(BasicHost):
    """The library's host, with identify requests in our nursery: it would start them outside of every nursery."""

    def __init__(
        self, swarm: GuardedSwarm, nursery: trio.Nursery, advertised: Callable[[list[Multiaddr]], list[Multiaddr]]
    ) -> None:
        self._nursery = nursery
        self._addresses: TTLCache[int, list[Multiaddr]] = TTLCache(1, ADDRESS_CACHE_S, trio.current_time)
        """Our addresses, by the number of those that we listen on."""
        protocols = get_default_protocols(self)
        for protocol in (IDENTIFY_PROTOCOL, IDENTIFY_PUSH_PROTOCOL):
            protocols[protocol] = limit_requests(protocols[protocol])
        super().__init__(
            swarm, default_protocols=protocols, addrs_factory=advertised, disable_identify_address_discovery=True
        )
        swarm.set_stream_handler(isolate_errors(self._swarm_stream_handler))

    def get_addrs(self) -> list[Multiaddr]:
        """Return the addresses we advertise. The library asks for them with every message that it sends."""
        listening = len(self.get_transport_addrs())
        if (addresses := self._addresses.get(listening)) is None:
            addresses = self._addresses[listening] = super().get_addrs()
        return list(addresses)

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        busy = peer_id in self._identify_inflight or self._has_cached_protocols(peer_id)
        if peer_id != self.get_id() and not busy and self._should_identify_peer(peer_id):
            self._identify_inflight.add(peer_id)
            self._nursery.start_soon(self._identify_quietly, peer_id, reason)

    async def _identify_quietly(self, peer_id: ID, why: str) -> None:
        try:
            await self._identify_task_entry(peer_id, why)
        except Exception as error:  # noqa: BLE001  # a peer's answer, through the library's decoders
            logger.debug("identify of %s failed: %r", peer_id, error)


def silence_library_log() -> None:
    """Silence the library's log, which reports ordinary peer behaviour as warnings and errors.

    Set LIBP2P_DEBUG to see it. The root logger gets a handler, if it has none, because the library logs through it too,
    and a first call would install one that writes to the terminal.
    """
    if not os.environ.get("LIBP2P_DEBUG"):
        logging.getLogger("libp2p").setLevel(logging.CRITICAL + 1)
    if not logging.root.handlers:
        logging.root.addHandler(logging.NullHandler())
