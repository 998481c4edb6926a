"""Jobs whose prompt becomes an embedding: over any split, when stages die, and beside texts."""

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.submission import JobError, JobErrorCode, JobRequest, JobResult
from node.testing.fake_engine import expected_embedding, fake_span_info
from protocol.identity import BlockRange
from protocol.tensors import Pooling
from selector.task import method
from tests.support.job_peers import BLOCKS, open_swarm
from tests.unit.coordinator.test_sampling import THIRDS, make_old, swarm_of

PROMPT = tuple(range(100, 400))


def request(pooling: Pooling = Pooling.MEAN, name: str = "auto") -> JobRequest:
    return JobRequest(model="fake", prompt_tokens=PROMPT, pooling=pooling, max_tokens=1, method=name)


def right(pooling: Pooling = Pooling.MEAN) -> list[float]:
    return expected_embedding(fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS), PROMPT, pooling)


def vector(result: JobResult) -> list[float]:
    assert result.embedding is not None
    return list(result.embedding)


@pytest.mark.parametrize("spans", [((0, 9),), THIRDS])
@pytest.mark.parametrize("pooling", Pooling)
async def test_embedding_is_the_same_on_every_split(
    virtual_clock: MockClock, spans: tuple[tuple[int, int], ...], pooling: Pooling
) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, *spans)
        for name in ("auto", method(engine="fused", prefill_chunk="64").name):
            result = await peer.run(request(pooling, name))
            assert vector(result) == right(pooling)
            assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(PROMPT), 0)
        text = await peer.run(JobRequest(model="fake", prompt_tokens=PROMPT, max_tokens=3))
        assert len(text.token_ids) == 3


@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_embedding_survives_the_death_of_a_stage(virtual_clock: MockClock, stage: int) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, *THIRDS, *THIRDS)
        async with peer.coordinator.submit(request(name=method(engine="fused", prefill_chunk="64").name)) as events:
            await anext(events)
            while not any(each.held()[0] for each in swarm.peers):
                await trio.sleep(0.001)
            swarm.hub.kill(swarm.serving(THIRDS[stage]).id)
            [result] = [event async for event in events]
        assert isinstance(result, JobResult)
        assert result.replays >= 1
        assert vector(result) == right()


async def test_a_peer_of_an_older_version_is_not_the_last_stage(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        old = await swarm.join((0, 9), step_s=0.001)
        make_old(old)
        peer = await swarm.join()
        await swarm.settle()
        with pytest.raises(JobError, match="wait for a peer of a later version"):
            await peer.run(request())
        new = await swarm.join((7, 9), step_s=0.05)
        await swarm.settle()
        result = await peer.run(request())
        assert vector(result) == right()
        assert result.route[-1].peer == new.id


@pytest.mark.parametrize("switches", [{"prefix_cache": "on"}, {"engine": "fused", "speculation": "ngram-8"}])
async def test_refuses_methods_that_do_not_compute_each_row(virtual_clock: MockClock, switches: dict[str, str]) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, (0, 9))
        with pytest.raises(JobError, match="need every row") as caught:
            await peer.run(request(name=method(**switches).name))
        assert caught.value.code is JobErrorCode.INVALID
