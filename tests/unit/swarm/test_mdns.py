"""What is said on the local network, and what is made of what others say there."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import trio
import trio.testing
from zeroconf import NotRunningException, ServiceInfo, ServiceStateChange

from node.swarm import mdns
from node.swarm.mdns import REFRESH_S, addresses_in, find_neighbours, interfaces_of, service_type
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetworkHub
from protocol.identity import PeerId

PEER = "12D3KooWM4xHiz2GDU4ebDMhPcxVNBm7kzyPWh7w4Y7b9rARdaL8"


def test_private_swarm_has_its_own_valid_service_name() -> None:
    kinds = {service_type(None), service_type("a" * 64), service_type("b" * 64)}
    assert len(kinds) == 3
    for kind in kinds:
        name, udp, domain = kind.split(".")[:3]
        assert (udp, domain) == ("_udp", "local")
        assert len(name.removeprefix("_")) <= 15
        assert "aaaa" not in name


def test_service_is_registered_on_dialable_interfaces_only() -> None:
    here = [f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}", f"/ip6/fe80::1/tcp/4001/p2p/{PEER}"]
    own = {"127.0.0.1", "fe80::1", "192.0.2.7"}
    assert interfaces_of(here, own) == {"127.0.0.1"}
    assert interfaces_of([*here, f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}"], own) == {"127.0.0.1", "192.0.2.7"}


def test_service_is_not_registered_on_forwarded_addresses_nor_on_those_of_relays() -> None:
    forwarded = f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER}"
    named = f"/dns4/example.org/tcp/4001/p2p/{PEER}"
    circuit = f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}/p2p-circuit/p2p/{PEER}"
    assert interfaces_of([forwarded, named, circuit], {"192.0.2.7"}) == set()


def test_txt_record_yields_a_bounded_number_of_peer_addresses() -> None:
    address = f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}".encode()
    assert addresses_in({b"dnsaddr": address, b"dnsaddr1": None, b"other": address, b"dnsaddr2": b"\xff"}) == [
        address.decode()
    ]
    assert len(addresses_in({f"dnsaddr{number}".encode(): address for number in range(1000)})) == 16


async def test_service_of_another_kind_does_not_end_discovery(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody on the network may answer for our service with such a name; zeroconf raises when asked to resolve it."""
    kind = service_type(None)
    hostile, honest = "evil._http._tcp.local.", f"honest.{kind}"
    resolved = trio.Event()

    class FakeZeroconf:
        def __init__(self, **_: Any) -> None:
            self.token: trio.lowlevel.TrioToken = token

        def register_service(self, _: ServiceInfo) -> None: ...

        def close(self) -> None: ...

        def get_service_info(self, kind: str, name: str, timeout: float) -> None:
            assert timeout
            ServiceInfo(kind, name)  # as the real one does first
            if name == failing:
                raise NotRunningException
            self.token.run_sync_soon(resolved.set)

    def browse(zeroconf: FakeZeroconf, kind: str, handlers: Sequence[Callable[..., None]]) -> None:
        for name in (hostile, failing, honest):
            handlers[0](zeroconf, kind, name, ServiceStateChange.Added)

    failing = f"failing.{kind}"
    token = trio.lowlevel.current_trio_token()
    monkeypatch.setattr(mdns, "interfaces_of", lambda *_: {"192.0.2.7"})
    monkeypatch.setattr(mdns, "Zeroconf", FakeZeroconf)
    monkeypatch.setattr(mdns, "ServiceBrowser", browse)
    network = MemoryNetworkHub(random.Random(0), LinkModel()).network(PeerId(PEER))
    async with network.running(), trio.open_nursery() as nursery:
        nursery.start_soon(find_neighbours, network, None)
        with trio.fail_after(10):
            await resolved.wait()
        nursery.cancel_scope.cancel()


async def test_discovery_follows_the_machine_to_other_networks(
    monkeypatch: pytest.MonkeyPatch, virtual_clock: trio.testing.MockClock
) -> None:
    here: set[str] = set()
    log: list[str] = []

    class FakeZeroconf:
        def __init__(self, interfaces: list[str]) -> None:
            self.interfaces = ",".join(interfaces)
            if "192.0.2.99" in interfaces:
                raise OSError(19, "No such device")

        def register_service(self, service: ServiceInfo) -> None:
            log.append(f"on {self.interfaces}, at {','.join(service.parsed_addresses())}")

        def close(self) -> None:
            log.append(f"off {self.interfaces}")

    monkeypatch.setattr(mdns, "interfaces_of", lambda *_: set(here))
    monkeypatch.setattr(mdns, "Zeroconf", FakeZeroconf)
    monkeypatch.setattr(mdns, "ServiceBrowser", lambda *_, **__: None)
    network = MemoryNetworkHub(random.Random(0), LinkModel()).network(PeerId(PEER))
    async with network.running(), trio.open_nursery() as nursery:
        nursery.start_soon(find_neighbours, network, None)
        await trio.sleep(5 * REFRESH_S)
        assert log == [], "it started before its network was up"
        for hosts in ({"192.0.2.7"}, {"192.0.2.99"}, {"198.51.100.7"}):
            here.clear()
            here.update(hosts)
            await trio.sleep(3 * REFRESH_S)
        nursery.cancel_scope.cancel()
    assert log == [
        "on 192.0.2.7, at 192.0.2.7",
        "off 192.0.2.7",
        "on 198.51.100.7, at 198.51.100.7",
        "off 198.51.100.7",
    ]
