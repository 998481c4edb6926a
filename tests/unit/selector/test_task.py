"""The portfolio, method names, the heuristic and the tally."""

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.identity import ModelId
from protocol.limits import MAX_NUMBER
from protocol.measurements import ModelFacts, Objective, QualityBound, TaskKind, Workload
from selector.consensus.reputation import NEWCOMER_WEIGHT
from selector.heuristic import predicted_cost, preference
from selector.quality import MeasuredQuality, admits
from selector.task import (
    BASELINE,
    PORTFOLIO,
    SWITCHES,
    MethodError,
    TaskContext,
    baseline_of,
    method,
    parse_method,
    portfolio,
)
from selector.task_buckets import canonicalise
from selector.task_features import tabulate
from selector.voting import scores, tally, weights_of


def test_portfolio_names_parse_back() -> None:
    assert 20 <= len(portfolio("safetensors")) <= 40
    known = [portfolio(each, kind=kind) for each in ("safetensors", "gguf") for kind in TaskKind]
    assert set(PORTFOLIO) == {each.name for methods in known for each in methods}
    for name, each in PORTFOLIO.items():
        assert parse_method(name) == each
        assert parse_method("|".join(reversed(name.split("|")))).name == name
    assert parse_method("baseline").name == BASELINE.name
    assert parse_method("engine=fused").name == method(engine="fused").name


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("fastest", "invalid method"),
        ("engine=fused|engine=eager", "twice"),
        ("colour=red", "unknown switch 'colour'"),
        ("engine=warp", "expected one of eager, fused, onnxruntime"),
        ("batching=static", "policy of a stage"),
        ("engine=eager|arithmetic=int8", "engine=eager supports arithmetic fp32"),
        ("", "invalid method"),
    ],
)
def test_invalid_method_is_a_one_line_error(text: str, complaint: str) -> None:
    with pytest.raises(MethodError, match=complaint) as caught:
        parse_method(text)
    assert "\n" not in str(caught.value)


def test_portfolio_of_gguf_packages_crosses_llamacpp_with_every_independent_switch() -> None:
    everything = portfolio("gguf")
    assert {(each.engine, each.arithmetic) for each in everything} == {
        ("llamacpp", "native"),
        ("onnxruntime", "native"),
    }
    assert not any(each.exact for each in everything if each.engine == "onnxruntime"), "it is judged by its figures"
    assert not {"llamacpp", "native"} & {value for each in portfolio("safetensors") for value in each.switches.values()}
    offered = [each for each in everything if each.engine == "llamacpp"]
    for switch in ("activations", "prefill_chunk", "prefix_cache", "speculation"):
        assert len({each.switches[switch] for each in offered}) > 1, switch
    assert offered[0] == offered[0].baseline == method(engine="llamacpp")
    assert {each.activations for each in offered if each.exact} == {"fp32"}, "narrow wires are judged by their figures"
    assert len({each.exact for each in offered}) == 2


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("baseline", "engine=llamacpp|arithmetic=native"),
        ("prefix_cache=on", "engine=llamacpp|arithmetic=native|prefix_cache=on"),
        ("engine=llamacpp|activations=int8", "engine=llamacpp|arithmetic=native|activations=int8"),
        ("arithmetic=native", "engine=llamacpp|arithmetic=native"),
        ("engine=onnxruntime", "engine=onnxruntime|arithmetic=native"),
    ],
)
def test_text_means_a_method_of_the_package_format(text: str, name: str) -> None:
    assert parse_method(text, "gguf") == parse_method(name)


@pytest.mark.parametrize(
    ("package_format", "text", "complaint"),
    [
        (
            "gguf",
            "engine=fused",
            "engine=fused cannot serve .* gguf package: use engine=llamacpp.*, engine=onnxruntime|arithmetic=native$",
        ),
        ("gguf", "engine=onnxruntime|arithmetic=int4", "arithmetic=int4 cannot serve .* gguf package"),
        ("gguf", "arithmetic=int8", "arithmetic=int8 cannot serve .* gguf package"),
        ("gguf", "engine=llamacpp|arithmetic=fp32", "arithmetic=fp32 cannot serve"),
        ("gguf", "engine=warp", "invalid engine 'warp'"),
        ("safetensors", "engine=llamacpp", "safetensors package: use engine=eager.*engine=fused.*engine=onnxruntime"),
        ("safetensors", "engine=llamacpp|arithmetic=native", "engine=llamacpp cannot serve"),
        ("safetensors", "engine=fused|arithmetic=native", "arithmetic=native cannot serve"),
        ("safetensors", "arithmetic=int8", "engine=eager supports arithmetic fp32, not int8"),
    ],
)
def test_method_of_another_package_format_is_a_one_line_error(package_format: str, text: str, complaint: str) -> None:
    with pytest.raises(MethodError, match=complaint) as caught:
        parse_method(text, package_format)
    assert "\n" not in str(caught.value)


