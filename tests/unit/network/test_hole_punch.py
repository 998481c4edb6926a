"""Whom a peer's message may have this node dial, and how often."""

from collections.abc import Iterable
from contextlib import suppress
from types import SimpleNamespace
from typing import cast

import pytest
import trio.testing
from libp2p.peer.id import ID
from libp2p.transport.exceptions import OpenConnectionError
from multiaddr import Multiaddr

from node.network.addresses import TcpAddress, is_private, parse_address
from node.network.dial_rate_limit import IN_ALL, MAX_ADDRESSES, PER_RANGE, DialRateLimit
from node.network.guarded_host import GuardedHost
from node.network.guarded_swarm import GuardedSwarm
from node.network.hole_punch import REFUSED_DIALS, TRIES, HolePuncher, Rationed, Refusals, punch_targets
from node.network.host import Libp2pNetwork
from node.network.relay_messages import HolePunch
from node.network.transport import Tcp
from node.network.yamux import Yamux

OWN = "/ip4/8.8.4.4/tcp/4001"


def targets(addresses: Iterable[str]) -> list[str]:
    message = HolePunch(addrs=tuple(Multiaddr(each).to_bytes() for each in addresses))
    return [each.transport for each in punch_targets(message, lambda address: address.transport == OWN)]


def test_a_message_has_one_or_two_hosts_dialled() -> None:
    hosts = [f"/ip4/9.9.9.{number}/tcp/443" for number in range(1, 20)]
    assert targets(hosts) == hosts[:2]
    ports = [f"/ip4/9.9.9.9/tcp/{port}" for port in range(1, 20)]
    assert targets(ports) == ports[:MAX_ADDRESSES]


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/192.168.1.1/tcp/80",
        "/ip4/127.0.0.1/tcp/8000",
        "/ip4/239.1.2.3/tcp/80",
        "/ip6/64:ff9b::c0a8:101/tcp/80",
        "/ip6/2002:c0a8:101::1/tcp/80",
        "/ip6/ff0e::1/tcp/80",
        OWN,
    ],
)
def test_no_address_of_our_own_or_of_a_network_inside_is_dialled(address: str) -> None:
    assert targets([address, "/ip4/8.8.8.8/tcp/4001"]) == ["/ip4/8.8.8.8/tcp/4001"]


def test_addresses_that_stand_for_private_ones_are_not_public() -> None:
    assert is_private("64:ff9b::7f00:1")
    assert is_private("2002:7f00:1::1")
    assert not is_private("2a00:1450::1")


ADDRESSES = [parse_address(f"/ip4/9.9.9.9/tcp/{port}") for port in range(1, 5)]


class Refusing:
    """A transport whose dials are all refused; as a host, one whose peers are connected through relays."""

    def __init__(self) -> None:
        self.dialled: list[TcpAddress] = []
        self.named_dials = DialRateLimit(trio.current_time())
        self.puncher = HolePuncher(
            cast("trio.Nursery", None),
            cast("GuardedHost", SimpleNamespace(swarm=self)),
            cast("Tcp", self),
            observed=tuple,
            known=lambda peer_id: (),
        )

    def is_own(self, address: TcpAddress) -> bool:
        return False

    def direct_connection(self, peer_id: ID) -> None:
        return None

    async def connect_from_port(self, address: TcpAddress) -> None:
        self.dialled.append(address)
        raise ConnectionRefusedError

    async def exchange(self, number: int = 1) -> None:
        """Try as often as a peer has us try."""
        message = HolePunch(addrs=tuple(Multiaddr(each.transport).to_bytes() for each in ADDRESSES))
        refusals = Refusals()
        with suppress(Rationed):
            for _ in range(TRIES):
                await self.puncher._punch(ID(bytes([number])), message, refusals, initiator=False)


async def test_exchange_dials_a_host_that_refuses_few_times(autojump_clock: trio.testing.MockClock) -> None:
    host = Refusing()
    await host.exchange()
    assert REFUSED_DIALS <= len(host.dialled) <= REFUSED_DIALS + TRIES * MAX_ADDRESSES


