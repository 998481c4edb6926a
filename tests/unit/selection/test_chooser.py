"""Choices request trials of what may be better than the method in use."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.method_choice import OverBudget, SelectionRequest, Votes
from node.coordinator.submission import JobOutcome, Selection
from node.coordinator.trial import Spending
from node.selection.chooser import LearnedChoice, LearnedChooser
from node.selection.prediction_cache import PredictionCache
from node.selection.trial_scheduler import TrialRequest
from protocol.consensus_values import Cell
from protocol.forms import Digest
from protocol.identity import JobId, ModelId
from protocol.measurements import ObservationKind
from selector.adoption import TrialRecord
from selector.confidence import MIN_CONFIDENCE
from selector.consensus.table import AgreedCell
from selector.evidence import AgreedTable
from selector.prediction import train
from selector.sample import Sample
from selector.task import BASELINE, PORTFOLIO, Method, TaskContext, method, parse_method, portfolio
from selector.task_buckets import Viewpoint, task_bucket
from selector.workloads import WORKLOADS

FUSED, CHUNKED = method(engine="fused"), method(engine="fused", prefill_chunk="64")
REPEATED, NARROW = method(engine="fused", speculation="ngram-8"), method(engine="fused", activations="int8")
CHUNKED_CACHED = method(engine="fused", prefill_chunk="128", prefix_cache="on")
CACHED = method(engine="fused", prefix_cache="on", speculation="ngram-8")
PLAIN_CACHED = method(engine="eager", prefix_cache="on")
CONTEXT = TaskContext(
    architecture="fake", block_count=9, hidden_size=32, hardware="test", prompt_tokens=16, max_tokens=16, stage_count=2
)


def outcome_of(name: str, total_s: float, compute_s: float = 0.0) -> JobOutcome:
    """Return what a job of the context cost with a method."""
    return JobOutcome(
        job_id=JobId("cd" * 16),
        method=name,
        completion_tokens=CONTEXT.max_tokens,
        total_s=total_s,
        is_replayed=False,
        compute_s=compute_s,
    )


def equally(votes: Votes) -> None:
    """Return the weights of votes of peers without reputation; see WeighVotes."""
    del votes


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
    assert list(choice.ballot([], equally)) == [FUSED.name]
    chooser.served(choice, outcome_of(FUSED.name, 1.0))
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


TOUTED, USUAL = method(engine="eager", prefix_cache="on").name, method(engine="onnxruntime").name
MODEL = ModelId("ab" * 32)


@pytest.mark.parametrize(
    ("cells", "used"),
    [
        ({TOUTED: (-1.0, True), USUAL: (-0.5, True)}, TOUTED),
        ({TOUTED: (-0.6, True), USUAL: (-0.9, True)}, USUAL),  # the swarm agreed on the contrary
        ({USUAL: (-0.5, True)}, USUAL),  # the swarm says nothing of it
        ({TOUTED: (-1.0, False), USUAL: (-0.5, True)}, USUAL),  # two peers at most say so
        ({TOUTED: (-0.6, True), USUAL: (-0.5, True)}, USUAL),  # readings of one value differ as much
        ({TOUTED: (-1.0, True)}, USUAL),  # who knows what the usual one costs?
        ({}, USUAL),
    ],
    ids=["agreed", "contrary", "no cell", "hint", "all but equal", "usual without a cell", "no table"],
)
async def test_method_is_used_without_a_trial_only_if_firm_cells_have_it_ahead(
    cells: Mapping[str, tuple[float, bool]], used: str, nursery: trio.Nursery, virtual_clock: MockClock
) -> None:
    async def misled(context: TaskContext) -> Mapping[str, tuple[float, float]]:
        """Predict what others reported of one method, which may be anything."""
        del context
        await trio.lowlevel.checkpoint()
        return {name: (-5.0 if name == TOUTED else 0.0, 0.1) for name in PORTFOLIO}

    agreed = {
        Cell("test", next(iter(WORKLOADS)), each): AgreedCell(round(ratio * 1e6), 5 if firm else 2, firm)
        for each, (ratio, firm) in cells.items()
    }
    table = AgreedTable(model=MODEL, epoch=1, digest=Digest(bytes(32)), cells=agreed).firm_part({"test"})
    predictions = PredictionCache()
    predictions.set_predictor(misled, 10, {MODEL: table})
    nursery.start_soon(predictions.run)
    chooser = LearnedChooser(predictions, random.Random(1), share=0.0)
    request = SelectionRequest(
        model=MODEL, context=CONTEXT, admitted=[BASELINE, parse_method(TOUTED), parse_method(USUAL)]
    )
    choice = await chooser.choose(request)
    assert choice.learned_from is not None
    assert list(choice.ballot([], equally)) == [used]

    elsewhere = replace(
        request, context=replace(CONTEXT, hardware="test+new")
    )  # nobody has measured the second stage's
    assert list((await chooser.choose(elsewhere)).ballot([], equally)) == [used]
    slower_there = {Cell("other", next(iter(WORKLOADS)), TOUTED): AgreedCell(500_000, 5, firm=True)}
    predictions.set_predictor(misled, 10, {MODEL: replace(table, cells={**table.cells, **slower_there})})
    contradicted = replace(request, context=replace(CONTEXT, hardware="test+other"))
    assert list((await chooser.choose(contradicted)).ballot([], equally)) == [USUAL]


def compute_request(*admitted: Method, is_free: bool) -> SelectionRequest:
    """Return the request of a job whose route computes for one second, by the planner's measurements."""
    return SelectionRequest(
        model=ModelId("ab" * 32),
        context=CONTEXT,
        admitted=admitted,
        is_free=is_free,
        stage_compute_s=(0.25, 0.75),
        prices=(1.0, 1.0),
    )


