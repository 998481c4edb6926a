import pytest

from node.swarm import peer_limits
from node.swarm.peer_limits import BACKOFF_S, FORGIVEN_AFTER_S, MAX_PEERS, PENALTY_S, Ban, Standing, Standings
from node.util.token_bucket import Allowance, TokenBucket
from protocol.identity import PeerId

ALLOWANCE = Allowance(10, 20)


def make_standing() -> Standing:
    return Standing(ALLOWANCE, ALLOWANCE, ALLOWANCE, ALLOWANCE, now_s=0.0)


def test_a_bucket_starts_full_refills_steadily_and_holds_no_more_than_its_burst() -> None:
    bucket = TokenBucket(rate=10, burst=20, now_s=0)
    assert bucket.take(20, now_s=0)
    assert not bucket.take(1, now_s=0)
    assert bucket.take(10, now_s=1)
    assert not bucket.take(1, now_s=1)
    assert not bucket.take(21, now_s=1000)
    assert bucket.take(20, now_s=1000)


def test_a_debt_says_how_long_it_takes_to_pay() -> None:
    bucket = TokenBucket(rate=10, burst=20, now_s=0)
    assert bucket.spend(20, now_s=0) == 0
    assert bucket.spend(5, now_s=0) == pytest.approx(0.5)
    assert bucket.spend(5, now_s=0) == pytest.approx(1)
    assert not bucket.take(1, now_s=1)
    assert bucket.spend(1, now_s=2) == 0


def test_penalties_double_up_to_a_bound_and_are_forgiven() -> None:
    peer = make_standing()
    first_s, longest_s = PENALTY_S
    assert peer.penalise(0) == first_s
    assert peer.barred(first_s - 0.1)
    assert not peer.barred(first_s)
    assert peer.penalise(0) == 2 * first_s
    assert max(peer.penalise(0) for _ in range(100)) == longest_s
    assert peer.penalise(20 * FORGIVEN_AFTER_S) == first_s


def test_failures_in_a_row_lead_to_longer_pauses_and_success_ends_them() -> None:
    peer = make_standing()
    first_s, longest_s = BACKOFF_S
    peer.failed(0, 1)
    assert peer.retry_at_s == first_s
    peer.failed(0, 0.5)
    assert peer.retry_at_s == first_s
    for _ in range(100):
        peer.failed(0, 1)
    assert peer.retry_at_s == longest_s
    peer.succeeded()
    peer.failed(0, 1)
    assert peer.retry_at_s == first_s


def test_what_is_remembered_of_peers_is_bounded() -> None:
    standings = Standings(ALLOWANCE, ALLOWANCE, ALLOWANCE, ALLOWANCE)
    first = standings.of(PeerId("first"), 0)
    for number in range(MAX_PEERS - 1):
        standings.of(PeerId(str(number)), 0)
    assert standings.of(PeerId("first"), 0) is first
    standings.of(PeerId("one more"), 0)
    standings.of(PeerId("another"), 0)
    assert standings.of(PeerId("first"), 0) is first, "the one unheard of for longest makes room"


def test_a_flood_uses_up_nobody_elses_allowance() -> None:
    standings = Standings(ALLOWANCE, ALLOWANCE, ALLOWANCE, ALLOWANCE)
    flooder, honest = standings.of(PeerId("flooder"), 0), standings.of(PeerId("honest"), 0)
    while flooder.gossip.take(1, 0):
        pass
    assert honest.gossip.take(1, 0)


def test_barred_peers_are_listed_while_they_are_barred() -> None:
    standings = Standings(ALLOWANCE, ALLOWANCE, ALLOWANCE, ALLOWANCE)
    standings.of(PeerId("liar"), 0).penalise(0)
    standings.of(PeerId("honest"), 0)
    assert standings.barred(1) == (PeerId("liar"),)
    assert standings.barred(peer_limits.PENALTY_S[0]) == ()


def test_who_is_barred_and_for_what_can_be_told() -> None:
    standings = Standings(*[Allowance(1, 1)] * 4)
    seconds = standings.of(PeerId("liar"), 0).penalise(0, "a wrong signature")
    standings.of(PeerId("honest"), 0)
    assert standings.bans(1) == {PeerId("liar"): Ban(seconds - 1, "a wrong signature")}
    assert standings.bans(seconds) == {}
