"""What trials cost is spent whatever comes of them, and what they could not have is left alone."""

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.method_choice import SelectionRequest
from node.coordinator.submission import JobError, JobErrorCode, JobOutcome
from node.selection.chooser import ALLOWANCE_S, LearnedChooser, TrialNeed, TrialResult
from node.selection.prediction_cache import Predictions
from node.storage.adoption_store import Standings
from protocol.identity import JobId, ModelId
from selector.task import BASELINE, Method, TaskContext, method

FUSED, CHUNKED = method(engine="fused"), method(engine="fused", prefill_chunk="64")
REPEATED, NARROW = method(engine="fused", speculation="ngram-8"), method(engine="fused", activations="int8")
CONTEXT = TaskContext(architecture="fake", block_count=9, hidden_size=32, hardware="test")
NEED = TrialNeed(model=ModelId("ab" * 32), context=CONTEXT, methods=[BASELINE, FUSED, CHUNKED])


class Prober:
    """Takes long and then fails, or has no more than one method."""

    def __init__(self, *, fails: bool, takes_s: float = 0.6 * ALLOWANCE_S) -> None:
        self._fails = fails
        self._takes_s = takes_s
        self.trials = 0

    async def probe(self, need: TrialNeed) -> TrialResult:
        assert need == NEED
        self.trials += 1
        await trio.sleep(self._takes_s)
        if self._fails:
            raise JobError(JobErrorCode.FAILED, "the stages keep changing")
        return TrialResult({FUSED.name: [-1.0] * 3})


class Kept:
    """A memory that outlives a process."""

    def __init__(self) -> None:
        self.kinds: dict[str, Standings] = {}

    async def keep(self, kind: str, standings: Standings) -> None:
        self.kinds[kind] = standings

    async def recall(self) -> Mapping[str, Standings]:
        return self.kinds


async def test_a_node_that_starts_again_goes_on_with_what_it_had_adopted(virtual_clock: MockClock) -> None:
    kept = Kept()
    await hold(LearnedChooser(Predictions(), random.Random(1), memory=kept), Prober(fails=False))
    again = LearnedChooser(Predictions(), random.Random(1), memory=kept)
    with trio.move_on_after(1):
        await again.run(Prober(fails=True), lambda: False)
    names = [each.name for each in NEED.methods]
    expected = {BASELINE.name: 0.0, FUSED.name: -0.9, CHUNKED.name: -9.0}
    sure = dict.fromkeys(names, 0.01)
    assert again.adoption.in_use("kind", names, BASELINE.name) == FUSED.name
    assert again.adoption.candidates("kind", names, BASELINE.name, expected, sure, trio.current_time()) == [
        CHUNKED.name
    ]


async def hold(chooser: LearnedChooser, prober: Prober) -> None:
    """Have one trial held."""
    chooser._needs_in.send_nowait(("kind", BASELINE.name, NEED))
    with trio.move_on_after(2 * ALLOWANCE_S):
        await chooser.run(prober, lambda: False)


async def test_a_trial_that_fails_has_cost_what_it_took(virtual_clock: MockClock) -> None:
    chooser = LearnedChooser(Predictions(), random.Random(1))
    await hold(chooser, Prober(fails=True))
    assert chooser.budget.left_s == pytest.approx(0.4 * ALLOWANCE_S)
    await hold(chooser, Prober(fails=True))
    assert chooser.budget.left_s < 0
    assert chooser.budget.trials == 0


async def test_of_the_trials_that_wait_one_may_overdraw_the_budget_and_the_others_are_not_held(
    virtual_clock: MockClock,
) -> None:
    chooser = LearnedChooser(Predictions(), random.Random(1))
    prober = Prober(fails=False, takes_s=1.5 * ALLOWANCE_S)
    for kind in ("one", "two", "three"):
        chooser._needs_in.send_nowait((kind, BASELINE.name, NEED))
    with trio.move_on_after(9 * ALLOWANCE_S):
        await chooser.run(prober, lambda: False)
    assert prober.trials == 1
    assert chooser.budget.left_s == pytest.approx(-0.5 * ALLOWANCE_S)


async def test_a_method_that_a_trial_could_not_have_is_no_candidate_for_the_next(virtual_clock: MockClock) -> None:
    chooser = LearnedChooser(Predictions(), random.Random(1))
    await hold(chooser, Prober(fails=False))
    names = [each.name for each in NEED.methods]
    expected = {BASELINE.name: 0.0, FUSED.name: -1.0, CHUNKED.name: -9.0}
    sure = dict.fromkeys(names, 0.01)
    assert chooser.adoption.in_use("kind", names, BASELINE.name) == FUSED.name
    assert not chooser.adoption.candidates("kind", names, BASELINE.name, expected, sure, trio.current_time())


@pytest.mark.parametrize(("transfer_s", "worth_it"), [(0.05, [FUSED, REPEATED]), (0.4, [FUSED, REPEATED, NARROW])])
async def test_of_methods_that_do_the_same_to_a_task_the_plainest_gets_a_trial(
    transfer_s: float, worth_it: list[Method], virtual_clock: MockClock
) -> None:
    tried: list[str] = []

    class Recording(Prober):
        async def probe(self, need: TrialNeed) -> TrialResult:
            await trio.lowlevel.checkpoint()
            tried.extend(each.name for each in need.methods)
            return TrialResult({each.name: [0.0] * 3 for each in need.methods})

    short = replace(CONTEXT, prompt_tokens=16, max_tokens=16, stage_count=2, transfer_s=transfer_s)
    cached = method(engine="fused", prefix_cache="on", speculation="ngram-8")
    chooser = LearnedChooser(Predictions(), random.Random(1))
    admitted = [BASELINE, FUSED, CHUNKED, REPEATED, cached, NARROW]
    choice = await chooser.choose(SelectionRequest(model=NEED.model, context=short, admitted=admitted))
    outcome = JobOutcome(job_id=JobId("cd" * 16), method=FUSED.name, completion_tokens=16, total_s=1.0, replays=0)
    assert list(choice.ballot([])) == [FUSED.name]
    chooser.served(choice, outcome)
    with trio.move_on_after(60):
        await chooser.run(Recording(fails=False), lambda: False)
    assert tried == [each.name for each in worth_it]
