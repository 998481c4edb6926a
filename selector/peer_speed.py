"""Speed of peers: measured by own jobs, and until then as claimed, within bounds. Pure: no clock, no I/O.

A claim costs nothing to announce. So it is bounded by what hardware can do, and one that is much better than what was
measured of others is a *promise*: it counts for no more than the others' speed, except for the one job in ten that
explores it, until jobs of this node have measured the peer.
"""

import math
import random
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

MAX_MEASURED: Final = 4096
"""Peers and models whose speed is remembered; the least recently measured one is evicted."""

PROVEN_JOBS: Final = 3
"""Jobs after which a peer's measured speed counts as proven, however good it is."""

PROMISE_RATIO: Final = 0.25
"""A claimed speed below this ratio of the reference's time is a promise;"""

EXTRAORDINARY_RATIO: Final = 0.1
"""and so is a measured one below this ratio, until it is proven: one job may be luck, or made up."""

UNTESTED_FACTOR: Final = 1.1
"""An unmeasured peer counts as slower than the reference by at least this factor: known peers come first."""

EXPLORED_SHARE: Final = 0.1
"""Share of the jobs that could explore a promise that do."""

UNKNOWN_BLOCK_S: Final = 0.003
"""Seconds per block and token of a peer without claim or measurement."""

PLAUSIBLE_BLOCK_S: Final = UNKNOWN_BLOCK_S / 10
"""Seconds per block and token of a fast peer: the lower bound of the reference until anything is measured."""

MAX_BYTES_PER_S: Final = 1e13
"""Upper bound of a claimed memory bandwidth."""

LEAST_READ_SHARE: Final = 1 / 32
"""Least share of a block's bytes that a step reads: weights of fewer bits, few of many experts."""

NOISE: Final = 0.3
"""Relative standard deviation of one job's measurement;"""

LEAST_DEVIATION: Final = 0.15
"""and the least of an estimate: peers change, so that a new measurement always counts."""


class Share(NamedTuple):
    """A peer's part in a measurement.

    `units`: how many times its unit (a block, a row in a block) was computed. `claimed_s`: the time that the peer
    reports for them, from which its first estimate starts; `is_known`: the report is this node's own, and so true.
    """

    peer: str
    units: float
    claimed_s: float = 0.0
    is_known: bool = False


@dataclass(slots=True)
class _Estimate:
    mean_s: float
    variance: float
    jobs: int = 0


class Measurements:
    """Each peer's measured seconds per unit of work: a diagonal Kalman filter over sums.

    A job shows only the total time of its route's stages. The difference to the expected total is attributed to each
    stage by its uncertainty: a peer that was measured often keeps its estimate, and time that one stage hides is not
    attributed only to those that report theirs.
    """

    def __init__(self) -> None:
        self._estimates: OrderedDict[tuple[str, Hashable], _Estimate] = OrderedDict()
        self._references: dict[Hashable, float | None] = {}
        """By model, until the next job is measured."""

    def observe(self, model: Hashable, shares: Sequence[Share], seconds: float) -> None:
        """Learn from the total time of a route's peers."""
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
            # One job that stalled, or was quick by chance, must not dominate.
            most_s = 2 * estimate.mean_s if estimate.jobs else math.inf
            estimate.mean_s = max(1e-9, estimate.mean_s / 10, min(mean_s, most_s))
            estimate.variance *= 1 - gain * share.units
            estimate.variance = max(estimate.variance, (LEAST_DEVIATION * estimate.mean_s) ** 2)
            estimate.jobs += 1

    def seconds(self, peer: str, model: Hashable) -> float | None:
        """Return a peer's seconds per unit; None if it was not measured."""
        found = self._estimates.get((peer, model))
        return found.mean_s if found else None

    def jobs(self, peer: str, model: Hashable) -> int:
        """Return the number of jobs that measured a peer."""
        found = self._estimates.get((peer, model))
        return found.jobs if found else 0

    def of(self, peer: str) -> dict[Hashable, float]:
        """Return a peer's seconds per unit, by model."""
        return {model: each.mean_s for (name, model), each in self._estimates.items() if name == peer}

    def reference_s(self, model: Hashable) -> float | None:
        """Return the best proven time of any peer, else the best measured one."""
        if model not in self._references:
            found = [each for (_, of), each in self._estimates.items() if of == model]
            proven = [each.mean_s for each in found if each.jobs >= PROVEN_JOBS]
            if len(self._references) >= MAX_MEASURED:
                self._references.clear()
            self._references[model] = min(proven or [each.mean_s for each in found], default=None)
        return self._references[model]

    def _estimate(self, model: Hashable, share: Share, fair_s: float) -> _Estimate:
        """Return the estimate of a peer; a first one is as uncertain as the whole measurement."""
        key = share.peer, model
        if key not in self._estimates:
            claimed_s = share.claimed_s / share.units
            deviation_s = LEAST_DEVIATION * claimed_s if share.is_known else fair_s
            self._estimates[key] = _Estimate(claimed_s, max(1e-9, deviation_s) ** 2)
            if len(self._estimates) > MAX_MEASURED:
                self._estimates.popitem(last=False)
        self._estimates.move_to_end(key)
        return self._estimates[key]


