"""Who is here, in a swarm too large for everybody to speak every few seconds."""

import pytest
import trio

from node.swarm.heartbeats import heartbeat_interval_s
from node.testing.memory_links import LinkModel
from tests.simulation import virtual_time
from tests.simulation.swarm import SimulatedPeer, Swarm, signatures_verified_once

PEERS = 24


def known_to(peer: SimulatedPeer) -> int:
    assert peer.membership is not None
    return len(peer.membership.directory.entries())


async def until_known(peer: SimulatedPeer, count: int, within_s: float) -> float:
    began_s = trio.current_time()
    with trio.fail_after(within_s):
        while known_to(peer) != count:
            await trio.sleep(0.1)
    return trio.current_time() - began_s


def test_presence_query_and_expiry_with_rare_heartbeats() -> None:
    async def program() -> None:
        swarm = Swarm(seed=1, link=LinkModel(latency_s=0.03, jitter_s=0.02, loss=0.1))
        async with swarm.running(PEERS):
            await trio.sleep(20)
            newcomer = await swarm.join()
            assert await until_known(newcomer, PEERS + 1, within_s=20) < heartbeat_interval_s(PEERS) / 2
            swarm.kill(swarm.peers[PEERS - 1])
            await trio.sleep(5 * heartbeat_interval_s(PEERS))
            assert [known_to(peer) for peer in swarm.live()] == [PEERS] * PEERS

    with signatures_verified_once():
        virtual_time.run(program, seed=1)


@pytest.mark.parametrize(("peers", "interval_s"), [(1, 2.5), (10, 2.5), (300, 75.0), (10_000, 300.0)])
def test_heartbeat_interval_grows_with_the_swarm(peers: int, interval_s: float) -> None:
    assert heartbeat_interval_s(peers) == interval_s
