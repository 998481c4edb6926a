"""Which stages a job passes: the cheapest chain of spans that covers every block once. Pure graph search."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Offer:
    """A peer's offer to run blocks `start` to `end` (exclusive) for `cost_s` seconds a token, its hop included."""

    start: int
    end: int
    peer: str
    cost_s: float


class NoRouteError(Exception):
    """No chain of offers covers all blocks. `missing` are ranges (start, end) nobody serves.

    It is empty where every block is served, but the spans' edges do not meet.
    """

    def __init__(self, missing: Sequence[tuple[int, int]]) -> None:
        super().__init__(f"no route; missing {missing}")
        self.missing = tuple(missing)


def find_route(block_count: int, offers: Iterable[Offer]) -> tuple[Offer, ...]:
    """Return the chain of offers from block 0 to `block_count` with the least total cost.

    Dijkstra's algorithm over the boundaries between blocks. Of equal costs the chain with fewer stages wins, then the
    one that sorts first, so that the answer depends on nothing but the offers. Raises NoRouteError.
    """
    by_start: dict[int, list[Offer]] = {}
    for offer in offers:
        if 0 <= offer.start < offer.end <= block_count:
            by_start.setdefault(offer.start, []).append(offer)
    settled: set[int] = set()
    frontier: list[tuple[float, int, tuple[Offer, ...], int]] = [(0.0, 0, (), 0)]
    while frontier:
        cost_s, stages, chain, boundary = heapq.heappop(frontier)
        if boundary == block_count:
            return chain
        if boundary in settled:
            continue
        settled.add(boundary)
        for offer in by_start.get(boundary, ()):
            heapq.heappush(frontier, (cost_s + offer.cost_s, stages + 1, (*chain, offer), offer.end))
    raise NoRouteError(uncovered(block_count, ((o.start, o.end) for of_start in by_start.values() for o in of_start)))


def uncovered(block_count: int, spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the ranges (start, end) of blocks that no span covers."""
    covered = bytearray(block_count)
    for start, end in spans:
        covered[start:end] = b"\x01" * (end - start)
    missing: list[tuple[int, int]] = []
    for block, is_covered in enumerate(covered):
        if is_covered:
            continue
        if missing and missing[-1][1] == block:
            missing[-1] = (missing[-1][0], block + 1)
        else:
            missing.append((block, block + 1))
    return tuple(missing)
