"""Observations of every shape: they arrive as they were sent, and whatever is wrong with one is the sender's fault."""

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.canonical import decode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.identity import BlockRange, JobId, ModelId
from protocol.limits import MAX_INTEGER, MAX_RECORD_BYTES
from protocol.measurements import (
    Measurements,
    MethodInForce,
    ModelFacts,
    Objective,
    Observation,
    ObservationKind,
    QualityBound,
    StageObservation,
    TaskKind,
    Workload,
)
from protocol.messages import SessionStatistics
from protocol.observations import (
    OBSERVATION_KIND,
    bucket_of,
    countersign,
    decode_verified_observation,
    sign_observation,
    verify_fresh_observation,
    verify_observation,
)
from protocol.records import sign
from tests.support.observations import key, peer, signed

names = st.from_regex(r"[a-z0-9_.+-]{1,12}", fullmatch=True)
versions = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=16)
positive = st.integers(1, 4096)
seconds = st.floats(0.0, 100.0)


@st.composite
def observations(draw: st.DrawFn) -> tuple[Observation, int]:
    """Draw an observation of any kind, countersigned by some of its stages, and its observer's number."""
    observer = draw(st.integers(0, 3))
    kind = draw(st.sampled_from(ObservationKind))
    task_kind, prompt = draw(st.sampled_from(TaskKind)), draw(positive)
    least, most = (0, 0) if task_kind is TaskKind.EMBED else (1 if task_kind is TaskKind.GENERATE else 0, 4096)
    completion = draw(st.integers(least, most))
    ends = sorted(draw(st.sets(st.integers(1, 64), min_size=1, max_size=4)))
    model = ModelFacts(
        model=ModelId(draw(st.binary(min_size=32, max_size=32)).hex()),
        architecture=draw(names),
        block_count=ends[-1],
        hidden_size=draw(positive),
        vocabulary_size=draw(positive),
        max_positions=prompt + completion + draw(st.integers(0, 100)),
        weight_bytes=draw(st.integers(0, MAX_INTEGER)),
        intermediate_size=draw(st.none() | positive),
        head_count=draw(st.none() | positive),
        kv_head_count=draw(st.none() | positive),
    )
    ttft_s, tpot_s = draw(st.floats(0.001, 100.0)), draw(seconds) if completion > 1 else 0.0
    total_s = ttft_s + tpot_s * (completion - 1)
    together = 1.0 if kind is ObservationKind.SERVED else draw(st.floats(1.0, 64.0))
    compared = kind in {ObservationKind.PROBE, ObservationKind.ASSIGNED}
    method = MethodInForce(
        switches=draw(st.dictionaries(names, names, min_size=1, max_size=5)),
        stage_policy=draw(st.dictionaries(names, names, max_size=3)),
    )
    made = Observation(
        observer=peer(observer),
        job=JobId(draw(st.binary(min_size=16, max_size=16)).hex()),
        kind=kind,
        issued_at_s=draw(st.integers(0, 1 << 33)),
        model=model,
        workload=Workload(
            prompt_tokens=prompt,
            completion_tokens=completion,
            cached_tokens=draw(st.integers(0, prompt - 1)),
            concurrency=draw(positive),
            shared_prefix_share=draw(st.floats(0.0, 1.0)),
            repetitiveness=draw(st.floats(0.0, 1.0)),
            link_s=draw(st.floats(0.0, 1e9)),
            objective=draw(st.sampled_from(Objective)),
            quality=draw(st.sampled_from(QualityBound)),
            task_kind=task_kind,
        ),
        method=method,
        measurements=Measurements(
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            total_s=total_s,
            tokens_per_s=(completion or prompt) / total_s * together,
            log_ratio_to_baseline=draw(st.floats(-20, 20)) if compared else None,
            replays=draw(st.integers(0, 5)),
        ),
        route=(),
        software=draw(st.dictionaries(names, versions, max_size=4)),
    )
    route = []
    for start, end in zip([0, *ends], ends, strict=False):
        number = draw(st.integers(0, 3))
        steps = draw(st.integers(0, completion))
        stage = StageObservation(
            peer=peer(number),
            blocks=BlockRange(start, end),
            hardware=draw(names),
            statistics=SessionStatistics(
                steps=steps,
                rows=draw(st.integers(steps, prompt + completion)) if steps else 0,
                compute_s=draw(st.floats(0.0, total_s)) if steps else 0.0,
                queue_s=draw(st.floats(0.0, total_s)),
                bytes_in=draw(st.integers(0, MAX_INTEGER)),
                bytes_out=draw(st.integers(0, MAX_INTEGER)),
            ),
            round_trip_s=draw(st.none() | seconds),
        )
        if draw(st.booleans()):
            stage = countersign(
                stage,
                job=made.job,
                observer=made.observer,
                model=model.model,
                method=method.name,
                private_key=key(number),
            )
        route.append(stage)
    return replace(made, route=tuple(route)), observer


@settings(max_examples=150, deadline=None)
@given(observations())
def test_observation_round_trip(drawn: tuple[Observation, int]) -> None:
    made, observer = drawn
    sent = sign_observation(made, key(observer))
    assert verify_fresh_observation(sent.envelope, made.issued_at_s) == sent
    assert decode_verified_observation(sent.envelope) == sent
    assert sent.observation == made
    assert sent.bucket == bucket_of(made.issued_at_s)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.builds(lambda data: signed(1, stages=(1,)).envelope[:500] + data, st.binary()))
def test_garbage_raises_only_remote_errors(data: bytes) -> None:
    for reader in (verify_observation, decode_verified_observation):
        try:
            reader(data)
        except RemoteProtocolError:
            continue
        raise AssertionError("garbage was read")


wild = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=80)
    | st.binary(max_size=80),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_rejects_signed_nonsense(data: st.DataObject) -> None:
    """Whatever an observer puts in place of whichever value: it is taken and read back the same, or it is its fault."""
    payload: Any = _payload()
    holder, place = data.draw(st.sampled_from(list(_places(payload))))
    if data.draw(st.booleans()):
        holder[place] = data.draw(wild)
    elif isinstance(holder, dict):
        del holder[place]
    else:
        holder.insert(place, data.draw(wild))
    try:
        envelope = sign(OBSERVATION_KIND, payload, key(0))
    except LocalProtocolError:
        return  # too deep, or text that is no UTF-8: nobody can send it
    try:
        taken = verify_observation(envelope)
    except RemoteProtocolError:
        return
    assert sign_observation(taken.observation, key(0)).envelope == envelope


def _payload() -> dict[str, Any]:
    outer = decode(signed(1, stages=(1, 2)).envelope, max_bytes=MAX_RECORD_BYTES)
    assert isinstance(outer, dict)
    payload = decode(outer["payload"], max_bytes=MAX_RECORD_BYTES)
    assert isinstance(payload, dict)
    return payload


def _places(value: Any) -> Any:
    """Yield every value inside a value, by what holds it and where."""
    for place, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, place
        if isinstance(inner, (dict, list)):
            yield from _places(inner)
