"""Over which connections a peer is asked who it is, and where it sees this node."""

from types import SimpleNamespace
from typing import Any, cast

import trio
from libp2p.peer.id import ID
from trio.testing import MockClock

from node.network.guarded_host import IDENTIFY_PAUSE_S, GuardedHost
from node.network.guarded_swarm import GuardedSwarm
from node.network.yamux import Yamux

PEER = ID(b"peer")


class Connection(Yamux):
    """One over which nothing was asked yet."""

    def __init__(self) -> None:
        self.identified = False


class Asking(GuardedHost):
    """A host whose requests take a second; `fails`: so many of them are not answered."""

    def __init__(self, nursery: trio.Nursery, fails: int = 0) -> None:
        self.best = Connection()
        swarm = SimpleNamespace(best_connection=lambda peer_id: SimpleNamespace(muxed_conn=self.best))
        self.swarm = cast("GuardedSwarm", swarm)
        self._nursery = nursery
        self._identified = {}
        self._identify_inflight = set()
        self._fails = fails
        self.asked: list[tuple[Connection, float]] = []

    def get_id(self) -> ID:
        return ID(b"own")

    async def _identify_peer(self, peer_id: ID, **_: Any) -> None:
        self.asked.append((self.best, trio.current_time()))
        await trio.sleep(1)
        if len(self.asked) <= self._fails:
            raise trio.TooSlowError


async def test_connection_that_opens_during_a_request_is_identified_after_it(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        host = Asking(nursery)
        first, second = host.best, Connection()
        host._schedule_identify(PEER, reason="test")
        await trio.sleep(0.5)
        host.best = second
        host._schedule_identify(PEER, reason="test")
    assert [connection for connection, _ in host.asked] == [first, second]
    assert second.identified


async def test_peer_that_did_not_answer_is_asked_once_more_after_a_pause(autojump_clock: MockClock) -> None:
    for fails in (1, 9):
        async with trio.open_nursery() as nursery:
            host = Asking(nursery, fails)
            host._schedule_identify(PEER, reason="test")
        (_, first_s), (_, second_s) = host.asked
        assert second_s == first_s + 1 + IDENTIFY_PAUSE_S
        assert host.best.identified == (fails == 1)
