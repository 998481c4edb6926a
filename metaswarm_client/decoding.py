"""JSON documents as frozen dataclasses, whose annotations say what a document must be.

Fields that this release does not know are skipped, so that it understands newer nodes.
"""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from metaswarm_client.errors import UnexpectedAnswerError

T = TypeVar("T")


@cache
def _field_types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def decode(kind: type[T], value: Any, where: str = "the answer") -> T:
    """Return a document as `kind`. Raises UnexpectedAnswerError, which names the place."""
    return cast("T", _decode(kind, value, where))


def _decode(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _decode_fields(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # X | None
        (inner,) = (each for each in arguments if each is not type(None))
        return None if value is None else _decode(inner, value, where)
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(kinds) == len(value):
            places = [f"{where}[{index}]" for index in range(len(value))]
            return tuple(map(_decode, kinds, value, places))
    if origin is Mapping and isinstance(value, dict):
        return {name: _decode(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise UnexpectedAnswerError(f"{where}: expected {kind}, not {value!r:.80}")


def _decode_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UnexpectedAnswerError(f"{where}: expected an object, not {value!r:.80}")
    given = {}
    for field in fields(kind):
        if field.name in value:
            given[field.name] = _decode(_field_types(kind)[field.name], value[field.name], f"{where}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UnexpectedAnswerError(f"{where}: has no {field.name!r}")
    return kind(**given)
