"""Whether peers agree with this machine's clock, as their heartbeats show."""

import random
from contextlib import suppress
from typing import Any, cast

import pytest
import structlog
import structlog.testing
import trio
import trio.testing

from node.identity import Identity
from node.swarm.clock_check import RECENT_S
from node.swarm.heartbeats import Heartbeats
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetworkHub
from protocol.errors import RemoteProtocolError
from protocol.records import seal
from tests.support.memberships import heartbeat_of, membership_of

US, *PEERS = (Identity(bytes([number]) * 32) for number in range(6))

NOON = 1_800_000_000


class Node:
    """Our node, connected to peers, with a clock that can be set."""

    def __init__(self, connected: int, ahead_s: float = 0.0) -> None:
        network = MemoryNetworkHub(random.Random(0), LinkModel()).network(US.peer_id)
        cast("Any", network).connected_peers = lambda: tuple(each.peer_id for each in PEERS[:connected])
        self.ahead_s = ahead_s
        self.heartbeats: Heartbeats = membership_of(
            network, US, wall_clock=lambda: NOON + trio.current_time() + self.ahead_s
        ).heartbeats

    def hear(self, sender: Identity, peer_ahead_s: float = 0.0) -> None:
        """Receive a heartbeat of a peer, by its clock."""
        now_s = int(NOON + trio.current_time() + peer_ahead_s)
        heartbeat = heartbeat_of(sender.peer_id, sequence=1 + int(trio.current_time() * 1000), issued_at_s=now_s)
        with suppress(RemoteProtocolError):
            self.heartbeats.validate(sender.peer_id, seal(heartbeat, sender.private_key))


async def test_clock_is_confirmed_by_heartbeats_of_connected_peers_only(autojump_clock: trio.testing.MockClock) -> None:
    node = Node(connected=1)
    clock = node.heartbeats.clock
    assert not clock.is_confirmed()
    node.hear(PEERS[1])
    assert not clock.is_confirmed()
    node.hear(PEERS[0])
    assert clock.is_confirmed()
    await trio.sleep(RECENT_S)
    assert not clock.is_confirmed()


async def test_clock_that_is_a_month_ahead_is_not_confirmed(autojump_clock: trio.testing.MockClock) -> None:
    node = Node(connected=3, ahead_s=31 * 86_400)
    for peer in PEERS[:3]:
        node.hear(peer)
    assert not node.heartbeats.clock.is_confirmed()


async def test_clock_is_not_confirmed_by_what_was_heard_before_it_was_set(
    autojump_clock: trio.testing.MockClock,
) -> None:
    node = Node(connected=3)
    node.hear(PEERS[0])
    assert node.heartbeats.clock.is_confirmed()
    node.ahead_s = 31 * 86_400
    assert not node.heartbeats.clock.is_confirmed()


async def test_heartbeats_that_waited_during_sleep_do_not_tell_the_time(autojump_clock: trio.testing.MockClock) -> None:
    node = Node(connected=1)
    clock = node.heartbeats.clock
    node.hear(PEERS[0])
    assert clock.is_confirmed()
    asleep_s = 8 * 3600.0
    node.ahead_s = asleep_s  # the monotonic clock stood still
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            await trio.sleep(1)
            node.hear(PEERS[0])
            clock.warn()
            assert (clock.ahead_s(), clock.agrees()) == (None, None)
        node.hear(PEERS[0], asleep_s)
        clock.warn()
    assert clock.is_confirmed()
    assert not [each for each in logs if each["log_level"] == "warning"]


async def test_clock_that_is_set_wrong_while_the_node_runs_is_known_to_be_wrong(
    autojump_clock: trio.testing.MockClock,
) -> None:
    node = Node(connected=3)
    node.ahead_s = 8 * 3600.0
    for _ in range(40):
        await trio.sleep(2.5)
        for peer in PEERS[:3]:
            node.hear(peer)
    assert node.heartbeats.clock.agrees() is False


async def test_wrong_clock_is_logged_once_and_shown(autojump_clock: trio.testing.MockClock) -> None:
    node = Node(connected=4, ahead_s=-90.0)
    clock = node.heartbeats.clock
    assert clock.ahead_s() is None
    with structlog.testing.capture_logs() as logs:
        for _ in range(5):
            for peer in PEERS[:4]:
                node.hear(peer)
            clock.warn()
            await trio.sleep(3)
    assert clock.ahead_s() == pytest.approx(-90, abs=1)
    (warning,) = [each for each in logs if each["log_level"] == "warning"]
    assert "clock is 9" in warning["event"]
    assert warning["event"].endswith("s behind those of connected peers, which accept at most 60 s: set the clock")


async def test_clock_of_a_single_peer_that_is_wrong_is_not_ours(autojump_clock: trio.testing.MockClock) -> None:
    node = Node(connected=3)
    with structlog.testing.capture_logs() as logs:
        node.hear(PEERS[0], peer_ahead_s=10_000)
        node.hear(PEERS[1])
        node.hear(PEERS[2])
        node.hear(PEERS[3], peer_ahead_s=10_000)  # not connected
        node.heartbeats.clock.warn()
    assert not [each for each in logs if each["log_level"] == "warning"]
    assert node.heartbeats.clock.is_confirmed()


async def test_one_wrong_clock_of_three_is_known_to_be_wrong_and_makes_no_other_doubt_its_own(
    autojump_clock: trio.testing.MockClock,
) -> None:
    wrong, right = Node(connected=2, ahead_s=31 * 86_400), Node(connected=2)
    assert wrong.heartbeats.clock.agrees() is None
    for peer, ahead_s in zip(PEERS[:2], (0.0, 31 * 86_400), strict=True):
        wrong.hear(peer)
        right.hear(peer, ahead_s)
    assert wrong.heartbeats.clock.agrees() is False
    assert right.heartbeats.clock.agrees() is None
    right.hear(PEERS[0])
    await trio.sleep(1)
    right.hear(PEERS[1])
    assert right.heartbeats.clock.agrees() is True
