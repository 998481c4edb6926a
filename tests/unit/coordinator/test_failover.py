"""A job whose stage is lost and has no other holder: it ends soon, unless somebody known could take the place."""

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from node.coordinator.route import OpenRoute
from node.coordinator.submission import USUAL_TOKENS, JobError, JobErrorCode, JobRequest, JobResult, TextDelta
from node.engine.activation_codec import encode_rows
from node.engine.interface import SliceInput, StepResult
from node.links.inbound_link import InboundLink
from node.links.outbound_link import SessionLost
from node.stages.session import StageSession
from node.stages.span import Span
from node.testing.fake_engine import FakeEngine, expected_tokens, fake_span_info
from protocol.announcements import Placement
from protocol.identity import BlockRange, Stage
from protocol.messages import Begin, FailureReason, FinishReason, Slice
from protocol.tensors import DType, Tensor, tensor_from_tokens
from selector.task import method
from tests.support.job_peers import BLOCKS, VOCABULARY, Peer, Swarm, open_swarm
from tests.unit.coordinator.test_jobs import PROMPT, THIRDS, right_tokens

REQUEST = JobRequest(model="fake", prompt=PROMPT, max_tokens=40)


async def lose_in_mid_job(
    peer: Peer, lose: Callable[[], None], request: JobRequest = REQUEST
) -> tuple[JobResult | JobError, float]:
    """Run a job of which something is lost after some tokens; return what came of it, and how long after the loss."""
    lost_s, count = 0.0, 0
    try:
        async with peer.coordinator.submit(request) as events:
            async for event in events:
                count += isinstance(event, TextDelta)
                if count == 10 and not lost_s:
                    lost_s = trio.current_time()
                    lose()
                if isinstance(event, JobResult):
                    return event, trio.current_time() - lost_s
    except JobError as error:
        return error, trio.current_time() - lost_s
    raise AssertionError("a job ends with its result")


async def swarm_without_spares(swarm: Swarm) -> Peer:
    for span in THIRDS:
        await swarm.join(span)
    peer = await swarm.join()
    await swarm.settle()
    return peer


@pytest.mark.parametrize("way", ["kill", "stop"])
async def test_fails_within_seconds_without_candidates_for_a_lost_stage(virtual_clock: MockClock, way: str) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_without_spares(swarm)
        victim = swarm.peers[1]
        peer.coordinator.observer = observer = Mock(start_trace=lambda parent: parent)
        with capture_logs() as logs:
            error, waited_s = await lose_in_mid_job(peer, lambda: getattr(swarm.hub, way)(victim.id))
        assert isinstance(error, JobError)
        assert error.code is JobErrorCode.UNCOVERED
        assert error.retry_after_s
        assert "blocks 3-6" in error.message
        assert victim.id in error.message
        assert waited_s < 9
        assert observer.on_job_ended.call_args.args[0].replays == 0, "nobody took its place"
        ours = [log for log in logs if log["log_level"] in {"info", "warning"} and "job" in log]
        assert [log["event"] for log in ours] == ["stage lost", "no route left; waiting for a peer"]
        with trio.fail_after(2):
            while any(each.held() != (0, 0) for each in swarm.peers if each is not victim):
                await trio.sleep(0.01)


async def test_reconnects_at_once_to_a_stage_whose_link_alone_broke(virtual_clock: MockClock) -> None:
    """A relay that dies takes the way between two peers, and no other peer serves these blocks."""
    async with open_swarm() as swarm:
        peer = await swarm_without_spares(swarm)

        def cut() -> None:
            first, second, *_ = swarm.peers
            swarm.hub.networks[first.id].lose_connection(second.id)

        with capture_logs() as logs:
            result, _ = await lose_in_mid_job(peer, cut)
        assert isinstance(result, JobResult)
        # No stage was replaced, but the times are not those of an undisturbed job.
        assert (result.token_ids, result.replays, result.is_replayed) == (right_tokens(40), 0, True)
        # Nobody else was searched for, which takes seconds in a real swarm.
        assert [log["event"] for log in logs if log["log_level"] == "warning" and "job" in log] == []


