"""Plans routes: turns the live peers into offers, and keeps a record of their measured speed and their failures."""

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import structlog
import trio

from node.coordinator.swarm_view import SwarmView
from node.links.outbound_link import SLOWEST_BYTES_PER_S
from node.stages.outbox import OUTGOING_BYTES
from node.swarm.directory import UNREPORTED_LOAD, Candidate
from protocol.figures import USUAL_PRICE
from protocol.identity import BlockRange, ModelId, PeerId, Stage
from protocol.measurements import Objective
from protocol.messages import Load
from selector.cuts import Parts
from selector.peer_speed import UNKNOWN_BLOCK_S, Claim, Exploration, Measurements, Share, Speed, judge, least_block_s
from selector.reliability import PeerRecord, Reliability
from selector.routing import Demand, NoRouteError, Offer, check_complete, find_replacement, find_route

SLOW_BYTES_PER_S = 2e9
"""Weights of a block that a step reads per second at worst, where no peer was measured with it: a slow processor."""

SHARING_BEYOND_OWN = 3
"""Other nodes' sessions that a peer may claim beside ours when its speed is measured: they make it look faster."""

BELIEVED_SLOWNESS = 50
"""An unmeasured peer that claims to be slow is believed up to this multiple of the expected time."""

REPORT_AGE_S = 6.0
"""For how long a peer's report of its sessions may count one that has ended."""

ONLY_COMPUTING = 1e4
"""A `compute_weight` beside which time counts for nothing."""

PROMPT_ROWS_PER_STEP = 12
"""Prompt rows that take as long as one decode step, which reads all weights for a single row."""


_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteNeed:
    """What a job needs of a route.

    `block_bytes`: the weights of one block, 0 where unknown. `not_last`: peers that may serve any stage but the last.
    `without`: peers to leave out. `like`, `held`: a previous route, and its stages that hold the session; those stay if
    others can take the places of the rest. `parts`: which parts of its span a stage may run. `objective`,
    `compute_weight`: seconds of waiting that a second of computing is worth, at its price if the objective is cost.
    `last_resort`: also peers that seem to be full, or failed, as if they were not.
    """

    model: ModelId
    demand: Demand
    block_bytes: float = 0.0
    parts: Parts = Parts.ANY
    not_last: Collection[PeerId] = ()
    without: Collection[PeerId] = ()
    like: Sequence[Stage] = ()
    held: Collection[Stage] = ()
    objective: Objective = Objective.LATENCY
    compute_weight: float = 0.0
    last_resort: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTiming:
    """Measured times of a route: of a round, and from the prompt to its first token, in seconds, 0 if not measured.

    `prompt_rows`: for each stage, the prompt rows that it computed. `busy`: for each stage, the share of the time that
    it reports as spent computing.
    """

    round_s: float = 0.0
    prompt_s: float = 0.0
    prompt_rows: tuple[int, ...] = ()
    busy: tuple[float, ...] = ()


class PlannedRoute(NamedTuple):
    """The stages of a route. For each: how busy it was by its last heartbeat, its expected computing, and its price."""

    stages: tuple[Stage, ...]
    loads: tuple[Load, ...]
    stage_compute_s: tuple[float, ...]
    prices: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Offers:
    """Offers with cautious costs, and for peers that promise more than was ever measured, with promised ones."""

    cautious: list[Offer]
    promised: dict[str, list[Offer]]
    loads: dict[PeerId, Load]
    speeds: dict[PeerId, tuple[float, float]]
    """Seconds of a block for one token, and for one row of a prompt, without anybody else's work."""
    price: Callable[[PeerId], float]

    def without(self, avoided: Collection[str]) -> list[Offer]:
        return [offer for offer in self.cautious if offer.stage.peer not in avoided]

    def planned(self, need: RouteNeed, stages: Sequence[Stage]) -> "PlannedRoute":
        loads = tuple(self.loads.get(each.peer, Load()) for each in stages)
        compute_s = tuple(self._compute_s(need.demand, each) for each in stages)
        return PlannedRoute(tuple(stages), loads, compute_s, tuple(self.price(each.peer) for each in stages))

    def _compute_s(self, demand: Demand, stage: Stage) -> float:
        block_s, row_s = self.speeds.get(stage.peer, (UNKNOWN_BLOCK_S, 0.0))
        return len(stage.blocks) * (demand.new_tokens * block_s + demand.prompt_rows * row_s)


