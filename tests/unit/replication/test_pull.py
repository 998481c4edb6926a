"""Sessions with neighbours: choice, slots, backoff and bans."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio
from trio.testing import MockClock

from node.network.interface import NetworkError, Stream
from node.replication.anti_entropy import SyncInitiator, SyncResponder
from node.replication.observations import PEER_ALLOWANCES
from node.replication.peer_limits import PeerLimits
from node.replication.pull import BUSY_S, PullLimits, PullService
from node.replication.session import Throttle
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetworkHub
from protocol.errors import RemoteProtocolError
from protocol.sync import PROTOCOL_ID
from tests.support.sync_sessions import OURS, THEIRS, Peer, made

Initiate = Callable[[Stream, Throttle], SyncInitiator]


@asynccontextmanager
async def neighbours(limits: PullLimits) -> AsyncIterator[tuple[PullService, PeerLimits, Initiate, Peer]]:
    """Run two connected services; yield ours, its peer limits, what begins a session, and our history."""
    hub = MemoryNetworkHub(random.Random(0), LinkModel(latency_s=0.01))
    networks = [hub.network(OURS), hub.network(THEIRS)]
    peers = [Peer(), Peer([made(1), made(2)])]
    peer_limits = [PeerLimits(PEER_ALLOWANCES) for _ in networks]
    services = [
        PullService(
            network, PROTOCOL_ID, limit, limits, random.Random(0), respond=partial(SyncResponder, replica=peer.replica)
        )
        for network, limit, peer in zip(networks, peer_limits, peers, strict=True)
    ]
    await peers[1].history.add_many(peers[1].initial)
    async with networks[0].running(), networks[1].running():
        await networks[0].connect(networks[1].multiaddrs[0])
        initiate = partial(SyncInitiator, replica=peers[0].replica, jitter=random.Random(0))
        yield services[0], peer_limits[0], initiate, peers[0]


async def test_session_with_a_neighbour_makes_histories_equal(autojump_clock: MockClock) -> None:
    async with neighbours(PullLimits()) as (service, _, initiate, ours):
        assert service.choose_neighbour() == THEIRS
        outcome = await service.pull(THEIRS, initiate)
        assert outcome.equal
        assert ours.ids == {made(1).id, made(2).id}
        assert service.choose_neighbour() == THEIRS


async def test_busy_neighbour_is_retried_after_the_requested_pause(autojump_clock: MockClock) -> None:
    async with neighbours(PullLimits(served_sessions=0)) as (service, _, initiate, ours):
        outcome = await service.pull(THEIRS, initiate)
        assert outcome.retry_s == BUSY_S
        assert not ours.ids
        assert service.choose_neighbour() is None
        await trio.sleep(2 * BUSY_S)
        assert service.choose_neighbour() == THEIRS


async def test_failed_session_backs_off(autojump_clock: MockClock) -> None:
    def fail(stream: Stream, throttle: Throttle) -> SyncInitiator:
        raise NetworkError("broken")

    async with neighbours(PullLimits()) as (service, limits, _, _):
        await service.pull(THEIRS, fail)
        assert service.choose_neighbour() is None
        assert limits.of(THEIRS, trio.current_time()).retry_at_s > trio.current_time() + 1
        assert not limits.bans(trio.current_time())


async def test_protocol_violation_bans_the_neighbour(autojump_clock: MockClock) -> None:
    def cheat(stream: Stream, throttle: Throttle) -> SyncInitiator:
        raise RemoteProtocolError("cheated")

    async with neighbours(PullLimits()) as (service, limits, _, _):
        await service.pull(THEIRS, cheat)
        assert limits.bans(trio.current_time())[THEIRS].reason == "cheated"
        assert service.choose_neighbour() is None
