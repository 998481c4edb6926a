"""Fields of JSON bodies: read one by one, validated, and refused by name.

A field is implemented, or ignored as it cannot change the answer, or accepted only with its neutral value; every other
field is refused: a wrong answer is worse than none. docs/http-api.md lists all of them.
"""

import json
import math
from collections.abc import Callable, Mapping, Set
from typing import Any, Final, NoReturn, TypeVar

from node.api.errors import ApiError
from node.util.suggestions import LONGEST_NAME, did_you_mean
from protocol.limits import MAX_NAME_BYTES, MAX_POSITIONS
from protocol.measurements import QualityBound

T = TypeVar("T")

MAX_STOPS: Final = 64
"""The OpenAI API has 4 at most; the others name no limit."""

MAX_STOP_CHARACTERS: Final = 256

MAX_VALUE_DEPTH: Final = 64
"""Nesting of tools, schemas and arguments."""

MIN_INTEGER: Final = -(2**63)
MAX_INTEGER: Final = 2**64 - 1
"""Integers in them."""


class Fields:
    """A JSON object whose fields are validated; null equals absent, as in the OpenAI API."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def get(self, name: str, parse: Callable[[str, Any], T]) -> T | None:
        """Return a parsed field, or None if it is absent."""
        value = self._values.get(name)
        return None if value is None else parse(self._prefix + name, value)

    def echo(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return fields as they are, or their defaults where they are absent; for answers that repeat them."""
        return {
            name: default if (value := self._values.get(name)) is None else value for name, default in defaults.items()
        }

    def refuse_unless_neutral(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse fields with other than their neutral values."""
        for name, values in neutral.items():
            value = self._values.get(name)
            # JSON tells 0 from false and 1 from true, Python's == does not.
            if value is not None and not any(
                value == other and isinstance(value, bool) == isinstance(other, bool) for other in values
            ):
                allowed = ", ".join(json.dumps(other) for other in (None, *values))
                why = f"is not supported; accepted values: {allowed}"
                refuse(self._prefix + name, why)

    def refuse_misspelt(self, names: Set[str]) -> None:
        """Refuse unknown fields, suggesting the closest name; for objects with many fields."""
        for name in self._values:
            if name not in names:
                param = self._prefix + name[:MAX_NAME_BYTES]
                where = f" in {self._prefix.removesuffix('.')}" if self._prefix else ""
                message = f"unknown field {name[:LONGEST_NAME]!r}{where}{did_you_mean(name, names)}"
                raise ApiError(400, message, param=param)

    def refuse_unless_known(self, names: Set[str]) -> None:
        """Refuse unknown fields, listing the known ones; for objects with few fields."""
        unknown = self._values.keys() - names
        if unknown:
            refuse(self._prefix + min(unknown)[:MAX_NAME_BYTES], f"is unknown; expected {', '.join(sorted(names))}")


def refuse(param: str, fault: str) -> NoReturn:
    """Raise the ApiError for a field."""
    raise ApiError(400, f"{param} {fault}", param=param)


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body. Raises ApiError."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def parse_text(param: str, value: Any) -> str:
    """Return a string that is valid Unicode."""
    if not isinstance(value, str):
        refuse(param, "must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can encode a lone surrogate
        refuse(param, "is not valid Unicode text")
    return value


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


def parse_boolean(param: str, value: Any) -> bool:
    """Return true or false."""
    if not isinstance(value, bool):
        refuse(param, "must be true or false")
    return value


def parse_limit(param: str, value: Any) -> int:
    """Return a limit of tokens, capped at the largest context."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        refuse(param, "must be an integer of at least 1")
    return min(value, MAX_POSITIONS)


def count_between(low: int, high: int) -> Callable[[str, Any], int]:
    """Return a parser of integers within bounds."""

    def parse(param: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            refuse(param, f"must be an integer from {low} to {high}")
        return value

    return parse


parse_count: Final = count_between(1, MAX_POSITIONS)
"""A number of tokens."""


def number_between(low: float, high: float) -> Callable[[str, Any], float]:
    """Return a parser of numbers within bounds."""

    def parse(param: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            refuse(param, f"must be a number from {low:g} to {high:g}")
        return float(value)

    return parse


def parse_quality(param: str, value: Any) -> QualityBound:
    """Return a quality bound."""
    try:
        return QualityBound(value)
    except ValueError:
        refuse(param, f"must be one of {', '.join(QualityBound)}")


def parse_method(param: str, value: Any) -> str:
    """Return the name of a method, not resolved."""
    method = parse_text(param, value)
    if not 1 <= len(method.encode()) <= MAX_NAME_BYTES:
        refuse(param, f"must have 1 to {MAX_NAME_BYTES} bytes")
    return method


def parse_top_p(param: str, value: Any) -> float:
    """Return a share of the probability, which is not 0."""
    share = number_between(0, 1)(param, value)
    if share == 0:
        refuse(param, "must be above 0 and at most 1")
    return share


def parse_stop(param: str, value: Any) -> tuple[str, ...]:
    """Return texts that end the answer."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > MAX_STOPS:
        refuse(param, f"must be a string or a list of at most {MAX_STOPS} strings")
    stops = tuple(parse_text(param, each) for each in values)
    if any(not 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        refuse(param, f"strings must have 1 to {MAX_STOP_CHARACTERS} characters")
    return stops
