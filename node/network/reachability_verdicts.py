"""What dial-backs say of the addresses of this node, and the verdict on it as a whole. No I/O, no clock of its own."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from cachetools import LRUCache

from node.network.addresses import TcpAddress
from protocol.announcements import Verdict

VALID_S: Final = 1800.0
"""How long a report counts: mappings of a NAT come and go."""

MAX_TRACKED: Final = 32
MAX_REPORTS: Final = 16
MIN_RANGES: Final = 2
"""Ranges that have to agree where one party alone gains by a lie: it may have any number of peers in its own."""


@dataclass(frozen=True, slots=True)
class _Report:
    reached: bool
    at_s: float


@dataclass(slots=True)
class _Reports:
    """The latest report of each range on one address, and when each was last asked, whether it reported or not."""

    by_range: "LRUCache[str, _Report]" = field(default_factory=lambda: LRUCache(MAX_REPORTS))
    asked_at_s: "LRUCache[str, float]" = field(default_factory=lambda: LRUCache(MAX_REPORTS))


class Verdicts:
    """Reports on the addresses of this node, one of each address range: identities cost nothing.

    A success weighs more than any number of failures: it was seen from here, too, while a server may claim a failure.
    But which address was dialled is only claimed: so one that only others have told us of takes peers in two ranges.
    A failure is only claimed: so an address that we know ourselves fails when servers in two ranges say so.
    """

    def __init__(self, observers: Callable[[TcpAddress], Collection[str] | None] = lambda address: None) -> None:
        """`observers`: the ranges of the peers that see us at an address; None for one that we know ourselves."""
        self._observers = observers
        self._reports: LRUCache[str, _Reports] = LRUCache(MAX_TRACKED)

    def record(self, address: TcpAddress, server_range: str, *, reached: bool, now_s: float) -> None:
        """Record what a server found."""
        reports = self._reports.setdefault(address.transport, _Reports())
        reports.by_range[server_range] = _Report(reached, now_s)

    def of(self, address: TcpAddress, now_s: float) -> Verdict:
        """Return the verdict on one address."""
        recent = self._recent(address, now_s)
        successes = {at for at, each in recent.items() if each.reached}
        observers = self._observers(address)
        if successes and (observers is None or len(successes.union(observers)) >= MIN_RANGES):
            return Verdict.PUBLIC
        failures = len(recent) - len(successes)
        return Verdict.PRIVATE if failures >= (MIN_RANGES if observers is None else 1) else Verdict.UNKNOWN

    def _recent(self, address: TcpAddress, now_s: float) -> dict[str, _Report]:
        reports = self._reports.get(address.transport)
        return {at: each for at, each in reports.by_range.items() if now_s - each.at_s < VALID_S} if reports else {}

    def has_reached(self, address: TcpAddress, server_range: str) -> bool:
        """Return whether the latest report of a range is a success."""
        reports = self._reports.get(address.transport)
        report = reports.by_range.get(server_range) if reports else None
        return report is not None and report.reached

    def ask(self, address: TcpAddress, server_range: str, now_s: float) -> None:
        """Note that a range is asked about an address: it may never report."""
        self._reports.setdefault(address.transport, _Reports()).asked_at_s[server_range] = now_s

    def asked_at_s(self, address: TcpAddress, server_range: str) -> float:
        """Return when a range was last asked about an address; minus infinity if never."""
        reports = self._reports.get(address.transport)
        return reports.asked_at_s.get(server_range, -math.inf) if reports else -math.inf

    def overall(self, candidates: Iterable[TcpAddress], now_s: float) -> Verdict:
        """Return the verdict on a node with these addresses.

        That of IPv4, where it has any: many peers have nothing else. A name that the user announces counts as public:
        servers dial numbers only.
        """
        candidates = list(candidates)
        if any(each.kind not in {"ip4", "ip6"} for each in candidates):
            return Verdict.PUBLIC
        found = {self.of(each, now_s) for each in _decisive(candidates)}
        if Verdict.PUBLIC in found:
            return Verdict.PUBLIC
        return Verdict.PRIVATE if Verdict.PRIVATE in found else Verdict.UNKNOWN

    def is_doubtful(self, candidates: Sequence[TcpAddress], now_s: float) -> bool:
        """Return whether somebody failed to reach these addresses, and nobody did.

        Too little for a verdict where one range alone says so, but it may be the only one that there is to be asked.
        """
        found = [report.reached for each in _decisive(candidates) for report in self._recent(each, now_s).values()]
        return bool(found) and not any(found)


def _decisive(candidates: Sequence[TcpAddress]) -> Sequence[TcpAddress]:
    return [each for each in candidates if each.kind == "ip4"] or candidates
