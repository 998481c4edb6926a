"""NAT traversal of one host: whether it can be dialled, by which relays it is reached, and whom it relays for.

The verdict decides: a public node is a relay, a private one keeps reservations at two, and punches holes from the port
that it listens on. `autonat.py`, `relay_server.py`, `relay_client.py`, `circuits.py` and `hole_punch.py` do the work.
"""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio
from libp2p.abc import INetConn
from libp2p.custom_types import TProtocol
from libp2p.host.observed_addr_manager import ObservedAddrManager
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from node.network.addresses import TcpAddress, address_range, is_private, parse_address
from node.network.autonat import AutonatClient, AutonatServer
from node.network.autonat_messages import DIAL_BACK_PROTOCOL, DIAL_REQUEST_PROTOCOL
from node.network.circuits import Circuits
from node.network.dial_rate_limit import REDIALS, REDIALS_PER_RANGE, DialRateLimit
from node.network.guarded_host import GuardedHost
from node.network.hole_punch import HolePuncher
from node.network.observed_addresses import ObservedAddresses
from node.network.own_addresses import OwnAddresses
from node.network.port_mapping import keep_port_mapping
from node.network.reachability_verdicts import Verdicts
from node.network.relay_client import RelayClient
from node.network.relay_ledger import RelayLimits
from node.network.relay_messages import DCUTR_PROTOCOL, HOP_PROTOCOL, STOP_PROTOCOL
from node.network.relay_server import RelayServer
from node.network.transport import Tcp
from node.network.yamux import Yamux
from node.util.backoff import backoff_s
from node.util.signal import Signal
from node.util.token_bucket import Allowance
from protocol.announcements import Reachability, Verdict
from protocol.identity import PeerId
from protocol.limits import MAX_OBSERVED, MAX_RELAYS

logger = logging.getLogger(__name__)

MAX_CANDIDATES: Final = 6
SERVERS_PER_ADDRESS: Final = 3
SETTLE_S: Final = 0.5
"""Pause before a round of dial-backs: what has changed rarely changes alone."""

ROUNDS: Final = Allowance(per_s=1 / 15, burst=4)
"""Rounds of dial-backs: peers that come and go must not have this node ask for more."""

RECHECK_S: Final = {Verdict.UNKNOWN: 15.0, Verdict.PRIVATE: 60.0, Verdict.PUBLIC: 600.0}
"""Time between two rounds of dial-backs, by the verdict so far."""

HOLE_WAIT_S: Final = 2.0
"""How long a stream to a peer behind a relay waits for a direct connection: on a circuit it would stay there."""

SURPLUS_ROUND_S: Final = 1.0
REDIAL_ROUND_S: Final = 30.0
"""Time between two dials of the public addresses of peers that are connected through relays: what was not known when
the circuit was opened may be known by now, as that a port is mapped."""

