"""Trials are background work: they are not in the way of jobs, and make up no kinds of tasks."""

from collections.abc import Mapping, Sequence
from itertools import count

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.observation import Recorder
from node.coordinator.submission import JobError, JobErrorCode, JobRequest
from node.coordinator.trial_runner import BUSY_TIMEOUT_S, MAX_WAIT_CAP_S, BenchmarkRunner, Run, Spending, TrialSpec
from node.identity import Identity
from node.stages.voter import StageVote
from protocol.identity import ModelId
from protocol.measurements import ObservationKind
from protocol.observations import SignedObservation
from selector.task import Method, TaskContext, method
from selector.task_buckets import task_bucket
from selector.workloads import TrialWorkload
from tests.support.heuristic_selection import HeuristicVoter
from tests.support.job_peers import open_swarm

FUSED = method(engine="fused")
STEP_S = 0.05


class RecordingVoter(HeuristicVoter):
    """Records the contexts that it votes on."""

    def __init__(self) -> None:
        self.contexts: list[TaskContext] = []

    async def vote(self, model: ModelId, context: TaskContext, methods: Sequence[Method]) -> StageVote:
        self.contexts.append(context)
        return await super().vote(model, context, methods)


async def ignore(observation: SignedObservation) -> None:
    del observation
    await trio.lowlevel.checkpoint()


def job(number: int, tokens: int = 20) -> JobRequest:
    return JobRequest(model="fake", prompt_tokens=tuple(range(number, number + 40)), max_tokens=tokens, ignore_eos=True)


async def test_serial_client_beside_trials_has_one_kind_of_task(virtual_clock: MockClock) -> None:
    voter, recorder = RecordingVoter(), Recorder(Identity(b"3" * 32), ignore)
    async with open_swarm() as swarm:
        await swarm.join((0, 5), voter=voter, step_s=STEP_S)
        await swarm.join((5, 9), voter=voter, step_s=STEP_S)
        client = await swarm.join()
        await swarm.settle()
        trials = BenchmarkRunner(client.coordinator, recorder)
        workload = TrialWorkload(concurrency=3, prompt_tokens=16, max_tokens=8)
        spec = TrialSpec(model="fake", methods=[FUSED.name], workload=workload, kind=ObservationKind.PROBE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trials.run, spec)
            for number in range(20):
                voter.contexts.clear()
                await client.run(job(number))
                assert {each.concurrency for each in voter.contexts if each.prompt_tokens == 40} == {1}
                assert len({task_bucket(each) for each in voter.contexts if each.prompt_tokens == 40}) == 1
                await trio.sleep(0.3)
            nursery.cancel_scope.cancel()


async def test_trial_is_given_up_where_the_jobs_of_others_never_end(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9), step_s=STEP_S)
        busy = await swarm.join()
        await swarm.settle()
        trials = BenchmarkRunner(peer.coordinator, Recorder(Identity(b"3" * 32), ignore))
        spec = TrialSpec(model="fake", methods=[FUSED.name], workload=TrialWorkload(), kind=ObservationKind.PROBE)
        async with busy.coordinator.submit(job(1)):
            with trio.fail_after(BUSY_TIMEOUT_S + 60), pytest.raises(JobError) as caught:
                await trials.run(spec)
        assert caught.value.code is JobErrorCode.FULL
        assert (await trials.run(spec)).observations == 6, "as soon as there is a gap"


async def test_trial_beside_a_client_without_gaps_ends_and_seldom_runs(virtual_clock: MockClock) -> None:
    recorder = Recorder(Identity(b"3" * 32), ignore)
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9), step_s=STEP_S)
        await swarm.settle()
        alone_s = (await peer.run(job(1))).timing.total_s
        trials, spending = BenchmarkRunner(peer.coordinator, recorder), Spending()
        spec = TrialSpec(
            model="fake",
            methods=[FUSED.name],
            workload=TrialWorkload(concurrency=1, prompt_tokens=40, max_tokens=20),
            rounds=1,
            kind=ObservationKind.PROBE,
            spending=spending,
        )
        took_s: list[float] = []

        async def serve_without_gaps() -> None:
            for number in count(2):
                took_s.append((await peer.run(job(number))).timing.total_s)

        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_without_gaps)
            trial = await trials.run(spec)
            nursery.cancel_scope.cancel()
        assert trial.observations == 2
        assert spending.spent_s < 0.2 * (trio.current_time() - began_s)
        assert max(took_s) < 2 * alone_s
        assert sum(took_s) / len(took_s) < 1.1 * alone_s


async def test_wait_of_a_long_run_for_a_gap_between_jobs_is_bounded(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9), step_s=1.0)
        await swarm.settle()
        trials = BenchmarkRunner(peer.coordinator, Recorder(Identity(b"3" * 32), ignore))
        busy_since_s: list[float] = []

        async def serve_without_gaps() -> None:
            for number in count():
                await peer.run(job(number))

        def keep_the_node_busy(rounds: Sequence[Mapping[str, Run]]) -> bool:
            if not busy_since_s:
                busy_since_s.append(trio.current_time())
                nursery.start_soon(serve_without_gaps)
            return len(rounds) == 2

        spec = TrialSpec(
            model="fake",
            methods=[FUSED.name],
            workload=TrialWorkload(concurrency=1, prompt_tokens=16, max_tokens=20),
            rounds=1,
            is_decided=keep_the_node_busy,
            kind=ObservationKind.PROBE,
        )
        async with trio.open_nursery() as nursery:
            trial = await trials.run(spec)
            took_s = trio.current_time() - busy_since_s[0]
            nursery.cancel_scope.cancel()
        second = [runs.runs[1].makespan_s for runs in (trial.baseline, *trial.methods)]
        assert 9 * min(second) > MAX_WAIT_CAP_S
        assert 0.8 * MAX_WAIT_CAP_S < took_s / 2 - sum(second) / 2 < MAX_WAIT_CAP_S + 2


async def test_trial_gives_way_to_a_job_at_once(virtual_clock: MockClock) -> None:
    recorder = Recorder(Identity(b"3" * 32), ignore)
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9), step_s=STEP_S)
        await swarm.settle()
        alone = await peer.run(job(1))
        trials, spending = BenchmarkRunner(peer.coordinator, recorder), Spending()
        workload = TrialWorkload(concurrency=8, prompt_tokens=16, max_tokens=400)
        spec = TrialSpec(
            model="fake", methods=[FUSED.name], workload=workload, kind=ObservationKind.PROBE, spending=spending
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trials.run, spec)
            await trio.sleep(10)
            assert peer.coordinator.statistics.trials_running == 8
            beside = await peer.run(job(2))
            assert peer.coordinator.statistics.trials_failed == 8  # it may have begun anew since
            nursery.cancel_scope.cancel()
        assert beside.timing.total_s < 1.5 * alone.timing.total_s
        assert 0 < spending.spent_s < 11
