"""The trace of a job: what the stages measure adds up to what the coordinator sees, whatever their clocks show."""

from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.submission import JobRequest, JobResult, JobTrace, TextDelta
from node.stages.step_timings import RETAINED_STEPS, StepTimings
from node.testing.memory_links import LinkModel
from protocol.identity import SessionId
from protocol.reports import Timings
from tests.support.job_peers import BLOCKS, Peer, Swarm, open_swarm

REQUEST = JobRequest(model="fake", prompt="3 1 4 1 5 9 2 6", max_tokens=12, trace=True)
LINK_S = 0.02
STEPS_S = (0.01, 0.03, 0.02)
"""Of the three stages; the fake engine takes a hundredth more for each row."""


async def slow_swarm(swarm: Swarm) -> Peer:
    for span, step_s in zip(((0, 3), (3, 6), (6, 9)), STEPS_S, strict=True):
        await swarm.join(span, step_s=step_s)
    coordinator = await swarm.join()
    await swarm.settle()
    return coordinator


async def traced(peer: Peer, request: JobRequest = REQUEST) -> tuple[JobTrace, float]:
    """Return the trace of a job, and the time between its tokens."""
    result = await peer.run(request)
    assert result.trace is not None
    return result.trace, result.timing.tpot_s


async def test_parts_are_what_stages_and_links_took(virtual_clock: MockClock) -> None:
    async with open_swarm(link=LinkModel(latency_s=LINK_S)) as swarm:
        trace, tpot_s = await traced(await slow_swarm(swarm))
        assert [str(stage.blocks) for stage in trace.stages] == ["0-3", "3-6", "6-9"]
        assert [each.position for each in trace.rounds] == list(range(8, 20))
        assert [each.has_prompt for each in trace.rounds] == [True] + 11 * [False]
        assert trace.dropped_steps == 0
        for each in trace.rounds[1:]:
            for timing, step_s in zip(each.stages, STEPS_S, strict=True):
                assert timing.compute_s == pytest.approx(1.01 * step_s)
                assert timing.link_s == pytest.approx(LINK_S, abs=1e-3)
                assert timing.queue_s == pytest.approx(0.0, abs=1e-6)
                assert timing.serialise_s == pytest.approx(0.0, abs=1e-6)
            parts = [t.link_s or 0.0 for t in each.stages] + [
                t.queue_s + t.compute_s + t.serialise_s for t in each.stages
            ]
            assert sum(parts) == pytest.approx(tpot_s, rel=1e-3)
        assert trace.rounds[0].stages[1].compute_s == pytest.approx(1.08 * STEPS_S[1])


async def test_clocks_that_differ_change_nothing(virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks of other machines start anywhere."""
    collect = StepTimings.collect

    def shifted(self: StepTimings, session: SessionId, clock_s: float) -> Timings:
        offset_s = 1000.0 * (1 + session.stage)
        timings = collect(self, session, clock_s + offset_s)
        return replace(timings, steps=tuple(replace(s, received_s=s.received_s + offset_s) for s in timings.steps))

    monkeypatch.setattr(StepTimings, "collect", shifted)
    async with open_swarm(link=LinkModel(latency_s=LINK_S)) as swarm:
        trace, _ = await traced(await slow_swarm(swarm))
        for each in trace.rounds[1:]:
            assert [timing.link_s for timing in each.stages] == [pytest.approx(LINK_S, abs=1e-3)] * 3
        assert all(stage.clock_error_s is not None and stage.clock_error_s < 2 * LINK_S for stage in trace.stages)


async def test_waiting_for_another_session_is_queue(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, BLOCKS), step_s=0.05)
        await swarm.settle()
        async with peer.coordinator.submit(replace(REQUEST, trace=False, max_tokens=40)) as other:
            await anext(aiter(other))  # its next step is under way
            trace, _ = await traced(peer)
        assert sum(timing.queue_s for each in trace.rounds for timing in each.stages) > 0.02


async def test_long_job_is_traced_whole(virtual_clock: MockClock) -> None:
    """Stages retain fewer steps than it has."""
    tokens = RETAINED_STEPS + 300
    async with open_swarm() as swarm:
        peer = await swarm.join((0, BLOCKS), step_s=0.001)
        await swarm.settle()
        trace, _ = await traced(peer, replace(REQUEST, max_tokens=tokens))
        assert len(trace.rounds) == tokens
        assert trace.dropped_steps == 0
        assert all(len(each.stages) == 1 for each in trace.rounds)


async def test_slow_client_loses_no_step(virtual_clock: MockClock) -> None:
    """Tokens arrive while the client reads none, so that their number jumps."""
    tokens = RETAINED_STEPS + 300
    async with open_swarm() as swarm:
        peer = await swarm.join((0, BLOCKS), step_s=0.001)
        await swarm.settle()
        async with peer.coordinator.submit(replace(REQUEST, max_tokens=tokens)) as events:
            found = []
            async for event in events:
                found.append(event)
                if len(found) % 7 == 0:
                    await trio.sleep(0.02)
        result = found[-1]
        assert isinstance(result, JobResult)
        assert result.trace is not None
        assert result.trace.dropped_steps == 0


async def test_lost_stage_is_missing_and_its_replacement_there(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        for span in ((0, 3), (3, 6), (6, 9), (3, 6)):
            await swarm.join(span)
        coordinator = await swarm.join()
        await swarm.settle()
        async with coordinator.coordinator.submit(replace(REQUEST, max_tokens=20)) as events:
            seen = [await anext(events) for _ in range(8)]
            assert isinstance(seen[-1], TextDelta)
            next(peer for peer in swarm.peers[1::2] if peer.held()[0]).engines[0].crash()
            *_, result = [event async for event in events]
        assert isinstance(result, JobResult)
        trace = result.trace
        assert trace is not None
        assert sum(each.has_prompt for each in trace.rounds) == 2
        first, last = trace.rounds[1], trace.rounds[-1]
        assert [timing.stage for timing in last.stages] == [0, 3, 2]
        assert all(timing.link_s is not None for timing in last.stages)
        assert {timing.stage for timing in first.stages} <= {0, 1, 2}


async def test_untraced_job_has_no_trace(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, BLOCKS))
        await swarm.settle()
        assert (await peer.run(replace(REQUEST, trace=False))).trace is None
