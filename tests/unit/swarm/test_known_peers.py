"""How a node that lost its peers comes back, though no bootstrap peer is there any more."""

import random
import sqlite3
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import trio
import trio.testing

from node.identity import Identity
from node.network.interface import Stream
from node.storage.database import StorageError
from node.storage.peers import KnownPeer, KnownPeerStore
from node.swarm.known_peers import BACKOFF_S, REDIALLED, maintain_known_peers
from node.swarm.membership import Membership
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetwork, MemoryNetworkHub
from protocol.identity import PeerId
from protocol.presence import PROTOCOL_ID
from tests.support.memberships import membership_of

IDENTITIES = tuple(Identity(bytes([number]) * 32) for number in range(3))


class MemoryStore(KnownPeerStore):
    """Known peers in memory; a disk that fails `failures` times first."""

    def __init__(self, known: Iterable[KnownPeer] = (), failures: int = 0) -> None:
        self.known = {each.peer: each for each in known}
        self._failures = failures

    async def latest(self, limit: int) -> tuple[KnownPeer, ...]:
        await trio.lowlevel.checkpoint()
        if self._failures:
            self._failures -= 1
            raise StorageError("the disk fails") from sqlite3.OperationalError()
        return tuple(self.known.values())[:limit]

    async def put(self, peers: Iterable[KnownPeer]) -> None:
        await trio.lowlevel.checkpoint()
        self.known |= {each.peer: each for each in peers}


def networks() -> tuple[MemoryNetworkHub, list[MemoryNetwork]]:
    hub = MemoryNetworkHub(random.Random(0), LinkModel(latency_s=0.01))
    return hub, [hub.network(each.peer_id) for each in IDENTITIES]


def known(network: MemoryNetwork) -> KnownPeer:
    return KnownPeer(network.peer_id, (network.address.of(network.peer_id),), 0)


def membership(network: MemoryNetwork, identity: Identity, bootstrap: Iterable[str] = ()) -> Membership:
    return membership_of(network, identity, bootstrap=bootstrap, wall_clock=trio.current_time)


async def until(condition: Callable[[], object], limit_s: float) -> None:
    with trio.fail_after(limit_s):
        while not condition():
            await trio.sleep(1)


async def test_peers_find_each_other_after_an_outage_without_their_bootstrap_peer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    hub, (bootstrap, *others) = networks()
    stores = [MemoryStore(), MemoryStore()]
    one, two = others
    found = False

    async def serve_until_killed() -> None:
        async with bootstrap.running():
            await membership(bootstrap, IDENTITIES[0]).run()

    async with one.running(), two.running(), trio.open_nursery() as nursery:
        nursery.start_soon(serve_until_killed)
        first = (bootstrap.address.of(bootstrap.peer_id),)
        parts = [membership(network, each, first) for network, each in zip(others, IDENTITIES[1:], strict=True)]
        for part, network, store in zip(parts, others, stores, strict=True):
            nursery.start_soon(part.run)
            nursery.start_soon(maintain_known_peers, network, store, random.Random(0))
        await until(lambda: one.peer_id in stores[1].known and two.peer_id in stores[0].known, 2 * BACKOFF_S[1])

        hub.kill(bootstrap.peer_id)
        hub.partition([[one.peer_id], [two.peer_id]])
        await trio.sleep(900)
        assert not one.connected_peers()
        hub.heal()
        await until(lambda: one.connected_peers() == (two.peer_id,), 2 * BACKOFF_S[1])
        await until(lambda: all(len(part.directory.entries()) == 2 for part in parts), 60)
        found = True
        nursery.cancel_scope.cancel()
    assert found  # a network that is killed cancels what runs inside it


async def test_node_that_starts_without_a_network_joins_once_it_has_one(autojump_clock: trio.testing.MockClock) -> None:
    hub, (peer, node, _) = networks()
    store = MemoryStore([known(peer)], failures=1)
    async with peer.running(), node.running(), trio.open_nursery() as nursery:
        hub.partition([[peer.peer_id], [node.peer_id]])
        nursery.start_soon(maintain_known_peers, node, store, random.Random(0))
        await trio.sleep(600)
        assert not node.connected_peers()
        hub.heal()
        await until(node.connected_peers, 2 * BACKOFF_S[1])
        nursery.cancel_scope.cancel()


async def test_few_dials_are_made_to_known_peers_that_are_gone(autojump_clock: trio.testing.MockClock) -> None:
    _, (node, *gone) = networks()
    dialled: list[PeerId] = []
    connect = node.connect

    async def count(multiaddr: str) -> PeerId:
        dialled.append(PeerId(multiaddr.rpartition("/")[2]))
        return await connect(multiaddr)

    cast("Any", node).connect = count
    async with node.running(), trio.open_nursery() as nursery:
        nursery.start_soon(maintain_known_peers, node, MemoryStore(map(known, gone)), random.Random(0))
        await trio.sleep(3600)
        nursery.cancel_scope.cancel()
    assert set(dialled) == {each.peer_id for each in gone}
    assert 100 < len(dialled) < 200
    assert len(gone) < REDIALLED


async def test_peer_that_hangs_up_at_once_is_not_dialled_more_often(autojump_clock: trio.testing.MockClock) -> None:
    _, (peer, node, _) = networks()
    dials = 0
    connect = node.connect

    async def count(multiaddr: str) -> PeerId:
        nonlocal dials
        dials += 1
        return await connect(multiaddr)

    cast("Any", node).connect = count
    async with peer.running(), node.running(), trio.open_nursery() as nursery:
        nursery.start_soon(maintain_known_peers, node, MemoryStore([known(peer)]), random.Random(0))
        for _ in range(900):
            await trio.sleep(4)
            await node.disconnect(peer.peer_id)
        nursery.cancel_scope.cancel()
    assert 50 < dials < 150


async def test_node_asks_who_is_present_again_after_it_lost_all_connections(
    autojump_clock: trio.testing.MockClock,
) -> None:
    _, (node, peer, _) = networks()
    asked = 0

    async def answer(stream: Stream) -> None:
        nonlocal asked
        asked += 1

    peer.set_stream_handler(PROTOCOL_ID, answer)
    async with node.running(), peer.running(), trio.open_nursery() as nursery:
        nursery.start_soon(membership(node, IDENTITIES[0]).run)
        for count in range(1, 30):
            await trio.sleep(1)
            await node.connect(peer.multiaddrs[0])
            await until(partial(lambda wanted: asked == wanted, count), 10)
            await node.disconnect(peer.peer_id)
        nursery.cancel_scope.cancel()
