"""Trials are charged whatever comes of them, and unavailable methods are not retried at once."""

import time
from collections.abc import Mapping, Sequence

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.submission import JobError, JobErrorCode
from node.coordinator.trial import Spending
from node.selection.chooser import INITIAL_ALLOWANCE_S
from node.selection.trial_scheduler import FAILED_RETRY_S, MAX_OVERDRAFT_S, TrialRequest, TrialScheduler
from node.storage.adoption_store import AdoptionStore, StoredTrials
from protocol.identity import ModelId
from selector.adoption import RETRY_S, Adoption, ExplorationAllowance
from selector.heuristic import CostEstimate
from selector.task import BASELINE, TaskContext, method

FUSED, CHUNKED = method(engine="fused"), method(engine="fused", prefill_chunk="64")
CONTEXT = TaskContext(architecture="fake", block_count=9, hidden_size=32, hardware="test")
REQUEST = TrialRequest(
    model=ModelId("ab" * 32), context=CONTEXT, methods=[BASELINE, FUSED, CHUNKED], in_use=BASELINE.name
)
NAMES = [each.name for each in REQUEST.methods]
EXPECTED = {name: CostEstimate(cost, 0.01) for name, cost in zip(NAMES, (0.0, -0.9, -9.0), strict=True)}


class SlowRunner:
    """Takes long, then fails, or finds only one method available."""

    def __init__(self, *, fails: bool = False, takes_s: float = 0.6 * INITIAL_ALLOWANCE_S) -> None:
        self._fails = fails
        self._takes_s = takes_s
        self.trials = 0

    async def run(self, request: TrialRequest, spending: Spending) -> Mapping[str, Sequence[float]]:
        assert request == REQUEST
        self.trials += 1
        spending.spent_s = min(spending.limit_s, self._takes_s)
        await trio.sleep(spending.spent_s)
        if spending.spent_s == spending.limit_s:
            raise spending.exceeded()
        if self._fails:
            raise JobError(JobErrorCode.FAILED, "the stages keep changing")
        return {FUSED.name: [-1.0] * 3}


class MemoryStore(AdoptionStore):
    """A store that outlives a scheduler."""

    def __init__(self) -> None:
        self.buckets: dict[str, StoredTrials] = {}

    async def save(self, bucket: str, trials: StoredTrials) -> None:
        self.buckets[bucket] = trials

    async def load(self) -> Mapping[str, StoredTrials]:
        return self.buckets


class Node:
    """A scheduler with its state."""

    def __init__(self, store: AdoptionStore | None = None) -> None:
        self.adoption = Adoption()
        self.allowance = ExplorationAllowance(0.1, INITIAL_ALLOWANCE_S)
        self.scheduler = TrialScheduler(self.adoption, self.allowance, store=store)

    async def run(self, runner: SlowRunner, *buckets: str) -> None:
        """Request a trial of each bucket, and run them."""
        for bucket in buckets:
            self.scheduler.request(bucket, REQUEST)
        with trio.move_on_after(9 * INITIAL_ALLOWANCE_S):
            await self.scheduler.run(runner, lambda: False)

    def in_use(self) -> str:
        return self.adoption.in_use("bucket", NAMES, BASELINE.name)

    def candidates(self) -> tuple[str, ...]:
        return self.adoption.candidates("bucket", NAMES, BASELINE.name, EXPECTED, trio.current_time()).names


async def test_restart_restores_adopted_methods(virtual_clock: MockClock) -> None:
    store = MemoryStore()
    await Node(store).run(SlowRunner(), "bucket")
    restarted = Node(store)
    await restarted.run(SlowRunner(fails=True))
    assert restarted.in_use() == FUSED.name
    assert restarted.candidates() == (CHUNKED.name,)


async def test_trial_by_a_clock_that_was_ahead_lets_others_follow_in_time(virtual_clock: MockClock) -> None:
    store = MemoryStore()
    next_year_s = int(time.time()) + 365 * 86_400
    store.buckets["bucket"] = {name: (0.5 if name != BASELINE.name else 0.0, next_year_s) for name in NAMES}
    node = Node(store)
    await node.run(SlowRunner())
    assert not node.candidates()
    await trio.sleep(RETRY_S)
    assert node.candidates() == (CHUNKED.name, FUSED.name)