@pytest.mark.parametrize("in_use", [None, CHUNKED_CACHED])
async def test_computing_of_a_named_method_is_predicted_relative_to_the_one_in_use(
    in_use: Method | None, virtual_clock: MockClock
) -> None:
    chooser = LearnedChooser(PredictionCache(), random.Random(1))
    exact = [each for each in portfolio("safetensors") if each.exact]
    if in_use is not None:
        chooser.adoption.restore(task_bucket(CONTEXT), {in_use.name: TrialRecord(-1.0, 0.0)})
    free = await chooser.choose(compute_request(*exact, is_free=True))
    named = await chooser.choose(compute_request(BASELINE, is_free=False))
    assert named.predicted_cost(BASELINE.name) == pytest.approx(free.predicted_cost(BASELINE.name))
    assert free.predicted_cost(BASELINE.name) != pytest.approx(1.0)
    if in_use is not None:
        assert free.predicted_cost(in_use.name) == pytest.approx(1.0), "what the planner measured"


@pytest.mark.parametrize("objective", ["throughput", "cost"])
@pytest.mark.parametrize("compute_s", [1.0, 3.0])
async def test_prediction_is_of_computing_where_that_is_what_the_job_wants_less_of(
    objective: str, compute_s: float, virtual_clock: MockClock
) -> None:
    """The route is expected to compute for a second with the method in use, and takes as long, or three times."""
    chooser = LearnedChooser(PredictionCache(), random.Random(1), share=0)
    request = compute_request(BASELINE, FUSED, is_free=True)
    request = replace(request, context=replace(CONTEXT, objective=objective))
    predicted = []
    for _ in range(40):
        choice = await chooser.choose(request)
        [used] = choice.ballot([], equally)
        outcome = outcome_of(used, 9.0, compute_s)
        selection = chooser.served(choice, outcome)
        assert selection is not None
        predicted.append(selection.predicted_s)
    assert predicted[0] == pytest.approx(1.0)
    assert predicted[-1] == pytest.approx(compute_s)
    assert isinstance(choice, LearnedChoice)
    assert chooser.describe(choice, used).predicted_s == pytest.approx(compute_s)


