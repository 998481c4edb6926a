"""A node learns the best method of each task bucket at a bounded cost, whatever others report.

The heuristic is wrong here on purpose: its fastest engine is the slowest on this hardware.
"""

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import trio
from threadpoolctl import threadpool_limits
from trio.testing import MockClock

from node.coordinator.observation import Recorder
from node.coordinator.submission import JobRequest, JobResult
from node.coordinator.trial_runner import BenchmarkRunner
from node.engine.interface import Variant
from node.identity import Identity
from node.selection.adoption_trials import AdoptionTrials
from node.selection.chooser import LearnedChooser, LearnedVoter
from node.selection.prediction_cache import PredictionCache
from node.selection.samples import sample_of
from node.stages.voter import StageVote, Voter
from node.testing.fake_engine import FAKE_MODEL
from protocol.consensus_values import Cell
from protocol.forms import Digest
from protocol.identity import ModelId
from protocol.measurements import Observation, ObservationKind
from protocol.observations import SignedObservation
from selector.consensus.table import AgreedCell
from selector.evidence import AgreedTable
from selector.prediction import train
from selector.sample import Sample
from selector.task import PORTFOLIO, Method, TaskContext, method, portfolio
from selector.task_buckets import Viewpoint
from selector.workloads import WORKLOADS
from tests.support.job_peers import HARDWARE, open_swarm

SLOWNESS = {Variant("onnxruntime", "fp32"): 1.6}
STEP_S, ROW_S = 0.02, 0.001
SHARE, ALLOWANCE_S = 0.1, 120.0
PAUSE_S = 20.0
"""Between two jobs: long enough for a trial."""
EXACT = [each for each in portfolio("safetensors") if each.exact]
COMMON = tuple(random.Random(3).choices(range(1000), k=320))
FAST = method(engine="fused").name
LIE = method(engine="onnxruntime", prefix_cache="on", speculation="ngram-8").name


class LearningNode:
    """One node that serves all blocks and learns in this process; predictions cost no time."""

    def __init__(self, lies: Sequence[Sample] = (), voter: Voter | None = None) -> None:
        self.identity = Identity(b"5" * 32)
        self.predictions = PredictionCache()
        self.chooser = LearnedChooser(self.predictions, random.Random(1), share=SHARE, allowance_s=ALLOWANCE_S)
        self.voter = voter or LearnedVoter(self.predictions)
        self.recorder = Recorder(self.identity, self.publish)
        self.observations: list[Observation] = []
        self._lies = lies
        self._trained = 0

    async def publish(self, observation: SignedObservation) -> None:
        await trio.lowlevel.checkpoint()
        self.observations.append(observation.observation)

    def learn(self, tables: Sequence[AgreedTable] = ()) -> None:
        """Train once the history has tripled, or from tables that the swarm agreed on."""
        known = [found for each in self.observations if (found := sample_of(each))]
        if not tables and (len(known) < 5 or len(known) < 3 * self._trained):
            return
        self._trained = len(known)
        hour = known[0].hour
        viewpoint = Viewpoint(peer=self.identity.peer_id, hardware=HARDWARE, software=known[0].software, hour=hour)
        if tables:  # what a measurement for the swarm would say of the route
            known.append(replace(known[0], kind=ObservationKind.ASSIGNED, countersigned=True))
        with threadpool_limits(1):
            predictor = train([*known, *self._lies], viewpoint, tables)
        assert predictor is not None

        async def ask(context: TaskContext) -> Mapping[str, tuple[float, float]]:
            await trio.lowlevel.checkpoint()
            table = predictor.table(context)
            return {name: (of.log_cost, of.deviation) for name, of in table.items()}

        agreed = {FAKE_MODEL: tables[0].firm_part(predictor.learned_from[FAKE_MODEL])} if tables else {}
        self.predictions.set_predictor(ask, predictor.sample_count, agreed)


def requests(seed: int) -> dict[str, JobRequest]:
    """Return a job of each family: long prompts that begin alike, and short ones with long answers."""
    rng = random.Random(seed)
    own = tuple(rng.randrange(1000) for _ in range(40))
    return {
        "shared": JobRequest(model="fake", prompt_tokens=(*COMMON, *own), max_tokens=4, ignore_eos=True),
        "plain": JobRequest(model="fake", prompt_tokens=own[:24], max_tokens=24, ignore_eos=True),
    }


