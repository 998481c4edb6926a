"""The addresses of this node: those that it listens on, and those that others are told."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from multiaddr import Multiaddr

from node.network.addresses import TcpAddress, expand_wildcard, parse_address, without_loopback
from protocol.limits import MAX_ADDRESSES


class OwnAddresses:
    """Where this node can be dialled.

    Others are told the announced addresses, those at which a peer has reached us, those of the interfaces, and
    circuits through relays, in this order: of many, the last are left out.
    """

    def __init__(self, announce: Iterable[str] = ()) -> None:
        """Raise ValueError for a malformed address."""
        self.announced = [parse_address(text) for text in announce]
        self.mapped: TcpAddress | None = None
        """The address that the gateway claims to forward to us."""
        self.confirmed: Sequence[TcpAddress] = ()
        """Addresses that the gateway or peers told us of, and at which a peer has reached us."""
        self.circuits: Sequence[TcpAddress] = ()
        self.listening: Callable[[], Sequence[Multiaddr]] = tuple

    def direct(self) -> list[TcpAddress]:
        """Return the addresses at which TCP connections are accepted, or should be."""
        return self._with(self.confirmed)

    def fixed(self) -> list[TcpAddress]:
        """Return those of them that stay without our own dials: not what a NAT maps for a while."""
        return self._with([self.mapped] if self.mapped is not None else [])

    def _with(self, others: Sequence[TcpAddress]) -> list[TcpAddress]:
        found = [*self.announced, *others, *self._interfaces()]
        return list(dict.fromkeys(without_loopback(found)))

    def advertised(self) -> list[TcpAddress]:
        """Return the addresses that others are told."""
        circuits = list(self.circuits)
        return [*self.direct()[: MAX_ADDRESSES - len(circuits)], *circuits]

    def transports(self) -> set[str]:
        """Return the endpoints at which to dial would be to dial ourselves."""
        return {each.transport for each in chain(self.direct(), self._interfaces())}

    def gateway_candidates(self) -> list[TcpAddress]:
        """Return the private addresses to which a gateway could forward a port; none on a machine with a public one."""
        own = [each for each in self._interfaces() if each.kind == "ip4" and not each.is_loopback]
        return [] if any(each.is_public for each in (*own, *self.announced)) else own

    def _interfaces(self) -> list[TcpAddress]:
        listening = (parse_address(str(multiaddr)) for multiaddr in self.listening())
        return list(chain.from_iterable(map(expand_wildcard, listening)))
