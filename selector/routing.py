"""Route search: the chain of stages that is predicted to finish a job first. Pure dynamic programming.

A token travels in a circle: through every stage in order, and from the last one, which samples it, back to the first.
So a route's cost depends on neighbours, and its end on its beginning. Spans may overlap: an offer is entered and left
at any block, entered at its first block and left at any, or a stage as a whole, as its engine runs parts of a span.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from protocol.identity import BlockRange, Stage
from selector.cuts import Cuts, Parts

MAX_OFFERS: Final = 64
"""Offers that are compared; of more, the fastest for every block are kept."""

MAX_NAMED: Final = 3
"""Pairs of peers that an error names which cannot reach each other."""

TOKEN_BYTES: Final = 4


UNKNOWN_BYTES_PER_S: Final = 50e6
"""What a link that nobody has measured is taken for."""


class Link(NamedTuple):
    """The link between two peers; the round trip includes message handling. A figure that is not known is a guess."""

    round_trip_s: float
    bytes_per_s: float
    is_round_trip_known: bool = True
    is_rate_known: bool = True


Links: TypeAlias = Callable[[str, str], Link]
"""The link from one peer to another; a peer may follow itself, with another of its spans."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A peer's offer to run a span of blocks or a part of it, and the predicted cost.

    `block_s`: one block's part of a decode step; `step_s`: fixed cost of every step, both for the job's method under
    the current load. `row_block_s`: cost of one prompt row in one block. `trust`: share of jobs that this peer is
    expected to complete, above 0. `free_positions`: free KV positions, None where unknown. `parts`: those of the span
    that it runs.
    """

    stage: Stage
    block_s: float
    step_s: float = 0.0
    row_block_s: float = 0.0
    trust: float = 1.0
    free_positions: int | None = None
    parts: Parts = Parts.ANY


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The size of a job, and of its model. `row_bytes`: a row of hidden states on the wire.

    `granularity`: at multiples of how many blocks the model may be cut.
    """

    block_count: int
    prompt_rows: int
    new_tokens: int
    row_bytes: int
    granularity: int = 1

    @property
    def cuts(self) -> Cuts:
        """Where the model may be cut."""
        return Cuts(self.block_count, self.granularity)

    @property
    def positions(self) -> int:
        """KV positions that every stage has to hold."""
        return self.prompt_rows + self.new_tokens


@dataclass(frozen=True, slots=True)
class Route:
    """The stages in order, and the predicted seconds from the prompt to the last token."""

    stages: tuple[Stage, ...]
    cost_s: float


class NoRouteError(Exception):
    """No chain of offers covers all blocks. `missing`: the ranges that no offer covers.

    It is empty where every block is served, but by spans that run as a whole only and whose edges do not meet, or by
    peers that cannot reach each other: those are in `apart`, in pairs.
    """

    def __init__(self, missing: Sequence[BlockRange], apart: Sequence[tuple[str, str]] = ()) -> None:
        reason = f"blocks not served: {', '.join(map(str, missing)) or 'none'}"
        if apart and not missing:
            pairs = ", ".join(f"{a} and {b}" for a, b in apart[:MAX_NAMED])
            reason = f"the peers that serve it cannot reach each other: {pairs}"
        super().__init__(f"no route; {reason}")
        self.missing = tuple(missing)
        self.apart = tuple(apart)
        self.unreached: tuple[str, ...] = ()
        """Peers that announce missing blocks, and that the node which plans has not reached."""


def find_route(demand: Demand, offers: Iterable[Offer], links: Links) -> Route:
    """Return the route that is predicted to finish first. Raises NoRouteError.

    Peers without free KV positions for the job are used only where there is no route without them: they may refuse.
    Of equal routes the one whose offers sort first is taken, so that the result is deterministic.
    """
    fitting = [offer for offer in offers if demand.cuts.fault(offer.stage.blocks) is None]
    for allowed in (_with_room(fitting, demand), fitting):
        route = _Search(demand, BlockRange(0, demand.block_count), allowed, links).round_trip()
        if route is not None:
            return route
    missing = demand.cuts.uncovered(offer.stage.blocks for offer in fitting)
    raise NoRouteError(missing, () if missing else unreachable(fitting, links))


def unreachable(offers: Iterable[Offer], links: Links) -> tuple[tuple[str, str], ...]:
    """Return the pairs of peers of which one cannot reach the other."""
    peers = sorted({offer.stage.peer for offer in offers})[:MAX_OFFERS]
    return tuple(
        (a, b)
        for a, b in combinations(peers, 2)
        if math.isinf(links(a, b).round_trip_s) or math.isinf(links(b, a).round_trip_s)
    )


def check_complete(cuts: Cuts, stages: Iterable[Stage], links: Links) -> None:
    """Raise NoRouteError unless these stages make a route whose neighbours can reach each other."""
    stages = tuple(stages)
    if missing := cuts.uncovered(stage.blocks for stage in stages):
        raise NoRouteError(missing)
    demand = Demand(
        block_count=cuts.block_count, granularity=cuts.granularity, prompt_rows=1, new_tokens=1, row_bytes=1
    )
    find_route(demand, [Offer(stage, 1.0) for stage in stages], links)


