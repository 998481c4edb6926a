"""Links that a stage opens for another's session: an opener that delays one keeps the peer from no other."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from node.links.base_link import LinkBroken
from node.network.interface import Network
from node.stages.dials_for_others import DialsForOthers
from node.stages.session_admission import CONNECT_LIMIT_S, SessionAdmission
from protocol.identity import JobId, PeerId, SessionId

OPENER, PEER, HONEST = PeerId("opener"), PeerId("peer"), PeerId("honest")


class Stage:
    """A last stage that has connections to openers only, and reaches each peer after a while."""

    def __init__(self, delays_s: dict[PeerId, float]) -> None:
        self.connected: list[PeerId] = []
        network = SimpleNamespace(peer_id=PeerId("stage"), connected_peers=lambda: {OPENER})
        self.dials = DialsForOthers(cast("Network", network))
        self._delays_s = delays_s
        self._admission = cast("Any", SessionAdmission.__new__(SessionAdmission))
        self._admission._dials = self.dials
        self._admission._link_pool = SimpleNamespace(link_to=self._link_to, is_linked=lambda _: False)

    async def _link_to(self, peer: PeerId) -> PeerId:
        await trio.sleep(self._delays_s[peer])
        return peer

    async def connect(self) -> None:
        """Open the links of a session whose tokens go to its opener, and to a first stage that the opener names."""
        session = SimpleNamespace(
            following=SessionId(JobId("ab" * 16), 2),
            request=SimpleNamespace(downstream=None, feedback=PEER),
            opened_by=SimpleNamespace(peer=OPENER),
            is_ended=False,
            outbox=SimpleNamespace(connect=lambda _, link: self.connected.append(link)),
        )
        await self._admission._connect(session)


async def test_opener_that_answers_late_takes_no_time_of_the_peer_that_it_names(virtual_clock: MockClock) -> None:
    stage = Stage({OPENER: CONNECT_LIMIT_S - 0.1, PEER: 0.3})
    await stage.connect()
    assert stage.connected == [PEER, OPENER]


async def test_peer_is_not_charged_for_an_opener_that_does_not_answer(virtual_clock: MockClock) -> None:
    stage = Stage({OPENER: CONNECT_LIMIT_S + 1, PEER: 0.3})
    with pytest.raises(LinkBroken) as caught:
        await stage.connect()
    assert caught.value.peer == OPENER
    assert stage.dials.permit(PEER, OPENER)


async def test_peer_that_is_reached_too_late_is_not_dialled_again_for_that_opener_alone(
    virtual_clock: MockClock,
) -> None:
    stage = Stage({OPENER: 0.0, PEER: CONNECT_LIMIT_S + 1})
    began_s = trio.current_time()
    with pytest.raises(LinkBroken) as caught:
        await stage.connect()
    assert caught.value.peer == PEER
    assert trio.current_time() - began_s == pytest.approx(CONNECT_LIMIT_S)
    assert not stage.dials.permit(PEER, OPENER)
    assert stage.dials.permit(PEER, HONEST)


async def test_outage_of_this_node_keeps_it_from_no_peer_after_it(virtual_clock: MockClock) -> None:
    connected: list[PeerId] = []
    network = SimpleNamespace(peer_id=PeerId("stage"), connected_peers=lambda: connected)
    dials = DialsForOthers(cast("Network", network))
    dials.failed(PEER)
    connected.append(OPENER)
    assert dials.permit(PEER, OPENER)
    dials.failed(PEER)
    assert not dials.permit(PEER, OPENER)
