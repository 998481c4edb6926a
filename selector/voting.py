"""Tally of the votes of a route's stages: a pure function of ballots and weights, so that every stage can verify it."""

from collections.abc import Mapping, Sequence

from selector.consensus.reputation import NEWCOMER_WEIGHT


def weights_of(peers: Sequence[str], weights: Mapping[str, int]) -> tuple[int, ...]:
    """Return the weight of each peer's ballot: `weights` for members, NEWCOMER_WEIGHT for all others."""
    return tuple(weights.get(peer, NEWCOMER_WEIGHT) for peer in peers)


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

    Trimming a quarter of the weight at either end keeps a faulty minority from deciding.
    """
    if any(len(ballot) != len(methods) for ballot in ballots):
        raise ValueError("a ballot must have a score, or None, for each method")
    if weights is None or not any(weights):
        weights = [1] * len(ballots)
    result: dict[str, float] = {}
    for index, name in enumerate(methods):
        costs = [cost for ballot in ballots if (cost := ballot[index]) is not None]
        if costs and len(costs) == len(ballots):
            result[name] = _interquartile_mean(sorted(zip(costs, weights, strict=True)))
    return result


def _interquartile_mean(ordered: Sequence[tuple[float, int]]) -> float:
    """Return the mean between the weighted quartiles of ascending values, whose weights are not all 0."""
    total = sum(weight for _, weight in ordered)
    passed, mean = 0, 0.0  # weights in quarters, so that quartiles are whole numbers
    for value, weight in ordered:
        share = min(passed + 4 * weight, 3 * total) - max(passed, total)
        mean += value * max(0, share)
        passed += 4 * weight
    return mean / (2 * total)
