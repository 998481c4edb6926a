"""Whom a job blames for a stage that is lost: what stages say of each other counts less than what this node sees."""

from collections.abc import Callable, Collection

from node.coordinator.planner import Planner
from node.links.link_pool import LinkPool
from node.links.outbound_link import SessionLost
from protocol.identity import PeerId
from protocol.messages import FailureReason


class Blame:
    """Judges who is at fault on the routes of one job, and has the planner record it."""

    def __init__(self, planner: Planner, link_pool: LinkPool) -> None:
        self._planner = planner
        self._link_pool = link_pool
        self.accused_by: dict[PeerId, PeerId] = {}
        """By stage the one that it blamed without proof: the job gains such stages no trust."""

    def charge(
        self, lost: SessionLost, on_route: Collection[PeerId], is_replaceable: Callable[[PeerId], bool]
    ) -> PeerId:
        """Return the peer to replace, and charge it: the one that a stage blames if it is on the route, else the stage.

        Where this node sees nothing wrong with the blamed one, either may lie. Both are charged, by half, and a stage
        that blames a second one is replaced itself: else it could end every job, and ruin the records of all its
        neighbours. Blaming the same one again convicts neither, since the other may break their link each time: then
        the accuser is replaced, or the accused if only that `is_replaceable`.
        Only a peer that this node cannot reach itself counts as dead: a failed engine restarts, and of two peers that
        do not reach each other both live.
        """
        own, blamed, reporter = self._link_pool.peer_id, lost.blamed, lost.reporter
        is_accused = blamed != reporter and blamed in on_route
        if is_accused and (reporter == own or self._is_dead(blamed)):
            self._planner.failed(blamed, dead=self._is_dead(blamed))
            return blamed
        if is_accused and self.accused_by.get(reporter, blamed) == blamed:
            is_repeated = reporter in self.accused_by
            self.accused_by[reporter] = blamed
            self._planner.disputed(blamed, reporter)
            return reporter if is_repeated and (is_replaceable(reporter) or not is_replaceable(blamed)) else blamed
        # A stage that blames us may be right: then the job only continues elsewhere.
        if lost.reason is not FailureReason.EXPIRED and (blamed != own or reporter == own):
            self._planner.failed(reporter, dead=self._is_dead(reporter), lagged=lost.lagged)
        return reporter

    def _is_dead(self, peer: PeerId) -> bool:
        return not self._link_pool.is_linked(peer)
