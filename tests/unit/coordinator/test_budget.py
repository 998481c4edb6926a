"""Budget and objective decide which peers and methods a job is served by, and what it may cost."""

import random
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.observation import Recorder
from node.coordinator.submission import JobError, JobErrorCode, JobRequest, JobResult, JobStarted, TextDelta
from node.coordinator.trial_runner import BenchmarkRunner
from node.identity import Identity
from node.selection.adoption_trials import AdoptionTrials
from node.selection.chooser import LearnedChooser
from node.selection.prediction_cache import PredictionCache
from protocol.measurements import Objective, ObservationKind
from protocol.observations import SignedObservation
from protocol.tensors import Pooling
from tests.support.capabilities import EPYC
from tests.support.job_peers import Peer, Swarm, open_swarm

FAST_S, SLOW_S = 0.01, 0.04
FAST_PRICE, SLOW_PRICE = 40.0, 1.0


class Market:
    """A fast, expensive peer, a slow, cheap one, and a node without blocks that submits jobs."""

    def __init__(self, swarm: Swarm, fast: Peer, slow: Peer, client: Peer, chooser: LearnedChooser) -> None:
        self.swarm, self.fast, self.slow, self.client, self.chooser = swarm, fast, slow, client, chooser
        self.results: list[JobResult] = []

    async def run(self, prompt_tokens: int = 40, **wanted: Any) -> JobResult:
        prompt = tuple(range(len(self.results), len(self.results) + prompt_tokens))
        request = JobRequest(model="fake", prompt_tokens=prompt, max_tokens=16, ignore_eos=True, **wanted)
        self.results.append(await self.client.run(request))
        return self.results[-1]


def actual_cost(result: JobResult) -> float:
    """Return what a job cost, which all its stages have stated."""
    assert result.cost is not None
    assert result.cost.actual is not None
    return result.cost.actual


@asynccontextmanager
async def market(share: float = 0.0, **shape: Any) -> AsyncIterator[Market]:
    chooser = LearnedChooser(PredictionCache(), random.Random(1), share=share)
    async with open_swarm() as swarm:
        fast, slow = [
            await swarm.join((0, 9), step_s=step_s, capabilities=replace(EPYC, price=price), **shape)
            for step_s, price in ((FAST_S, FAST_PRICE), (SLOW_S, SLOW_PRICE))
        ]
        found = Market(swarm, fast, slow, await swarm.join(chooser=chooser), chooser)
        await swarm.settle()
        for objective in (Objective.LATENCY, Objective.COST) * 3:  # both peers were measured
            await found.run(objective=objective)
        yield found


async def test_objective_decides_between_a_fast_and_a_cheap_peer(virtual_clock: MockClock) -> None:
    async with market() as swarm:
        quick, frugal = await swarm.run(objective=Objective.LATENCY), await swarm.run(objective=Objective.COST)
        assert [each.peer for each in quick.route] == [swarm.fast.id]
        assert [each.peer for each in frugal.route] == [swarm.slow.id]
        assert quick.timing.total_s < frugal.timing.total_s
        assert actual_cost(quick) > actual_cost(frugal)
        least = await swarm.run(objective=Objective.THROUGHPUT)  # whatever its price, it computes least
        assert [each.peer for each in least.route] == [swarm.fast.id]


async def test_budget_binds_and_costs_are_predicted(virtual_clock: MockClock) -> None:
    async with market() as swarm:
        quick, frugal = await swarm.run(objective=Objective.LATENCY), await swarm.run(objective=Objective.COST)
        rich = await swarm.run(budget=1.5 * actual_cost(quick))
        assert [each.peer for each in rich.route] == [swarm.fast.id]
        poor = await swarm.run(budget=1.5 * actual_cost(frugal))
        assert [each.peer for each in poor.route] == [swarm.slow.id]
        assert poor.cost is not None
        assert poor.cost.budget == 1.5 * actual_cost(frugal)
        with pytest.raises(JobError, match="the cheapest is") as refused:
            await swarm.run(budget=0.1 * actual_cost(frugal))
        assert refused.value.code is JobErrorCode.OVER_BUDGET
        jobs = [(each.cost.predicted, actual_cost(each)) for each in swarm.results[6:] if each.cost is not None]
        off = [abs(predicted / actual - 1) for predicted, actual in jobs if predicted is not None]
        assert len(off) == len(jobs)
        assert statistics.median(off) < 0.25


async def test_first_job_of_a_node_is_judged_by_what_its_stages_report(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9), step_s=SLOW_S, capabilities=replace(EPYC, price=2.0))
        await swarm.settle()
        await trio.sleep(1)
        chooser = LearnedChooser(PredictionCache(), random.Random(1), share=0.0)
        client = await swarm.join(chooser=chooser)
        await swarm.settle()
        await peer.run(JobRequest(model="fake", prompt_tokens=(1,) * 8, max_tokens=16, ignore_eos=True))
        await trio.sleep(5)  # it announces how long its steps took
        with pytest.raises(JobError, match="budget"):
            await client.run(JobRequest(model="fake", prompt_tokens=(1,) * 8, max_tokens=64, budget=0.05))


