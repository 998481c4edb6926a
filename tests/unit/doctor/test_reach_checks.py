"""What `doctor` says of a node that others cannot dial."""

from pathlib import Path
from typing import Any, cast

import pytest

from node.config import NodeConfig
from node.doctor import reach_checks
from node.doctor.reach_checks import check_reach
from node.doctor.report import Fault, RunningNode

PEER = "12D3KooWM4xHiz2GDU4ebDMhPcxVNBm7kzyPWh7w4Y7b9rARdaL8"
HOME, VPS = "/ip4/192.168.1.2/tcp/4001", "/ip4/8.8.8.8/tcp/4001"
PRIVATE = {
    "verdict": "private",
    "observed": ["/ip4/9.9.9.9/tcp/4001"],
    "endpoint_dependent": False,
    "port_mapped": False,
    "relays": [PEER],
    "relay_bytes_per_s": 0.0,
}


async def faults(*addresses: str, announce: tuple[str, ...] = (), **reach: Any) -> dict[Fault, bool]:
    """Return the faults, and whether they are grave."""
    status = {"multiaddrs": [f"{each}/p2p/{PEER}" for each in addresses], "reachability": {**PRIVATE, **reach}}
    config = NodeConfig(data_dir=Path("/data"), cache_dir=Path("/cache"), announce=announce)
    running = RunningNode(cast("Any", status), [])
    return {found.fault: found.grave async for found in check_reach(config, running)}


async def test_public_node_is_well() -> None:
    assert await faults(VPS, verdict="public", relays=[]) == {}


async def test_node_behind_a_nat_with_a_relay_gets_a_note() -> None:
    assert await faults(HOME) == {Fault.PRIVATE_ONLY: False}
    assert await faults(HOME, endpoint_dependent=True) == {Fault.PRIVATE_ONLY: False, Fault.SYMMETRIC_NAT: False}


async def test_node_without_a_relay_cannot_be_reached() -> None:
    assert await faults(HOME, relays=[]) == {Fault.PRIVATE_ONLY: False, Fault.NO_RELAY: True}


async def test_firewall_and_wrong_forwarding_are_told_apart() -> None:
    assert await faults(VPS) == {Fault.FIREWALL: False}
    assert await faults(VPS, HOME, announce=(VPS,)) == {Fault.CLOSED_PORT: False}


async def test_ipv6_without_a_route_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach_checks, "has_ipv6_route", lambda: False)
    assert await faults("/ip6/2a00::1/tcp/4001", verdict="public") == {Fault.IPV6_BROKEN: False}
