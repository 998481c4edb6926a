"""Which peers a node looks for when a job needs a route."""

import random
from collections.abc import Callable

import pytest
import trio.testing

from node.capabilities.traffic import TrafficMeter
from node.identity import Identity
from node.swarm.link_estimates import LinkEstimates
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetworkHub
from protocol.announcements import Heartbeat, Reachability, ServedSpan, Verdict
from protocol.identity import BlockRange, ModelId, PeerId, Stage
from protocol.messages import Load
from selector.cuts import Cuts
from tests.support.memberships import membership_of

MODEL = ModelId("ab" * 32)


def heartbeat(peer: PeerId, host: str, blocks: BlockRange, verdict: Verdict) -> Heartbeat:
    return Heartbeat(
        peer=peer,
        sequence=1,
        issued_at_s=0,
        expires_at_s=60,
        interval_ms=1000,
        multiaddrs=(f"/ip4/{host}/tcp/4001",),
        agent="test/1",
        spans=(ServedSpan(model=MODEL, blocks=blocks, load=Load()),),
        reachability=Reachability(verdict=verdict),
    )


async def test_dials_a_server_that_makes_a_route_where_those_that_were_reached_are_apart(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    us, first, second, unreached = (Identity(bytes([number]) * 32) for number in range(4))
    network = MemoryNetworkHub(random.Random(0), LinkModel()).network(us.peer_id)
    membership = membership_of(network, us)
    directory = membership.directory
    halves = BlockRange(0, 3), BlockRange(3, 6)
    directory.update(heartbeat(first.peer_id, "8.8.8.8", halves[0], Verdict.PUBLIC), 0.0, dialled=True)
    directory.update(heartbeat(second.peer_id, "9.9.9.9", halves[1], Verdict.PRIVATE), 0.0, dialled=True)
    directory.update(heartbeat(unreached.peer_id, "7.7.7.7", halves[1], Verdict.PUBLIC), 0.0)

    assert membership.unreached_stages(MODEL, (BlockRange(4, 5),)) == (Stage(unreached.peer_id, halves[1]),)
    assert membership.unreached_stages(MODEL, (halves[0],)) == ()

    async def reach_servers(model: ModelId, is_enough: Callable[[], bool]) -> None:
        await trio.lowlevel.checkpoint()
        assert not is_enough()
        directory.on_dialled(unreached.peer_id, True)
        assert is_enough()

    monkeypatch.setattr(membership._dialler, "reach_servers", reach_servers)
    links = LinkEstimates(directory, us.peer_id, lambda _: None, lambda _: None)
    async with network.running():
        found = await membership.candidates(MODEL, Cuts(6), links.between, without=())
    assert unreached.peer_id in {candidate.stage.peer for candidate in found}


async def test_what_is_announced_of_a_link_is_what_this_node_uses_the_shortest_of_the_latest_pings(
    autojump_clock: trio.testing.MockClock,
) -> None:
    us, other = (Identity(bytes([number]) * 32) for number in range(2))
    link = LinkModel(latency_s=0.005)
    hub = MemoryNetworkHub(random.Random(0), link)
    network, neighbour = (hub.network(each.peer_id) for each in (us, other))
    traffic = TrafficMeter()
    membership = membership_of(network, us, on_round_trip=traffic.round_trip)
    async with network.running(), neighbour.running(), trio.open_nursery() as nursery:
        await network.connect(neighbour.multiaddrs[0])
        nursery.start_soon(membership._ping_loop)
        await trio.sleep(1)
        link.latency_s = 0.05
        await trio.sleep(100)
        ours_s = membership.round_trip_s(other.peer_id)
        (announced,) = traffic.links([other.peer_id]).neighbours
        nursery.cancel_scope.cancel()
    assert ours_s == pytest.approx(0.01)
    assert announced.round_trip_s == ours_s
