"""Performance observations as they travel and are kept: signed, countersigned, named by their content.

An observation is signed by its observer (the coordinator of a job, or whoever ran a benchmark) and never expires by
itself. Each stage of the route countersigns its own figures together with the job, the observer and the method, so that
nobody can invent what somebody else's hardware did. Its id is the sha256 of the signed bytes: who has an id has the
content, and hearing it twice changes nothing.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Final, NewType

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.canonical import Value, decode, decode_canonical, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.fields import (
    JOB_ID_BYTES,
    Fields,
    block_range,
    integer,
    model_id,
    name,
    number,
    peer_id,
    raw,
    tuple_of,
)
from protocol.identity import JobId, ModelId, PeerId, public_key_of
from protocol.limits import (
    MAX_BLOCKS,
    MAX_CLOCK_SKEW_S,
    MAX_HARDWARE_BYTES,
    MAX_INTEGER,
    MAX_LOG_RATIO,
    MAX_NAME_BYTES,
    MAX_OBSERVATION_AGE_S,
    MAX_PARALLEL_JOBS,
    MAX_POSITIONS,
    MAX_RECORD_BYTES,
    MAX_SECONDS,
    MAX_SOFTWARE,
    MAX_STAGES,
    MAX_SWITCH_BYTES,
    MAX_SWITCHES,
    MAX_TOKENS_PER_S,
    MAX_VOCABULARY,
    MAX_WIDTH,
    SIGNATURE_BYTES,
)
from protocol.measurements import (
    MIN_TOTAL_S,
    Measurements,
    MethodInForce,
    ModelFacts,
    Objective,
    Observation,
    ObservationKind,
    QualityBound,
    StageObservation,
    Workload,
    check,
)
from protocol.messages import SessionStatistics
from protocol.records import open_envelope, sign
from protocol.signatures import is_signed

OBSERVATION_KIND: Final = "observation"
"""The kind in an observation's envelope."""

OBSERVATION_VERSION: Final = 1

OBSERVATIONS_TOPIC: Final = "metaswarm/1/observations"
"""The gossip topic of observations."""

BUCKET_S: Final = 3600
"""Observations are compared, and dropped, by the hour of their issue."""

_COUNTERSIGNED: Final = b"metaswarm/1/countersignature\n"
_SWITCH: Final = re.compile(r"[a-z0-9_.+-]+")

ObservationId = NewType("ObservationId", bytes)
"""The sha256 of an observation's signed bytes, 32 bytes."""


@dataclass(frozen=True, slots=True)
class SignedObservation:
    """An observation whose signatures are right, its id, and the envelope in which it travels and is kept."""

    id: ObservationId
    observation: Observation
    envelope: bytes

    @property
    def bucket(self) -> int:
        """The hour of its issue."""
        return bucket_of(self.observation.issued_at_s)


def bucket_of(issued_at_s: int) -> int:
    """Return the bucket of what was issued at a Unix time."""
    return issued_at_s // BUCKET_S


def oldest_bucket(now_s: float) -> int:
    """Return the first bucket that is still taken in. Clocks differ: peers compare only buckets after it."""
    return max(0, bucket_of(int(now_s) - MAX_OBSERVATION_AGE_S))


def countersign(
    stage: StageObservation,
    *,
    job: JobId,
    observer: PeerId,
    model: ModelId,
    method: str,
    private_key: Ed25519PrivateKey,
) -> StageObservation:
    """Return a stage's figures with its own signature; the key is that of `stage.peer`. `method` is the job's name."""
    signature = private_key.sign(_countersigned_bytes(stage, job, observer, model, method))
    return replace(stage, countersignature=signature)


def check_countersignature(
    stage: StageObservation, *, job: JobId, observer: PeerId, model: ModelId, method: str
) -> None:
    """Raise RemoteProtocolError unless the stage's peer has signed these figures for this job, observer and method."""
    message = _countersigned_bytes(stage, job, observer, model, method)
    if not is_signed(message, stage.countersignature or b"", public_key_of(stage.peer)):
        raise RemoteProtocolError(f"the countersignature of {stage.peer} is wrong")


