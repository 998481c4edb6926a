"""Observations: what others take, and what they do not."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol import limits
from protocol.canonical import decode, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.identity import BlockRange, JobId, ModelId, peer_id_from_public_key
from protocol.limits import MAX_CLOCK_SKEW_S, MAX_OBSERVATION_AGE_S, MAX_RECORD_BYTES, MAX_STAGES
from protocol.measurements import (
    Measurements,
    MethodInForce,
    ModelFacts,
    Observation,
    ObservationKind,
    StageObservation,
    TaskKind,
    Workload,
)
from protocol.messages import SessionStatistics
from protocol.observations import (
    BUCKET_S,
    OBSERVATION_KIND,
    OBSERVATIONS_TOPIC,
    bucket_of,
    check_countersignature,
    countersign,
    decode_verified_observation,
    oldest_bucket,
    sign_observation,
    verify_fresh_observation,
    verify_observation,
)
from protocol.records import sign
from tests.support.observations import BLOCKS, METHOD, NOW_S, job, key, observation, peer, signed


def payload_of(envelope: bytes) -> dict[str, Any]:
    outer = decode(envelope, max_bytes=MAX_RECORD_BYTES)
    assert isinstance(outer, dict)
    payload = decode(outer["payload"], max_bytes=MAX_RECORD_BYTES)
    assert isinstance(payload, dict)
    return payload


def resigned(observation_number: int = 0, **changes: Any) -> bytes:
    """Return a rightly signed envelope whose payload has other values; a dotted name goes into a map."""
    payload = payload_of(signed(observation_number).envelope)
    for path, value in changes.items():
        *outer, last = path.split("__")
        target = payload
        for part in outer:
            target = target[part]
        target[last] = value
    return sign(OBSERVATION_KIND, payload, key(0))


def test_observation_round_trip() -> None:
    made = signed(7, observer=1, stages=(2, 3))
    taken = verify_fresh_observation(made.envelope, NOW_S)
    assert taken == made
    assert taken.observation == observation(7, observer=1, stages=(2, 3))
    assert taken.observation.is_countersigned
    assert decode_verified_observation(made.envelope) == made


def test_observation_id_depends_on_content_only() -> None:
    assert signed(1).id == signed(1).id
    assert signed(1).id != signed(2).id
    assert signed(1, observer=1).id != signed(1, observer=2).id


def test_longest_route_fits_an_observation() -> None:
    made = signed(1, stages=range(MAX_STAGES))
    assert len(made.envelope) <= MAX_RECORD_BYTES
    assert verify_fresh_observation(made.envelope, NOW_S).observation.is_countersigned


def test_rejects_observation_signed_by_another_peer() -> None:
    with pytest.raises(LocalProtocolError, match="is signed by"):
        sign_observation(observation(observer=1), key(2))
    stolen = sign(OBSERVATION_KIND, payload_of(signed(1, observer=1).envelope), key(2))
    with pytest.raises(RemoteProtocolError, match="is signed by"):
        verify_observation(stolen)


def test_rejects_observation_with_any_byte_changed() -> None:
    envelope = signed(1, stages=(1, 2)).envelope
    for position in range(len(envelope)):
        broken = bytearray(envelope)
        broken[position] ^= 0x01
        with pytest.raises(RemoteProtocolError):
            verify_observation(bytes(broken))
    for length in range(len(envelope)):
        with pytest.raises(RemoteProtocolError):
            verify_observation(envelope[:length])


@pytest.mark.parametrize("what", ["job", "observer", "model", "method", "blocks", "hardware", "statistics"])
def test_countersignature_binds_job_observer_model_method_and_statistics(what: str) -> None:
    stage = observation().route[0]
    bound: dict[str, Any] = {
        "job": job(1),
        "observer": peer(0),
        "model": observation().model.model,
        "method": METHOD.name,
    }
    stage = countersign(replace(stage, peer=peer(5)), **bound, private_key=key(5))
    check_countersignature(stage, **bound)
    others: dict[str, Any] = {"job": job(2), "observer": peer(3), "model": "77" * 32, "method": "arithmetic=bf16"}
    if what in others:
        bound[what] = others[what]
    else:
        faster = replace(stage.statistics, compute_s=stage.statistics.compute_s / 2)
        values: dict[str, Any] = {"blocks": BlockRange(0, 1), "hardware": "gpu", "statistics": faster}
        stage = replace(stage, **{what: values[what]})
    with pytest.raises(RemoteProtocolError, match="countersignature"):
        check_countersignature(stage, **bound)


def test_rejects_forged_statistics_of_another_peer() -> None:
    made = observation(1, stages=(1, 2))
    first = made.route[0]
    forged = replace(first, statistics=replace(first.statistics, compute_s=0.001))
    with pytest.raises(LocalProtocolError, match="countersignature"):
        sign_observation(replace(made, route=(forged, *made.route[1:])), key(0))


def test_observation_without_countersignature_is_accepted_as_such() -> None:
    made = observation(1, stages=(1, 2))
    silent = replace(made.route[1], countersignature=None)
    taken = sign_observation(replace(made, route=(made.route[0], silent)), key(0))
    assert not taken.observation.is_countersigned
    assert signed(1).observation.is_countersigned, "the observer vouches for its own stage by signing the whole"


def test_tolerates_clock_skew_within_bounds() -> None:
    verify_fresh_observation(signed(issued_at_s=NOW_S + MAX_CLOCK_SKEW_S).envelope, NOW_S)
    with pytest.raises(RemoteProtocolError, match="in the future"):
        verify_fresh_observation(signed(issued_at_s=NOW_S + MAX_CLOCK_SKEW_S + 1).envelope, NOW_S)


def test_observations_expire_by_whole_buckets() -> None:
    oldest_s = oldest_bucket(NOW_S) * BUCKET_S
    assert NOW_S - MAX_OBSERVATION_AGE_S - BUCKET_S < oldest_s <= NOW_S - MAX_OBSERVATION_AGE_S
    verify_fresh_observation(signed(issued_at_s=oldest_s).envelope, NOW_S)
    with pytest.raises(RemoteProtocolError, match="too old"):
        verify_fresh_observation(signed(issued_at_s=oldest_s - 1).envelope, NOW_S)
    assert verify_observation(signed(issued_at_s=oldest_s - 1).envelope).bucket == bucket_of(oldest_s) - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "version is 3"),
        ({"version": True}, "version is not an integer"),
        ({"extra": 1}, "unknown field"),
        ({"kind": "guessed"}, "is not one of"),
        ({"issued_at_s": -1}, "expected"),
        ({"job": b"short"}, "16 bytes"),
        ({"workload__prompt_tokens": 0}, "expected"),
        ({"workload__prompt_tokens": 8190}, "8192 positions"),
        ({"workload__cached_tokens": 64}, "cached_tokens"),
        ({"workload__shared_prefix_share": 1.5}, "expected"),
        ({"workload__repetitiveness": -0.1}, "expected"),
        ({"workload__link_s": -1.0}, "expected"),
        ({"workload__concurrency": 0}, "expected"),
        ({"workload__objective": "fame"}, "is not one of"),
        ({"workload__task_kind": "sing"}, "is not one of"),
        ({"workload__task_kind": "generate"}, "left out at this value"),
        ({"workload__task_kind": "embed"}, "completion_tokens of an embedding"),
        ({"workload__completion_tokens": 0}, "no completion_tokens of a job that generates"),
        ({"model__hidden_size": 1 << 40}, "expected"),
        ({"model__active_expert_count": 8}, "active_expert_count"),
        ({"method__switches": {"a|b": "c"}}, "switches: a name or value"),
        ({"method__switches": {"a": "b=c"}}, "switches: a name or value"),
        ({"method__switches": {}}, "empty"),
        ({"method__switches": {f"switch{i}": "on" for i in range(17)}}, "expected 0 to 16"),
        ({"method__switches": {f"s{i}" + "x" * 30: "on" for i in range(16)}}, "longer than"),
        ({"software": {"torch": ""}}, "empty"),
        ({"software": ["torch"]}, "software is not a map"),
        ({"measurements__ttft_s": -0.1}, "expected"),
        ({"measurements__ttft_s": 1}, "ttft_s is not a float"),
        ({"measurements__ttft_s": 2.5}, "ttft_s and tpot_s add up"),
        ({"measurements__tpot_s": 0.01}, "ttft_s and tpot_s add up"),
        ({"measurements__total_s": 0.0}, "expected"),
        ({"measurements__total_s": 1e300}, "expected"),
        ({"measurements__tokens_per_s": 1.0}, "tokens_per_s"),
        ({"measurements__tokens_per_s": 100.0}, "tokens_per_s"),
        ({"measurements__log_ratio_to_baseline": -0.5}, "has a log_ratio_to_baseline"),
        ({"kind": "probe"}, "lacks its log_ratio_to_baseline"),
        ({"kind": "assigned"}, "lacks its log_ratio_to_baseline"),
        ({"route": []}, "no stages"),
        ({"route": "all"}, "route is not an array"),
    ],
)
def test_rejects_impossible_observations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=message):
        verify_observation(resigned(**changes))


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (SessionStatistics(steps=1, rows=1, compute_s=5.0), "compute_s is 5"),
        (SessionStatistics(steps=1, rows=1, queue_s=50.0), "queue_s 50"),
        (SessionStatistics(steps=5, rows=4), "are impossible"),
        (SessionStatistics(steps=5, rows=64 * 96 + 1), "are impossible"),
        (SessionStatistics(steps=0, rows=1), "are impossible|no step"),
        (SessionStatistics(steps=0, compute_s=0.1), "but no step"),
        (SessionStatistics(steps=-1), "expected"),
        (SessionStatistics(compute_s=float("nan")), "finite"),
    ],
)
def test_rejects_impossible_stage_statistics(statistics: SessionStatistics, message: str) -> None:
    made = observation()
    stage = replace(made.route[0], statistics=statistics)
    with pytest.raises(LocalProtocolError, match=message):
        sign_observation(replace(made, route=(stage,)), key(0))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 20), (21, BLOCKS)], "not contiguous"),
        ([(0, 20), (19, BLOCKS)], "not contiguous"),
        ([(30, BLOCKS), (0, 30)], "not contiguous"),
        ([(0, BLOCKS + 1)], "not contiguous"),
        ([(0, BLOCKS - 1)], "do not cover"),
        ([(1, BLOCKS)], "do not cover"),
    ],
)
def test_rejects_routes_that_do_not_cover_all_blocks_once(ranges: list[tuple[int, int]], message: str) -> None:
    made = observation()
    route = tuple(replace(made.route[0], blocks=BlockRange(*blocks)) for blocks in ranges)
    with pytest.raises(LocalProtocolError, match=message):
        sign_observation(replace(made, route=route), key(0))


def test_benchmark_may_cover_part_of_the_blocks() -> None:
    made = observation()
    part = replace(
        made,
        kind=ObservationKind.BENCH,
        route=(replace(made.route[0], blocks=BlockRange(3, 9)),),
        workload=replace(made.workload, concurrency=8),
        measurements=replace(made.measurements, tokens_per_s=100.0, log_ratio_to_baseline=-1.1),
    )
    assert sign_observation(part, key(0)).observation == part


def test_single_token_has_no_tpot() -> None:
    made = observation()
    single = replace(
        made,
        workload=replace(made.workload, completion_tokens=1),
        measurements=replace(made.measurements, ttft_s=1.0, tpot_s=0.0, total_s=1.0, tokens_per_s=1.0),
    )
    assert sign_observation(single, key(0)).observation == single
    with pytest.raises(LocalProtocolError, match="tpot_s is not 0"):
        sign_observation(replace(single, measurements=replace(single.measurements, tpot_s=0.1)), key(0))


@pytest.mark.parametrize("kind", [TaskKind.EMBED, TaskKind.SCORE])
def test_job_without_text_is_measured_by_its_prompt(kind: TaskKind) -> None:
    made = observation()
    workload = replace(made.workload, completion_tokens=0, task_kind=kind)
    measured = replace(made.measurements, ttft_s=2.0, tpot_s=0.0, total_s=2.0, tokens_per_s=workload.prompt_tokens / 2)
    prefilled = replace(made, workload=workload, measurements=measured)
    assert sign_observation(prefilled, key(0)).observation == prefilled
    with pytest.raises(LocalProtocolError, match="tpot_s is not 0"):
        sign_observation(replace(prefilled, measurements=replace(measured, tpot_s=0.1)), key(0))
    with pytest.raises(LocalProtocolError, match="tokens_per_s"):
        sign_observation(replace(prefilled, measurements=replace(measured, tokens_per_s=0.0)), key(0))


def test_method_name_is_its_sorted_switches() -> None:
    method = MethodInForce(switches={"speculation": "ngram-4", "arithmetic": "bf16"}, stage_policy={})
    assert method.name == "arithmetic=bf16|speculation=ngram-4"


def test_rejects_record_of_another_kind_as_observation() -> None:
    payload = payload_of(signed().envelope)
    with pytest.raises(RemoteProtocolError, match="was expected"):
        verify_observation(sign("heartbeat", payload, key(0)))


def test_rejects_non_canonical_observation() -> None:
    outer = decode(signed().envelope, max_bytes=MAX_RECORD_BYTES)
    assert isinstance(outer, dict)
    canonical: bytes = outer["payload"]
    assert canonical.startswith(b"\x8b")
    # The same map with its length in three bytes instead of one.
    outer["payload"] = b"\xde\x00\x0b" + canonical[1:]
    outer["signature"] = key(0).sign(b"metaswarm/1/observation\n" + outer["payload"])
    with pytest.raises(RemoteProtocolError, match="canonical"):
        verify_observation(encode(outer))


def test_rejects_malformed_stored_observations() -> None:
    with pytest.raises(RemoteProtocolError):
        decode_verified_observation(b"")
    with pytest.raises(RemoteProtocolError):
        decode_verified_observation(encode({"payload": "text"}))
    with pytest.raises(RemoteProtocolError):
        decode_verified_observation(encode({"payload": encode({"version": 1})}))


EXAMPLE_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
EXAMPLE = sign_observation(
    Observation(
        version=1,
        observer=peer_id_from_public_key(EXAMPLE_KEY.public_key().public_bytes_raw()),
        job=JobId(bytes(range(16)).hex()),
        kind=ObservationKind.SERVED,
        issued_at_s=1_700_000_000,
        model=ModelFacts(
            model=ModelId("ab" * 32),
            architecture="llama",
            block_count=30,
            hidden_size=576,
            vocabulary_size=49152,
            max_positions=8192,
            weight_bytes=1 << 20,
        ),
        workload=Workload(prompt_tokens=8, completion_tokens=3),
        method=MethodInForce(switches={"arithmetic": "fp32"}, stage_policy={"batching": "one"}),
        measurements=Measurements(ttft_s=0.5, tpot_s=0.25, total_s=1.0, tokens_per_s=3.0),
        route=(
            countersign(
                StageObservation(
                    peer=peer_id_from_public_key(EXAMPLE_KEY.public_key().public_bytes_raw()),
                    blocks=BlockRange(0, 30),
                    hardware="cpu",
                    statistics=SessionStatistics(steps=3, rows=10, compute_s=0.75, bytes_in=40, bytes_out=24),
                ),
                job=JobId(bytes(range(16)).hex()),
                observer=peer_id_from_public_key(EXAMPLE_KEY.public_key().public_bytes_raw()),
                model=ModelId("ab" * 32),
                method="arithmetic=fp32",
                private_key=EXAMPLE_KEY,
            ),
        ),
        software={"metaswarm": "0.1.0"},
    ),
    EXAMPLE_KEY,
)
DOCUMENT = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()


def test_documented_observation_matches_the_signed_bytes() -> None:
    (documented,) = re.findall(r"```observation\n([0-9a-f\n]+)```", DOCUMENT)
    assert bytes.fromhex(documented) == EXAMPLE.envelope
    assert EXAMPLE.id.hex() in DOCUMENT


def test_limits_named_in_the_document_are_defined() -> None:
    section = DOCUMENT.split("\n### Observations\n")[1].split("\n## ")[0]
    assert f"`{OBSERVATIONS_TOPIC}`" in section
    for limit in re.findall(r"`(MAX_[A-Z_]+)`", section):
        assert hasattr(limits, limit), limit
        assert f"| `{limit}` | " in DOCUMENT, limit
