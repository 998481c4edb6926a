"""Rate limits: token buckets that refill at a steady rate. No clock of their own."""

from dataclasses import dataclass


class TokenBucket:
    """An allowance that refills at a steady rate up to a bound."""

    def __init__(self, rate: float, burst: float, now_s: float) -> None:
        """Start full: `burst` tokens, refilled with `rate` a second."""
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._filled_at_s = now_s

    def take(self, amount: float, now_s: float) -> bool:
        """Take tokens if there are enough."""
        self._fill(now_s)
        if amount > self._tokens:
            return False
        self._tokens -= amount
        return True

    def spend(self, amount: float, now_s: float) -> float:
        """Take tokens that may not be there yet; return after how many seconds the debt is paid."""
        self._fill(now_s)
        self._tokens -= amount
        return max(0.0, -self._tokens / self._rate)

    def _fill(self, now_s: float) -> None:
        self._tokens = min(self._burst, self._tokens + self._rate * (now_s - self._filled_at_s))
        self._filled_at_s = now_s


@dataclass(frozen=True, slots=True)
class Allowance:
    """A rate with a burst, in whatever unit."""

    per_s: float
    burst: float

    def bucket(self, now_s: float) -> TokenBucket:
        """Return a full bucket."""
        return TokenBucket(self.per_s, self.burst, now_s)
