"""Reservations of a node behind a NAT at relays, so that others can reach it (circuit relay v2)."""

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Final

import trio
from libp2p.abc import INetConn
from multiaddr import Multiaddr

from node.network.addresses import TcpAddress, address_range, parse_address
from node.network.guarded_host import GuardedHost
from node.network.message_stream import MessageStream
from node.network.relay_messages import HOP_PROTOCOL, HopMessage, HopType, Status
from node.network.transport import reason
from node.network.yamux import Yamux
from protocol.identity import PeerId

logger = logging.getLogger(__name__)

RELAYS: Final = 2
"""Reservations without limits that are kept: where one relay dies, the other is there."""

MAX_LIMITED: Final = 2
"""Those with limits that are held beside, until there are so many without."""

ADDRESSES_PER_RELAY: Final = 2
ROUND_S: Final = 1.0
REQUEST_TIMEOUT_S: Final = 5.0
RENEWAL_SHARE: Final = 0.5
"""A reservation is renewed after this part of its time."""

LIMITED_RENEWAL_S: Final = 15.0
"""One with limits is renewed after this time: the relay may not have known that we are of its swarm."""

LONGEST_S: Final = 3600.0
SHORTEST_S: Final = 60.0
ASSUMED_S: Final = 900.0
"""Taken for a reservation that ends sooner or in the past: by the clock of the relay, from which ours differs."""

REFUSED_PAUSE_S: Final = 60.0
"""How long a peer is not asked again that has refused."""


@dataclass(frozen=True, slots=True)
class HeldReservation:
    """A reservation, by the clock of this node."""

    addresses: tuple[TcpAddress, ...]
    """Of circuits to this node."""
    range: str | None
    renew_at_s: float
    expires_at_s: float
    limited: bool
    """Whether the relay ends circuits after so many bytes or seconds that they serve for hole punching alone."""


