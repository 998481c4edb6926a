"""Kinds of task: their methods, their features, and that what is learned of one says little of another."""

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from protocol.measurements import ModelFacts, TaskKind, Workload
from protocol.stage_facts import DeviceKind, StageFacts
from selector.dataset import Pairs
from selector.features import PHYSICS, physics
from selector.heuristic import predicted_cost, preference
from selector.prediction import train
from selector.sample import Sample
from selector.task import BASELINE, Method, TaskContext, method, portfolio
from selector.task_buckets import canonicalise, task_bucket
from selector.task_features import FEATURES, tabulate
from selector.training_set import build_training_set
from tests.unit.selector.test_training_set import CONTEXT, VIEWPOINT, sample

KINDS = {
    TaskKind.GENERATE: CONTEXT,
    TaskKind.EMBED: replace(CONTEXT, task_kind="embed", max_tokens=0),
    TaskKind.SCORE: replace(CONTEXT, task_kind="score", max_tokens=0),
}
FACTS = StageFacts(
    blocks=30,
    device=DeviceKind.CPU,
    memory_bytes=8 << 30,
    threads=2,
    memory_read_bytes_per_s=2e10,
    fp32_flop_per_s=1e11,
)


@pytest.mark.parametrize("package_format", ["safetensors", "gguf"])
def test_methods_suit_the_kind(package_format: str) -> None:
    for kind in TaskKind:
        offered = portfolio(package_format, kind=kind)
        assert all(each.suits(kind) for each in offered)
        assert offered[0] == offered[0].baseline
        assert len({each.name for each in offered}) == len(offered)
    texts, embeddings = (portfolio(package_format, kind=kind) for kind in (TaskKind.GENERATE, TaskKind.EMBED))
    assert len(embeddings) < len(texts), "those that differ in what a prompt alone does not use are one"
    assert {each.arithmetic for each in embeddings} == {each.arithmetic for each in texts}
    assert {each.prefill_chunk for each in embeddings} == {None, 128}, "chunks are pipelined through the stages"


def test_speculation_is_for_texts_alone() -> None:
    speculating, cached = method(engine="fused", speculation="ngram-8"), method(prefix_cache="on")
    assert [speculating.suits(kind) for kind in TaskKind] == [True, False, True]
    assert [cached.suits(kind) for kind in TaskKind] == [True, False, False]


def test_kind_is_part_of_context_workload_and_bucket() -> None:
    assert TaskContext.of({"prompt_tokens": 5.0}).task_kind == "generate", "of a peer that knows no other kind"
    assert TaskContext.of({"task_kind": "translate"}).task_kind == "generate"
    assert len({task_bucket(context) for context in KINDS.values()}) == 3
    texts = task_bucket(KINDS[TaskKind.GENERATE])
    assert texts.endswith("/latency"), "as stored trials are named, from before there were kinds"
    assert task_bucket(replace(KINDS[TaskKind.GENERATE], task_kind="score")) == f"{texts}/score"
    for kind, context in KINDS.items():
        assert TaskContext.of(context.values()) == context
        assert canonicalise(context).max_tokens == context.max_tokens
        workload = context.to_workload(completion_tokens=context.max_tokens)
        assert workload.task_kind is kind
        facts: Any = ModelFacts.__dataclass_fields__
        assert "task_kind" not in facts
        assert workload.counted_tokens == (context.max_tokens or context.prompt_tokens)
    assert Workload(prompt_tokens=5, completion_tokens=3).task_kind is TaskKind.GENERATE


def test_features_tell_kinds_apart_and_the_roofline_has_no_decode() -> None:
    facts: dict[str, Any] = {"block_parameters": 10**6, "active_block_parameters": 10**6, "kv_bytes_per_token": 4096}
    contexts = [replace(context, stage_facts=(FACTS,), **facts) for context in KINDS.values()]
    table = tabulate(contexts)
    columns = list(FEATURES)
    scored, embeds = table.features[:, columns.index("l_scored")], table.features[:, columns.index("embeds")]
    assert embeds.tolist() == [0, 1, 0]
    assert scored.tolist() == [0, 0, pytest.approx(math.log2(65))]
    found = physics(Pairs(table, (BASELINE.name,), np.arange(3), np.zeros(3, dtype=np.intp)))
    total, prefill = (found[:, PHYSICS.index(name)] for name in ("total", "prefill"))
    assert np.isfinite(total).all()
    assert total[1] == pytest.approx(prefill[1], abs=0.02), "an embedding is a prefill and nothing else"
    assert total[0] > prefill[0]
    older = [replace(each, max_tokens=max_tokens) for each, max_tokens in zip(contexts[:1] * 2, (8, 64), strict=True)]
    alike = tabulate(older).features[:, [columns.index("l_scored"), columns.index("embeds")]]
    assert not alike.any(), "histories of texts alone are learned from as before"


def best(samples: list[Sample], kind: TaskKind, methods: list[Method]) -> str:
    predictor = train(samples, VIEWPOINT)
    assert predictor is not None
    table = predictor.table(KINDS[kind], methods)
    return min(table, key=lambda name: table[name].log_cost)


def test_observations_of_one_kind_teach_that_kind() -> None:
    """One method wins for texts, another for embeddings, a third for scores: each kind gets its own."""
    methods = [method(engine="fused"), method(engine="onnxruntime"), method(engine="fused", arithmetic="bf16")]
    rng = random.Random(3)
    truth = {TaskKind.GENERATE: (-1.0, 0.2, -0.2), TaskKind.EMBED: (0.2, -1.0, -0.2), TaskKind.SCORE: (0.2, -0.2, -1.0)}
    samples = [
        sample(each.name, ratio + rng.gauss(0, 0.03), level=rng.gauss(0, 0.3), context=KINDS[kind])
        for _ in range(12)
        for kind, ratios in truth.items()
        for each, ratio in zip(methods, ratios, strict=True)
    ]
    assert {kind: best(samples, kind, methods) for kind in truth} == {
        kind: methods[place].name for place, kind in enumerate(truth)
    }


def test_what_scores_take_longer_says_nothing_about_methods() -> None:
    """Within one hour and route, one kind that is mostly served by one method is slower than the heuristic says."""
    samples = [
        sample(each.name, None, level=slower, context=context, cost=predicted_cost(context, each))
        for kind, slower, counts in ((TaskKind.GENERATE, 0.0, (10, 40)), (TaskKind.SCORE, 1.0, (40, 10)))
        for each, count in zip((BASELINE, method(engine="fused")), counts, strict=True)
        for context in [canonicalise(KINDS[kind])] * count
    ]
    found = build_training_set(samples, VIEWPOINT)
    assert found is not None
    assert np.ptp(found.dataset.cost) < 0.05


def test_heuristic_gives_prompts_alone_the_method_that_is_best_for_prompts() -> None:
    exact = [each for each in portfolio("safetensors") if each.exact and each.suits(TaskKind.EMBED)]
    for kind in (TaskKind.EMBED, TaskKind.SCORE):
        first = preference(replace(KINDS[kind], stage_count=1), exact)[0]
        assert first.engine != "eager"
        assert first.drafter == "off"
