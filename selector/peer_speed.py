"""How fast peers are: what own jobs measured, and how far a told speed counts until then. Pure: no clock, no I/O.

A told speed costs nothing to announce. So it is bounded by what hardware can do, and one that is much better than what
was measured of others is a *promise*: it is taken for no better than the others, and believed for one job in ten only,
until jobs of this node have measured the peer: then what they showed replaces what it said.
"""

import math
import random
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

MAX_MEASURED: Final = 4096
"""Peers and models whose speed is remembered; the one measured longest ago makes room."""

PROVEN_JOBS: Final = 3
"""After so many jobs a peer's measured speed stands by itself, however good it is."""

PROMISE_RATIO: Final = 0.25
"""A told speed that takes less than this of the reference's time is a promise;"""

EXTRAORDINARY_RATIO: Final = 0.1
"""and so is a measured one that takes less than this of it, until it is proven: one job may be luck, or made up."""

UNTESTED_FACTOR: Final = 1.1
"""A peer that was never measured is taken for so much slower than the reference at least: the known comes first."""

EXPLORED_SHARE: Final = 0.1
"""Of the jobs that could go to a promise, so many do."""

UNKNOWN_BLOCK_S: Final = 0.003
"""What a block costs a token on a peer that has neither told nor shown its speed."""

PLAUSIBLE_BLOCK_S: Final = UNKNOWN_BLOCK_S / 10
"""What a block costs a token on a fast peer. Until anything is measured the reference is no less, whoever says so."""

MAX_BYTES_PER_S: Final = 1e13
"""No memory is read faster, whatever a peer says of its own."""

LEAST_READ_SHARE: Final = 1 / 32
"""Of a block's bytes, what a step reads at least: weights of fewer bits, few of many experts."""

NOISE: Final = 0.3
"""Standard deviation of one job's measurement, over what it measured;"""

LEAST_DEVIATION: Final = 0.15
"""and of an estimate, over the estimate: peers change, so that a new measurement always counts."""


class Share(NamedTuple):
    """A peer's part in what was measured.

    `units`: how many times its unit (a block, a row in a block) was paid. `told_s`: what the peer says that it took in
    all, from which its first estimate starts; `is_known`: it says so truly, being this node.
    """

    peer: str
    units: float
    told_s: float = 0.0
    is_known: bool = False


@dataclass(slots=True)
class _Estimate:
    mean_s: float
    variance: float
    jobs: int = 0


class Measurements:
    """What own jobs showed of each peer, for one unit of work: a diagonal Kalman filter over sums.

    A job shows only what all stages of its route took together. The difference to what was expected goes to each by
    how little is known of it, so that whoever was measured often keeps its figure, and what a stage keeps quiet about
    is not put down to those alone that tell.
    """

    def __init__(self) -> None:
        self._estimates: OrderedDict[tuple[str, Hashable], _Estimate] = OrderedDict()
        self._references: dict[Hashable, float | None] = {}
        """Of models, until the next job is measured."""

    def observe(self, model: Hashable, shares: Sequence[Share], seconds: float) -> None:
        """Take in what the peers of a route took together."""
        shares = [share for share in shares if share.units > 0]
        if not shares or not (math.isfinite(seconds) and seconds > 0):
            return
        self._references.clear()
        fair_s = seconds / sum(share.units for share in shares)
        estimates = [self._estimate(model, share, fair_s) for share in shares]
        expected_s = sum(s.units * e.mean_s for s, e in zip(shares, estimates, strict=True))
        spread = sum(s.units**2 * e.variance for s, e in zip(shares, estimates, strict=True))
        spread += (NOISE * min(seconds, expected_s)) ** 2
        for share, estimate in zip(shares, estimates, strict=True):
            gain = share.units * estimate.variance / spread
            mean_s = estimate.mean_s + gain * (seconds - expected_s)
            # One job that stalled, or was quick by chance, is not all that counts.
            most_s = 2 * estimate.mean_s if estimate.jobs else math.inf
            estimate.mean_s = max(1e-9, estimate.mean_s / 10, min(mean_s, most_s))
            estimate.variance *= 1 - gain * share.units
            estimate.variance = max(estimate.variance, (LEAST_DEVIATION * estimate.mean_s) ** 2)
            estimate.jobs += 1

    def seconds(self, peer: str, model: Hashable) -> float | None:
        """Return what a unit takes a peer; None where it was never measured."""
        found = self._estimates.get((peer, model))
        return found.mean_s if found else None

    def jobs(self, peer: str, model: Hashable) -> int:
        """Return how many jobs have measured a peer."""
        found = self._estimates.get((peer, model))
        return found.jobs if found else 0

    def of(self, peer: str) -> dict[Hashable, float]:
        """Return what a unit takes a peer, by model."""
        return {model: each.mean_s for (name, model), each in self._estimates.items() if name == peer}

    def reference_s(self, model: Hashable) -> float | None:
        """Return the best that was proven of any peer; where nothing is proven, the best that was measured."""
        if model not in self._references:
            found = [each for (_, of), each in self._estimates.items() if of == model]
            proven = [each.mean_s for each in found if each.jobs >= PROVEN_JOBS]
            if len(self._references) >= MAX_MEASURED:
                self._references.clear()
            self._references[model] = min(proven or [each.mean_s for each in found], default=None)
        return self._references[model]

    def _estimate(self, model: Hashable, share: Share, fair_s: float) -> _Estimate:
        """Return the estimate of a peer; a first one may be as wrong as all stages together took long."""
        key = share.peer, model
        if key not in self._estimates:
            told_s = share.told_s / share.units
            deviation_s = LEAST_DEVIATION * told_s if share.is_known else fair_s
            self._estimates[key] = _Estimate(told_s, max(1e-9, deviation_s) ** 2)
            if len(self._estimates) > MAX_MEASURED:
                self._estimates.popitem(last=False)
        self._estimates.move_to_end(key)
        return self._estimates[key]


