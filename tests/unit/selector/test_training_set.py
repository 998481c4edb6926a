"""What a history teaches: whose measurements count how much, and what no liar can make of them."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from selector.expectation import MIN_EXPERIENCES, rule_table
from selector.heuristic import predicted_cost
from selector.prediction import train
from selector.task import BASELINE, PORTFOLIO, TaskContext, method
from selector.task_buckets import Viewpoint, kind_of, representative
from selector.training_set import ContextColumns, Experience, lesson_of

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


def experience(
    name: str, log_ratio: float | None, level: float = 0.0, cost: float | None = None, **changes: Any
) -> Experience:
    """Return a measurement; `level`: how much slower everything was at the time."""
    at: dict[str, Any] = {
        "context": CONTEXT,
        "observer": "me",
        "route": "a/b/c",
        "hour": 100,
        "software": "1",
        "vouched": True,
        **changes,
    }
    log_cost = cost if cost is not None else (log_ratio or 0.0)
    return Experience(method=name, log_cost=log_cost + level, log_ratio=log_ratio, **at)


def measured(truth: dict[str, float], count: int, **changes: Any) -> list[Experience]:
    """Return measurements against the baseline. `truth`: logarithms of the ratio."""
    rng = random.Random(1)
    return [
        experience(name, ratio + rng.gauss(0, 0.02), level=rng.gauss(0, 0.5), **changes)
        for _ in range(count)
        for name, ratio in truth.items()
    ]


def expected_ratio(experiences: list[Experience], name: str, context: TaskContext = CONTEXT) -> float:
    predictor = train(experiences, VIEWPOINT)
    assert predictor is not None
    table = predictor.table(context)
    return table[name].log_cost - table[BASELINE.name].log_cost


def test_with_too_little_there_is_no_model() -> None:
    assert train([], VIEWPOINT) is None
    assert train(measured({FUSED.name: -1.0}, MIN_EXPERIENCES - 1), VIEWPOINT) is None
    assert train([experience(FUSED.name, None)] * 50, VIEWPOINT) is None  # one method alone compares with nothing


def test_what_was_measured_is_believed_the_more_the_more_was_measured() -> None:
    rule = predicted_cost(CONTEXT, FUSED) - predicted_cost(CONTEXT, BASELINE)
    truth = rule + 1.0
    few = expected_ratio(measured({FUSED.name: truth, CHUNKED.name: truth + 0.3}, 3), FUSED.name)
    many = expected_ratio(measured({FUSED.name: truth, CHUNKED.name: truth + 0.3}, 100), FUSED.name)
    assert rule < few < many
    assert many == pytest.approx(truth, abs=0.25)


def test_a_busy_evening_is_nobodys_fault() -> None:
    """Served jobs on one route and hour have a level in common, which is not the method's."""
    rule = {each.name: predicted_cost(CONTEXT, each) for each in (BASELINE, FUSED)}
    busy = [experience(FUSED.name, None, cost=rule[FUSED.name], level=2.0, hour=99) for _ in range(40)]
    busy += [experience(BASELINE.name, None, cost=rule[BASELINE.name], level=2.0, hour=99) for _ in range(10)]
    calm = [experience(BASELINE.name, None, cost=rule[BASELINE.name], hour=100) for _ in range(40)]
    calm += [experience(FUSED.name, None, cost=rule[FUSED.name], hour=100) for _ in range(10)]
    assert expected_ratio(busy + calm, FUSED.name) == pytest.approx(rule[FUSED.name] - rule[BASELINE.name], abs=0.1)


def test_ones_own_measurements_outweigh_what_one_other_says_however_often() -> None:
    own = measured({FUSED.name: -1.0}, 30)
    lies = measured({FUSED.name: 2.0}, 3000, observer="liar", vouched=False)
    alone, flooded = expected_ratio(own, FUSED.name), expected_ratio(own + lies, FUSED.name)
    assert abs(flooded - alone) < 0.75
    assert flooded < 0


def test_whom_the_swarm_found_lying_teaches_nothing() -> None:
    own = measured({FUSED.name: -1.0}, 30)
    lies = [each for i in range(20) for each in measured({FUSED.name: 2.0}, 30, observer=f"liar {i}")]
    warned = replace(VIEWPOINT, trust={f"liar {i}": 0.0 for i in range(20)}, trust_in_strangers=0.2)
    alone, told, untold = (
        lesson_of(each, at) for each, at in ((own, warned), (own + lies, warned), (own + lies, VIEWPOINT))
    )
    assert alone is not None
    assert told is not None
    assert untold is not None
    assert told.support == alone.support
    assert untold.support[FUSED.name] > 2 * alone.support[FUSED.name]


def test_figures_that_cannot_be_are_cut() -> None:
    own = measured({FUSED.name: -1.0}, 30)
    wild = [experience(FUSED.name, 60.0, observer=f"liar {i}", vouched=False) for i in range(10)]
    assert math.isfinite(expected_ratio(own + wild, FUSED.name))
    assert expected_ratio(own + wild, FUSED.name) < 0.5


def test_one_route_of_many_stages_does_not_make_the_whole_history_big() -> None:
    long = "+".join(f"{i:064}" for i in range(64))
    others = [f"{long}{i}" for i in range(2)]
    contexts = [CONTEXT] * 100 + [replace(CONTEXT, hardware=name, architecture=name) for name in others]
    table = ContextColumns.of(contexts).table(contexts)
    assert sum(names.nbytes for names in table.names.values()) < 300_000
    for names in table.names.values():
        assert names[0] == names[1]
    for key in ("model", "hardware", "task"):
        assert len(set(table.names[key].tolist())) == 3


def test_old_measurements_other_hardware_and_other_software_count_less() -> None:
    new = measured({FUSED.name: -1.0}, 20)
    for other in (
        {"hour": 100 - 24 * 60},
        {"software": "0"},
        {"context": replace(CONTEXT, hardware="gpu")},
    ):
        lesson = lesson_of([*new, *measured({FUSED.name: 1.0}, 20, **other)], VIEWPOINT)
        alone = lesson_of(new, VIEWPOINT)
        assert lesson is not None
        assert alone is not None
        assert lesson.support[FUSED.name] < 1.5 * alone.support[FUSED.name]


def test_a_method_of_another_version_is_left_out() -> None:
    unknown = [experience("engine=warp|speed=9", -5.0) for _ in range(50)]
    lesson = lesson_of([*measured({FUSED.name: -1.0}, 10), *unknown], VIEWPOINT)
    assert lesson is not None
    assert set(lesson.support) == {BASELINE.name, FUSED.name}


def test_prompts_of_nearly_the_same_length_share_a_table_and_others_do_not() -> None:
    assert representative(CONTEXT) == representative(replace(CONTEXT, prompt_tokens=66))
    assert representative(CONTEXT) != representative(replace(CONTEXT, prompt_tokens=128))
    assert kind_of(CONTEXT) != kind_of(replace(CONTEXT, prompt_tokens=640))
    assert kind_of(CONTEXT) == kind_of(representative(CONTEXT))


def test_the_rule_has_an_opinion_on_every_method() -> None:
    assert set(rule_table(CONTEXT, PORTFOLIO.values())) == set(PORTFOLIO)
