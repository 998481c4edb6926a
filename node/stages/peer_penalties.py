"""Per-peer records: what each peer has requested of the stages here, for `status`, and the backoff for its faults."""

import enum
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog

from protocol.identity import PeerId, SessionId
from protocol.messages import FailureReason, RefusalReason

MAX_PEERS: Final = 256
"""Peers that are remembered; of the others only what they hold is known."""

PENALTY_S: Final = (0.25, 2.0)
"""Backoff of a peer's Opens: after its first fault, doubled by each further one, and the longest.

Coordinators wait for 2.5 s until they look for another stage."""

LOGGED: Final = 10
"""Events of one kind and peer that are logged each; after that ever more rarely."""

FORGIVEN_AFTER_S: Final = 60.0
"""One fault less counts after each such time without any."""

_logger = structlog.get_logger(__name__)


class Charge(enum.Enum):
    """Whose next Opens wait for invalid rows."""

    OPENER = enum.auto()
    SENDER = enum.auto()
    NOBODY = enum.auto()
    """Unless the opener sent them itself."""


@dataclass(slots=True, kw_only=True)
class StagePeerStatistics:
    """What one peer has requested of the stages here.

    `opened`, `refused`, `failed`: sessions that it opened, and those that were refused or failed, by reason. `faults`:
    sessions that failed for invalid rows, by its fault as opener or as sender. `sessions`, `positions`, `bytes`: what
    its sessions hold now: KV positions reserved, and rows that wait in this process.
    """

    opened: int = 0
    refused: Mapping[RefusalReason, int] = field(default_factory=dict)
    failed: Mapping[FailureReason, int] = field(default_factory=dict)
    faults: int = 0
    sessions: int = 0
    positions: int = 0
    bytes: int = 0


@dataclass(slots=True)
class SessionTotals:
    """What other peers have requested of the stages here since the start, also those that are forgotten."""

    opened: int = 0
    refused: int = 0
    failed: int = 0


@dataclass(slots=True, kw_only=True)
class _Record(StagePeerStatistics):
    refused: Counter[RefusalReason] = field(default_factory=Counter)
    failed: Counter[FailureReason] = field(default_factory=Counter)
    score: float = 0.0
    """Faults that are not forgiven yet, as of the last one."""
    faulted_s: float = 0.0

    def score_at(self, now_s: float) -> float:
        return max(0.0, self.score - (now_s - self.faulted_s) / FORGIVEN_AFTER_S)


def is_worth_logging(count: int) -> bool:
    """Return whether an event that has happened so often is logged: a peer must not be able to fill the log."""
    return count <= LOGGED or (count % LOGGED == 0 and set(str(count // LOGGED)[1:]) <= {"0"})


class PeerPenalties:
    """Records by peer, of the most recent peers; logs what it counts."""

    def __init__(self, own: PeerId) -> None:
        """`own`: whose sessions are not in the totals."""
        self._own = own
        self._records: OrderedDict[PeerId, _Record] = OrderedDict()
        self.totals = SessionTotals()

    def opened(self, peer: PeerId) -> None:
        """Count a session that was opened."""
        self._of(peer).opened += 1
        self.totals.opened += peer != self._own

    def refused(self, peer: PeerId, reason: RefusalReason, *, session: SessionId, request_id: str, why: str) -> None:
        """Count a session that was refused."""
        refused = self._of(peer).refused
        refused[reason] += 1
        self.totals.refused += peer != self._own
        if is_worth_logging(count := refused[reason]):
            fields = {"session": str(session), "request_id": request_id or "-", "reason": why, "count": count}
            _logger.info("session refused", peer=peer, **fields)

    def failed(self, peer: PeerId, reason: FailureReason, *, session: SessionId, request_id: str, why: str) -> None:
        """Count a session of a peer that failed, whatever was at fault."""
        failed = self._of(peer).failed
        failed[reason] += 1
        self.totals.failed += peer != self._own
        if is_worth_logging(count := failed[reason]):
            fields = {"session": str(session), "request_id": request_id or "-", "message": why, "count": count}
            _logger.info("session failed", peer=peer, reason=reason, **fields)

    def fault(self, peer: PeerId, now_s: float, **fields: str) -> None:
        """Charge a peer with invalid rows: its next Opens wait. `fields`: for the log."""
        record = self._of(peer)
        record.faults += 1
        record.score = min(16.0, record.score_at(now_s) + 1)
        record.faulted_s = now_s
        if is_worth_logging(record.faults):
            _logger.warning("rows refused", charged=peer, count=record.faults, **fields)

    def penalty_s(self, peer: PeerId, now_s: float) -> float:
        """Return how long an Open of a peer is to wait."""
        record = self._records.get(peer)
        score = record.score_at(now_s) if record else 0.0
        first_s, longest_s = PENALTY_S
        return min(longest_s, first_s * 2 ** (score - 1)) if score > 0 else 0.0

    def statistics(self) -> Mapping[PeerId, StagePeerStatistics]:
        """Return the record of each peer, without what it holds."""
        return self._records

    def _of(self, peer: PeerId) -> _Record:
        record = self._records.setdefault(peer, _Record())
        self._records.move_to_end(peer)
        if len(self._records) > MAX_PEERS:
            self._records.popitem(last=False)
        return record
