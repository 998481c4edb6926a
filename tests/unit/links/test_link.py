"""A link tells everybody who depends on a session that it is lost, and never ends more than itself."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.links.link import SILENCE_LIMIT_S, OutboundLink, SessionLost
from node.network.interface import Stream
from node.network.loopback import loopback_pair
from protocol.connection import JobConnection
from protocol.identity import BlockRange, JobId, ModelId, PeerId, SessionId
from protocol.messages import (
    Ballot,
    Begin,
    Failed,
    FailureReason,
    Hello,
    Load,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    Slice,
    Step,
)
from protocol.states import Role
from protocol.tensors import DType, Tensor
from tests.support.observations import peer

WINDOW_BYTES = 4 << 20
SESSION = SessionId(JobId("00" * 16), 1)
FAILED = Failed(session=SESSION, reason=FailureReason.ENGINE, message="gone")


async def running(nursery: trio.Nursery) -> tuple[OutboundLink, Stream, JobConnection]:
    """Run a link whose other side the test plays."""
    near, far = loopback_pair(PeerId(peer(1)), "/metaswarm/job/1.0.0")
    link = OutboundLink(near, "test")
    nursery.start_soon(link.run)
    other = JobConnection(Role.RESPONDER, agent="test", window_bytes=WINDOW_BYTES)
    await tell(far, other, Hello(agent="test", window_bytes=WINDOW_BYTES))
    await link.ready()
    return link, far, other


async def tell(far: Stream, other: JobConnection, message: Message) -> None:
    """Say something as the other side."""
    for piece in other.send(message):
        await far.send_all(piece)


async def hear(far: Stream, other: JobConnection) -> list[Message]:
    """Return what the other side reads next."""
    return other.receive_data(await far.receive_some())


async def begin(link: OutboundLink, far: Stream, other: JobConnection) -> None:
    """Open a session over the link, so that rows may be sent."""
    opening = Open(
        session=SESSION,
        model=ModelId("0f" * 32),
        blocks=BlockRange(3, 9),
        methods=("m",),
        positions=1000,
        downstream=PeerId(peer(2)),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.open, opening)
        while opening not in await hear(far, other):
            pass
        await tell(far, other, Opened(session=SESSION, load=Load(), votes={"m": 0.0}))
    ballots = (Ballot(link.peer, (0.0,)), Ballot(link.peer, (0.0,)))
    link.begin(Begin(session=SESSION, method="m", ballots=ballots))


def rows(position: int, count: int) -> Step:
    """Return a part of a prompt, 10 kB a row."""
    tensor = Tensor(DType.FLOAT32, (count, 2500), bytes(10_000 * count))
    return Step(slices=(Slice(session=SESSION, position=position, rows=count, draws=0),), tensor=tensor)


async def test_who_loses_a_session_may_end_all_watches_of_it(virtual_clock: MockClock) -> None:
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
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
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


async def test_many_jobs_may_ask_at_once_whether_a_peer_that_takes_its_time_is_there(
    virtual_clock: MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        link, far, other = await running(nursery)
        for _ in range(20):
            nursery.start_soon(link.probe, 2.5)
        await trio.sleep(1.9)
        asked: list[Ping] = []
        while not asked:
            asked += [message for message in await hear(far, other) if isinstance(message, Ping)]
        for ping in asked:
            await tell(far, other, Pong(nonce=ping.nonce))
        await trio.sleep(1.0)
        assert not link.broken
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("megabytes", "patience_s"), [(0, 0.0), (3, 5.0)])
async def test_a_peer_is_not_taken_for_dead_while_it_may_still_be_receiving(
    megabytes: int, patience_s: float, virtual_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        link, far, other = await running(nursery)
        await begin(link, far, other)
        for number in range(10 * megabytes):
            assert link.try_send_step(rows(10 * number, 10))
        await trio.sleep(SILENCE_LIMIT_S + patience_s - 0.5)
        assert not link.broken
        await link.probe(2.5)  # returns when the peer is heard or given up
        assert link.broken is not None
        nursery.cancel_scope.cancel()


async def test_what_a_pong_follows_has_arrived(virtual_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        link, far, other = await running(nursery)
        await begin(link, far, other)
        for number in range(30):
            assert link.try_send_step(rows(10 * number, 10))
        pings: list[Ping] = []
        with trio.move_on_after(0.5):
            while True:
                pings += [message for message in await hear(far, other) if isinstance(message, Ping)]
        assert len(pings) > 2
        for ping in pings:
            await tell(far, other, Pong(nonce=ping.nonce))
        await trio.sleep(0.1)
        began_s = trio.current_time()
        with trio.move_on_after(30):
            await link.probe(2.5)
        assert link.broken
        assert trio.current_time() - began_s < 5
        nursery.cancel_scope.cancel()
