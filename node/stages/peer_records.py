"""What each peer has asked of the stages here, and how that went: for `status`, and so that offenders pay."""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from protocol.identity import PeerId
from protocol.messages import FailureReason, RefusalReason

MAX_PEERS: Final = 256
"""Peers that are remembered; of the others only what they hold is known."""

PENALTY_S: Final = (0.25, 2.0)
"""How long an Open of a peer waits after its first fault, doubled by each one after, and the longest.

Coordinators wait for 2.5 s until they look for another stage."""

LOGGED: Final = 10
"""Times that the log tells of the same kind of thing done by the same peer; after that ever more rarely."""

FORGIVEN_AFTER_S: Final = 60.0
"""Each time so long without a fault takes one away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePeerStatistics:
    """What one peer has asked of the stages here.

    `opened`, `refused`, `failed`: sessions that it opened, and those that were refused or failed, by reason. `faults`:
    sessions that failed for rows that could not be taken, by its fault as opener or as sender. `sessions`, `positions`,
    `bytes`: what its sessions hold now: KV positions reserved, and rows that wait in this process.
    """

    opened: int = 0
    refused: Mapping[RefusalReason, int] = field(default_factory=dict)
    failed: Mapping[FailureReason, int] = field(default_factory=dict)
    faults: int = 0
    sessions: int = 0
    positions: int = 0
    bytes: int = 0


def is_worth_logging(count: int) -> bool:
    """Whether the log is to tell of something that has happened so often: a peer must not be able to fill it."""
    return count <= LOGGED or (count % LOGGED == 0 and set(str(count // LOGGED)[1:]) <= {"0"})


@dataclass(slots=True)
class _Record:
    opened: int = 0
    refused: Counter[RefusalReason] = field(default_factory=Counter)
    failed: Counter[FailureReason] = field(default_factory=Counter)
    faults: int = 0
    score: float = 0.0
    """Faults that are not forgiven yet, as of the last one."""
    faulted_s: float = 0.0


class PeerRecords:
    """Counts by peer, of the peers that had to do with us last."""

    def __init__(self) -> None:
        self._records: OrderedDict[PeerId, _Record] = OrderedDict()

    def opened(self, peer: PeerId) -> None:
        """Count a session that was opened."""
        self._of(peer).opened += 1

    def refused(self, peer: PeerId, reason: RefusalReason) -> int:
        """Count a session that was refused; return how many were, for this reason."""
        record = self._of(peer)
        record.refused[reason] += 1
        return record.refused[reason]

    def failed(self, peer: PeerId, reason: FailureReason) -> int:
        """Count a session of a peer that failed, whoever was at fault; return how many did, for this reason."""
        record = self._of(peer)
        record.failed[reason] += 1
        return record.failed[reason]

    def fault(self, peer: PeerId, now_s: float) -> int:
        """Count rows that could not be taken by a peer's fault, and return how often they were: its next Opens wait."""
        record = self._of(peer)
        record.faults += 1
        record.score = min(16.0, self._score(record, now_s) + 1)
        record.faulted_s = now_s
        return record.faults

    def penalty_s(self, peer: PeerId, now_s: float) -> float:
        """Return how long an Open of a peer is to wait."""
        record = self._records.get(peer)
        score = self._score(record, now_s) if record else 0.0
        first_s, longest_s = PENALTY_S
        return min(longest_s, first_s * 2 ** (score - 1)) if score > 0 else 0.0

    def statistics(self) -> Iterator[tuple[PeerId, StagePeerStatistics]]:
        """Yield the counts of each peer, without what it holds."""
        for peer, record in self._records.items():
            counts = StagePeerStatistics(
                opened=record.opened, refused=dict(record.refused), failed=dict(record.failed), faults=record.faults
            )
            yield peer, counts

    def _score(self, record: _Record, now_s: float) -> float:
        return max(0.0, record.score - (now_s - record.faulted_s) / FORGIVEN_AFTER_S)

    def _of(self, peer: PeerId) -> _Record:
        record = self._records.setdefault(peer, _Record())
        self._records.move_to_end(peer)
        if len(self._records) > MAX_PEERS:
            self._records.popitem(last=False)
        return record
