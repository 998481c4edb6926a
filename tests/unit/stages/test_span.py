"""What a span holds of sessions whose coordinators come and go."""

from types import SimpleNamespace
from typing import Any, cast

import trio
from trio.testing import MockClock

from node.engine.interface import SessionOptions
from node.stages.scheduler import Work
from node.stages.session import StageSession
from node.stages.span import Span
from node.testing.fake_engine import FakeEngine, fake_span_info
from protocol.identity import BlockRange, JobId, SessionId, peer_id_from_public_key
from protocol.messages import Open, Slice
from protocol.tensors import tensor_from_tokens
from tests.support.job_peers import BLOCKS

COORDINATOR = peer_id_from_public_key(bytes(32))


class Link:
    """A link that nothing is said on."""

    peer = COORDINATOR


LINK: Any = Link()


def open_session(span: Span, job: str) -> StageSession:
    session = SessionId(JobId(job * 16), 0)
    message = Open(session=session, model=span.info.model, blocks=span.info.blocks, methods=(), positions=64)
    span.sessions[session] = StageSession(message, span, LINK)
    return span.sessions[session]


async def test_a_session_that_ends_while_it_takes_over_another_leaves_no_memory_reserved(
    virtual_clock: MockClock,
) -> None:
    engine = FakeEngine(fake_span_info(BlockRange(0, 3), block_count=BLOCKS), step_s=1.0)
    link_pool = cast("Any", SimpleNamespace(registry=SimpleNamespace(remove=lambda session: None)))
    span = Span(engine, link_pool, trio.lowlevel.ParkingLot())
    former, successor = open_session(span, "a0"), open_session(span, "b1")
    await engine.open(former.id, 64)
    await engine.begin(former.id, SessionOptions())
    part = Slice(session=former.id, position=0, rows=1, draws=0)
    async with trio.open_nursery() as nursery:
        await nursery.start(span.run)
        span.queue(
            Work(
                part=part,
                tensor=tensor_from_tokens([1]),
                coordinator=COORDINATOR,
                origin=LINK,
                payload_bytes=0,
                arrived_s=trio.current_time(),
            )
        )
        await trio.sleep(0.5)  # amid the step, after which what the former one holds is the successor's
        nursery.start_soon(span.carry_on, former, successor)
        await trio.sleep(0.1)
        span.end(successor)
        await trio.sleep(2)
        assert engine.statistics().reserved_positions == 0
        nursery.cancel_scope.cancel()
