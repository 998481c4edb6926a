"""The route that is found is the best there is: compared with every route there is, in small swarms."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.identity import BlockRange, PeerId, Stage
from selector.cuts import Parts
from selector.routing import (
    Demand,
    Link,
    Links,
    NoRouteError,
    Offer,
    find_replacement,
    find_route,
    hop_cost_s,
    return_cost_s,
    stage_cost_s,
)

PEERS = ("a", "b", "c", "d")
TIMES_S = st.sampled_from((0.0, 0.001, 0.004, 0.02, 0.1))


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    block_count = draw(st.integers(1, 5))
    return Demand(
        block_count=block_count,
        prompt_rows=draw(st.integers(0, 50)),
        new_tokens=draw(st.integers(1, 50)),
        row_bytes=draw(st.sampled_from((0, 2304, 65536))),
        granularity=draw(st.integers(1, block_count)),
    )


@st.composite
def offers_for(draw: st.DrawFn, demand: Demand) -> list[Offer]:
    def offer() -> Offer:
        start = draw(st.integers(0, demand.block_count - 1))
        blocks = BlockRange(start, draw(st.integers(start + 1, demand.block_count)))
        if draw(st.integers(0, 3)):
            blocks = demand.cuts.around(blocks)
        return Offer(
            stage=Stage(PeerId(draw(st.sampled_from(PEERS))), blocks),
            block_s=draw(TIMES_S),
            step_s=draw(TIMES_S),
            row_block_s=draw(TIMES_S),
            trust=draw(st.sampled_from((0.25, 1.0))),
            free_positions=draw(st.sampled_from((None, 20, 1000))),
            parts=draw(st.sampled_from(Parts)),
        )

    return list(dict.fromkeys(offer() for _ in range(draw(st.integers(0, 5)))))


@st.composite
def links_between(draw: st.DrawFn) -> Links:
    table: Mapping[tuple[str, str], Link] = {
        (a, b): Link(draw(TIMES_S), draw(st.sampled_from((1e6, 1e9)))) for a in PEERS for b in PEERS
    }
    return lambda a, b: table[a, b]


@st.composite
def swarms(draw: st.DrawFn) -> tuple[Demand, list[Offer], Links]:
    demand = draw(demands())
    return demand, draw(offers_for(demand)), draw(links_between())


def every_chain(
    demand: Demand, offers: Sequence[Offer], start: int, end: int
) -> Iterator[tuple[tuple[Offer, Stage], ...]]:
    """Yield every way to cover the blocks, no offer twice in a row."""
    if start == end:
        yield ()
        return
    for offer in offers:
        for stop in range(start + 1, end + 1):
            blocks = BlockRange(start, stop)
            if stop % demand.granularity and stop != demand.block_count:
                continue
            if offer.stage.blocks.holds(blocks) and offer.parts.include(blocks, offer.stage.blocks):
                for rest in every_chain(demand, offers, stop, end):
                    if not rest or rest[0][0] != offer:
                        yield ((offer, Stage(offer.stage.peer, blocks)), *rest)


def usable(demand: Demand, offers: Sequence[Offer]) -> list[Offer]:
    return [offer for offer in offers if demand.cuts.fault(offer.stage.blocks) is None]


def inner_cost_s(demand: Demand, chain: Sequence[tuple[Offer, Stage]], links: Links) -> float:
    """Return what the stages of a chain and the hops between them cost."""
    stages_s = sum(stage_cost_s(demand, offer, len(stage.blocks)) for offer, stage in chain)
    peers = [stage.peer for _, stage in chain]
    return stages_s + sum(hop_cost_s(demand, links(a, b)) for a, b in pairwise(peers))


def roomy(demand: Demand, offers: Sequence[Offer]) -> list[Offer]:
    return [o for o in offers if o.free_positions is None or o.free_positions >= demand.positions]


@given(swarms())
def test_no_route_is_cheaper(swarm: tuple[Demand, list[Offer], Links]) -> None:
    demand, offers, links = swarm
    for allowed in (usable(demand, roomy(demand, offers)), usable(demand, offers)):
        costs_s = [
            inner_cost_s(demand, chain, links) + return_cost_s(demand, links(chain[-1][1].peer, chain[0][1].peer))
            for chain in every_chain(demand, allowed, 0, demand.block_count)
        ]
        if costs_s:
            route = find_route(demand, offers, links)
            assert route.cost_s == pytest.approx(min(costs_s))
            possible = {
                tuple(stage for _, stage in chain) for chain in every_chain(demand, allowed, 0, demand.block_count)
            }
            assert route.stages in possible
            return
    with pytest.raises(NoRouteError) as caught:
        find_route(demand, offers, links)
    assert caught.value.missing or any(offer.parts is Parts.WHOLE for offer in offers), "they can be joined"
    served = {
        block for offer in usable(demand, offers) for block in range(offer.stage.blocks.start, offer.stage.blocks.end)
    }
    missing = {block for gap in caught.value.missing for block in range(gap.start, gap.end)}
    assert missing == set(range(demand.block_count)) - served


@given(swarms(), st.data())
def test_no_replacement_of_a_stage_is_cheaper(swarm: tuple[Demand, list[Offer], Links], data: st.DataObject) -> None:
    demand, offers, links = swarm
    try:
        stages = find_route(demand, offers, links).stages
    except NoRouteError:
        return
    lost = data.draw(st.integers(0, len(stages) - 1))
    rest = [offer for offer in usable(demand, offers) if offer.stage.peer != stages[lost].peer]
    if len(stages) == 1:
        return  # the same as a route of its own
    blocks = stages[lost].blocks
    clipped = [
        replace(offer, stage=Stage(offer.stage.peer, overlap))
        for offer in rest
        if (overlap := offer.stage.blocks.overlap(blocks)) and offer.parts.include(overlap, offer.stage.blocks)
    ]
    before, after = stages[lost - 1].peer, stages[(lost + 1) % len(stages)].peer
    to_first = return_cost_s if lost == 0 else hop_cost_s
    from_last = return_cost_s if lost == len(stages) - 1 else hop_cost_s
    for allowed in (roomy(demand, clipped), clipped):
        costs_s = {
            tuple(stage for _, stage in chain): inner_cost_s(demand, chain, links)
            + to_first(demand, links(before, chain[0][1].peer))
            + from_last(demand, links(chain[-1][1].peer, after))
            for chain in every_chain(demand, allowed, blocks.start, blocks.end)
        }
        if costs_s:
            found = find_replacement(demand, stages, lost, offers, links)
            assert costs_s[found] == pytest.approx(min(costs_s.values()))
            return
    with pytest.raises(NoRouteError) as caught:
        find_replacement(demand, stages, lost, offers, links)
    assert all(blocks.holds(gap) for gap in caught.value.missing)


@given(swarms())
def test_the_order_of_the_offers_does_not_matter(swarm: tuple[Demand, list[Offer], Links]) -> None:
    demand, offers, links = swarm
    try:
        assert find_route(demand, offers, links) == find_route(demand, offers[::-1], links)
    except NoRouteError:
        with pytest.raises(NoRouteError):
            find_route(demand, offers[::-1], links)
