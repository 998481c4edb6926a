"""Exponential backoff with jitter."""

import random


def backoff_s(failures: int, bounds_s: tuple[float, float], jitter: random.Random) -> float:
    """Return the pause after this many failures in a row: doubles from the first bound to the second, ±20 %."""
    first_s, longest_s = bounds_s
    return min(longest_s, first_s * 2.0 ** min(max(failures, 1) - 1, 32)) * jitter.uniform(0.8, 1.2)
