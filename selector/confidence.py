"""Confidence: how sure it is that a method is the right choice, from predicted costs and their uncertainty.

Where it is too low, predictions do not decide: the most promising methods are measured.
"""

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import Final

from selector.heuristic import CostEstimate

MIN_CONFIDENCE: Final = 0.7
"""Confidence below which the choice is a probe of the predicted best methods."""

WITHIN: Final = math.log(1.05)
"""Natural logarithm of cost by which another method must be better for a choice to be wrong."""

INTERVAL: Final = 1.645
"""Standard deviations between a prediction and either end of its 90 % interval, to which deviations are calibrated."""

_NORMAL: Final = NormalDist()


def chance_better(own: CostEstimate, other: CostEstimate) -> float:
    """Return the probability that another method costs less than the own one by more than `WITHIN`."""
    deviation = math.hypot(own.deviation, other.deviation)
    gain = own.log_cost - other.log_cost - WITHIN
    return _NORMAL.cdf(gain / deviation) if deviation > 0 else float(gain > 0)


def confidence(chosen: CostEstimate, others: Iterable[CostEstimate]) -> float:
    """Return the probability that the most promising other method is not better than the chosen one.

    The errors of like methods are alike, so that their chances do not add up.
    """
    return 1.0 - max((chance_better(chosen, other) for other in others), default=0.0)