async def serve(node: LearningNode, rounds: int) -> dict[str, list[JobResult]]:
    """Return what jobs of each family came to, one after another."""
    results: dict[str, list[JobResult]] = defaultdict(list)
    async with open_swarm() as swarm:
        peer = await swarm.join(
            (0, 9),
            step_s=STEP_S,
            row_s=ROW_S,
            slowness=SLOWNESS,
            chooser=node.chooser,
            voter=node.voter,
            recorder=node.recorder,
        )
        await swarm.settle()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.predictions.run)
            runner = AdoptionTrials(BenchmarkRunner(peer.coordinator, node.recorder))
            nursery.start_soon(node.chooser.trials.run, runner, lambda: peer.coordinator.statistics.running > 0)
            for number in range(rounds):
                for family, request in requests(number).items():
                    results[family].append(await peer.run(request))
                    node.learn()
                    await trio.sleep(PAUSE_S)
            nursery.cancel_scope.cancel()
    return results


def is_fast(family: str, chosen: JobResult) -> bool:
    """Whether the method is the best for a family: an engine that is fast here, and a cache where it helps."""
    switches = chosen.method.switches
    return switches["engine"] != "onnxruntime" and (family == "plain" or switches["prefix_cache"] == "on")


async def test_learns_best_method_of_each_bucket_within_allowance(virtual_clock: MockClock) -> None:
    node = LearningNode()
    results = await serve(node, 14)
    first = {family: found[0].method.name for family, found in results.items()}
    assert all("engine=onnxruntime" in name for name in first.values())  # as the rule has it
    for family, found in results.items():
        assert sum(is_fast(family, each) for each in found[-4:]) >= 3, [each.method.name for each in found]
    allowance = node.chooser.allowance
    assert allowance.explored_jobs <= SHARE * allowance.jobs
    longest_trial_s = 30.0
    assert allowance.trial_s + allowance.regret_s <= ALLOWANCE_S + SHARE * allowance.served_s + longest_trial_s
    assert allowance.trials >= 2

    for found in results.values():
        for result in found[-4:]:
            assert result.selection is not None
            assert result.selection.basis == "model"
            assert set(result.selection.predictions) == {each.name for each in EXACT if each.drafter != "draft"}
            if not result.selection.explored:
                assert result.method.name in result.selection.accepted
    decisions = list(node.chooser.decisions)[-10:]
    errors = [abs(math.log(outcome.total_s / selection.predicted_s)) for outcome, selection in decisions]
    assert sorted(errors)[5] < 0.5


class LyingVoter:
    """Says of one method that it costs next to nothing."""

    async def vote(self, model: ModelId, context: TaskContext, methods: Sequence[Method]) -> StageVote:
        await trio.lowlevel.checkpoint()
        return StageVote({each.name: -20.0 if each.name == LIE else 5.0 for each in methods})


async def test_false_history_and_votes_adopt_no_slow_method(virtual_clock: MockClock) -> None:
    context = TaskContext(architecture="fake", block_count=9, hidden_size=32, hardware=HARDWARE)
    lies = [
        Sample(
            kind=ObservationKind.BENCH,
            model="fake",
            context=context,
            method=LIE,
            log_cost=-4.0,
            log_ratio=-4.0,
            observer="liar",
            route="liar",
            hour=500_000,
            software="",
            countersigned=False,
        )
        for _ in range(500)
    ]
    node = LearningNode(lies, LyingVoter())
    results = await serve(node, 8)
    # Where it shares a prefix, what they lie about is no worse than the rule's choice; for other jobs it is.
    lied = [each for each in results["plain"] if each.method.name == LIE]
    assert all(each.selection is not None and each.selection.explored for each in lied)
    assert len(lied) <= SHARE * len(results["plain"]) + 1
    tried = [each.method for each in node.observations if each.kind.value == "probe" and each.method.name == LIE]
    assert tried  # it was given a trial, and lost
    assert node.chooser.allowance.trials < 20


