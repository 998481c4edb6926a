"""The addresses at which other peers see this node: what a NAT makes of the port that it listens on. No I/O."""

from collections import Counter

from cachetools import LRUCache

from node.network.addresses import TcpAddress, address_range
from node.network.reachability_verdicts import MIN_RANGES
from protocol.identity import PeerId

MAX_OBSERVERS = 64
MAX_OBSERVED = 4

DECISIVE_OBSERVERS = 3
"""So many must have seen this node before ports that differ say what its NAT does: of two, one may lie."""


class ObservedAddresses:
    """The latest observation of each range of observers: one party's many peers count once.

    What a peer says that has connected to us counts only where peers that we dialled see us at the same host, if they
    see us at all, or where peers in two ranges name that host: others would have this node ask for dials to hosts that
    they name. A machine that is dialled at another host than it dials from is seen there by those alone that connected.

    An observation ends when its peer disconnects: in another network this node has another address. Where none is left,
    the last one of each kind stands until there is a new one.
    """

    def __init__(self) -> None:
        self._seen: LRUCache[tuple[str, str], tuple[PeerId, TcpAddress]] = LRUCache(MAX_OBSERVERS)
        self._hosts: LRUCache[tuple[str, str], tuple[PeerId, str]] = LRUCache(MAX_OBSERVERS)
        """At which host peers see us that we dialled."""
        self._last: dict[str, TcpAddress] = {}

    def record(self, observer: PeerId, observer_host: str, address: TcpAddress) -> None:
        """Record at which address a peer sees this node."""
        self._seen[address.kind, address_range(observer_host) or observer_host] = observer, address
        if self._counts(address):
            self._last[address.kind] = address

    def record_host(self, observer: PeerId, observer_host: str, address: TcpAddress) -> None:
        """Record at which host a peer sees this node that it dialled, from whatever port."""
        self._hosts[address.kind, address_range(observer_host) or observer_host] = observer, address.host

    def disconnected(self, observer: PeerId) -> None:
        """Drop what a peer saw that has no connection any more."""
        for key in [key for key, (seen_by, _) in self._seen.items() if seen_by == observer]:
            del self._seen[key]
        for key in [key for key, (seen_by, _) in self._hosts.items() if seen_by == observer]:
            del self._hosts[key]

    def _counts(self, address: TcpAddress) -> bool:
        at_host = [seen for _, seen in self._seen.values() if (seen.kind, seen.host) == (address.kind, address.host)]
        return self._is_ours(address) or len(at_host) >= MIN_RANGES

    def _is_ours(self, address: TcpAddress) -> bool:
        """Return whether peers that we dialled see us at this host, or none sees us anywhere."""
        hosts = {host for (kind, _), (_, host) in self._hosts.items() if kind == address.kind}
        return not hosts or address.host in hosts

    def addresses(self) -> tuple[TcpAddress, ...]:
        """Return the observed addresses, those that most peers see first."""
        counts = Counter(address for _, address in self._seen.values() if self._counts(address))
        seen = [address for address, _ in counts.most_common(MAX_OBSERVED)]
        kinds = {address.kind for address in counts}
        last = (address for kind, address in self._last.items() if kind not in kinds)
        return (*seen, *filter(self._counts, last))

    def observers(self, address: TcpAddress) -> set[str]:
        """Return the ranges of the peers that see this node at an address."""
        return {observer for (_, observer), (_, seen) in self._seen.items() if seen == address}

    @property
    def endpoint_dependent(self) -> bool:
        """Whether the NAT maps the port to another one for each peer (symmetric): no hole can be punched from it."""
        counted = [address for _, address in self._seen.values() if self._is_ours(address)]
        for kind in {address.kind for address in counted}:
            counts = Counter(address for address in counted if address.kind == kind)
            if counts.total() >= DECISIVE_OBSERVERS and counts.most_common(1)[0][1] * 2 <= counts.total():
                return True
        return False
