"""Job links: liveness, flow control, and who learns that a session is lost."""

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from node.links.base_link import SILENCE_LIMIT_S
from node.links.outbound_link import OutboundLink, SessionLost
from node.network.interface import Stream
from node.network.loopback import LoopbackStream, loopback_pair
from protocol.connection import PROTOCOL_ID, JobConnection
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
from protocol.reports import Progress, ProgressRequest
from protocol.states import Role
from protocol.tensors import DType, Tensor
from tests.support.observations import peer

WINDOW_BYTES = 4 << 20
SESSION = SessionId(JobId("00" * 16), 1)
FAILED = Failed(session=SESSION, reason=FailureReason.ENGINE, message="gone")


async def running(
    nursery: trio.Nursery, wrap: Callable[[LoopbackStream], Stream] = lambda stream: stream
) -> tuple[OutboundLink, Stream, JobConnection]:
    """Run a link whose other side the test plays; it has answered the first ping."""
    near, far = loopback_pair(PeerId(peer(1)), PROTOCOL_ID)
    link = OutboundLink(wrap(near), "test")
    nursery.start_soon(link.run)
    other = JobConnection(Role.RESPONDER, agent="test", window_bytes=WINDOW_BYTES)
    await send(far, other, Hello(agent="test", window_bytes=WINDOW_BYTES))
    await link.ready()
    while not (pings := [message for message in await receive(far, other) if isinstance(message, Ping)]):
        pass
    await send(far, other, Pong(nonce=pings[0].nonce))
    return link, far, other


async def send(far: Stream, other: JobConnection, message: Message) -> None:
    """Send a message as the other side."""
    for piece in other.send(message):
        await far.send_all(piece)


async def receive(far: Stream, other: JobConnection) -> list[Message]:
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
        while opening not in await receive(far, other):
            pass
        await send(far, other, Opened(session=SESSION, load=Load(), votes={"m": 0.0}))
    ballots = (Ballot(link.peer, (0.0,)), Ballot(link.peer, (0.0,)))
    link.begin(Begin(session=SESSION, method="m", ballots=ballots))


def rows(position: int, count: int) -> Step:
    """Return a part of a prompt, 10 kB a row."""
    tensor = Tensor(DType.FLOAT32, (count, 2500), bytes(10_000 * count))
    return Step(slices=(Slice(session=SESSION, position=position, rows=count, draws=0),), tensor=tensor)


async def test_watcher_may_end_all_watches_of_a_lost_session(virtual_clock: MockClock) -> None:
    called: list[str] = []
    ends: list[Callable[[], None]] = []
    async with trio.open_nursery() as nursery:
        link, far, other = await running(nursery)
        await begin(link, far, other)

        def lose(name: str) -> None:
            called.append(name)
            for end in ends:
                end()

        for name in ("first", "second"):
            ends.append(link.watch(SESSION, lambda lost, name=name: lose(name)))  # type: ignore[misc]
        await send(far, other, FAILED)
        await trio.sleep(0.1)
        assert set(called) == {"first", "second"}
        assert not link.broken
        nursery.cancel_scope.cancel()


class FaultyStream:
    """A stream whose reads fail in a way that no link expects, once certain data arrives."""

    def __init__(self, stream: LoopbackStream) -> None:
        self.peer, self.protocol, self.relay = stream.peer, stream.protocol, stream.relay
        self.send_all, self.aclose, self.reset = stream.send_all, stream.aclose, stream.reset
        self._stream = stream

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        if b"defect" in (data := await self._stream.receive_some(max_bytes)):
            raise RuntimeError("a defect")
        return data


async def test_internal_error_breaks_the_link_and_not_the_node(virtual_clock: MockClock) -> None:
    lost: list[SessionLost] = []
    async with trio.open_nursery() as nursery:
        link, far, _ = await running(nursery, FaultyStream)
        link.watch(SESSION, lost.append)
        await far.send_all(b"defect")
        with trio.fail_after(5):
            while not link.broken:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert link.broken == "internal error on this link"
    assert [each.reporter for each in lost] == [peer(1)]


