"""Whom a job blames for a lost stage, where stages blame each other."""

from types import SimpleNamespace
from typing import cast

import pytest

from node.coordinator.blame import Blame
from node.coordinator.planner import Planner
from node.links.link_pool import LinkPool
from node.links.outbound_link import SessionLost
from protocol.identity import PeerId
from protocol.messages import FailureReason

FIRST, SECOND, THIRD = PeerId("first"), PeerId("second"), PeerId("third")


class Judged:
    """The blame of one job, all of whose stages this node reaches, and what it charged whom."""

    def __init__(self, *replaceable: PeerId) -> None:
        self.failed: list[PeerId] = []
        self.disputed: list[tuple[PeerId, ...]] = []
        self._replaceable = replaceable
        planner = SimpleNamespace(
            failed=lambda peer, **_: self.failed.append(peer), disputed=lambda *peers: self.disputed.append(peers)
        )
        link_pool = SimpleNamespace(peer_id=PeerId("own"), is_linked=lambda _: True)
        self._blame = Blame(cast("Planner", planner), cast("LinkPool", link_pool))

    def replaced(self, reporter: PeerId, blamed: PeerId) -> PeerId:
        lost = SessionLost(reporter, blamed, FailureReason.DOWNSTREAM, "the link broke")
        return self._blame.charge(lost, {FIRST, SECOND, THIRD}, lambda peer: peer in self._replaceable)


@pytest.mark.parametrize(
    ("replaceable", "replaced"), [((FIRST, SECOND), FIRST), ((FIRST,), FIRST), ((SECOND,), SECOND), ((), FIRST)]
)
def test_link_that_breaks_twice_convicts_neither_end(replaceable: tuple[PeerId, ...], replaced: PeerId) -> None:
    judged = Judged(*replaceable)
    assert judged.replaced(FIRST, SECOND) == SECOND
    assert judged.replaced(FIRST, SECOND) == replaced
    assert judged.disputed == [(SECOND, FIRST)] * 2
    assert not judged.failed


def test_stage_that_blames_a_second_one_is_convicted() -> None:
    judged = Judged(FIRST, SECOND, THIRD)
    assert [judged.replaced(FIRST, SECOND), judged.replaced(FIRST, THIRD)] == [SECOND, FIRST]
    assert judged.failed == [FIRST]
