"""Whom to rely on: what came of the jobs that a peer took part in of late. A failure weighs less with every minute."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

MAX_PEERS: Final = 4096
"""Peers remembered; the one that did nothing for longest makes room."""

HALF_LIFE_S: Final = 120.0
"""After this long a failure counts half."""

BACKOFF_S: Final = (1.0, 60.0)
"""How long a peer is left alone after a failure, doubled by each that is remembered, and the longest."""


@dataclass(slots=True)
class _Record:
    failures: float = 0.0
    counted_at_s: float = 0.0
    avoided_until_s: float = 0.0


class Reliability:
    """What is remembered of the peers that failed."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def failed(self, peer: str, now_s: float) -> None:
        """Note that a peer failed: it is avoided for a while, longer each time."""
        record = self._records.setdefault(peer, _Record())
        self._records.move_to_end(peer)
        if len(self._records) > MAX_PEERS:
            self._records.popitem(last=False)
        first_s, longest_s = BACKOFF_S
        backoff_s = min(longest_s, first_s * 2 ** self._fade(record, now_s))
        record.failures += 1
        record.avoided_until_s = now_s + backoff_s

    def served(self, peer: str, now_s: float) -> None:
        """Note that a peer bore a job to its end: half of what is held against it is forgiven."""
        if (record := self._records.get(peer)) is None:
            return
        record.avoided_until_s = now_s
        record.failures = self._fade(record, now_s) / 2
        if record.failures < 1 / 8:
            del self._records[peer]

    def avoided(self, now_s: float) -> frozenset[str]:
        """Return the peers that are left alone now."""
        return frozenset(peer for peer, record in self._records.items() if now_s < record.avoided_until_s)

    def trust(self, peer: str, now_s: float) -> float:
        """Return the share of jobs that a peer is expected to bear to their end: 1 where nothing is known of it."""
        record = self._records.get(peer)
        return 1.0 if record is None else 1 / (1 + self._fade(record, now_s))

    def _fade(self, record: _Record, now_s: float) -> float:
        record.failures *= math.pow(0.5, max(0.0, now_s - record.counted_at_s) / HALF_LIFE_S)
        record.counted_at_s = now_s
        return record.failures