REDIAL_BACKOFF_S: Final = (30.0, 600.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraversalOptions:
    """How a node takes part. `verdict`: taken for granted instead of asking other peers, for tests."""

    relay: RelayLimits | None = field(default_factory=RelayLimits)
    """None: this node does not relay for others."""
    port_mapping: bool = False
    verdict: Verdict | None = None


class Traversal:
    """NAT traversal of one host."""

    def __init__(self, options: TraversalOptions, own: OwnAddresses, *, private_swarm: bool) -> None:
        self._options = options
        self._own = own
        self._private_swarm = private_swarm
        self._observed = ObservedAddresses()
        self._verdicts = Verdicts(self._observers)
        self._seen_at: TcpAddress | None = None
        """Where a peer has seen us last, from whatever port."""
        self._changed = Signal()
        self._jitter = random.Random()
        self._host: GuardedHost | None = None
        self._tcp: Tcp | None = None
        self._relays: RelayClient | None = None
        self._relay: RelayServer | None = None
        self._puncher: HolePuncher | None = None
        self.observer = _Observer(self)

    def circuits(self, tcp: Tcp) -> Circuits:
        """Return the transport that dials through relays."""
        self._tcp = tcp
        return Circuits(tcp, lambda: self._relays.relays() if self._relays else (), self._circuit_opened)

    def start(
        self, nursery: trio.Nursery, host: GuardedHost, circuits: Circuits, known: Callable[[ID], Sequence[TcpAddress]]
    ) -> None:
        """Serve the protocols and keep what they need, in the nursery. `known`: the addresses of a peer."""
        assert self._tcp is not None
        self._host = circuits.host = host
        client = AutonatClient(host)
        server = AutonatServer(host, self._kinds)
        self._relays = RelayClient(
            host, self._wants_relays, self._on_circuits, lambda: {each.host for each in self._observed.addresses()}
        )
        self._puncher = HolePuncher(nursery, host, self._tcp, observed=self._observed.addresses, known=known)
        handlers = {
            STOP_PROTOCOL: circuits.handle_stop,
            DCUTR_PROTOCOL: self._puncher.handle,
            DIAL_REQUEST_PROTOCOL: server.handle,
            DIAL_BACK_PROTOCOL: client.handle_dial_back,
        }
        if self._options.relay is not None:
            self._relay = RelayServer(
                host,
                self._options.relay,
                private_swarm=self._private_swarm,
                serves=self._is_relay,
                addresses=self._own.direct,
            )
            handlers[HOP_PROTOCOL] = self._relay.handle
        for protocol, handler in handlers.items():
            host.set_stream_handler(TProtocol(protocol), handler)
        nursery.start_soon(self._relays.run)
        nursery.start_soon(self._check_loop, client)
        nursery.start_soon(self._close_surplus, host)
        nursery.start_soon(self._redial_loop, host, known)

    def listening(self, nursery: trio.Nursery) -> None:
        """Note that the host listens: its addresses are known from now on."""
        self._addresses_changed()
        if self._options.port_mapping:
            nursery.start_soon(keep_port_mapping, self._own.gateway_candidates, self._on_mapped)

    def stopped(self) -> None:
        """Forget a host that has ended."""
        self._host = self._relays = self._relay = self._puncher = None
        self._own.circuits = ()

    # What is known

    def verdict(self) -> Verdict:
        """Return whether this node can be dialled from anywhere."""
        if self._options.verdict is not None:
            return self._options.verdict
        return self._verdicts.overall(self._candidates(), trio.current_time())

    def reachability(self) -> Reachability:
        """Return what others are told of how to reach this node."""
        mapped = self._own.mapped is not None and self._own.mapped.is_public
        limits = self._options.relay
        return Reachability(
            verdict=self.verdict(),
            observed=tuple(each.transport for each in self._observed.addresses()[:MAX_OBSERVED]),
            endpoint_dependent=self._observed.endpoint_dependent,
            port_mapped=mapped,
            relays=self._relays.unlimited()[:MAX_RELAYS] if self._relays is not None else (),
            relay_bytes_per_s=limits.bytes_per_s if limits is not None and self._is_relay() else 0.0,
        )

    def _candidates(self) -> list[TcpAddress]:
        """Return the public addresses at which this node might be dialled."""
        found = [*self._own.fixed(), *self._own.direct(), *self._observed.addresses()]
        return list(dict.fromkeys(each for each in found if each.is_public))[:MAX_CANDIDATES]

    def _observers(self, address: TcpAddress) -> set[str] | None:
        """Return the ranges of the peers that see us at an address; None for one that we know ourselves."""
        return None if address in self._own.fixed() else self._observed.observers(address)

    def _wants_relays(self) -> bool:
        """Return whether others may need relays to reach this node: private, untried behind a NAT, or in doubt."""
        if (verdict := self.verdict()) is not Verdict.UNKNOWN:
            return verdict is Verdict.PRIVATE
        own, seen_at = {each.host for each in self._own.direct()}, self._seen_at
        return (seen_at is not None and seen_at.host not in own) or self._is_doubtful()

    def _is_relay(self) -> bool:
        """Return whether this node relays: where it is public, or has a public address that nobody has tried yet."""
        if (verdict := self.verdict()) is not Verdict.UNKNOWN:
            return verdict is Verdict.PUBLIC
        return any(each.is_public for each in self._own.direct()) and not self._is_doubtful()

    def _is_doubtful(self) -> bool:
        return self._verdicts.is_doubtful(self._candidates(), trio.current_time())

    def _kinds(self) -> set[str]:
        """Return the kinds of addresses that this machine can dial: those of which it has a global one itself."""
        observed = (*self._own.direct(), *self._observed.addresses())
        return {"ip4"} | {each.kind for each in observed if each.kind == "ip6" and not is_private(each.host)}

    # Events

    def _circuit_opened(self, connection: Yamux, *, is_retry: bool = False) -> None:
        if self._puncher is not None:
            self._puncher.circuit_opened(connection, is_retry=is_retry)

    def connected(self, peer_id: ID) -> None:
        """Note that a peer has connected: it may tell what we do not know yet."""
        if self._host is not None and self._puncher is not None and self._host.swarm.direct_connection(peer_id):
            self._puncher.connected(peer_id)
        if self.verdict() is Verdict.UNKNOWN:
            self._changed.set()

    def disconnected(self, peer: PeerId) -> None:
        """Note that a peer has no direct connection any more."""
        self._observed.disconnected(peer)
        if self._relay is not None:
            self._relay.disconnected(peer)

    def record_observed(self, connection: INetConn, address: TcpAddress) -> None:
        """Take the address at which a peer sees us."""
        muxed = connection.muxed_conn
        if not isinstance(muxed, Yamux) or muxed.host is None or self._tcp is None:
            return
        if address.is_public:
            self._seen_at = address
        before, peer = self._observed.addresses(), PeerId(muxed.peer_id.to_base58())
        # A peer in our own network sees us at a host that says nothing of where others do.
        if muxed.is_initiator and address.is_public:
            self._observed.record_host(peer, muxed.host, address)
        # A dial that left from another port shows that port's mapping, which nothing else uses.
        if not muxed.is_initiator or self._tcp.maps_port(muxed.get_remote_address()):
            self._observed.record(peer, muxed.host, address)
        if self._observed.addresses() != before:
            self._changed.set()

    def _on_mapped(self, address: TcpAddress | None) -> None:
        self._own.confirmed = [each for each in self._own.confirmed if each != self._own.mapped]
        self._own.mapped = address
        self._addresses_changed()
        self._changed.set()

    def _on_circuits(self) -> None:
        assert self._relays is not None
        self._own.circuits = self._relays.circuits()
        self._addresses_changed()
        logger.info("reachable through relays: %s", ", ".join(self._relays.relays()) or "none")

    def _addresses_changed(self) -> None:
        if self._host is not None:
            self._host.addresses_changed()

    async def wait_for_hole(self, peer_id: ID) -> None:
        """Wait a moment for the peer at the other end of a new circuit to upgrade it to a direct connection."""
        if self._puncher is not None and not self._observed.endpoint_dependent:
            await self._puncher.wait(peer_id, HOLE_WAIT_S)

    # Tasks

    async def _check_loop(self, client: AutonatClient) -> None:
        """Have others dial this node, whenever something has changed, and again after a while."""
        rounds = ROUNDS.bucket(trio.current_time())
        while True:
            with trio.move_on_after(RECHECK_S[self.verdict()]):
                await self._changed.wait()
            await trio.sleep(max(SETTLE_S, rounds.spend(1, trio.current_time())))
            self._changed.clear()
            await self._check(client)

    async def _check(self, client: AutonatClient) -> None:
        before = self.verdict()
        async with trio.open_nursery() as nursery:
            for address in self._candidates():
                nursery.start_soon(self._check_address, client, address)
        now_s, verdict = trio.current_time(), self.verdict()
        mapped = [self._own.mapped] if self._own.mapped is not None else []
        told = [each for each in (*mapped, *self._observed.addresses()) if each.is_public]
        self._own.confirmed = [each for each in told if self._verdicts.of(each, now_s) is Verdict.PUBLIC]
        if self._tcp is not None:
            # A mapping that makes a node public lives on its dials.
            self._tcp.dials_from_port = self._verdicts.overall(self._own.fixed(), now_s) is not Verdict.PUBLIC
        self._addresses_changed()
        if verdict is not before:
            logger.info("this node is %s", verdict)

    async def _check_address(self, client: AutonatClient, address: TcpAddress) -> None:
        """Ask servers, one after another, until one has reached us.

        First in ranges that reached us before, so that no success expires untried; then those that we dialled, which
        nobody else has chosen for us; then those that were not asked for longest.
        """
        asked_before_s = trio.current_time() - RECHECK_S[self.verdict()] * 0.9

        def order(item: tuple[str, INetConn]) -> tuple[bool, bool, float]:
            where, connection = item
            reached_us = self._verdicts.has_reached(address, where)
            return not reached_us, not _dialled(connection), self._verdicts.asked_at_s(address, where)

        servers = self._servers()
        due = [each for each in servers.items() if self._verdicts.asked_at_s(address, each[0]) <= asked_before_s]
        for where, connection in sorted(due, key=order)[:SERVERS_PER_ADDRESS]:
            self._verdicts.ask(address, where, trio.current_time())
            found = await client.check(connection, [address])
            if found is not None:
                now_s = trio.current_time()
                self._verdicts.record(found[0], where, reached=found[1], now_s=now_s)
                if self._verdicts.of(address, now_s) is Verdict.PUBLIC:
                    return

    def _servers(self) -> dict[str, INetConn]:
        """Return a connection to a peer in each range elsewhere: what one on our own network reaches says nothing.

        Of several peers in a range, one that we dialled: others may be there to be asked.
        """
        found: dict[str, INetConn] = {}
        connections = self._host.swarm.get_connections() if self._host is not None else []
        random.shuffle(connections)
        for connection in sorted(connections, key=_dialled):
            muxed = connection.muxed_conn
            if isinstance(muxed, Yamux) and not muxed.is_closed and muxed.host and not is_private(muxed.host):
                found[address_range(muxed.host) or muxed.host] = connection
        return found

    async def _close_surplus(self, host: GuardedHost) -> None:
        """Close circuits that a direct connection has replaced, and one of two that peers opened to each other."""
        while True:
            await trio.sleep(SURPLUS_ROUND_S)
            for connection in host.swarm.surplus():
                await connection.close()

    async def _redial_loop(self, host: GuardedHost, known: Callable[[ID], Sequence[TcpAddress]]) -> None:
        """Try again to reach peers directly that are connected through relays: soon only where their addresses differ.

        An upgrade comes to nothing also where a message is late, or either side had dialled enough for the moment.
        """
        limit = DialRateLimit(trio.current_time(), REDIALS, REDIALS_PER_RANGE)
        tried: dict[tuple[ID, tuple[TcpAddress, ...]], tuple[int, float]] = {}
        while True:
            await trio.sleep(REDIAL_ROUND_S)
            peers = [
                (each, tuple(address for address in known(each) if address.relay is None))
                for each in host.swarm.relayed_peers()
            ]
            tried = {each: tried.get(each, (0, 0.0)) for each in peers}
            for (peer_id, addresses), (failures, retry_at_s) in list(tried.items()):
                if trio.current_time() >= retry_at_s:
                    if not await host.swarm.dial_direct(peer_id, addresses, limit):
                        for circuit in host.swarm.circuits_of(peer_id):
                            self._circuit_opened(circuit, is_retry=True)
                    pause_s = backoff_s(failures + 1, REDIAL_BACKOFF_S, self._jitter)
                    tried[peer_id, addresses] = failures + 1, trio.current_time() + pause_s


def _dialled(connection: INetConn) -> bool:
    muxed = connection.muxed_conn
    return isinstance(muxed, Yamux) and muxed.is_initiator


class _Observer(ObservedAddrManager):
    """Takes what identify says of our address, in the library's place: its own would have it advertised untried."""

    def __init__(self, traversal: Traversal) -> None:
        super().__init__()
        self._traversal = traversal

    def record_observation(self, conn: INetConn, observed_addr: Multiaddr, local_addrs: list[Multiaddr]) -> None:
        """Take an observation."""
        try:
            address = parse_address(str(observed_addr))
        except ValueError:
            return
        if address.relay is None and address.port:
            self._traversal.record_observed(conn, address)

    def remove_conn(self, conn: INetConn) -> None:
        """Do nothing: an observation ends with the last connection of its peer."""

    def addrs(self, min_observers: int = 0) -> list[Multiaddr]:
        """Return nothing to advertise."""
        return []
