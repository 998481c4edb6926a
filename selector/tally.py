"""What the votes of a route's stages come to. Everybody who has the ballots finds the same."""

from collections.abc import Mapping, Sequence


def tally(methods: Sequence[str], ballots: Sequence[Sequence[float | None]]) -> str | None:
    """Return the method with the least score, of those that every stage offers; None where there is none.

    `methods`: the coordinator's preference first; it decides between equal scores. `ballots`: of each stage the log
    cost of each method, in the same order; None for one that it does not offer.
    """
    scored = scores(methods, ballots)
    return min(scored, key=lambda name: (scored[name], methods.index(name)), default=None)


def scores(methods: Sequence[str], ballots: Sequence[Sequence[float | None]]) -> Mapping[str, float]:
    """Return the score of every method that all stages offer: the trimmed mean of its log costs.

    A quarter of the ballots, rounded down, is left out at either end, so that few stages that lie or err do not decide.
    """
    if any(len(ballot) != len(methods) for ballot in ballots):
        raise ValueError("a ballot has a score for each method, or None")
    result: dict[str, float] = {}
    for index, name in enumerate(methods):
        costs = [cost for ballot in ballots if (cost := ballot[index]) is not None]
        if len(costs) == len(ballots):
            result[name] = _trimmed_mean(costs)
    return result


def _trimmed_mean(values: Sequence[float]) -> float:
    ordered = sorted(values)
    cut = len(ordered) // 4
    kept = ordered[cut : len(ordered) - cut]
    return sum(kept) / len(kept) if kept else 0.0
