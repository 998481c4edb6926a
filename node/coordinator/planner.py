"""Plans routes: turns what is known of the live peers into offers, and remembers how fast they were and who failed."""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, Protocol

import structlog
import trio

from node.links.liveness import SLOWEST_BYTES_PER_S
from node.stages.outbox import OUTGOING_BYTES
from node.swarm.directory import Candidate
from node.swarm.link_estimates import UNKNOWN_BYTES_PER_S
from protocol.identity import BlockRange, ModelId, PeerId, Stage
from protocol.messages import Load
from selector.peer_speed import UNKNOWN_BLOCK_S, Claim, Exploration, Measurements, Share, Speed, judge, least_block_s
from selector.reliability import Record, Reliability
from selector.routing import Demand, Links, NoRouteError, Offer, find_replacement, find_route, uncovered

SLOW_BYTES_PER_S = 2e9
"""Of a block that nobody was measured with, a step passes so many bytes in a second at worst: a slow processor."""

SHARING_BEYOND_OWN = 3
"""Sessions of others that a peer may say it had beside ours when its speed was measured, which makes it look faster."""

BELIEVED_SLOWNESS = 50
"""A peer that was never measured is believed to be so many times as slow as one can expect, and no slower."""

PROMPT_ROWS_PER_STEP = 12
"""Rows of a prompt that take as long as one decode step: what reads all weights once for a single row is slow."""


_logger = structlog.get_logger(__name__)


