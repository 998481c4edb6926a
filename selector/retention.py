"""Retention of the history: a pure rule, so that peers with equal histories evict the same observations.

The unit of eviction is a share: the observations that one observer issued within one time bucket. Only shares of
closed buckets are evicted, and only whole.
"""

import math
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
    """Limits on stored observations: with up to three open buckets 672 MiB in all.

    In bytes of their envelopes, each rounded up to a step of 2 KiB.

    `observer_bytes` and `all_bytes` apply to closed buckets. Against floods, `share_bytes` and `bucket_bytes` apply at
    any time to one bucket: what counts least stays, of what counts the same the smallest ids, whatever the order of
    arrival. What is dropped makes no room for what counts as much or more, so peers that dropped it and peers that
    never had it agree. Honest observers issue far less: one of a route of three stages takes 1.5 kB, and so counts no
    more than the smallest that anybody can make.
    """

    observer_bytes: int = 96 << 20
    all_bytes: int = 384 << 20
    share_bytes: int = 24 << 20
    bucket_bytes: int = 96 << 20


def shares_to_drop(
    sizes: Mapping[Share, int],
    *,
    first_bucket: int,
    open_bucket: int,
    bounds: HistoryBounds,
    last_bucket: float = math.inf,
) -> frozenset[Share]:
    """Return the shares to evict.

    `sizes`: what each share counts. `first_bucket`, `last_bucket`: older and later shares are evicted in any case.
    `open_bucket`: the first open one; shares from there on are neither evicted nor counted.

    Every observer keeps its newest shares up to one allowance for all: `observer_bytes`, or less if the sum would
    exceed `all_bytes`. So the most prolific observers are cut first.
    """
    dropped = {share for share in sizes if not first_bucket <= share.bucket <= last_bucket}
    shares: dict[str, list[Share]] = {}
    for share in sorted(sizes, reverse=True):
        if first_bucket <= share.bucket < open_bucket:
            shares.setdefault(share.observer, []).append(share)
    # For each observer, the bytes of this share and all newer ones.
    sums = {observer: list(accumulate(sizes[share] for share in newest)) for observer, newest in shares.items()}
    allowance = _allowance(list(sums.values()), bounds)
    for observer, newest in shares.items():
        dropped.update(newest[bisect_right(sums[observer], allowance) :])
    return frozenset(dropped)


def _allowance(sums: Sequence[Sequence[int]], bounds: HistoryBounds) -> int:
    """Return the largest allowance up to `observer_bytes` that keeps at most `all_bytes`."""

    def exceeds(allowance: int) -> bool:
        return sum(_kept(observer, allowance) for observer in sums) > bounds.all_bytes

    if not exceeds(bounds.observer_bytes):
        return bounds.observer_bytes
    return bisect_left(range(bounds.observer_bytes), True, key=exceeds) - 1


def _kept(sums: Sequence[int], allowance: int) -> int:
    """Return the bytes that an observer keeps with an allowance."""
    count = bisect_right(sums, allowance)
    return sums[count - 1] if count else 0
