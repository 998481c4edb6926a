"""Rate limits: token buckets that refill at a steady rate. They have no clock of their own."""

from dataclasses import dataclass


class TokenBucket:
    """Holds up to `burst` tokens, and refills with `rate` tokens a second. Starts full."""

    def __init__(self, rate: float, burst: float, now_s: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._filled_at_s = now_s

    def take(self, amount: float, now_s: float) -> bool:
        """Take tokens if there are enough; return whether there were."""
        self._fill(now_s)
        if amount > self._tokens:
            return False
        self._tokens -= amount
        return True

    def give_back(self, amount: float, now_s: float) -> None:
        """Return tokens that were taken for nothing."""
        self._fill(now_s)
        self._tokens = min(self._burst, self._tokens + amount)

    def level(self, now_s: float) -> float:
        """Return how many tokens there are; fewer than none are a debt."""
        self._fill(now_s)
        return self._tokens

    def spend(self, amount: float, now_s: float) -> float:
        """Take tokens, as a debt if need be; return the seconds until the debt is refilled."""
        self._fill(now_s)
        self._tokens -= amount
        return max(0.0, -self._tokens / self._rate)

    def _fill(self, now_s: float) -> None:
        self._tokens = min(self._burst, self._tokens + self._rate * (now_s - self._filled_at_s))
        self._filled_at_s = now_s


@dataclass(frozen=True, slots=True)
class Allowance:
    """A rate and a burst, in any unit."""

    per_s: float
    burst: float

    def bucket(self, now_s: float) -> TokenBucket:
        """Return a full bucket."""
        return TokenBucket(self.per_s, self.burst, now_s)
