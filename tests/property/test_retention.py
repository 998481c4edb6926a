"""The rule by which history is dropped, for any history."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from selector.retention import HistoryBounds, Share, shares_to_drop

FIRST, OPEN = 3, 8
histories = st.dictionaries(
    st.builds(Share, st.integers(0, 10), st.sampled_from("abcde")), st.integers(1, 40), max_size=40
)
bounds = st.builds(HistoryBounds, observer_bytes=st.integers(0, 120), all_bytes=st.integers(0, 300))


def kept(counts: dict[Share, int], limits: HistoryBounds) -> dict[Share, int]:
    dropped = shares_to_drop(counts, first_bucket=FIRST, open_bucket=OPEN, bounds=limits)
    assert dropped <= counts.keys()
    return {share: count for share, count in counts.items() if share not in dropped}


@given(histories, bounds, st.randoms(use_true_random=False))
def test_the_order_in_which_things_were_heard_does_not_matter(
    counts: dict[Share, int], limits: HistoryBounds, random: Random
) -> None:
    shuffled = list(counts.items())
    random.shuffle(shuffled)
    assert kept(counts, limits) == kept(dict(shuffled), limits)


@given(histories, bounds)
def test_what_is_kept_keeps_to_the_bounds(counts: dict[Share, int], limits: HistoryBounds) -> None:
    rest = {share: count for share, count in kept(counts, limits).items() if share.bucket < OPEN}
    assert all(share.bucket >= FIRST for share in rest)
    assert sum(rest.values()) <= limits.all_bytes
    for observer in "abcde":
        assert sum(count for share, count in rest.items() if share.observer == observer) <= limits.observer_bytes


@given(histories, bounds)
def test_dropping_twice_drops_no_more(counts: dict[Share, int], limits: HistoryBounds) -> None:
    once = kept(counts, limits)
    assert kept(once, limits) == once


@given(histories, bounds)
def test_open_buckets_are_left_alone_and_take_no_room(counts: dict[Share, int], limits: HistoryBounds) -> None:
    closed = {share: count for share, count in counts.items() if share.bucket < OPEN}
    rest = kept(counts, limits)
    assert {share for share in rest if share.bucket >= OPEN} == {share for share in counts if share.bucket >= OPEN}
    assert kept(closed, limits) == {share: count for share, count in rest.items() if share.bucket < OPEN}


@given(histories, bounds)
def test_the_older_goes_before_the_newer(counts: dict[Share, int], limits: HistoryBounds) -> None:
    rest = kept(counts, limits)
    for share in counts.keys() - rest.keys():
        if share.bucket >= FIRST:
            assert not any(other.observer == share.observer and other.bucket < share.bucket for other in rest)


@settings(max_examples=300)
@given(histories, bounds)
def test_who_says_less_loses_nothing_while_who_says_more_keeps_more(
    counts: dict[Share, int], limits: HistoryBounds
) -> None:
    rest = kept(counts, limits)

    def total(history: dict[Share, int], observer: str) -> int:
        return sum(n for share, n in history.items() if share.observer == observer and FIRST <= share.bucket < OPEN)

    for modest in "abcde":
        if total(rest, modest) < total(counts, modest):
            assert all(total(rest, other) < total(counts, modest) for other in "abcde")


@given(histories)
def test_where_there_is_room_nothing_goes(counts: dict[Share, int]) -> None:
    assert kept(counts, HistoryBounds()) == {share: n for share, n in counts.items() if share.bucket >= FIRST}
