"""Canonical encodings: the msgpack that peers sign and send, and the JSON whose hash names a model.

Canonical msgpack is the subset of msgpack without extension types in which every value has exactly one encoding: text
keys sorted by their UTF-8 bytes, integers, lengths and headers in their shortest form, floats always as finite float64.

msgpack allocates an array as soon as it has read its header, so that a few nested headers of three bytes each allocate
megabytes. `decode` therefore walks over the bytes and checks depth and counts before it builds any value.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

import msgpack

from protocol.errors import RemoteProtocolError
from protocol.limits import MAX_DEPTH, MAX_ELEMENTS, MAX_NODES

Value: TypeAlias = "bool | int | float | str | bytes | Sequence[Value] | Mapping[str, Value] | None"
"""Values of canonical msgpack. Arrays decode to lists, maps to dicts."""

_FLOATS: Final = {0xCA: struct.Struct(">f"), 0xCB: struct.Struct(">d")}
_LENGTHS: Final = {1: struct.Struct(">B"), 2: struct.Struct(">H"), 4: struct.Struct(">I")}

# First byte of a token -> size of the token, where the first byte determines it; 0 for all others.
_FIXED_SIZES: Final = bytes(
    1 if first <= 0x7F or first >= 0xE0 or first in {0xC0, 0xC2, 0xC3}  # small integers, nil, false, true
    else 1 + (first & 0x1F) if 0xA0 <= first <= 0xBF  # short text
    else {0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}.get(first, 0)  # integers
    for first in range(256)
)  # fmt: skip
# First byte of text, bytes, array or map with a length after it -> bytes of that length.
_TEXT_OR_BYTES: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_ARRAYS: Final = {0xDC: 2, 0xDD: 4}
_MAPS: Final = {0xDE: 2, 0xDF: 4}


def encode(value: Value) -> bytes:
    """Return the canonical msgpack of a value; raise ValueError where it has none or exceeds the limits of `decode`."""
    try:
        data: bytes = msgpack.packb(_ordered(value, 0))
    except (OverflowError, TypeError) as error:
        raise ValueError(str(error)) from None
    if len(data) > MAX_ELEMENTS:  # fewer bytes cannot hold too many values, and the depth is checked above
        _check_structure(data)
    return data


def decode(data: bytes | bytearray | memoryview, *, max_bytes: int) -> Value:
    """Return the value of msgpack bytes from a peer, canonical or not.

    Raises RemoteProtocolError, and nothing else, for more than `max_bytes`, invalid msgpack, extension types, NaN and
    infinities, keys that are not text or occur twice, and values too deep or too large.
    """
    if len(data) > max_bytes:
        raise RemoteProtocolError(f"msgpack value of {len(data)} bytes exceeds {max_bytes}")
    return _decode(bytes(data), _unique_map)


def decode_canonical(data: bytes | bytearray | memoryview, *, max_bytes: int) -> Value:
    """Return the value like `decode`; raise RemoteProtocolError also unless the bytes are its canonical form."""
    if len(data) > max_bytes:
        raise RemoteProtocolError(f"msgpack value of {len(data)} bytes exceeds {max_bytes}")
    data = bytes(data)
    value = _decode(data, _ascending_map)
    # The maps are known to be in order; this compares whether every value has its shortest form.
    if msgpack.packb(value) != data:
        raise RemoteProtocolError("bad msgpack: not in canonical form")
    return value


def _decode(data: bytes, make_map: Callable[[list[tuple[object, object]]], dict[str, object]]) -> Value:
    try:
        _check_structure(data)
        value: Value = msgpack.unpackb(data, object_pairs_hook=make_map, strict_map_key=False)
    except (ValueError, TypeError) as error:  # msgpack's own exceptions and UnicodeDecodeError are ValueErrors
        raise RemoteProtocolError(f"bad msgpack: {error}") from None
    return value


def canonical_json(value: Value) -> bytes:
    """Return JSON in UTF-8 with sorted keys and without white space.

    Raises ValueError for values without JSON: bytes, keys that are not text, NaN and infinities, lone surrogates.
    """
    try:
        _check_text_keys(value)
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return text.encode("utf-8")


def _ordered(value: Value, depth: int) -> Value:
    """Return the value with sorted maps; raise ValueError for one without canonical msgpack."""
    if value is None or isinstance(value, (int, str, bytes)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not finite")
        return value
    if depth == MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a key is not text")
        # Code points and their UTF-8 bytes sort alike.
        return {key: _ordered(value[key], depth + 1) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_ordered(item, depth + 1) for item in value]
    raise ValueError(f"a {type(value).__name__} cannot be encoded")


def _check_structure(data: bytes) -> None:
    """Walk over the tokens of one value; raise ValueError unless they fill the data and keep to the limits."""
    position = nodes = 0
    pending: list[int] = []  # missing values of each open array or map
    while True:
        if position >= len(data):
            raise ValueError("truncated")
        nodes += 1
        if nodes > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} values")
        first = data[position]
        size = _FIXED_SIZES[first]
        if size:
            position += size
        else:
            position, children = _measure_token(data, position, first)
            if children is not None:
                if len(pending) == MAX_DEPTH:
                    raise ValueError(f"nested deeper than {MAX_DEPTH}")
                pending.append(children + 1)
        while pending:
            pending[-1] -= 1
            if pending[-1]:
                break
            pending.pop()
        else:
            break
    if position != len(data):
        raise ValueError("truncated" if position > len(data) else "bytes after the end")


def _measure_token(data: bytes, position: int, first: int) -> tuple[int, int | None]:
    """Return the end of a token of variable size, and its number of values if it is an array or a map."""
    if 0x80 <= first <= 0x8F:
        return position + 1, 2 * (first & 0x0F)
    if 0x90 <= first <= 0x9F:
        return position + 1, first & 0x0F
    position += 1
    try:
        if first in _FLOATS:
            if not math.isfinite(_FLOATS[first].unpack_from(data, position)[0]):
                raise ValueError("a float is not finite")
            return position + _FLOATS[first].size, None
        if first in _TEXT_OR_BYTES:
            width = _TEXT_OR_BYTES[first]
            return position + width + int(_LENGTHS[width].unpack_from(data, position)[0]), None
        if first in _ARRAYS or first in _MAPS:
            width = _ARRAYS.get(first) or _MAPS[first]
            count = int(_LENGTHS[width].unpack_from(data, position)[0])
            if count > MAX_ELEMENTS:
                raise ValueError(f"an array or map of {count} elements exceeds {MAX_ELEMENTS}")
            return position + width, count if first in _ARRAYS else 2 * count
    except struct.error:
        raise ValueError("truncated") from None
    raise ValueError(f"extension or unknown type {first:#04x}")


def _unique_map(pairs: list[tuple[object, object]]) -> dict[str, object]:
    """Return a map of the pairs; raise TypeError for a key that is not text, ValueError for a duplicate."""
    result: dict[str, object] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise TypeError("a key is not text")
        if key in result:
            raise ValueError(f"key {key[:80]!r} appears twice")
        result[key] = value
    return result


def _ascending_map(pairs: list[tuple[object, object]]) -> dict[str, object]:
    """Return a map of the pairs like `_unique_map`; raise ValueError also for keys that are not in order."""
    result = _unique_map(pairs)
    keys = list(result)
    if keys != sorted(keys):
        raise ValueError("not in canonical form")
    return result


def _check_text_keys(value: Value) -> None:
    """Raise ValueError for a key that is not text, which json.dumps would silently convert."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a key is not text")
        for item in value.values():
            _check_text_keys(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_text_keys(item)
