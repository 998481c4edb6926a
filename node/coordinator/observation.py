"""The observation of a served job: its cost, with the context that the cost depends on; and the recorder of them."""

import platform
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import structlog

from node.coordinator.submission import JobResult
from node.engine.memory_plan import kv_elements
from node.identity import Identity
from node.models.manifest import Manifest, find_integer
from node.storage.database import StorageError
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.identity import JobId, PeerId
from protocol.limits import MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH
from protocol.measurements import (
    Measurements,
    MethodInForce,
    ModelFacts,
    Observation,
    ObservationKind,
    StageObservation,
)
from protocol.observations import SignedObservation, check_countersignature, sign_observation
from protocol.stage_facts import StageFacts
from selector.task import UNKNOWN_WEIGHT_TYPE, TaskContext
from selector.weight_types import USUAL_WEIGHT_BITS, bits_per_weight

_SOFTWARE: Final = ("metaswarm", "torch", "transformers", "onnxruntime", "xllamacpp")

_WEIGHT_TYPES: Final = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
"""The names of transformers' number formats in safetensors and GGUF files."""

_WEIGHT_TYPE: Final = re.compile(r"[a-z0-9_]{1,32}")
WEIGHTS_SWITCH: Final = "weights"
"""The name of the weight type in an observation, where it is with the stages' policy: it cannot be chosen per job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedJob:
    """A job that was done. `job`: its id on the wire. `context`: the task, with the concurrency that was measured."""

    result: JobResult
    manifest: Manifest
    job: JobId
    context: TaskContext


def observation_of(served: ServedJob, observer: PeerId, issued_at_s: int) -> Observation:
    """Return the observation of a served job, unsigned."""
    result, model = served.result, model_facts(served.manifest)
    usage, timing = result.usage, result.timing
    return Observation(
        observer=observer,
        job=served.job,
        kind=ObservationKind.SERVED,
        issued_at_s=issued_at_s,
        model=model,
        workload=served.context.to_workload(
            completion_tokens=usage.completion_tokens, cached_tokens=usage.cached_tokens
        ),
        method=_with_weight_type(result.method, weight_type(served.manifest)),
        measurements=Measurements(
            ttft_s=timing.ttft_s,
            tpot_s=timing.tpot_s,
            total_s=timing.total_s,
            tokens_per_s=usage.counted_tokens / timing.total_s if timing.total_s else 0.0,
            replays=max(result.replays, int(result.is_replayed)),
        ),
        route=result.route,
        software=software_versions(),
        stage_facts=_facts_of_route(served.context.stage_facts, result.route),
    )


def _facts_of_route(facts: tuple[StageFacts, ...], route: Sequence[StageObservation]) -> tuple[StageFacts, ...]:
    """Return the facts if they are of this route: none where the job ended on another one than was voted about."""
    return facts if [each.blocks for each in facts] == [len(stage.blocks) for stage in route] else ()


def model_facts(manifest: Manifest) -> ModelFacts:
    """Return the model properties that affect speed."""

    def find(*keys: str) -> int | None:
        found = find_integer(manifest.config, keys)
        return found if found is not None and 1 <= found <= MAX_VOCABULARY else None

    experts = find("num_local_experts", "num_experts", "n_routed_experts")
    active = find("num_experts_per_tok", "num_experts_per_token")
    active = active if experts and active and active <= experts else None
    hidden = manifest.hidden_size or MAX_WIDTH
    block_bytes = sum(file.size_bytes for file in manifest.blocks) // manifest.block_count
    parameters = round(8 * block_bytes / (bits_per_weight(weight_type(manifest)) or USUAL_WEIGHT_BITS))
    # An expert is three matrices; what else a block has, every token uses.
    expert = 3 * hidden * (find("moe_intermediate_size", "intermediate_size", "ffn_dim") or 0)
    idle = expert * (experts - active) if experts and active else 0
    return ModelFacts(
        model=manifest.model_id,
        architecture=manifest.model_type,
        block_count=manifest.block_count,
        hidden_size=hidden,
        vocabulary_size=manifest.vocabulary_size or MAX_VOCABULARY,
        max_positions=min(manifest.max_positions or MAX_POSITIONS, MAX_POSITIONS),
        weight_bytes=sum(file.size_bytes for file in manifest.weight_files),
        intermediate_size=find("intermediate_size", "ffn_dim", "n_inner"),
        head_count=find("num_attention_heads", "n_head", "num_heads"),
        kv_head_count=find("num_key_value_heads", "num_kv_heads"),
        expert_count=experts,
        active_expert_count=active,
        head_size=find("head_dim"),
        block_bytes=block_bytes,
        block_parameters=parameters,
        active_block_parameters=max(parameters - idle, parameters // (experts or 1)),
        kv_bytes_per_token=2 * sum(kv_elements(manifest.config, block) for block in range(manifest.block_count)),
    )


def weight_type(manifest: Manifest) -> str:
    """Return what most of the weights are published in, as `bf16` or `q4_1`."""
    stated = str(manifest.config.get("weight_type") or manifest.config.get("dtype") or UNKNOWN_WEIGHT_TYPE)
    found = _WEIGHT_TYPES.get(stated, stated.lower())
    return found if _WEIGHT_TYPE.fullmatch(found) else UNKNOWN_WEIGHT_TYPE


def _with_weight_type(method: MethodInForce, weight_type: str) -> MethodInForce:
    if weight_type == UNKNOWN_WEIGHT_TYPE:
        return method
    return replace(method, stage_policy={**method.stage_policy, WEIGHTS_SWITCH: weight_type})


@cache
def software_versions() -> Mapping[str, str]:
    """Return the versions of the software that affects speed, without importing it."""
    found = {"python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def software_name(software: Mapping[str, str]) -> str:
    """Return one name for the versions that affect speed."""
    return ",".join(f"{name}={version}" for name, version in sorted(software.items()) if name != "python")


def without_invalid_countersignatures(observation: Observation) -> Observation:
    """Return an observation that peers accept though a stage countersigned wrongly: that one's signature is dropped."""

    def checked(stage: StageObservation) -> StageObservation:
        try:
            check_countersignature(
                stage,
                job=observation.job,
                observer=observation.observer,
                model=observation.model.model,
                method=observation.method.name,
            )
        except RemoteProtocolError:
            return replace(stage, countersignature=None)
        return stage

    return replace(observation, route=tuple(map(checked, observation.route)))


