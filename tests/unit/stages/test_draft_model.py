"""A draft model: its drafts save rounds, never change a text, and whatever becomes of it jobs go on."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.submission import JobError, JobErrorCode, JobResult, TextDelta
from node.engine.interface import REFERENCE, SliceInput, StepResult
from node.selection.chooser import LearnedChooser
from node.selection.prediction_cache import PredictionCache
from node.stages.draft_model import DRAFT_TIMEOUT_S, Draft, DraftModel
from node.testing.fake_engine import FakeEngine, fake_span_info
from node.testing.memory_links import LinkModel
from protocol.identity import BlockRange, JobId, PeerId, SessionId, peer_id_from_public_key
from protocol.messages import Slice
from protocol.tensors import tensor_from_tokens, tokens_from_tensor
from selector.task import BASELINE, method
from tests.support.job_peers import BLOCKS, Peer, Swarm, open_swarm
from tests.unit.coordinator.test_jobs import THIRDS, all_free, swarm_of_thirds
from tests.unit.coordinator.test_methods import PROMPTS, request, right, run_all

DRAFTED = method(speculation="draft-8")
PEERS = [peer_id_from_public_key(bytes([number]) * 32) for number in range(3)]


class Mumbling(FakeEngine):
    """Says what the model would, but for every so many positions."""

    wrong_every = 5

    async def step(self, slices: Sequence[SliceInput]) -> StepResult:
        result = await super().step(slices)
        outputs = []
        for rows, output in zip(slices, result.outputs, strict=True):
            wrong = int((rows.position + rows.tensor.rows) % self.wrong_every == 0)
            tokens = [(token + wrong) % self.info.vocabulary_size for token in tokens_from_tensor(output.tensor)]
            outputs.append(replace(output, tensor=tensor_from_tokens(tokens)))
        return replace(result, outputs=tuple(outputs))


def draft_engine(**shape: Any) -> Mumbling:
    return Mumbling(fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS, **shape), step_s=0.001)


async def swarm_with(swarm: Swarm, draft: FakeEngine) -> Peer:
    """Three peers with a third of the blocks each, the first with a draft model; return one without any."""
    await swarm.join(THIRDS[0], draft=draft)
    for span in THIRDS[1:]:
        await swarm.join(span)
    peer = await swarm.join()
    await swarm.settle()
    return peer


async def test_draft_tokens_save_rounds_without_changing_text(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_with(swarm, draft_engine())
        plain = await peer.run(request(PROMPTS[0], 40, BASELINE))
        drafted = await peer.run(request(PROMPTS[0], 40, DRAFTED))
        assert drafted.token_ids == plain.token_ids == right(PROMPTS[0], 40)
        assert 25 < drafted.usage.accepted_draft_tokens < 40
        assert drafted.timing.total_s < plain.timing.total_s / 2
        await all_free(swarm)


async def test_draft_model_serves_concurrent_sessions(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_with(swarm, draft_engine())
        results = await run_all(peer, [request(prompt, 24, DRAFTED) for prompt in PROMPTS])
        assert [result.token_ids for result in results] == [right(prompt, 24) for prompt in PROMPTS]
        assert all(result.usage.accepted_draft_tokens for result in results)
        sampled = await peer.run(request(PROMPTS[0], 24, DRAFTED, temperature=1.0, seed=3))
        assert (
            sampled.token_ids == (await peer.run(request(PROMPTS[0], 24, BASELINE, temperature=1.0, seed=3))).token_ids
        )
        await all_free(swarm)


async def test_job_does_not_wait_while_draft_model_reads_prompt(virtual_clock: MockClock) -> None:
    draft = Mumbling(fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS), step_s=0.001, row_s=1.0)
    async with open_swarm() as swarm:
        peer = await swarm_with(swarm, draft)
        result = await peer.run(request(PROMPTS[3], 20, DRAFTED))
        assert result.token_ids == right(PROMPTS[3], 20)
        assert result.usage.accepted_draft_tokens == 0
        assert result.timing.total_s < 2
        with trio.fail_after(len(PROMPTS[3]) + 10):  # it gives the session up once its step is over
            while peer.held() != (0, 0) or any(other.held() != (0, 0) for other in swarm.peers):
                await trio.sleep(1)


async def test_drafting_does_not_wait_for_prefill_of_others(virtual_clock: MockClock) -> None:
    draft = Mumbling(fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS), step_s=0.001, row_s=0.002)
    async with open_swarm() as swarm:
        peer = await swarm_with(swarm, draft)
        alone = await peer.run(request(PROMPTS[7], 24, DRAFTED))
        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(peer.run, request((number, *range(600)), 2, DRAFTED))
            await trio.sleep(0.2)
            beside = await peer.run(request(PROMPTS[7], 24, DRAFTED))
        assert beside.token_ids == alone.token_ids
        assert beside.usage.accepted_draft_tokens > 8
        assert beside.timing.ttft_s < 5


async def test_draft_timeout_when_draft_model_hangs(virtual_clock: MockClock) -> None:
    class Hanging(Mumbling):
        hangs = False

        async def step(self, slices: Sequence[SliceInput]) -> StepResult:
            if self.hangs:
                await trio.sleep(1000)
            return await super().step(slices)

    draft = Hanging(draft_engine().info, step_s=0.001)
    async with open_swarm() as swarm:
        peer = await swarm_with(swarm, draft)
        tokens: list[int] = []
        async with peer.coordinator.submit(request(PROMPTS[0], 60, DRAFTED)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    tokens += event.token_ids
                    if len(tokens) == 12:
                        draft.hangs, hung_s = True, trio.current_time()
        assert tuple(tokens) == right(PROMPTS[0], 60)
        assert trio.current_time() - hung_s < DRAFT_TIMEOUT_S + 3


async def test_late_draft_rows_are_not_taken_for_text(virtual_clock: MockClock) -> None:
    draft = Mumbling(draft_engine().info, step_s=0.3)
    async with open_swarm() as swarm:
        peer = await swarm_with(swarm, draft)
        result = await peer.run(request(PROMPTS[0], 40, DRAFTED))
        assert result.token_ids == right(PROMPTS[0], 40)
        assert 0 < result.usage.accepted_draft_tokens < 30
        await trio.sleep(1)
        await all_free(swarm)


async def test_cancelled_open_frees_draft_model_memory(virtual_clock: MockClock) -> None:
    engine = draft_engine()
    model = DraftModel(engine, REFERENCE, PEERS[0])
    async with trio.open_nursery() as nursery:
        await nursery.start(model.run)
        for number in range(8):
            with trio.CancelScope() as scope:
                scope.cancel() if number % 2 else nursery.start_soon(cancel_at_next_step, scope)
                opened = await model.open(SessionId(JobId(f"{number:032x}"), 0), PEERS[1], 256, 1000, None)
                assert opened is not None  # it was not cancelled in time
                opened.close()
        await trio.sleep(0.1)
        assert engine.statistics().reserved_positions == 0
        nursery.cancel_scope.cancel()


async def test_peers_share_draft_model_memory(virtual_clock: MockClock) -> None:
    own, greedy, modest = PEERS
    engine = draft_engine(kv_positions=1024)
    model = DraftModel(engine, REFERENCE, own)
    numbers = itertools.count()

    async def open_for(peer: PeerId) -> Draft | None:
        return await model.open(SessionId(JobId(f"{next(numbers):032x}"), 0), peer, 64, 1000, None)

    async with trio.open_nursery() as nursery:
        await nursery.start(model.run)
        held = [draft for _ in range(16) if (draft := await open_for(greedy)) is not None]
        assert 64 * len(held) == 768, "an eighth is for own jobs, and another one for the next peer"
        assert await open_for(modest) is not None
        assert await open_for(own) is not None
        for draft in held:
            draft.close()
        await trio.sleep(0.1)
        assert engine.statistics().reserved_positions == 128
        assert await open_for(greedy) is not None
        nursery.cancel_scope.cancel()


async def cancel_at_next_step(scope: trio.CancelScope) -> None:
    await trio.lowlevel.checkpoint()
    scope.cancel()


async def test_rows_while_drafts_are_pending_cost_only_their_session(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last stage that tells the first one two tokens at once, of which the second follows nothing."""
    honest = Draft.draft

    def slow(self: Draft, count: int, then: Callable[[Sequence[int]], None]) -> None:
        honest(self, count, then)
        if self.is_pending and not repeated:
            repeated.append(True)
            (span,) = swarm.peers[0].stages.spans()
            session = next(s for s in span.sessions.values() if s._tracker and s._tracker._drafter is self)
            session.receive(
                Slice(session=session.id, position=len(PROMPTS[0]) + 1, rows=1, draws=0),
                tensor_from_tokens([1]),
                session.opened_by,
            )

    repeated: list[bool] = []
    monkeypatch.setattr(Draft, "draft", slow)
    async with open_swarm() as swarm:
        peer = await swarm_with(swarm, draft_engine())
        results = await run_all(peer, [request(prompt, 24, DRAFTED) for prompt in PROMPTS])
        assert repeated
        assert [result.token_ids for result in results] == [right(prompt, 24) for prompt in PROMPTS]
        assert sum(result.is_replayed for result in results) == 1
        await all_free(swarm)