async def test_cost_of_a_route_of_several_prices(virtual_clock: MockClock) -> None:
    """The fast, expensive stage runs nearly all blocks, the slow, cheap one takes nearly all of the time."""
    async with open_swarm() as swarm:
        dear = await swarm.join((0, 8), step_s=0.001, capabilities=replace(EPYC, price=FAST_PRICE))
        await swarm.join((8, 9), step_s=0.05, capabilities=replace(EPYC, price=SLOW_PRICE))
        client = await swarm.join(chooser=LearnedChooser(PredictionCache(), random.Random(1), share=0.0))
        await swarm.settle()
        for start in range(4):
            prompt = tuple(range(start, start + 40))
            result = await client.run(JobRequest(model="fake", prompt_tokens=prompt, max_tokens=16, ignore_eos=True))
        prices = [FAST_PRICE if stage.peer == dear.id else SLOW_PRICE for stage in result.route]
        assert len(prices) == 2
        seconds = [stage.statistics.compute_s for stage in result.route]
        assert result.cost is not None
        assert result.cost.actual == pytest.approx(sum(a * b for a, b in zip(prices, seconds, strict=True)))
        # Both stages' times are of one route, whose total alone is measured: the dear one's share is not known exactly.
        assert result.cost.predicted == pytest.approx(result.cost.actual, rel=0.3)


