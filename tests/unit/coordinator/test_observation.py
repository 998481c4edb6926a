"""What a coordinator tells of a job that it has served."""

from dataclasses import replace
from typing import Any

import pytest

from node.coordinator.observation import (
    ServedJob,
    model_facts,
    observation_of,
    software_versions,
    weight_type,
    without_invalid_countersignatures,
)
from node.coordinator.submission import Consensus, JobResult, Timing, Usage
from node.models.manifest import FileEntry, Manifest
from node.selection.samples import sample_of
from protocol.errors import LocalProtocolError
from protocol.identity import BlockRange
from protocol.limits import MAX_POSITIONS
from protocol.measurements import Observation, StageObservation
from protocol.messages import FinishReason, SessionStatistics
from protocol.observations import countersign, sign_observation, verify_fresh_observation
from protocol.schema import to_map
from selector.task import TaskContext
from tests.support.observations import METHOD, NOW_S, job, key, peer


def manifest(**config: Any) -> Manifest:
    return Manifest(
        config={"model_type": "llama", "hidden_size": 64, "vocab_size": 1000, "tie_word_embeddings": True, **config},
        bos_token_id=None,
        eos_token_ids=(2,),
        tokenizer_files=(FileEntry("tokenizer.json", 9_999, "00" * 32),),
        embed=FileEntry("embed.safetensors", 1000, "01" * 32),
        head=FileEntry("head.safetensors", 10, "02" * 32),
        blocks=(FileEntry("block-000.safetensors", 100, "03" * 32), FileEntry("block-001.safetensors", 100, "04" * 32)),
    )


RESULT = JobResult(
    job_id=job(1),
    model=manifest().model_id,
    model_name="tiny",
    text="so it goes",
    token_ids=(5, 6, 7),
    finish_reason=FinishReason.LENGTH,
    usage=Usage(prompt_tokens=12, completion_tokens=3, cached_tokens=4),
    timing=Timing(ttft_s=0.5, tpot_s=0.25, total_s=1.0),
    route=(),
    method=METHOD,
    consensus=Consensus(votes=(), agreed=METHOD.name, weighed=False, epoch=None, table_digest=None),
    replays=1,
)


def stage(number: int, start: int, end: int) -> StageObservation:
    """Return what a stage hands over when it is closed."""
    return countersign(
        StageObservation(
            peer=peer(number),
            blocks=BlockRange(start, end),
            hardware="cpu",
            statistics=SessionStatistics(steps=3, rows=14, compute_s=0.2),
        ),
        job=job(2),
        observer=peer(0),
        model=manifest().model_id,
        method=METHOD.name,
        private_key=key(number),
    )


def observed(*route: StageObservation, result: JobResult = RESULT) -> Observation:
    context = TaskContext(prompt_tokens=12, concurrency=3, quality="near", shared_prefix_share=0.25, link_s=0.5)
    served = ServedJob(result=replace(result, route=route), manifest=manifest(), job=job(2), context=context)
    return observation_of(served, peer(0), NOW_S)


def test_observation_of_a_served_job_is_accepted_by_peers() -> None:
    made = sign_observation(observed(stage(1, 0, 1), stage(2, 1, 2)), key(0))
    taken = verify_fresh_observation(made.envelope, NOW_S).observation
    assert taken.is_countersigned
    assert taken.job == job(2)
    assert (taken.workload.prompt_tokens, taken.workload.completion_tokens, taken.workload.cached_tokens) == (12, 3, 4)
    assert (taken.workload.objective, taken.workload.quality, taken.workload.concurrency) == ("latency", "near", 3)
    assert (taken.workload.shared_prefix_share, taken.workload.link_s) == (0.25, 0.5)
    assert (taken.measurements.total_s, taken.measurements.tokens_per_s, taken.measurements.replays) == (1.0, 3.0, 1)
    assert taken.method == METHOD
    assert taken.software == software_versions()
    assert {"metaswarm", "python", "torch"} <= taken.software.keys()


def test_nothing_is_learned_from_a_job_that_reached_its_stages_again() -> None:
    undisturbed = replace(RESULT, replays=0)
    assert sample_of(observed(stage(1, 0, 2), result=undisturbed))
    assert not sample_of(observed(stage(1, 0, 2), result=replace(undisturbed, is_replayed=True)))


def test_invalid_countersignature_is_dropped() -> None:
    honest, other = stage(1, 0, 1), stage(2, 1, 2)
    liar = replace(other, statistics=replace(other.statistics, compute_s=0.1))
    with pytest.raises(LocalProtocolError):
        sign_observation(observed(honest, liar), key(0))
    made = sign_observation(without_invalid_countersignatures(observed(honest, liar)), key(0)).observation
    assert made.route[0] == honest
    assert made.route[1] == replace(liar, countersignature=None)
    assert not made.is_countersigned


def test_job_without_duration_cannot_be_signed() -> None:
    instant = replace(RESULT, timing=Timing(ttft_s=0.0, tpot_s=0.0, total_s=0.0))
    with pytest.raises(LocalProtocolError):
        sign_observation(observed(stage(1, 0, 2), result=instant), key(0))


def test_model_facts_come_from_the_manifest() -> None:
    facts = model_facts(
        manifest(
            max_position_embeddings=512,
            intermediate_size=256,
            num_attention_heads=8,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
        )
    )
    assert (facts.block_count, facts.hidden_size, facts.vocabulary_size, facts.max_positions) == (2, 64, 1000, 512)
    assert (facts.intermediate_size, facts.head_count, facts.kv_head_count) == (256, 8, 2)
    assert (facts.expert_count, facts.active_expert_count) == (8, 2)
    assert facts.weight_bytes == 1210


def test_missing_and_invalid_model_facts_are_left_out() -> None:
    facts = model_facts(
        manifest(max_position_embeddings=10 * MAX_POSITIONS, num_attention_heads=-1, num_experts_per_tok=4)
    )
    assert facts.max_positions == MAX_POSITIONS
    assert (facts.head_count, facts.kv_head_count, facts.expert_count, facts.active_expert_count) == (None,) * 4
    assert model_facts(manifest(num_experts=2, num_experts_per_tok=4)).active_expert_count is None


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"dtype": "bfloat16"}, "bf16"),
        ({"dtype": "float32"}, "f32"),
        ({"weight_type": "Q4_1"}, "q4_1"),
        ({}, "unknown"),
        ({"dtype": "a type|of=none"}, "unknown"),
        ({"dtype": ["float32"]}, "unknown"),
    ],
)
def test_weight_type_is_named_alike_for_both_package_formats(config: dict[str, Any], name: str) -> None:
    assert weight_type(manifest(**config)) == name


def test_weight_type_travels_where_peers_of_the_published_version_expect_any_name() -> None:
    served = ServedJob(
        result=replace(RESULT, route=(stage(1, 0, 2),), replays=0),
        manifest=manifest(),
        job=job(2),
        context=TaskContext(prompt_tokens=12),
    )
    old = observation_of(served, peer(0), NOW_S)
    new = observation_of(replace(served, manifest=manifest(dtype="bfloat16")), peer(0), NOW_S)
    # Nothing is added to a published version: a field that peers do not know would be a fault.
    assert to_map(new).keys() == to_map(old).keys()
    assert to_map(new)["model"].keys() == to_map(old)["model"].keys()
    assert new.method.name == old.method.name
    found = [sample_of(each) for each in (old, new)]
    assert [each.context.weight_type for each in found if each] == ["unknown", "bf16"]
