"""Whom a node dials by itself."""

import random
from dataclasses import dataclass, field
from typing import cast

import trio
import trio.testing

from node.network.interface import Network
from node.swarm.dialling import KEPT_CONNECTIONS, MAX_RELAY_SEARCH_S, RELAY_SEARCH_S, Dialler
from node.swarm.directory import Directory
from protocol.announcements import Heartbeat, Reachability, Verdict
from protocol.identity import PeerId

US = PeerId("us")


@dataclass
class Peers:
    """A network in which every dial succeeds."""

    reachability: Reachability
    peer_id: PeerId = US
    connected: list[PeerId] = field(default_factory=lambda: [PeerId(f"peer-{n}") for n in range(KEPT_CONNECTIONS)])

    def connected_peers(self) -> tuple[PeerId, ...]:
        return tuple(self.connected)

    async def ping(self, peer: PeerId) -> float:
        await trio.lowlevel.checkpoint()
        self.connected.append(peer)
        return 0.01

    async def disconnect(self, peer: PeerId) -> None:
        await trio.lowlevel.checkpoint()
        self.connected.remove(peer)


def relay(name: str, host: str) -> Heartbeat:
    return Heartbeat(
        peer=PeerId(name),
        sequence=1,
        issued_at_s=0,
        expires_at_s=60,
        interval_ms=1000,
        multiaddrs=(f"/ip4/{host}/tcp/4001",),
        agent="test/1",
        reachability=Reachability(verdict=Verdict.PUBLIC, relay_bytes_per_s=1e6),
    )


async def dialled(known: Reachability, seconds: float, *more: tuple[str, str]) -> list[PeerId]:
    """Return whom a node has dialled and kept after a while."""
    peers = Peers(known)
    directory = Directory(own_peer=US, connected=peers.connected_peers)
    peers.connected.append(PeerId("held"))
    before = len(peers.connected)
    for name, host in (("held", "9.9.9.1"), ("beside", "9.9.9.2"), ("far", "8.8.8.8"), *more):
        directory.update(relay(name, host), 0.0, dialled=True)
    with trio.move_on_after(seconds):
        await Dialler(cast("Network", peers), directory, random.Random(0)).run()
    return peers.connected[before:]


async def test_private_node_with_few_relays_dials_others_first_in_another_range(
    autojump_clock: trio.testing.MockClock,
) -> None:
    private = Reachability(verdict=Verdict.PRIVATE, relays=(PeerId("held"),))
    assert await dialled(private, 0.5) == ["far"]
    assert await dialled(private, RELAY_SEARCH_S * 1.5) == ["far", "beside"]


async def test_search_for_relays_that_give_nothing_goes_on_at_growing_intervals(
    autojump_clock: trio.testing.MockClock,
) -> None:
    relays = [(f"relay-{number}", f"8.{number}.8.8") for number in range(20)]
    private = Reachability(verdict=Verdict.PRIVATE, relays=(PeerId("held"),))
    assert len(await dialled(private, RELAY_SEARCH_S * 30, *relays)) in {4, 5}
    assert 8 < len(await dialled(private, 5 * MAX_RELAY_SEARCH_S, *relays)) < 16


async def test_node_that_needs_no_relay_looks_for_none(autojump_clock: trio.testing.MockClock) -> None:
    assert await dialled(Reachability(verdict=Verdict.PUBLIC), 30) == []
    two = (PeerId("held"), PeerId("other"))
    assert await dialled(Reachability(verdict=Verdict.PRIVATE, relays=two), 30) == []


async def test_peer_that_is_being_dialled_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    class Slow(Peers):
        dials = 0

        async def ping(self, peer: PeerId) -> float:
            self.dials += 1
            await trio.sleep(3)
            return await super().ping(peer)

    peers = Slow(Reachability(verdict=Verdict.PUBLIC), connected=[])
    directory = Directory(own_peer=US, connected=peers.connected_peers)
    directory.update(relay("server", "9.9.9.1"), 0.0, dialled=False)
    dialler = Dialler(cast("Network", peers), directory, random.Random(0))
    answered: list[float] = []

    async def reach(limit_s: float) -> None:
        with trio.move_on_after(limit_s):
            assert await dialler.reach(*directory.entries())
            answered.append(trio.current_time() - began_s)

    for first_limit_s, expected_s, dials in ((10.0, [3.0, 3.0], 1), (1.0, [4.0], 3)):
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reach, first_limit_s)
            await trio.sleep(0.5)
            nursery.start_soon(reach, 10.0)
        assert (answered, peers.dials) == (expected_s, dials), "whose dial is cancelled does not speak for others"
        answered.clear()


async def test_connection_that_is_being_closed_is_not_taken_for_one_to_keep(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class SlowToClose(Peers):
        async def disconnect(self, peer: PeerId) -> None:
            await super().disconnect(peer)
            await trio.sleep(1)

    peers = SlowToClose(Reachability(verdict=Verdict.PUBLIC))
    directory = Directory(own_peer=US, connected=peers.connected_peers)
    directory.update(relay("server", "9.9.9.1"), 0.0, dialled=False)
    dialler = Dialler(cast("Network", peers), directory, random.Random(0))
    (entry,) = directory.entries()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dialler.reach, entry)
        await trio.sleep(0.5)
        assert await dialler.reach(entry, keep=True)
        assert "server" in peers.connected
