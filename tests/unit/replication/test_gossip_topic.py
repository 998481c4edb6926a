"""Gossip of signed records: rate limits, verification once, bans, and pacing."""

import random
from collections import deque
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from node.network.interface import GossipValidator
from node.replication.gossip_topic import TOPIC_WINDOW_S, BatchPacer, GossipTopic, Verifier
from node.replication.peer_limits import PeerAllowances, PeerLimits
from node.util.token_bucket import Allowance
from protocol.errors import RemoteProtocolError
from protocol.history import take_batch
from protocol.identity import PeerId

PUBLISHER, OTHER = PeerId("publisher"), PeerId("other")
PER_PEER = Allowance(1, 4)


class OneTopicNetwork:
    peer_id = PeerId("ours")
    validate: GossipValidator

    def join_topic(self, topic: str, validator: GossipValidator) -> None:
        self.validate = validator


class Harness:
    def __init__(self, total: Allowance = Allowance(100, 100)) -> None:  # noqa: B008  # frozen
        self.opened: list[bytes] = []
        self.network = OneTopicNetwork()
        self.peer_limits = PeerLimits(PeerAllowances(PER_PEER, PER_PEER, PER_PEER, PER_PEER))
        verifier = Verifier(self.open, 64, lambda envelope: 1.0)
        accepts = lambda source, record: record != b"untimely"  # noqa: E731
        GossipTopic(cast("Any", self.network), "topic", verifier, self.peer_limits, total, accepts=accepts)

    def open(self, envelope: bytes) -> bytes:
        self.opened.append(envelope)
        if envelope == b"forged":
            raise RemoteProtocolError("wrong signature")
        return envelope

    def validate(self, *envelopes: bytes, source: PeerId = PUBLISHER) -> bool:
        return self.network.validate(source, take_batch(deque(envelopes)))


async def test_rate_limit_of_a_publisher_drops_its_flood_unverified(autojump_clock: MockClock) -> None:
    harness = Harness()
    assert harness.validate(b"1", b"2", b"3", b"4")
    assert not harness.validate(b"5")
    assert harness.opened == [b"1", b"2", b"3", b"4"]
    assert harness.validate(b"5", source=OTHER), "each publisher has an allowance of its own"
    await trio.sleep(1)
    assert harness.validate(b"6")


async def test_total_rate_limit_bounds_all_publishers_together(autojump_clock: MockClock) -> None:
    harness = Harness(total=Allowance(1, 3))
    assert harness.validate(b"1", b"2", b"3")
    assert not harness.validate(b"4", source=OTHER)


async def test_duplicate_records_are_not_verified_again(autojump_clock: MockClock) -> None:
    harness = Harness()
    assert harness.validate(b"1", b"2", b"3")
    assert harness.validate(b"1", b"2", b"3")
    assert len(harness.opened) == 3


async def test_replays_of_verified_records_exhaust_the_allowance(autojump_clock: MockClock) -> None:
    harness = Harness()
    assert harness.validate(b"1")
    assert [harness.validate(b"1") for _ in range(4)] == [True, True, True, False], "every batch is forwarded by all"
    harness = Harness()
    assert harness.validate(b"1")
    assert not harness.validate(*[b"1"] * 64), "every record is received by all"


async def test_invalid_batch_bans_its_publisher(autojump_clock: MockClock) -> None:
    harness = Harness()
    with pytest.raises(RemoteProtocolError):
        harness.validate(b"1", b"forged")
    assert harness.peer_limits.bans(trio.current_time())[PUBLISHER].reason == "wrong signature"
    assert not harness.validate(b"2")
    assert b"2" not in harness.opened


async def test_unaccepted_record_stops_its_batch_without_a_ban(autojump_clock: MockClock) -> None:
    harness = Harness()
    assert not harness.validate(b"1", b"untimely")
    assert not harness.peer_limits.bans(trio.current_time())


async def test_pacer_slows_down_to_a_fair_share_of_a_full_topic(autojump_clock: MockClock) -> None:
    pacer = BatchPacer(1.0, 2.0, random.Random(0))
    assert pacer.pause_s() < 1.2
    for number in range(100):
        pacer.on_batch(PeerId(str(number % 9)))
    pauses_s = [pacer.pause_s() for _ in range(10)]
    assert pauses_s[-1] > 3
    assert max(pauses_s) <= 5 * 1.2, "ten publishers share two batches a second"
    await trio.sleep(TOPIC_WINDOW_S + 1)
    assert [pacer.pause_s() for _ in range(20)][-1] < 1.2
