"""Who may take KV memory when it is short: a pure rule over what each peer holds.

A part of the memory is reserved for the node's own jobs, and as much again is left for whoever comes next. Beyond that,
a peer may hold as much as max-min fairness gives it: what is not wanted by those who want little is divided among those
who want more. While memory is plenty nobody is refused. Who comes while no other peer holds anything may take all but
the node's own part in one session, so that jobs as long as that can be had.
"""

from collections.abc import Collection, Mapping
from typing import Final

from protocol.identity import PeerId

RESERVED_SHARE: Final = 1 / 8
"""Of the pages of a span, for the node's own jobs; and once more for peers that hold less than their fair share."""


def may_take(
    peer: PeerId, wanted: int, *, own: PeerId, pages: int, held: Mapping[PeerId, int], waiting: int = 0
) -> bool:
    """Say whether a peer may take `wanted` of a span's `pages` pages.

    `own`: this node, whose own jobs may take all there is. `held`: pages that each peer's sessions hold. `waiting`:
    pages that other peers were refused a moment ago.
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
    next_comer = min(max(reserved, waiting), capacity // 2)
    demands = [*(count for each, count in others.items() if each != peer), demand, next_comer]
    return demand <= _level(demands, capacity)


def _level(demands: Collection[int], capacity: int) -> float:
    """Return what each may have so that all demands up to it come to the capacity; infinity where all can be met."""
    left = float(capacity)
    for number, demand in enumerate(sorted(demands)):
        share = left / (len(demands) - number)
        if demand > share:
            return share
        left -= demand
    return float("inf")
