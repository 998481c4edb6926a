"""Paired trials: fair turns, warm methods, honest observations; nothing left behind."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.observation import Recorder
from node.coordinator.submission import JobError, JobErrorCode, JobRequest
from node.coordinator.trial import Run, Spending, TrialSpec
from node.coordinator.trial_prompts import make_prompts
from node.coordinator.trial_runner import BenchmarkRunner
from node.engine.interface import REFERENCE
from node.identity import Identity
from node.selection.adoption_trials import AdoptionTrials
from node.selection.trial_scheduler import TrialRequest
from node.testing.fake_engine import FAKE_MODEL
from protocol.capabilities import Memory, hardware_class
from protocol.identity import BlockRange, Stage
from protocol.measurements import Objective, ObservationKind, QualityBound
from protocol.observations import SignedObservation
from selector.task import BASELINE, method
from selector.workloads import TrialWorkload
from tests.support.capabilities import EPYC
from tests.support.job_peers import Peer, Swarm, open_swarm

FUSED = method(engine="fused")


class Kept:
    """A history in a list."""

    def __init__(self) -> None:
        self.observations: list[SignedObservation] = []

    async def publish(self, observation: SignedObservation) -> None:
        self.observations.append(observation)


async def trials_of(swarm: Swarm, **first: Any) -> tuple[BenchmarkRunner, Kept, Peer]:
    await swarm.join((0, 5), **first)
    await swarm.join((5, 9))
    peer = await swarm.join()
    await swarm.settle()
    kept = Kept()
    return BenchmarkRunner(peer.coordinator, Recorder(Identity(b"7" * 32), kept.publish)), kept, peer


def spec(**changes: Any) -> TrialSpec:
    fields: dict[str, Any] = {
        "model": "fake",
        "methods": [FUSED.name],
        "workload": TrialWorkload(),
        "rounds": 3,
        "seed": 1,
    }
    return TrialSpec(**{**fields, **changes})


async def test_every_round_is_paired_and_recorded(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        trials, kept, peer = await trials_of(swarm)
        workload = TrialWorkload(concurrency=4, prompt_tokens=64, max_tokens=8)
        trial = await trials.run(spec(workload=workload, objectives=[Objective.LATENCY, Objective.THROUGHPUT]))
        (tried,) = trial.methods
        assert len(tried.runs) == len(trial.baseline.runs) == 3
        observed = [each.observation for each in kept.observations]
        assert trial.observations == len(observed) == 3 * 2 * 2  # rounds, methods, objectives
        assert {each.kind for each in observed} == {ObservationKind.BENCH}
        assert {each.workload.concurrency for each in observed} == {4}
        for each in observed:
            each.check()
        ratios = sorted(
            each.measurements.log_ratio_to_baseline or 0.0
            for each in observed
            if each.method.name == FUSED.name and each.workload.objective.value == "throughput"
        )
        assert ratios == pytest.approx(sorted(trial.log_ratios(tried, Objective.THROUGHPUT)))
        computing = [
            math.log(run.compute_s / plain.compute_s)
            for run, plain in zip(tried.runs, trial.baseline.runs, strict=True)
        ]
        assert ratios == pytest.approx(sorted(computing)), "throughput is computing, whatever the links add"
        assert all(
            each.measurements.log_ratio_to_baseline == 0.0 for each in observed if each.method.name == BASELINE.name
        )
        assert peer.held() == (0, 0)


async def test_number_of_jobs_is_known_before_any_runs(virtual_clock: MockClock) -> None:
    def refuse(jobs: int) -> None:
        raise ValueError(f"{jobs} jobs")

    async with open_swarm() as swarm:
        trials, _, peer = await trials_of(swarm)
        workload = TrialWorkload(concurrency=4, prompt_tokens=64, max_tokens=8)
        with pytest.raises(ValueError, match=f"{2 * (3 * 4 + 1)} jobs"):  # two methods, with a warm-up of each
            await trials.run(spec(workload=workload, on_jobs_known=refuse))
        assert peer.coordinator.statistics.done == 0
        await trials.run(spec(workload=workload))
        assert peer.coordinator.statistics.trials_done == 2 * (3 * 4 + 1)


async def test_variant_is_built_before_measuring(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        trials, kept, _ = await trials_of(swarm, variants=[REFERENCE])
        trial = await trials.run(spec(rounds=1))
        assert trial.methods[0].error is None
        assert len(kept.observations) == 2


async def test_assigned_trial_waits_until_peers_are_idle(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        trials, kept, _ = await trials_of(swarm, step_s=0.1)
        other = await swarm.join()
        await swarm.settle()
        async with trio.open_nursery() as nursery:
            request = JobRequest(model="fake", prompt="1", max_tokens=700)
            async with other.coordinator.submit(request) as events:
                nursery.start_soon(trials.run, spec(kind=ObservationKind.ASSIGNED))
                await trio.sleep(60)
                assert not kept.observations
                async for _ in events:
                    pass
        assert len(kept.observations) == 3 * 2


async def test_trial_that_has_overdrawn_its_limit_ends_with_the_reason(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        trials, kept, _ = await trials_of(swarm)
        with pytest.raises(JobError, match="longer than the 5 s"):
            await trials.run(spec(spending=Spending(limit_s=5.0, spent_s=7.0)))
        assert not kept.observations


async def test_rounds_begin_anew_on_another_route(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        for _ in range(2):
            await swarm.join((0, 9))
        client = await swarm.join()
        await swarm.settle()
        kept, counts = Kept(), []
        trials = BenchmarkRunner(client.coordinator, Recorder(Identity(b"7" * 32), kept.publish))

        def lose_a_stage_after_two_rounds(rounds: Sequence[Mapping[str, Run]]) -> bool:
            counts.append(len(rounds))
            if counts == [1, 2]:
                [stage] = rounds[0][FUSED.name].route
                swarm.hub.kill(stage.peer)
            return len(rounds) == 3

        trial = await trials.run(spec(rounds=1, is_decided=lose_a_stage_after_two_rounds))
        assert counts[:2] == [1, 2]
        assert counts[-3:] == [1, 2, 3], "none of the rounds before counts"
        assert [len(tried.runs) for tried in (trial.baseline, *trial.methods)] == [3, 3]
        assert len({run.route for tried in (trial.baseline, *trial.methods) for run in tried.runs}) == 1
        assert len({each.observation.route for each in kept.observations}) == 1
        assert len(kept.observations) == 3 * 2


async def test_unavailable_method_does_not_fail_the_trial(virtual_clock: MockClock) -> None:
    lossy = method(engine="fused", arithmetic="int8")
    async with open_swarm() as swarm:
        trials, _, _ = await trials_of(swarm)
        trial = await trials.run(spec(methods=[lossy.name, FUSED.name], rounds=2, quality=QualityBound.NEAR))
        assert "not measured" in (trial.methods[0].error or "")
        assert len(trial.methods[1].runs) == 2
        with pytest.raises(JobError, match="do not fit"):
            await trials.run(spec(workload=TrialWorkload(prompt_tokens=5000)))
        with pytest.raises(JobError, match="engine=llamacpp cannot serve"):
            await trials.run(spec(methods=["engine=llamacpp"]))


async def test_trial_that_never_fits_ends_at_once(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        trials, _, _ = await trials_of(swarm, kv_positions=512)
        began_s = trio.current_time()
        with pytest.raises(JobError, match=r"prompt has 400 tokens and the answer .*hold at most 448") as caught:
            await trials.run(spec(workload=TrialWorkload(prompt_tokens=400, max_tokens=64)))
        assert caught.value.code is JobErrorCode.CONTEXT_LENGTH
        assert caught.value.retry_after_s is None
        assert trio.current_time() - began_s < 10


@pytest.mark.parametrize("methods", [[BASELINE.name], [FUSED.name, method(engine="fused", speculation="ngram-4").name]])
async def test_trial_ends_after_a_few_attempts_once_blocks_are_not_served(
    methods: list[str], virtual_clock: MockClock
) -> None:
    async with open_swarm() as swarm:
        await swarm.join((0, 5))
        holder = await swarm.join((5, 9))
        client = await swarm.join()
        await swarm.settle()
        trials = BenchmarkRunner(client.coordinator, Recorder(Identity(b"7" * 32), Kept().publish))
        began_s, statistics = trio.current_time(), client.coordinator.statistics

        def lose_the_last_holder(rounds: Sequence[Mapping[str, Run]]) -> bool:
            swarm.hub.kill(holder.id)
            return False

        with pytest.raises(JobError) as caught:
            await trials.run(
                spec(kind=ObservationKind.PROBE, methods=methods, rounds=1, is_decided=lose_the_last_holder)
            )
        assert caught.value.code is JobErrorCode.UNCOVERED
        assert statistics.trials_failed <= 8
        assert trio.current_time() - began_s < 120


def test_prompts_share_their_prefix_and_nothing_with_other_runs() -> None:
    text = list(range(1000))
    rng = random.Random(3)
    workload = TrialWorkload(concurrency=4, prompt_tokens=100, shared_prefix_share=0.9)
    first, second = (make_prompts(text, workload, rng) for _ in range(2))
    assert all(len(prompt) == 100 for prompt in first)
    assert len({prompt[:90] for prompt in first}) == 1
    assert len({prompt[90:] for prompt in first}) == 4
    assert first[0][:12] != second[0][:12]
    (repetitive,) = make_prompts(text, TrialWorkload(prompt_tokens=100, repetitiveness=0.9), rng)
    assert repetitive[10:34] == repetitive[34:58]
    assert not math.isclose(len(set(repetitive)), 100)


async def test_all_runs_take_one_route_and_wait_for_it(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peers = [await swarm.join((0, 9), step_s=0.05) for _ in range(3)]
        client, other = await swarm.join(), await swarm.join()
        await swarm.settle()
        kept = Kept()
        trials = BenchmarkRunner(client.coordinator, Recorder(Identity(b"7" * 32), kept.publish))
        chosen = Stage(peers[1].id, BlockRange(0, 9))
        job = JobRequest(model="fake", prompt="1", max_tokens=100, stages=(chosen,))
        short = TrialWorkload(prompt_tokens=16, max_tokens=4)
        async with trio.open_nursery() as nursery, other.coordinator.submit(job) as events:
            nursery.start_soon(trials.run, spec(kind=ObservationKind.ASSIGNED, stages=(chosen,), workload=short))
            await trio.sleep(3)
            assert not kept.observations, "others are free, but not what is to be measured"
            async for _ in events:
                pass
        assert {stage.peer for each in kept.observations for stage in each.observation.route} == {chosen.peer}
        trial = await trials.run(spec(workload=short))
        assert len({run.route for tried in (trial.baseline, *trial.methods) for run in tried.runs}) == 1


async def test_trial_whose_route_is_gone_goes_on_with_like_hardware_only(virtual_clock: MockClock) -> None:
    small = replace(EPYC, memory=Memory(total_bytes=8 << 30, available_bytes=1 << 30))
    async with open_swarm() as swarm:
        client, lost = await swarm.join(), await swarm.join((0, 9))
        other = await swarm.join((0, 9), step_s=0.05, capabilities=small)
        await swarm.settle()
        kept = Kept()
        trials = AdoptionTrials(BenchmarkRunner(client.coordinator, Recorder(Identity(b"7" * 32), kept.publish)))
        served = await client.coordinator.consider(JobRequest(model="fake", prompt="1", max_tokens=8), {})
        context = replace(served.context, hardware=hardware_class(EPYC))
        request = TrialRequest(
            model=FAKE_MODEL,
            context=context,
            methods=[BASELINE, FUSED],
            in_use=BASELINE.name,
            stages=(Stage(lost.id, BlockRange(0, 9)),),
        )
        swarm.hub.kill(lost.id)
        with pytest.raises(JobError, match="other hardware"):
            await trials.run(request, Spending())
        assert not kept.observations
        swarm.hub.kill(other.id)
        like = await swarm.join((0, 9))
        swarm.peers = [client, like]
        await swarm.settle()
        assert FUSED.name in await trials.run(request, Spending())
        assert {each.observation.route[0].peer for each in kept.observations} == {like.id}
