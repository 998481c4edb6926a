"""Presence queries: whom a newcomer asks who is alive, and how often this node answers."""

import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import pytest
import trio
import trio.testing

from node.identity import Identity
from node.network.interface import NetworkError, Stream
from node.swarm.directory import Directory
from node.swarm.heartbeats import NEIGHBOURS_QUERIED
from node.swarm.presence import ANSWERS_PER_PEER, PresenceServer, query_presence
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetworkHub
from protocol.announcements import Heartbeat
from protocol.presence import PROTOCOL_ID, encode_present
from protocol.records import seal
from tests.support.memberships import heartbeat_of, membership_of

IDENTITIES = tuple(Identity(bytes([number]) * 32) for number in range(9))


def heartbeat(identity: Identity) -> tuple[Heartbeat, bytes]:
    made = heartbeat_of(identity.peer_id)
    return made, seal(made, identity.private_key)


async def test_peer_that_asks_too_often_is_refused_and_others_are_answered(
    autojump_clock: trio.testing.MockClock,
) -> None:
    hub = MemoryNetworkHub(random.Random(0), LinkModel())
    server, greedy, honest = (hub.network(each.peer_id) for each in IDENTITIES[:3])
    directory = Directory(own_peer=server.peer_id)
    record, envelope = heartbeat(IDENTITIES[3])
    directory.update(record, 0.0, envelope, dialled=True)
    server.set_stream_handler(PROTOCOL_ID, PresenceServer(directory).handle)
    async with server.running(), greedy.running(), honest.running():
        for network in (greedy, honest):
            await network.connect(server.multiaddrs[0])
        for _ in range(int(ANSWERS_PER_PEER.burst)):
            assert await query_presence(greedy, server.peer_id, lambda _: True) == 1
        for _ in range(100):
            with pytest.raises(NetworkError):
                await query_presence(greedy, server.peer_id, lambda _: True)
        assert await query_presence(honest, server.peer_id, lambda _: True) == 1


async def test_refused_query_is_no_answer(autojump_clock: trio.testing.MockClock) -> None:
    hub = MemoryNetworkHub(random.Random(0), LinkModel())
    newcomer, *servers = (hub.network(each.peer_id) for each in IDENTITIES)
    asked: list[int] = []

    def handler(number: int) -> Callable[[Stream], Awaitable[None]]:
        async def handle(stream: Stream) -> None:
            asked.append(number)
            if number == 0:
                await stream.reset()
            elif number > 1:  # 1 ends the stream, as nodes of before do
                for frame in encode_present([heartbeat(IDENTITIES[8])[1]]):
                    await stream.send_all(frame)

        return handle

    membership = membership_of(newcomer, IDENTITIES[0], wall_clock=trio.current_time)
    async with newcomer.running(), trio.open_nursery() as nursery:
        nursery.start_soon(membership.run)
        for number, server in enumerate(servers):
            server.set_stream_handler(PROTOCOL_ID, handler(number))
            nursery.start_soon(_run, server.running)
            await trio.sleep(0.1)
            await newcomer.connect(server.multiaddrs[0])
            await trio.sleep(5)
        nursery.cancel_scope.cancel()
    assert asked == list(range(2 + NEIGHBOURS_QUERIED))


async def _run(running: Callable[[], AbstractAsyncContextManager[None]]) -> None:
    async with running():
        await trio.sleep_forever()