def sign_observation(observation: Observation, private_key: Ed25519PrivateKey) -> SignedObservation:
    """Return a signed observation. Raises LocalProtocolError for one that others would not take."""
    envelope = sign(OBSERVATION_KIND, _to_payload(observation), private_key)
    try:
        signed = open_observation(envelope)
    except RemoteProtocolError as error:
        raise LocalProtocolError(str(error)) from None
    return signed


def verify_observation(envelope: bytes, now_s: float) -> SignedObservation:
    """Return the observation in an envelope from a peer.

    `now_s`: Unix time by our clock. Raises RemoteProtocolError when anything is wrong: form, version, signatures,
    values that cannot be, a time in the future or too long ago.
    """
    signed = open_observation(envelope)
    issued_at_s = signed.observation.issued_at_s
    if issued_at_s > now_s + MAX_CLOCK_SKEW_S:
        raise RemoteProtocolError(f"observation was issued {issued_at_s - now_s:.0f} s in the future")
    if signed.bucket < oldest_bucket(now_s):
        raise RemoteProtocolError(f"observation was issued {now_s - issued_at_s:.0f} s ago: too long")
    return signed


def open_observation(envelope: bytes) -> SignedObservation:
    """Return the observation in an envelope, whenever it was issued; else like `verify_observation`."""
    payload, signer = open_envelope(envelope, OBSERVATION_KIND)
    observation = _from_payload(decode_canonical(payload, max_bytes=MAX_RECORD_BYTES))
    if observation.observer != signer:
        raise RemoteProtocolError(f"observation of {observation.observer} is signed by {signer}")
    for stage in observation.route:
        if stage.countersignature is not None:
            check_countersignature(
                stage,
                job=observation.job,
                observer=signer,
                model=observation.model.model,
                method=observation.method.name,
            )
    return SignedObservation(ObservationId(hashlib.sha256(payload).digest()), observation, envelope)


def read_observation(envelope: bytes) -> SignedObservation:
    """Return an observation that was verified when it was taken in: signatures are not looked at again.

    Raises RemoteProtocolError for what cannot have been verified.
    """
    fields = Fields(decode(envelope, max_bytes=MAX_RECORD_BYTES), "record")
    payload = fields.take("payload")
    if not isinstance(payload, bytes):
        raise RemoteProtocolError("record payload is not bytes")
    observation = _from_payload(decode(payload, max_bytes=MAX_RECORD_BYTES))
    return SignedObservation(ObservationId(hashlib.sha256(payload).digest()), observation, envelope)


def _countersigned_bytes(stage: StageObservation, job: JobId, observer: PeerId, model: ModelId, method: str) -> bytes:
    return _COUNTERSIGNED + encode(
        {
            "job": bytes.fromhex(job),
            "observer": observer,
            "model": bytes.fromhex(model),
            "method": method,
            "blocks": [stage.blocks.start, stage.blocks.end],
            "hardware": stage.hardware,
            "statistics": _statistics_to_array(stage.statistics),
        }
    )


# The way out


