"""The addresses of a node, of which every dial asks."""

from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from node.network import addresses
from node.network.addresses import parse_address
from node.network.guarded_swarm import GuardedSwarm
from node.network.host import Libp2pNetwork
from node.network.own_addresses import OwnAddresses
from protocol.identity import peer_id_from_public_key

from .conftest import limited


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """Record each time that the system is asked for its interfaces."""
    found: list[None] = []
    ask = psutil.net_if_addrs

    def counted() -> Any:
        found.append(None)
        return ask()

    monkeypatch.setattr(psutil, "net_if_addrs", counted)
    addresses._interface_addresses.cache_clear()
    yield found
    addresses._interface_addresses.cache_clear()


def test_interfaces_are_asked_for_once_for_many_questions(asked: list[None]) -> None:
    own = OwnAddresses()
    own.listening = lambda: (Multiaddr("/ip4/0.0.0.0/tcp/4001"), Multiaddr("/ip6/::/tcp/4001"))
    for _ in range(10):
        assert "/ip4/127.0.0.1/tcp/4001" in own.transports()
        assert own.advertised()
    assert len(asked) == 1


async def test_dial_asks_for_our_own_addresses_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, peer = Libp2pNetwork(bytes(32), listen=["/ip4/127.0.0.1/tcp/0"]), peer_id_from_public_key(bytes([7] * 32))
    with limited(20):
        async with network.running():
            swarm = network._swarm
            assert isinstance(swarm, GuardedSwarm)
            own, asked = swarm.own_transports(), 0

            def transports() -> set[str]:
                nonlocal asked
                asked += 1
                return own

            monkeypatch.setattr(swarm, "own_transports", transports)
            assert swarm.is_own(parse_address(network.multiaddrs[0]))
            asked = 0
            peer_id = ID.from_base58(peer)
            other = [Multiaddr(f"/ip4/127.0.0.1/tcp/{port}") for port in (1, 2, 3)]
            swarm.peerstore.add_addrs(peer_id, [*other, Multiaddr(network.multiaddrs[0].rpartition("/p2p/")[0])], 60)
            assert swarm._dialable(peer_id) == other
            assert asked == 1
