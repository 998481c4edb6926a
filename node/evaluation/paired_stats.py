"""What paired measurements say: the speed-up, and how far off it may be."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from scipy.special import stdtrit

CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Speedup:
    """A speed-up over what it was paired with, and the interval that it is in with 95 % confidence."""

    mean: float
    low: float
    high: float

    @property
    def is_bounded(self) -> bool:
        """Whether there is an interval at all: a single pair gives none."""
        return math.isfinite(self.high)

    @property
    def excludes_tie(self) -> bool:
        """Whether it is faster or slower beyond doubt."""
        return self.low > 1 or self.high < 1


def speedup_of(log_ratios: Sequence[float]) -> Speedup:
    """Return the speed-up in at least one pair. `log_ratios`: natural logarithms of cost over the other's cost.

    The mean is geometric; the interval is Student's, of the logarithms, and without bounds for a single pair.
    """
    mean = statistics.fmean(log_ratios)
    count = len(log_ratios)
    if count < 2:
        return Speedup(math.exp(-mean), 0.0, math.inf)
    half = stdtrit(count - 1, (1 + CONFIDENCE) / 2) * statistics.stdev(log_ratios) / math.sqrt(count)
    return Speedup(math.exp(-mean), math.exp(-mean - half), math.exp(-mean + half))