class Finder(Protocol):
    """Knows who serves what; `node.swarm.membership` is the real one."""

    async def candidates(self, model: ModelId, block_count: int, *, without: Iterable[PeerId]) -> tuple[Candidate, ...]:
        """Return the live peers that serve spans of a model; asks the DHT where those known do not suffice."""
        ...

    def known_candidates(self, model: ModelId, *, without: Iterable[PeerId]) -> tuple[Candidate, ...]:
        """Return the same of the peers that are known to live, and look for no others."""
        ...

    def forget(self, peer: PeerId) -> None:
        """Take a peer for dead until it is heard again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteNeed:
    """What a job needs of a route. `block_bytes`: the weights of one block, 0 where unknown."""

    model: ModelId
    demand: Demand
    block_bytes: float = 0.0
    not_last: Collection[PeerId] = ()
    """Peers that may serve any stage but the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRecord:
    """What this node's own jobs have shown of a peer.

    `served`, `failed`, `lagged`: jobs that it bore to their end, failed in so many words, and made no progress in.
    `avoided_s`: for so long it is used only where nobody else is. `trust`: what its predicted cost is divided by.
    `block_s`: what a block was measured to take for a token, by model.
    """

    served: int
    failed: int
    lagged: int
    trust: float
    avoided_s: float
    block_s: Mapping[ModelId, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTiming:
    """What a route took: seconds of a round, and from the prompt to its first token, each 0 where not measured.

    `prompt_rows`: for each stage, the rows of the prompt that it computed. `busy`: for each stage, for which share of
    the time it says it was at work.
    """

    round_s: float = 0.0
    prompt_s: float = 0.0
    prompt_rows: tuple[int, ...] = ()
    busy: tuple[float, ...] = ()


class PlannedRoute(NamedTuple):
    """The stages of a route, and how busy each was by its last heartbeat."""

    stages: tuple[Stage, ...]
    loads: tuple[Load, ...]


@dataclass(frozen=True, slots=True)
class _Offers:
    """Offers, and those of them whose peers promise more than was ever shown, as they promise it."""

    cautious: list[Offer]
    promised: dict[str, list[Offer]]
    loads: dict[PeerId, Load]

    def without(self, avoided: Collection[str]) -> list[Offer]:
        return [offer for offer in self.cautious if offer.stage.peer not in avoided]

    def planned(self, stages: Sequence[Stage]) -> "PlannedRoute":
        return PlannedRoute(tuple(stages), tuple(self.loads.get(stage.peer, Load()) for stage in stages))


class Planner:
    """Finds routes for the jobs of this node."""

    def __init__(
        self,
        finder: Finder,
        links: Links,
        own_peer: PeerId,
        *,
        rng: random.Random | None = None,
        bandwidth: Callable[[PeerId], float | None] = lambda peer: None,
        in_flight: Callable[[], Counter[PeerId]] = Counter,
    ) -> None:
        """Know nobody yet.

        `rng` decides which promise is tried. `bandwidth`: bytes that a peer says it reads from its memory in a second.
        `in_flight`: how many jobs of this node each peer has now.
        """
        self._finder = finder
        self._links = links
        self._own_peer = own_peer
        self._bandwidth = bandwidth
        self._in_flight = in_flight
        self._reliability = Reliability()
        self._blocks = Measurements()
        """What a block takes for one token,"""
        self._rows = Measurements()
        """and for one row of a prompt."""
        self._exploration = Exploration(rng or random.Random(0))

    async def route(
        self,
        need: RouteNeed,
        without: Collection[PeerId],
        *,
        like: Sequence[Stage] = (),
        held: Collection[Stage] = (),
        may_explore: bool = False,
        only_trusted: bool = False,
    ) -> PlannedRoute:
        """Return the best route without some peers. Raises NoRouteError.

        Whoever failed or lagged is used only where there is no route without it, unless `only_trusted`, and so is a
        peer that promises more than anybody has shown, save for the share of jobs that try it (`may_explore`). `like`:
        a former route, of which the stages `held` stay, if others can take the places of the rest.
        """
        found = await self._finder.candidates(need.model, need.demand.block_count, without=without)
        offers = self._offers(need, found)
        return self._best(need, offers, without, like, held, may_explore=may_explore, only_trusted=only_trusted)

    def knows_route(
        self,
        need: RouteNeed,
        without: Collection[PeerId],
        *,
        like: Sequence[Stage] = (),
        held: Collection[Stage] = (),
        only_trusted: bool = False,
    ) -> bool:
        """Return whether there is a route, as `route` finds it, among the peers that are known to live."""
        offers = self._offers(need, self._finder.known_candidates(need.model, without=without))
        try:
            self._best(need, offers, without, like, held, may_explore=False, only_trusted=only_trusted)
        except NoRouteError:
            return False
        return True

    def _best(
        self,
        need: RouteNeed,
        offers: _Offers,
        without: Collection[PeerId],
        like: Sequence[Stage],
        held: Collection[Stage],
        *,
        may_explore: bool,
        only_trusted: bool,
    ) -> PlannedRoute:
        lost = [number for number, stage in enumerate(like) if stage not in held or stage.peer in without]
        if len(lost) < len(like):
            try:
                return offers.planned(self._mended(need, like, lost, offers, only_trusted=only_trusted))
            except NoRouteError:
                _logger.debug("no replacement for stages", blocks=[str(like[number].blocks) for number in lost])
        stages = self._first_route(need, self._tiers(offers, only_trusted=only_trusted))
        if may_explore:
            stages = self._explored(need, offers, stages)
        return offers.planned(stages)

    def _first_route(self, need: RouteNeed, tiers: Sequence[Sequence[Offer]]) -> tuple[Stage, ...]:
        for tier in tiers[:-1]:
            try:
                return find_route(need.demand, tier, self._links).stages
            except NoRouteError:
                continue
        return find_route(need.demand, tiers[-1], self._links).stages

    def _explored(self, need: RouteNeed, offers: _Offers, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        """Return the route that a promise would make possible, where it is this job's turn to believe one."""
        avoided = self._avoided()
        tried = self._exploration.draw(offers.promised.keys() - avoided)
        if tried is None:
            return stages
        others = offers.without({*avoided, *offers.promised})
        try:
            promised = find_route(need.demand, [*others, *offers.promised[tried]], self._links).stages
        except NoRouteError:
            return stages
        if all(stage.peer != tried for stage in promised):
            return stages
        self._exploration.spend()
        _logger.debug("peer tried that was not measured yet", peer=tried, model=need.model)
        return promised

    def _tiers(self, offers: _Offers, *, only_trusted: bool) -> list[list[Offer]]:
        """Return the offers to choose from: those of whom nothing is to be feared, and more where these do not do."""
        avoided = self._avoided()
        trusted = [offers.without({*avoided, *offers.promised}), offers.without(avoided)]
        return trusted if only_trusted else [*trusted, offers.cautious]

    def _avoided(self) -> frozenset[str]:
        return self._reliability.avoided(trio.current_time())

    def _mended(
        self, need: RouteNeed, like: Sequence[Stage], lost: Sequence[int], offers: _Offers, *, only_trusted: bool
    ) -> list[Stage]:
        stages = list(like)
        tiers = self._tiers(offers, only_trusted=only_trusted)
        for number in reversed(lost):  # a stage may be replaced by several, which moves those behind it
            stages[number : number + 1] = self._first_replacement(need, stages, number, tiers)
        return stages

    def _first_replacement(
        self, need: RouteNeed, stages: Sequence[Stage], number: int, tiers: Sequence[Sequence[Offer]]
    ) -> tuple[Stage, ...]:
        for tier in tiers[:-1]:
            try:
                return find_replacement(need.demand, stages, number, tier, self._links)
            except NoRouteError:
                continue
        return find_replacement(need.demand, stages, number, tiers[-1], self._links)

    def round_s(self, stages: Sequence[Stage]) -> float:
        """Return what the links add to the time of one token: once around the route."""
        peers = [stage.peer for stage in stages]
        return sum(self._links(a, b).round_trip_s / 2 for a, b in zip(peers, [*peers[1:], peers[0]], strict=True))

    def transfer_s(self, stages: Sequence[Stage], demand: Demand) -> float:
        """Return what the links' width adds to a job: the time of all its rows from each stage to the next."""
        byte_count = (demand.prompt_rows + demand.new_tokens) * demand.row_bytes
        return sum(byte_count / self._links(a.peer, b.peer).bytes_per_s for a, b in pairwise(stages))

    def way_s(self, need: RouteNeed, before: Stage, stage: Stage, rows: int) -> float:
        """Return how long rows may be on their way from one stage to the next; generous where no link was measured."""
        link = self._links(before.peer, stage.peer)
        known_bytes_per_s = 0.0 if link.bytes_per_s == UNKNOWN_BYTES_PER_S else link.bytes_per_s
        return rows * need.demand.row_bytes / max(SLOWEST_BYTES_PER_S, known_bytes_per_s)

    def step_way_s(self, before: Stage, stage: Stage) -> float:
        """Return how long the rows of one step are on their way from one stage to the next, if it is a full one."""
        return OUTGOING_BYTES / max(SLOWEST_BYTES_PER_S, self._links(before.peer, stage.peer).bytes_per_s)

    def failed(self, peer: PeerId, *, dead: bool, lagged: bool = False) -> None:
        """Leave a peer alone for a while; one that is taken for dead is out until it is heard again.

        `lagged`: it was there and made no progress, which is held against it for longer. Of one that was never
        measured it may just be slow.
        """
        if lagged:
            self._reliability.lagged(peer, trio.current_time(), is_sure=bool(self._blocks.of(peer)))
        else:
            self._reliability.failed(peer, trio.current_time())
        if dead and peer != self._own_peer:
            self._finder.forget(peer)

    def served(self, peers: Iterable[PeerId]) -> None:
        """Note that peers bore a job to its end."""
        for peer in peers:
            self._reliability.served(peer, trio.current_time())

    def measured(self, need: RouteNeed, stages: Sequence[Stage], loads: Sequence[Load], timing: RouteTiming) -> None:
        """Take in what a job has shown of the peers of its route.

        `loads`: what each stage said of itself when it was opened, whose count of sessions is believed within bounds.
        """
        own = self._in_flight()
        sharing = [
            max(1, own[stage.peer], min(load.sessions, own[stage.peer] + SHARING_BEYOND_OWN))
            for stage, load in zip(stages, loads, strict=True)
        ]
        ones = (1,) * len(stages)
        prompt_links_s = self.round_s(stages) + self.transfer_s(stages, need.demand)
        for measured, took_s, links_s, rows in (
            (self._blocks, timing.round_s, self.round_s(stages), ones),
            (self._rows, timing.prompt_s, prompt_links_s, timing.prompt_rows or ones),
        ):
            shares = [
                Share(stage.peer, len(stage.blocks) * times * count, busy * took_s, stage.peer == self._own_peer)
                for stage, times, count, busy in zip(stages, sharing, rows, timing.busy, strict=True)
            ]
            measured.observe(need.model, shares, max(took_s / 10, took_s - links_s))

    def expected_s(self, need: RouteNeed, stage: Stage, rows: int, load: Load) -> float:
        """Return how long a stage should take for rows of a session; generous where nothing is known of it.

        `load`: as the stage reports it, believed within bounds; the jobs that this node has there count fully.
        """
        block_s = self._prior_block_s(need, stage, load.step_s)
        row_s = self._rows.seconds(stage.peer, need.model)
        if row_s is None:
            known_s = self._rows.reference_s(need.model)
            slow_s = max(block_s, need.block_bytes / SLOW_BYTES_PER_S) if known_s is None else block_s
            row_s = max(known_s or 0.0, slow_s / PROMPT_ROWS_PER_STEP)
        own = self._in_flight()[stage.peer]
        times = max(1, own, min(load.sessions, own + SHARING_BEYOND_OWN))
        return times * len(stage.blocks) * (block_s + max(0, rows - 1) * row_s)

    def _prior_block_s(self, need: RouteNeed, stage: Stage, step_s: float) -> float:
        """Return what a block takes a peer for a token: as measured, else as the best are, or as it says if slower."""
        shown_s = self._blocks.seconds(stage.peer, need.model)
        if shown_s is not None:
            return shown_s
        known_s = self._blocks.reference_s(need.model) or UNKNOWN_BLOCK_S
        slow_s = max(known_s, UNKNOWN_BLOCK_S, need.block_bytes / SLOW_BYTES_PER_S)
        told_s = step_s / len(stage.blocks) or UNKNOWN_BLOCK_S
        return max(known_s, min(told_s, BELIEVED_SLOWNESS * slow_s))

    def proven_least(self, model: ModelId, peers: Iterable[PeerId]) -> PeerId:
        """Return of several peers the one that has shown least: if one of them is at fault, most likely it is this."""
        now_s = trio.current_time()
        return min(
            peers,
            key=lambda peer: (
                peer == self._own_peer,
                self._reliability.trust(peer, now_s),
                self._blocks.jobs(peer, model),
                peer,
            ),
        )

    def could_serve(self, need: RouteNeed, promised: Iterable[BlockRange], without: Collection[PeerId] = ()) -> bool:
        """Return whether the peers known to live, and `promised` spans that are being loaded, cover all blocks."""
        found = self._finder.known_candidates(need.model, without=without)
        spans = (candidate.stage.blocks for candidate in found)
        return not uncovered(need.demand.block_count, [*spans, *promised])

    def record(self, peer: PeerId) -> PeerRecord:
        """Return what this node's own jobs have shown of a peer."""
        kept: Record = self._reliability.record(peer, trio.current_time())
        return PeerRecord(
            served=kept.served,
            failed=kept.failed,
            lagged=kept.lagged,
            trust=kept.trust,
            avoided_s=kept.avoided_s,
            block_s={ModelId(str(model)): seconds for model, seconds in self._blocks.of(peer).items()},
        )

    def records(self) -> dict[PeerId, PeerRecord]:
        """Return the record of every peer of which something is remembered: a bounded number."""
        return {PeerId(peer): self.record(PeerId(peer)) for peer in self._reliability.peers()}

    def _offers(self, need: RouteNeed, found: tuple[Candidate, ...]) -> _Offers:
        if need.not_last:
            found = tuple(_without_last(need, found))
        now_s = trio.current_time()
        in_flight = self._in_flight()
        claims = [
            Claim(
                candidate.stage.peer,
                candidate.load.step_s / len(candidate.stage.blocks),
                least_block_s(need.block_bytes, self._bandwidth(candidate.stage.peer)),
            )
            for candidate in found
        ]
        offers = _Offers([], {}, {candidate.stage.peer: candidate.load for candidate in found})
        for candidate, speed in zip(found, judge(claims, self._blocks, need.model, self._own_peer), strict=True):
            peer = candidate.stage.peer
            trust = self._reliability.trust(peer, now_s)
            sessions = max(candidate.load.sessions, in_flight[peer])
            row_s = self._rows.seconds(peer, need.model)
            offers.cautious.append(_offer(candidate, speed, trust, sessions, row_s))
            if speed.is_promise:
                believed = _offer(candidate, speed._replace(block_s=speed.promised_s), trust, sessions, row_s)
                offers.promised.setdefault(peer, []).append(believed)
        return offers


def _without_last(need: RouteNeed, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Yield what the candidates may serve, some of them without the model's last block."""
    last = need.demand.block_count - 1
    for candidate in candidates:
        peer, blocks = candidate.stage.peer, candidate.stage.blocks
        if peer not in need.not_last or blocks.end <= last:
            yield candidate
        elif blocks.start < last:
            yield replace(candidate, stage=Stage(peer, BlockRange(blocks.start, last)))


def _offer(candidate: Candidate, speed: Speed, trust: float, sessions: int, row_block_s: float | None) -> Offer:
    """Return what a span is predicted to cost: stretched by those who share it."""
    shared = 1 + sessions
    return Offer(
        stage=candidate.stage,
        block_s=speed.block_s * shared,
        row_block_s=(speed.block_s / PROMPT_ROWS_PER_STEP if row_block_s is None else row_block_s) * shared,
        trust=trust,
        # A stage that has told no load, because only its record was found, says nothing of its room either.
        free_positions=candidate.load.free_positions or None,
    )