async def test_concurrent_progress_requests_share_one_answer(virtual_clock: MockClock) -> None:
    answers: list[Progress | None] = []
    async with trio.open_nursery() as nursery:
        link, far, other = await running(nursery)
        await begin(link, far, other)

        async def ask() -> None:
            answers.append(await link.request_progress(SESSION, 1.0))

        for _ in range(2):
            nursery.start_soon(ask)
        while not any(isinstance(message, ProgressRequest) for message in await receive(far, other)):
            pass
        progress = Progress(session=SESSION, received=3, computed=2, sent=1)
        await send(far, other, progress)
        await trio.sleep(0.5)
        assert answers == [progress, progress]
        nursery.cancel_scope.cancel()


async def test_concurrent_probes_of_a_slow_peer_leave_the_link_alone(virtual_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        link, far, other = await running(nursery)
        for _ in range(20):
            nursery.start_soon(link.probe, 2.5)
        await trio.sleep(1.9)
        asked: list[Ping] = []
        while not asked:
            asked += [message for message in await receive(far, other) if isinstance(message, Ping)]
        for ping in asked:
            await send(far, other, Pong(nonce=ping.nonce))
        await trio.sleep(1.0)
        assert not link.broken
        nursery.cancel_scope.cancel()


async def test_busy_machine_reads_what_has_arrived_before_it_takes_a_peer_for_dead(virtual_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        link, far, other = await running(nursery)
        await begin(link, far, other)
        nursery.start_soon(link.probe, 2.5)
        await trio.sleep(0.5)
        pings = [message for message in await receive(far, other) if isinstance(message, Ping)]
        # Our process gets no processor for five seconds; the pong arrives as it wakes, behind the timers.
        virtual_clock.jump(5.0)
        await trio.lowlevel.checkpoint()
        await trio.sleep(0.1)
        for ping in pings:
            await send(far, other, Pong(nonce=ping.nonce))
        await trio.sleep(0.5)
        assert not link.broken
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("megabytes", "allowed_s"), [(0, 0.0), (3, 5.0)])
async def test_peer_is_not_declared_dead_while_bytes_are_in_flight(
    megabytes: int, allowed_s: float, virtual_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        link, far, other = await running(nursery)
        await begin(link, far, other)
        for number in range(10 * megabytes):
            assert link.try_send_step(rows(10 * number, 10))
        await trio.sleep(SILENCE_LIMIT_S + allowed_s - 0.5)
        assert not link.broken
        await link.probe(2.5)  # returns when the peer is heard or given up
        assert link.broken is not None
        nursery.cancel_scope.cancel()


async def test_pong_confirms_bytes_sent_before_its_ping(virtual_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        link, far, other = await running(nursery)
        await begin(link, far, other)
        for number in range(30):
            assert link.try_send_step(rows(10 * number, 10))
        pings: list[Ping] = []
        with trio.move_on_after(0.5):
            while True:
                pings += [message for message in await receive(far, other) if isinstance(message, Ping)]
        assert len(pings) > 2
        for ping in pings:
            await send(far, other, Pong(nonce=ping.nonce))
        await trio.sleep(0.1)
        began_s = trio.current_time()
        with trio.move_on_after(30):
            await link.probe(2.5)
        assert link.broken
        assert trio.current_time() - began_s < 5
        nursery.cancel_scope.cancel()


async def test_peer_that_was_slow_to_answer_is_given_longer(virtual_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        link, far, other = await running(nursery)

        async def answer(after_s: float) -> None:
            while not (pings := [each for each in await receive(far, other) if isinstance(each, Ping)]):
                pass
            await trio.sleep(after_s)
            await send(far, other, Pong(nonce=pings[0].nonce))

        async with trio.open_nursery() as answering:
            answering.start_soon(answer, 0.9)
            await link.probe(1.0)
        async with trio.open_nursery() as answering:
            answering.start_soon(answer, 2.5)
            await link.probe(1.0)
        assert not link.broken
        nursery.cancel_scope.cancel()
