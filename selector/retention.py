"""Retention of the history: a pure rule, so that peers with equal histories evict the same observations.

The unit of eviction is a share: the observations that one observer issued within one time bucket. Only shares of
closed buckets are evicted, and only whole.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple


class Share(NamedTuple):
    """The observations of one observer in one time bucket."""

    bucket: int
    observer: str


@dataclass(frozen=True, slots=True)
class HistoryBounds:
    """Limits on stored observations.

    `per_observer` and `in_all` apply to closed buckets. Against floods, `per_share` and `per_bucket` apply at any time
    to one bucket: the smallest ids stay, whatever the order of arrival. Honest observers issue far fewer.
    """

    per_observer: int = 65_536
    in_all: int = 262_144
    per_share: int = 16_384
    per_bucket: int = 131_072


def shares_to_drop(
    counts: Mapping[Share, int], *, first_bucket: int, open_bucket: int, bounds: HistoryBounds
) -> frozenset[Share]:
    """Return the shares to evict.

    `counts`: observations per share. `first_bucket`: older shares are evicted in any case. `open_bucket`: the first
    open one; shares from there on are neither evicted nor counted.

    Every observer keeps its newest shares up to one allowance for all: `per_observer`, or less if the sum would exceed
    `in_all`. So the most prolific observers are cut first.
    """
    dropped = {share for share in counts if share.bucket < first_bucket}
    shares: dict[str, list[Share]] = {}
    for share in sorted(counts, reverse=True):
        if first_bucket <= share.bucket < open_bucket:
            shares.setdefault(share.observer, []).append(share)
    # For each observer, the observations in this share and all newer ones.
    sums = {observer: list(accumulate(counts[share] for share in newest)) for observer, newest in shares.items()}
    allowance = _allowance(list(sums.values()), bounds)
    for observer, newest in shares.items():
        dropped.update(newest[bisect_right(sums[observer], allowance) :])
    return frozenset(dropped)


def _allowance(sums: Sequence[Sequence[int]], bounds: HistoryBounds) -> int:
    """Return the largest allowance up to `per_observer` that keeps at most `in_all` observations."""

    def exceeds(allowance: int) -> bool:
        return sum(_kept(observer, allowance) for observer in sums) > bounds.in_all

    if not exceeds(bounds.per_observer):
        return bounds.per_observer
    return bisect_left(range(bounds.per_observer), True, key=exceeds) - 1


def _kept(sums: Sequence[int], allowance: int) -> int:
    """Return the observations that an observer keeps with an allowance."""
    count = bisect_right(sums, allowance)
    return sums[count - 1] if count else 0
