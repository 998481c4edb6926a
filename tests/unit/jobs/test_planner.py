"""What the links of a route add to a job, as a choice of method is told."""

from collections.abc import Iterable

import pytest

from node.jobs.planner import Planner
from node.jobs.route import Stop
from node.swarm.directory import Candidate
from protocol.identity import BlockRange, ModelId, PeerId
from selector.routing import Demand, Link

A, B, C = (PeerId(name) for name in "abc")
DEMAND = Demand(block_count=9, prompt_rows=900, new_tokens=100, row_bytes=1000)


class Nobody:
    """A finder for a route that was found already."""

    async def candidates(self, model: ModelId, block_count: int, *, without: Iterable[PeerId]) -> tuple[Candidate, ...]:
        return ()

    def forget(self, peer: PeerId) -> None: ...


def links(sender: str, receiver: str) -> Link:
    """Wide between `a` and `b`, narrow on to `c`, which is far from both."""
    return Link(0.002 if {sender, receiver} == {"a", "b"} else 0.04, 1e8 if receiver == "b" else 2e6)


def test_latency_counts_around_a_route_and_width_from_its_first_stage_to_its_last() -> None:
    planner = Planner(Nobody(), links, A)
    stops = [Stop(peer, BlockRange(3 * i, 3 * i + 3)) for i, peer in enumerate((A, B, C))]
    assert planner.round_s(stops) == pytest.approx((0.002 + 0.04 + 0.04) / 2)
    assert planner.transfer_s(stops, DEMAND) == pytest.approx(1e6 / 1e8 + 1e6 / 2e6)
    assert planner.transfer_s(stops[:1], DEMAND) == 0.0
