"""Task buckets, and the effective switches of methods."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selector.task import BASELINE, TaskContext, method
from selector.task_buckets import canonicalise, effective_switches, task_bucket

FUSED = method(engine="fused")


@pytest.mark.parametrize(
    ("switches", "without_effect", "with_effect"),
    [
        ({"prefix_cache": "on"}, {}, {"shared_prefix_share": 0.4}),
        ({"prefill_chunk": "128"}, {"prompt_tokens": 128}, {"prompt_tokens": 300}),
        ({"activations": "int8"}, {"transfer_s": 0.4}, {"stage_count": 2, "transfer_s": 0.4}),
        ({"activations": "int8"}, {"stage_count": 3, "transfer_s": 0.05}, {"stage_count": 3, "transfer_s": 0.4}),
        ({"speculation": "ngram-8"}, {}, {"max_tokens": 2}),
    ],
)
def test_switch_without_effect_on_a_task_is_ignored(
    switches: dict[str, str], without_effect: dict[str, float], with_effect: dict[str, float]
) -> None:
    switched = method(engine="fused", **switches)

    def differs(values: dict[str, float]) -> bool:
        context = TaskContext.of(values)
        return effective_switches(switched, context) != effective_switches(FUSED, context)

    assert not differs(without_effect)
    assert differs(with_effect)


def test_engine_affects_every_task_and_the_baseline_none() -> None:
    assert effective_switches(BASELINE, TaskContext()) == frozenset()
    assert effective_switches(FUSED, TaskContext()) == {("engine", "fused")}


@pytest.mark.parametrize("size", ["prompt_tokens", "max_tokens"])
@pytest.mark.parametrize("usual", [8, 32, 64, 128, 512])
def test_sizes_around_a_common_one_share_a_bucket(size: str, usual: int) -> None:
    buckets = {task_bucket(TaskContext.of({size: usual * part})) for part in (0.9, 1, 1.15)}
    assert len(buckets) == 1
    assert task_bucket(TaskContext.of({size: 4 * usual})) not in buckets


def test_concurrent_jobs_have_another_bucket() -> None:
    assert task_bucket(TaskContext.of({"concurrency": 1})) != task_bucket(TaskContext.of({"concurrency": 2}))


def test_local_links_share_a_bucket() -> None:
    buckets = {task_bucket(TaskContext.of({"stage_count": 3, "link_s": link_s})) for link_s in (0.0005, 0.005, 0.0105)}
    assert len(buckets) == 1
    assert task_bucket(TaskContext.of({"stage_count": 3, "link_s": 0.08})) not in buckets


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
def test_canonical_context_shares_the_bucket(values: dict[str, float]) -> None:
    context = TaskContext.of(values)
    assert canonicalise(canonicalise(context)) == canonicalise(context)
    assert task_bucket(canonicalise(context)) == task_bucket(context)
