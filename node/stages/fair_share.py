"""Admission control by max-min fairness: which peer may take KV memory when it is short.

A part of the memory is reserved for the node's own jobs, and as much again for the next peer that asks. Beyond that, a
peer may hold its max-min fair share: what peers with small demands do not need is divided among those with larger ones.
No peer is refused while memory is plenty. A peer that comes while no other holds anything may take all but the node's
own part in one session, so that jobs of that length are possible.
"""

from collections.abc import Collection, Mapping
from typing import Final

import trio
from cachetools import TTLCache

from protocol.identity import PeerId

SHORT_S: Final = 30.0
"""Memory counts as short for this long after a peer was refused for want of it."""

MAX_REFUSED: Final = 64
"""Peers that were refused and are remembered meanwhile."""

RESERVED_SHARE: Final = 1 / 8
"""Of the pages of a span, for the node's own jobs; and once more for peers that hold less than their fair share."""


def most_pages(peer: PeerId, *, own: PeerId, pages: int) -> int:
    """Return how many of a span's `pages` pages a peer may take at most, while nobody else holds any."""
    return pages if peer == own else pages - int(pages * RESERVED_SHARE)


def may_take(
    peer: PeerId, wanted: int, *, own: PeerId, pages: int, held: Mapping[PeerId, int], waiting: int = 0
) -> bool:
    """Return whether a peer may take `wanted` of a span's `pages` pages.

    `own`: this node, whose own jobs may take all there is. `held`: pages that each peer's sessions hold. `waiting`:
    recent unmet demand of other peers.
    """
    if peer == own:
        return True
    reserved = int(pages * RESERVED_SHARE)
    # What own jobs hold already is not reserved once more.
    capacity = pages - max(reserved, held.get(own, 0))
    others = {each: count for each, count in held.items() if each != own and count}
    if not others:
        return wanted <= capacity
    demand = others.get(peer, 0) + wanted
    if sum(others.values()) + wanted > capacity:
        return False
    next_peer = min(max(reserved, waiting), capacity // 2)
    demands = [*(count for each, count in others.items() if each != peer), demand, next_peer]
    return demand <= _fair_share(demands, capacity)


def _fair_share(demands: Collection[int], capacity: int) -> float:
    """Return the max-min fair share: the demand up to which all are met in full; infinity where all can be."""
    left = float(capacity)
    for number, demand in enumerate(sorted(demands)):
        share = left / (len(demands) - number)
        if demand > share:
            return share
        left -= demand
    return float("inf")


class UnmetDemand:
    """Pages that peers were refused lately: for a while they are not for the peers that hold most."""

    def __init__(self) -> None:
        self._pages: TTLCache[PeerId, int] = TTLCache(MAX_REFUSED, SHORT_S, timer=trio.current_time)

    def __bool__(self) -> bool:
        return bool(len(self._pages))

    def add(self, peer: PeerId, pages: int) -> None:
        """Record that a peer was refused pages."""
        self._pages[peer] = pages

    def of_others(self, peer: PeerId) -> int:
        """Return how many pages other peers than this one were refused."""
        return sum(pages for each, pages in self._pages.items() if each != peer)