async def test_draft_model_uses_prefix_cache(virtual_clock: MockClock) -> None:
    draft = Mumbling(draft_engine().info, step_s=0.001, row_s=0.01)
    cached = method(speculation="draft-8", prefix_cache="on")
    async with open_swarm() as swarm:
        peer = await swarm_with(swarm, draft)
        first = await peer.run(request((*PROMPTS[3], 1), 24, cached))
        await trio.sleep(5)
        again = await peer.run(request((*PROMPTS[3], 2), 24, cached))
        assert again.usage.accepted_draft_tokens > first.usage.accepted_draft_tokens
        await all_free(swarm)


@pytest.mark.parametrize("token", [-1, 1000])
def test_draft_model_refuses_invalid_token(token: int) -> None:
    model = DraftModel(draft_engine(), REFERENCE, PEERS[0])
    session = SessionId(JobId("00" * 16), 0)
    draft = Draft(session, model, held=0, positions=100, vocabulary_sizes=(1000, 1000))
    draft.extend([1, 2, token])
    draft.draft(4, lambda drafts: None)
    answers: list[Sequence[int]] = []
    draft.draft(4, answers.append)
    assert answers == [()]


async def test_draft_model_without_kv_memory_costs_only_drafts(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_with(swarm, draft_engine(kv_positions=16))
        result = await peer.run(request(PROMPTS[0], 24, DRAFTED))
        assert result.token_ids == right(PROMPTS[0], 24)
        assert result.usage.accepted_draft_tokens == 0
        await all_free(swarm)


@pytest.mark.parametrize(("vocabulary_size", "some"), [(500, False), (4000, True)])
async def test_tokens_of_one_vocabulary_only_cost_only_drafts(
    virtual_clock: MockClock, vocabulary_size: int, some: bool
) -> None:
    class Wordy(FakeEngine):
        """Says what the model would, and every third time what only it knows."""

        async def step(self, slices: Sequence[SliceInput]) -> StepResult:
            result = await super().step(slices)
            size = self.info.vocabulary_size
            outputs = []
            for rows, output in zip(slices, result.outputs, strict=True):
                end = rows.position + rows.tensor.rows
                known = right(PROMPTS[0], 60)[end - len(PROMPTS[0]) :][: len(tokens_from_tensor(output.tensor))]
                tokens = [size - 1 if end % 3 == 0 else token % size for token in known]
                outputs.append(replace(output, tensor=tensor_from_tokens(tokens)))
            return replace(result, outputs=tuple(outputs))

    info = fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS, vocabulary_size=vocabulary_size)
    async with open_swarm() as swarm:
        peer = await swarm_with(swarm, Wordy(info, step_s=0.001))
        result = await peer.run(request(PROMPTS[0], 40, DRAFTED))
        assert result.token_ids == right(PROMPTS[0], 40)
        assert bool(result.usage.accepted_draft_tokens) is some
        await all_free(swarm)


