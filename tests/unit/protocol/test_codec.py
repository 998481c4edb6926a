import copy
import math
import struct
from collections.abc import Callable
from typing import Any

import pytest

from protocol.canonical import decode, encode
from protocol.codec import decode_control, decode_step_header, encode_control, encode_step_header
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.identity import BlockRange, JobId, ModelId, SessionId
from protocol.limits import (
    MAX_BALLOTS,
    MAX_CONTEXT,
    MAX_CONTROL_BYTES,
    MAX_DRAFTS,
    MAX_NAME_BYTES,
    MAX_POSITIONS,
    MAX_PREFIX_BYTES,
    MAX_SLICES,
    MAX_STAGES,
    MAX_STEP_BYTES,
    MAX_STOP_TOKENS,
    MAX_TEXT_BYTES,
    MAX_VOCABULARY,
    MAX_VOTES,
    MAX_WIDTH,
    MAX_WINDOW_BYTES,
)
from protocol.messages import (
    Close,
    ControlMessage,
    Credit,
    Failed,
    FailureReason,
    FinishReason,
    Hello,
    Load,
    Open,
    Opened,
    Ping,
    Slice,
    Step,
)
from protocol.tensors import DType, Tensor, tensor_from_tokens
from tests.unit.protocol.job_streams import LOAD, MESSAGES, PEER

JOB = JobId("00112233445566778899aabbccddeeff")
SESSION = SessionId(JOB, 2)


def fields_of(name: str) -> dict[str, Any]:
    value = decode(encode_control(MESSAGES[name]), max_bytes=MAX_CONTROL_BYTES)
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("name", MESSAGES)
def test_control_message_round_trip(name: str) -> None:
    assert fields_of(name)["type"] == name
    assert decode_control(encode_control(MESSAGES[name])) == MESSAGES[name]


def test_optional_fields_are_omitted() -> None:
    middle = Open(
        session=SESSION, model=ModelId("0f" * 32), blocks=BlockRange(0, 1), methods=("m",), positions=1, downstream=PEER
    )
    fields = decode(encode_control(middle), max_bytes=MAX_CONTROL_BYTES)
    assert isinstance(fields, dict)
    assert not {"feedback", "sampling"} & fields.keys()
    assert decode_control(encode_control(middle)) == middle
    blameless = Failed(session=SESSION, reason=FailureReason.ENGINE, message="")
    assert decode_control(encode_control(blameless)) == blameless


@pytest.mark.parametrize("name", MESSAGES)
def test_rejects_missing_and_unknown_fields(name: str) -> None:
    fields = fields_of(name)
    optional = {"downstream", "feedback", "sampling", "continues", "peer", "countersignature", "statement"}
    for key in fields.keys() - optional:
        lacking = {other: value for other, value in fields.items() if other != key}
        with pytest.raises(RemoteProtocolError, match=r"lacks|type .* is unknown"):
            decode_control(encode(lacking))
    with pytest.raises(RemoteProtocolError, match="unknown field 'more'"):
        decode_control(encode({**fields, "more": 1}))


@pytest.mark.parametrize("name", MESSAGES)
def test_rejects_fields_of_another_type(name: str) -> None:
    fields = fields_of(name)
    for key, right in fields.items():
        for wrong in (None, True, 1, 1.0, "~", b"~", [], {}, [1, 2], {"~": 1}):
            if type(wrong) is type(right):
                continue
            with pytest.raises(RemoteProtocolError):
                decode_control(encode({**fields, key: wrong}))


SESSIONS = [[], [b"x" * 16], [b"x" * 15, 0], ["x" * 16, 0], [b"x" * 16, -1], [b"x" * 16, MAX_STAGES + 1],
            [b"x" * 16, True], [b"x" * 16, 0, 0]]  # fmt: skip

