"""Bootstrap addresses that never answer, for as long as a node runs."""

import random
from collections.abc import Iterable
from typing import Any, cast

import structlog.testing
import trio
from trio.testing import MockClock

from node.network.interface import Network, NetworkError
from node.swarm.bootstrap import BootstrapDialler
from protocol.identity import PeerId

US, PEER = PeerId("us"), PeerId("peer")


def address(peer: PeerId) -> str:
    return f"/ip4/192.0.2.1/tcp/4001/p2p/{peer}"


class DeadNetwork:
    """A network on which no dial succeeds unless `reason` is empty."""

    peer_id = US

    def __init__(self) -> None:
        self.reason = "connection refused"
        self.dialled: list[str] = []

    def connected_peers(self) -> tuple[PeerId, ...]:
        return ()

    async def connect(self, multiaddr: str) -> PeerId:
        await trio.lowlevel.checkpoint()
        self.dialled.append(multiaddr)
        if self.reason:
            raise NetworkError(self.reason)
        return PEER


def dialler_on(network: DeadNetwork, multiaddrs: Iterable[str]) -> BootstrapDialler:
    return BootstrapDialler(cast("Network", network), multiaddrs, random.Random(0))


def reasons(logs: list[Any]) -> list[str]:
    return [entry["reason"] for entry in logs if entry["log_level"] == "warning"]


async def test_dead_address_is_logged_when_its_fault_changes_and_once_an_hour(virtual_clock: MockClock) -> None:
    network = DeadNetwork()
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dialler_on(network, [address(PEER)]).run)
            await trio.sleep(1800)
            assert len(network.dialled) > 40
            assert reasons(logs) == ["connection refused"]
            network.reason = "no route to host"
            await trio.sleep(5400)
            assert reasons(logs) == ["connection refused", "no route to host", "no route to host"]
            network.reason = ""
            await trio.sleep(60)
            network.reason = "no route to host"
            await trio.sleep(60)
            assert len(reasons(logs)) == 4, "an outage of its own"
            nursery.cancel_scope.cancel()


async def test_own_address_in_a_list_that_all_nodes_share_is_not_dialled(virtual_clock: MockClock) -> None:
    network = DeadNetwork()
    dialler = dialler_on(network, [address(US), address(PEER)])
    assert [each.multiaddr for each in dialler.states()] == [address(PEER)]
    with trio.move_on_after(60):
        await dialler.run()
    assert set(network.dialled) == {address(PEER)}