_logger = structlog.get_logger(__name__)


class Recorder:
    """Makes an observation of every job that this node coordinated. A failure to record fails no job."""

    def __init__(self, identity: Identity, publish: Callable[[SignedObservation], Awaitable[None]]) -> None:
        """`publish`: stores an observation here and publishes it to the swarm."""
        self._identity = identity
        self._publish = publish

    async def record(self, served: ServedJob) -> None:
        """Record a job that a user submitted."""
        await self.publish(self.observation(served))

    def observation(self, served: ServedJob) -> Observation:
        """Return the observation of a job, as a served job's."""
        return observation_of(served, self._identity.peer_id, int(time.time()))

    async def publish(self, observation: Observation) -> bool:
        """Sign an observation, store it, and publish it to the swarm; return whether that succeeded."""
        signed = self.sign(observation)
        return signed is not None and await self.publish_signed(signed)

    async def publish_signed(self, signed: SignedObservation) -> bool:
        """Store a signed observation, and publish it to the swarm; return whether that succeeded."""
        try:
            await self._publish(signed)
        except StorageError as error:
            _logger.warning("observation not recorded", job=signed.observation.job, reason=str(error))
            return False
        return True

    def sign(self, observation: Observation) -> SignedObservation | None:
        """Return the signed observation; None where other peers would refuse it."""
        try:
            return self._sign(observation)
        except LocalProtocolError as error:
            _logger.warning("observation not recorded", job=observation.job, reason=str(error))
            return None

    def _sign(self, observation: Observation) -> SignedObservation:
        key = self._identity.private_key
        try:
            return sign_observation(observation, key)
        except LocalProtocolError:
            return sign_observation(without_invalid_countersignatures(observation), key)
