"""What of the history is kept: a pure rule, so that peers with the same history keep the same.

The history is cut into shares: what one observer issued within one bucket of time. Whole shares are dropped and never
parts of one, and only of closed buckets, in which nobody says anything any more.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple


class Share(NamedTuple):
    """What one observer issued within one bucket of time."""

    bucket: int
    observer: str


@dataclass(frozen=True, slots=True)
class HistoryBounds:
    """How many observations are kept.

    `per_observer` and `in_all` hold for closed buckets. A flood does not wait until its bucket is closed: of one
    observer within one bucket, and of all within one bucket, at most `per_share` and `per_bucket` are kept at any time,
    those with the smallest ids, whatever order they come in. That is far more than honest observers issue.
    """

    per_observer: int = 65_536
    in_all: int = 262_144
    per_share: int = 16_384
    per_bucket: int = 131_072


def shares_to_drop(
    counts: Mapping[Share, int], *, first_bucket: int, open_bucket: int, bounds: HistoryBounds
) -> frozenset[Share]:
    """Return the shares that the bounds leave no room for.

    `counts`: observations of each share. `first_bucket`: what is before it is too old and goes in any case.
    `open_bucket`: the first one that is not closed; nothing in it or after it goes, nor does it take room.

    Every observer keeps its newest shares, up to an allowance that is the same for all: `per_observer`, or less where
    that would be more than `in_all` together. So one who says much makes room before one who says little.
    """
    dropped = {share for share in counts if share.bucket < first_bucket}
    shares: dict[str, list[Share]] = {}
    for share in sorted(counts, reverse=True):
        if first_bucket <= share.bucket < open_bucket:
            shares.setdefault(share.observer, []).append(share)
    # Of each observer, how much it would have in all if it kept this share and every newer one.
    sums = {observer: list(accumulate(counts[share] for share in newest)) for observer, newest in shares.items()}
    allowance = _allowance(list(sums.values()), bounds)
    for observer, newest in shares.items():
        dropped.update(newest[bisect_right(sums[observer], allowance) :])
    return frozenset(dropped)


def _allowance(sums: Sequence[Sequence[int]], bounds: HistoryBounds) -> int:
    """Return the largest allowance up to `per_observer` with which no more than `in_all` is kept."""

    def exceeds(allowance: int) -> bool:
        return sum(_kept(observer, allowance) for observer in sums) > bounds.in_all

    if not exceeds(bounds.per_observer):
        return bounds.per_observer
    return bisect_left(range(bounds.per_observer), True, key=exceeds) - 1


def _kept(sums: Sequence[int], allowance: int) -> int:
    """Return how much an observer keeps with an allowance."""
    count = bisect_right(sums, allowance)
    return sums[count - 1] if count else 0
