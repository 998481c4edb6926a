"""The addresses at which other peers see this node: what a NAT makes of the port that it listens on. No I/O."""

from collections import Counter

from cachetools import LRUCache

from node.network.addresses import TcpAddress, address_range
from protocol.identity import PeerId

MAX_OBSERVERS = 64
MAX_OBSERVED = 4

DECISIVE_OBSERVERS = 3
"""So many must have seen this node before ports that differ say what its NAT does: of two, one may lie."""


class ObservedAddresses:
    """The latest observation of each range of observers: one party's many peers count once.

    An observation ends when its peer disconnects: in another network this node has another address. Where none is left,
    the last one of each kind stands until there is a new one.
    """

    def __init__(self) -> None:
        self._seen: LRUCache[tuple[str, str], tuple[PeerId, TcpAddress]] = LRUCache(MAX_OBSERVERS)
        self._last: dict[str, TcpAddress] = {}

    def record(self, observer: PeerId, observer_host: str, address: TcpAddress) -> None:
        """Record at which address a peer sees this node."""
        self._seen[address.kind, address_range(observer_host) or observer_host] = observer, address
        self._last[address.kind] = address

    def disconnected(self, observer: PeerId) -> None:
        """Drop what a peer saw that has no connection any more."""
        for key in [key for key, (seen_by, _) in self._seen.items() if seen_by == observer]:
            del self._seen[key]

    def addresses(self) -> tuple[TcpAddress, ...]:
        """Return the observed addresses, those that most peers see first."""
        counts = Counter(address for _, address in self._seen.values())
        seen = [address for address, _ in counts.most_common(MAX_OBSERVED)]
        kinds = {kind for kind, _ in self._seen}
        return (*seen, *(address for kind, address in self._last.items() if kind not in kinds))

    def observers(self, address: TcpAddress) -> set[str]:
        """Return the ranges of the peers that see this node at an address."""
        return {observer for (_, observer), (_, seen) in self._seen.items() if seen == address}

    @property
    def endpoint_dependent(self) -> bool:
        """Whether the NAT maps the port to another one for each peer (symmetric): no hole can be punched from it."""
        for kind in {kind for kind, _ in self._seen}:
            counts = Counter(address for (each, _), (_, address) in self._seen.items() if each == kind)
            if counts.total() >= DECISIVE_OBSERVERS and counts.most_common(1)[0][1] * 2 <= counts.total():
                return True
        return False
