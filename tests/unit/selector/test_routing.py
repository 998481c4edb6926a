"""What a user would expect of a route; `tests/property/test_routing.py` compares with every route there is."""

from dataclasses import replace
from typing import Any

import pytest

from protocol.identity import BlockRange, PeerId, Stage
from selector.cuts import Parts
from selector.routing import MAX_OFFERS, Demand, Link, NoRouteError, Offer, find_replacement, find_route

DEMAND = Demand(block_count=12, prompt_rows=20, new_tokens=100, row_bytes=2304)
NEAR, FAR = Link(0.001, 1e9), Link(0.08, 1e7)


def stage(start: int, end: int, peer: str) -> Stage:
    return Stage(PeerId(peer), BlockRange(start, end))


def offer(start: int, end: int, peer: str, block_s: float, **costs: Any) -> Offer:
    return Offer(stage(start, end, peer), block_s, **costs)


def near(_a: str, _b: str) -> Link:
    return NEAR


def far_between_cities(a: str, b: str) -> Link:
    """Peers are named after their city and a number."""
    return NEAR if a[:-1] == b[:-1] else FAR


def peers_of(stages: tuple[Stage, ...]) -> list[str]:
    return [stage.peer for stage in stages]


def test_peer_with_the_whole_model_serves_alone_unless_much_slower() -> None:
    parts = [offer(0, 6, "left", 0.001), offer(6, 12, "right", 0.001)]
    assert peers_of(find_route(DEMAND, [*parts, offer(0, 12, "whole", 0.001)], near).stages) == ["whole"]
    assert peers_of(find_route(DEMAND, [*parts, offer(0, 12, "whole", 0.01)], near).stages) == ["left", "right"]


def test_link_latency_outweighs_faster_stages() -> None:
    offers = [offer(0, 6, "rome1", 0.001), offer(6, 12, "oslo1", 0.001), offer(6, 12, "rome2", 0.003)]
    assert peers_of(find_route(DEMAND, offers, near).stages) == ["rome1", "oslo1"]
    assert peers_of(find_route(DEMAND, offers, far_between_cities).stages) == ["rome1", "rome2"]


def test_the_way_back_from_the_last_stage_to_the_first_counts() -> None:
    links = {("a", "b"): NEAR, ("b", "a"): FAR, ("a", "c"): Link(0.01, 1e9), ("c", "a"): Link(0.01, 1e9)}
    offers = [offer(0, 6, "a", 0.001), offer(6, 12, "b", 0.001), offer(6, 12, "c", 0.001)]
    assert peers_of(find_route(DEMAND, offers, lambda x, y: links.get((x, y), FAR)).stages) == ["a", "c"]


def test_overlapping_spans_are_cut_where_it_is_best() -> None:
    fast, slow = offer(0, 8, "fast", 0.001), offer(4, 12, "slow", 0.005)
    assert find_route(DEMAND, [fast, slow], near).stages == (stage(0, 8, "fast"), stage(8, 12, "slow"))
    with pytest.raises(NoRouteError) as caught:
        find_route(DEMAND, [replace(fast, parts=Parts.WHOLE), replace(slow, parts=Parts.WHOLE)], near)
    assert caught.value.missing == ()


def test_span_that_runs_from_its_start_only_is_left_where_the_next_begins() -> None:
    fast, slow = (
        replace(each, parts=Parts.PREFIX) for each in (offer(0, 8, "fast", 0.001), offer(4, 12, "slow", 0.005))
    )
    assert find_route(DEMAND, [fast, slow], near).stages == (stage(0, 4, "fast"), stage(4, 12, "slow"))
    stages = (stage(0, 4, "a"), stage(4, 12, "b"))
    ends_later, begins_before = replace(fast, stage=stage(4, 12, "c")), replace(fast, stage=stage(2, 12, "d"))
    assert find_replacement(DEMAND, stages, 1, [ends_later], near) == (stage(4, 12, "c"),)
    with pytest.raises(NoRouteError):
        find_replacement(DEMAND, stages, 1, [begins_before], near)


def test_full_peer_is_used_only_without_alternative() -> None:
    full = offer(0, 12, "full", 0.001, free_positions=119)
    roomy = offer(0, 12, "roomy", 0.01, free_positions=120)
    assert peers_of(find_route(DEMAND, [full, roomy], near).stages) == ["roomy"]
    assert peers_of(find_route(DEMAND, [full], near).stages) == ["full"]


def test_busy_or_unreliable_peer_must_be_much_faster() -> None:
    plain = offer(0, 12, "plain", 0.002)
    assert peers_of(find_route(DEMAND, [plain, offer(0, 12, "busy", 0.001, step_s=0.02)], near).stages) == ["plain"]
    assert peers_of(find_route(DEMAND, [plain, offer(0, 12, "shady", 0.001, trust=0.4)], near).stages) == ["plain"]


def test_spans_are_joined_only_where_the_model_may_be_cut() -> None:
    demand = replace(DEMAND, granularity=4)
    fast, slow = offer(0, 8, "fast", 0.005), offer(4, 12, "slow", 0.001)
    assert find_route(demand, [fast, slow], near).stages == (stage(0, 4, "fast"), stage(4, 12, "slow"))
    with pytest.raises(NoRouteError) as caught:  # cut elsewhere, they calculate another model
        find_route(demand, [fast, offer(6, 12, "elsewhere", 0.001)], near)
    assert caught.value.missing == (BlockRange(8, 12),)


def test_replacement_is_several_stages_or_part_of_a_longer_span() -> None:
    stages = (stage(0, 4, "a"), stage(4, 8, "b"), stage(8, 12, "c"))
    own = [offer(0, 4, "a", 0.001), offer(4, 8, "b", 0.001), offer(8, 12, "c", 0.001)]
    halves = [offer(4, 6, "d", 0.001), offer(6, 8, "e", 0.001)]
    assert find_replacement(DEMAND, stages, 1, [*own, *halves], near) == (stage(4, 6, "d"), stage(6, 8, "e"))
    longer = offer(2, 10, "f", 0.001)
    assert find_replacement(DEMAND, stages, 1, [*own, *halves, longer], near) == (stage(4, 8, "f"),)
    with pytest.raises(NoRouteError) as caught:
        find_replacement(DEMAND, stages, 1, [*own, halves[0]], near)
    assert caught.value.missing == (BlockRange(6, 8),)


def test_large_swarm_is_searched_among_its_fastest_peers() -> None:
    offers = [offer(3 * part, 3 * part + 3, f"{part}-{n:03}", 0.001 * (n + 1)) for part in range(4) for n in range(200)]
    assert len(offers) > MAX_OFFERS
    assert peers_of(find_route(DEMAND, offers, near).stages) == ["0-000", "1-000", "2-000", "3-000"]


def test_uncovered_blocks_are_named() -> None:
    with pytest.raises(NoRouteError) as caught:
        find_route(DEMAND, [offer(0, 3, "a", 0.001), offer(5, 20, "beyond", 0.001)], near)
    assert caught.value.missing == (BlockRange(3, 12),)
