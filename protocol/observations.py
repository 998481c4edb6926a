"""Performance observations as they travel and are stored: signed, countersigned, named by their content.

An observation is signed by its observer (the coordinator of a job, or the peer that ran a benchmark) and does not
expire by itself. Each stage of the route countersigns its own statistics together with the job, the observer and the
method, so that no peer can invent measurements of another peer's hardware. The id is the sha256 of the signed bytes:
it identifies the content, and receiving an observation twice changes nothing.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Final, NewType

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.canonical import decode, decode_canonical, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.identity import JobId, ModelId, PeerId, public_key_of
from protocol.limits import MAX_CLOCK_SKEW_S, MAX_OBSERVATION_AGE_S, MAX_RECORD_BYTES
from protocol.measurements import Observation, StageObservation
from protocol.records import payload_of, sign, verify_envelope
from protocol.schema import from_map, to_array, to_map
from protocol.signatures import is_valid_signature

OBSERVATION_KIND: Final = "observation"
"""The kind in an observation's envelope."""

OBSERVATIONS_TOPIC: Final = "metaswarm/1/observations"
"""The gossip topic of observations."""

BUCKET_S: Final = 3600
"""Observations are compared, and expire, by the hour of their issue."""

_COUNTERSIGNED: Final = b"metaswarm/1/countersignature\n"

ObservationId = NewType("ObservationId", bytes)
"""The sha256 of an observation's signed bytes, 32 bytes."""


@dataclass(frozen=True, slots=True)
class SignedObservation:
    """An observation with verified signatures, its id, and the envelope in which it travels and is stored."""

    id: ObservationId
    observation: Observation
    envelope: bytes

    @property
    def bucket(self) -> int:
        """The hour of its issue."""
        return bucket_of(self.observation.issued_at_s)


def bucket_of(issued_at_s: int) -> int:
    """Return the bucket of a Unix time."""
    return issued_at_s // BUCKET_S


def oldest_bucket(now_s: float) -> int:
    """Return the first bucket that is still accepted. Clocks differ: peers compare only buckets after it."""
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
    """Return a stage's statistics with its signature; the key is that of `stage.peer`. `method`: its canonical name."""
    signature = private_key.sign(_countersigned_bytes(stage, job, observer, model, method))
    return replace(stage, countersignature=signature)


def check_countersignature(
    stage: StageObservation, *, job: JobId, observer: PeerId, model: ModelId, method: str
) -> None:
    """Raise RemoteProtocolError unless the stage's peer signed these statistics for this job, observer and method."""
    message = _countersigned_bytes(stage, job, observer, model, method)
    if not is_valid_signature(message, stage.countersignature or b"", public_key_of(stage.peer)):
        raise RemoteProtocolError(f"observation: the countersignature of {stage.peer} is invalid")


def sign_observation(observation: Observation, private_key: Ed25519PrivateKey) -> SignedObservation:
    """Return a signed observation. Raises LocalProtocolError for one that peers would reject."""
    envelope = sign(OBSERVATION_KIND, to_map(observation), private_key)
    try:
        return verify_observation(envelope)
    except RemoteProtocolError as error:
        raise LocalProtocolError(str(error)) from None


def verify_fresh_observation(envelope: bytes, now_s: float) -> SignedObservation:
    """Return the observation in an envelope from a peer.

    `now_s`: Unix time by our clock. Raises RemoteProtocolError for an invalid form, version, signature or value, and
    for a time in the future or too far in the past.
    """
    signed = verify_observation(envelope)
    issued_at_s = signed.observation.issued_at_s
    if issued_at_s > now_s + MAX_CLOCK_SKEW_S:
        raise RemoteProtocolError(f"observation was issued {issued_at_s - now_s:.0f} s in the future")
    if signed.bucket < oldest_bucket(now_s):
        raise RemoteProtocolError(f"observation was issued {now_s - issued_at_s:.0f} s ago: too old")
    return signed


def verify_observation(envelope: bytes) -> SignedObservation:
    """Return the observation in an envelope like `verify_fresh_observation`, whenever it was issued."""
    payload, signer = verify_envelope(envelope, OBSERVATION_KIND)
    observation = from_map(Observation, decode_canonical(payload, max_bytes=MAX_RECORD_BYTES), OBSERVATION_KIND)
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


def decode_verified_observation(envelope: bytes) -> SignedObservation:
    """Return an observation that was verified before it was stored, without verifying its signatures again.

    Raises RemoteProtocolError for what cannot have been verified.
    """
    payload = payload_of(envelope)
    observation = from_map(Observation, decode(payload, max_bytes=MAX_RECORD_BYTES), OBSERVATION_KIND)
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
            "statistics": to_array(stage.statistics),
        }
    )
