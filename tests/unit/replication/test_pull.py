"""Sessions with neighbours: choice, slots, backoff and bans."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import cast

import trio
from trio.testing import MockClock

from node.network.interface import NetworkError, Stream
from node.replication.anti_entropy import SyncInitiator, SyncResponder
from node.replication.observations import PEER_ALLOWANCES
from node.replication.peer_limits import PeerLimits
from node.replication.pull import BUSY_S, SESSIONS_PER_PEER, SILENCE_COST, PullLimits, PullService
from node.replication.session import PATIENCE_S, SessionOutcome, Throttle
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetwork, MemoryNetworkHub
from protocol.errors import RemoteProtocolError
from protocol.identity import PeerId
from protocol.sync import PROTOCOL_ID
from tests.support.observations import peer
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
            network, PROTOCOL_ID, limit, limits, random.Random(0), respond=partial(SyncResponder, replica=each.replica)
        )
        for network, limit, each in zip(networks, peer_limits, peers, strict=True)
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


@asynccontextmanager
async def server_of(limits: PullLimits, *clients: PeerId, slow_s: float = 0.0) -> AsyncIterator[list[MemoryNetwork]]:
    """Run a service that has something to tell, and peers that are connected to it; yield their networks.

    `slow_s`: how long a peer takes to take what it is sent.
    """
    hub = MemoryNetworkHub(random.Random(0), LinkModel(latency_s=0.01))
    server, *others = (hub.network(peer) for peer in (THEIRS, *clients))
    history = Peer([made(1), made(2)])
    await history.history.add_many(history.initial)

    def respond(stream: Stream, throttle: Throttle) -> SyncResponder:
        return SyncResponder(cast("Stream", SlowlyTaken(stream, slow_s)), throttle, history.replica)

    PullService(server, PROTOCOL_ID, PeerLimits(PEER_ALLOWANCES), limits, random.Random(0), respond=respond)
    async with AsyncExitStack() as stack:
        for network in (server, *others):
            await stack.enter_async_context(network.running())
        for network in others:
            await network.connect(server.multiaddrs[0])
        yield others


async def pull_with(network: MemoryNetwork) -> SessionOutcome:
    ours = Peer()
    limits = PeerLimits(PEER_ALLOWANCES)
    respond = partial(SyncResponder, replica=ours.replica)
    service = PullService(network, PROTOCOL_ID, limits, PullLimits(), random.Random(0), respond=respond)
    return await service.pull(THEIRS, partial(SyncInitiator, replica=ours.replica, jitter=random.Random(0)))


async def test_silent_peer_does_not_keep_others_out(autojump_clock: MockClock) -> None:
    async with server_of(PullLimits(), OURS, peer(3)) as (honest, silent):

        async def open_and_say_nothing() -> None:
            while True:
                with suppress(NetworkError):
                    stream = await silent.open_stream(THEIRS, PROTOCOL_ID)
                    while await stream.receive_some():
                        pass
                await trio.sleep(0.2)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(open_and_say_nothing)
            for _ in range(20):
                await trio.sleep(3)
                assert (await pull_with(honest)).equal
            nursery.cancel_scope.cancel()


async def test_silent_sessions_of_many_peers_make_room(autojump_clock: MockClock) -> None:
    many = [peer(number) for number in range(3, 11)]
    async with server_of(PullLimits(served_sessions=len(many)), OURS, *many) as (honest, *silent):
        streams = [await each.open_stream(THEIRS, PROTOCOL_ID) for each in silent]
        assert (await pull_with(honest)).retry_s == BUSY_S
        await trio.sleep(PATIENCE_S)
        assert (await pull_with(honest)).equal
        ended = 0
        for stream in streams:
            with trio.move_on_after(1):
                assert await stream.receive_some() == b""
                ended += 1
        assert ended == 1, "no more than the one that was in the way"


async def test_silence_costs_a_peer_its_next_sessions(autojump_clock: MockClock) -> None:
    async with server_of(PullLimits(), OURS) as (silent,):
        for _ in range(SESSIONS_PER_PEER):
            stream = await silent.open_stream(THEIRS, PROTOCOL_ID)
        assert (await pull_with(silent)).retry_s == BUSY_S, "it has all of its places"
        assert await stream.receive_some() == b""
        assert (await pull_with(silent)).retry_s == BUSY_S
        await trio.sleep(SESSIONS_PER_PEER * SILENCE_COST / PEER_ALLOWANCES.sessions.per_s)
        assert (await pull_with(silent)).equal


class SlowlyTaken:
    """A stream whose peer takes what is sent in some seconds."""

    def __init__(self, stream: Stream, slow_s: float) -> None:
        self._stream = stream
        self._slow_s = slow_s

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    async def send_all(self, data: bytes) -> None:
        await trio.sleep(self._slow_s)
        await self._stream.send_all(data)


async def test_peers_that_take_slowly_keep_their_places(autojump_clock: MockClock) -> None:
    """As on an uplink that all sessions share: there a window of what is sent takes longer than the patience."""
    many = [peer(number) for number in range(3, 5)]
    slow_s = 4 * PATIENCE_S
    equal: dict[PeerId, bool] = {}

    async def pull(network: MemoryNetwork) -> None:
        equal[network.peer_id] = (await pull_with(network)).equal

    async with (
        server_of(PullLimits(served_sessions=len(many)), OURS, *many, slow_s=slow_s) as (newcomer, *slow),
        trio.open_nursery() as nursery,
    ):
        for each in slow:
            nursery.start_soon(pull, each)
        await trio.sleep(0.8 * slow_s)
        nursery.start_soon(pull, newcomer)
    assert equal == {OURS: False, **dict.fromkeys(many, True)}
