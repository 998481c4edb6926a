"""Features of tasks: what machines and links measure, never their names; and a roofline that follows them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.capabilities import Capabilities, Throughput, stage_facts
from protocol.limits import MAX_NUMBER
from protocol.stage_facts import DeviceKind, StageFacts
from selector.dataset import FloatArray, Pairs, build_dataset
from selector.evaluation.measures import split
from selector.features import PHYSICS, physics
from selector.task import PORTFOLIO, TaskContext, method
from selector.task_features import FEATURES, tabulate, transfer_s
from tests.support.capabilities import EPYC, H100

MEASURED = replace(
    EPYC,
    processor=replace(
        EPYC.processor,
        throughput=Throughput(
            memory_read_bytes_per_s=32e9, fp32_flop_per_s=200e9, bf16_flop_per_s=400e9, int8_op_per_s=800e9
        ),
    ),
)
NARROW = method(engine="fused", arithmetic="int8")
WIDE = method(engine="fused")


def facts(capabilities: Capabilities, blocks: int) -> StageFacts:
    return stage_facts(capabilities, blocks, round_trip_s=0.01, link_bytes_per_s=1e8)


def slower(factor: float) -> Capabilities:
    """Return the capabilities with memory that is slower."""
    throughput = replace(MEASURED.processor.throughput, memory_read_bytes_per_s=32e9 / factor)
    return replace(MEASURED, processor=replace(MEASURED.processor, throughput=throughput))


def task(*stages: StageFacts) -> TaskContext:
    return TaskContext(
        architecture="llama",
        block_count=30,
        hidden_size=576,
        vocabulary_size=49152,
        weight_bytes=270_000_000,
        head_count=9,
        kv_head_count=3,
        head_size=64,
        block_bytes=7_000_000,
        block_parameters=3_500_000,
        active_block_parameters=3_500_000,
        kv_bytes_per_token=23_040,
        weight_type="bf16",
        prompt_tokens=64,
        max_tokens=32,
        stage_count=len(stages),
        stage_facts=stages,
    )


def estimates(context: TaskContext) -> FloatArray:
    """Return the roofline estimates of all methods, shape (methods, PHYSICS)."""
    count = len(PORTFOLIO)
    return physics(Pairs(tabulate([context]), tuple(PORTFOLIO), np.zeros(count, dtype=np.intp), np.arange(count)))


def estimate(context: TaskContext, of: str, name: str) -> float:
    return float(estimates(context)[list(PORTFOLIO).index(of), PHYSICS.index(name)])


def feature(context: TaskContext, name: str) -> float:
    return float(tabulate([context]).features[0, list(FEATURES).index(name)])


@pytest.mark.parametrize("weight_type", ["bf16", "f32", "q4_1", "unknown"])
@pytest.mark.parametrize("machines", [[MEASURED], [MEASURED, MEASURED], [EPYC], [replace(EPYC, accelerators=(H100,))]])
def test_roofline_is_finite_for_measured_machines(weight_type: str, machines: list[Capabilities]) -> None:
    context = task(*(facts(each, 30 // len(machines)) for each in machines))
    assert np.isfinite(estimates(replace(context, weight_type=weight_type))).all()


def test_roofline_is_unknown_for_a_machine_that_was_not_measured() -> None:
    unmeasured = replace(EPYC, processor=replace(EPYC.processor, throughput=Throughput()))
    assert math.isnan(estimate(task(facts(unmeasured, 30)), WIDE.name, "decode"))


def test_decode_time_follows_memory_bandwidth_and_the_bits_read() -> None:
    fast, slow = task(facts(MEASURED, 30)), task(facts(slower(4), 30))
    assert estimate(slow, WIDE.name, "decode") == pytest.approx(estimate(fast, WIDE.name, "decode") + 2)
    # Weights published in bf16 serve fp32 as they are, so that int8 halves what is read.
    assert estimate(fast, NARROW.name, "decode") == pytest.approx(estimate(fast, WIDE.name, "decode") - 1, abs=0.05)
    native = method(engine="llamacpp").name
    assert estimate(replace(fast, weight_type="q4_1"), native, "weight_bits") == pytest.approx(math.log2(5))


def test_products_are_as_fast_as_measured_for_their_numbers() -> None:
    context = task(facts(MEASURED, 30))
    prefill = {name: 2 ** estimate(context, name, "prefill") for name in PORTFOLIO}
    wide = prefill[WIDE.name]
    assert prefill[method(engine="fused", arithmetic="bf16").name] == pytest.approx(wide * 200e9 / 400e9)
    assert prefill[method(engine="fused", arithmetic="w8a8").name] == pytest.approx(wide * 200e9 / 800e9)


def test_route_is_as_fast_as_its_blocks_and_knows_its_bottleneck() -> None:
    alone, mixed = task(facts(MEASURED, 30)), task(facts(MEASURED, 10), facts(slower(4), 20))
    assert 2 ** feature(alone, "l_bw") == pytest.approx(32e9)
    assert 2 ** feature(mixed, "l_bw") == pytest.approx(30 / (10 / 32e9 + 20 / 8e9))
    assert 2 ** feature(mixed, "l_bw_least") == pytest.approx(8e9)
    assert feature(mixed, "l_transfer") > feature(alone, "l_transfer")


def test_link_that_was_not_measured_is_no_feature() -> None:
    known = facts(MEASURED, 10)
    for unknown in (replace(known, link_bytes_per_s=None), replace(known, round_trip_s=None)):
        context = task(unknown, known, known)
        names = ("l_link", "l_transfer") if unknown.link_bytes_per_s is None else ("l_round_trip", "l_round_trip_most")
        missing = {name for name in FEATURES if math.isnan(feature(context, name))}
        assert missing - {name for name in FEATURES if math.isnan(feature(task(known, known, known), name))} == {*names}
        assert transfer_s(context) > 0, "for what has to be decided it is taken for a usual link"


def test_names_are_no_features() -> None:
    context = task(facts(MEASURED, 30))
    renamed = replace(context, architecture="other", hardware="elsewhere")
    assert np.array_equal(tabulate([context]).features, tabulate([renamed]).features, equal_nan=True)


def test_latency_and_throughput_of_one_run_are_left_out_together() -> None:
    contexts = [
        replace(task(facts(MEASURED, 30)), prompt_tokens=16 << i, objective=objective)
        for i in range(10)
        for objective in ("latency", "throughput")
    ]
    table = tabulate(contexts)
    assert len(set(table.siblings().tolist())) == 10
    tasks = table.names["task"]
    assert (tasks[::2] == tasks[1::2]).all(), "errors are estimated with whole tasks left out"
    assert len(set(tasks.tolist())) > 2
    dataset = build_dataset(table, [(i, name, 0.0) for i in range(20) for name in (WIDE.name, NARROW.name)])
    for fold in split(dataset, "random"):
        train, test = (set((dataset.pairs.context[rows] // 2).tolist()) for rows in (fold.train, fold.test))
        assert not train & test


def test_facts_of_a_machine_with_a_gpu_are_the_gpus() -> None:
    found = facts(replace(EPYC, accelerators=(H100,)), 30)
    assert (found.device, found.memory_bytes) == (DeviceKind.CUDA, H100.memory_bytes)
    assert found.memory_read_bytes_per_s == 3e12
    limited = replace(EPYC, processor=replace(EPYC.processor, threads=1))
    assert (facts(limited, 30).threads, facts(EPYC, 30).threads) == (1, 2)
    assert (found.vector_bits, found.bf16, found.int8, found.matrix_unit) == (512, True, False, False)


@given(
    st.dictionaries(
        st.sampled_from(sorted(TaskContext().values())), st.floats(0, MAX_NUMBER) | st.sampled_from([0.0, MAX_NUMBER])
    )
)
def test_whatever_a_peer_says_has_features_that_are_finite_or_unknown(values: dict[str, float]) -> None:
    table = tabulate([TaskContext.of(values)])
    estimates = physics(Pairs(table, (WIDE.name,), np.array([0]), np.array([0])))
    assert not np.isinf(table.features).any()
    assert not np.isinf(estimates).any()
