"""A stage that lives and does nothing is replaced within seconds and remembered; an honest slow one is left alone."""

import itertools
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import trio
from trio.testing import MockClock

from node.coordinator import planner
from node.coordinator.failover import ResilientRoute
from node.coordinator.route import OpenRoute
from node.coordinator.straggler_monitor import StragglerMonitor
from node.coordinator.submission import JobRequest, JobResult, JobStarted, TextDelta
from node.engine.interface import SliceInput, StepResult
from node.links import outbound_link
from node.links.inbound_link import InboundLink
from node.stages.outbox import Output, send_outputs
from node.stages.span import Span
from node.stages.stage_server import StageServer
from node.testing.memory_links import LinkModel
from protocol.connection import PROTOCOL_IDS
from protocol.identity import BlockRange, JobId, PeerId, SessionId, Stage
from protocol.messages import Open, Opened, Refused
from protocol.reports import Progress
from selector.task import method
from tests.support.hostile_peer import Hole, join_hole
from tests.support.job_peers import BLOCKS, Peer, Swarm, open_swarm
from tests.unit.coordinator.test_jobs import PROMPT, THIRDS, right_tokens

WHOLE = (0, BLOCKS)
BOUND_S = 5.0
REQUEST = JobRequest(model="fake", prompt=PROMPT, max_tokens=20)
NOWHERE = SessionId(JobId("00" * 16), 0)


@asynccontextmanager
async def holed_swarm(
    *honest: tuple[int, int],
    protocols: Iterable[str] = PROTOCOL_IDS[-1:],
    blocks: tuple[int, int] = WHOLE,
    **ways: object,
) -> AsyncIterator[tuple[Swarm, Peer, Hole]]:
    """A swarm with honest peers, a hole that promises the most, and a coordinator that serves nothing."""
    async with open_swarm() as swarm, trio.open_nursery() as nursery:
        for span in honest:
            await swarm.join(span)
        peer = await swarm.join()
        await swarm.settle()
        hole = await join_hole(swarm, nursery, blocks, protocols=tuple(protocols), **ways)  # type: ignore[arg-type]
        yield swarm, peer, hole
        nursery.cancel_scope.cancel()


def trust_in(peer: Peer, hole: Hole) -> None:
    """Have a coordinator send its next job to a hole, as it does with the share of jobs that try a promise."""
    peer.coordinator._planner._exploration._credit = 1.0


@pytest.mark.parametrize("protocols", [PROTOCOL_IDS[-1:], PROTOCOL_IDS[:1]])
@pytest.mark.parametrize("prompt", [PROMPT, " ".join(["7"] * 400)])
async def test_replaces_silent_straggler_within_seconds_and_avoids_it(
    virtual_clock: MockClock, protocols: tuple[str, ...], prompt: str
) -> None:
    async with holed_swarm(WHOLE, protocols=protocols) as (_, peer, hole):
        trust_in(peer, hole)
        began_s = trio.current_time()
        result = await peer.run(JobRequest(model="fake", prompt=prompt, max_tokens=20))
        assert hole.begun, "the job went to the hole first"
        # One that cannot report may compute a long prompt: it gets the time for that.
        is_long_for_mute = protocols == PROTOCOL_IDS[-1:] and prompt != PROMPT
        assert trio.current_time() - began_s < (3 * BOUND_S if is_long_for_mute else BOUND_S)
        assert result.replays == 1
        if prompt == PROMPT:
            assert result.token_ids == right_tokens(20)
        assert peer.coordinator.peer_records()[hole.id].lagged == 1
        before = len(hole.opened)
        for _ in range(5):
            trust_in(peer, hole)
            assert (await peer.run(REQUEST)).token_ids == right_tokens(20)
        assert len(hole.opened) == before


