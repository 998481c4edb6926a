"""Speed-up with its confidence interval, from paired measurements."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from scipy.special import stdtrit

CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Speedup:
    """A mean speed-up with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def is_bounded(self) -> bool:
        """Whether the interval is finite: that of a single pair is not."""
        return math.isfinite(self.high)


def speedup_of(log_ratios: Sequence[float]) -> Speedup:
    """Return the geometric mean of the speed-up with Student's interval of the logarithms.

    `log_ratios`: natural logarithms of cost over the other's cost, at least one.
    """
    mean = statistics.fmean(log_ratios)
    count = len(log_ratios)
    if count < 2:
        return Speedup(math.exp(-mean), 0.0, math.inf)
    half = stdtrit(count - 1, (1 + CONFIDENCE) / 2) * statistics.stdev(log_ratios) / math.sqrt(count)
    return Speedup(math.exp(-mean), math.exp(-mean - half), math.exp(-mean + half))
