"""What dial-backs say of the addresses of this node, and the verdict on it as a whole. No I/O, no clock of its own."""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

from cachetools import LRUCache

from node.network.addresses import TcpAddress
from protocol.announcements import Verdict
from protocol.identity import PeerId

VALID_S: Final = 1800.0
"""How long a report counts: mappings of a NAT come and go."""

MAX_TRACKED: Final = 32
MAX_REPORTS: Final = 16
MIN_RANGES: Final = 2
"""Ranges in which there have to be peers that observed an address, or reached it: one party may be both."""


@dataclass(frozen=True, slots=True)
class _Report:
    reached: bool
    at_s: float
    range: str | None
    """Of the server."""


@dataclass(slots=True)
class _Reports:
    """The latest report of each server on one address, and when each was last asked, whether it reported or not."""

    by_server: "LRUCache[PeerId, _Report]" = field(default_factory=lambda: LRUCache(MAX_REPORTS))
    asked_at_s: "LRUCache[PeerId, float]" = field(default_factory=lambda: LRUCache(MAX_REPORTS))


class Verdicts:
    """Reports on the addresses of this node.

    A success weighs more than any number of failures: it was seen from here, too, while a server may claim a failure.
    But which address was dialled is only claimed: so one that only others have told us of takes peers in two ranges.
    """

    def __init__(self, observers: Callable[[TcpAddress], Collection[str] | None] = lambda address: None) -> None:
        """`observers`: the ranges of the peers that see us at an address; None for one that we know ourselves."""
        self._observers = observers
        self._reports: LRUCache[str, _Reports] = LRUCache(MAX_TRACKED)

    def record(
        self, address: TcpAddress, server: PeerId, *, reached: bool, now_s: float, server_range: str | None = None
    ) -> None:
        """Record what a server found."""
        reports = self._reports.setdefault(address.transport, _Reports())
        reports.by_server[server] = _Report(reached, now_s, server_range)

    def of(self, address: TcpAddress, now_s: float) -> Verdict:
        """Return the verdict on one address."""
        reports = self._reports.get(address.transport)
        recent = [each for each in reports.by_server.values() if now_s - each.at_s < VALID_S] if reports else []
        if any(each.reached for each in recent):
            ranges = {each.range for each in recent if each.reached}
            observers = self._observers(address)
            if observers is None or len(ranges.union(observers)) >= MIN_RANGES:
                return Verdict.PUBLIC
        return Verdict.UNKNOWN if all(each.reached for each in recent) else Verdict.PRIVATE

    def ask(self, address: TcpAddress, server: PeerId, now_s: float) -> None:
        """Note that a server is asked about an address: it may never report."""
        self._reports.setdefault(address.transport, _Reports()).asked_at_s[server] = now_s

    def asked_at_s(self, address: TcpAddress, server: PeerId) -> float:
        """Return when a server was last asked about an address; minus infinity if never."""
        reports = self._reports.get(address.transport)
        return reports.asked_at_s.get(server, -math.inf) if reports else -math.inf

    def overall(self, candidates: Iterable[TcpAddress], now_s: float) -> Verdict:
        """Return the verdict on a node with these addresses.

        That of IPv4, where it has any: many peers have nothing else. A name that the user announces counts as public:
        servers dial numbers only.
        """
        candidates = list(candidates)
        if any(each.kind not in {"ip4", "ip6"} for each in candidates):
            return Verdict.PUBLIC
        decisive = [each for each in candidates if each.kind == "ip4"] or candidates
        found = {self.of(each, now_s) for each in decisive}
        if Verdict.PUBLIC in found:
            return Verdict.PUBLIC
        return Verdict.PRIVATE if Verdict.PRIVATE in found else Verdict.UNKNOWN
