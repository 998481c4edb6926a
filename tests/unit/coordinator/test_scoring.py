"""Jobs whose prompt is scored: over any split, when stages die, with and without text behind it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.observation import Recorder
from node.coordinator.output_text import SCORES_AT_ONCE
from node.coordinator.submission import JobError, JobErrorCode, JobRequest, JobResult, PromptScored, TextDelta
from node.coordinator.trial import TrialSpec
from node.coordinator.trial_runner import BenchmarkRunner
from node.engine.interface import EngineError, SliceInput, StepResult
from node.identity import Identity
from node.models.vocabulary import Vocabulary
from node.selection.samples import sample_of
from node.stages import session_admission
from node.stages.scheduler import PolicyController, StagePolicy
from node.testing.fake_engine import expected_scores, expected_tokens, fake_span_info
from protocol.identity import BlockRange
from protocol.measurements import TaskKind
from protocol.messages import Opened
from protocol.observations import SignedObservation, verify_observation
from protocol.tensors import Pooling
from selector.task import method
from selector.workloads import TrialWorkload
from tests.support.job_peers import BLOCKS, VOCABULARY, Peer, open_swarm
from tests.unit.coordinator.test_sampling import THIRDS, make_old, swarm_of

PROMPT = tuple(range(100, 400))
CHUNKED = method(engine="fused", prefill_chunk="64").name
INFO = fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS)


def request(max_tokens: int = 0, name: str = "auto") -> JobRequest:
    return JobRequest(
        model="fake", prompt_tokens=PROMPT, prompt_logprobs=True, top_logprobs=1, max_tokens=max_tokens, method=name
    )


async def scored(peer: Peer, job: JobRequest) -> tuple[PromptScored, tuple[int, ...], JobResult]:
    """Return the scores, the tokens of the text and the result of a job."""
    async with peer.coordinator.submit(job) as events:
        _, first, *rest = [event async for event in events]
    assert isinstance(first, PromptScored)
    tokens = [token for event in rest if isinstance(event, TextDelta) for token in event.token_ids]
    assert isinstance(rest[-1], JobResult)
    return first, tuple(tokens), rest[-1]


def check(found: PromptScored) -> None:
    first, *others = found.logprobs
    assert (first.token, first.logprob) == (PROMPT[0], None)
    assert [each.token for each in others] == list(PROMPT[1:])
    assert [each.logprob for each in others] == expected_scores(INFO, PROMPT)
    assert all(len(each.likeliest) == 1 for each in others)


@pytest.mark.parametrize("spans", [((0, 9),), THIRDS])
async def test_scores_are_the_same_on_every_split(virtual_clock: MockClock, spans: tuple[tuple[int, int], ...]) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, *spans)
        for name in ("auto", CHUNKED):
            found, tokens, result = await scored(peer, request(name=name))
            check(found)
            assert (tokens, result.usage.completion_tokens, result.finish_reason) == ((), 0, "length")
            assert result.usage.cached_tokens == 0
            assert all(stage.statistics.rows == len(PROMPT) for stage in result.route), "nothing is decoded"
        found, tokens, result = await scored(peer, request(max_tokens=5))
        check(found)
        assert tokens == expected_tokens(INFO, PROMPT, 5)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("max_tokens", [0, 20])
async def test_scores_survive_the_death_of_a_stage(virtual_clock: MockClock, stage: int, max_tokens: int) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, *THIRDS, *THIRDS)
        async with peer.coordinator.submit(request(max_tokens, CHUNKED)) as events:
            await anext(events)
            if max_tokens:
                check_early = await anext(events)
                assert isinstance(check_early, PromptScored)
                await anext(events)  # the text has begun: what is held of it goes on
                swarm.hub.kill(swarm.serving(THIRDS[stage]).id)
                rest = [check_early, *[event async for event in events]]
            else:
                while not any(each.held()[0] for each in swarm.peers):
                    await trio.sleep(0.001)
                swarm.hub.kill(swarm.serving(THIRDS[stage]).id)
                rest = [event async for event in events]
        assert isinstance(rest[0], PromptScored)
        check(rest[0])
        result = rest[-1]
        assert isinstance(result, JobResult)
        assert result.replays >= 1
        assert result.token_ids == expected_tokens(INFO, PROMPT, max_tokens)


async def test_a_prompt_may_fill_the_context_where_no_text_follows(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, (0, 9))
        whole = tuple(number % 900 for number in range(INFO.max_positions))
        async with peer.coordinator.submit(replace(request(), prompt_tokens=whole)) as events:
            found = [event.logprobs async for event in events if isinstance(event, PromptScored)]
        assert sum(map(len, found)) == len(whole)
        with pytest.raises(JobError) as caught:
            await scored(peer, replace(request(max_tokens=1), prompt_tokens=whole))
        assert caught.value.code is JobErrorCode.CONTEXT_LENGTH
        alone, _, result = await scored(peer, replace(request(), prompt_tokens=PROMPT[:1]))
        assert [each.logprob for each in alone.logprobs] == [None]
        assert not any(stage.statistics.steps for stage in result.route), "there is nothing to compute"


async def test_each_kind_leaves_observations_and_is_tried_by_itself(virtual_clock: MockClock) -> None:
    kept: list[SignedObservation] = []

    async def publish(observation: SignedObservation) -> None:
        kept.append(observation)

    async with open_swarm() as swarm:
        recorder = Recorder(Identity(b"7" * 32), publish)
        for span in THIRDS:
            await swarm.join(span)
        peer = await swarm.join(recorder=recorder)
        await swarm.settle()
        await scored(peer, request())
        await peer.run(replace(request(), prompt_logprobs=False, top_logprobs=None, pooling=Pooling.MEAN, max_tokens=1))
        await peer.run(replace(request(max_tokens=3), prompt_logprobs=False))
        await peer.run(replace(request(), prompt_tokens=PROMPT[:1]))  # which shows nothing
        assert [each.observation.workload.task_kind.value for each in kept] == ["score", "embed", "generate"]
        assert [each.observation.workload.completion_tokens for each in kept] == [0, 0, 3]
        for each in kept:
            assert verify_observation(each.envelope).observation == each.observation
        samples = [sample_of(each.observation) for each in kept]
        assert [each and (each.context.task_kind, each.context.max_tokens) for each in samples] == [
            ("score", 0), ("embed", 0), ("generate", 3),
        ]  # fmt: skip
        trials = BenchmarkRunner(peer.coordinator, recorder)
        for kind in (TaskKind.EMBED, TaskKind.SCORE):
            kept.clear()
            workload = TrialWorkload(task_kind=kind, concurrency=2, prompt_tokens=40, max_tokens=0)
            trial = await trials.run(TrialSpec(model="fake", methods=[CHUNKED], workload=workload, rounds=2, seed=1))
            assert [len(each.runs) for each in (trial.baseline, *trial.methods)] == [2, 2]
            assert {each.observation.workload.task_kind for each in kept} == {kind}
            assert all(each.observation.measurements.log_ratio_to_baseline is not None for each in kept)
            assert min(run.tokens_per_s for run in trial.baseline.runs) > 0, "of the prompts"


async def test_peers_of_older_versions_do_not_score(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        old = await swarm.join((0, 9), step_s=0.001)
        make_old(old)
        peer = await swarm.join()
        await swarm.settle()
        with pytest.raises(JobError, match="wait for a peer of a later version"):
            await peer.run(request())


async def test_refuses_methods_that_skip_rows(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, (0, 9))
        with pytest.raises(JobError, match="need every row") as caught:
            await peer.run(request(name=method(prefix_cache="on").name))
        assert caught.value.code is JobErrorCode.INVALID
        speculated = method(engine="fused", speculation="ngram-8").name
        found, tokens, _ = await scored(peer, request(max_tokens=5, name=speculated))
        check(found)
        assert tokens == expected_tokens(INFO, PROMPT, 5)


async def test_a_stage_that_claims_to_hold_a_new_session_computes_all_of_it(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def claiming(**answer: Any) -> Opened:
        return Opened(**answer | {"held": 10})

    monkeypatch.setattr(session_admission, "Opened", claiming)
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, (0, 9))
        found, _, _ = await scored(peer, request())
        check(found)


async def test_scoring_that_fails_on_every_route_is_given_up(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, (0, 9), (0, 9))
        for server in swarm.peers[:2]:
            (engine,) = server.engines
            server_step = engine.step

            async def step(slices: Sequence[SliceInput], step: Any = server_step) -> StepResult:
                if slices[0].position >= 128:
                    raise EngineError("out of memory")
                found: StepResult = await step(slices)
                return found

            engine.step = step  # type: ignore[method-assign]
        with trio.fail_after(300), pytest.raises(JobError, match="routes were lost in a row"):
            await peer.run(request(name=CHUNKED))


async def test_a_stop_token_behind_a_scored_prompt_has_log_probabilities_and_no_text(virtual_clock: MockClock) -> None:
    """Evaluation harnesses ask for one token and leave its log probability out."""
    (stop,) = expected_tokens(INFO, PROMPT, 1)
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, (0, 9))
        pieces = [b"" if token == stop else b"some" for token in range(VOCABULARY)]
        peer.tokenizer.vocabulary = Vocabulary.build(b"", pieces)
        async with peer.coordinator.submit(replace(request(max_tokens=1), stop_token_ids=(stop,))) as events:
            _, first, drawn, result = [event async for event in events]
    assert isinstance(first, PromptScored)
    check(first)
    assert isinstance(drawn, TextDelta)
    assert (drawn.text, [(each.token, each.is_special) for each in drawn.logprobs]) == ("", [(stop, True)])
    assert not first.logprobs[0].is_special
    assert isinstance(result, JobResult)
    assert (result.text, result.finish_reason) == ("", "stop")


async def test_scores_do_not_teach_the_row_budget_of_texts(virtual_clock: MockClock) -> None:
    observed: list[int] = []

    class Watched(PolicyController):
        def observe(self, rows: int, compute_s: float, now_s: float) -> StagePolicy:
            observed.append(rows)
            return super().observe(rows, compute_s, now_s)

    async with open_swarm(controller=Watched) as swarm:
        peer = await swarm_of(swarm, (0, 9))
        await scored(peer, request())
        assert not observed
        await scored(peer, request(max_tokens=3))
        assert observed == [1, 1], "the steps of the text behind the prompt"


async def test_scores_of_a_long_prompt_come_in_pieces(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm_of(swarm, (0, 9))
        long = PROMPT * 4
        async with peer.coordinator.submit(replace(request(), prompt_tokens=long)) as events:
            _, *pieces, result = [event async for event in events]
    assert isinstance(result, JobResult)
    found = [piece.logprobs for piece in pieces if isinstance(piece, PromptScored)]
    assert len(found) == len(pieces) > 1
    assert max(map(len, found)) <= SCORES_AT_ONCE + 1
    assert [each.token for piece in found for each in piece] == list(long)
    assert [each.logprob for piece in found for each in piece] == [None, *expected_scores(INFO, long)]
