"""Choices request trials of what may be better than the method in use."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.method_choice import SelectionRequest
from node.coordinator.submission import JobOutcome
from node.coordinator.trial_runner import Spending
from node.selection.chooser import LearnedChooser
from node.selection.prediction_cache import PredictionCache
from node.selection.trial_scheduler import TrialRequest
from protocol.identity import JobId, ModelId
from selector.task import BASELINE, Method, TaskContext, method

FUSED, CHUNKED = method(engine="fused"), method(engine="fused", prefill_chunk="64")
REPEATED, NARROW = method(engine="fused", speculation="ngram-8"), method(engine="fused", activations="int8")
CACHED = method(engine="fused", prefix_cache="on", speculation="ngram-8")
CONTEXT = TaskContext(
    architecture="fake", block_count=9, hidden_size=32, hardware="test", prompt_tokens=16, max_tokens=16, stage_count=2
)


class RecordingRunner:
    """Records the methods of trials, none of which wins."""

    def __init__(self) -> None:
        self.methods: list[Method] = []

    async def run(self, request: TrialRequest, spending: Spending) -> Mapping[str, Sequence[float]]:
        del spending
        await trio.lowlevel.checkpoint()
        self.methods.extend(request.methods)
        return {each.name: [0.0] * 3 for each in request.methods}


@pytest.mark.parametrize(("transfer_s", "tried"), [(0.05, [FUSED, REPEATED]), (0.4, [FUSED, REPEATED, NARROW])])
async def test_only_the_simplest_of_equivalent_methods_gets_a_trial(
    transfer_s: float, tried: list[Method], virtual_clock: MockClock
) -> None:
    context = replace(CONTEXT, transfer_s=transfer_s)
    chooser = LearnedChooser(PredictionCache(), random.Random(1))
    admitted = [BASELINE, FUSED, CHUNKED, REPEATED, CACHED, NARROW]
    choice = await chooser.choose(SelectionRequest(model=ModelId("ab" * 32), context=context, admitted=admitted))
    assert list(choice.ballot([])) == [FUSED.name]
    chooser.served(
        choice, JobOutcome(job_id=JobId("cd" * 16), method=FUSED.name, completion_tokens=16, total_s=1.0, replays=0)
    )
    runner = RecordingRunner()
    with trio.move_on_after(60):
        await chooser.trials.run(runner, lambda: False)
    assert runner.methods == tried


@pytest.mark.parametrize(("objective", "chosen"), [("latency", NARROW), ("throughput", FUSED), ("cost", FUSED)])
async def test_links_count_for_latency_only(objective: str, chosen: Method, virtual_clock: MockClock) -> None:
    context = replace(CONTEXT, link_s=0.5, objective=objective)
    chooser = LearnedChooser(PredictionCache(), random.Random(1))
    request = SelectionRequest(model=ModelId("ab" * 32), context=context, admitted=[BASELINE, NARROW, FUSED])
    choice = await chooser.choose(request)
    assert choice.order[0] == chosen
