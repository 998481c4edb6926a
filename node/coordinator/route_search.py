"""How long a job looks for a route, and what it learns meanwhile."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import trio

from node.coordinator.job import Job
from node.coordinator.refusals import StageRefusal, shorten
from protocol.identity import PeerId, Stage
from protocol.messages import RefusalReason

RECOVERY_LIMIT_S: Final = 90.0
"""How long a running job waits for a route while known peers could take a lost stage's place.

They may have to build the job's variant first (`variant_builder.BUILD_MAX_WAIT_S`, and the building), to load their
blocks again, or to end other jobs. What the remaining stages have computed is held meanwhile.
"""

HOPELESS_LIMIT_S: Final = 4.0
"""How long it waits while no known peer could: the lost peer may return, or another be discovered, within it."""

RECONNECT_LIMIT_S: Final = 5.0
"""How long a new job waits for a route once a link to its peers broke: one that was busy for a moment is back soon."""

MAX_SHORTENINGS: Final = 8
"""How often one search for a route lowers the limit of the text: peers that refuse again and again may be lying."""


@dataclass(slots=True)
class RouteSearch:
    """A job's search for a route, new or in place of one that was lost.

    `is_running`: whether the job had a route before. `is_told`: whether somebody was told that it waits.
    """

    job: Job
    is_running: bool
    began_s: float = field(default_factory=trio.current_time)
    refusals: dict[PeerId, StageRefusal] = field(default_factory=dict)
    is_told: bool = False
    _candidates_seen_s: float = field(default_factory=trio.current_time)
    """When known peers last could have served it."""
    _broken_s: float | None = None
    """When there first was no route because a link broke."""
    _shortenings: int = 0

    def restore(self, stages: Iterable[Stage], held: Collection[Stage]) -> bool:
        """Undo a shortening of the text for a route on which no peer has refused more; return whether there was one.

        It stays where stages go on that hold no more of it.
        """
        refusals = [self.refusals[stage.peer].reason for stage in stages if stage.peer in self.refusals]
        return self.is_running and not held and RefusalReason.FULL not in refusals and self.job.restore_limit()

    def shorten(self, refusals: Mapping[PeerId, StageRefusal]) -> bool:
        """Note why peers were of no use; lower the limit of the job's text if that makes them useful."""
        self.refusals |= refusals
        if self._shortenings == MAX_SHORTENINGS or not shorten(self.job, self.refusals.values()):
            return False
        self._shortenings += 1
        return True

    def may_wait(self) -> bool:
        """Return whether there is time left to wait for a route."""
        now_s = trio.current_time()
        if self.is_running:
            return now_s < self.began_s + RECOVERY_LIMIT_S
        if self._broken_s is None and any(refusal.reason is None for refusal in self.refusals.values()):
            self._broken_s = now_s
        is_broken = self._broken_s is not None and now_s < self._broken_s + RECONNECT_LIMIT_S
        return is_broken and not self.job.request.background

    def is_hopeless(self, *, has_candidates: bool) -> bool:
        """Return whether a running job waits in vain. `has_candidates`: whether known peers could serve it soon."""
        now_s = trio.current_time()
        if has_candidates:
            self._candidates_seen_s = now_s
        return self.is_running and now_s - self._candidates_seen_s >= HOPELESS_LIMIT_S
