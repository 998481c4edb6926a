"""The history as a dataset: one observation a line for people and their tools, with the signed record to prove it.

The readable fields serve analysis; `record` is the signed envelope, base64. What is read back is the envelope, and the
fields must agree with it: a file that somebody has edited is found out.
"""

import base64
import json
from typing import Any, Final

from protocol.errors import RemoteProtocolError
from protocol.limits import MAX_RECORD_BYTES
from protocol.measurements import Observation, StageObservation
from protocol.observations import SignedObservation, verify_observation

MAX_LINE_BYTES: Final = 8 * MAX_RECORD_BYTES
"""A line of a dataset, whose record is there twice, the second time in base64."""


class DatasetError(Exception):
    """A line or row of a dataset is not what it says. The message is one line."""


def to_row(signed: SignedObservation) -> dict[str, Any]:
    """Return an observation in plain values: JSON can say it, and so can a table with nested columns."""
    observation = signed.observation
    return {
        "id": signed.id.hex(),
        **to_fields(observation),
        "record": base64.b64encode(signed.envelope).decode("ascii"),
    }


def to_fields(observation: Observation) -> dict[str, Any]:
    """Return the readable fields of an observation; durations are seconds, `issued_at_s` is Unix time."""
    model, workload, measured = observation.model, observation.workload, observation.measurements
    return {
        "observer": observation.observer,
        "job": observation.job,
        "kind": observation.kind.value,
        "issued_at_s": observation.issued_at_s,
        "countersigned": observation.is_countersigned,
        "model": {
            "id": model.model,
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
            "shared_prefix_share": workload.shared_prefix_share,
            "repetitiveness": workload.repetitiveness,
            "link_s": workload.link_s,
            "objective": workload.objective.value,
            "quality": workload.quality.value,
        },
        "method": {
            "name": observation.method.name,
            "switches": dict(observation.method.switches),
            "stage_policy": dict(observation.method.stage_policy),
        },
        "measurements": {
            "ttft_s": measured.ttft_s,
            "tpot_s": measured.tpot_s,
            "total_s": measured.total_s,
            "tokens_per_s": measured.tokens_per_s,
            "log_ratio_to_baseline": measured.log_ratio_to_baseline,
            "replays": measured.replays,
        },
        "route": [_stage_to_fields(stage) for stage in observation.route],
        "software": dict(observation.software),
    }


def from_line(line: bytes, now_s: float) -> SignedObservation:
    """Return the observation in a line of JSON, verified like one from a peer. Raises DatasetError.

    `now_s`: Unix time by our clock.
    """
    if len(line) > MAX_LINE_BYTES:
        raise DatasetError(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"no JSON: {error}") from None
    if not isinstance(row, dict):
        raise DatasetError("no JSON object")
    return from_row(row, now_s)


def from_row(row: dict[str, Any], now_s: float) -> SignedObservation:
    """Return the observation in a row, verified like one from a peer. Raises DatasetError."""
    record = row.get("record")
    if not isinstance(record, str):
        raise DatasetError("lacks the signed record")
    try:
        signed = verify_observation(base64.b64decode(record, validate=True), now_s)
    except (RemoteProtocolError, ValueError) as error:
        raise DatasetError(str(error)) from None
    expected = to_row(signed)
    for key in row.keys() | expected.keys():
        if key not in row or key not in expected or row[key] != expected[key]:
            raise DatasetError(f"{key[:80]!r} is not what was signed")
    return signed


def _stage_to_fields(stage: StageObservation) -> dict[str, Any]:
    return {
        "peer": stage.peer,
        "start": stage.blocks.start,
        "end": stage.blocks.end,
        "hardware": stage.hardware,
        "steps": stage.statistics.steps,
        "rows": stage.statistics.rows,
        "compute_s": stage.statistics.compute_s,
        "queue_s": stage.statistics.queue_s,
        "bytes_in": stage.statistics.bytes_in,
        "bytes_out": stage.statistics.bytes_out,
        "round_trip_s": stage.round_trip_s,
        "countersigned": stage.countersignature is not None,
    }