async def test_replaces_only_the_silent_stage_between_others(virtual_clock: MockClock) -> None:
    async with holed_swarm(*THIRDS, blocks=(3, 6)) as (_, peer, hole):
        trust_in(peer, hole)
        began_s = trio.current_time()
        result = await peer.run(REQUEST)
        assert hole.begun
        assert trio.current_time() - began_s < BOUND_S
        assert (result.replays, result.token_ids) == (1, right_tokens(20))
        lagged = [each for each, record in peer.coordinator.peer_records().items() if record.lagged]
        assert lagged == [hole.id]


async def test_replaces_stage_that_never_answers_open(virtual_clock: MockClock) -> None:
    async with holed_swarm(WHOLE, opens=False) as (_, peer, hole):
        trust_in(peer, hole)
        began_s = trio.current_time()
        assert (await peer.run(REQUEST)).token_ids == right_tokens(20)
        assert hole.opened
        assert trio.current_time() - began_s < BOUND_S
        assert peer.coordinator.peer_records()[hole.id].lagged == 1


async def test_replaces_stage_with_false_progress_reports(virtual_clock: MockClock) -> None:
    claims = Progress(session=NOWHERE, received=4000, computed=4000, sent=4000)
    async with holed_swarm(*THIRDS, *THIRDS, blocks=(3, 6), protocols=PROTOCOL_IDS, claims=claims) as (_, peer, hole):
        trust_in(peer, hole)
        began_s = trio.current_time()
        result = await peer.run(REQUEST)
        assert hole.begun
        # The later of the two that contradict each other is replaced first, then the earlier: twice the bound.
        assert trio.current_time() - began_s < 2 * BOUND_S
        assert result.token_ids == right_tokens(20)
        assert peer.coordinator.peer_records()[hole.id].lagged == 1


