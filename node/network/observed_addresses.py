"""The addresses at which other peers see this node: what a NAT makes of the port that it listens on. No I/O."""

from collections import Counter

from cachetools import LRUCache

from node.network.addresses import TcpAddress, address_range

MAX_OBSERVERS = 64
MAX_OBSERVED = 4


class ObservedAddresses:
    """The latest observation of each range of observers: one party's many peers count once."""

    def __init__(self) -> None:
        self._seen: LRUCache[tuple[str, str], TcpAddress] = LRUCache(MAX_OBSERVERS)

    def record(self, observer_host: str, address: TcpAddress) -> None:
        """Record at which address a peer sees this node."""
        self._seen[address.kind, address_range(observer_host) or observer_host] = address

    def addresses(self) -> tuple[TcpAddress, ...]:
        """Return the observed addresses, those that most peers see first."""
        counts = Counter(self._seen.values())
        return tuple(address for address, _ in counts.most_common(MAX_OBSERVED))

    def observers(self, address: TcpAddress) -> set[str]:
        """Return the ranges of the peers that see this node at an address."""
        return {observer for (_, observer), seen in self._seen.items() if seen == address}

    @property
    def endpoint_dependent(self) -> bool:
        """Whether the NAT maps the port to another one for each peer (symmetric): no hole can be punched from it."""
        for kind in {kind for kind, _ in self._seen}:
            counts = Counter(address for (each, _), address in self._seen.items() if each == kind)
            if len(counts) > 1 and counts.most_common(1)[0][1] * 2 <= counts.total():
                return True
        return False
