"""A client that reads slowly, or nothing for minutes: what is measured is the swarm, and what it holds is freed."""

from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.submission import JobRequest, JobResult, JobStarted, TextDelta
from protocol.tensors import Pooling
from tests.support.job_peers import Peer, Swarm, open_swarm
from tests.unit.coordinator.test_jobs import PROMPT, THIRDS, right_tokens

REQUEST = JobRequest(model="fake", prompt=PROMPT, max_tokens=40)


async def client_of(swarm: Swarm) -> Peer:
    """Return the coordinator of a swarm of three stages."""
    for span in THIRDS:
        await swarm.join(span)
    peer = await swarm.join()
    await swarm.settle()
    return peer


async def read(peer: Peer, pause_s: float, request: JobRequest = REQUEST) -> JobResult:
    """Run a job whose client takes a while over each event."""
    result: JobResult | None = None
    async with peer.coordinator.submit(request) as events:
        async for event in events:
            await trio.sleep(pause_s)
            if isinstance(event, JobResult):
                result = event
    assert result is not None
    return result


async def test_times_are_those_of_the_swarm_whatever_the_client_reads(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await client_of(swarm)
        await read(peer, 0)  # links are made
        fast, slow = await read(peer, 0), await read(peer, 0.5)
        assert slow.token_ids == right_tokens(40)
        for name in ("ttft_s", "tpot_s", "total_s"):
            assert getattr(slow.timing, name) == pytest.approx(getattr(fast.timing, name), rel=0.1)


@pytest.mark.parametrize("pause_s", [0.5, 30])
async def test_what_stages_computed_while_nobody_read_the_end_of_a_text_is_not_held_against_them(
    virtual_clock: MockClock, pause_s: float
) -> None:
    """A stop string is found when the client reads it; meanwhile the stages draw tokens far behind it."""
    async with open_swarm() as swarm:
        peer = await client_of(swarm)
        asked = replace(REQUEST, max_tokens=1500, stop=(f" {right_tokens(3)[2]} ",))
        prompt = await read(peer, 0, asked)
        assert prompt.cost is not None
        assert prompt.cost.actual is not None
        slow = await read(peer, pause_s, asked)
        assert slow.cost is not None
        assert slow.cost.actual is None
        records = peer.coordinator.peer_records()
        assert [record.failed for record in records.values()] == [0] * len(records)


@pytest.mark.parametrize("request_", [REQUEST, replace(REQUEST, pooling=Pooling.MEAN, max_tokens=None)])
async def test_complete_text_holds_no_kv_memory_until_it_is_read(
    virtual_clock: MockClock, request_: JobRequest
) -> None:
    async with open_swarm() as swarm:
        peer = await client_of(swarm)
        async with peer.coordinator.submit(request_) as events:
            assert isinstance(await anext(events), JobStarted)
            await trio.sleep(5)
            assert [each.held() for each in swarm.peers] == [(0, 0)] * len(swarm.peers)
            await trio.sleep(400)
            rest = [event async for event in events]
        result = rest[-1]
        assert isinstance(result, JobResult)
        text = [token for event in rest if isinstance(event, TextDelta) for token in event.token_ids]
        assert tuple(text) == (right_tokens(40) if request_ is REQUEST else ())
        assert result.timing.total_s < 5
        assert result.replays == 0
        assert result.cost is not None
        assert result.cost.actual == sum(stage.statistics.compute_s for stage in result.route) > 0


async def test_stage_lost_behind_a_complete_text_is_not_replaced(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await client_of(swarm)
        async with peer.coordinator.submit(REQUEST) as events:
            assert isinstance(await anext(events), JobStarted)
            await trio.sleep(5)
            swarm.peers[0].stages.start_draining()
            swarm.peers[0].stages.migrate_sessions()
            swarm.hub.kill(swarm.peers[2].id)
            await trio.sleep(5)
            result = [event async for event in events][-1]
        assert isinstance(result, JobResult)
        assert (result.token_ids, result.replays) == (right_tokens(40), 0)