class Planner:
    """Finds routes for the jobs of this node."""

    def __init__(
        self, swarm: SwarmView, own_peer: PeerId, *, rng: random.Random, in_flight: Callable[[], Counter[PeerId]]
    ) -> None:
        """`rng` decides which promise is explored. `in_flight`: the number of this node's jobs on each peer."""
        self._finder = swarm.finder
        self._links = swarm.links
        self._swarm = swarm
        self._own_peer = own_peer
        self._in_flight = in_flight
        self._reliability = Reliability()
        self._blocks = Measurements()
        """Seconds of a block for one token,"""
        self._rows = Measurements()
        """and for one row of a prompt."""
        self._exploration = Exploration(rng)
        self._ended: dict[PeerId, tuple[float, int]] = {}
        """When a job of ours last ended on a peer, and how many we had there."""

    async def route(self, need: RouteNeed, *, may_explore: bool = False, only_trusted: bool = False) -> PlannedRoute:
        """Return the best route. Raises NoRouteError.

        A peer that failed or lagged is used only where there is no route without it, and never if `only_trusted`; so is
        a peer that promises more than any has shown, except by the share of jobs that explore it (`may_explore`).
        """
        found = await self._finder.candidates(need.model, need.demand.cuts, self._links, without=need.without)
        try:
            return self._best(need, self._offers(need, found), may_explore=may_explore, only_trusted=only_trusted)
        except NoRouteError as error:
            unreached = self._finder.unreached_stages(need.model, error.missing)
            error.unreached = tuple(dict.fromkeys(stage.peer for stage in unreached))
            raise

    def knows_route(self, need: RouteNeed, *, only_trusted: bool = False) -> bool:
        """Return whether there is a route, as `route` finds it, among the known live peers."""
        offers = self._offers(need, self._finder.known_candidates(need.model, without=need.without))
        try:
            self._best(need, offers, may_explore=False, only_trusted=only_trusted)
        except NoRouteError:
            return False
        return True

    def _best(self, need: RouteNeed, offers: _Offers, *, may_explore: bool, only_trusted: bool) -> PlannedRoute:
        tiers = [offers.cautious] if need.last_resort else self._tiers(offers, only_trusted=only_trusted)
        lost = [n for n, stage in enumerate(need.like) if stage not in need.held or stage.peer in need.without]
        if len(lost) < len(need.like):
            try:
                return offers.planned(need, self._repaired(need, lost, tiers))
            except NoRouteError:
                _logger.debug("no replacement for stages", blocks=[str(need.like[number].blocks) for number in lost])
        stages = _first(tiers, lambda tier: find_route(need.demand, tier, self._links).stages)
        if may_explore:
            stages = self._explored(need, offers, stages)
        return offers.planned(need, stages)

    def _repaired(self, need: RouteNeed, lost: Sequence[int], tiers: Sequence[Sequence[Offer]]) -> list[Stage]:
        """Return the previous route with its lost stages replaced."""
        stages = list(need.like)

        def replacement(number: int) -> tuple[Stage, ...]:
            return _first(tiers, lambda tier: find_replacement(need.demand, stages, number, tier, self._links))

        for number in reversed(lost):  # a stage may be replaced by several, which moves those behind it
            stages[number : number + 1] = replacement(number)
        return stages

    def _explored(self, need: RouteNeed, offers: _Offers, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        """Return the route that a promise would make possible, where it is this job's turn to explore one."""
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
        _logger.debug("exploring a peer that was not measured yet", peer=tried, model=need.model)
        return promised

    def _tiers(self, offers: _Offers, *, only_trusted: bool) -> list[list[Offer]]:
        """Return sets of offers, to be tried in order: without avoided peers and promises first."""
        avoided = self._avoided()
        trusted = [offers.without({*avoided, *offers.promised}), offers.without(avoided)]
        return trusted if only_trusted else [*trusted, offers.cautious]

    def _avoided(self) -> frozenset[str]:
        return self._reliability.avoided(trio.current_time())

    def concurrency(self, stages: Sequence[Stage], loads: Sequence[Load], serving: Collection[PeerId] = ()) -> int:
        """Return the most jobs on any stage of a route, with the one that is planned.

        `serving`: peers that serve that one already. Reports are some seconds old, so that jobs of ours that have ended
        since are left out.
        """
        own, now_s = self._in_flight(), trio.current_time()
        most = 0
        for stage, load in zip(stages, loads, strict=True):
            ended_s, count = self._ended.get(stage.peer, (-math.inf, 0))
            reported = max(own[stage.peer], count if now_s - ended_s < REPORT_AGE_S else 0)
            others = own[stage.peer] - (stage.peer in serving)
            most = max(most, others + max(0, load.sessions - reported))
        return 1 + most

    def round_s(self, stages: Sequence[Stage]) -> float:
        """Return the links' latency per token: once around the route."""
        peers = [stage.peer for stage in stages]
        links = (self._links(a, b) for a, b in zip(peers, [*peers[1:], peers[0]], strict=True))
        # Infinite where the route was opened, and its peers have since said that they cannot be reached.
        return sum(link.round_trip_s / 2 for link in links if math.isfinite(link.round_trip_s))

    def transfer_s(self, stages: Sequence[Stage], demand: Demand) -> float:
        """Return the transfer time that the links' bandwidth adds to a job: of all its rows, stage by stage."""
        byte_count = (demand.prompt_rows + demand.new_tokens) * demand.row_bytes
        return sum(byte_count / self._links(a.peer, b.peer).bytes_per_s for a, b in pairwise(stages))

    def way_s(self, need: RouteNeed, before: Stage, stage: Stage, rows: int) -> float:
        """Return the time limit for the transfer of rows between stages; generous where no link was measured."""
        link = self._links(before.peer, stage.peer)
        known_bytes_per_s = link.bytes_per_s if link.is_rate_known else 0.0
        return rows * need.demand.row_bytes / max(SLOWEST_BYTES_PER_S, known_bytes_per_s)

    def step_way_s(self, before: Stage, stage: Stage) -> float:
        """Return the transfer time of a full step between stages."""
        return OUTGOING_BYTES / max(SLOWEST_BYTES_PER_S, self._links(before.peer, stage.peer).bytes_per_s)

    def failed(self, peer: PeerId, *, dead: bool, lagged: bool = False) -> None:
        """Avoid a peer for a while; a `dead` one until its next heartbeat.

        `lagged`: it was reachable and made no progress, which counts for longer; an unmeasured one may just be slow.
        """
        if lagged:
            self._reliability.lagged(peer, trio.current_time(), is_sure=bool(self._blocks.of(peer)))
        else:
            self._reliability.failed(peer, trio.current_time())
        if dead and peer != self._own_peer:
            self._finder.forget(peer)

    def disputed(self, *peers: PeerId) -> None:
        """Record two peers one of which blames the other: which of them is at fault is unknown."""
        for peer in peers:
            self._reliability.disputed(peer, trio.current_time())

    def served(self, peers: Iterable[PeerId]) -> None:
        """Record that peers completed a job."""
        for peer in peers:
            self._reliability.served(peer, trio.current_time())

    def measured(self, need: RouteNeed, stages: Sequence[Stage], loads: Sequence[Load], timing: RouteTiming) -> None:
        """Learn the speed of a route's stages from a job. `loads`: each stage's report when it was opened."""
        own, now_s = self._in_flight(), trio.current_time()
        self._ended = {peer: found for peer, found in self._ended.items() if now_s - found[0] < REPORT_AGE_S}
        # A job in the background is in no report, and must not hide that one of ours is still in a recent one.
        self._ended |= {stage.peer: (now_s, count) for stage in stages if (count := own[stage.peer])}
        sharing = [self._sharing(stage.peer, load) for stage, load in zip(stages, loads, strict=True)]
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
        """Return the expected time of a stage, by its reported load, for rows; generous for an unmeasured one."""
        block_s = self._prior_block_s(need, stage, load.step_s)
        row_s = self._rows.seconds(stage.peer, need.model)
        if row_s is None:
            known_s = self._rows.reference_s(need.model)
            slow_s = max(block_s, need.block_bytes / SLOW_BYTES_PER_S) if known_s is None else block_s
            row_s = max(known_s or 0.0, slow_s / PROMPT_ROWS_PER_STEP)
        return self._sharing(stage.peer, load) * len(stage.blocks) * (block_s + max(0, rows - 1) * row_s)

    def _sharing(self, peer: PeerId, load: Load) -> int:
        """Return how many sessions share a peer: our own, and as many of others' as it reports within bounds."""
        own = self._in_flight()[peer]
        return max(1, own, min(load.sessions, own + SHARING_BEYOND_OWN))

    def _prior_block_s(self, need: RouteNeed, stage: Stage, step_s: float) -> float:
        """Return a peer's seconds per block and token: measured, else the best peer's, or its own claim if slower."""
        measured_s = self._blocks.seconds(stage.peer, need.model)
        if measured_s is not None:
            return measured_s
        known_s = self._blocks.reference_s(need.model) or UNKNOWN_BLOCK_S
        slow_s = max(known_s, UNKNOWN_BLOCK_S, need.block_bytes / SLOW_BYTES_PER_S)
        claimed_s = step_s / len(stage.blocks) or UNKNOWN_BLOCK_S
        return max(known_s, min(claimed_s, BELIEVED_SLOWNESS * slow_s))

    def proven_least(self, model: ModelId, peers: Iterable[PeerId]) -> PeerId:
        """Return the least proven of several peers: the one most likely at fault."""
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

    def could_serve(self, need: RouteNeed, promised: Iterable[BlockRange] = ()) -> bool:
        """Return whether the known live peers, and `promised` spans that are being loaded, cover all blocks."""
        found = self._finder.known_candidates(need.model, without=need.without)
        spans = [candidate.stage.blocks for candidate in found]
        if need.demand.cuts.uncovered(spans):
            return not need.demand.cuts.uncovered([*spans, *promised])
        try:
            check_complete(need.demand.cuts, [candidate.stage for candidate in found], self._links)
        except NoRouteError as error:
            return not error.apart
        return True

    def record(self, peer: PeerId) -> PeerRecord:
        """Return this node's record of a peer."""
        block_s = {ModelId(str(model)): seconds for model, seconds in self._blocks.of(peer).items()}
        return replace(self._reliability.record(peer, trio.current_time()), block_s=block_s)

    def records(self) -> dict[PeerId, PeerRecord]:
        """Return the records of all remembered peers: a bounded number."""
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
                least_block_s(need.block_bytes, self._swarm.bandwidth(candidate.stage.peer)),
            )
            for candidate in found
        ]
        offers = _Offers([], {}, {candidate.stage.peer: candidate.load for candidate in found}, {}, self._swarm.price)
        for candidate, speed in zip(found, judge(claims, self._blocks, need.model, self._own_peer), strict=True):
            peer = candidate.stage.peer
            trust = self._reliability.trust(peer, now_s)
            price = self._swarm.price(peer) if need.objective is Objective.COST else USUAL_PRICE
            # Others' sessions cost time, computing costs whatever it is worth.
            shares = 1 + max(candidate.load.sessions, in_flight[peer]) + need.compute_weight * price
            row_s = self._rows.seconds(peer, need.model)
            offers.speeds[peer] = speed.block_s, speed.block_s / PROMPT_ROWS_PER_STEP if row_s is None else row_s
            offer = replace(_offer(candidate, speed, trust, shares, row_s), parts=need.parts)
            offers.cautious.append(replace(offer, free_positions=None) if need.last_resort else offer)
            if speed.is_promise:
                believed = _offer(candidate, speed._replace(block_s=speed.promised_s), trust, shares, row_s)
                offers.promised.setdefault(peer, []).append(replace(believed, parts=need.parts))
        return offers


