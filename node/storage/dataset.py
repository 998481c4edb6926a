"""The history as a dataset: one observation per line of JSON, with the signed record that proves it.

The readable fields serve analysis; `record` is the signed envelope, base64. Only the envelope is read back, and the
fields must agree with it, so that an edited file is rejected.
"""

import base64
import json
from typing import Any, Final

from protocol.errors import RemoteProtocolError
from protocol.limits import MAX_RECORD_BYTES
from protocol.observations import SignedObservation, verify_fresh_observation, verify_observation
from protocol.schema import to_map

MAX_LINE_BYTES: Final = 8 * MAX_RECORD_BYTES
"""A line holds its record twice: as fields, and in base64."""


class DatasetError(Exception):
    """A line of a dataset is invalid. The message is one line."""


class NotAnObservationError(DatasetError):
    """A line has no record at all: it may be of a file that is not a dataset."""


def to_row(signed: SignedObservation) -> dict[str, Any]:
    """Return an observation as plain values for JSON; durations are seconds, `issued_at_s` is Unix time."""
    observation = signed.observation
    wire = to_map(observation)
    return {
        "id": signed.id.hex(),
        "observer": observation.observer,
        "job": observation.job,
        "kind": wire["kind"],
        "issued_at_s": observation.issued_at_s,
        "countersigned": observation.is_countersigned,
        "model": {**wire["model"], "id": observation.model.model},
        "workload": {**wire["workload"], "task_kind": observation.workload.task_kind.value},
        "method": {"name": observation.method.name, **wire["method"]},
        "measurements": wire["measurements"],
        "route": [
            {
                "peer": stage.peer,
                "start": stage.blocks.start,
                "end": stage.blocks.end,
                "hardware": stage.hardware,
                **to_map(stage.statistics),
                "round_trip_s": stage.round_trip_s,
                "countersigned": stage.countersignature is not None,
            }
            for stage in observation.route
        ],
        "software": wire["software"],
        "record": base64.b64encode(signed.envelope).decode("ascii"),
    }


def from_line(line: bytes, now_s: float | None) -> SignedObservation:
    """Return the observation in a line of JSON, verified like one from a peer. Raises DatasetError.

    `now_s`: Unix time by our clock; None for an observation of any age.
    """
    if len(line) > MAX_LINE_BYTES:
        raise NotAnObservationError(f"the line has {len(line)} bytes: at most {MAX_LINE_BYTES} are accepted")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NotAnObservationError(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise NotAnObservationError("not a JSON object")
    record = row.get("record")
    if not isinstance(record, str):
        raise NotAnObservationError("the field 'record' with the signed record is missing")
    try:
        envelope = base64.b64decode(record, validate=True)
        signed = verify_observation(envelope) if now_s is None else verify_fresh_observation(envelope, now_s)
    except (RemoteProtocolError, ValueError) as error:
        raise DatasetError(str(error)) from None
    expected = to_row(signed)
    for key in row.keys() | expected.keys():
        if key not in row or key not in expected or row[key] != expected[key]:
            raise DatasetError(f"the field {key[:80]!r} differs from the signed record")
    return signed