OUT_OF_RANGE = [
    *(("close", "session", session) for session in SESSIONS),
    ("hello", "agent", ""),
    ("hello", "agent", "a" * (MAX_NAME_BYTES + 1)),
    ("hello", "agent", "é" * (MAX_NAME_BYTES // 2 + 1)),
    ("hello", "agent", "a\nb"),
    ("hello", "agent", "\x1b[31m"),
    ("hello", "agent", "\x9b31m"),
    ("hello", "window_bytes", 0),
    ("hello", "window_bytes", -1),
    ("hello", "window_bytes", MAX_WINDOW_BYTES + 1),
    ("open", "model", b"x" * 31),
    ("open", "blocks", [0]),
    ("open", "blocks", [5, 5]),
    ("open", "blocks", [-1, 5]),
    ("open", "blocks", [0, 1025]),
    ("open", "blocks", [0, 1.0]),
    ("open", "methods", []),
    ("open", "methods", [""]),
    ("open", "methods", ["m", "m"]),
    ("open", "methods", [f"m{index}" for index in range(MAX_VOTES + 1)]),
    ("open", "methods", ["m" * (MAX_NAME_BYTES + 1)]),
    ("open", "context", {"": 1.0}),
    ("open", "context", {"a": 1}),
    ("open", "context", {"a": 1.1e18}),
    ("open", "context", {"a": "b" * (MAX_NAME_BYTES + 1)}),
    ("open", "context", {f"m{index}": 0.0 for index in range(MAX_CONTEXT + 1)}),
    ("open", "prefix", b"x" * 15),
    ("open", "prefix", b"x" * (MAX_PREFIX_BYTES + 16)),
    ("open", "positions", 0),
    ("open", "positions", MAX_POSITIONS + 1),
    ("open", "upstream", [PEER] * (MAX_STAGES + 1)),
    ("open", "upstream", ["Qm"]),
    ("open", "feedback", PEER + " "),
    ("open", "feedback", "1" * 52),
    ("open", "downstream", PEER),
    ("opened", "votes", {f"m{index}": 0.0 for index in range(MAX_VOTES + 1)}),
    ("opened", "votes", {"": 0.0}),
    ("opened", "votes", {"m" * (MAX_NAME_BYTES + 1): 0.0}),
    ("opened", "votes", {"m": 1}),
    ("opened", "votes", {"m": 1e10}),
    ("opened", "votes", {"m": -1e10}),
    ("opened", "votes", {}),
    ("opened", "cached", {"m": -1}),
    ("opened", "cached", {"m": MAX_POSITIONS + 1}),
    ("opened", "policy", {"m": ""}),
    ("opened", "policy", {"m": "v" * 65}),
    ("opened", "load", {}),
    ("begin", "method", ""),
    ("begin", "ballots", [[PEER]]),
    ("begin", "ballots", [[PEER, [1]]]),
    ("begin", "ballots", [[PEER, [1e10]]]),
    ("begin", "ballots", [["", [0.0]]]),
    ("begin", "ballots", [[PEER, [None] * (MAX_VOTES + 1)]]),
    ("begin", "ballots", [[PEER, []]] * (MAX_BALLOTS + 1)),
    ("begin", "start", -1),
    ("begin", "start", MAX_POSITIONS),
    ("refused", "reason", "bored"),
    ("refused", "message", "m" * (MAX_TEXT_BYTES + 1)),
    ("refused", "message", "two\nlines"),
    ("credit", "consumed_bytes", 0),
    ("credit", "consumed_bytes", -1),
    ("credit", "consumed_bytes", MAX_WINDOW_BYTES + 1),
    ("failed", "reason", "full"),
    ("failed", "peer", ""),
    ("ping", "nonce", -1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), OUT_OF_RANGE)
def test_rejects_fields_out_of_bounds(name: str, key: str, value: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_control(encode({**fields_of(name), key: value}))


@pytest.mark.parametrize(
    ("name", "outer", "key", "value"),
    [
        ("open", "sampling", "temperature", -0.1),
        ("open", "sampling", "temperature", 101.0),
        ("open", "sampling", "temperature", 1),
        ("open", "sampling", "top_p", 0.0),
        ("open", "sampling", "top_p", 1.1),
        ("open", "sampling", "seed", -1),
        ("open", "sampling", "max_tokens", 0),
        ("open", "sampling", "max_tokens", MAX_POSITIONS + 1),
        ("open", "sampling", "stop_tokens", [-1]),
        ("open", "sampling", "stop_tokens", [MAX_VOCABULARY]),
        ("open", "sampling", "stop_tokens", [0] * (MAX_STOP_TOKENS + 1)),
        ("open", "sampling", "more", 1),
        ("opened", "load", "sessions", -1),
        ("opened", "load", "sessions", 1 << 53),
        ("opened", "load", "queued_rows", True),
        ("opened", "load", "step_s", -1.0),
        ("opened", "load", "step_s", 1e10),
        ("opened", "load", "more", 1),
        ("closed", "statistics", "steps", -1),
        ("closed", "statistics", "bytes_out", 1 << 53),
        ("closed", "statistics", "compute_s", 0),
        ("closed", "statistics", "more", 1),
    ],
)
def test_rejects_nested_fields_out_of_bounds(name: str, outer: str, key: str, value: Any) -> None:
    fields = fields_of(name)
    fields[outer][key] = value
    with pytest.raises(RemoteProtocolError):
        decode_control(encode(fields))


def test_open_has_either_sampling_or_downstream() -> None:
    fields = fields_of("open")
    del fields["sampling"]
    with pytest.raises(RemoteProtocolError, match="last stage"):
        decode_control(encode(fields))
    middle = decode_control(encode({**fields, "downstream": PEER}))
    assert isinstance(middle, Open)
    assert middle.downstream == PEER


@pytest.mark.parametrize(
    "body", [b"\xc0", b"\x90", b"\x80", b"\x81\xa4type\x01", b"\x81\xa4type\xa4step", b"\xc1", b""]
)
def test_rejects_malformed_control_frames(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_control(body)


@pytest.mark.parametrize(
    "message",
    [
        Hello(agent="", window_bytes=1),
        Hello(agent="a\tb", window_bytes=1),
        Hello(agent="\ud800", window_bytes=1),
        Hello(agent="a", window_bytes=MAX_WINDOW_BYTES + 1),
        Close(session=SessionId(JOB, -1)),
        Close(session=SessionId(JobId("zz"), 0)),
        Close(session=SessionId(JobId("00"), 0)),
        Credit(session=SESSION, consumed_bytes=0),
        Ping(nonce=1 << 64),
        Opened(session=SESSION, load=LOAD, votes={"m": math.nan}),
        Opened(session=SESSION, load=Load(step_s=math.inf), votes={"m": 0.0}),
        Opened(session=SESSION, load=LOAD, votes={}),
    ],
)
def test_encoder_applies_the_checks_of_the_decoder(message: ControlMessage) -> None:
    with pytest.raises(LocalProtocolError):
        encode_control(message)


def test_failure_text_is_sanitised_and_truncated() -> None:
    said = Failed(
        session=SESSION, reason=FailureReason.ENGINE, message="Traceback:\n\x1b[31m" + "é\udcff" * MAX_TEXT_BYTES
    )
    heard = decode_control(encode_control(said))
    assert isinstance(heard, Failed)
    assert heard.message.startswith("Traceback:  [31mé?é?")
    assert len(heard.message.encode()) <= MAX_TEXT_BYTES


def test_integers_in_float_fields_are_encoded_as_floats() -> None:
    message = Opened(session=SESSION, load=Load(step_s=1), votes={"m": 2})
    assert decode_control(encode_control(message)) == message


# Steps


def step(*slices: Slice, width: int = 4, dtype: DType = DType.FLOAT32) -> Step:
    rows = sum(part.rows for part in slices)
    return Step(slices=slices, tensor=Tensor(dtype, (rows, width), bytes(rows * dtype.row_bytes(width))))


def part(stage: int = 0, position: int = 0, rows: int = 1, draws: int = 0) -> Slice:
    return Slice(session=SessionId(JOB, stage), position=position, rows=rows, draws=draws)


def header_of(message: Step) -> dict[str, Any]:
    value = decode(encode_step_header(message), max_bytes=MAX_CONTROL_BYTES)
    assert isinstance(value, dict)
    return copy.deepcopy(value)


@pytest.mark.parametrize(
    "message",
    [
        step(part(1, 5, 3, 1), part(2, 0, 2, 2)),
        step(part(), width=MAX_WIDTH, dtype=DType.INT8),
        step(part(position=MAX_POSITIONS - 1)),
        step(*(part(0), *(Slice(session=SessionId(JobId(f"{n:032x}"), 0), position=0, rows=1) for n in range(1, 256)))),
        Step(slices=(part(rows=2),), tensor=tensor_from_tokens([0, MAX_VOCABULARY - 1])),
        Step(
            slices=(Slice(session=SESSION, position=9, rows=1, draws=0, finish_reason=FinishReason.STOP),),
            tensor=tensor_from_tokens([7]),
        ),
    ],
)
def test_step_header_round_trip(message: Step) -> None:
    header = decode_step_header(encode_step_header(message))
    assert header.payload_bytes == len(message.tensor.data)
    assert header.step(bytes(message.tensor.data)) == message


def test_decode_step_header_is_small() -> None:
    assert len(encode_step_header(step(part(position=100_000), width=8192))) < 100


def test_largest_step_header_fits_a_control_frame() -> None:
    slices = [
        Slice(session=SessionId(JobId(f"{n:032x}"), 64), position=900_000, rows=70_000, draws=MAX_DRAFTS + 1,
              drafts=(MAX_VOCABULARY - 1,) * MAX_DRAFTS, finish_reason=FinishReason.LENGTH)
        for n in range(MAX_SLICES)
    ]  # fmt: skip
    assert len(encode_step_header(step(*slices, width=1, dtype=DType.INT8))) <= MAX_CONTROL_BYTES


def with_slice(index: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header["slices"][0][index] = value

    return change


def with_field(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[key] = value

    return change


def duplicate(header: dict[str, Any]) -> None:
    header["slices"][1] = header["slices"][0]


@pytest.mark.parametrize(
    "change",
    [
        with_slice(0, b"x" * 15),
        with_slice(0, JOB),
        with_slice(1, -1),
        with_slice(1, MAX_STAGES + 1),
        with_slice(2, -1),
        with_slice(2, MAX_POSITIONS),
        with_slice(2, MAX_POSITIONS - 1),
        with_slice(2, 1.0),
        with_slice(3, 0),
        with_slice(3, -1),
        with_slice(3, 3),
        with_slice(3, True),
        with_slice(4, -1),
        with_slice(4, 3),
        with_slice(5, None),
        with_slice(5, [7]),
        with_slice(5, [-1]),
        with_slice(5, [MAX_VOCABULARY]),
        with_slice(6, "bored"),
        with_slice(6, False),
        duplicate,
        with_field("slices", []),
        with_field("slices", {}),
        with_field("slices", [[]]),
        with_field("dtype", "f64"),
        with_field("dtype", "i32"),
        with_field("dtype", 1),
        with_field("shape", []),
        with_field("shape", [4]),
        with_field("shape", [4, 0]),
        with_field("shape", [4, MAX_WIDTH + 1]),
        with_field("shape", [4, -4]),
        with_field("shape", [-4, -4]),
        with_field("shape", [4, 4, 1]),
        with_field("shape", [5, 4]),
        with_field("shape", [4.0, 4]),
        with_field("shape", [1 << 63, MAX_WIDTH]),
        with_field("more", 1),
    ],
)
def test_rejects_invalid_step_headers(change: Callable[[dict[str, Any]], None]) -> None:
    header = header_of(step(part(1, 0, 2, 1), part(2, 0, 2, 1)))
    assert decode_step_header(encode(header)).payload_bytes == 64
    change(header)
    with pytest.raises(RemoteProtocolError):
        decode_step_header(encode(header))


def test_rejects_oversized_steps() -> None:
    rows = MAX_STEP_BYTES // (MAX_WIDTH * 4)
    assert encode_step_header(step(part(rows=rows), width=MAX_WIDTH))
    with pytest.raises(LocalProtocolError, match="at most"):
        encode_step_header(step(part(rows=rows + 1), width=MAX_WIDTH))
    header = {**header_of(step(part(rows=1), width=MAX_WIDTH)), "shape": [rows + 1, MAX_WIDTH]}
    header["slices"][0][3] = rows + 1
    with pytest.raises(RemoteProtocolError, match="at most"):
        decode_step_header(encode(header))


def test_rejects_too_many_slices() -> None:
    slices = [Slice(session=SessionId(JobId(f"{n:032x}"), 0), position=0, rows=1) for n in range(MAX_SLICES + 1)]
    with pytest.raises(LocalProtocolError, match="expected 0 to 256"):
        encode_step_header(step(*slices))


@pytest.mark.parametrize("token", [-1, MAX_VOCABULARY, -(1 << 31), (1 << 31) - 1])
def test_rejects_token_ids_out_of_bounds(token: int) -> None:
    with pytest.raises(LocalProtocolError, match="token id"):
        encode_step_header(Step(slices=(part(rows=2),), tensor=tensor_from_tokens([0, token])))
    header = decode_step_header(encode_step_header(Step(slices=(part(rows=2),), tensor=tensor_from_tokens([0, 0]))))
    with pytest.raises(RemoteProtocolError, match="token id"):
        header.step(struct.pack("<ii", 0, token))