def _to_payload(observation: Observation) -> dict[str, Value]:
    model, workload, method = observation.model, observation.workload, observation.method
    measurements = observation.measurements
    ratio = measurements.log_ratio_to_baseline
    return {
        "version": OBSERVATION_VERSION,
        "observer": observation.observer,
        "job": bytes.fromhex(observation.job),
        "kind": observation.kind.value,
        "issued_at_s": observation.issued_at_s,
        "model": {
            "id": bytes.fromhex(model.model),
            "architecture": model.architecture,
            "block_count": model.block_count,
            "hidden_size": model.hidden_size,
            "vocabulary_size": model.vocabulary_size,
            "max_positions": model.max_positions,
            "weight_bytes": model.weight_bytes,
            "intermediate_size": model.intermediate_size,
            "head_count": model.head_count,
            "kv_head_count": model.kv_head_count,
            "expert_count": model.expert_count,
            "active_expert_count": model.active_expert_count,
        },
        "workload": {
            "prompt_tokens": workload.prompt_tokens,
            "completion_tokens": workload.completion_tokens,
            "cached_tokens": workload.cached_tokens,
            "concurrency": workload.concurrency,
            "shared_prefix_share": float(workload.shared_prefix_share),
            "repetitiveness": float(workload.repetitiveness),
            "link_s": float(workload.link_s),
            "objective": workload.objective.value,
            "quality": workload.quality.value,
        },
        "method": {"switches": dict(method.switches), "stage_policy": dict(method.stage_policy)},
        "measurements": {
            "ttft_s": float(measurements.ttft_s),
            "tpot_s": float(measurements.tpot_s),
            "total_s": float(measurements.total_s),
            "tokens_per_s": float(measurements.tokens_per_s),
            "log_ratio_to_baseline": None if ratio is None else float(ratio),
            "replays": measurements.replays,
        },
        "route": [_stage_to_array(stage) for stage in observation.route],
        "software": dict(observation.software),
    }


def _stage_to_array(stage: StageObservation) -> list[Value]:
    return [
        stage.peer,
        [stage.blocks.start, stage.blocks.end],
        stage.hardware,
        _statistics_to_array(stage.statistics),
        None if stage.round_trip_s is None else float(stage.round_trip_s),
        stage.countersignature,
    ]


def _statistics_to_array(statistics: SessionStatistics) -> list[Value]:
    return [
        statistics.steps,
        statistics.rows,
        float(statistics.compute_s),
        float(statistics.queue_s),
        statistics.bytes_in,
        statistics.bytes_out,
    ]


# The way in


def _from_payload(value: object) -> Observation:
    fields = Fields(value, "observation")
    version = fields.integer("version", 0, MAX_INTEGER)
    if version != OBSERVATION_VERSION:
        raise RemoteProtocolError(f"observation has version {version}: only {OBSERVATION_VERSION} is known")
    observation = Observation(
        observer=peer_id(fields.take("observer"), "observation observer"),
        job=JobId(fields.raw("job", JOB_ID_BYTES).hex()),
        kind=fields.choice("kind", ObservationKind),
        issued_at_s=fields.integer("issued_at_s", 0, MAX_INTEGER),
        model=_model_from(fields.take("model")),
        workload=_workload_from(fields.take("workload")),
        method=_method_from(fields.take("method")),
        measurements=_measurements_from(fields.take("measurements")),
        route=tuple(_stage_from(stage) for stage in fields.array("route", MAX_STAGES)),
        software=_software_from(fields.take("software")),
    )
    fields.finish()
    check(observation)
    return observation


def _model_from(value: object) -> ModelFacts:
    fields = Fields(value, "observation model")

    def optional(key: str) -> int | None:
        found = fields.take(key)
        return None if found is None else integer(found, 1, MAX_VOCABULARY, f"observation model {key}")

    model = ModelFacts(
        model=model_id(fields.take("id"), "observation model id"),
        architecture=fields.name("architecture", MAX_NAME_BYTES),
        block_count=fields.integer("block_count", 1, MAX_BLOCKS),
        hidden_size=fields.integer("hidden_size", 1, MAX_WIDTH),
        vocabulary_size=fields.integer("vocabulary_size", 1, MAX_VOCABULARY),
        max_positions=fields.integer("max_positions", 1, MAX_POSITIONS),
        weight_bytes=fields.integer("weight_bytes", 0, MAX_INTEGER),
        intermediate_size=optional("intermediate_size"),
        head_count=optional("head_count"),
        kv_head_count=optional("kv_head_count"),
        expert_count=optional("expert_count"),
        active_expert_count=optional("active_expert_count"),
    )
    fields.finish()
    return model


