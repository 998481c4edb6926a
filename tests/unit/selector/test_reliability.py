"""Peers that failed are avoided, longer each time, and forgiven."""

from selector.reliability import BACKOFF_S, HALF_LIFE_S, MAX_PEERS, Reliability


def test_failed_peer_is_avoided_during_backoff() -> None:
    known = Reliability()
    assert known.trust("a", 0) == 1
    known.failed("a", 10)
    assert known.avoided(10.5) == {"a"}
    assert known.avoided(10 + BACKOFF_S[0]) == frozenset()
    assert known.trust("a", 10) == 0.5
    assert known.trust("b", 10) == 1


def test_backoff_doubles_with_each_failure_up_to_a_bound() -> None:
    known = Reliability()
    for _ in range(20):
        known.failed("a", 0)
    assert known.avoided(BACKOFF_S[1] - 0.1) == {"a"}
    assert known.avoided(BACKOFF_S[1]) == frozenset()
    known.failed("b", 100)
    known.failed("b", 100)
    assert known.avoided(100 + 1.9 * BACKOFF_S[0]) == {"b"}


def test_time_and_completed_jobs_restore_trust() -> None:
    known = Reliability()
    known.failed("a", 0)
    known.failed("b", 0)
    assert known.trust("a", HALF_LIFE_S) == 1 / 1.5
    assert known.trust("a", 20 * HALF_LIFE_S) > 0.99
    for _ in range(4):
        known.served("b", 0.1)
    assert known.trust("b", 0.2) == 1
    assert known.avoided(0.2) == {"a"}


def test_records_are_bounded() -> None:
    known = Reliability()
    for number in range(MAX_PEERS + 10):
        known.failed(str(number), 0)
    assert len(known.avoided(0.5)) == MAX_PEERS


def test_dispute_counts_half_and_causes_no_backoff() -> None:
    known = Reliability()
    known.disputed("a", 0)
    assert known.avoided(0.1) == frozenset()
    assert 0.5 < known.trust("a", 0) < 1
    known.disputed("a", 0)
    assert known.trust("a", 0) == 0.5
