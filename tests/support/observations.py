"""Observations to test with: plausible, signed, as many as one likes."""

import hashlib
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.identity import BlockRange, JobId, ModelId, PeerId, peer_id_from_public_key
from protocol.measurements import (
    Measurements,
    MethodInForce,
    ModelFacts,
    Observation,
    ObservationKind,
    StageObservation,
    Workload,
)
from protocol.messages import SessionStatistics
from protocol.observations import SignedObservation, countersign, sign_observation

NOW_S = 1_750_000_000
BLOCKS = 64
METHOD = MethodInForce(
    switches={"arithmetic": "fp32", "speculation": "off"}, stage_policy={"batching": "one", "engine": "torch"}
)


def key(number: int) -> Ed25519PrivateKey:
    """Return the private key of the peer with this number."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"peer {number}".encode()).digest())


def peer(number: int) -> PeerId:
    """Return the id of the peer with this number."""
    return peer_id_from_public_key(key(number).public_key().public_bytes_raw())


def job(number: int) -> JobId:
    """Return the id of the job with this number."""
    return JobId(f"{number:032x}")


def observation(
    number: int = 0, *, observer: int = 0, issued_at_s: int = NOW_S, stages: Sequence[int] = ()
) -> Observation:
    """Return what a peer observed of a job that it served by itself, or over stages at these peers, countersigned."""
    model = ModelFacts(
        model=ModelId("5a" * 32),
        architecture="llama",
        block_count=BLOCKS,
        hidden_size=576,
        vocabulary_size=49_152,
        max_positions=8192,
        weight_bytes=538_060_800,
        intermediate_size=1536,
        head_count=9,
        kv_head_count=3,
    )
    peers = stages or [observer]
    ends = [BLOCKS * (stage + 1) // len(peers) for stage in range(len(peers))]
    route = [
        StageObservation(
            peer=peer(number),
            blocks=BlockRange(start, end),
            hardware="cpu amd64 2 cores avx512",
            statistics=SessionStatistics(
                steps=32, rows=95, compute_s=0.5, queue_s=0.02, bytes_in=218_880, bytes_out=218_880
            ),
            round_trip_s=0.0006,
        )
        for number, start, end in zip(peers, [0, *ends], ends, strict=False)
    ]
    if stages:
        route = [
            countersign(
                stage,
                job=job(number),
                observer=peer(observer),
                model=model.model,
                method=METHOD.name,
                private_key=key(at),
            )
            for stage, at in zip(route, stages, strict=True)
        ]
    return Observation(
        observer=peer(observer),
        job=job(number),
        kind=ObservationKind.SERVED,
        issued_at_s=issued_at_s,
        model=model,
        workload=Workload(prompt_tokens=64, completion_tokens=32),
        method=METHOD,
        measurements=Measurements(ttft_s=0.4, tpot_s=0.05, total_s=1.95, tokens_per_s=32 / 1.95),
        route=tuple(route),
        software={"metaswarm": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
    )


def signed(
    number: int = 0, *, observer: int = 0, issued_at_s: int = NOW_S, stages: Sequence[int] = ()
) -> SignedObservation:
    """Return `observation`, signed by its observer."""
    made = observation(number, observer=observer, issued_at_s=issued_at_s, stages=stages)
    return sign_observation(made, key(observer))