async def test_jobs_go_on_when_draft_model_crashes(virtual_clock: MockClock) -> None:
    draft = draft_engine()
    async with open_swarm() as swarm:
        peer = await swarm_with(swarm, draft)
        tokens: list[int] = []
        async with peer.coordinator.submit(request(PROMPTS[0], 40, DRAFTED)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    tokens += event.token_ids
                    if len(tokens) == 12:
                        draft.crash()
        assert tuple(tokens) == right(PROMPTS[0], 40)
        assert peer.coordinator.statistics.done == 1
        with pytest.raises(JobError, match="not ready") as caught:  # it will be back
            await peer.run(request(PROMPTS[0], 5, DRAFTED))
        assert caught.value.retry_after_s
        # Where the method is left open, it is one that can be had.
        assert (await peer.run(request(PROMPTS[0], 5))).method.switches["speculation"] != "draft-8"
        await all_free(swarm)


async def test_missing_draft_model_is_reported(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        with pytest.raises(JobError, match=r"is not available .* no draft model \(--draft\)") as caught:
            await peer.run(request(PROMPTS[0], 5, DRAFTED))
        assert caught.value.code is JobErrorCode.INVALID
        assert caught.value.retry_after_s is None


@pytest.mark.parametrize("latency_s", [0.001, 0.05])
async def test_method_that_no_stage_offers_is_not_default(virtual_clock: MockClock, latency_s: float) -> None:
    chooser = LearnedChooser(PredictionCache(), random.Random(1), share=0.0)
    async with open_swarm(link=LinkModel(latency_s=latency_s)) as swarm:
        for span in THIRDS:
            await swarm.join(span)
        peer = await swarm.join(chooser=chooser)
        await swarm.settle()
        result = await peer.run(request(PROMPTS[0], 64))
        assert result.method.switches["engine"] == "onnxruntime"  # as the rule has it


@pytest.mark.parametrize("stage", [0, 1])
async def test_failover_to_stage_without_draft_model_goes_on_without_drafts(
    virtual_clock: MockClock, stage: int
) -> None:
    async with open_swarm() as swarm:
        await swarm_with(swarm, draft_engine())
        for span in THIRDS:
            await swarm.join(span)
        peer = await swarm.join(chooser=LearnedChooser(PredictionCache(), random.Random(1)))
        await swarm.settle()
        tokens: list[int] = []
        async with peer.coordinator.submit(request(PROMPTS[0], 60, DRAFTED)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    tokens += event.token_ids
                    if len(tokens) == 12:
                        swarm.hub.kill(swarm.serving(THIRDS[stage]).id)
                if isinstance(event, JobResult):
                    assert event.token_ids == right(PROMPTS[0], 60) == tuple(tokens)
                    assert event.replays == 1
                    assert event.method.switches["speculation"] == ("draft-8" if stage else "off")
        assert peer.coordinator.statistics.done == 1
