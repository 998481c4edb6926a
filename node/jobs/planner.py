"""Plans routes: turns what is known of the live peers into offers, and remembers who failed."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import structlog
import trio

from node.jobs.route import Stop
from node.swarm.directory import Candidate
from protocol.identity import BlockRange, ModelId, PeerId
from protocol.messages import Load
from selector.routing import Demand, Links, NoRouteError, Offer, find_replacement, find_route
from selector.routing import Stage as Leg
from selector.trust import Reliability

UNKNOWN_BLOCK_S = 0.003
"""What a block costs a token on a peer that has not told its step time yet."""

PROMPT_ROWS_PER_STEP = 12
"""Rows of a prompt that take as long as one decode step: what reads all weights once for a single row is slow."""


_logger = structlog.get_logger(__name__)


class Finder(Protocol):
    """Knows who serves what; `node.swarm.membership` is the real one."""

    async def candidates(self, model: ModelId, block_count: int, *, without: Iterable[PeerId]) -> tuple[Candidate, ...]:
        """Return the live peers that serve spans of a model; asks the DHT where those known do not suffice."""
        ...

    def forget(self, peer: PeerId) -> None:
        """Take a peer for dead until it is heard again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteNeed:
    """What a job needs of a route."""

    model: ModelId
    demand: Demand
    not_last: Collection[PeerId] = ()
    """Peers that may serve any stage but the last."""


class Planner:
    """Finds routes for the jobs of this node."""

    def __init__(self, finder: Finder, links: Links, own_peer: PeerId) -> None:
        self._finder = finder
        self._links = links
        self._own_peer = own_peer
        self._reliability = Reliability()

    async def route(
        self,
        need: RouteNeed,
        without: Collection[PeerId],
        *,
        like: Sequence[Stop] = (),
        held: Collection[Stop] = (),
    ) -> list[Stop]:
        """Return the best route without some peers. Raises NoRouteError.

        Whoever failed of late is used only where there is no route without it. `like`: a former route, of which the
        stages `held` stay, if others can take the places of the rest.
        """
        lost = [number for number, stop in enumerate(like) if stop not in held or stop.peer in without]
        if len(lost) < len(like):
            try:
                return await self._mended(need, like, lost, without)
            except NoRouteError:
                _logger.debug("no replacement for stages", blocks=[str(like[number].blocks) for number in lost])
        offers, loads = await self._offers(need, without)
        trusted, everybody = self._trusted(offers), offers
        try:
            stages = find_route(need.demand, trusted, self._links).stages
        except NoRouteError:
            stages = find_route(need.demand, everybody, self._links).stages
        return [_stop(leg, loads) for leg in stages]

    async def _mended(
        self, need: RouteNeed, like: Sequence[Stop], lost: Sequence[int], without: Collection[PeerId]
    ) -> list[Stop]:
        stops = list(like)
        if not lost:
            return stops
        offers, loads = await self._offers(need, without)
        for number in reversed(lost):  # a stage may be replaced by several, which moves those behind it
            legs = [Leg(stop.blocks.start, stop.blocks.end, stop.peer) for stop in stops]
            try:
                found = find_replacement(need.demand, legs, number, self._trusted(offers), self._links)
            except NoRouteError:
                found = find_replacement(need.demand, legs, number, offers, self._links)
            stops[number : number + 1] = [_stop(leg, loads) for leg in found]
        return stops

    def round_s(self, stops: Sequence[Stop]) -> float:
        """Return what the links add to the time of one token: once around the route."""
        peers = [stop.peer for stop in stops]
        return sum(self._links(a, b).round_trip_s / 2 for a, b in zip(peers, [*peers[1:], peers[0]], strict=True))

    def transfer_s(self, stops: Sequence[Stop], demand: Demand) -> float:
        """Return what the links' width adds to a job: the time of all its rows from each stage to the next."""
        byte_count = (demand.prompt_rows + demand.new_tokens) * demand.row_bytes
        return sum(byte_count / self._links(a.peer, b.peer).bytes_per_s for a, b in pairwise(stops))

    def failed(self, peer: PeerId, *, dead: bool) -> None:
        """Leave a peer alone for a while; one that is taken for dead is out until it is heard again."""
        self._reliability.failed(peer, trio.current_time())
        if dead and peer != self._own_peer:
            self._finder.forget(peer)

    def served(self, peers: Iterable[PeerId]) -> None:
        """Note that peers bore a job to its end."""
        for peer in peers:
            self._reliability.served(peer, trio.current_time())

    async def _offers(self, need: RouteNeed, without: Collection[PeerId]) -> tuple[list[Offer], dict[PeerId, Load]]:
        found = await self._finder.candidates(need.model, need.demand.block_count, without=without)
        if need.not_last:
            found = tuple(_without_last(need, found))
        now_s = trio.current_time()
        offers = [_offer(candidate, self._reliability.trust(candidate.peer, now_s)) for candidate in found]
        return offers, {candidate.peer: candidate.load for candidate in found}

    def _trusted(self, offers: Sequence[Offer]) -> list[Offer]:
        avoided = self._reliability.avoided(trio.current_time())
        return [offer for offer in offers if offer.peer not in avoided]


def _without_last(need: RouteNeed, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Yield what the candidates may serve, some of them without the model's last block."""
    last = need.demand.block_count - 1
    for candidate in candidates:
        blocks = candidate.blocks
        if candidate.peer not in need.not_last or blocks.end <= last:
            yield candidate
        elif blocks.start < last:
            yield replace(candidate, blocks=BlockRange(blocks.start, last))


def _offer(candidate: Candidate, trust: float) -> Offer:
    """Return what a span is predicted to cost: its step time as it told it last, stretched by those who share it."""
    load, blocks = candidate.load, candidate.blocks
    block_s = load.step_s / len(blocks) if load.step_s else UNKNOWN_BLOCK_S
    shared_s = block_s * (1 + load.sessions)
    return Offer(
        start=blocks.start,
        end=blocks.end,
        peer=candidate.peer,
        block_s=shared_s,
        row_block_s=shared_s / PROMPT_ROWS_PER_STEP,
        trust=trust,
        # A stage that has told no load, because only its record was found, says nothing of its room either.
        free_positions=load.free_positions or None,
    )


def _stop(leg: Leg, loads: Mapping[PeerId, Load]) -> Stop:
    peer = PeerId(leg.peer)
    return Stop(peer, BlockRange(leg.start, leg.end), loads.get(peer, Load()))