def _without_last(need: RouteNeed, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Yield the candidates, those that cannot be the last stage without the model's last block."""
    demand = need.demand
    last = (demand.block_count - 1) // demand.granularity * demand.granularity
    for candidate in candidates:
        peer, blocks = candidate.stage.peer, candidate.stage.blocks
        if peer not in need.not_last or blocks.end <= last:
            yield candidate
        elif need.parts >= Parts.PREFIX and blocks.start < last:
            yield replace(candidate, stage=Stage(peer, BlockRange(blocks.start, last)))


def _offer(candidate: Candidate, speed: Speed, trust: float, shared: float, row_block_s: float | None) -> Offer:
    """Return an offer of a span, its costs multiplied by the sessions that share it, and by what computing is worth."""
    return Offer(
        stage=candidate.stage,
        block_s=speed.block_s * shared,
        row_block_s=(speed.block_s / PROMPT_ROWS_PER_STEP if row_block_s is None else row_block_s) * shared,
        trust=trust,
        free_positions=None if candidate.load == UNREPORTED_LOAD else candidate.load.free_positions,
    )


def _first(tiers: Sequence[Sequence[Offer]], find: Callable[[Sequence[Offer]], tuple[Stage, ...]]) -> tuple[Stage, ...]:
    """Return what is found in the first tier that has it. Raises the last tier's NoRouteError."""
    for tier in tiers[:-1]:
        with suppress(NoRouteError):
            return find(tier)
    return find(tiers[-1])