def _workload_from(value: object) -> Workload:
    fields = Fields(value, "observation workload")
    workload = Workload(
        prompt_tokens=fields.integer("prompt_tokens", 1, MAX_POSITIONS),
        completion_tokens=fields.integer("completion_tokens", 1, MAX_POSITIONS),
        cached_tokens=fields.integer("cached_tokens", 0, MAX_POSITIONS),
        concurrency=fields.integer("concurrency", 1, MAX_PARALLEL_JOBS),
        shared_prefix_share=fields.number("shared_prefix_share", 0.0, 1.0),
        repetitiveness=fields.number("repetitiveness", 0.0, 1.0),
        link_s=fields.number("link_s", 0.0, MAX_SECONDS),
        objective=fields.choice("objective", Objective),
        quality=fields.choice("quality", QualityBound),
    )
    fields.finish()
    return workload


def _method_from(value: object) -> MethodInForce:
    fields = Fields(value, "observation method")
    method = MethodInForce(
        switches=_switches_from(fields.take("switches"), "observation switches"),
        stage_policy=_switches_from(fields.take("stage_policy"), "observation stage policy"),
    )
    fields.finish()
    name(method.name, MAX_NAME_BYTES, "observation method name")
    return method


def _measurements_from(value: object) -> Measurements:
    fields = Fields(value, "observation measurements")
    ratio = fields.take("log_ratio_to_baseline")
    measurements = Measurements(
        ttft_s=fields.number("ttft_s", 0.0, MAX_SECONDS),
        tpot_s=fields.number("tpot_s", 0.0, MAX_SECONDS),
        total_s=fields.number("total_s", MIN_TOTAL_S, MAX_SECONDS),
        tokens_per_s=fields.number("tokens_per_s", 0.0, MAX_TOKENS_PER_S),
        log_ratio_to_baseline=None if ratio is None else number(ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO, "log ratio"),
        replays=fields.integer("replays", 0, MAX_STAGES),
    )
    fields.finish()
    return measurements


def _stage_from(value: object) -> StageObservation:
    peer, blocks, hardware, statistics, round_trip_s, countersignature = tuple_of(value, 6, "observation stage")
    steps, rows, compute_s, queue_s, bytes_in, bytes_out = tuple_of(statistics, 6, "stage statistics")
    return StageObservation(
        peer=peer_id(peer, "stage peer"),
        blocks=block_range(blocks, "stage blocks"),
        hardware=name(hardware, MAX_HARDWARE_BYTES, "stage hardware"),
        statistics=SessionStatistics(
            steps=integer(steps, 0, MAX_INTEGER, "stage steps"),
            rows=integer(rows, 0, MAX_INTEGER, "stage rows"),
            compute_s=number(compute_s, 0.0, MAX_SECONDS, "stage compute_s"),
            queue_s=number(queue_s, 0.0, MAX_SECONDS, "stage queue_s"),
            bytes_in=integer(bytes_in, 0, MAX_INTEGER, "stage bytes_in"),
            bytes_out=integer(bytes_out, 0, MAX_INTEGER, "stage bytes_out"),
        ),
        round_trip_s=None if round_trip_s is None else number(round_trip_s, 0.0, MAX_SECONDS, "stage round_trip_s"),
        countersignature=(
            None if countersignature is None else raw(countersignature, SIGNATURE_BYTES, "stage countersignature")
        ),
    )


def _switches_from(value: object, what: str) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_SWITCHES:
        raise RemoteProtocolError(f"{what} are no map of at most {MAX_SWITCHES} switches")
    for part in (*value, *value.values()):
        if not isinstance(part, str) or len(part) > MAX_SWITCH_BYTES or _SWITCH.fullmatch(part) is None:
            raise RemoteProtocolError(f"{what}: a name or value is not 1 to {MAX_SWITCH_BYTES} of a-z 0-9 _ . + -")
    return value


def _software_from(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_SOFTWARE:
        raise RemoteProtocolError(f"observation software is no map of at most {MAX_SOFTWARE} versions")
    return {
        name(program, MAX_SWITCH_BYTES, "software name"): name(version, MAX_SWITCH_BYTES, "software version")
        for program, version in value.items()
    }
