"""Declarative wire forms: a dataclass declares each field once, with its bounds, and is read and written from that.

    class Credit:
        session: SessionId
        consumed_bytes: Annotated[int, Range(1, MAX_WINDOW_BYTES)]

`to_map` and `from_map` turn such a dataclass into the map that travels and back. `from_map` is strict: a field that is
missing, unknown, of another type or out of bounds is a RemoteProtocolError that names it. A class may define `check`,
which raises RemoteProtocolError for fields that contradict each other; it runs after the fields' own checks.
A class that sets `extensible` skips unknown fields instead, so that later versions may add some.

A field travels under its own name. `X | None` is absent where it is None, `Nullable[X]` travels as nil. Nested
dataclasses are maps, or arrays of their fields in order where marked ARRAY; named tuples and tuples are arrays.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Generic,
    NamedTuple,
    Optional,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from protocol import fields
from protocol.errors import RemoteProtocolError
from protocol.identity import BlockRange, JobId, ModelId, PeerId, SessionId

_T = TypeVar("_T")


class Form(NamedTuple):
    """How one value travels. `load` checks a decoded value and names it in errors; `dump` is its inverse."""

    load: Callable[[object, str], Any]
    dump: Callable[[Any], Any] = lambda value: value


class Range(NamedTuple):
    """Bounds of an integer or a float, both inclusive."""

    low: float
    high: float


class Count(NamedTuple):
    """Bounds of the number of elements of an array or map, both inclusive."""

    high: int
    low: int = 0


class Key(NamedTuple):
    """The name under which a field travels, where it is not its own."""

    name: str


class Mark(enum.Enum):
    """Properties of a field, beside its type and bounds."""

    ARRAY = "a dataclass travels as an array of its fields in order"
    NULLABLE = "None travels as nil"
    OMIT_DEFAULT = "the field is absent where it has its default, and only there"
    LOCAL = "the field does not travel: `from_map` is given its value"


ARRAY: Final = Mark.ARRAY
OMIT_DEFAULT: Final = Mark.OMIT_DEFAULT
LOCAL: Final = Mark.LOCAL
Nullable = Annotated[Optional[_T], Mark.NULLABLE]  # noqa: UP045 - a type variable cannot be joined by | here


def text(max_bytes: int) -> Form:
    """Return the form of text that may be empty."""
    return Form(lambda value, what: fields.text(value, max_bytes, what))


def name(max_bytes: int) -> Form:
    """Return the form of text that is not empty."""
    return Form(lambda value, what: fields.name(value, max_bytes, what))


def raw(length: int) -> Form:
    """Return the form of exactly `length` bytes."""
    return Form(lambda value, what: fields.raw(value, length, what))


def to_map(value: Any) -> dict[str, Any]:
    """Return the map of a dataclass as it travels; nothing is checked."""
    result = {}
    for attribute, key, (_, dump), absent in _layout(type(value)).fields:
        found = getattr(value, attribute)
        if absent is _REQUIRED or found != absent:
            result[key] = dump(found)
    return result


def to_array(value: Any) -> list[Any]:
    """Return the fields of a dataclass in order, as they travel; nothing is checked."""
    return [dump(getattr(value, attribute)) for attribute, _, (_, dump), _ in _layout(type(value)).fields]


def from_map(cls: type[_T], value: object, what: str, **local: object) -> _T:
    """Return the dataclass in a decoded map. Raises RemoteProtocolError.

    `what`: names the map in errors. `local`: the fields that do not travel.
    """
    if not isinstance(value, dict):
        raise RemoteProtocolError(f"{what} is not a map")
    layout = _layout(cls)
    left = len(value)
    for attribute, key, (load, _), absent in layout.fields:
        if key in value:
            found = local[attribute] = load(value[key], f"{what} {key}")
            left -= 1
            if absent is not _REQUIRED and found == absent:
                raise RemoteProtocolError(f"{what} {key} is {found}: the field is left out at this value")
        elif absent is _REQUIRED:
            raise RemoteProtocolError(f"{what} lacks {key!r}")
        else:
            local[attribute] = absent
    if left and not layout.extensible:
        unknown = min(value.keys() - {field.key for field in layout.fields})
        raise RemoteProtocolError(f"{what} has an unknown field {unknown[:80]!r}")
    made: _T = layout.make(local)
    return made


class MessageTypes(Generic[_T]):
    """The message types of a stream, by the name that their maps carry under `type`."""

    def __init__(self, types: Mapping[str, type[_T]]) -> None:
        self._types = types
        self._names: dict[type[Any], str] = {cls: name for name, cls in types.items()}

    def name_of(self, cls: type[Any]) -> str:
        """Return the `type` of the messages of a class."""
        return self._names[cls]

    def to_map(self, message: _T) -> dict[str, Any]:
        """Return the map of a message. Raises RemoteProtocolError where `from_map` would."""
        name, value = self._names[type(message)], to_map(message)
        from_map(type(message), value, name)
        return {"type": name, **value}

    def from_map(self, value: object) -> _T:
        """Return the message in a decoded map, whose `type` is taken out. Raises RemoteProtocolError."""
        name = value.pop("type", None) if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._types:
            raise RemoteProtocolError(f"message type {str(name)[:80]!r} is unknown")
        return from_map(self._types[name], value, name)


_REQUIRED: Final = object()


class _Field(NamedTuple):
    """A field of a dataclass: its name, that on the wire, its form, and the value at which it is left out."""

    name: str
    key: str
    form: Form
    absent: object


class _Layout(NamedTuple):
    """The fields of a class that travel, in order, and its own check, if it has one.

    `extensible`: unknown fields are skipped, so that later versions may add some.
    """

    cls: type[Any]
    fields: tuple[_Field, ...]
    check: Callable[[Any], None] | None
    extensible: bool

    def make(self, values: dict[str, Any]) -> Any:
        """Return an instance whose fields fit together."""
        result = self.cls(**values)
        if self.check is not None:
            self.check(result)
        return result

    def load_array(self, value: object, what: str) -> Any:
        """Return the instance in an array of its fields."""
        parts = zip(self.fields, fields.tuple_of(value, len(self.fields), what), strict=True)
        return self.make({name: load(part, f"{what} {key}") for (name, key, (load, _), _), part in parts})


_LAYOUTS: Final[dict[type[Any], _Layout]] = {}


def _layout(cls: type[Any]) -> _Layout:
    """Return the layout of a class, read from its annotations once."""
    found = _LAYOUTS.get(cls)
    if found is None:
        found = _LAYOUTS[cls] = _read_layout(cls)
    return found


def _read_layout(cls: type[Any]) -> _Layout:
    hints = get_type_hints(cls, include_extras=True)
    is_tuple = issubclass(cls, tuple)
    defaults = cls._field_defaults if is_tuple else {field.name: field.default for field in dataclasses.fields(cls)}
    layout = []
    for attribute in cls._fields if is_tuple else defaults:
        kind, marks = _split(hints[attribute])
        if LOCAL in marks:
            continue
        key = next((mark.name for mark in marks if isinstance(mark, Key)), attribute)
        absent: object = _REQUIRED
        if OMIT_DEFAULT in marks:
            absent = defaults[attribute]
        elif _is_optional(kind) and Mark.NULLABLE not in marks:
            absent, kind = None, _without_none(kind)
        layout.append(_Field(attribute, key, _form(kind, marks), absent))
    return _Layout(cls, tuple(layout), getattr(cls, "check", None), getattr(cls, "extensible", False))


def _form(annotation: Any, marks: tuple[Any, ...] = ()) -> Form:
    """Return how values of an annotated type travel."""
    kind, inner = _split(annotation)
    marks += inner
    for mark in marks:
        if isinstance(mark, Form):
            return mark
    if kind in _FORMS:
        return _FORMS[kind]
    if _is_optional(kind):
        return _optional(_form(_without_none(kind), marks))
    for mark in marks:
        if isinstance(mark, Range):
            return _number(kind, mark)
        if isinstance(mark, Count):
            elements = [_form(element) for element in get_args(kind) if element is not Ellipsis]
            return _array(elements[0], mark) if get_origin(kind) is tuple else _mapping(elements[0], elements[1], mark)
    if get_origin(kind) is tuple:
        return _fixed([_form(element) for element in get_args(kind)])
    return _class(kind, is_array=ARRAY in marks or issubclass(kind, tuple))


def _class(cls: type[Any], *, is_array: bool) -> Form:
    if issubclass(cls, enum.StrEnum):
        return Form(lambda value, what: fields.choice(value, cls, what), str)
    if is_array:
        return Form(lambda value, what: _layout(cls).load_array(value, what), to_array)
    return Form(lambda value, what: from_map(cls, value, what), to_map)


def _number(kind: type[int] | type[float], bounds: Range) -> Form:
    low, high = bounds

    def load(value: Any, what: str) -> Any:
        if type(value) is kind and low <= value <= high:
            return value
        check: Callable[..., Any] = fields.integer if kind is int else fields.number
        return check(value, low, high, what)

    return Form(load, kind) if kind is float else Form(load)


def _optional(form: Form) -> Form:
    return Form(
        lambda value, what: None if value is None else form.load(value, what),
        lambda value: None if value is None else form.dump(value),
    )


def _array(element: Form, count: Count) -> Form:
    load, dump = element
    high, low = count
    return Form(
        lambda value, what: tuple([load(part, what) for part in fields.array(value, high, what, low)]),
        lambda value: [dump(part) for part in value],
    )


def _fixed(elements: list[Form]) -> Form:
    def load(value: object, what: str) -> tuple[Any, ...]:
        parts = fields.tuple_of(value, len(elements), what)
        return tuple([element.load(part, what) for element, part in zip(elements, parts, strict=True)])

    return Form(load, lambda value: [element.dump(part) for element, part in zip(elements, value, strict=True)])


def _mapping(key: Form, entry: Form, count: Count) -> Form:
    def load(value: object, what: str) -> dict[str, Any]:
        pairs = fields.mapping(value, count.high, what, count.low).items()
        return {key.load(name, what): entry.load(found, what) for name, found in pairs}

    return Form(load, lambda value: {name: entry.dump(found) for name, found in value.items()})


def _split(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type and its annotations."""
    if get_origin(annotation) is Annotated:
        kind, *marks = get_args(annotation)
        return kind, tuple(marks)
    return annotation, ()


def _is_optional(kind: Any) -> bool:
    return get_origin(kind) in {Union, UnionType} and NoneType in get_args(kind)


def _without_none(kind: Any) -> Any:
    (inner,) = (part for part in get_args(kind) if part is not NoneType)
    return inner


_FORMS: Final[Mapping[Any, Form]] = {
    bool: Form(fields.flag),
    PeerId: Form(fields.peer_id),
    ModelId: Form(fields.model_id, bytes.fromhex),
    JobId: Form(fields.job_id, bytes.fromhex),
    SessionId: Form(fields.session_id, lambda session: [bytes.fromhex(session.job), session.stage]),
    BlockRange: Form(fields.block_range, lambda blocks: [blocks.start, blocks.end]),
}