class RelayClient:
    """Keeps reservations while `wanted` says so."""

    def __init__(
        self,
        host: GuardedHost,
        wanted: Callable[[], bool],
        on_change: Callable[[], None],
        seen_at: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """`on_change` is called when the addresses of our circuits have changed.

        `seen_at`: the hosts at which others see this node.
        """
        self._host = host
        self._wanted = wanted
        self._on_change = on_change
        self._seen_at = seen_at
        self._held: dict[PeerId, HeldReservation] = {}
        self._pauses: dict[PeerId, float] = {}
        self._next_search_s = 0.0

    def relays(self) -> tuple[PeerId, ...]:
        """Return the relays with a reservation."""
        return tuple(self._held)

    def unlimited(self) -> tuple[PeerId, ...]:
        """Return those through which more can be done than to punch a hole."""
        return tuple(peer for peer, each in self._held.items() if not each.limited)

    def circuits(self) -> tuple[TcpAddress, ...]:
        """Return the addresses of circuits to this node, those without limits first."""
        held = sorted(self._held.values(), key=lambda each: each.limited)
        return tuple(address for each in held for address in each.addresses)

    async def run(self) -> None:
        """Reserve, renew and replace reservations, until cancelled."""
        while True:
            before = self.circuits()
            await self._turn(trio.current_time())
            if self.circuits() != before:
                self._on_change()
            await trio.sleep(ROUND_S)

    async def _turn(self, now_s: float) -> None:
        connections = self._candidates() if self._wanted() else {}
        self._held = {
            peer: each for peer, each in self._held.items() if peer in connections and now_s < each.expires_at_s
        }
        self._pauses = {peer: until_s for peer, until_s in self._pauses.items() if until_s > now_s}
        due = [peer for peer, each in self._held.items() if now_s >= each.renew_at_s]
        for peer in due:
            await self._reserve(peer, connections[peer])
        while (untried := self._by_preference(connections)) and self._may_ask(now_s):
            await self._reserve(*untried[0])
        if len(unlimited := self.unlimited()) >= RELAYS:
            self._held = {peer: self._held[peer] for peer in unlimited}

    def _may_ask(self, now_s: float) -> bool:
        """Return whether to ask another relay: now and then where it may have limits, as enough others have."""
        unlimited = len(self.unlimited())
        if unlimited >= RELAYS:
            return False
        if len(self._held) - unlimited < MAX_LIMITED:
            return True
        if now_s < self._next_search_s:
            return False
        self._next_search_s = now_s + LIMITED_RENEWAL_S
        return True

    def _candidates(self) -> dict[PeerId, INetConn]:
        """Return the direct connections to peers that we dialled: those can be dialled, by others, too."""
        found: dict[PeerId, INetConn] = {}
        for connection in self._host.swarm.get_connections():
            muxed = connection.muxed_conn
            if isinstance(muxed, Yamux) and not muxed.is_closed and muxed.is_initiator and muxed.host is not None:
                found[PeerId(muxed.peer_id.to_base58())] = connection
        return found

    def _by_preference(self, connections: dict[PeerId, INetConn]) -> list[tuple[PeerId, INetConn]]:
        """Return the peers to ask: in other ranges than our relays', the nearest first."""
        ranges = {each.range for each in self._held.values()} - {None}
        untried = [each for each in connections.items() if each[0] not in self._held and each[0] not in self._pauses]

        def order(item: tuple[PeerId, INetConn]) -> tuple[bool, float]:
            muxed = item[1].muxed_conn
            assert isinstance(muxed, Yamux)
            return address_range(muxed.host or "") in ranges, muxed.rtt() or 1.0

        return sorted(untried, key=order)

    async def _reserve(self, peer: PeerId, connection: INetConn) -> None:
        """Ask a peer for a reservation, or for its renewal."""
        try:
            with trio.fail_after(REQUEST_TIMEOUT_S):
                async with MessageStream(await self._host.open_stream_on(connection, HOP_PROTOCOL)) as messages:
                    await messages.send(HopMessage(type=HopType.RESERVE))
                    answer = await messages.receive(HopMessage)
        except Exception as error:  # noqa: BLE001  # the peer's answer, or that it does not speak the protocol
            logger.debug("no reservation at %s: %s", peer, reason(error))
            if (held := self._held.get(peer)) is None:
                self._refused(peer)
            else:  # a slow answer ends no reservation
                self._held[peer] = replace(held, renew_at_s=trio.current_time() + REFUSED_PAUSE_S)
            return
        if answer.type is not HopType.STATUS or answer.status is not Status.OK or answer.reservation is None:
            logger.debug("no reservation at %s: %s", peer, answer.status)
            self._refused(peer)
            return
        limited = answer.limit is not None and bool(answer.limit.data or answer.limit.duration)
        others = [each for relay, each in self._held.items() if each.limited and relay != peer]
        if limited and len(others) >= MAX_LIMITED:
            self._refused(peer)
            return
        now_s = trio.current_time()
        left_s = min(LONGEST_S, (answer.reservation.expire or 0) - time.time())
        if left_s < SHORTEST_S:
            left_s = ASSUMED_S
        addresses = self._addresses(peer, connection, answer.reservation.addrs)
        self._held[peer] = HeldReservation(
            addresses=tuple(addresses[:ADDRESSES_PER_RELAY]),
            range=address_range(_host(connection)),
            renew_at_s=now_s + min(left_s * RENEWAL_SHARE, LIMITED_RENEWAL_S if limited else LONGEST_S),
            expires_at_s=now_s + left_s,
            limited=limited,
        )

    def _refused(self, peer: PeerId) -> None:
        self._held.pop(peer, None)
        self._pauses[peer] = trio.current_time() + REFUSED_PAUSE_S

    def _addresses(self, peer: PeerId, connection: INetConn, told: tuple[bytes, ...]) -> list[TcpAddress]:
        """Return circuits through a relay: where we dialled it, then at the public addresses that it tells.

        Of these, only such in the range where we dialled it, behind our own NAT, or in the address book: others dial
        what we announce, so that a relay that told a third host's address would have the whole swarm dial that. What is
        in the book was dialled, or the relay announces it to all of the swarm anyway.
        """
        book = {each.transport for each in self._host.swarm.book.of(peer) if each.relay is None}
        own = PeerId(self._host.get_id().to_base58())
        muxed = connection.muxed_conn
        assert isinstance(muxed, Yamux)
        endpoints: list[TcpAddress] = []
        dialled = address_range(_host(connection))
        if (remote := muxed.get_remote_address()) is not None:
            kind = "ip6" if ":" in remote[0] else "ip4"
            endpoints.append(TcpAddress(kind, remote[0], remote[1], None))
        for data in told:
            try:
                address = parse_address(str(Multiaddr(data)))
            except Exception:  # noqa: BLE001, S112  # the bytes are a peer's, and the codecs raise what they like
                continue
            its_range = address_range(address.host)
            is_near = (its_range is not None and its_range == dialled) or address.host in self._seen_at()
            if address.relay is None and address.is_public and (is_near or address.transport in book):
                endpoints.append(TcpAddress(address.kind, address.host, address.port, None))
        endpoints.sort(key=lambda address: not address.is_public)
        of_each_kind: dict[str, TcpAddress] = {}
        for each in endpoints:
            of_each_kind.setdefault(each.kind, each)
        found = dict.fromkeys([*of_each_kind.values(), *endpoints])
        return [TcpAddress(each.kind, each.host, each.port, own, peer) for each in found]


def _host(connection: INetConn) -> str:
    muxed = connection.muxed_conn
    return (muxed.host or "") if isinstance(muxed, Yamux) else ""