class KnowingVoter:
    """Knows which engine is fast here."""

    async def vote(self, model: ModelId, context: TaskContext, methods: Sequence[Method]) -> StageVote:
        del model, context
        await trio.lowlevel.checkpoint()
        return StageVote({each.name: -1.0 if each.name == FAST else 0.0 for each in methods})


@pytest.mark.parametrize("voter", [None, KnowingVoter()], ids=["votes alike", "knows better"])
async def test_vote_of_a_stage_that_knows_better_brings_a_method_into_use(
    voter: Voter | None, virtual_clock: MockClock
) -> None:
    async def mistaken(context: TaskContext) -> Mapping[str, tuple[float, float]]:
        """Predict as the coordinator does, which is sure that this engine is slow."""
        del context
        await trio.lowlevel.checkpoint()
        return {name: (0.5 if name == FAST else 0.0, 0.05) for name in PORTFOLIO}

    node = LearningNode(voter=voter)
    node.predictions.set_predictor(mistaken, 100)
    slowness = {Variant(engine, "fp32"): 1.6 for engine in ("eager", "onnxruntime")}
    async with open_swarm() as swarm:
        await swarm.join((0, 9), step_s=STEP_S, row_s=ROW_S, slowness=slowness, voter=node.voter)
        peer = await swarm.join(chooser=node.chooser, recorder=node.recorder)
        await swarm.settle()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.predictions.run)
            runner = AdoptionTrials(BenchmarkRunner(peer.coordinator, node.recorder))
            nursery.start_soon(node.chooser.trials.run, runner, lambda: peer.coordinator.statistics.running > 0)
            for _ in range(2):
                result = await peer.run(requests(1)["plain"])
                await trio.sleep(PAUSE_S)
            assert (result.method.name == FAST) == (voter is not None)
            nursery.cancel_scope.cancel()


async def test_explores_nothing_without_allowance(virtual_clock: MockClock) -> None:
    node = LearningNode()
    node.chooser = LearnedChooser(node.predictions, random.Random(1), share=0.0)
    results = await serve(node, 5)
    assert node.chooser.allowance.trials == 0
    assert {each.method.name for found in results.values() for each in found} <= {
        name for name in PORTFOLIO if "engine=onnxruntime" in name
    }


def agreed_on(winner: Method, epoch: int) -> AgreedTable:
    """Return a table by which one method is by far the fastest under every workload."""
    cells = {
        Cell(HARDWARE, workload, each.name): AgreedCell(-2_000_000 if each == winner else 500_000, 5, firm=True)
        for workload in WORKLOADS
        for each in EXACT
        if each != each.baseline
    }
    return AgreedTable(model=FAKE_MODEL, epoch=epoch, digest=Digest(bytes([epoch]) * 32), cells=cells)


async def test_agreed_table_decides_until_a_trial_contradicts(virtual_clock: MockClock) -> None:
    node = LearningNode()
    slow, fast = method(engine="onnxruntime"), method(engine="fused")
    job = requests(1)["plain"]
    async with open_swarm() as swarm:
        peer = await swarm.join(
            (0, 9),
            step_s=STEP_S,
            row_s=ROW_S,
            slowness=SLOWNESS,
            chooser=node.chooser,
            voter=node.voter,
            recorder=node.recorder,
        )
        await swarm.settle()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.predictions.run)
            for _ in range(5):
                await peer.run(job)
            for epoch, winner in enumerate((fast, slow), 1):
                node.learn([agreed_on(winner, epoch)])
                result = await peer.run(job)
                assert result.method.name == winner.name
                assert (result.consensus.epoch, result.consensus.table_digest) == (epoch, f"{epoch:02x}" * 32)
            runner = AdoptionTrials(BenchmarkRunner(peer.coordinator, node.recorder))
            nursery.start_soon(node.chooser.trials.run, runner, lambda: peer.coordinator.statistics.running > 0)
            await trio.sleep(10 * PAUSE_S)
            assert node.chooser.allowance.trials == 1
            result = await peer.run(job)
            assert result.consensus.table_digest == "02" * 32
            assert result.method.switches["engine"] != "onnxruntime"  # it lost here, whatever was agreed
            nursery.cancel_scope.cancel()
