"""Spans: the memory of sessions whose coordinators come and go."""

from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from node.engine.interface import EngineError, SessionOptions
from node.links.base_link import LinkBroken
from protocol.identity import SessionId
from protocol.messages import FailureReason
from protocol.tensors import tensor_from_tokens
from tests.support.job_peers import open_swarm
from tests.support.raw_coordinator import a_slice, raw_coordinator_at


async def test_session_lost_while_taking_over_another_frees_its_memory(virtual_clock: MockClock) -> None:
    """The coordinator leaves amid the step after which what the former session holds is its successor's."""
    async with open_swarm() as swarm:
        server = await swarm.join((0, 9), step_s=1.0, row_s=0.0)
        coordinator = await raw_coordinator_at(swarm, server)
        former = await coordinator.begin()
        tokens = tensor_from_tokens([1])
        await coordinator.send(a_slice(former, tokens), tokens)
        await trio.sleep(0.5)
        successor = replace(coordinator.opening(), continues=former)

        async def leave() -> None:
            await trio.sleep(0.2)
            assert list(server.stages.spans()[0].sessions) == [successor.session]
            assert server.held()[1] > 0
            coordinator.link.end("left")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave)
            with pytest.raises(LinkBroken, match="left"):
                await coordinator.open_with(successor)
        await trio.sleep(2)
        assert server.held() == (0, 0)


async def test_fails_session_that_engine_cannot_begin(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(session: SessionId, options: SessionOptions) -> int:
        raise EngineError

    async with open_swarm() as swarm:
        server = await swarm.join((0, 9))
        coordinator = await raw_coordinator_at(swarm, server)
        monkeypatch.setattr(server.engines[0], "begin", fail)
        await coordinator.begin()
        assert (await coordinator.until_lost()).reason is FailureReason.ENGINE
        await trio.sleep(1)
        assert server.held() == (0, 0)
