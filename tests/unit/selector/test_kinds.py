"""Which methods do the same to a task."""

import pytest

from selector.kinds import effect_of
from selector.task import BASELINE, TaskContext, method

FUSED = method(engine="fused")


@pytest.mark.parametrize(
    ("switches", "nothing_to", "something_to"),
    [
        ({"prefix_cache": "on"}, {}, {"shared_prefix_share": 0.4}),
        ({"prefill_chunk": "128"}, {"prompt_tokens": 128}, {"prompt_tokens": 300}),
        ({"activations": "int8"}, {}, {"stage_count": 2}),
        ({"speculation": "ngram-8"}, {}, {"max_tokens": 2}),
    ],
)
def test_a_switch_that_can_do_nothing_to_a_task_makes_no_other_method(
    switches: dict[str, str], nothing_to: dict[str, float], something_to: dict[str, float]
) -> None:
    with_it = method(engine="fused", **switches)
    assert effect_of(with_it, TaskContext.of(nothing_to)) == effect_of(FUSED, TaskContext.of(nothing_to))
    assert effect_of(with_it, TaskContext.of(something_to)) != effect_of(FUSED, TaskContext.of(something_to))


def test_the_baseline_does_nothing_to_any_task_and_an_engine_does_to_all() -> None:
    assert effect_of(BASELINE, TaskContext()) == frozenset()
    assert effect_of(FUSED, TaskContext()) == {("engine", "fused")}