def test_baseline_is_that_of_the_package_format() -> None:
    for package_format in ("safetensors", "gguf"):
        baseline = parse_method("baseline", package_format)
        assert {baseline_of(each.name).name for each in portfolio(package_format)} == {baseline.name}
        assert {each.baseline.name for each in portfolio(package_format)} == {baseline.name}
    assert baseline_of("engine=warp|arithmetic=fp64") == baseline_of("a method of another program") == BASELINE


def test_portfolio_of_half_precision_weights_holds_them_in_two_bytes() -> None:
    for weight_type in ("bf16", "f16"):
        kept = portfolio("safetensors", weight_type)
        left_out = [each for each in portfolio("safetensors") if each not in kept]
        assert {each.kv_key for each in left_out} == {"onnxruntime/fp32/fp32", "onnxruntime/fp32/int8"}
    assert portfolio("safetensors", "f32") == portfolio("safetensors")


def test_method_properties() -> None:
    plain = method(engine="fused", speculation="ngram-8", prefill_chunk="64", prefix_cache="on")
    assert (plain.drafter, plain.draft_tokens, plain.prefill_chunk, plain.prefix_cache) == ("ngram", 8, 64, True)
    assert plain.exact
    assert not method(engine="fused", arithmetic="int8").exact
    assert not method(activations="bf16").exact
    assert (BASELINE.drafter, BASELINE.draft_tokens, BASELINE.prefill_chunk) == ("off", 0, None)
    assert BASELINE.kv_key == "eager/fp32/fp32"
    assert all(value == SWITCHES[switch].baseline for switch, value in BASELINE.switches.items())


def test_quality_bound_applies_to_lossy_methods() -> None:
    lossy = method(engine="fused", arithmetic="int8")
    good, fair, bad = MeasuredQuality(0.001, 0.004), MeasuredQuality(0.032, 0.05), MeasuredQuality(0.6, 0.4)
    admitted = {bound: [admits(bound, lossy, quality) for quality in (None, good, fair, bad)] for bound in QualityBound}
    assert admitted == {
        QualityBound.EXACT: [False, False, False, False],
        QualityBound.NEAR: [False, True, False, False],
        QualityBound.ANY: [False, True, True, False],
    }
    assert all(admits(bound, BASELINE, None) for bound in QualityBound)


CONTEXT = TaskContext(
    architecture="llama", block_count=30, weight_bytes=538_000_000, kv_head_count=3, prompt_tokens=400, max_tokens=32
)


def test_context_round_trips_through_plain_values() -> None:
    values = CONTEXT.values()
    assert "expert_count" not in values
    assert all(isinstance(value, str | float) for value in values.values())
    assert TaskContext.of(values) == CONTEXT
    # From a later version, or from a liar.
    odd: dict[str, str | float] = {**values, "more": 1.0, "prompt_tokens": "many", "link_s": -1.0}
    assert TaskContext.of(odd).prompt_tokens == TaskContext().prompt_tokens
    assert TaskContext.of(odd).link_s == 0


@pytest.mark.parametrize("name", [name for name, value in TaskContext().values().items() if isinstance(value, float)])
@pytest.mark.parametrize("number", [0.0, 0.4, 1.0, MAX_NUMBER])
def test_no_number_of_a_peer_breaks_a_prediction(name: str, number: float) -> None:
    context = TaskContext.of({**CONTEXT.values(), "objective": "latency", name: number})
    for each in (context, canonicalise(context)):
        assert all(math.isfinite(predicted_cost(each, candidate)) for candidate in PORTFOLIO.values())
        tabulate([each])


def test_heuristic_follows_the_workload() -> None:
    exact = [each for each in portfolio("safetensors") if each.exact]

    def best(**facts: float) -> dict[str, str]:
        return dict(preference(TaskContext.of({**CONTEXT.values(), **facts}), exact)[0].switches)

    assert best()["engine"] != "eager"
    assert best(shared_prefix_share=0.9)["prefix_cache"] == "on"
    assert best(repetitiveness=0.9, max_tokens=200.0)["speculation"].startswith("ngram")
    assert best(stage_count=3.0, prompt_tokens=1024.0, max_tokens=1.0)["prefill_chunk"] != "none"
    assert predicted_cost(CONTEXT, BASELINE) > predicted_cost(CONTEXT, method(engine="fused"))


def test_heuristic_follows_the_workload_of_gguf_packages() -> None:
    exact = [each for each in portfolio("gguf") if each.exact]

    def best(**facts: float) -> dict[str, str]:
        return dict(preference(TaskContext.of({**CONTEXT.values(), **facts}), exact)[0].switches)

    assert best()["engine"] == "llamacpp"
    assert best(shared_prefix_share=0.9)["prefix_cache"] == "on"
    assert best(repetitiveness=0.9, max_tokens=200.0)["speculation"].startswith("ngram")
    assert best(stage_count=3.0, prompt_tokens=1024.0, max_tokens=1.0)["prefill_chunk"] != "none"


