import math
import tracemalloc
from contextlib import suppress

import pytest

from protocol.canonical import Value, canonical_json, decode, decode_canonical, encode
from protocol.errors import RemoteProtocolError
from protocol.limits import MAX_DEPTH, MAX_ELEMENTS, MAX_NODES

LIMIT = 1 << 20


def nested(depth: int) -> Value:
    value: Value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "c0"),
        (True, "c3"),
        (0, "00"),
        (127, "7f"),
        (128, "cc80"),
        (255, "ccff"),
        (256, "cd0100"),
        (65536, "ce00010000"),
        (1 << 32, "cf0000000100000000"),
        ((1 << 64) - 1, "cfffffffffffffffff"),
        (-1, "ff"),
        (-32, "e0"),
        (-33, "d0df"),
        (-129, "d1ff7f"),
        (-(1 << 63), "d38000000000000000"),
        (1.0, "cb3ff0000000000000"),
        (0.1, "cb3fb999999999999a"),
        (-0.0, "cb8000000000000000"),
        ("", "a0"),
        ("é", "a2c3a9"),
        ("a" * 32, "d920" + "61" * 32),
        (b"", "c400"),
        (b"\x01\x02", "c4020102"),
        ([], "90"),
        ((1, [2]), "92019102"),
        ({}, "80"),
        ({"b": 1, "a": 2, "aa": 3, "é": 4, "z": 5}, "85a16102a2616103a16201a17a05a2c3a904"),
    ],
)
def test_canonical_msgpack_of_known_values(value: Value, expected: str) -> None:
    assert encode(value).hex() == expected


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        [-math.inf],
        1 << 64,
        -(1 << 63) - 1,
        "\ud800",
        {"\udfff": 1},
        {1: 2},
        {b"a": 2},
        {"a": {None: 1}},
        {"a", "b"},
        bytearray(b"a"),
        object(),
        nested(MAX_DEPTH + 1),
        [0] * (MAX_ELEMENTS + 1),
        [[0] * (MAX_NODES // 4)] * 4,
    ],
)
def test_rejects_values_without_canonical_form(value: Value) -> None:
    with pytest.raises(ValueError, match=r"."):
        encode(value)


def test_accepts_values_at_the_limits() -> None:
    for value in (nested(MAX_DEPTH), [0] * MAX_ELEMENTS, {f"{key:04}": None for key in range(MAX_NODES // 2 - 1)}):
        assert decode_canonical(encode(value), max_bytes=LIMIT) == value


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("", "truncated"),
        ("c1", "unknown type 0xc1"),
        ("d60000000000", "extension"),
        ("c70100ff", "extension"),
        ("0000", "bytes after the end"),
        ("9101ff", "bytes after the end"),
        ("92", "truncated"),
        ("9201", "truncated"),
        ("81a161", "truncated"),
        ("a2c3", "truncated"),
        ("d9", "truncated"),
        ("da00", "truncated"),
        ("c4ff00", "truncated"),
        ("cd00", "truncated"),
        ("cb00", "truncated"),
        ("dc00", "truncated"),
        ("a1ff", "utf-8"),
        ("cb7ff8000000000000", "not finite"),
        ("cb7ff0000000000000", "not finite"),
        ("ca7f800000", "not finite"),
        ("8101c0", "key is not text"),
        ("81c4016101", "key is not text"),
        ("819001", "key is not text"),
        ("82a16101a16102", "appears twice"),
        ("9282a16101a1610200", "appears twice"),
        ("91" * (MAX_DEPTH + 1) + "c0", "nested deeper"),
        ("81a161" * MAX_DEPTH + "90", "nested deeper"),
        ("dd00001001" + "c0" * 0x1001, "exceeds"),
        ("df00001001" + "c0" * 0x2002, "exceeds"),
        ("dcffff", "exceeds"),
        ("94" + ("dc0800" + "c0" * 0x800) * 4, "more than"),
    ],
)
def test_decoder_rejects_invalid_msgpack(data: str, complaint: str) -> None:
    with pytest.raises(RemoteProtocolError, match=complaint):
        decode(bytes.fromhex(data), max_bytes=LIMIT)


@pytest.mark.parametrize(
    "data",
    ["cc01", "cd0080", "d001", "d0ff", "d3ffffffffffffffff", "d90161", "dc000100", "de0000", "ca3f800000",
     "82a16201a16102", "c5000161"],
)  # fmt: skip
def test_decodes_but_does_not_accept_non_canonical_encodings_as_canonical(data: str) -> None:
    assert decode(bytes.fromhex(data), max_bytes=LIMIT) is not None
    with pytest.raises(RemoteProtocolError, match="not in canonical form"):
        decode_canonical(bytes.fromhex(data), max_bytes=LIMIT)


def test_decoder_rejects_oversized_input() -> None:
    assert decode(b"\xa3abc", max_bytes=4) == "abc"
    with pytest.raises(RemoteProtocolError, match="exceeds 3"):
        decode(b"\xa3abc", max_bytes=3)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdc\x10\x00" * 1000,  # each header makes msgpack allocate 32 KiB
        b"\xde\x10\x00" * 1000,
        b"\xdd\x00\x00\x10\x00" + b"\xdc\x10\x00\x80" * 4096,
        b"\xdc\x10\x00" + b"\x80" * 0x1000,
        b"\xdc\x10\x00" + b"\xdc\x0f\xff" + b"\x80" * 60000,
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
    ],
)
def test_decoder_memory_is_bounded_for_hostile_input(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with suppress(RemoteProtocolError):
            decode(bomb, max_bytes=LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_canonical_json_is_sorted_compact_utf8() -> None:
    value: Value = {"b": [1, 2.5, 1e-7, True, None], "a": {"é": '"\n', "Z": {}}}
    assert canonical_json(value) == '{"a":{"Z":{},"é":"\\"\\n"},"b":[1,2.5,1e-07,true,null]}'.encode()


@pytest.mark.parametrize("value", [math.nan, [math.inf], {"a": {1: 2}}, [{None: 1}], b"a", {"a": b""}, "\ud800"])
def test_rejects_values_without_json(value: Value) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical_json(value)


def test_rejects_recursive_values_as_json() -> None:
    endless: list[Value] = []
    endless.append(endless)
    with pytest.raises(ValueError, match=r"."):
        canonical_json(endless)
