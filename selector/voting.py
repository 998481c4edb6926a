"""Tally of the votes of a route's stages: a pure function of ballots and weights, so that every stage can verify it.

Reputation is earned by measuring, and cannot be spent on votes against what was measured: such a ballot has no weight.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, permutations
from typing import Final

from protocol.consensus_values import VALUE_SCALE, Cell
from selector.consensus.reputation import NEWCOMER_WEIGHT
from selector.consensus.table import TOLERANCE
from selector.task import PORTFOLIO

CONTRADICTION: Final = 2 * TOLERANCE / VALUE_SCALE
"""A vote contradicts measurements if it prefers, by more than this, a method that was slower by more than this."""

MAX_EXCESS: Final = 1.0
"""Natural logarithm: what a vote says of a method counts up to a factor of e from the median of the votes."""

BINDING_WORKLOADS: Final = 2
"""Workloads under all of which two methods must have been measured to be compared: a job may differ from one of them.
"""


def weights_of(peers: Sequence[str], weights: Mapping[str, int]) -> tuple[int, ...]:
    """Return the weight of each peer's ballot: `weights` for members, NEWCOMER_WEIGHT for all others."""
    return tuple(weights.get(peer, NEWCOMER_WEIGHT) for peer in peers)


def bound_weights(
    methods: Sequence[str],
    votes: Sequence[tuple[str, Mapping[str, float] | Mapping[str, float | None]]],
    weights: Mapping[str, int],
    measured: Callable[[str], Mapping[Cell, int]],
) -> tuple[int, ...]:
    """Return the weight of each peer's vote on `methods`, 0 for one that contradicts what the peer knows.

    `measured`: returns what was measured by a peer, or by others on its hardware.
    """
    plain = weights_of([peer for peer, _ in votes], weights)
    return tuple(
        0 if contradicts(measured(peer), {name: vote.get(name) for name in methods}) else weight
        for (peer, vote), weight in zip(votes, plain, strict=True)
    )


def contradicts(measured: Mapping[Cell, int], vote: Mapping[str, float | None]) -> bool:
    """Return whether a vote prefers a method that was clearly slower under every workload."""
    scored = {name: score for name, score in vote.items() if score is not None}
    workloads: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for cell, value in measured.items():
        if cell.method in scored:
            workloads[cell.workload][cell.method] = value / VALUE_SCALE
            baseline = PORTFOLIO[cell.method].baseline.name if cell.method in PORTFOLIO else ""
            if baseline in scored:
                workloads[cell.workload][baseline] = 0.0
    for slow, fast in permutations(scored, 2):
        if scored[fast] - scored[slow] > CONTRADICTION:
            ratios = [found[slow] - found[fast] for found in workloads.values() if slow in found and fast in found]
            if len(ratios) >= BINDING_WORKLOADS and min(ratios) > CONTRADICTION:
                return True
    return False


def tally(
    methods: Sequence[str], ballots: Sequence[Sequence[float | None]], weights: Sequence[int] | None = None
) -> str | None:
    """Return the method with the lowest score among those that every stage offers, or None.

    `methods`: in the coordinator's order of preference, which breaks ties. `ballots`: for each stage the log cost of
    each method, in the same order; None for one it does not offer. `weights`: of the ballots; None: all equal.
    """
    scored = scores(methods, ballots, weights)
    return min(scored, key=lambda name: (scored[name], methods.index(name)), default=None)


def scores(
    methods: Sequence[str], ballots: Sequence[Sequence[float | None]], weights: Sequence[int] | None = None
) -> Mapping[str, float]:
    """Return the score of every method that all stages offer: the weighted interquartile mean of its log costs.

    Trimming a quarter of the weight at either end leaves out a faulty minority of up to a quarter. Of a larger one, as
    one of three ballots is, some weight remains; it counts as at most MAX_EXCESS from the median, so that no vote,
    however absurd, decides between methods that the others think clearly different.
    """
    if any(len(ballot) != len(methods) for ballot in ballots):
        raise ValueError("a ballot must have a score, or None, for each method")
    if weights is None or not any(weights):
        weights = [1] * len(ballots)
    result: dict[str, float] = {}
    for index, name in enumerate(methods):
        costs = [cost for ballot in ballots if (cost := ballot[index]) is not None]
        if costs and len(costs) == len(ballots):
            result[name] = _interquartile_mean(_bounded(sorted(zip(costs, weights, strict=True))))
    return result


def _bounded(ordered: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Return ascending values, none further than MAX_EXCESS from their weighted median."""
    total = sum(weight for _, weight in ordered)
    passed = list(accumulate(weight for _, weight in ordered))
    below = next(value for (value, _), sum_ in zip(ordered, passed, strict=True) if 2 * sum_ >= total)
    above = next(value for (value, _), sum_ in zip(ordered, passed, strict=True) if 2 * sum_ > total)
    median = (below + above) / 2
    return [(min(max(value, median - MAX_EXCESS), median + MAX_EXCESS), weight) for value, weight in ordered]


def _interquartile_mean(ordered: Sequence[tuple[float, int]]) -> float:
    """Return the mean between the weighted quartiles of ascending values, whose weights are not all 0."""
    total = sum(weight for _, weight in ordered)
    passed, mean = 0, 0.0  # weights in quarters, so that quartiles are whole numbers
    for value, weight in ordered:
        share = min(passed + 4 * weight, 3 * total) - max(passed, total)
        mean += value * max(0, share)
        passed += 4 * weight
    return mean / (2 * total)
