"""The addresses of a node, of which every dial asks."""

from collections.abc import Iterator
from types import SimpleNamespace
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


def test_bridges_to_containers_and_virtual_machines_are_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    bridges = ["docker0", "docker_gwbridge", "br-0123456789ab", "nerdctl0", "incusbr0", "cilium_host", "weave"]
    names = [*bridges, "vmnet8", "vboxnet0", "eth0"]
    found = {name: [SimpleNamespace(address=f"172.16.{number}.1")] for number, name in enumerate(names)}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    addresses._interface_addresses.cache_clear()
    own = OwnAddresses()
    own.listening = lambda: (Multiaddr("/ip4/0.0.0.0/tcp/4001"),)
    assert [each.host for each in own.advertised()] == [f"172.16.{len(names) - 1}.1"]
    addresses._interface_addresses.cache_clear()


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
