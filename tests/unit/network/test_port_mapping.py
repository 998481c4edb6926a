"""What a gateway is asked for, and what is made of its answers."""

from typing import Any

import pytest

from node.network.port_mapping import LEASE_S, change_mapping

HOST, PORT = "192.168.1.2", 4001


class Gateway:
    """A gateway as miniupnpc shows it, which may know permanent leases only."""

    def __init__(self, held: dict[int, tuple[str, int]] | None = None, *, permanent_only: bool = False) -> None:
        self.held = held or {}
        self.leases: dict[int, int] = {}
        self._permanent_only = permanent_only

    def externalipaddress(self) -> str:
        return "203.0.113.7"

    def getspecificportmapping(self, port: int, _protocol: str) -> tuple[Any, ...] | None:
        return (*self.held[port], "somebody", True, 0) if port in self.held else None

    def addportmapping(
        self, port: int, _protocol: str, host: str, inner: int, _description: str, _remote: str, lease_s: int
    ) -> None:
        if lease_s and self._permanent_only:
            raise RuntimeError("OnlyPermanentLeasesSupported")
        self.held[port] = (host, inner)
        self.leases[port] = lease_s

    def deleteportmapping(self, port: int, _protocol: str) -> None:
        del self.held[port]


def test_own_port_is_mapped_for_a_while_and_renewed_and_removed() -> None:
    gateway = Gateway()
    for _ in range(2):
        assert change_mapping(gateway, "add", HOST, PORT, PORT) == {"host": "203.0.113.7", "port": PORT}
    assert gateway.leases == {PORT: LEASE_S}
    change_mapping(gateway, "remove", HOST, PORT, PORT)
    assert gateway.held == {}


def test_port_of_another_node_is_left_alone() -> None:
    others = {PORT: ("192.168.1.3", PORT), PORT + 1: (HOST, 5001)}
    gateway = Gateway(dict(others))
    assert change_mapping(gateway, "add", HOST, PORT, PORT)["port"] == PORT + 2
    assert others.items() <= gateway.held.items()
    crowded = Gateway({port: ("192.168.1.3", port) for port in range(PORT, PORT + 100)})
    with pytest.raises(RuntimeError, match="no free port"):
        change_mapping(crowded, "add", HOST, PORT, PORT)


def test_gateway_with_permanent_leases_only_gets_one() -> None:
    gateway = Gateway(permanent_only=True)
    change_mapping(gateway, "add", HOST, PORT, PORT)
    assert gateway.leases == {PORT: 0}