def find_replacement(
    demand: Demand, stages: Sequence[Stage], lost: int, offers: Iterable[Offer], links: Links
) -> tuple[Stage, ...]:
    """Return the best replacement of stage number `lost`, without its peer, while all others stay.

    It may be several stages. Raises NoRouteError with the blocks of the lost stage that no other peer serves.
    """
    peer, blocks = stages[lost].peer, stages[lost].blocks
    rest = [o for o in offers if o.stage.peer != peer and demand.cuts.fault(o.stage.blocks) is None]
    if len(stages) == 1:
        return find_route(demand, rest, links).stages
    before, after = stages[lost - 1].peer, stages[(lost + 1) % len(stages)].peer
    fitting = [clipped for offer in rest if (clipped := _clip(offer, blocks)) is not None]
    for allowed in (_with_room(fitting, demand), fitting):
        search = _Search(demand, blocks, allowed, links)
        found = search.between(before, after, first=lost == 0, last=lost == len(stages) - 1)
        if found is not None:
            return found.stages
    missing = demand.cuts.uncovered(offer.stage.blocks for offer in fitting)
    raise NoRouteError([overlap for gap in missing if (overlap := gap.overlap(blocks)) is not None])


def stage_cost_s(demand: Demand, offer: Offer, blocks: int) -> float:
    """Return the cost of a stage of some blocks for a job: its steps and the prompt, over the trust in the peer."""
    work_s = blocks * (demand.new_tokens * offer.block_s + demand.prompt_rows * offer.row_block_s)
    return (work_s + demand.new_tokens * offer.step_s) / offer.trust


def hop_cost_s(demand: Demand, link: Link) -> float:
    """Return a job's cost of passing hidden states from one stage to the next."""
    rows = demand.prompt_rows + demand.new_tokens
    return (demand.new_tokens + 1) * link.round_trip_s / 2 + rows * demand.row_bytes / link.bytes_per_s


def return_cost_s(demand: Demand, link: Link) -> float:
    """Return a job's cost of passing its tokens from the last stage to the first."""
    return demand.new_tokens * (link.round_trip_s / 2 + TOKEN_BYTES / link.bytes_per_s)


def _order(offer: Offer) -> tuple[object, ...]:
    """Return the sort key of an offer: peers may offer the same blocks twice, once without free positions."""
    room = -1 if offer.free_positions is None else offer.free_positions
    costs_s = offer.block_s, offer.step_s, offer.row_block_s
    return offer.stage.blocks, offer.stage.peer, costs_s, offer.trust, room, offer.parts


def _with_room(offers: Sequence[Offer], demand: Demand) -> list[Offer]:
    return [o for o in offers if o.free_positions is None or o.free_positions >= demand.positions]


def _clip(offer: Offer, blocks: BlockRange) -> Offer | None:
    """Return the part of an offer within a range; None if there is none, or its engine does not run it."""
    overlap = offer.stage.blocks.overlap(blocks)
    if overlap is None or not offer.parts.include(overlap, offer.stage.blocks):
        return None
    return replace(offer, stage=Stage(offer.stage.peer, overlap))


_Costs: TypeAlias = NDArray[np.float64]


