import random

import pytest

from node.replication import peer_limits
from node.replication.peer_limits import (
    BACKOFF_S,
    BAN_S,
    FORGIVEN_AFTER_S,
    MAX_PEERS,
    Ban,
    LimitedPeer,
    PeerAllowances,
    PeerLimits,
)
from node.util.token_bucket import Allowance, TokenBucket
from protocol.identity import PeerId

ALLOWANCES = PeerAllowances(*[Allowance(10, 20)] * 4)


class NoJitter(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


def test_token_bucket_starts_full_and_refills_up_to_its_burst() -> None:
    bucket = TokenBucket(rate=10, burst=20, now_s=0)
    assert bucket.take(20, now_s=0)
    assert not bucket.take(1, now_s=0)
    assert bucket.take(10, now_s=1)
    assert not bucket.take(1, now_s=1)
    assert not bucket.take(21, now_s=1000)
    assert bucket.take(20, now_s=1000)


def test_token_bucket_returns_time_until_debt_is_refilled() -> None:
    bucket = TokenBucket(rate=10, burst=20, now_s=0)
    assert bucket.spend(20, now_s=0) == 0
    assert bucket.spend(5, now_s=0) == pytest.approx(0.5)
    assert bucket.spend(5, now_s=0) == pytest.approx(1)
    assert not bucket.take(1, now_s=1)
    assert bucket.spend(1, now_s=2) == 0


def test_bans_double_up_to_a_bound_and_violations_are_forgiven() -> None:
    peer = LimitedPeer(ALLOWANCES, 0)
    first_s, longest_s = BAN_S
    assert peer.ban(0, "") == first_s
    assert peer.is_banned(first_s - 0.1)
    assert not peer.is_banned(first_s)
    assert peer.ban(0, "") == 2 * first_s
    assert max(peer.ban(0, "") for _ in range(100)) == longest_s
    assert peer.ban(20 * FORGIVEN_AFTER_S, "") == first_s


def test_backoff_grows_with_failures_in_a_row_and_success_resets_it() -> None:
    peer = LimitedPeer(ALLOWANCES, 0)
    first_s, longest_s = BACKOFF_S
    peer.back_off(0, NoJitter())
    assert peer.retry_at_s == first_s
    assert not peer.may_ask(first_s - 0.1)
    assert peer.may_ask(first_s)
    peer.back_off(0, NoJitter())
    assert peer.retry_at_s == 2 * first_s
    for _ in range(100):
        peer.back_off(0, NoJitter())
    assert peer.retry_at_s == longest_s
    peer.reset_backoff()
    peer.back_off(0, NoJitter())
    assert peer.retry_at_s == first_s


def test_number_of_remembered_peers_is_bounded_by_lru_eviction() -> None:
    limits = PeerLimits(ALLOWANCES)
    first = limits.of(PeerId("first"), 0)
    for number in range(MAX_PEERS - 1):
        limits.of(PeerId(str(number)), 0)
    assert limits.of(PeerId("first"), 0) is first
    limits.of(PeerId("one more"), 0)
    limits.of(PeerId("another"), 0)
    assert limits.of(PeerId("first"), 0) is first, "the least recently active peer is evicted"


def test_listing_bans_does_not_count_as_activity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_limits, "MAX_PEERS", 2)
    limits = PeerLimits(ALLOWANCES)
    limits.ban(PeerId("active"), 0, "a violation")
    limits.of(PeerId("idle"), 0)
    limits.of(PeerId("active"), 0)
    limits.bans(0)
    limits.of(PeerId("newcomer"), 0)
    assert limits.of(PeerId("active"), 0).is_banned(0), "the idle peer is evicted, and the ban stands"


def test_flood_exhausts_only_the_allowance_of_its_peer() -> None:
    limits = PeerLimits(ALLOWANCES)
    flooder, honest = limits.of(PeerId("flooder"), 0), limits.of(PeerId("honest"), 0)
    while flooder.gossip.take(1, 0):
        pass
    assert honest.gossip.take(1, 0)


def test_bans_are_listed_with_their_reason_until_they_end() -> None:
    limits = PeerLimits(ALLOWANCES)
    limits.ban(PeerId("liar"), 0, "a wrong signature")
    limits.of(PeerId("honest"), 0)
    assert limits.bans(1) == {PeerId("liar"): Ban(peer_limits.BAN_S[0] - 1, "a wrong signature")}
    assert limits.bans(peer_limits.BAN_S[0]) == {}
