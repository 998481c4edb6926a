"""Which tasks are alike, and which methods do the same to a task."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selector.task import BASELINE, TaskContext, method
from selector.task_buckets import effect_of, kind_of, representative

FUSED = method(engine="fused")


@pytest.mark.parametrize(
    ("switches", "nothing_to", "something_to"),
    [
        ({"prefix_cache": "on"}, {}, {"shared_prefix_share": 0.4}),
        ({"prefill_chunk": "128"}, {"prompt_tokens": 128}, {"prompt_tokens": 300}),
        ({"activations": "int8"}, {"transfer_s": 0.4}, {"stage_count": 2, "transfer_s": 0.4}),
        ({"activations": "int8"}, {"stage_count": 3, "transfer_s": 0.05}, {"stage_count": 3, "transfer_s": 0.4}),
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


@pytest.mark.parametrize("size", ["prompt_tokens", "max_tokens"])
@pytest.mark.parametrize("usual", [8, 32, 64, 128, 512])
def test_sizes_about_a_usual_one_are_of_one_kind(size: str, usual: int) -> None:
    kinds = {kind_of(TaskContext.of({size: usual * part})) for part in (0.9, 1, 1.15)}
    assert len(kinds) == 1
    assert kind_of(TaskContext.of({size: 4 * usual})) not in kinds


def test_a_job_alone_is_of_another_kind_than_two() -> None:
    assert kind_of(TaskContext.of({"concurrency": 1})) != kind_of(TaskContext.of({"concurrency": 2}))


def test_links_of_a_machine_to_itself_are_alike_however_busy_it_is() -> None:
    kinds = {kind_of(TaskContext.of({"stage_count": 3, "link_s": link_s})) for link_s in (0.0005, 0.005, 0.0105)}
    assert len(kinds) == 1
    assert kind_of(TaskContext.of({"stage_count": 3, "link_s": 0.08})) not in kinds


@given(
    st.fixed_dictionaries(
        {
            "prompt_tokens": st.integers(1, 100_000),
            "max_tokens": st.integers(1, 100_000),
            "concurrency": st.integers(1, 100),
            "shared_prefix_share": st.floats(0, 1),
            "repetitiveness": st.floats(0, 1),
            "link_s": st.floats(0, 10),
            "transfer_s": st.floats(0, 10),
        }
    )
)
def test_what_stands_for_a_task_is_of_its_kind(values: dict[str, float]) -> None:
    context = TaskContext.of(values)
    assert representative(representative(context)) == representative(context)
    assert kind_of(representative(context)) == kind_of(context)
