"""Jobs over several stages: what the submitter gets, and what the stages hold afterwards."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from unittest.mock import AsyncMock

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.chat import ChatMessage
from node.coordinator.job import Job
from node.coordinator.route_search import MAX_SHORTENINGS
from node.coordinator.submission import JobError, JobErrorCode, JobRequest, JobResult, JobStarted, TextDelta
from node.engine.interface import SliceFault, SliceInput, StepResult
from node.links.outbound_link import SessionRefused
from node.models.errors import ModelError, TokenizerBusyError, TokenizerEndedError
from node.models.tokenizer_service import no_tokenizer
from node.models.vocabulary import TokenKind, Vocabulary
from node.stages import session_admission
from node.stages.span import IDLE_LIMIT_S, Span
from node.swarm.heartbeats import HEARTBEAT_INTERVAL_S
from node.testing.fake_engine import UNSATISFIABLE, FakeEngine, expected_tokens, fake_span_info
from protocol.identity import BlockRange, SessionId, Stage
from protocol.messages import FinishReason, Load, Open, RefusalReason, Sampling
from tests.support.job_peers import BLOCKS, VOCABULARY, Peer, Swarm, a_step, an_opening, open_swarm

PROMPT = "3 1 4 1 5 9 2 6"
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
THIRDS = ((0, 3), (3, 6), (6, 9))


def right_tokens(count: int, sampling: Sampling | None = None) -> tuple[int, ...]:
    """What the whole model says, undisturbed and undivided."""
    return expected_tokens(fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS), TOKENS, count, sampling)


async def swarm_of_thirds(swarm: Swarm) -> Peer:
    """Three peers with a third of the blocks each, and one without any, which is returned."""
    for span in THIRDS:
        await swarm.join(span)
    coordinator = await swarm.join()
    await swarm.settle()
    return coordinator


async def all_free(swarm: Swarm) -> None:
    """Wait, at most a second, until no peer holds anything of any job."""
    with trio.fail_after(1):
        while any(peer.held() != (0, 0) for peer in swarm.peers):
            await trio.sleep(0.01)
    assert all(len(peer.stages.link_pool.receivers) == 0 for peer in swarm.peers)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TokenizerEndedError(), JobErrorCode.LEAVING),
        (TokenizerBusyError("256 requests wait"), JobErrorCode.FULL),
        (ModelError("no peer knows it"), JobErrorCode.MODEL_NOT_FOUND),
    ],
)
async def test_model_whose_tokenizer_is_unavailable_is_not_unknown(
    error: ModelError, code: JobErrorCode, virtual_clock: MockClock
) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9))
        peer.coordinator._open_model = AsyncMock(side_effect=error)
        with pytest.raises(JobError) as caught:
            await peer.run(JobRequest(model="fake", prompt=PROMPT))
        assert caught.value.code is code
        assert (caught.value.retry_after_s is None) == (code is JobErrorCode.MODEL_NOT_FOUND)


async def test_three_stages_generate_the_same_text_as_one(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        result = await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=20))
        assert result.token_ids == right_tokens(20)
        assert result.text == "".join(f"{token} " for token in result.token_ids)
        assert result.finish_reason is FinishReason.LENGTH
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (8, 20)
        assert [(stage.peer, str(stage.blocks)) for stage in result.route] == [
            (peer.id, f"{start}-{end}") for peer, (start, end) in zip(swarm.peers, THIRDS, strict=False)
        ]
        assert all(stage.statistics.compute_s > 0 for stage in result.route)
        assert 0 < result.timing.ttft_s < result.timing.total_s
        await all_free(swarm)


@pytest.mark.parametrize("spans", [((0, 9),), ((0, 4), (4, 9)), ((0, 1), (1, 2), (2, 8), (8, 9))])
async def test_every_split_into_stages_generates_the_same_text(
    virtual_clock: MockClock, spans: tuple[tuple[int, int], ...]
) -> None:
    async with open_swarm() as swarm:
        for span in spans:
            await swarm.join(span)
        await swarm.settle()
        for peer in swarm.peers:  # each coordinates a job of which it also serves a stage
            assert (await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=9))).token_ids == right_tokens(9)


async def test_overlapping_spans_are_split_at_the_best_block(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        first = await swarm.join((0, 6), step_s=0.01)
        await swarm.join((3, 9), step_s=0.002)
        await swarm.settle()
        request = JobRequest(model="fake", prompt=PROMPT, max_tokens=9)
        for _ in range(2):
            result = await first.run(request)
            assert result.token_ids == right_tokens(9)
            await trio.sleep(2 * HEARTBEAT_INTERVAL_S)
        assert [str(stage.blocks) for stage in result.route] == ["0-3", "3-9"], "their speed is known by now"
        await all_free(swarm)


async def test_one_peer_may_serve_several_stages_of_a_job(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        first = await swarm.join((0, 3), (6, 9))
        await swarm.join((3, 6))
        await swarm.settle()
        assert (await first.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=9))).token_ids == right_tokens(9)
        await all_free(swarm)


async def test_jobs_run_concurrently(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        results: list[JobResult] = []

        async def submit(seed: int) -> None:
            request = JobRequest(model="fake", prompt=PROMPT, max_tokens=10, temperature=1, seed=seed)
            results.append(await peer.run(request))

        async with trio.open_nursery() as nursery:
            for seed in range(12):
                nursery.start_soon(submit, seed)
        sampled = {right_tokens(10, Sampling(temperature=1, seed=seed, max_tokens=10)) for seed in range(12)}
        assert {result.token_ids for result in results} == sampled
        await all_free(swarm)


async def test_events_are_ordered_and_streamed_with_the_tokens(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        async with peer.coordinator.submit(JobRequest(model="fake", prompt=PROMPT, max_tokens=4)) as events:
            kinds = [type(event) async for event in events]
        assert kinds == [JobStarted, TextDelta, TextDelta, TextDelta, TextDelta, JobResult]


async def test_a_stop_token_and_a_stop_string_end_a_job(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        tokens = right_tokens(6)
        stopped = await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=20, stop=(f" {tokens[3]} ",)))
        assert stopped.text == "".join(f"{token} " for token in tokens[:3]).rstrip()
        assert stopped.finish_reason is FinishReason.STOP
        peer.tokenizer.stop_tokens = (tokens[2],)
        stopped = await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=20))
        assert stopped.token_ids == tokens[:3]
        assert stopped.finish_reason is FinishReason.STOP
        ignored = await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=6, ignore_eos=True))
        assert ignored.token_ids == tokens
        await all_free(swarm)


async def test_tokenizer_failure_during_a_job_is_a_one_line_error(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*sequences: object) -> list[str]:
        await trio.lowlevel.checkpoint()
        raise ModelError("the model's tokenizer took longer than 2 s")

    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        monkeypatch.setattr(peer.tokenizer, "vocabulary", Vocabulary.build(bytes([TokenKind.TEXT]) * VOCABULARY, None))
        monkeypatch.setattr(peer.tokenizer, "decode", fail)
        with pytest.raises(JobError, match=r"^the model's tokenizer took longer than 2 s$") as caught:
            await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=5))
        assert caught.value.code is JobErrorCode.FAILED
        await all_free(swarm)


async def test_each_text_goes_on_behind_its_prompt_though_a_stage_is_lost(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def decode(*sequences: Sequence[int]) -> list[str]:  # no space where a text begins, as of SentencePiece
        await trio.lowlevel.checkpoint()
        return [" ".join(map(str, tokens)) for tokens in sequences]

    async with open_swarm() as swarm:
        for span in (*THIRDS, *THIRDS):
            await swarm.join(span)
        peer = await swarm.join()
        await swarm.settle()
        monkeypatch.setattr(peer.tokenizer, "vocabulary", Vocabulary.build(bytes([TokenKind.TEXT]) * VOCABULARY, None))
        monkeypatch.setattr(peer.tokenizer, "decode", decode)
        replays: list[int] = []

        async def submit(seed: int, request: JobRequest) -> None:
            request = replace(request, max_tokens=20, temperature=1, seed=seed)
            async with peer.coordinator.submit(request) as events:
                async for event in events:
                    if isinstance(event, TextDelta) and not lost.is_set():
                        lost.set()
                        swarm.hub.kill(swarm.serving(THIRDS[1]).id)
            assert isinstance(event, JobResult)
            tokens = right_tokens(20, Sampling(temperature=1, seed=seed, max_tokens=20))
            assert event.text == "".join(f" {token}" for token in tokens)
            replays.append(event.replays)

        lost = trio.Event()
        async with trio.open_nursery() as nursery:
            for seed in range(2):
                nursery.start_soon(submit, seed, JobRequest(model="fake", prompt=PROMPT))
                nursery.start_soon(submit, seed, JobRequest(model="fake", prompt_tokens=tuple(TOKENS)))
        assert len(replays) == 4
        assert any(replays)


async def test_cancelled_job_frees_all_sessions(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        async with peer.coordinator.submit(JobRequest(model="fake", prompt=PROMPT, max_tokens=500)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    break
        await all_free(swarm)
        with trio.move_on_after(0.5):
            await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=500))
        await all_free(swarm)
        assert peer.coordinator.statistics.cancelled == 2


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("way", ["kill", "stop", "crash"])
async def test_replays_lost_stage_without_changing_text(virtual_clock: MockClock, stage: int, way: str) -> None:
    async with open_swarm() as swarm:
        for span in (*THIRDS, *THIRDS):
            await swarm.join(span)
        peer = await swarm.join()
        await swarm.settle()
        tokens: list[int] = []
        async with peer.coordinator.submit(JobRequest(model="fake", prompt=PROMPT, max_tokens=40)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    tokens += event.token_ids
                    if len(tokens) == 10:
                        serving = [p for p in swarm.peers if p.held()[0]]
                        before = [p.id for p in sorted(serving, key=lambda p: p.engines[0].info.blocks)]
                        victim = swarm.serving(THIRDS[stage])
                        lost_s = trio.current_time()
                        if way == "kill":
                            swarm.hub.kill(victim.id)
                        elif way == "stop":
                            swarm.hub.stop(victim.id)
                        else:
                            victim.engines[0].crash()
                    if len(tokens) == 12:
                        assert trio.current_time() - lost_s < (2 if way == "stop" else 0.5)
                        # Who lives has not calculated anything twice, and the newcomer calculated everything once.
                        sessions = [s for p in swarm.peers for span in p.stages.spans() for s in span.sessions.values()]
                        assert len(sessions) == (4 if way == "stop" else 3)
                        assert all(s.state.counters.rows <= len(TOKENS) + 13 for s in sessions)
                if isinstance(event, JobResult):
                    assert event.token_ids == right_tokens(40) == tuple(tokens)
                    assert event.replays == 1
                    # Nobody but the lost stage was replaced.
                    served = [s.peer for s in event.route]
                    assert served != before
                    assert [a == b for a, b in zip(served, before, strict=True)].count(False) == 1
                    assert served[stage] != victim.id == before[stage]


async def test_error_names_blocks_that_are_not_served(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        await swarm.join((0, 3))
        await swarm.join((6, 8))
        await swarm.settle()
        with pytest.raises(JobError, match=r"no peer serves blocks 3-6, 8-9 of fake") as caught:
            await swarm.peers[0].run(JobRequest(model="fake", prompt=PROMPT))
        assert caught.value.code is JobErrorCode.UNCOVERED
        assert caught.value.retry_after_s


async def test_full_peer_refuses_and_serves_again_once_it_has_room(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        for span in THIRDS:
            await swarm.join(span, kv_positions=100)
        peer = await swarm.join()
        await swarm.settle()
        async with peer.coordinator.submit(JobRequest(model="fake", prompt=PROMPT, max_tokens=80)):
            with pytest.raises(JobError, match="have no room now") as caught:
                await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=80))
            assert caught.value.code is JobErrorCode.FULL
        assert (await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=80))).token_ids == right_tokens(80)
        await all_free(swarm)


async def test_text_without_a_limit_takes_a_quarter_of_the_free_memory(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        await swarm.join((0, 5), kv_positions=1 << 14)
        await swarm.join((5, 9), kv_positions=2560)
        peer = await swarm.join()
        await swarm.settle()
        result = await peer.run(JobRequest(model="fake", prompt=PROMPT))
        assert (len(result.token_ids), result.finish_reason) == (640, FinishReason.LENGTH)
        assert result.token_ids == right_tokens(640)
        await all_free(swarm)


async def test_limit_of_a_text_is_that_of_the_route_that_serves_it(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[int] = []
    limit_to_share = Job.limit_to_share

    def after_a_small_route(self: Job, loads: Iterable[Load]) -> None:
        """A route whose stages have less memory was considered before."""
        limit_to_share(self, [replace(load, free_positions=2048) for load in loads])
        looked_at.append(self.sampling.max_tokens)
        limit_to_share(self, loads)

    monkeypatch.setattr(Job, "limit_to_share", after_a_small_route)
    async with open_swarm() as swarm:
        await swarm.join((0, 9), kv_positions=1 << 12)
        peer = await swarm.join()
        await swarm.settle()
        result = await peer.run(JobRequest(model="fake", prompt=PROMPT))
        assert looked_at == [512]
        assert len(result.token_ids) == 1024


async def test_texts_without_a_limit_leave_room_for_others(virtual_clock: MockClock) -> None:
    lengths: list[int] = []
    async with open_swarm() as swarm:
        await swarm.join((0, 9), kv_positions=3072)
        peer = await swarm.join()
        await swarm.settle()

        async def ask() -> None:
            lengths.append(len((await peer.run(JobRequest(model="fake", prompt=PROMPT))).token_ids))

        async with trio.open_nursery() as nursery:  # all at once, so that what is free is not known yet
            for _ in range(3):
                nursery.start_soon(ask)
        assert sorted(lengths) == [512, 768, 768], "the last one goes by a usual length"
        assert peer.coordinator.statistics.failed == 0


async def test_large_limit_for_which_there_is_no_room_now_takes_a_share(virtual_clock: MockClock) -> None:
    """Agents state the most that they know of: what one of them leaves serves the others."""
    job = JobRequest(model="fake", prompt=PROMPT, max_tokens=2500)
    async with open_swarm() as swarm:
        await swarm.join((0, 9), kv_positions=4096)
        peer, other = swarm.peers[0], await swarm.join()
        await swarm.settle()
        async with peer.coordinator.submit(job):
            result = await other.run(job)
            assert (len(result.token_ids), result.finish_reason) == (1024, FinishReason.LENGTH)
            assert result.token_ids == right_tokens(1024)
        assert len((await other.run(job)).token_ids) == 2500


async def test_large_limit_is_kept_where_sessions_are_full_and_memory_is_not(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_admission, "MAX_SESSIONS", 1)
    job = JobRequest(model="fake", prompt=PROMPT, max_tokens=1000)
    async with open_swarm() as swarm:
        await swarm.join((0, 9), kv_positions=1 << 14)
        peer = await swarm.join()
        await swarm.settle()
        async with peer.coordinator.submit(job):
            with pytest.raises(JobError, match="1 sessions of yours are open") as caught:
                await peer.run(job)
        assert (caught.value.code, bool(caught.value.retry_after_s)) == (JobErrorCode.FULL, True)
        assert len((await peer.run(job)).token_ids) == 1000


async def test_limit_that_no_stage_holds_takes_a_share(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        await swarm.join((0, 9), kv_positions=3072)
        await swarm.settle()
        result = await swarm.peers[0].run(JobRequest(model="fake", prompt=PROMPT, max_tokens=32_000))
        assert (len(result.token_ids), result.finish_reason) == (768, FinishReason.LENGTH)


async def test_limit_is_cut_to_what_the_smallest_stage_holds(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        await swarm.join((0, 5))
        await swarm.join((5, 9), kv_positions=512)
        peer = await swarm.join()
        await swarm.settle()
        for coordinator, held in ((peer, 512 * 7 // 8), (swarm.peers[1], 512)):  # an eighth is for its own jobs
            result = await coordinator.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=32_000))
            assert (len(result.token_ids), result.finish_reason) == (held - len(TOKENS), FinishReason.LENGTH)
            await all_free(swarm)


async def test_large_limit_takes_a_stage_that_holds_it(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        await swarm.join((0, 9), kv_positions=512, step_s=0.001)
        await swarm.join((0, 9), step_s=0.01)
        peer = await swarm.join()
        await swarm.settle()
        assert len((await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=600))).token_ids) == 600


async def test_certain_length_is_kept_while_the_stage_that_holds_it_is_full(virtual_clock: MockClock) -> None:
    job = JobRequest(model="fake", prompt=PROMPT, max_tokens=600, ignore_eos=True)
    async with open_swarm() as swarm:
        await swarm.join((0, 9), kv_positions=512)
        large = await swarm.join((0, 9), kv_positions=1024)
        peer = await swarm.join()
        await swarm.settle()
        async with peer.coordinator.submit(replace(job, stages=(Stage(large.id, BlockRange(0, 9)),))):
            with pytest.raises(JobError, match="have no room now") as caught:
                await peer.run(job)
            assert caught.value.retry_after_s
        assert len((await peer.run(job)).token_ids) == 600


async def test_large_limit_is_kept_while_the_link_to_the_stage_that_holds_it_is_broken(
    virtual_clock: MockClock,
) -> None:
    async with open_swarm() as swarm, trio.open_nursery() as nursery:
        await swarm.join((0, 9), kv_positions=512)
        large = await swarm.join((0, 9))
        peer = await swarm.join()
        await swarm.settle()

        async def come_back() -> None:
            await trio.sleep(4)
            swarm.hub.resume(large.id)

        swarm.hub.stop(large.id)
        nursery.start_soon(come_back)
        result = await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=600))
        assert len(result.token_ids) == 600


async def test_peer_that_always_has_one_position_less_ends_the_search(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def refuse(admission: object, span: Span, message: Open, peer: object) -> None:
        asked.append(message.positions)
        most = message.positions - 1
        raise session_admission._Refusal(RefusalReason.FULL, "no KV memory", span, most_positions=most)

    async with open_swarm() as swarm:
        await swarm.join((0, 9))
        peer = await swarm.join()
        await swarm.settle()
        monkeypatch.setattr(session_admission.SessionAdmission, "_check_size", refuse)
        with pytest.raises(JobError, match="no room now"):
            await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=600))
        assert asked == [608 - number for number in range(MAX_SHORTENINGS + 1)]


async def test_prompt_beyond_all_memory_is_refused_for_good(virtual_clock: MockClock) -> None:
    prompt = tuple(range(900))
    async with open_swarm() as swarm:
        await swarm.join((0, 9), kv_positions=1024)
        peer = await swarm.join()
        await swarm.settle()
        for limit in (None, 1, 500):
            with pytest.raises(JobError, match=r"prompt has 900 tokens, .* hold at most 896") as caught:
                await peer.run(JobRequest(model="fake", prompt_tokens=prompt, max_tokens=limit))
            assert caught.value.code is JobErrorCode.CONTEXT_LENGTH
            assert caught.value.retry_after_s is None
        assert len((await peer.run(JobRequest(model="fake", prompt_tokens=prompt[:800]))).token_ids) == 96
        await all_free(swarm)


async def test_background_job_gives_way_to_other_jobs(virtual_clock: MockClock) -> None:
    measurement = JobRequest(model="fake", prompt=PROMPT, max_tokens=8, background=True)
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        other = await swarm.join()
        await swarm.settle()
        for request in (replace(measurement, background=False), measurement):
            async with other.coordinator.submit(request):
                with pytest.raises(JobError, match="others, who come before a measurement") as caught:
                    await peer.run(measurement)
                assert caught.value.retry_after_s
        assert peer.coordinator.statistics.failed == 0
        async with peer.coordinator.submit(replace(measurement, background=False)):
            await peer.run(measurement)  # whether it is in the way of its own jobs is for the peer to say
        async with peer.coordinator.submit(measurement):
            await peer.run(measurement)  # of one peer several at a time are one measurement
            await peer.run(replace(measurement, background=False))
            await other.run(replace(measurement, background=False))  # nobody waits for it
        await all_free(swarm)


async def test_statistics_separate_failures_rejections_and_trials(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        counts = peer.coordinator.statistics
        await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=2))
        for mistake in (
            JobRequest(model="fake", prompt=""),
            JobRequest(model="fake", prompt=PROMPT, max_tokens=0),
            JobRequest(model="fake", prompt=PROMPT, method="engine=steam"),
        ):
            with pytest.raises(JobError):
                await peer.run(mistake)
        await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=2, background=True))
        async with peer.coordinator.submit(
            JobRequest(model="fake", prompt=PROMPT, max_tokens=2), lambda _: None
        ) as run:
            assert (counts.running, counts.trials_running) == (1, 1)
            async for _ in run:
                pass
        for lost in swarm.peers[1:]:
            swarm.hub.kill(lost.id)
        with pytest.raises(JobError):
            await peer.run(JobRequest(model="fake", prompt=PROMPT))
        with pytest.raises(JobError):
            await peer.run(JobRequest(model="fake", prompt=PROMPT, background=True))
        assert (counts.done, counts.rejected, counts.failed, counts.cancelled) == (1, 3, 1, 0)
        assert (counts.running, counts.trials_running, counts.trials_done, counts.trials_failed) == (0, 0, 2, 1)


async def test_draining_peer_finishes_its_jobs_and_refuses_new_ones(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        leaving = swarm.peers[1]
        async with peer.coordinator.submit(JobRequest(model="fake", prompt=PROMPT, max_tokens=30)) as events:
            leaving.stages.start_draining()
            await leaving.membership.leave()
            with pytest.raises(JobError) as caught:
                await peer.run(JobRequest(model="fake", prompt=PROMPT))
            assert caught.value.code is JobErrorCode.UNCOVERED
            assert [entry.peer for entry in peer.membership.directory.draining()] == [leaving.id]
            assert [event async for event in events][-1].token_ids == right_tokens(30)  # type: ignore[union-attr]
        with trio.fail_after(1):
            await leaving.stages.wait_idle()


@pytest.mark.parametrize("searches", [False, True], ids=["waits for a token", "searches for a stage"])
async def test_jobs_end_with_an_error_when_their_node_leaves(virtual_clock: MockClock, searches: bool) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        errors: list[JobErrorCode] = []

        async def submit(began: trio.Event) -> None:
            try:
                async with peer.coordinator.submit(JobRequest(model="fake", prompt=PROMPT, max_tokens=4000)) as events:
                    async for _ in events:
                        began.set()
            except JobError as error:
                errors.append(error.code)

        async with trio.open_nursery() as nursery:
            began = [trio.Event(), trio.Event()]
            for each in began:
                nursery.start_soon(submit, each)
            for each in began:
                await each.wait()
            if searches:
                swarm.hub.kill(swarm.peers[1].id)
                await trio.sleep(1)
            peer.coordinator.end_jobs()
            with trio.fail_after(2):
                await peer.coordinator.wait_idle()
        assert errors == [JobErrorCode.LEAVING] * 2
        assert peer.coordinator.statistics.failed == 2
        swarm.peers.pop(1) if searches else None
        await all_free(swarm)


async def test_opening_job_ends_with_an_error_when_its_node_leaves(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        await swarm.settle()

        async def leave() -> None:
            while not peer.coordinator.statistics.running:
                await trio.lowlevel.checkpoint()
            peer.coordinator.end_jobs()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave)
            with pytest.raises(JobError) as caught:
                await peer.run(JobRequest(model="fake", prompt=PROMPT, max_tokens=4000))
        assert caught.value.code is JobErrorCode.LEAVING
        await all_free(swarm)


@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_leaving_peer_migrates_its_sessions(virtual_clock: MockClock, stage: int) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        leaving = swarm.peers[stage]
        spare = await swarm.join(THIRDS[stage])
        await swarm.settle()
        async with peer.coordinator.submit(JobRequest(model="fake", prompt=PROMPT, max_tokens=40)) as events:
            if not leaving.held()[0]:
                leaving, spare = spare, leaving
            result: JobResult | None = None
            count = 0
            async for event in events:
                count += isinstance(event, TextDelta)
                if count == 10 and not leaving.stages.is_draining:
                    leaving.stages.start_draining()
                    await leaving.membership.leave()
                    leaving.stages.migrate_sessions()
                if count == 15:
                    assert leaving.held() == (0, 0)
                    assert spare.held()[0] == 1
                    swarm.hub.kill(leaving.id)
                result = event if isinstance(event, JobResult) else result
        assert result is not None
        assert result.token_ids == right_tokens(40)
        assert result.replays == 1


async def test_leaving_peer_without_replacement_serves_to_the_end(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        await swarm.join(THIRDS[1], kv_positions=16)  # has no room
        await swarm.settle()
        leaving = swarm.peers[1]
        async with peer.coordinator.submit(JobRequest(model="fake", prompt=PROMPT, max_tokens=40)) as events:
            leaving.stages.start_draining()
            await leaving.membership.leave()
            leaving.stages.migrate_sessions()
            assert [event async for event in events][-1].token_ids == right_tokens(40)  # type: ignore[union-attr]


async def test_rows_of_an_outsider_do_not_enter_a_session(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        stranger = await swarm.join()
        await swarm.settle()
        async with peer.coordinator.submit(JobRequest(model="fake", prompt=PROMPT, max_tokens=20)) as events:
            (session,) = (each.wire_id for each in swarm.peers[0].stages.spans()[0].sessions.values())
            link = await stranger.stages.link_pool.link_to(swarm.peers[0].id)
            lost = trio.Event()
            link.watch(session, lambda _: lost.set())
            await link.send_step(a_step(session))
            with trio.fail_after(1):
                await lost.wait()
            assert [event async for event in events][-1].token_ids == right_tokens(20)  # type: ignore[union-attr]


async def test_a_stage_beyond_every_route_is_refused(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9))
        stranger = await swarm.join()
        await swarm.settle()
        link = await stranger.stages.link_pool.link_to(peer.id)
        opening = an_opening(peer)
        with pytest.raises(SessionRefused, match="at most 64 stages"):
            await link.open(replace(opening, session=SessionId(opening.session.job, 64)))
        assert peer.held() == (0, 0)


async def test_idle_session_is_evicted(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9))
        hoarder = await swarm.join()
        await swarm.settle()
        link = await hoarder.stages.link_pool.link_to(peer.id)
        await link.open(an_opening(peer))
        assert peer.held() == (1, 4000)
        await trio.sleep(IDLE_LIMIT_S + 20)
        assert not link.broken
        assert peer.held() == (0, 0)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"prompt": ""}, JobErrorCode.INVALID),
        ({"prompt": None}, JobErrorCode.INVALID),
        ({"prompt": None, "prompt_tokens": (1000,)}, JobErrorCode.INVALID),
        ({"max_tokens": 0}, JobErrorCode.INVALID),
        ({"prompt": "7 " * 4096}, JobErrorCode.CONTEXT_LENGTH),
        ({"prompt": "7 " * 4097, "max_tokens": 1}, JobErrorCode.CONTEXT_LENGTH),
        ({"stop_token_ids": (1000,)}, JobErrorCode.INVALID),
        ({"stop_token_ids": tuple(range(65))}, JobErrorCode.INVALID),
        ({"logit_bias": ((1000, 1.0),)}, JobErrorCode.INVALID),
        ({"temperature": -1}, JobErrorCode.INVALID),
        ({"temperature": float("nan")}, JobErrorCode.INVALID),
        ({"top_p": 0}, JobErrorCode.INVALID),
        ({"method": "magic"}, JobErrorCode.INVALID),
    ],
)
async def test_invalid_request_names_the_reason(
    virtual_clock: MockClock, changes: dict[str, object], code: JobErrorCode
) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        with pytest.raises(JobError) as caught:
            await peer.run(JobRequest(**{"model": "fake", "prompt": PROMPT, **changes}))  # type: ignore[arg-type]
        assert caught.value.code is code
        assert "\n" not in caught.value.message


SCHEMA_REQUEST = JobRequest(
    model="fake", prompt=PROMPT, json_schema=UNSATISFIABLE, json_schema_param="format", stop_token_ids=(999,)
)


@pytest.mark.parametrize("last_stages", [1, 2, 3])
async def test_schema_that_fails_in_mid_text_costs_no_peer_its_trust(
    virtual_clock: MockClock, last_stages: int
) -> None:
    async with open_swarm() as swarm:
        for span in (*THIRDS[:2], *[THIRDS[2]] * last_stages):
            await swarm.join(span)
        peer = await swarm.join()
        await swarm.settle()
        began_s = trio.current_time()
        with pytest.raises(JobError) as caught:
            await peer.run(SCHEMA_REQUEST)
        assert trio.current_time() - began_s < 5, "no waiting for further peers"
        assert (caught.value.code, caught.value.param) == (JobErrorCode.INVALID, "format")
        assert "admits nothing" in caught.value.message
        asked = [each for each in swarm.peers[2:-1] if peer.id in each.stages.peer_statistics()]
        assert len(asked) == min(last_stages, 2), "a second opinion, and no third"
        assert not any(record.failed for record in peer.coordinator.peer_records().values())
        await all_free(swarm)


async def test_last_stage_that_refuses_what_another_can_do_loses_trust(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm() as swarm:
        for span in (*THIRDS, THIRDS[2]):
            await swarm.join(span)
        peer = await swarm.join()
        await swarm.settle()
        step = FakeEngine.step
        liars: list[FakeEngine] = []

        async def refuses(engine: FakeEngine, slices: Sequence[SliceInput]) -> StepResult:
            if engine.info.is_last and (engine in liars or not liars):
                liars[:] = [engine]
                faults = [SliceFault(each.session, "admits nothing", by_request=True) for each in slices]
                return StepResult(outputs=(), compute_s=0.0, faults=tuple(faults))
            return await step(engine, slices)

        monkeypatch.setattr(FakeEngine, "step", refuses)
        result = await peer.run(replace(SCHEMA_REQUEST, json_schema="{}", max_tokens=5, stop_token_ids=(999,)))
        assert len(result.token_ids) == 5
        failed = [name for name, record in peer.coordinator.peer_records().items() if record.failed]
        assert failed == [next(each.id for each in swarm.peers if liars[0] in each.engines)]


async def test_model_without_tokenizer_uses_token_ids(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of_thirds(swarm)
        known = replace(await peer.coordinator.model("fake"), tokenizer=no_tokenizer((VOCABULARY - 1,)))
        monkeypatch.setattr(peer.coordinator, "_open_model", AsyncMock(return_value=known))
        result = await peer.run(JobRequest(model="fake", prompt_tokens=tuple(TOKENS), max_tokens=5))
        assert (result.token_ids, result.text) == (right_tokens(5), "")
        for request in (
            JobRequest(model="fake", prompt=PROMPT),
            JobRequest(model="fake", messages=(ChatMessage(role="user", content=PROMPT),)),
            JobRequest(model="fake", prompt_tokens=tuple(TOKENS), stop=("3",)),
        ):
            with pytest.raises(JobError, match="the model has no tokenizer") as error:
                await peer.run(request)
            assert error.value.code is JobErrorCode.INVALID
        await all_free(swarm)
