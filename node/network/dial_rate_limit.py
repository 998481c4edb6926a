"""How often this node dials where only a peer says that somebody is: else it would dial others for anybody. No I/O.

Hole punching shares one with the dials of new circuits; the later dials of circuits that stay have one of their own.
"""

from collections.abc import Iterable
from typing import Final

from cachetools import LRUCache

from node.network.addresses import TcpAddress, address_range
from node.util.token_bucket import Allowance, TokenBucket

MAX_HOSTS: Final = 2
"""Hosts that are dialled at a time for one peer: it has an IPv4 and an IPv6 address."""

MAX_ADDRESSES: Final = 4
PER_RANGE: Final = Allowance(per_s=0.5, burst=48)
"""Dials into one public /24 or /56: after a burst of two peers' holes less than any host notices."""

IN_ALL: Final = Allowance(per_s=4.0, burst=192)

REDIALS_PER_RANGE: Final = Allowance(per_s=0.1, burst=16)
REDIALS: Final = Allowance(per_s=1.0, burst=64)
"""Those of peers that stay behind relays: many, and rarely with success, so that they must not take the others'."""


class DialRateLimit:
    """Dials that are left, in all and into each address range."""

    def __init__(self, now_s: float, in_all: Allowance = IN_ALL, per_range: Allowance = PER_RANGE) -> None:
        self._all = in_all.bucket(now_s)
        self._per_range = per_range
        self._ranges: LRUCache[str, TokenBucket] = LRUCache(1024)

    def take(self, address: TcpAddress, now_s: float) -> bool:
        """Take one dial; return whether it was left."""
        where = address_range(address.host) or address.host
        bucket = self._ranges.setdefault(where, self._per_range.bucket(now_s))
        return bucket.take(1, now_s) and self._all.take(1, now_s)


def few_hosts(addresses: Iterable[TcpAddress]) -> list[TcpAddress]:
    """Return the first addresses, of one host or two."""
    found: dict[str, TcpAddress] = {}
    hosts: set[str] = set()
    for address in addresses:
        if len(hosts | {address.host}) <= MAX_HOSTS and len(found) < MAX_ADDRESSES:
            hosts.add(address.host)
            found[address.transport] = address
    return list(found.values())
