"""Which peers a job goes to, by what is known of them, and what the links of a route add."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.planner import Planner, RouteNeed, RouteTiming
from node.coordinator.swarm_view import Finder, SwarmView
from node.swarm.directory import UNREPORTED_LOAD, Candidate
from protocol.identity import BlockRange, ModelId, PeerId, Stage
from protocol.messages import Load
from selector.cuts import Cuts
from selector.reliability import LAG_BACKOFF_S, PeerRecord
from selector.routing import UNKNOWN_BYTES_PER_S, Demand, Link, Links, NoRouteError

A, B, C = (PeerId(name) for name in "abc")
DEMAND = Demand(block_count=9, prompt_rows=900, new_tokens=100, row_bytes=1000)


class Nobody:
    """A finder for a route that was found already."""

    async def candidates(
        self, model: ModelId, cuts: Cuts, links: Links, *, without: Iterable[PeerId]
    ) -> tuple[Candidate, ...]:
        return ()

    def unreached_stages(self, model: ModelId, blocks: Sequence[BlockRange]) -> tuple[Stage, ...]:
        return ()

    def known_candidates(self, model: ModelId, *, without: Iterable[PeerId]) -> tuple[Candidate, ...]:
        return ()

    def forget(self, peer: PeerId) -> None: ...


def links(sender: str, receiver: str) -> Link:
    """Wide between `a` and `b`, narrow on to `c`, which is far from both."""
    return Link(0.002 if {sender, receiver} == {"a", "b"} else 0.04, 1e8 if receiver == "b" else 2e6)


def test_latency_counts_around_the_route_and_bandwidth_along_it() -> None:
    planner = make_planner(Nobody(), links, A)
    stages = [Stage(peer, BlockRange(3 * i, 3 * i + 3)) for i, peer in enumerate((A, B, C))]
    assert planner.round_s(stages) == pytest.approx((0.002 + 0.04 + 0.04) / 2)
    assert planner.transfer_s(stages, DEMAND) == pytest.approx(1e6 / 1e8 + 1e6 / 2e6)
    assert planner.transfer_s(stages[:1], DEMAND) == 0.0


def near(sender: str, receiver: str) -> Link:
    return Link(0.001, 1e9)


class Served:
    """A finder of peers that serve the whole model, each with what it tells of its load."""

    def __init__(self, **loads: Load) -> None:
        self.loads = loads
        self.searches = 0

    async def candidates(
        self, model: ModelId, cuts: Cuts, links: Links, *, without: Iterable[PeerId]
    ) -> tuple[Candidate, ...]:
        self.searches += 1
        return self.known_candidates(model, without=without)

    def unreached_stages(self, model: ModelId, blocks: Sequence[BlockRange]) -> tuple[Stage, ...]:
        return ()

    def known_candidates(self, model: ModelId, *, without: Iterable[PeerId]) -> tuple[Candidate, ...]:
        excluded = set(without)
        return tuple(
            Candidate(Stage(PeerId(peer), BlockRange(0, 9)), load)
            for peer, load in self.loads.items()
            if PeerId(peer) not in excluded
        )

    def forget(self, peer: PeerId) -> None:
        self.loads.pop(peer, None)


def make_planner(
    finder: Finder, links: Links, own_peer: PeerId, in_flight: Callable[[], Counter[PeerId]] = Counter
) -> Planner:
    return Planner(SwarmView(finder=finder, links=links), own_peer, rng=random.Random(0), in_flight=in_flight)


NEED = RouteNeed(model=ModelId("ab" * 32), demand=DEMAND)
WITHOUT_B = replace(NEED, without=[B])
HONEST, LIAR = Load(step_s=0.02, free_positions=10**6), Load(step_s=1e-9, free_positions=10**6)


async def chosen(planner: Planner, *, may_explore: bool = False) -> PeerId:
    (stage,) = (await planner.route(NEED, may_explore=may_explore)).stages
    return stage.peer


def show(planner: Planner, peer: str, seconds: float) -> None:
    """Have a job measure a peer: so long for a token."""
    timing = RouteTiming(round_s=seconds, busy=(1.0,))
    planner.measured(NEED, [Stage(PeerId(peer), BlockRange(0, 9))], [Load(sessions=1)], timing)


async def test_prefers_measured_peer_to_promised_speed(virtual_clock: MockClock) -> None:
    planner = make_planner(Served(honest=HONEST, liar=LIAR), near, A)
    assert await chosen(planner) == "honest", "also before anything was measured"
    show(planner, "honest", 0.05)
    assert [await chosen(planner, may_explore=True) for _ in range(20)].count(PeerId("liar")) == 2
    assert not any([await chosen(planner) == "liar" for _ in range(20)]), "what nobody waits for tries nothing"


async def test_prefers_peers_with_room_and_those_that_reported_no_load_to_full_ones(virtual_clock: MockClock) -> None:
    for load in (Load(sessions=2, step_s=0.1, free_positions=10**6), UNREPORTED_LOAD):
        planner = make_planner(Served(full=Load(sessions=1, step_s=0.001), other=load), near, C)
        show(planner, "full", 0.001)
        assert await chosen(planner) == "other"


async def test_uses_promised_speed_without_alternative(virtual_clock: MockClock) -> None:
    planner = make_planner(Served(liar=LIAR), near, A)
    assert await chosen(planner) == "liar"


async def test_spreads_own_jobs_before_heartbeats_report_them(virtual_clock: MockClock) -> None:
    in_flight = Counter({PeerId("a"): 3})
    planner = make_planner(Served(a=HONEST, b=HONEST), near, C, in_flight=lambda: in_flight)
    assert await chosen(planner) == "b"


async def test_avoids_lagging_peer_while_there_is_another(virtual_clock: MockClock) -> None:
    planner = make_planner(Served(a=HONEST, b=HONEST), near, C)
    for _ in range(3):
        show(planner, "a", 0.02)
    assert await chosen(planner) == "a"
    planner.failed(A, dead=False, lagged=True)
    planner.served([A])
    assert await chosen(planner) == "b", "that it served another job meanwhile does not make good for it"
    with pytest.raises(NoRouteError):
        await planner.route(WITHOUT_B, only_trusted=True)
    assert (await planner.route(WITHOUT_B)).stages[0].peer == "a"
    record = planner.record(A)
    assert (record.lagged, record.served, record.failed) == (1, 1, 0)
    assert record.avoided_s == pytest.approx(LAG_BACKOFF_S[0])
    assert record.block_s[NEED.model] == pytest.approx(0.02 / 9, rel=0.2)
    await trio.sleep(LAG_BACKOFF_S[0] + 1)
    assert planner.record(A).avoided_s == 0
    assert planner.record(PeerId("nobody")) == PeerRecord(
        served=0, failed=0, lagged=0, trust=1.0, avoided_s=0.0, block_s={}
    )


async def test_knows_route_without_a_search(virtual_clock: MockClock) -> None:
    finder = Served(a=HONEST, b=HONEST)
    planner = make_planner(finder, near, C)
    assert planner.knows_route(replace(NEED, without=[A]))
    assert not planner.knows_route(replace(NEED, without=[A, B]))
    planner.failed(A, dead=False, lagged=True)
    assert not planner.knows_route(WITHOUT_B, only_trusted=True)
    assert planner.could_serve(replace(NEED, without=[A]))
    assert finder.searches == 0


async def test_expected_time_follows_measurement_and_sessions(virtual_clock: MockClock) -> None:
    planner = make_planner(Served(a=HONEST), near, C)
    stage = Stage(A, BlockRange(0, 9))
    show(planner, "a", 0.9)
    one_s = planner.expected_s(NEED, stage, 1, Load())
    assert one_s == pytest.approx(0.9, rel=0.2)
    assert planner.expected_s(NEED, stage, 1, Load(sessions=2)) == pytest.approx(2 * one_s)
    assert planner.expected_s(NEED, stage, 1, Load(sessions=10**6)) < 5 * one_s, "what it says of others is bounded"
    assert planner.expected_s(NEED, stage, 100, Load()) > one_s


async def test_unmeasured_peer_is_given_its_claimed_time_within_bounds() -> None:
    planner = make_planner(Served(), near, C)
    timing = RouteTiming(round_s=0.002, prompt_s=0.02, prompt_rows=(900,), busy=(1.0,))
    planner.measured(NEED, [Stage(A, BlockRange(0, 9))], [Load(sessions=1)], timing)
    unmeasured = Stage(B, BlockRange(0, 9))
    assert planner.expected_s(NEED, Stage(A, BlockRange(0, 9)), 2000, Load()) < 0.2
    assert planner.expected_s(NEED, unmeasured, 2000, Load(step_s=0.2)) > 2000 * 0.2 / 20
    assert planner.expected_s(NEED, unmeasured, 1, Load(step_s=1e9)) < 10


def test_transfer_limit_follows_bandwidth_within_bounds() -> None:
    def way_s(bytes_per_s: float, *, known: bool = True) -> float:
        planner = make_planner(Nobody(), lambda a, b: Link(0.01, bytes_per_s, is_rate_known=known), A)
        return planner.way_s(NEED, Stage(A, BlockRange(0, 4)), Stage(B, BlockRange(4, 9)), 2000)

    assert way_s(1e8) == pytest.approx(0.02)
    assert way_s(UNKNOWN_BYTES_PER_S, known=False) == pytest.approx(4.0)
    assert way_s(1.0) == pytest.approx(4.0), "what a peer says of its link is believed within bounds"


async def test_lag_of_unmeasured_peer_is_forgiven_once_it_serves(virtual_clock: MockClock) -> None:
    planner = make_planner(Served(a=HONEST), near, C)
    planner.failed(A, dead=False, lagged=True)
    assert planner.record(A).avoided_s == pytest.approx(LAG_BACKOFF_S[0])
    assert planner.record(A).trust > 0.6
    planner.served([A])
    assert (planner.record(A).avoided_s, planner.record(A).trust, planner.record(A).lagged) == (0, 1, 1)


@pytest.mark.parametrize(("bytes_per_s", "seconds"), [(1.0, 4.2), (1e6, 2.1), (UNKNOWN_BYTES_PER_S, 0.04)])
def test_step_transfer_limit_on_a_narrow_link(bytes_per_s: float, seconds: float) -> None:
    planner = make_planner(Nobody(), lambda a, b: Link(0.01, bytes_per_s), A)
    stages = Stage(A, BlockRange(0, 4)), Stage(B, BlockRange(4, 9))
    assert planner.step_way_s(*stages) == pytest.approx(seconds, rel=0.1)
