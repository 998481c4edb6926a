"""Whom a peer's message may have this node dial, and how often."""

from collections.abc import Iterable
from typing import cast

import pytest
import trio.testing
from multiaddr import Multiaddr

from node.network.addresses import TcpAddress, is_private, parse_address
from node.network.hole_punch import MAX_ADDRESSES, REFUSED_DIALS, connect_refused, punch_targets
from node.network.relay_messages import HolePunch
from node.network.transport import Tcp

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


async def test_host_that_refuses_is_dialled_few_times(autojump_clock: trio.testing.MockClock) -> None:
    class Refusing:
        dials = 0

        async def connect_from_port(self, address: TcpAddress) -> None:
            self.dials += 1
            raise ConnectionRefusedError

    tcp = Refusing()
    with pytest.raises(ConnectionRefusedError):
        await connect_refused(cast("Tcp", tcp), parse_address("/ip4/9.9.9.9/tcp/443"))
    assert tcp.dials == REFUSED_DIALS <= 20
