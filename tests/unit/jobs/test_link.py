"""A link tells everybody who depends on a session that it is lost, and never ends more than itself."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.jobs.link import OutboundLink, SessionLost
from node.network.interface import Stream
from node.network.loopback import loopback_pair
from protocol.connection import JobConnection
from protocol.identity import JobId, PeerId, SessionId
from protocol.messages import Failed, FailureReason, Hello
from protocol.states import Role
from tests.support.observations import peer

SESSION = SessionId(JobId("00" * 16), 1)
FAILED = Failed(session=SESSION, reason=FailureReason.ENGINE, message="gone")


async def running(nursery: trio.Nursery) -> tuple[OutboundLink, Stream, JobConnection]:
    """Run a link whose other side the test plays."""
    near, far = loopback_pair(PeerId(peer(1)), "/metaswarm/job/1.0.0")
    link = OutboundLink(near, "test")
    nursery.start_soon(link.run)
    other = JobConnection(Role.RESPONDER, agent="test", window_bytes=1 << 20)
    for piece in other.send(Hello(agent="test", window_bytes=1 << 20)):
        await far.send_all(piece)
    await link.ready()
    return link, far, other


async def test_who_loses_a_session_may_end_all_watches_of_it(autojump_clock: MockClock) -> None:
    told: list[str] = []
    ends: list[Any] = []
    async with trio.open_nursery() as nursery:
        link, _, _ = await running(nursery)

        def lose(name: str) -> None:
            told.append(name)
            for end in ends:
                end()

        for name in ("first", "second"):
            ends.append(link.watch(SESSION, lambda lost, name=name: lose(name)))  # type: ignore[misc]
        link._take(FAILED, nursery)
        assert set(told) == {"first", "second"}
        assert not link.broken
        nursery.cancel_scope.cancel()


async def test_a_defect_that_a_message_finds_costs_the_link_and_not_the_node(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[SessionLost] = []

    def stumble(*_: object) -> None:
        raise RuntimeError("a defect")

    async with trio.open_nursery() as nursery:
        link, far, _ = await running(nursery)
        link.watch(SESSION, lost.append)
        monkeypatch.setattr(link, "_receive", stumble)
        await far.send_all(b"anything")
        with trio.fail_after(5):
            while not link.broken:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert [each.reporter for each in lost] == [peer(1)]