def test_heuristic_prefers_exact_keys_and_values() -> None:
    plain, narrow = (
        method(engine="llamacpp", prefix_cache="on"),
        method(engine="llamacpp", kv="q8_0", prefix_cache="on"),
    )
    assert preference(CONTEXT, [narrow, plain])[0] == plain


def test_heuristic_narrows_the_wire_on_long_links_only() -> None:
    plain, narrow = method(engine="fused"), method(engine="fused", activations="int8")
    near = replace(CONTEXT, stage_count=3, link_s=0.0005)
    assert preference(near, [plain, narrow])[0] == plain
    assert preference(replace(near, link_s=0.06), [plain, narrow])[0] == narrow
    guessing = method(engine="fused", speculation="draft-8")
    assert predicted_cost(replace(near, max_tokens=1), guessing) == predicted_cost(replace(near, max_tokens=1), plain)


# The tally


def test_lowest_score_wins_and_order_breaks_ties() -> None:
    assert tally(["a", "b"], [[1.0, 0.5]]) == "b"
    assert tally(["a", "b"], [[0.0, 0.0], [0.0, 0.0]]) == "a"
    assert tally(["b", "a"], [[0.0, 0.0], [0.0, 0.0]]) == "b"


def test_only_methods_offered_by_every_stage_can_win() -> None:
    assert tally(["a", "b"], [[5.0, 0.0], [5.0, None]]) == "a"
    assert tally(["a"], [[None]]) is None
    with pytest.raises(ValueError, match="each method"):
        tally(["a", "b"], [[1.0]])


def test_one_liar_of_four_does_not_decide() -> None:
    honest = [[0.0, 1.0]] * 3
    assert tally(["a", "b"], [*honest, [1e9, -1e9]]) == "a"


def test_votes_count_by_weight() -> None:
    two = [[0.0, 1.0], [2.0, 0.0]]  # b is better on the whole
    assert tally(["a", "b"], two) == "b"
    assert tally(["a", "b"], two, [3, 1]) == "a"
    assert tally(["a", "b"], two, [0, 1]) == "b"
    assert tally(["a", "b"], two, [0, 0]) == "b"
    assert weights_of(["x", "y"], {"x": 5000}) == (5000, NEWCOMER_WEIGHT)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 5)), min_size=1, max_size=9))
def test_ballot_of_weight_n_counts_as_n_ballots(ballots: list[tuple[float, int]]) -> None:
    costs = [[cost] for cost, _ in ballots]
    weighed = scores(["a"], costs, [weight for _, weight in ballots])["a"]
    repeated = scores(["a"], [[cost] for cost, weight in ballots for _ in range(weight)])["a"]
    assert weighed == pytest.approx(repeated, rel=1e-9, abs=1e-6)
    assert min(costs)[0] - 1e-6 <= weighed <= max(costs)[0] + 1e-6


@given(st.lists(st.lists(st.floats(-1e9, 1e9), min_size=3, max_size=3), min_size=1, max_size=9), st.randoms())
def test_tally_is_independent_of_the_order_of_ballots(ballots: list[list[float]], order: object) -> None:
    shuffled = list(ballots)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert scores(["a", "b", "c"], ballots) == scores(["a", "b", "c"], shuffled)


def test_context_has_every_feature_that_is_measured() -> None:
    features = {field.name for field in fields(TaskContext)}
    assert {field.name for field in fields(ModelFacts)} - features == {"model", "max_positions"}
    assert TaskContext.of({"prompt_tokens": 3.0}).weight_type == "unknown", "peers that do not know it leave it out"
    assert TaskContext.of({"weight_type": 4.0}).weight_type == "unknown"
    assert {field.name for field in fields(Workload)} - features == {"completion_tokens", "cached_tokens"}


def test_context_copies_features_to_and_from_an_observation() -> None:
    context = TaskContext(
        architecture="llama",
        block_count=2,
        hidden_size=64,
        vocabulary_size=1000,
        weight_bytes=1210,
        head_count=8,
        prompt_tokens=12,
        max_tokens=3,
        shared_prefix_share=0.25,
        repetitiveness=0.5,
        concurrency=4,
        link_s=0.01,
        objective="throughput",
        quality="near",
    )
    model = ModelFacts(
        model=ModelId("5a" * 32),
        architecture="llama",
        block_count=2,
        hidden_size=64,
        vocabulary_size=1000,
        max_positions=512,
        weight_bytes=1210,
        head_count=8,
    )
    workload = context.to_workload(completion_tokens=3, cached_tokens=1)
    assert (workload.objective, workload.quality) == (Objective.THROUGHPUT, QualityBound.NEAR)
    assert TaskContext.from_parts(model, workload, max_tokens=3) == context
    assert all(type(value) in {str, float} for value in TaskContext.from_parts(model, workload).values().values())
