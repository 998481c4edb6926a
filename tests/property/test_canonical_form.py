import msgpack
from hypothesis import given
from hypothesis import strategies as st

from protocol.canonical import Value, decode, decode_canonical, encode
from protocol.errors import RemoteProtocolError
from tests.property.strategies import values

LIMIT = 1 << 20


@given(values())
def test_canonical_round_trip(value: Value) -> None:
    data = encode(value)
    assert decode_canonical(data, max_bytes=LIMIT) == value
    # Nothing but plain msgpack: whoever has a decoder can read it.
    assert msgpack.unpackb(data) == value


@given(st.dictionaries(st.text(), st.integers(-5, 5)), st.data())
def test_encoding_ignores_the_order_of_keys(value: dict[str, int], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(list(value.items())))
    assert encode(dict(shuffled)) == encode(value)
    keys = list(decode_map(encode(value)))
    assert keys == sorted(keys, key=lambda key: key.encode("utf-8"))


def decode_map(data: bytes) -> dict[str, Value]:
    value = decode(data, max_bytes=LIMIT)
    assert isinstance(value, dict)
    return value


@given(values(), values())
def test_distinct_values_have_distinct_encodings(one: Value, other: Value) -> None:
    same = repr(decode(encode(one), max_bytes=LIMIT)) == repr(decode(encode(other), max_bytes=LIMIT))
    assert (encode(one) == encode(other)) is same


@given(values(), st.data())
def test_rejects_truncated_values(value: Value, data: st.DataObject) -> None:
    whole = encode(value)
    for wrong in (whole[: data.draw(st.integers(0, len(whole) - 1))], whole + b"\xc0"):
        try:
            decode(wrong, max_bytes=LIMIT)
        except RemoteProtocolError:
            continue
        raise AssertionError(wrong)


@given(st.binary(max_size=200))
def test_garbage_raises_only_remote_errors(data: bytes) -> None:
    try:
        value = decode(data, max_bytes=LIMIT)
    except RemoteProtocolError:
        return
    assert decode_canonical(encode(value), max_bytes=LIMIT) == value
    try:
        decode_canonical(data, max_bytes=LIMIT)
    except RemoteProtocolError:
        assert encode(value) != data
    else:
        assert encode(value) == data


@given(values(), st.data())
def test_damaged_bytes_raise_only_remote_errors(value: Value, data: st.DataObject) -> None:
    damaged = bytearray(encode(value))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        again = decode(damaged, max_bytes=LIMIT)
    except RemoteProtocolError:
        return
    assert decode_canonical(encode(again), max_bytes=LIMIT) == again