async def test_a_price_counts_beside_a_stage_without_a_capability_record(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        await swarm.join((0, 5), capabilities=replace(EPYC, price=FAST_PRICE))
        unknown = await swarm.join((5, 9))
        client = await swarm.join(chooser=LearnedChooser(PredictionCache(), random.Random(1), share=0.0))
        await swarm.settle()
        swarm.lose_record(unknown.id)
        job = JobRequest(model="fake", prompt_tokens=(1,) * 40, max_tokens=16, ignore_eos=True)
        result = await client.run(job)
        first, second = (stage.statistics.compute_s for stage in result.route)
        assert actual_cost(result) == pytest.approx(FAST_PRICE * first + second)
        with pytest.raises(JobError) as refused:
            await client.run(replace(job, budget=actual_cost(result) / 4))
        assert refused.value.code is JobErrorCode.OVER_BUDGET


async def test_a_lost_stage_is_replaced_for_the_same_objective(virtual_clock: MockClock) -> None:
    async with market() as swarm:
        spare = await swarm.swarm.join((0, 9), step_s=SLOW_S, capabilities=replace(EPYC, price=SLOW_PRICE))
        await swarm.swarm.settle()
        request = JobRequest(
            model="fake", prompt_tokens=(7,) * 40, max_tokens=60, ignore_eos=True, objective=Objective.COST
        )
        async with swarm.client.coordinator.submit(request) as events:
            count = 0
            async for event in events:
                if isinstance(event, TextDelta):
                    count += 1
                    if count == 5:
                        victim = next(peer.id for peer in (swarm.slow, spare) if peer.held()[0])
                        swarm.swarm.hub.kill(victim)
        assert isinstance(event, JobResult)
        assert event.replays == 1
        assert {stage.peer for stage in event.route} == {swarm.slow.id, spare.id} - {victim}


async def test_predicted_cost_is_what_the_budget_was_compared_with(virtual_clock: MockClock) -> None:
    async with market() as swarm:
        whole = await swarm.run()
        early = await swarm.run(stop=(" ",), budget=1e6)
        found: list[tuple[float, float]] = []
        for result in (whole, early):
            assert result.cost is not None
            assert result.selection is not None
            assert result.selection.predicted_cost is not None
            assert result.cost.predicted is not None
            found.append((result.cost.predicted, result.selection.predicted_cost))
        (whole_cost, whole_text), (early_cost, early_text) = found
        assert whole_cost == whole_text
        assert early_cost == pytest.approx(whole_cost, rel=0.25)
        assert early_text < 0.75 * early_cost


async def test_an_embedding_tells_the_cost_that_its_budget_was_compared_with(virtual_clock: MockClock) -> None:
    async with market() as swarm:
        job = JobRequest(model="fake", prompt_tokens=(3,) * 40, pooling=Pooling.MEAN, max_tokens=1)
        result = await swarm.client.run(replace(job, budget=1e6))
        assert result.cost is not None
        assert result.cost.predicted is not None
        with pytest.raises(JobError) as refused:
            await swarm.client.run(replace(job, budget=result.cost.predicted / 100))
        assert refused.value.code is JobErrorCode.OVER_BUDGET


async def test_affordable_peer_that_is_full_is_worth_a_retry(virtual_clock: MockClock) -> None:
    async with market(kv_positions=256) as swarm, trio.open_nursery() as nursery:
        frugal = JobRequest(model="fake", prompt_tokens=(9,) * 40, max_tokens=16, budget=2.0, ignore_eos=True)
        long = replace(frugal, prompt_tokens=(5,) * 64, max_tokens=256 - 64 - 40, budget=20.0)
        async with swarm.client.coordinator.submit(replace(long, objective=Objective.COST)):
            for _ in range(2):  # before and after the peer has announced it
                with pytest.raises(JobError, match="no room now") as refused:
                    await swarm.client.run(frugal)
                assert refused.value.code is JobErrorCode.FULL
                assert refused.value.retry_after_s
                await trio.sleep(3)
        assert [each.peer for each in (await swarm.client.run(frugal)).route] == [swarm.slow.id]
        nursery.cancel_scope.cancel()


async def test_text_is_cut_to_what_the_affordable_peer_holds(virtual_clock: MockClock) -> None:
    async with market(kv_positions=256) as swarm:
        result = await swarm.client.run(
            JobRequest(model="fake", prompt_tokens=(9,) * 40, max_tokens=400, budget=40.0, ignore_eos=True)
        )
        assert [each.peer for each in result.route] == [swarm.slow.id]
        assert len(result.token_ids) == 224 - 40


async def test_a_job_waits_for_the_affordable_peer_whose_link_broke(virtual_clock: MockClock) -> None:
    async with market() as swarm, trio.open_nursery() as nursery:

        async def come_back() -> None:
            await trio.sleep(4)
            swarm.swarm.hub.resume(swarm.slow.id)

        swarm.swarm.hub.stop(swarm.slow.id)
        nursery.start_soon(come_back)
        assert [each.peer for each in (await swarm.run(budget=2.0)).route] == [swarm.slow.id]


async def test_a_budget_binds_until_there_are_tokens(virtual_clock: MockClock) -> None:
    async with market() as swarm:
        request = JobRequest(model="fake", prompt_tokens=(9,) * 400, max_tokens=60, budget=6.0, ignore_eos=True)
        async with swarm.client.coordinator.submit(request) as events:
            assert isinstance(await anext(events), JobStarted)
            assert swarm.slow.held()[0] == 1
            swarm.swarm.hub.kill(swarm.slow.id)
            with pytest.raises(JobError, match=r"no peer is left .* within the budget 6 ") as refused:
                await anext(events)
            assert refused.value.retry_after_s
        assert swarm.fast.held()[0] == 0


async def test_a_task_is_explained_for_its_objective_within_its_budget(virtual_clock: MockClock) -> None:
    async with market() as swarm:
        job = JobRequest(model="fake", prompt_tokens=(5,) * 40, max_tokens=16)
        consider = swarm.client.coordinator.consider
        quick, frugal = await consider(job, {}), await consider(replace(job, objective=Objective.COST), {})
        assert [stage.peer for stage in quick.route] == [swarm.fast.id]
        assert [stage.peer for stage in frugal.route] == [swarm.slow.id]
        cost = frugal.choice.predicted_cost(frugal.agreed)
        assert cost is not None
        poor = await consider(replace(job, budget=1.5 * cost), {})
        assert [stage.peer for stage in poor.route] == [swarm.slow.id]
        with pytest.raises(JobError, match="the cheapest is") as refused:
            await consider(replace(job, budget=0.1 * cost), {})
        assert refused.value.code is JobErrorCode.OVER_BUDGET


async def test_trials_run_on_the_route_of_the_jobs_they_are_for(virtual_clock: MockClock) -> None:
    found: list[SignedObservation] = []

    async def publish(observation: SignedObservation) -> None:
        await trio.lowlevel.checkpoint()
        found.append(observation)

    async with market(share=0.1) as swarm, trio.open_nursery() as nursery:
        poor = await swarm.run(prompt_tokens=160, budget=2.0)
        assert [each.peer for each in poor.route] == [swarm.slow.id]
        coordinator = swarm.client.coordinator
        runner = AdoptionTrials(BenchmarkRunner(coordinator, Recorder(Identity(b"3" * 32), publish)))
        nursery.start_soon(swarm.chooser.trials.run, runner, lambda: coordinator.statistics.running > 0)
        while swarm.chooser.allowance.trials < 3:
            await trio.sleep(1)
        nursery.cancel_scope.cancel()
    probes = [each.observation for each in found]
    assert {each.kind for each in probes} == {ObservationKind.PROBE}
    assert {(each.workload.objective, each.workload.prompt_tokens, each.route[0].peer) for each in probes} == {
        (Objective.LATENCY, 40, swarm.fast.id),
        (Objective.THROUGHPUT, 40, swarm.slow.id),  # for the jobs that were to be cheap: what computes least
        (Objective.LATENCY, 160, swarm.slow.id),  # the fast peer is over that job's budget
    }