class Claim(NamedTuple):
    """A peer's claimed seconds per block, 0 for none, and the least that its hardware would take."""

    peer: str
    claimed_s: float
    least_s: float = 0.0


class Speed(NamedTuple):
    """The assumed seconds per block of a peer, and whether it promises less."""

    block_s: float
    is_promise: bool
    promised_s: float


def least_block_s(block_bytes: float, bytes_per_s: float | None) -> float:
    """Return the least time of a step through a block. `bytes_per_s`: the peer's claimed memory bandwidth."""
    return LEAST_READ_SHARE * block_bytes / min(bytes_per_s or MAX_BYTES_PER_S, MAX_BYTES_PER_S)


def judge(claims: Sequence[Claim], measured: Measurements, model: Hashable, own_peer: str) -> list[Speed]:
    """Return the assumed speed of each peer: measured, else claimed within bounds. Own claims count as measured."""
    reference_s = _reference_s(claims, measured, model, own_peer)
    return [_speed(claim, measured, model, reference_s, is_own=claim.peer == own_peer) for claim in claims]


def _reference_s(claims: Sequence[Claim], measured: Measurements, model: Hashable, own_peer: str) -> float:
    own = [claim.claimed_s for claim in claims if claim.peer == own_peer and claim.claimed_s]
    measured_s = measured.reference_s(model)
    known = [*own, *([] if measured_s is None else [measured_s])]
    if known:
        return min(known)
    # Nothing was measured yet: the upper median of the claims, so that one extreme claim does not set it, nor many
    # implausible ones. What their hardware could do is not a measure either: it is claimed, too.
    claimed = sorted({claim.peer: _claimed_s(claim) for claim in claims}.values())
    return max(PLAUSIBLE_BLOCK_S, claimed[len(claimed) // 2]) if claimed else UNKNOWN_BLOCK_S


def _speed(claim: Claim, measured: Measurements, model: Hashable, reference_s: float, *, is_own: bool) -> Speed:
    jobs = measured.jobs(claim.peer, model)
    measured_s = measured.seconds(claim.peer, model)
    block_s = _claimed_s(claim) if measured_s is None else measured_s
    if is_own or jobs >= PROVEN_JOBS:
        return Speed(block_s, is_promise=False, promised_s=block_s)
    if block_s < (EXTRAORDINARY_RATIO if jobs else PROMISE_RATIO) * reference_s:
        return Speed(UNTESTED_FACTOR * reference_s, is_promise=True, promised_s=block_s)
    known_s = block_s if jobs else max(block_s, UNTESTED_FACTOR * reference_s)
    return Speed(known_s, is_promise=False, promised_s=block_s)


def _claimed_s(claim: Claim) -> float:
    return max(claim.claimed_s or UNKNOWN_BLOCK_S, claim.least_s)


class Exploration:
    """Decides which jobs explore a promise: a bounded share of those that could."""

    def __init__(self, rng: random.Random, share: float = EXPLORED_SHARE) -> None:
        self._rng = rng
        self._share = share
        self._credit = 0.0

    def draw(self, promising: Collection[str]) -> str | None:
        """Return the peer whose promise the next job may explore, if any. Counts that job."""
        if not promising:
            return None
        self._credit = min(1.0, self._credit + self._share)
        if self._credit < 1 - 1e-6:
            return None
        return self._rng.choice(sorted(promising))

    def spend(self) -> None:
        """Record that a job explored a promise."""
        self._credit = 0.0
