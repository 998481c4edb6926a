"""Which part of a history is dropped, on examples that a person can follow."""

from selector.retention import HistoryBounds, Share, shares_to_drop


def dropped(counts: dict[tuple[int, str], int], *, per_observer: int, in_all: int) -> set[tuple[int, str]]:
    shares = {Share(*share): count for share, count in counts.items()}
    bounds = HistoryBounds(observer_bytes=per_observer, all_bytes=in_all)
    return {
        (share.bucket, share.observer)
        for share in shares_to_drop(shares, first_bucket=10, open_bucket=20, bounds=bounds)
    }


def test_expired_shares_are_evicted_despite_room() -> None:
    assert dropped({(9, "a"): 1, (10, "a"): 1}, per_observer=100, in_all=100) == {(9, "a")}


def test_observer_over_its_limit_loses_its_oldest_shares() -> None:
    history = {(12, "a"): 5, (13, "a"): 5, (14, "a"): 5, (12, "b"): 9}
    assert dropped(history, per_observer=12, in_all=100) == {(12, "a")}
    assert dropped(history, per_observer=14, in_all=100) == {(12, "a")}, "a share is never cut"


def test_no_share_older_than_an_evicted_one_stays() -> None:
    assert dropped({(12, "a"): 1, (13, "a"): 9, (14, "a"): 5}, per_observer=10, in_all=100) == {(12, "a"), (13, "a")}


def test_flood_of_one_observer_is_evicted_first() -> None:
    history = {(bucket, "flood"): 50 for bucket in range(10, 20)} | {(11, "modest"): 10, (15, "other"): 20}
    assert dropped(history, per_observer=1000, in_all=100) == {(bucket, "flood") for bucket in range(10, 19)}


def test_open_bucket_is_not_evicted() -> None:
    assert dropped({(20, "a"): 500, (19, "a"): 5}, per_observer=10, in_all=10) == set()