async def test_job_on_given_stages_may_be_retried_once_a_link_broke(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else is to serve it, and its methods are not at fault."""
    send_prompt = OpenRoute.send_prompt
    async with open_swarm() as swarm:
        peer = await swarm_without_spares(swarm)
        broken = swarm.peers[1]

        async def cut(self: OpenRoute, tokens: Sequence[int], hidden_size: int) -> None:
            swarm.hub.networks[peer.id].lose_connection(broken.id)
            await trio.sleep(0.1)
            await send_prompt(self, tokens, hidden_size)

        monkeypatch.setattr(OpenRoute, "send_prompt", cut)
        stages = tuple(Stage(each.id, BlockRange(*span)) for each, span in zip(swarm.peers, THIRDS, strict=False))
        with pytest.raises(JobError, match=f"no peer is left .* {broken.id}") as caught:
            await peer.run(replace(REQUEST, stages=stages))
        assert (caught.value.code, caught.value.retry_after_s is None) == (JobErrorCode.UNCOVERED, False)


async def test_new_job_waits_for_a_peer_whose_link_broke_while_it_was_opened(virtual_clock: MockClock) -> None:
    """A peer was too busy to answer for a moment: jobs that begin then are served once it is back."""
    async with open_swarm() as swarm, trio.open_nursery() as nursery:
        peer = await swarm_without_spares(swarm)
        busy = swarm.peers[1]

        async def come_back() -> None:
            await trio.sleep(4)
            swarm.hub.resume(busy.id)

        swarm.hub.stop(busy.id)
        nursery.start_soon(come_back)
        result, _ = await lose_in_mid_job(peer, lambda: None)
        assert isinstance(result, JobResult)
        assert result.token_ids == right_tokens(40)


async def test_replays_on_a_peer_that_joins_within_the_hopeless_limit(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm, trio.open_nursery() as nursery:
        peer = await swarm_without_spares(swarm)

        def lose() -> None:
            swarm.hub.kill(swarm.peers[1].id)
            nursery.start_soon(swarm.join, THIRDS[1])

        result, waited_s = await lose_in_mid_job(peer, lose)
        assert isinstance(result, JobResult)
        assert (result.token_ids, result.replays) == (right_tokens(40), 1)
        assert waited_s < 9


async def test_waits_for_a_peer_that_announced_the_lost_blocks(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm, trio.open_nursery() as nursery:
        peer = await swarm_without_spares(swarm)
        victim = swarm.peers[1]
        blocks = BlockRange(*THIRDS[1])
        placement = Placement(model=victim.engines[0].info.model, blocks=blocks, rate=1.0, movable=False)
        victim.placements.publish("span", placement)
        await trio.sleep(5)

        async def load_again() -> None:
            await trio.sleep(30)
            await swarm.serve_again(victim, THIRDS[1])

        def lose() -> None:
            victim.engines[0].crash()
            nursery.start_soon(load_again)

        result, waited_s = await lose_in_mid_job(peer, lose)
        assert isinstance(result, JobResult)
        assert (result.token_ids, result.replays, result.is_replayed) == (right_tokens(40), 0, True)
        assert 30 < waited_s < 40
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("spare_positions", [1024, 4096], ids=["small", "busy"])
async def test_text_without_a_limit_goes_on_where_there_is_less_memory(
    virtual_clock: MockClock, spare_positions: int
) -> None:
    """It had 2,048 tokens on the peer that is lost. One can hold 896 positions at most, the other has 584 free."""
    async with open_swarm() as swarm:
        large = await swarm.join((0, BLOCKS), kv_positions=1 << 13, step_s=0.001)
        peer, other = await swarm.join(), await swarm.join()
        await swarm.settle()
        spare = await swarm.join((0, BLOCKS), kv_positions=spare_positions, step_s=0.001)
        await swarm.settle()
        held = JobRequest(
            model="fake", prompt=PROMPT, max_tokens=2992, stages=(Stage(spare.id, BlockRange(0, BLOCKS)),)
        )
        async with AsyncExitStack() as stack:
            if spare_positions == 4096:
                await stack.enter_async_context(other.coordinator.submit(held))
            asked = replace(REQUEST, max_tokens=None, stages=(Stage(large.id, BlockRange(0, BLOCKS)),))
            result, waited_s = await lose_in_mid_job(peer, lambda: swarm.hub.kill(large.id), asked)
            assert isinstance(result, JobResult)
            length = len(result.token_ids)
            at_the_loss = length - USUAL_TOKENS  # some tokens were on their way
            assert length == 896 - 8 if spare_positions == 1024 else 10 <= at_the_loss < 50
            assert (result.token_ids, result.replays) == (right_tokens(length), 1)
            assert result.finish_reason is FinishReason.LENGTH
            assert waited_s < 10


WHOLE_TEXT = 640
"""Tokens of a text without a limit on a peer with 2,560 positions: a quarter."""


async def text_without_a_limit(swarm: Swarm, peer: Peer, on_token: Callable[[int], None]) -> JobResult:
    """Run a job on the swarm's first peer that may go on anywhere; `on_token` is called with the number of tokens."""
    asked = replace(REQUEST, max_tokens=None, stages=(Stage(swarm.peers[0].id, BlockRange(0, BLOCKS)),))
    count = 0
    async with peer.coordinator.submit(asked) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                count += 1
                on_token(count)
            if isinstance(event, JobResult):
                return event
    raise AssertionError("a job ends with its result")


@pytest.mark.parametrize("spare", ["small", "busy"])
async def test_text_without_a_limit_is_not_cut_for_a_peer_that_leaves(virtual_clock: MockClock, spare: str) -> None:
    """The other peer has no room for all of it: it stays where it is, and the peer that leaves serves to the end."""
    async with open_swarm() as swarm:
        leaving = await swarm.join((0, BLOCKS), kv_positions=2560)
        peer, other = await swarm.join(), await swarm.join()
        await swarm.settle()
        spare_peer = await swarm.join((0, BLOCKS), kv_positions=512 if spare == "small" else 2560)
        await swarm.settle()
        stages = (Stage(spare_peer.id, BlockRange(0, BLOCKS)),)
        held = JobRequest(model="fake", prompt=PROMPT, max_tokens=1992, stages=stages)

        def leave(count: int) -> None:
            if count == 10:
                leaving.stages.start_draining()
                leaving.stages.migrate_sessions()

        async with AsyncExitStack() as stack:
            if spare == "busy":
                await stack.enter_async_context(other.coordinator.submit(held))
            result = await text_without_a_limit(swarm, peer, leave)
        assert (result.token_ids, result.replays) == (right_tokens(WHOLE_TEXT), 0)
        assert [stage.peer for stage in result.route] == [leaving.id]


@pytest.mark.parametrize("spare", ["small", "busy"])
async def test_text_that_was_shortened_for_one_peer_is_whole_on_another(virtual_clock: MockClock, spare: str) -> None:
    """The peer with less room is lost, too, or has none at all: then another joins that has it."""
    async with open_swarm() as swarm, trio.open_nursery() as nursery:
        large = await swarm.join((0, BLOCKS), kv_positions=2560)
        peer, other = await swarm.join(), await swarm.join()
        await swarm.settle()
        spare_peer = await swarm.join((0, BLOCKS), kv_positions=512 if spare == "small" else 1024)
        await swarm.settle()
        stages = (Stage(spare_peer.id, BlockRange(0, BLOCKS)),)
        held = JobRequest(model="fake", prompt=PROMPT, max_tokens=792, stages=stages)

        async def join_later() -> None:
            await trio.sleep(3)
            await swarm.join((0, BLOCKS), kv_positions=2560)

        def lose(count: int) -> None:
            if count == 10:
                swarm.hub.kill(large.id)
            if count == (20 if spare == "small" else 10):
                nursery.start_soon(join_later)
            if count == 20 and spare == "small":
                swarm.hub.kill(spare_peer.id)

        async with AsyncExitStack() as stack:
            if spare == "busy":
                await stack.enter_async_context(other.coordinator.submit(held))
            result = await text_without_a_limit(swarm, peer, lose)
        assert (result.token_ids, result.replays) == (right_tokens(WHOLE_TEXT), 2 if spare == "small" else 1)


async def test_text_that_was_shortened_behind_a_peer_that_left_is_whole_on_another(virtual_clock: MockClock) -> None:
    """What the peer that left once held of it does not bind the routes behind."""
    async with open_swarm() as swarm, trio.open_nursery() as nursery:
        first = await swarm.join((0, BLOCKS), kv_positions=2560)
        peer, _ = [await swarm.join() for _ in range(2)]
        await swarm.settle()
        large, small = [await swarm.join((0, BLOCKS), kv_positions=positions) for positions in (2560, 512)]
        await swarm.settle()

        async def join_later() -> None:
            await trio.sleep(2)
            await swarm.join((0, BLOCKS), kv_positions=2560)

        def lose(count: int) -> None:
            if count == 10:
                first.stages.start_draining()
                first.stages.migrate_sessions()
            if count == 20:
                swarm.hub.kill(first.id)
            if count == 60:
                swarm.hub.kill(large.id)
            if count == 300:
                swarm.hub.kill(small.id)
                nursery.start_soon(join_later)

        result = await text_without_a_limit(swarm, peer, lose)
        assert (result.token_ids, result.replays) == (right_tokens(WHOLE_TEXT), 3)


async def test_limit_that_was_lowered_before_the_text_began_stays(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join()
        first, _ = [await swarm.join((0, BLOCKS), kv_positions=512) for _ in range(2)]
        await swarm.settle()
        asked = replace(REQUEST, max_tokens=600)

        def kill() -> None:
            serving = first if first.held()[0] else swarm.peers[-1]
            swarm.hub.kill(serving.id)

        result, _ = await lose_in_mid_job(peer, kill, asked)
        assert isinstance(result, JobResult)
        assert (result.replays, result.finish_reason) == (1, FinishReason.LENGTH)
        assert 40 < len(result.token_ids) < 512


async def test_running_text_with_a_limit_is_not_cut(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        large = await swarm.join((0, BLOCKS))
        peer = await swarm.join()
        await swarm.settle()
        await swarm.join((0, BLOCKS), kv_positions=512)
        await swarm.settle()
        error, _ = await lose_in_mid_job(peer, lambda: swarm.hub.kill(large.id), replace(REQUEST, max_tokens=600))
        assert isinstance(error, JobError)
        assert (error.code, error.retry_after_s is None) == (JobErrorCode.FULL, False)


async def test_job_that_lost_its_drafter_goes_on_without_speculation(virtual_clock: MockClock) -> None:
    drafting = method(engine="fused", speculation="draft-8")
    asked = JobRequest(model="fake", prompt=PROMPT, max_tokens=40, method=drafting.name)

    def draft_engine() -> FakeEngine:
        return FakeEngine(fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS), step_s=0.001)

    async with open_swarm() as swarm, trio.open_nursery() as nursery:
        peer = await swarm.join()
        for span in THIRDS[1:]:
            await swarm.join(span)
        await swarm.join(THIRDS[0], draft=draft_engine())
        await swarm.settle()
        count = 0
        async with peer.coordinator.submit(asked) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    count += 1
                    if count in {5, 15}:  # replaced first by a peer without a draft model, then by one with it
                        swarm.hub.kill(swarm.peers[-1].id)
                        draft = None if count == 5 else draft_engine()
                        nursery.start_soon(partial(swarm.join, THIRDS[0], draft=draft))
                if isinstance(event, JobResult):
                    assert (event.token_ids, event.replays) == (right_tokens(40), 2)
                    assert event.method.name == drafting.without_speculation.name


async def test_nothing_is_kept_of_what_a_stage_sent_whose_rows_are_rejected_later(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on the stage that rejects them, and not on the one behind it, which has computed with them, too."""
    prompt, chunks = tuple(range(200)), list[int]()
    info = fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS)
    async with open_swarm() as swarm:
        liar = await swarm.join((3, 5))
        for span in ((0, 3), (5, 7), (7, 9)):
            await swarm.join(span)
        peer = await swarm.join()
        await swarm.settle()
        (engine,) = liar.engines
        run = engine._run

        def lie(rows: SliceInput) -> Tensor:
            tensor = run(rows)
            chunks.append(rows.tensor.rows)
            wrong = np.full(tensor.shape, 0.5 if len(chunks) == 1 else np.nan, np.float32)
            return encode_rows(wrong, "fp32")

        monkeypatch.setattr(engine, "_run", lie)
        chunked = method(engine="fused", prefill_chunk="64").name
        async with trio.open_nursery() as nursery:

            async def replace_it() -> None:
                while len(chunks) < 2:
                    await trio.sleep(0.01)
                await swarm.join((3, 5))

            nursery.start_soon(replace_it)
            request = JobRequest(model="fake", prompt_tokens=prompt, max_tokens=5, ignore_eos=True, method=chunked)
            result = await peer.run(request)
        assert result.replays
        assert result.token_ids == expected_tokens(info, prompt, 5)


@pytest.mark.parametrize("way", ["late", "invalid"])
async def test_link_has_no_entry_of_an_output_that_was_not_taken(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A link's table is bounded: entries that stay would end a link of long standing, with all jobs on it."""
    links = set[InboundLink]()
    admit, send_prompt = OpenRoute.admit, OpenRoute.send_prompt

    def record(self: OpenRoute, part: Slice, dtype: DType, width: tuple[int, ...], link: InboundLink) -> bool:
        links.add(link)
        return admit(self, part, dtype, width, link)

    async def lose(self: OpenRoute, tokens: Sequence[int], hidden_size: int) -> None:
        monkeypatch.setattr(OpenRoute, "send_prompt", send_prompt)  # the next route is left alone
        if way == "invalid":
            self.request = replace(self.request, sampling=replace(self.request.sampling, logprobs=1))
        await self.send_prompt(tokens, hidden_size)
        if way == "late":
            (stage,) = self.stages
            self.lose(SessionLost(stage.peer, stage.peer, FailureReason.DOWNSTREAM, "given up", lagged=True))
        await trio.sleep(0.1)  # its token comes now

    monkeypatch.setattr(OpenRoute, "admit", record)
    monkeypatch.setattr(OpenRoute, "send_prompt", lose)
    async with open_swarm() as swarm:
        await swarm.join((0, BLOCKS))
        peer = await swarm.join()
        await swarm.settle()
        result = await peer.run(
            replace(REQUEST, max_tokens=5)
        )  # all that the lost route sends comes before it is closed
        assert result.token_ids == right_tokens(5)
        assert [link.session_count for link in links] == [0]


def faults_at(*peers: Peer) -> list[int]:
    """Return how many faults peers have put down to others."""
    return [sum(each.faults for each in peer.stages.peer_statistics().values()) for peer in peers]


def answering(engine: FakeEngine, change: Callable[[Tensor], Tensor], after: int) -> Any:
    """Return the step of an engine that changes its outputs after so many steps."""
    step, steps = engine.step, 0

    async def changed(slices: Sequence[SliceInput]) -> StepResult:
        nonlocal steps
        result = await step(slices)
        steps += 1
        outputs = [replace(output, tensor=change(output.tensor)) for output in result.outputs]
        return replace(result, outputs=tuple(outputs)) if steps > after else result

    return changed


@pytest.mark.parametrize("top", [None, 3])
async def test_token_outside_the_vocabulary_costs_the_last_stage_alone(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch, top: int | None
) -> None:
    def spoil(tensor: Tensor) -> Tensor:
        if top is None:
            return tensor_from_tokens([5 * VOCABULARY] * tensor.rows)
        row = np.frombuffer(tensor.data, np.float32).reshape(tensor.shape).copy()
        row[:, 0] = 5 * VOCABULARY
        return Tensor(tensor.dtype, tensor.shape, row.tobytes())

    async with open_swarm() as swarm:
        first, liar = await swarm.join((0, 4)), await swarm.join((4, 9))
        peer = await swarm.join()
        await swarm.settle()
        await peer.run(REQUEST)  # so that it is known to be the faster one
        honest = await swarm.join((4, 9), step_s=0.2)
        await swarm.settle()
        monkeypatch.setattr(liar.engines[0], "step", answering(liar.engines[0], spoil, after=2))
        result = await peer.run(replace(REQUEST, max_tokens=6, top_logprobs=top))
        assert (result.token_ids, result.replays) == (right_tokens(6), 1)
        assert [stage.peer for stage in result.route] == [first.id, honest.id]
        assert {name for name, record in peer.coordinator.peer_records().items() if record.failed} == {liar.id}
        assert faults_at(first, honest) == [0, 0]


async def test_draft_outside_the_vocabulary_costs_the_drafting_stage_its_place(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokenizer is the same, so the text would have been right. The one that rejects it may lie, too."""
    info = fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS, vocabulary_size=2 * VOCABULARY)
    draft = FakeEngine(info, step_s=0.001)
    outside = answering(draft, lambda tensor: tensor_from_tokens([VOCABULARY] * tensor.rows), after=0)
    monkeypatch.setattr(draft, "step", outside)
    async with open_swarm() as swarm:
        liar = await swarm.join(THIRDS[0], draft=draft, vocabulary_size=2 * VOCABULARY)
        honest = [await swarm.join(span) for span in THIRDS]
        peer = await swarm.join()
        await swarm.settle()
        result = await peer.run(replace(REQUEST, method=method(speculation="draft-8").name))
        assert (result.token_ids, result.replays) == (right_tokens(40), 1)
        assert [stage.peer for stage in result.route] == [each.id for each in honest]
        trust = {name: record.trust for name, record in peer.coordinator.peer_records().items()}
        assert {name for name in trust if trust[name] < 1} == {liar.id, honest[1].id}
        assert min(trust.values()) > 0.6
        assert faults_at(*honest) == [0, 0, 0]


async def test_learns_no_speed_from_a_job_that_lost_a_stage(virtual_clock: MockClock) -> None:
    """The stages that stay have counted what they computed on both routes, of which one's time is known."""
    async with open_swarm() as swarm, trio.open_nursery() as nursery:
        peer = await swarm_without_spares(swarm)
        await peer.run(REQUEST)
        known = {each: record.block_s for each, record in peer.coordinator.peer_records().items()}
        assert all(known.values())

        def lose() -> None:
            swarm.hub.kill(swarm.peers[1].id)
            nursery.start_soon(swarm.join, THIRDS[1])

        result, _ = await lose_in_mid_job(peer, lose)
        assert isinstance(result, JobResult)
        assert result.replays == 1
        records = peer.coordinator.peer_records()
        assert {each: records[each].block_s for each in known} == known
        assert not records[swarm.peers[-1].id].block_s


@pytest.mark.parametrize("keeps_session", [False, True])
async def test_stage_that_blames_every_other_is_replaced_itself(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch, keeps_session: bool
) -> None:
    """And costs those that it blames less of their good name than itself."""
    async with open_swarm() as swarm:
        liar = await swarm.join((0, 4), step_s=0.001)
        other = await swarm.join((0, 4))
        blamed = [await swarm.join((4, 9)) for _ in range(3)]
        peer = await swarm.join()
        await swarm.settle()
        begin = liar.stages._begin

        async def fail(span: Span, session: StageSession, message: Begin, link: InboundLink) -> None:
            await begin(span, session, message, link)
            if keeps_session:
                link.reroute(session.wire_id, FailureReason.DOWNSTREAM, "cannot reach", session.request.downstream)
            else:
                span.fail(session, FailureReason.ENGINE, "cannot take rows", session.request.downstream)

        monkeypatch.setattr(liar.stages, "_begin", fail)
        for _ in range(4):
            result = await peer.run(REQUEST)
            assert result.token_ids == right_tokens(40)
            assert result.route[0].peer == other.id
        record = peer.coordinator._planner.record
        assert not any(record(each.id).failed for each in blamed)
        assert record(liar.id).trust < min(record(each.id).trust for each in blamed)
        assert not any(record(each.id).avoided_s for each in blamed)