@pytest.mark.parametrize(
    ("task", "found"),
    [
        ({"prompt_tokens": 30, "max_tokens": 60}, 0),
        ({"prompt_tokens": 2000, "max_tokens": 16}, 1),
        ({"prompt_tokens": 200, "max_tokens": 100, "repetitiveness": 0.8}, 2),
        ({"prompt_tokens": 400, "max_tokens": 20, "concurrency": 8, "shared_prefix_share": 0.9}, 3),
    ],
)
async def test_table_speaks_of_tasks_that_are_like_its_workload(
    task: Mapping[str, Any], found: int, nursery: trio.Nursery, virtual_clock: MockClock
) -> None:
    async def expects_a_little(context: TaskContext) -> Mapping[str, tuple[float, float]]:
        del context
        await trio.lowlevel.checkpoint()
        return {name: (-0.1 if name == TOUTED else 0.0, 0.4) for name in PORTFOLIO}

    for number, workload in enumerate(WORKLOADS):
        cells = {
            Cell("test", workload, TOUTED): AgreedCell(-1_000_000, 5, firm=True),
            Cell("test", workload, USUAL): AgreedCell(-500_000, 5, firm=True),
        }
        table = AgreedTable(model=MODEL, epoch=1, digest=Digest(bytes(32)), cells=cells)
        predictions = PredictionCache()
        predictions.set_predictor(expects_a_little, 10, {MODEL: table})
        nursery.start_soon(predictions.run)
        chooser = LearnedChooser(predictions, random.Random(1), share=0.0)
        admitted = [BASELINE, parse_method(TOUTED), parse_method(USUAL)]
        request = SelectionRequest(model=MODEL, context=replace(CONTEXT, **task), admitted=admitted)
        [used] = (await chooser.choose(request)).ballot([], equally)
        assert (used == TOUTED) == (number == found), workload


MANY_METHODS = SelectionRequest(
    model=ModelId("ab" * 32),
    context=replace(CONTEXT, transfer_s=0.4, shared_prefix_share=0.5),
    admitted=[BASELINE, FUSED, REPEATED, CACHED, NARROW, PLAIN_CACHED],
)


