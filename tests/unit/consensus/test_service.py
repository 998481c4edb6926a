"""The consensus of several models over one set of neighbours."""

import random
from types import SimpleNamespace
from typing import Any, cast

import trio
from trio.testing import MockClock

from node.consensus.environment import ConsensusRules
from node.consensus.followed_chains import FollowedChains
from node.consensus.service import ConsensusService
from node.identity import Identity
from node.replication.session import SessionOutcome
from node.testing.memory_network import MemoryNetworkHub
from node.util.signal import Signal
from protocol.consensus import verify_message
from protocol.identity import PeerId
from selector.consensus.clock import EpochClock
from selector.consensus.sortition import MeasurementPlan

EPOCH_S = 600.0
SESSION_S = 3.0


class OneNeighbour:
    """A pull service with a single neighbour, with which one session at a time is possible."""

    def __init__(self) -> None:
        self.pulling = 0
        self.began_s: list[float] = []

    def choose_neighbour(self) -> PeerId | None:
        return None if self.pulling else PeerId("neighbour")

    async def pull(self, peer: PeerId, initiate: object) -> SessionOutcome:
        self.began_s.append(trio.current_time())
        self.pulling += 1
        await trio.sleep(SESSION_S)
        self.pulling -= 1
        return SessionOutcome(equal=True)


async def test_chain_waits_for_a_neighbour_that_is_busy_with_another_chain(autojump_clock: MockClock) -> None:
    network = MemoryNetworkHub(random.Random(0)).network(Identity(bytes(32)).peer_id)
    rules = ConsensusRules(swarm=b"", plan=MeasurementPlan((), ()), clock=EpochClock(EPOCH_S))
    environment = SimpleNamespace(verify=verify_message)
    service: Any = ConsensusService(network, FollowedChains(), cast("Any", environment), rules, random.Random(0))
    service._pull = OneNeighbour()
    with trio.move_on_after(EPOCH_S / 40):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(service._pull_loop, SimpleNamespace(needs_sync=Signal()))
    assert len(service._pull.began_s) == 4
