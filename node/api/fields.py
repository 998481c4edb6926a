"""Fields of JSON bodies: read one by one, validated, and refused by name.

A field is implemented, or ignored as it cannot change the answer, or accepted only with its neutral value; every other
field is refused: a wrong answer is worse than none. docs/http-api.md lists all of them. A `Form` has both what reads a
value and the JSON Schema that says the same to others, from which the OpenAPI description is made.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Generic, NoReturn, TypeVar

from node.api.errors import ApiError
from node.util.suggestions import LONGEST_NAME, did_you_mean
from protocol.limits import MAX_NAME_BYTES, MAX_POSITIONS
from protocol.measurements import Objective, QualityBound

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

MAX_STOPS: Final = 64
"""The OpenAI API has 4 at most; the others name no limit."""

MAX_STOP_CHARACTERS: Final = 256

MAX_VALUE_DEPTH: Final = 64
"""Nesting of tools, schemas and arguments."""

MAX_VALUES: Final = 1 << 20
"""Of a body, about: each takes more time and memory than its bytes, and no model takes as many tokens."""

# What follows a backslash is never the end of a text. Possessive: nothing is tried twice, whatever the body.
_TEXT_OR_SEPARATOR: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|([,\[{])', re.DOTALL)

LEAST_TOP_P: Final = 1e-9

MIN_INTEGER: Final = -(2**63)
MAX_INTEGER: Final = 2**64 - 1
"""Integers in them."""

_FEW: Final = 6
"""Fields of an object that are all listed where another one is refused; of more, the closest name is suggested."""

Schema = Mapping[str, Any]
"""A JSON Schema."""


@dataclass(frozen=True, slots=True)
class Form(Generic[T_co]):
    """How a value is read: `parse` returns it, or refuses what is not of its JSON Schema, naming the field."""

    parse: Callable[[str, Any], T_co]
    schema: Schema

    def __call__(self, param: str, value: Any) -> T_co:
        """Return the value. Raises ApiError."""
        return self.parse(param, value)


def form(schema: Schema) -> Callable[[Callable[[str, Any], T]], Form[T]]:
    """Return a decorator that makes a parser the form with this JSON Schema."""
    return lambda parse: Form(parse, schema)


@dataclass(frozen=True, slots=True)
class Field(Generic[T_co]):
    """A field of a JSON object."""

    name: str
    form: Form[T_co]


class Fields:
    """A JSON object whose fields are validated; null equals absent, as in the OpenAI API."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def get(self, field: Field[T]) -> T | None:
        """Return a parsed field, or None if it is absent."""
        value = self._values.get(field.name)
        return None if value is None else field.form.parse(self._prefix + field.name, value)

    def require(self, field: Field[T]) -> T:
        """Return a parsed field, which must not be absent."""
        value = self.get(field)
        if value is None:
            refuse(self._prefix + field.name, "is missing")
        return value

    def has(self, name: str) -> bool:
        """Return whether a field is there."""
        return self._values.get(name) is not None

    def echo(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return fields as they are, or their defaults where they are absent; for answers that repeat them."""
        return {
            name: default if (value := self._values.get(name)) is None else value for name, default in defaults.items()
        }

    def refuse_unless_neutral(self, neutral: Mapping[str, tuple[Any, ...]], instead: Mapping[str, str]) -> None:
        """Refuse fields with other than their neutral values; `instead`: what does the same."""
        for name, values in neutral.items():
            value = self._values.get(name)
            # JSON tells 0 from false and 1 from true, Python's == does not.
            if value is not None and not any(
                value == other and isinstance(value, bool) == isinstance(other, bool) for other in values
            ):
                allowed = ", ".join(json.dumps(other) for other in (None, *values))
                use = f"use {instead[name]} instead; " if name in instead else ""
                refuse(self._prefix + name, f"is not supported; {use}accepted values: {allowed}")

    def refuse_unless_known(self, names: Set[str]) -> None:
        """Refuse unknown fields that are not null, listing a few known ones, or suggesting the closest of many."""
        name = next((name for name, value in self._values.items() if value is not None and name not in names), None)
        if name is None:
            return
        param = self._prefix + name[:MAX_NAME_BYTES]
        if len(names) <= _FEW:
            refuse(param, f"is unknown; expected {', '.join(sorted(names))}")
        where = f" in {self._prefix.removesuffix('.')}" if self._prefix else ""
        raise ApiError(400, f"unknown field {name[:LONGEST_NAME]!r}{where}{did_you_mean(name, names)}", param=param)


class ObjectForm:
    """The fields of a JSON object. Also a form, of the object as it is read."""

    def __init__(
        self,
        *fields: Field[Any],
        required: Collection[Field[Any]] = (),
        ignored: Collection[str] = (),
        neutral: Mapping[str, tuple[Any, ...]] | None = None,
        instead: Mapping[str, str] | None = None,
        is_open: bool = False,
    ) -> None:
        """`neutral`: fields, and the values besides null at which they do nothing. `instead`: what to use for others.

        `is_open`: unknown fields are ignored.
        """
        self._fields = fields
        self._required = frozenset(field.name for field in required)
        self._ignored = frozenset(ignored)
        self._neutral = neutral or {}
        self._instead = instead or {}
        self._is_open = is_open
        self.implemented = frozenset(field.name for field in fields)
        self.names = self.implemented | self._ignored | self._neutral.keys()

    def read(self, values: Mapping[str, Any], prefix: str = "") -> Fields:
        """Return the fields of an object, unknown ones refused. Raises ApiError."""
        fields = Fields(values, prefix)
        if not self._is_open:
            fields.refuse_unless_known(self.names)
        fields.refuse_unless_neutral(self._neutral, self._instead)
        return fields

    def parse(self, param: str, value: Any) -> Fields:
        """Return the fields of a value. Raises ApiError."""
        return self.read(parse_object(param, value), f"{param}.")

    @property
    def form(self) -> Form[Fields]:
        """The form of a field that has such a value."""
        return Form(self.parse, self.schema)

    @property
    def schema(self) -> Schema:
        """The JSON Schema. Values of required fields are not null, which equals absent."""
        properties: dict[str, Any] = {name: {} for name in sorted(self._ignored)}
        properties |= {name: {"enum": [None, *values]} for name, values in sorted(self._neutral.items())}
        for field in self._fields:
            is_required = field.name in self._required
            properties[field.name] = field.form.schema if is_required else nullable(field.form.schema)
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        if self._required:
            schema["required"] = sorted(self._required)
        return schema if self._is_open else schema | {"additionalProperties": {"type": "null"}}


def nullable(schema: Schema) -> Schema:
    """Return the schema of a value that may be null."""
    if isinstance(schema.get("type"), str) and not {"enum", "const"} & schema.keys():
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]} if schema else schema


def refuse(param: str, fault: str) -> NoReturn:
    """Raise the ApiError for a field."""
    raise ApiError(400, f"{param} {fault}", param=param)


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body. Raises ApiError."""
    if _has_too_many_values(body):
        message = f"the body has more than {MAX_VALUES} commas and brackets outside of texts"
        raise ApiError(413, message, code="request_too_large")
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _has_too_many_values(body: bytes) -> bool:
    """Return whether parsing would make more values than MAX_VALUES, of which there are as many as separators."""
    if sum(map(body.count, (b",", b"[", b"{"))) <= MAX_VALUES:
        return False
    if b"\0" in body:  # UTF-16 or 32, in which any byte may look like a quotation mark
        return True
    # Match by match: a single call for all would keep the event loop waiting, from whatever thread it is made.
    separators = (match for match in _TEXT_OR_SEPARATOR.finditer(body) if match.lastindex)
    return next(islice(separators, MAX_VALUES, None), None) is not None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


@form({"type": "string"})
def parse_text(param: str, value: Any) -> str:
    """Return a string that is valid Unicode."""
    if not isinstance(value, str):
        refuse(param, "must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can encode a lone surrogate
        refuse(param, "is not valid Unicode text")
    return value


@form({"type": "string", "minLength": 1})
def parse_name(param: str, value: Any) -> str:
    """Return a string that is not empty."""
    return parse_text(param, value) or refuse(param, "is missing")


@form({"type": "object"})
def parse_object(param: str, value: Any) -> dict[str, Any]:
    """Return a JSON object."""
    if not isinstance(value, dict):
        refuse(param, "must be an object")
    return value


def check_depth(param: str, value: Any) -> None:
    """Refuse a value that what reads it later cannot take: nested too deeply, beyond 64 bits, or not valid Unicode."""
    depth, level = 0, [value]
    while level:
        depth += 1
        if depth > MAX_VALUE_DEPTH:
            refuse(param, f"is nested more than {MAX_VALUE_DEPTH} levels deep")
        for each in level:
            _check_leaf(param, each)
        inner = ([*each, *each.values()] if isinstance(each, dict) else each for each in level)
        level = [value for values in inner if isinstance(values, list) for value in values]


def _check_leaf(param: str, value: Any) -> None:
    if isinstance(value, str):
        parse_text(param, value)
    elif isinstance(value, int) and not MIN_INTEGER <= value <= MAX_INTEGER:
        refuse(param, f"has an integer that is not from {MIN_INTEGER} to {MAX_INTEGER}")
    elif isinstance(value, float) and not math.isfinite(value):  # 1e999 is JSON
        refuse(param, "has a number that is too large")


@form({"type": "boolean"})
def parse_boolean(param: str, value: Any) -> bool:
    """Return true or false."""
    if not isinstance(value, bool):
        refuse(param, "must be true or false")
    return value


def whole_number(value: Any) -> int | None:
    """Return an integer, also where it is written with a point: JSON does not tell 40.0 from 40, nor do its schemas."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@form({"type": "integer", "minimum": 1})
def parse_limit(param: str, value: Any) -> int:
    """Return a limit of tokens, capped at the largest context."""
    if (limit := whole_number(value)) is None or limit < 1:
        refuse(param, "must be an integer of at least 1")
    return min(limit, MAX_POSITIONS)


@form({"type": "integer", "minimum": 0})
def parse_limit_or_none(param: str, value: Any) -> int:
    """Return a limit of tokens like `parse_limit`, or 0."""
    if (limit := whole_number(value)) is None or limit < 0:
        refuse(param, "must be an integer of at least 0")
    return min(limit, MAX_POSITIONS)


def count_between(low: int, high: int) -> Form[int]:
    """Return the form of integers within bounds."""

    @form({"type": "integer", "minimum": low, "maximum": high})
    def parse(param: str, value: Any) -> int:
        if (count := whole_number(value)) is None or not low <= count <= high:
            refuse(param, f"must be an integer from {low} to {high}")
        return count

    return parse


parse_count: Final = count_between(1, MAX_POSITIONS)
"""A number of tokens."""


def number_between(low: float, high: float) -> Form[float]:
    """Return the form of numbers within bounds."""

    @form({"type": "number", "minimum": low, "maximum": high})
    def parse(param: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            refuse(param, f"must be a number from {low:g} to {high:g}")
        return float(value)

    return parse


def one_of(*values: str) -> Form[str]:
    """Return the form of one of some words."""

    @form({"enum": list(values)})
    def parse(param: str, value: Any) -> str:
        if value not in values:
            refuse(param, f"must be one of {', '.join(values)}")
        return str(value)

    return parse


def list_of(item: Form[T], what: str, most: int, least: int = 0) -> Form[tuple[T, ...]]:
    """Return the form of lists. `what`: their elements, in the words of an error."""
    bounds = f"at most {most}" if least == 0 else f"{least} to {most}"

    @form({"type": "array", "items": item.schema, "minItems": least, "maxItems": most})
    def parse(param: str, value: Any) -> tuple[T, ...]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            refuse(param, f"must be a list of {bounds} {what}")
        return tuple(item(f"{param}[{index}]", each) for index, each in enumerate(value))

    return parse


@form({"enum": [bound.value for bound in QualityBound]})
def parse_quality(param: str, value: Any) -> QualityBound:
    """Return a quality bound."""
    try:
        return QualityBound(value)
    except ValueError:
        refuse(param, f"must be one of {', '.join(QualityBound)}")


@form({"enum": [objective.value for objective in Objective]})
def parse_objective(param: str, value: Any) -> Objective:
    """Return an objective."""
    try:
        return Objective(value)
    except ValueError:
        refuse(param, f"must be one of {', '.join(Objective)}")


@form({"type": "number", "exclusiveMinimum": 0})
def parse_budget(param: str, value: Any) -> float:
    """Return a budget: a cost, which is above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        refuse(param, "must be a number above 0")
    return float(value)


@form({"type": "string", "minLength": 1, "maxLength": MAX_NAME_BYTES})
def parse_method(param: str, value: Any) -> str:
    """Return the name of a method, not resolved."""
    method = parse_text(param, value)
    if not 1 <= len(method.encode()) <= MAX_NAME_BYTES:
        refuse(param, f"must have 1 to {MAX_NAME_BYTES} bytes")
    return method


_share: Final = number_between(0, 1)


@form(_share.schema)
def parse_top_p(param: str, value: Any) -> float:
    """Return a share of the probability, above 0: that is what the likeliest token has at least, which 0 asks for."""
    return max(_share(param, value), LEAST_TOP_P)


_STOP: Final = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}


@form({"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}]})
def parse_stop(param: str, value: Any) -> tuple[str, ...]:
    """Return texts that end the answer."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > MAX_STOPS:
        refuse(param, f"must be a string or a list of at most {MAX_STOPS} strings")
    stops = tuple(parse_text(param, each) for each in values)
    if any(not 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        refuse(param, f"strings must have 1 to {MAX_STOP_CHARACTERS} characters")
    return stops