class Claim(NamedTuple):
    """What a peer says a block takes it, 0 where it says nothing, and the least that its hardware would take."""

    peer: str
    told_s: float
    least_s: float = 0.0


class Speed(NamedTuple):
    """What a block is taken to cost on a peer, and whether that is less than it promises."""

    block_s: float
    is_promise: bool
    promised_s: float


def least_block_s(block_bytes: float, bytes_per_s: float | None) -> float:
    """Return the time below which no step passes a block. `bytes_per_s`: what the peer says of its memory."""
    return LEAST_READ_SHARE * block_bytes / min(bytes_per_s or MAX_BYTES_PER_S, MAX_BYTES_PER_S)


def judge(claims: Sequence[Claim], measured: Measurements, model: Hashable, own_peer: str) -> list[Speed]:
    """Return how fast each peer is taken to be: as measured, else as told within bounds.

    What this node says of itself counts as measured.
    """
    reference_s = _reference_s(claims, measured, model, own_peer)
    return [_speed(claim, measured, model, reference_s, is_own=claim.peer == own_peer) for claim in claims]


def _reference_s(claims: Sequence[Claim], measured: Measurements, model: Hashable, own_peer: str) -> float:
    own = [claim.told_s for claim in claims if claim.peer == own_peer and claim.told_s]
    shown_s = measured.reference_s(model)
    known = [*own, *([] if shown_s is None else [shown_s])]
    if known:
        return min(known)
    # Nothing was measured yet: the upper median of what is said, so that one who promises much does not set it, nor
    # many beyond what is plausible. What their hardware could do is no measure: that is also only said.
    said = sorted({claim.peer: _told_s(claim) for claim in claims}.values())
    return max(PLAUSIBLE_BLOCK_S, said[len(said) // 2]) if said else UNKNOWN_BLOCK_S


def _speed(claim: Claim, measured: Measurements, model: Hashable, reference_s: float, *, is_own: bool) -> Speed:
    jobs = measured.jobs(claim.peer, model)
    shown_s = measured.seconds(claim.peer, model)
    block_s = _told_s(claim) if shown_s is None else shown_s
    if is_own or jobs >= PROVEN_JOBS:
        return Speed(block_s, is_promise=False, promised_s=block_s)
    if block_s < (EXTRAORDINARY_RATIO if jobs else PROMISE_RATIO) * reference_s:
        return Speed(UNTESTED_FACTOR * reference_s, is_promise=True, promised_s=block_s)
    known_s = block_s if jobs else max(block_s, UNTESTED_FACTOR * reference_s)
    return Speed(known_s, is_promise=False, promised_s=block_s)


def _told_s(claim: Claim) -> float:
    return max(claim.told_s or UNKNOWN_BLOCK_S, claim.least_s)


class Exploration:
    """Which jobs try a promise: a bounded share of those that could, the same ones for the same random generator."""

    def __init__(self, rng: random.Random, share: float = EXPLORED_SHARE) -> None:
        self._rng = rng
        self._share = share
        self._credit = 0.0

    def draw(self, promising: Collection[str]) -> str | None:
        """Return the peer whose promise the next job may believe, if any. Counts that job."""
        if not promising:
            return None
        self._credit = min(1.0, self._credit + self._share)
        if self._credit < 1 - 1e-6:
            return None
        return self._rng.choice(sorted(promising))

    def spend(self) -> None:
        """Note that a job did try a promise."""
        self._credit = 0.0
