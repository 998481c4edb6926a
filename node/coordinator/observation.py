"""What a served job is worth to the swarm: the observation of what it cost."""

import platform
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from node.coordinator.submission import JobRequest, JobResult
from node.models.manifest import Manifest, find_integer
from protocol.errors import RemoteProtocolError
from protocol.identity import JobId, PeerId
from protocol.limits import MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH
from protocol.measurements import (
    Measurements,
    MethodInForce,
    ModelFacts,
    Observation,
    ObservationKind,
    StageObservation,
    Workload,
)
from protocol.observations import check_countersignature

_SOFTWARE: Final = ("metaswarm", "torch", "transformers", "onnxruntime")


def observation_of(
    result: JobResult,
    request: JobRequest,
    model: ModelFacts,
    *,
    observer: PeerId,
    job: JobId,
    issued_at_s: int,
    concurrency: int,
    shared_prefix_share: float = 0.0,
    repetitiveness: float = 0.0,
    link_s: float = 0.0,
) -> Observation:
    """Return what a job that was served here has shown; `protocol.observations.sign_observation` is the next step.

    `job`: the id under which the stages knew it, which a replay changes. A wrong countersignature is left out: one bad
    stage does not spoil the rest. `concurrency`: the most sessions that any of the stages had, this one included.
    """
    method = MethodInForce(switches=result.method.switches, stage_policy=result.method.stage_policy)
    usage, timing = result.usage, result.timing
    return Observation(
        observer=observer,
        job=job,
        kind=ObservationKind.SERVED,
        issued_at_s=issued_at_s,
        model=model,
        workload=Workload(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            concurrency=max(1, concurrency),
            shared_prefix_share=shared_prefix_share,
            repetitiveness=repetitiveness,
            link_s=link_s,
            quality=request.quality,
        ),
        method=method,
        measurements=Measurements(
            ttft_s=timing.ttft_s,
            tpot_s=timing.tpot_s,
            total_s=timing.total_s,
            tokens_per_s=usage.completion_tokens / timing.total_s if timing.total_s else 0.0,
            replays=result.replays,
        ),
        route=tuple(
            _without_false_countersignature(stage, observer, job, model, method.name) for stage in result.route
        ),
        software=software_versions(),
    )


def model_facts(manifest: Manifest) -> ModelFacts:
    """Return what of a model decides its speed."""
    files = (manifest.embed, *manifest.blocks, manifest.head)

    def find(*keys: str) -> int | None:
        found = find_integer(manifest.config, keys)
        return found if found is not None and 1 <= found <= MAX_VOCABULARY else None

    experts = find("num_local_experts", "num_experts", "n_routed_experts")
    active = find("num_experts_per_tok", "num_experts_per_token")
    return ModelFacts(
        model=manifest.model_id,
        architecture=manifest.model_type,
        block_count=manifest.block_count,
        hidden_size=manifest.hidden_size or MAX_WIDTH,
        vocabulary_size=manifest.vocabulary_size or MAX_VOCABULARY,
        max_positions=min(manifest.max_positions or MAX_POSITIONS, MAX_POSITIONS),
        weight_bytes=sum(file.size_bytes for file in files),
        intermediate_size=find("intermediate_size", "ffn_dim", "n_inner"),
        head_count=find("num_attention_heads", "n_head", "num_heads"),
        kv_head_count=find("num_key_value_heads", "num_kv_heads"),
        expert_count=experts,
        active_expert_count=active if experts and active and active <= experts else None,
    )


@cache
def software_versions() -> Mapping[str, str]:
    """Return the versions of what decides the speed of this node; none of it is imported for that."""
    found = {"python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def software_name(software: Mapping[str, str]) -> str:
    """Return one name for the versions that decide the speed."""
    return ",".join(f"{name}={version}" for name, version in sorted(software.items()) if name != "python")


def _without_false_countersignature(
    stage: StageObservation, observer: PeerId, job: JobId, model: ModelFacts, method: str
) -> StageObservation:
    if stage.countersignature is None:
        return stage
    try:
        check_countersignature(stage, job=job, observer=observer, model=model.model, method=method)
    except RemoteProtocolError:
        return replace(stage, countersignature=None)
    return stage