@pytest.mark.parametrize("liked", [REPEATED, NARROW, PLAIN_CACHED])
@pytest.mark.parametrize("vote", [-0.5, -1e9])
async def test_votes_name_one_method_that_is_tried_and_our_prediction_another(
    liked: Method, vote: float, virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.selection.chooser.MAX_LOSS", 0.5)
    chooser = LearnedChooser(PredictionCache(), random.Random(1))
    choice = await chooser.choose(MANY_METHODS)
    assert isinstance(choice, LearnedChoice)
    own = choice.log_costs
    alone = described(chooser, choice, own)
    assert alone.probes, "there is something to try"
    of_peers = {**own, liked.name: own[choice.in_use] + vote, alone.probes[0]: own[choice.in_use] + 9.0}
    found = described(chooser, choice, of_peers, of_peers)
    if liked == PLAIN_CACHED:
        assert liked.name not in found.probes, "we expect it to cost far more"
    else:
        assert found.probes[0] == liked.name
    assert alone.probes[0] in found.probes, "votes rule out nothing"
    assert found.confidence == alone.confidence


async def test_votes_that_weigh_nothing_name_nothing(virtual_clock: MockClock) -> None:
    chooser = LearnedChooser(PredictionCache(), random.Random(1))
    choice = await chooser.choose(MANY_METHODS)
    assert isinstance(choice, LearnedChoice)
    own = choice.log_costs
    alone = described(chooser, choice, own)
    of_peer = {**own, REPEATED.name: own[choice.in_use] - 5.0}
    assert described(chooser, choice, of_peer).probes != alone.probes
    choice.ballot([of_peer], lambda votes: [*(0 for _ in votes[1:]), 10])
    assert chooser.describe(choice, FUSED.name).probes == alone.probes


def described(chooser: LearnedChooser, choice: LearnedChoice, *votes: Mapping[str, float]) -> Selection:
    """Return how a choice looks once the stages have voted."""
    choice.ballot(votes, equally)
    return chooser.describe(choice, choice.in_use)


async def test_method_that_a_stage_does_not_offer_is_never_the_best_by_prediction(virtual_clock: MockClock) -> None:
    chooser = LearnedChooser(PredictionCache(), random.Random(1))
    choice = await chooser.choose(MANY_METHODS)
    assert isinstance(choice, LearnedChoice)
    best, *others = choice.log_costs
    choice.ballot([{name: choice.log_costs[name] for name in others}], equally)
    found = chooser.describe(choice, others[-1])
    assert list(found.predictions) == others
    assert found.regret_s == pytest.approx(found.predicted_s - found.predictions[others[0]].cost_s)
    assert best in described(chooser, choice, choice.log_costs).predictions


async def test_jobs_with_a_named_method_calibrate_predictions(virtual_clock: MockClock) -> None:
    chooser = LearnedChooser(PredictionCache(), random.Random(1))
    choice = await chooser.choose(compute_request(BASELINE, is_free=False))
    choice.ballot([], equally)
    assert chooser.served(choice, outcome_of(BASELINE.name, 4.0, 3.0)) is not None
    choice = await chooser.choose(compute_request(BASELINE, is_free=False))
    assert choice.predicted_cost(BASELINE.name) == pytest.approx(3.0)
    assert not chooser.decisions, "nothing was left open"


@pytest.mark.parametrize("lie_s", [1e-6, 1e9])
@pytest.mark.parametrize("honest", [1, 4, 20])
async def test_false_computing_of_a_job_does_not_decide_what_a_budget_admits(
    lie_s: float, honest: int, virtual_clock: MockClock
) -> None:
    chooser, request = LearnedChooser(PredictionCache(), random.Random(1)), compute_request(BASELINE, is_free=False)

    async def serve(compute_s: float) -> None:
        choice = await chooser.choose(request)
        choice.ballot([], equally)
        chooser.served(choice, outcome_of(BASELINE.name, 4.0, compute_s))

    for compute_s in (*[1.5] * honest, lie_s):
        await serve(compute_s)
    await chooser.choose(replace(request, budget=2.0))
    with pytest.raises(OverBudget):
        await chooser.choose(replace(request, budget=0.9))
    for compute_s in (lie_s, 1.5, 1.5):
        await serve(compute_s)
    await chooser.choose(replace(request, budget=2.0))


GUESSING = method(engine="onnxruntime", prefix_cache="on", speculation="ngram-8").name
VIEWPOINT = Viewpoint(peer="me", hardware="test", software="1", hour=100)


def history(log_ratios: Mapping[str, float], count: int) -> list[Sample]:
    """Return measurements by this node, with a noise of 5 %."""
    rng = random.Random(1)
    return [
        Sample(
            kind=ObservationKind.BENCH,
            model=MODEL,
            context=CONTEXT,
            method=name,
            log_cost=ratio,
            log_ratio=ratio + rng.gauss(0, 0.05),
            observer="me",
            route="me",
            hour=100,
            software="1",
            countersigned=True,
        )
        for _ in range(count)
        for name, ratio in log_ratios.items()
    ]


@pytest.mark.parametrize(
    ("log_ratios", "count", "probes"),
    [
        ({USUAL: -1.5, FUSED.name: -0.3, GUESSING: -0.3}, 60, ()),
        ({USUAL: -1.5, FUSED.name: -1.5, GUESSING: -0.3}, 60, (FUSED.name,)),
        ({USUAL: -1.5, FUSED.name: -1.55, GUESSING: -1.5}, 60, (FUSED.name, GUESSING)),
        ({USUAL: -1.2, FUSED.name: -0.3, GUESSING: -0.3}, 2, (GUESSING,)),
    ],
    ids=["clear", "one is close", "both are close", "hardly measured"],
)
async def test_choice_is_a_probe_of_the_predicted_best_where_the_trained_model_is_not_confident(
    log_ratios: Mapping[str, float],
    count: int,
    probes: tuple[str, ...],
    nursery: trio.Nursery,
    virtual_clock: MockClock,
) -> None:
    predictor = train(history(log_ratios, count), VIEWPOINT)
    assert predictor is not None

    async def ask(context: TaskContext) -> Mapping[str, tuple[float, float]]:
        await trio.lowlevel.checkpoint()
        return {name: (each.log_cost, each.deviation) for name, each in predictor.table(context).items()}

    predictions = PredictionCache()
    predictions.set_predictor(ask, predictor.sample_count)
    nursery.start_soon(predictions.run)
    chooser = LearnedChooser(predictions, random.Random(1))
    admitted = [BASELINE, parse_method(USUAL), FUSED, parse_method(GUESSING)]
    request = SelectionRequest(model=MODEL, context=CONTEXT, admitted=admitted)
    choice = await chooser.choose(request)
    assert list(choice.ballot([], equally)) == [USUAL]
    selection = chooser.served(choice, outcome_of(USUAL, 1.0))
    assert selection is not None
    assert selection.basis == "model"
    assert selection.probes == probes
    assert selection.confidence is not None
    assert (selection.confidence < MIN_CONFIDENCE) == bool(probes)
    runner = RecordingRunner()
    with trio.move_on_after(60):
        await chooser.trials.run(runner, lambda: False)
    assert {each.name for each in runner.methods} == ({USUAL, *probes} if probes else set())
