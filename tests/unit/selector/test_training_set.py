"""Weights of samples in the training set, and their robustness against liars."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from protocol.measurements import ObservationKind
from selector.heuristic import MIN_SAMPLES, heuristic_table, predicted_cost
from selector.prediction import train
from selector.sample import Sample
from selector.task import BASELINE, PORTFOLIO, TaskContext, baseline_of, method
from selector.task_buckets import Viewpoint, canonicalise, task_bucket
from selector.task_features import tabulate
from selector.training_set import build_training_set

FUSED = method(engine="fused")
CHUNKED = method(engine="fused", prefill_chunk="64")
CONTEXT = TaskContext(
    architecture="llama",
    block_count=30,
    hidden_size=576,
    vocabulary_size=49152,
    weight_bytes=500_000_000,
    prompt_tokens=64,
    max_tokens=32,
    hardware="cpu",
    stage_count=3,
)
VIEWPOINT = Viewpoint(peer="me", hardware="cpu", software="1", hour=100)


def sample(name: str, log_ratio: float | None, level: float = 0.0, cost: float | None = None, **changes: Any) -> Sample:
    """Return a sample; `level`: common slowdown at the time."""
    at: dict[str, Any] = {
        "kind": ObservationKind.SERVED if log_ratio is None else ObservationKind.BENCH,
        "model": "m",
        "context": CONTEXT,
        "observer": "me",
        "route": "a/b/c",
        "hour": 100,
        "software": "1",
        "countersigned": True,
        **changes,
    }
    log_cost = cost if cost is not None else (log_ratio or 0.0)
    return Sample(method=name, log_cost=log_cost + level, log_ratio=log_ratio, **at)


def measured(truth: dict[str, float], count: int, **changes: Any) -> list[Sample]:
    """Return samples with a ratio to the baseline. `truth`: its logarithms."""
    rng = random.Random(1)
    return [
        sample(name, ratio + rng.gauss(0, 0.02), level=rng.gauss(0, 0.5), **changes)
        for _ in range(count)
        for name, ratio in truth.items()
    ]


def expected_ratio(samples: list[Sample], name: str, context: TaskContext = CONTEXT) -> float:
    predictor = train(samples, VIEWPOINT)
    assert predictor is not None
    table = predictor.table(context)
    return table[name].log_cost - table[baseline_of(name).name].log_cost


def test_small_history_trains_no_model() -> None:
    assert train([], VIEWPOINT) is None
    assert train(measured({FUSED.name: -1.0}, MIN_SAMPLES - 1), VIEWPOINT) is None
    assert train([sample(FUSED.name, None)] * 50, VIEWPOINT) is None  # one method alone compares with nothing


def test_jobs_that_compare_nothing_are_not_counted() -> None:
    served = [sample(FUSED.name, None)] * 500
    assert train([*served, *measured({FUSED.name: -1.0}, MIN_SAMPLES - 1)], VIEWPOINT) is None
    predictor = train([*served, *measured({FUSED.name: -1.0}, MIN_SAMPLES)], VIEWPOINT)
    assert predictor is not None
    assert predictor.sample_count == MIN_SAMPLES


def test_trust_in_the_model_grows_with_the_samples() -> None:
    rule = predicted_cost(CONTEXT, FUSED) - predicted_cost(CONTEXT, BASELINE)
    truth = rule + 1.0
    few = expected_ratio(measured({FUSED.name: truth, CHUNKED.name: truth + 0.3}, 3), FUSED.name)
    many = expected_ratio(measured({FUSED.name: truth, CHUNKED.name: truth + 0.3}, 100), FUSED.name)
    assert rule < few < many
    assert many == pytest.approx(truth, abs=0.25)


def test_common_level_of_route_and_hour_is_removed() -> None:
    rule = {each.name: predicted_cost(CONTEXT, each) for each in (BASELINE, FUSED)}
    busy = [sample(FUSED.name, None, cost=rule[FUSED.name], level=2.0, hour=99) for _ in range(40)]
    busy += [sample(BASELINE.name, None, cost=rule[BASELINE.name], level=2.0, hour=99) for _ in range(10)]
    calm = [sample(BASELINE.name, None, cost=rule[BASELINE.name], hour=100) for _ in range(40)]
    calm += [sample(FUSED.name, None, cost=rule[FUSED.name], hour=100) for _ in range(10)]
    assert expected_ratio(busy + calm, FUSED.name) == pytest.approx(rule[FUSED.name] - rule[BASELINE.name], abs=0.1)


def test_waiting_of_latency_jobs_is_not_credited_to_the_methods_of_throughput_jobs() -> None:
    """The cost of a job for latency is its time, for other objectives computing alone."""

    def served(objective: str, name: str, count: int) -> list[Sample]:
        context, waiting = replace(CONTEXT, objective=objective), math.log(2) if objective == "latency" else 0.0
        cost = predicted_cost(canonicalise(context), {FUSED.name: FUSED, BASELINE.name: BASELINE}[name])
        return [sample(name, None, cost=cost, level=waiting, context=context)] * count

    assert build_training_set(
        [*served("latency", FUSED.name, 9), *served("throughput", BASELINE.name, 9)], VIEWPOINT
    ) is (None), "nothing of these can be compared"
    mixed = [
        served(objective, name, 40 if (objective == "latency") == (name == FUSED.name) else 10)
        for objective in ("latency", "throughput", "cost")
        for name in (FUSED.name, BASELINE.name)
    ]
    training = build_training_set([each for some in mixed for each in some], VIEWPOINT)
    assert training is not None
    assert training.dataset.cost == pytest.approx(0.0, abs=1e-6)


def test_own_samples_outweigh_a_flood_from_another_peer() -> None:
    own = measured({FUSED.name: -1.0}, 30)
    lies = measured({FUSED.name: 2.0}, 3000, observer="liar", countersigned=False)
    alone, flooded = expected_ratio(own, FUSED.name), expected_ratio(own + lies, FUSED.name)
    assert abs(flooded - alone) < 0.75
    assert flooded < 0


def test_peers_without_trust_have_no_weight() -> None:
    own = measured({FUSED.name: -1.0}, 30)
    lies = [each for i in range(20) for each in measured({FUSED.name: 2.0}, 30, observer=f"liar {i}")]
    warned = replace(VIEWPOINT, trust={"m": {f"liar {i}": 0.0 for i in range(20)}}, default_trust={"m": 0.2})
    alone, told, untold = (
        build_training_set(each, at) for each, at in ((own, warned), (own + lies, warned), (own + lies, VIEWPOINT))
    )
    assert alone is not None
    assert told is not None
    assert untold is not None
    assert told.support == alone.support
    assert untold.support[FUSED.name] > 2 * alone.support[FUSED.name]


def test_outliers_are_clipped() -> None:
    own = measured({FUSED.name: -1.0}, 30)
    wild = [sample(FUSED.name, 60.0, observer=f"liar {i}", countersigned=False) for i in range(10)]
    assert math.isfinite(expected_ratio(own + wild, FUSED.name))
    assert expected_ratio(own + wild, FUSED.name) < 0.5


@pytest.mark.parametrize("countersigned", [True, False])
@pytest.mark.parametrize("cost", [math.log(1e9), math.log(1e-6)])
def test_absurd_jobs_of_another_peer_on_our_route_leave_ours_as_they_were(cost: float, countersigned: bool) -> None:
    ours = [
        sample(name, None, cost=predicted_cost(CONTEXT, of) + slower)
        for name, of, slower in ((FUSED.name, FUSED, 0.0), (CHUNKED.name, CHUNKED, 0.8))
        for _ in range(50)
    ]
    lies = [sample(BASELINE.name, None, cost=cost, observer="liar", countersigned=countersigned) for _ in range(250)]
    training = build_training_set([*ours, *lies], VIEWPOINT)
    assert training is not None
    found = training.dataset.cost[:100]
    assert found[50:].mean() - found[:50].mean() == pytest.approx(0.8, abs=0.01)


def test_absurd_ratio_leaves_the_own_measurements_of_other_methods_as_they_were() -> None:
    rule = {each.name: predicted_cost(CONTEXT, each) - predicted_cost(CONTEXT, BASELINE) for each in (FUSED, CHUNKED)}
    own = measured(rule, 20)
    served = [sample(FUSED.name, None, cost=0.0, hour=100 - i % 24) for i in range(400)]
    lies = [sample(FUSED.name, 20.0, observer=f"liar {i % 3}") for i in range(900)]
    training = build_training_set([*own, *served, *lies], VIEWPOINT)
    assert training is not None
    assert training.dataset.cost[: 2 * len(own)] == pytest.approx(0, abs=0.15), (
        "what is said of one method moves no other"
    )
    assert training.support[FUSED.name] < 20 + 3 * 21, "jobs served with one method compare nothing"


def test_served_jobs_of_others_count_only_if_every_stage_signed() -> None:
    served = [sample(name, None, observer="other") for name in (FUSED.name, BASELINE.name) for _ in range(20)]
    unsigned = [replace(each, countersigned=False) for each in served]
    assert build_training_set(unsigned, VIEWPOINT) is None
    assert build_training_set(served, VIEWPOINT) is not None


def test_long_route_names_are_hashed() -> None:
    long = "+".join(f"{i:064}" for i in range(64))
    others = [f"{long}{i}" for i in range(2)]
    contexts = [CONTEXT] * 100 + [replace(CONTEXT, hardware=name, architecture=name) for name in others]
    table = tabulate(contexts)
    assert sum(names.nbytes for names in table.names.values()) < 300_000
    for names in table.names.values():
        assert names[0] == names[1]
    for key in ("model", "hardware", "task"):
        assert len(set(table.names[key].tolist())) == 3


def test_old_or_foreign_samples_weigh_less() -> None:
    new = measured({FUSED.name: -1.0}, 20)
    for other in ({"hour": 100 - 24 * 60}, {"software": "0"}, {"context": replace(CONTEXT, hardware="gpu")}):
        training = build_training_set([*new, *measured({FUSED.name: 1.0}, 20, **other)], VIEWPOINT)
        alone = build_training_set(new, VIEWPOINT)
        assert training is not None
        assert alone is not None
        assert training.support[FUSED.name] < 1.5 * alone.support[FUSED.name]


def test_unknown_methods_are_left_out() -> None:
    unknown = [sample("engine=warp|speed=9", -5.0) for _ in range(50)]
    training = build_training_set([*measured({FUSED.name: -1.0}, 10), *unknown], VIEWPOINT)
    assert training is not None
    assert set(training.support) == {BASELINE.name, FUSED.name}


def test_methods_of_gguf_packages_are_compared_with_their_own_baseline() -> None:
    cached = method(engine="llamacpp", prefix_cache="on")
    gguf = replace(CONTEXT, weight_bytes=98_000_000, weight_type="q4_1")
    samples = [*measured({FUSED.name: -1.0}, 40), *measured({cached.name: -0.7}, 40, context=gguf)]
    training = build_training_set(samples, VIEWPOINT)
    assert training is not None
    assert set(training.support) == {BASELINE.name, FUSED.name, cached.baseline.name, cached.name}
    assert expected_ratio(samples, cached.name, gguf) == pytest.approx(-0.7, abs=0.25)
    assert expected_ratio(samples, FUSED.name) == pytest.approx(-1.0, abs=0.25)


def test_contexts_of_a_history_without_weight_types_are_still_learned_from() -> None:
    contexts = [CONTEXT, replace(CONTEXT, weight_type="q4_k"), replace(CONTEXT, weight_type="bf16")]
    table = tabulate(contexts)
    bits = table.features[:, table.columns.index("l_weight_bits")]
    assert math.isnan(bits[0])
    assert bits[1:].tolist() == [math.log2(4.5), 4.0]
    old = measured({FUSED.name: -1.0}, 40)
    assert expected_ratio(old, FUSED.name, contexts[2]) == pytest.approx(-1.0, abs=0.3)


def test_similar_prompt_lengths_share_a_canonical_context() -> None:
    assert canonicalise(CONTEXT) == canonicalise(replace(CONTEXT, prompt_tokens=66))
    assert canonicalise(CONTEXT) != canonicalise(replace(CONTEXT, prompt_tokens=128))
    assert task_bucket(CONTEXT) != task_bucket(replace(CONTEXT, prompt_tokens=640))
    assert task_bucket(CONTEXT) == task_bucket(canonicalise(CONTEXT))


def test_heuristic_covers_the_portfolio() -> None:
    assert set(heuristic_table(CONTEXT, PORTFOLIO.values())) == set(PORTFOLIO)