async def test_waits_for_silent_stage_without_replacement(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm() as swarm:
        for span in THIRDS:
            await swarm.join(span)
        peer = await swarm.join()
        await swarm.settle()
        pause_engine(monkeypatch, swarm.peers[1], at_step=5, seconds=30.0)
        searches: list[float] = []
        look = peer.membership.candidates

        async def counted(*args: Any, **named: Any) -> Any:
            searches.append(trio.current_time())
            return await look(*args, **named)

        monkeypatch.setattr(peer.membership, "candidates", counted)
        began_s = trio.current_time()
        result = await peer.run(REQUEST)
        assert trio.current_time() - began_s > 30
        assert len(searches) <= 4, "once for its route, and then now and again"
        assert (result.replays, result.token_ids) == (0, right_tokens(20))


def pause_engine(monkeypatch: pytest.MonkeyPatch, peer: Peer, *, at_step: int, seconds: float, times: int = 1) -> None:
    """Have a peer's engine take much longer for some steps."""
    engine = peer.engines[0]
    step, count = engine.step, 0

    async def paused(slices: list[SliceInput]) -> StepResult:
        nonlocal count
        count += 1
        if at_step <= count < at_step + times:
            await trio.sleep(seconds)
        return await step(slices)

    monkeypatch.setattr(engine, "step", paused)


@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_replaces_stage_that_hangs_during_a_job(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    async with open_swarm() as swarm:
        for span in (*THIRDS, *THIRDS):
            await swarm.join(span)
        peer = await swarm.join()
        await swarm.settle()
        seen: list[TextDelta] = []
        victim: PeerId | None = None
        async with peer.coordinator.submit(REQUEST) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    seen.append(event)
                    if len(seen) == 5:
                        hanging = swarm.serving(THIRDS[stage])
                        victim = hanging.id
                        pause_engine(monkeypatch, hanging, at_step=1, seconds=1e6)
                        hung_s = trio.current_time()
                    if len(seen) == 8:
                        assert trio.current_time() - hung_s < BOUND_S
                if isinstance(event, JobResult):
                    assert (event.replays, event.token_ids) == (1, right_tokens(20))
        lagged = [each for each, record in peer.coordinator.peer_records().items() if record.lagged]
        assert lagged == [victim]


async def test_replaces_a_stage_that_trickles(virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_swarm() as swarm:
        for span in (WHOLE, WHOLE):
            await swarm.join(span)
        peer = await swarm.join()
        await swarm.settle()
        async with peer.coordinator.submit(REQUEST) as events:
            async for event in events:
                if isinstance(event, JobStarted):
                    trickling = next(p for p in swarm.peers if p.held()[0])
                    pause_engine(monkeypatch, trickling, at_step=3, seconds=60.0, times=1000)
                    began_s = trio.current_time()
                if isinstance(event, JobResult):
                    assert trio.current_time() - began_s < BOUND_S
                    assert event.token_ids == right_tokens(20)


async def test_replaces_a_stage_that_takes_rows_and_forwards_nothing(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm() as swarm:
        for span in (*THIRDS, *THIRDS):
            await swarm.join(span)
        peer = await swarm.join()
        await swarm.settle()
        silent: list[Span] = []

        def swallow(outputs: Iterable[Output]) -> None:
            outboxes = [session.outbox for span in silent for session in span.sessions.values()]
            send_outputs(output for output in outputs if output.outbox not in outboxes)

        monkeypatch.setattr("node.stages.span.send_outputs", swallow)
        async with peer.coordinator.submit(REQUEST) as events:
            async for event in events:
                if isinstance(event, JobStarted):
                    middle = next(p for p in swarm.peers if p.held()[0] and p.engines[0].info.blocks.start == 3)
                    silent += middle.stages.spans()
                    began_s = trio.current_time()
                if isinstance(event, JobResult):
                    assert event.token_ids == right_tokens(20)
                    assert trio.current_time() - began_s < 2 * BOUND_S
                    assert middle.id not in {stage.peer for stage in event.route}


@pytest.mark.parametrize(("chunk", "row_s"), [("none", 0.015), ("64", 0.03)])
async def test_keeps_slow_stage_that_makes_progress(virtual_clock: MockClock, chunk: str, row_s: float) -> None:
    """A long prompt on processors much slower than can be guessed: in one step, or in chunks that show progress."""
    async with open_swarm() as swarm:
        for _ in range(2):
            await swarm.join(WHOLE, step_s=1.0, row_s=row_s)
        peer = await swarm.join()
        await swarm.settle()
        name = method(engine="fused", prefill_chunk=chunk).name
        result = await peer.run(JobRequest(model="fake", prompt="7 " * 1500, max_tokens=4, method=name))
        assert result.timing.ttft_s > 1500 * row_s
        assert result.replays == 0


async def test_a_last_stage_has_time_for_the_output_layer_of_scored_rows(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        coordinator = (await swarm.join()).coordinator
        text = await coordinator._prepare(JobRequest(model="fake", prompt="7 " * 1500, max_tokens=1))
    planner = Mock(round_s=lambda stages: 0.0, expected_s=lambda need, stage, rows, load: 0.01 * rows)
    manifest = replace(text.model.manifest, embed=replace(text.model.manifest.embed, size_bytes=2 * BLOCKS * (8 << 20)))
    text = replace(text, model=replace(text.model, manifest=manifest))
    expected_s = []
    for sampling in (text.sampling, replace(text.sampling, prompt_logprobs=True, prompt_length=1500, logprobs=1)):
        request: Any = Mock(sampling=sampling)
        route = OpenRoute([Stage(PeerId("a"), BlockRange(*WHOLE))], Mock(peer_id="b"), request)
        route.starts = [0]
        StragglerMonitor(text, planner, Mock()).begin(route, 0)
        assert route.detector is not None
        expected_s.append(route.detector.total_s())
    texts_s, scores_s = expected_s
    assert scores_s == pytest.approx(3 * texts_s), "the layer is twice as large as the blocks together"


async def test_keeps_stages_behind_slow_links(virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home's upstream, scaled down as the rows are: 1500 of 128 bytes, which take 4 s to each next stage."""
    for module in (planner, outbound_link):
        monkeypatch.setattr(module, "SLOWEST_BYTES_PER_S", 40e3)
    monkeypatch.setattr(outbound_link, "UNACKED_BYTES", 16_000)
    async with open_swarm(link=LinkModel(bandwidth=50e3)) as swarm:
        for span in (*THIRDS, *THIRDS):
            await swarm.join(span)
        peer = await swarm.join()
        await swarm.settle()
        whole = method(engine="fused", prefill_chunk="none").name
        result = await peer.run(JobRequest(model="fake", prompt="7 " * 1500, max_tokens=4, method=whole))
        assert result.timing.ttft_s > 5
        assert result.replays == 0


async def test_keeps_stages_shared_by_many_own_jobs(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        for span in (WHOLE, WHOLE):
            await swarm.join(span, step_s=0.2)
        peer = await swarm.join()
        await swarm.settle()
        results: list[JobResult] = []

        async def submit() -> None:
            results.append(await peer.run(JobRequest(model="fake", prompt="7 " * 100, max_tokens=20)))

        async with trio.open_nursery() as nursery:
            for _ in range(24):
                nursery.start_soon(submit)
        assert [result.replays for result in results] == [0] * 24


async def test_promised_speed_is_explored_by_one_job_in_ten(virtual_clock: MockClock) -> None:
    async with holed_swarm(WHOLE, WHOLE, garbage=True) as (_, peer, hole):
        for number in range(30):
            await peer.run(REQUEST)
            assert len(hole.opened) <= (number + 1) // 10
        assert len(hole.opened) == 3, "and is tried, all the same"


async def test_faster_newcomer_gets_the_jobs_once_measured(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        await swarm.join(WHOLE, step_s=0.05)
        peer = await swarm.join()
        await swarm.settle()
        for _ in range(3):
            await peer.run(REQUEST)
        faster = await swarm.join(WHOLE, step_s=0.01)
        await swarm.settle()
        served = []
        for _ in range(30):
            served.append((await peer.run(REQUEST)).route[0].peer)
            await trio.sleep(1)
        assert served[-5:] == [faster.id] * 5


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """Have coordinators search for 2 s before they know that a stage can be replaced; set after the first second."""
    half = trio.Event()

    async def search_slowly(self: ResilientRoute, peers: Collection[PeerId], only_trusted: bool) -> bool:
        await trio.sleep(1)
        half.set()
        await trio.sleep(1)
        return True

    monkeypatch.setattr(ResilientRoute, "_is_replaceable", search_slowly)
    return half


async def test_stage_that_opens_during_the_search_for_another_is_not_blamed(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch, search: trio.Event
) -> None:
    halves = ((0, 3), (3, BLOCKS))
    async with holed_swarm(*halves, halves[0], blocks=halves[1], opens=False) as (_, peer, hole):
        server_open = StageServer.open

        async def open_late(self: StageServer, message: Open, link: InboundLink) -> Opened | Refused:
            if message.blocks.start == 0:
                await search.wait()
            return await server_open(self, message, link)

        monkeypatch.setattr(StageServer, "open", open_late)
        trust_in(peer, hole)
        assert (await peer.run(REQUEST)).token_ids == right_tokens(20)
        lagged = [each for each, record in peer.coordinator.peer_records().items() if record.lagged]
        assert lagged == [hole.id]


async def test_stage_that_goes_on_during_the_search_for_another_is_kept(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch, search: trio.Event
) -> None:
    async with open_swarm() as swarm:
        for _ in range(2):
            engine = (await swarm.join(WHOLE, step_s=0.5)).engines[0]
            step, steps = engine.step, itertools.count()

            async def paused(slices: list[SliceInput], step: Any = step, steps: Iterator[int] = steps) -> StepResult:
                if next(steps) == 2:
                    await search.wait()
                return await step(slices)  # type: ignore[no-any-return]

            monkeypatch.setattr(engine, "step", paused)
        peer = await swarm.join()
        await swarm.settle()
        chunked = method(engine="fused", prefill_chunk="64").name
        result = await peer.run(JobRequest(model="fake", prompt="7 " * 400, max_tokens=4, method=chunked))
        assert search.is_set()
        assert result.replays == 0
