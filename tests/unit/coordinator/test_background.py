"""Trials are background work: they are not in the way of jobs, and make up no kinds of tasks."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import TypeVar

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.observation import Recorder
from node.coordinator.submission import JobError, JobErrorCode, JobRequest
from node.coordinator.trial import Spending, TrialSpec
from node.coordinator.trial_runner import BUSY_TIMEOUT_S, MAX_WAIT_S, BenchmarkRunner
from node.identity import Identity
from node.stages.background_allowance import RATE, BackgroundAllowance
from node.stages.voter import StageVote
from protocol.identity import ModelId
from protocol.measurements import ObservationKind
from protocol.messages import FailureReason
from protocol.observations import SignedObservation
from selector.task import Method, TaskContext, method
from selector.task_buckets import task_bucket
from selector.workloads import TrialWorkload
from tests.support.heuristic_selection import HeuristicVoter
from tests.support.job_peers import Peer, open_swarm

FUSED = method(engine="fused")
STEP_S = 0.05

T = TypeVar("T")


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
        peer = await swarm.join((0, 9), step_s=10 * STEP_S)
        busy = await swarm.join()
        await swarm.settle()
        trials = BenchmarkRunner(peer.coordinator, Recorder(Identity(b"3" * 32), ignore))
        spec = TrialSpec(model="fake", methods=[FUSED.name], workload=TrialWorkload(), kind=ObservationKind.PROBE)
        async with busy.coordinator.submit(job(1, tokens=500)):
            with trio.fail_after(BUSY_TIMEOUT_S + 60), pytest.raises(JobError) as caught:
                await trials.run(spec)
        assert caught.value.code is JobErrorCode.FULL
        assert (await trials.run(spec)).observations == 6, "as soon as there is a gap"


class Client:
    """Serves jobs one after another beside a trial."""

    def __init__(self, peer: Peer, gap_s: float, prompt_tokens: int = 40) -> None:
        self.peer, self.gap_s, self.prompt_tokens = peer, gap_s, prompt_tokens
        self.took_s: list[float] = []

    async def serve(self) -> None:
        for number in count(2):
            request = replace(job(number), prompt_tokens=tuple(range(number, number + self.prompt_tokens)))
            self.took_s.append((await self.peer.run(request)).timing.total_s)
            await trio.sleep(self.gap_s)

    async def beside(self, trial: Callable[[], Awaitable[T]]) -> T:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.serve)
            done = await trial()
            nursery.cancel_scope.cancel()
        return done


@pytest.mark.parametrize(("gap_s", "prompt_tokens"), [(0.0, 40), (0.02, 40), (0.02, 600)])
async def test_trial_beside_a_client_without_gaps_ends_and_is_hardly_felt(
    virtual_clock: MockClock, gap_s: float, prompt_tokens: int
) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9), step_s=STEP_S, row_s=STEP_S / 10)
        await swarm.settle()
        client = Client(peer, gap_s, prompt_tokens)
        with trio.move_on_after(20):
            await client.serve()
        alone_s, known_s = min(client.took_s), peer.coordinator.peer_records()[peer.id].block_s
        client.took_s.clear()
        trials, spending = BenchmarkRunner(peer.coordinator, Recorder(Identity(b"3" * 32), ignore)), Spending()
        workload = TrialWorkload(concurrency=1, prompt_tokens=prompt_tokens, max_tokens=20)
        spec = TrialSpec(
            model="fake",
            methods=[FUSED.name],
            workload=workload,
            rounds=1,
            kind=ObservationKind.PROBE,
            spending=spending,
        )
        began_s = trio.current_time()
        trial = await client.beside(lambda: trials.run(spec))
        took_s = trio.current_time() - began_s
        assert trial.observations == 2
        assert peer.coordinator.statistics.trials_cancelled == 0, "nothing that was computed is thrown away"
        # Four jobs at a tenth of the time, and half as much again for a prompt in pieces.
        assert took_s < 4 * MAX_WAIT_S + 64 * alone_s
        assert spending.spent_s < 0.2 * took_s
        assert sum(client.took_s) / len(client.took_s) < 1.25 * alone_s
        assert max(client.took_s) < 2 * alone_s
        assert peer.coordinator.peer_records()[peer.id].block_s == pytest.approx(known_s, rel=0.2)


async def test_run_of_a_trial_is_cut_off_twice_at_most(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9), step_s=STEP_S)
        await swarm.settle()
        client = Client(peer, gap_s=2.0)  # a run takes longer
        trials = BenchmarkRunner(peer.coordinator, Recorder(Identity(b"3" * 32), ignore))
        workload = TrialWorkload(prompt_tokens=16, max_tokens=60)
        spec = TrialSpec(model="fake", methods=[FUSED.name], workload=workload, rounds=2, kind=ObservationKind.PROBE)
        assert (await client.beside(lambda: trials.run(spec))).observations == 4
        assert 0 < peer.coordinator.statistics.trials_cancelled <= 2 * 4
        assert peer.coordinator.statistics.trials_failed == 0
        assert sum(client.took_s) / len(client.took_s) < 1.25 * min(client.took_s)


async def test_trial_that_cannot_end_within_its_limit_is_given_up_at_once(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9), step_s=STEP_S)
        await swarm.settle()
        trials, spending = BenchmarkRunner(peer.coordinator, Recorder(Identity(b"3" * 32), ignore)), Spending(20.0)
        workload = TrialWorkload(prompt_tokens=16, max_tokens=80)  # rounds of about 9 s
        spec = TrialSpec(
            model="fake", methods=[FUSED.name], workload=workload, kind=ObservationKind.PROBE, spending=spending
        )
        with pytest.raises(JobError, match="longer than the 20 s"):
            await trials.run(spec)
        assert spending.spent_s < 12
        assert spending.needed_s == pytest.approx(3 * spending.spent_s, rel=0.1)


async def test_trial_on_another_peer_is_hardly_felt_by_the_users_there(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer, user, tester = await swarm.join((0, 9), step_s=STEP_S), await swarm.join(), await swarm.join()
        await swarm.settle()
        alone_s = (await user.run(job(1))).timing.total_s
        trials = BenchmarkRunner(tester.coordinator, Recorder(Identity(b"3" * 32), ignore))
        workload = TrialWorkload(concurrency=8, prompt_tokens=200, max_tokens=100)
        spec = TrialSpec(model="fake", methods=[FUSED.name], workload=workload, rounds=1, kind=ObservationKind.PROBE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trials.run, spec)
            await trio.sleep(3)
            assert peer.held()[0] == 8
            beside_s = (await user.run(job(2))).timing.total_s
            assert peer.held()[0] == 8, "it goes on afterwards"
            nursery.cancel_scope.cancel()
        assert beside_s < 1.5 * alone_s


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
            assert peer.coordinator.statistics.trials_cancelled == 8  # it may have begun anew since
            nursery.cancel_scope.cancel()
        assert beside.timing.total_s < 1.5 * alone.timing.total_s
        assert 0 < spending.spent_s < 11


@pytest.mark.parametrize("share", [0.0, 0.1])
async def test_peer_bounds_what_trials_of_others_compute_there(virtual_clock: MockClock, share: float) -> None:
    async with open_swarm() as swarm:
        allowance = BackgroundAllowance(share, lambda: 2)
        peer, tester = await swarm.join((0, 9), step_s=STEP_S, background=allowance), await swarm.join()
        await swarm.settle()
        trials = BenchmarkRunner(tester.coordinator, Recorder(Identity(b"3" * 32), ignore))
        workload = TrialWorkload(prompt_tokens=16, max_tokens=200)  # ten seconds
        spec = TrialSpec(model="fake", methods=[FUSED.name], workload=workload, rounds=9, kind=ObservationKind.PROBE)
        with pytest.raises(JobError, match="as much for measurements as it may"):
            await trials.run(spec)
        computed_s = 2 * sum(engine.statistics().compute_s for engine in peer.engines)
        assert share * 100 <= computed_s <= share * 10 * (RATE.burst + 30 + 300 * RATE.per_s)
        await tester.run(job(1))
        own = BenchmarkRunner(peer.coordinator, Recorder(Identity(b"3" * 32), ignore))
        assert (await own.run(replace(spec, rounds=1))).observations, "its own trials have a bound of their own"


class RecordingAllowance(BackgroundAllowance):
    """Records what is charged."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.charges: list[float] = []

    def charge(self, seconds: float) -> None:
        self.charges.append(seconds)
        super().charge(seconds)


async def test_sessions_of_trials_that_end_on_the_stage_are_charged_once(virtual_clock: MockClock) -> None:
    """Those that fail there, and those of other stages, which another route continues, as any other."""
    async with open_swarm() as swarm:
        allowances = [RecordingAllowance(), RecordingAllowance()]
        first, last = [
            await swarm.join(blocks, step_s=STEP_S, background=allowance)
            for blocks, allowance in zip(((0, 5), (5, 9)), allowances, strict=True)
        ]
        tester = await swarm.join()
        await swarm.settle()

        async def fail() -> None:
            await trio.sleep(3)
            [span] = first.stages.spans()
            [session] = span.sessions.values()
            span.fail(session, FailureReason.ENGINE, "out of order")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            done = await tester.run(replace(job(1, tokens=80), background=True))
        assert done.is_replayed
        for peer, allowance, sessions in ((first, allowances[0], 2), (last, allowances[1], 1)):
            computed_s = sum(engine.statistics().compute_s for engine in peer.engines)
            assert sum(allowance.charges) == pytest.approx(computed_s, abs=1.1 * STEP_S), (
                "but for a step that it died in"
            )
            assert sum(charge > 0 for charge in allowance.charges) == sessions