async def test_many_identities_have_a_third_host_dialled_no_more_often(autojump_clock: trio.testing.MockClock) -> None:
    host = Refusing()
    for number in range(20):
        await host.exchange(number)
    took_s = trio.current_time()
    assert PER_RANGE.burst <= len(host.dialled) <= PER_RANGE.burst + PER_RANGE.per_s * took_s + 1


async def test_exchange_that_the_ration_ends_is_no_failure_and_may_begin_again(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, peer_id, begun = Refusing(), ID(b"peer"), list[float]()
    message = HolePunch(addrs=tuple(Multiaddr(each.transport).to_bytes() for each in ADDRESSES))
    connection = cast("Yamux", SimpleNamespace(peer_id=peer_id, is_closed=False))

    async def begin(connection: Yamux) -> None:
        begun.append(trio.current_time())
        await host.puncher._punch(peer_id, message, Refusals(), initiator=False)

    async def dial_direct(*_: object) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    monkeypatch.setattr(host.puncher, "_begin", begin)
    monkeypatch.setattr(host, "dial_direct", dial_direct, raising=False)
    while host.named_dials.take(ADDRESSES[0], trio.current_time()):
        pass
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            host.puncher._nursery = nursery
            host.puncher.circuit_opened(connection)
        assert not host.puncher._failed
        assert not host.puncher._busy
    assert len(begun) == 2


async def test_peers_that_stay_behind_relays_leave_dials_for_new_holes() -> None:
    network, peer_id = Libp2pNetwork((1).to_bytes(32, "big"), listen=["/ip4/127.0.0.1/tcp/0"]), ID(b"peer")
    async with network.running():
        assert network._swarm is not None
        redials = DialRateLimit(trio.current_time())
        while redials.take(ADDRESSES[0], trio.current_time()):
            pass
        await network._swarm.dial_direct(peer_id, ADDRESSES, redials)
        left = [network._swarm.named_dials.take(ADDRESSES[0], trio.current_time()) for _ in range(int(PER_RANGE.burst))]
    assert all(left)


async def test_cancelled_exchange_leaves_nothing_behind(autojump_clock: trio.testing.MockClock) -> None:
    host, peer_id = Refusing(), ID(b"peer")
    message = HolePunch(addrs=tuple(Multiaddr(each.transport).to_bytes() for each in ADDRESSES))
    with trio.move_on_after(0.05):
        await host.puncher._punch(peer_id, message, Refusals(), initiator=False)
    with trio.move_on_after(0.05):
        await host.puncher.wait(peer_id, 10)
    assert not host.puncher._arrived
    assert not host.puncher._settled


async def test_dials_in_all_are_rationed(autojump_clock: trio.testing.MockClock) -> None:
    limit = DialRateLimit(0.0)
    dials = [limit.take(parse_address(f"/ip4/9.{n // 200}.{n % 200}.1/tcp/1"), 0.0) for n in range(1000)]
    assert dials.count(True) == IN_ALL.burst
    assert limit.take(parse_address("/ip4/8.8.8.8/tcp/1"), 1.0)


async def test_circuit_has_two_hosts_dialled_of_those_that_a_peer_announces(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Libp2pNetwork((1).to_bytes(32, "big"), listen=["/ip4/127.0.0.1/tcp/0"])
    dialled: list[str] = []

    async def dial(self: GuardedSwarm, address: Multiaddr, peer_id: ID) -> None:
        dialled.append(str(address))
        raise OpenConnectionError

    monkeypatch.setattr(GuardedSwarm, "_dial_addr_single_attempt", dial)
    async with network.running():
        assert network._swarm is not None
        addresses = [parse_address(f"/ip4/9.9.9.{number}/tcp/443") for number in range(1, 20)]
        for _ in range(100):
            await network._swarm.dial_direct(ID(b"peer"), addresses)
    assert set(dialled) == {each.transport for each in addresses[:2]}
    assert len(dialled) <= PER_RANGE.burst + 1