class _Search:
    """Dynamic programming over blocks: the remaining cost after a block was run by an offer's peer."""

    def __init__(self, demand: Demand, within: BlockRange, offers: Sequence[Offer], links: Links) -> None:
        self._demand = demand
        self._within = within
        self._links = links
        self._offers = offers = _shortlist(demand, sorted(offers, key=_order))
        self._enter_s = np.array([stage_cost_s(demand, offer, 0) for offer in offers])
        self._run_s = np.array([stage_cost_s(demand, offer, 1) for offer in offers]) - self._enter_s
        starts = np.array([offer.stage.blocks.start for offer in offers], dtype=int)
        ends = np.array([offer.stage.blocks.end for offer in offers], dtype=int)
        parts = np.array([offer.parts for offer in offers], dtype=int)
        blocks = np.arange(within.start, within.end)[:, None]
        is_cut = blocks % demand.granularity == 0
        self._covers = (starts <= blocks) & (blocks < ends)
        self._enters = self._covers & ((parts >= Parts.ANY) | (starts == blocks)) & is_cut
        self._leaves = self._covers & ((parts >= Parts.PREFIX) | (ends == blocks + 1))
        self._hop_s = self._costs_between(hop_cost_s)
        np.fill_diagonal(self._hop_s, np.inf)

    def round_trip(self) -> Route | None:
        """Return the best route whose last stage feeds the first.

        The way back depends on both, so each first stage is a search of its own; most are pruned by a lower bound of
        their routes' cost, with the shortest way back of all.
        """
        if not self._covers.any(axis=1).all():
            return None
        back_s = self._costs_between(return_cost_s)
        firsts = self._entering_s()
        least_s = firsts + self._remaining(back_s[:, np.isfinite(firsts)].min(axis=1, initial=np.inf))[0][0]
        best: Route | None = None
        for first in np.argsort(least_s, kind="stable"):
            if not np.isfinite(least_s[first]) or (best is not None and least_s[first] >= best.cost_s):
                break
            left_s, following = self._remaining(back_s[:, first])
            cost_s = float(firsts[first] + left_s[0][first])
            if np.isfinite(cost_s) and (best is None or cost_s < best.cost_s):
                best = Route(self._walk(int(first), following), cost_s)
        return best

    def between(self, before: str, after: str, *, first: bool, last: bool) -> Route | None:
        """Return the best chain between two peers; `first`, `last`: a token passes there instead of rows."""
        if not self._covers.any(axis=1).all():
            return None
        to_first = return_cost_s if first else hop_cost_s
        from_last = return_cost_s if last else hop_cost_s
        peers = [offer.stage.peer for offer in self._offers]
        arriving_s = np.array([to_first(self._demand, self._links(before, peer)) for peer in peers])
        left_s, following = self._remaining(np.array([from_last(self._demand, self._links(p, after)) for p in peers]))
        costs_s = self._entering_s() + arriving_s + left_s[0]
        best = int(costs_s.argmin())
        return Route(self._walk(best, following), float(costs_s[best])) if np.isfinite(costs_s[best]) else None

    def _costs_between(self, cost_s: Callable[[Demand, Link], float]) -> _Costs:
        """Return the link costs from the peer of each offer (rows) to that of each other."""
        peers = [offer.stage.peer for offer in self._offers]
        costs_s = [[cost_s(self._demand, self._links(a, b)) for b in peers] for a in peers]
        return np.array(costs_s, dtype=float).reshape(len(peers), len(peers))

    def _entering_s(self) -> _Costs:
        """Return the cost of entering the first block at each offer's peer and running it."""
        return np.where(self._enters[0], self._enter_s + self._run_s, np.inf)

    def _remaining(self, leaving_s: _Costs) -> tuple[list[_Costs], list[NDArray[np.intp]]]:
        """Return, for each block and each offer that has just run it, the remaining cost and the next block's offer.

        `leaving_s`: the cost after the last block.
        """
        left_s = [np.where(self._leaves[-1], leaving_s, np.inf)]
        following: list[NDArray[np.intp]] = []
        own = np.arange(len(self._offers))
        for block in range(len(self._within) - 1, 0, -1):
            onward_s = np.where(self._covers[block], self._run_s, np.inf) + left_s[-1]
            entered_s = np.where(self._enters[block], self._enter_s, np.inf) + onward_s
            hopping_s = self._hop_s + entered_s[None, :]
            best = hopping_s.argmin(axis=1)
            hop_s = np.where(self._leaves[block - 1], hopping_s[own, best], np.inf)
            stay_s = np.where(self._covers[block - 1], onward_s, np.inf)
            following.append(np.where(stay_s <= hop_s, own, best))
            left_s.append(np.minimum(stay_s, hop_s))
        return left_s[::-1], following[::-1]

    def _walk(self, offer: int, following: Sequence[NDArray[np.intp]]) -> tuple[Stage, ...]:
        """Return the stages of the chain that begins with an offer."""
        stages: list[Stage] = []
        start = self._within.start
        for block, choice in enumerate(following, start + 1):
            if choice[offer] != offer:
                stages.append(Stage(self._offers[offer].stage.peer, BlockRange(start, block)))
                offer, start = int(choice[offer]), block
        return (*stages, Stage(self._offers[offer].stage.peer, BlockRange(start, self._within.end)))


def _shortlist(demand: Demand, offers: Sequence[Offer]) -> Sequence[Offer]:
    """Return at most MAX_OFFERS offers, in their order: for every block the fastest, then the next, and so on."""
    if len(offers) <= MAX_OFFERS:
        return offers
    cost_s = [stage_cost_s(demand, offer, length := len(offer.stage.blocks)) / length for offer in offers]
    by_speed = np.argsort(cost_s, kind="stable")
    spans = [offers[number].stage.blocks for number in by_speed]
    edges = np.array([edge for span in spans for edge in (span.start, span.end)])
    taken = np.zeros(demand.block_count + 1, dtype=int)
    is_free = np.ones(len(offers), dtype=bool)
    for depth in range(1, MAX_OFFERS + 1):
        # Of all spans at once, as a peer may announce many.
        while (useful := is_free & (np.minimum.reduceat(taken, edges)[::2] < depth)).any():
            best = int(useful.argmax())
            is_free[best] = False
            taken[spans[best].start : spans[best].end] += 1
            if is_free.sum() == len(offers) - MAX_OFFERS:
                return [offers[number] for number in sorted(by_speed[~is_free])]
    return [offers[number] for number in sorted(by_speed[~is_free])]