async def test_failed_trials_are_charged_to_the_allowance(virtual_clock: MockClock) -> None:
    node = Node()
    await node.run(SlowRunner(fails=True), "bucket")
    assert node.allowance.left_s == pytest.approx(0.4 * INITIAL_ALLOWANCE_S)
    await node.run(SlowRunner(fails=True), "other")
    assert node.allowance.left_s < 0
    assert node.allowance.trials == 0


async def test_bucket_whose_trial_failed_waits_for_the_next(virtual_clock: MockClock) -> None:
    node, runner = Node(), SlowRunner(fails=True, takes_s=0.0)  # no run found a gap
    await node.run(runner, "bucket")
    await node.run(runner, "bucket", "other")
    assert runner.trials == 2, "the other bucket's"
    await trio.sleep(FAILED_RETRY_S)
    await node.run(runner, "bucket")
    assert runner.trials == 3


async def test_one_queued_trial_may_overdraw_the_allowance(virtual_clock: MockClock) -> None:
    node = Node()
    runner = SlowRunner(takes_s=1.2 * INITIAL_ALLOWANCE_S)
    await node.run(runner, "one", "two", "three")
    assert runner.trials == 1
    assert node.allowance.left_s == pytest.approx(-0.2 * INITIAL_ALLOWANCE_S)


async def test_bucket_has_one_pending_trial_at_most(virtual_clock: MockClock) -> None:
    runner = SlowRunner(takes_s=1.0)
    await Node().run(runner, "bucket", "bucket", "other")
    assert runner.trials == 2


async def test_trial_waits_until_no_job_is_under_way(virtual_clock: MockClock) -> None:
    node, runner = Node(), SlowRunner(takes_s=1.0)
    node.scheduler.request("bucket", REQUEST)
    with trio.move_on_after(25):
        await node.scheduler.run(runner, lambda: trio.current_time() < 20)
    assert runner.trials == 1
    assert node.allowance.trial_s == pytest.approx(1.0)


async def test_unavailable_method_is_not_a_candidate_again(virtual_clock: MockClock) -> None:
    node = Node()
    await node.run(SlowRunner(takes_s=1.0), "bucket")
    assert node.in_use() == FUSED.name
    assert not node.candidates()


async def test_trial_that_overdraws_the_allowance_is_given_up(virtual_clock: MockClock) -> None:
    node, runner = Node(), SlowRunner(takes_s=100 * INITIAL_ALLOWANCE_S)
    await node.run(runner, "bucket", "another")
    assert runner.trials == 1
    assert node.allowance.trial_s == pytest.approx(INITIAL_ALLOWANCE_S + MAX_OVERDRAFT_S)
    assert node.in_use() == BASELINE.name
    assert node.candidates() == ()  # not at once again


class CautiousRunner(SlowRunner):
    """Gives up after a round that shows that the trial would take longer than it may."""

    async def run(self, request: TrialRequest, spending: Spending) -> Mapping[str, Sequence[float]]:
        round_s = self._takes_s / 3
        if self._takes_s < spending.limit_s:
            return await super().run(request, spending)
        self.trials += 1
        spending.spent_s = round_s
        raise spending.exceeded(self._takes_s - round_s)


async def test_trial_that_would_overdraw_the_allowance_waits_until_that_covers_it(virtual_clock: MockClock) -> None:
    node, runner = Node(), CautiousRunner(takes_s=2 * INITIAL_ALLOWANCE_S + MAX_OVERDRAFT_S)
    await node.run(runner, "bucket")
    assert runner.trials == 1
    assert node.candidates() == ()
    await trio.sleep(FAILED_RETRY_S)
    await node.run(runner, "bucket")
    assert runner.trials == 1, "it would be given up again"
    node.allowance.served_s += 10 * (node.allowance.trial_s + INITIAL_ALLOWANCE_S + 1)
    await node.run(runner, "bucket")
    assert runner.trials == 2
    assert node.in_use() == FUSED.name


async def test_trial_that_the_allowance_never_covers_is_tried_again_after_long(virtual_clock: MockClock) -> None:
    node, runner = Node(), CautiousRunner(takes_s=3 * (INITIAL_ALLOWANCE_S / 2))
    runner._takes_s += MAX_OVERDRAFT_S
    await node.run(runner, "bucket")
    await trio.sleep(RETRY_S)
    await node.run(runner, "bucket")
    assert runner.trials == 2
