"""Reliability of peers, by the outcome of the jobs that they took part in. Failures fade with time.

A peer that lagged, without progress where some was due, is avoided for longer than one that reported a failure: a lag
costs every job its whole timeout.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from protocol.identity import ModelId

MAX_PEERS: Final = 4096
"""Peers remembered; the least recently used one is evicted."""

HALF_LIFE_S: Final = 120.0
"""After this long a failure counts half."""

BACKOFF_S: Final = (1.0, 60.0)
"""First and longest backoff after a failure; it doubles with each that is remembered."""

LAG_HALF_LIFE_S: Final = 1800.0
"""After this long a lag counts half."""

LAG_BACKOFF_S: Final = (30.0, 3600.0)
"""First and longest backoff after a lag; it doubles with each that is remembered."""

DOUBTFUL_LAG: Final = 0.5
"""Weight of a lag of an unmeasured peer, until it serves a job."""

DISPUTED: Final = 0.5
"""Weight of a failure that one of two peers is at fault for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRecord:
    """What a node's own jobs have shown of a peer.

    `served`, `failed`, `lagged`: jobs that it completed, reported as failed, and made no progress in. `trust`: what its
    predicted cost is divided by. `avoided_s`: remaining time in which it is used only where there is no other peer.
    `block_s`: measured seconds per block and token, by model.
    """

    served: int = 0
    failed: int = 0
    lagged: int = 0
    trust: float = 1.0
    avoided_s: float = 0.0
    block_s: Mapping[ModelId, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Score:
    """Events that fade, and the end of the backoff for them."""

    half_life_s: float
    backoff_s: tuple[float, float]
    weight: float = 0.0
    counted_at_s: float = 0.0
    avoided_until_s: float = -math.inf

    def fade(self, now_s: float) -> float:
        self.weight *= math.pow(0.5, max(0.0, now_s - self.counted_at_s) / self.half_life_s)
        self.counted_at_s = now_s
        return self.weight

    def count(self, now_s: float, weight: float = 1.0) -> None:
        first_s, longest_s = self.backoff_s
        backoff_s = min(longest_s, first_s * 2 ** min(64.0, self.fade(now_s)))
        self.weight += weight
        self.avoided_until_s = now_s + backoff_s


@dataclass(slots=True)
class _Record:
    served: int = 0
    failed: int = 0
    lagged: int = 0
    failures: _Score = field(default_factory=lambda: _Score(HALF_LIFE_S, BACKOFF_S))
    lags: _Score = field(default_factory=lambda: _Score(LAG_HALF_LIFE_S, LAG_BACKOFF_S))
    doubts: _Score = field(default_factory=lambda: _Score(LAG_HALF_LIFE_S, LAG_BACKOFF_S))
    """Lags while the peer was unmeasured."""

    def avoided_until_s(self) -> float:
        return max(score.avoided_until_s for score in (self.failures, self.lags, self.doubts))

    def trust(self, now_s: float) -> float:
        return 1 / (1 + sum(score.fade(now_s) for score in (self.failures, self.lags, self.doubts)))


class Reliability:
    """The records of peers that took part in jobs."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def failed(self, peer: str, now_s: float) -> None:
        """Record a failure: the peer is avoided for a while, longer each time."""
        record = self._touch(peer)
        record.failed += 1
        record.failures.count(now_s)

    def disputed(self, peer: str, now_s: float) -> None:
        """Record that a peer blamed another, or was blamed by one: it counts half, and no job avoids it for that."""
        failures = self._touch(peer).failures
        failures.fade(now_s)
        failures.weight += DISPUTED

    def lagged(self, peer: str, now_s: float, *, is_sure: bool = True) -> None:
        """Record a lag: the peer is avoided for longer, also when it serves other jobs.

        `is_sure`: its speed was known; if not, the lag counts less, and only until the peer serves a job.
        """
        record = self._touch(peer)
        record.lagged += 1
        if is_sure:
            record.lags.count(now_s)
        else:
            record.doubts.count(now_s, DOUBTFUL_LAG)

    def served(self, peer: str, now_s: float) -> None:
        """Record a completed job: half of the peer's failures and all doubts are forgiven."""
        record = self._touch(peer)
        record.served += 1
        record.failures.avoided_until_s = now_s
        record.failures.weight = record.failures.fade(now_s) / 2
        if record.failures.weight < 1 / 8:
            record.failures.weight = 0.0
        record.doubts.weight, record.doubts.avoided_until_s = 0.0, now_s

    def avoided(self, now_s: float) -> frozenset[str]:
        """Return the peers that are avoided now."""
        return frozenset(peer for peer, record in self._records.items() if now_s < record.avoided_until_s())

    def trust(self, peer: str, now_s: float) -> float:
        """Return the share of jobs that a peer is expected to complete: 1 for an unknown peer."""
        record = self._records.get(peer)
        return 1.0 if record is None else record.trust(now_s)

    def record(self, peer: str, now_s: float) -> PeerRecord:
        """Return the record of a peer."""
        found = self._records.get(peer)
        if found is None:
            return PeerRecord()
        return PeerRecord(
            served=found.served,
            failed=found.failed,
            lagged=found.lagged,
            trust=found.trust(now_s),
            avoided_s=max(0.0, found.avoided_until_s() - now_s),
        )

    def peers(self) -> tuple[str, ...]:
        """Return the remembered peers, at most MAX_PEERS."""
        return tuple(self._records)

    def _touch(self, peer: str) -> _Record:
        record = self._records.setdefault(peer, _Record())
        self._records.move_to_end(peer)
        if len(self._records) > MAX_PEERS:
            self._records.popitem(last=False)
        return record
