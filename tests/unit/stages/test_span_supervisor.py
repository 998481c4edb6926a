"""Nodes that choose their blocks by themselves: they go where they are needed, and nobody notices."""

from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.config import StartError
from node.coordinator.submission import JobError, JobRequest
from node.engine.interface import REFERENCE, Variant
from node.links.outbound_link import SessionRefused
from node.models.errors import ModelError
from node.stages.stage_server import WITHDRAWAL_S
from protocol.identity import BlockRange
from tests.support.job_peers import FakeLibrary, Peer, Swarm, an_opening, open_swarm
from tests.unit.coordinator.test_jobs import PROMPT, right_tokens


def spans_of(peer: Peer) -> list[str]:
    """What others hear that a peer serves."""
    return [str(span.blocks) for span in peer.stages.served_spans()]


async def thirds_and_a_spare(swarm: Swarm) -> tuple[list[Peer], Peer]:
    """Three peers that have a third of the blocks each, and one more that has some of theirs."""
    peers = []
    for _ in range(4):
        peers.append(await swarm.join_where_needed(3))
        await trio.sleep(5)
    assert sorted(spans_of(peer)[0] for peer in peers[:3]) == ["0-3", "3-6", "6-9"]
    return peers[:3], peers[3]


async def test_uncovered_blocks_are_taken_by_spare_node_without_losing_job(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        thirds, spare = await thirds_and_a_spare(swarm)
        coordinator = await swarm.join((0, 9), step_s=0.5)  # has all blocks, and is slow with them
        await swarm.settle()
        lost = thirds[2]
        hole = spans_of(lost)
        results = []

        async def run_a_long_job() -> None:
            request = JobRequest(model="fake", prompt=PROMPT, max_tokens=300)
            results.append((await coordinator.run(request)).token_ids)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_a_long_job)
            await trio.sleep(1)
            swarm.hub.kill(lost.id)
            with trio.fail_after(90):
                while spans_of(spare) != hole:
                    await trio.sleep(0.5)
        assert results == [right_tokens(300)]
        await trio.sleep(120)
        assert [len(peer.engines) for peer in (*thirds[:2], spare)] == [1, 1, 2], "once it is filled, nobody moves"


async def test_exact_variants_are_built_in_advance(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join_where_needed(3)
        assert peer.engines[0].variants() == {REFERENCE}, "nobody waits for it"
        await trio.sleep(60)
        assert peer.engines[0].variants() == {REFERENCE, Variant("fused", "fp32"), Variant("onnxruntime", "fp32")}


async def test_withdrawn_span_is_not_announced_and_drains(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        server, coordinator = await swarm.join((0, 9), step_s=0.1), await swarm.join()
        await swarm.settle()
        [span] = server.stages.spans()
        results = []

        async def run() -> None:
            request = JobRequest(model="fake", prompt=PROMPT, max_tokens=300)
            results.append((await coordinator.run(request)).token_ids)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(1)
            assert span.sessions
            server.stages.withdraw_span(span)
            assert spans_of(server) == []
            link = await coordinator.stages.link_pool.link_to(server.id)
            # Who has not heard so yet is not to suffer; later nobody may keep it from going.
            late = replace(an_opening(server), positions=8)
            await link.open(late)
            await link.close(late.session)
            nursery.start_soon(server.stages.drain_span, span)
            await trio.sleep(WITHDRAWAL_S + 0.1)
            assert span.sessions
            with pytest.raises(SessionRefused, match="not served here"):
                await link.open(late)
        assert not span.sessions
        assert results == [right_tokens(300)]


async def test_draft_model_starts_in_background_and_restarts_after_crash(virtual_clock: MockClock) -> None:
    guessed = JobRequest(model="fake", prompt=PROMPT, max_tokens=40, method="speculation=draft-8")
    async with open_swarm() as swarm:
        peer = await swarm.join_where_needed(9, draft="numbers")
        assert spans_of(peer) == ["0-9"], "nobody waits for who only saves time"
        for _ in range(2):
            await trio.sleep(20)
            result = await peer.run(guessed)
            assert result.token_ids == right_tokens(40)
            assert result.usage.accepted_draft_tokens > 20
            next(each for each in reversed(peer.engines) if Variant("onnxruntime", "int8") in each.variants()).crash()
            await trio.sleep(0.1)
            with pytest.raises(JobError, match="not ready") as caught:
                await peer.run(guessed)
            assert caught.value.retry_after_s


async def test_draft_model_with_other_tokenizer_is_refused(virtual_clock: MockClock) -> None:
    with pytest.RaisesGroup(
        pytest.RaisesExc(StartError, match="cannot be used with fake: tokenizers differ"), flatten_subgroups=True
    ):
        async with open_swarm() as swarm:
            await swarm.join_where_needed(9, draft="letters")


class FailsToMove(FakeLibrary):
    """Gives the blocks asked for first, and no others."""

    def __init__(self) -> None:
        self.asked: list[BlockRange] = []

    async def weights(self, manifest: object, blocks: BlockRange, **options: object) -> Any:
        self.asked.append(blocks)
        if len(self.asked) > 1:
            raise ModelError("the disk is full")
        return await super().weights(manifest, blocks, **options)


async def test_failed_move_keeps_old_blocks(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        library = FailsToMove()
        thirds = [await swarm.join_where_needed(3) for _ in range(3)]
        await trio.sleep(5)
        spare = await swarm.join_where_needed(3, library)
        before = spans_of(spare)
        await trio.sleep(60)
        swarm.hub.kill(thirds[2].id)
        await trio.sleep(200)
        assert spans_of(spare) == before
        assert [str(blocks) for blocks in library.asked] == [*before, "6-9"], "and it is not tried again at once"
        said = spare.placements.current().placements
        assert [str(placement.blocks) for placement in said] == before, "others know where it stays"


class HalfPrecision(FakeLibrary):
    """Has the fake model with weights that take twice the bytes once they are loaded."""

    async def manifest(self, text: str, **options: object) -> Any:
        return replace(await super().manifest(text, **options), config={"dtype": "bfloat16"})


async def test_node_takes_as_many_blocks_as_fit_when_loaded(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join_where_needed(6, HalfPrecision())  # of 8 files' room the ends take 4, and a block 2 each
        assert [len(span.blocks) for span in peer.stages.served_spans()] == [2]
