"""Rate limits of a gossip topic by publisher: what exceeds them costs no signature check and is not forwarded."""

from cachetools import LRUCache

from node.util.token_bucket import Allowance, TokenBucket
from protocol.identity import PeerId

MAX_PUBLISHERS = 8192
"""Publishers whose messages are counted; the least recently heard one is evicted."""


class PublisherLimits:
    """A token bucket for each publisher, and one for all together."""

    def __init__(self, each: Allowance, total: Allowance) -> None:
        self._each = each
        self._total = total.bucket(0.0)
        self._publishers: LRUCache[PeerId, TokenBucket] = LRUCache(MAX_PUBLISHERS)

    def take(self, publisher: PeerId, now_s: float, *, is_trusted: bool = False) -> bool:
        """Return whether a message is within the limits; of a trusted publisher only within its own."""
        bucket = self._publishers.setdefault(publisher, self._each.bucket(now_s))
        return bucket.take(1, now_s) and (is_trusted or self._total.take(1, now_s))
