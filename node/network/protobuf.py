"""Protocol Buffers, as far as the libp2p protocols of relays and reachability need them. No I/O.

A message is a dataclass whose fields name their number and form. Unknown fields are skipped, as the format demands;
everything else that is malformed is a `MalformedMessage`.
"""

import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, ClassVar, Final, Self, get_type_hints

MAX_VARINT: Final = (1 << 64) - 1
MAX_FIELDS: Final = 256
"""Fields of one message, repeated ones each: fewer than an honest message of 4 KiB has."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""The wire types."""


class MalformedMessage(ValueError):
    """The bytes are not a message of this kind."""


@dataclass(frozen=True, slots=True)
class Form:
    """The number of a field and how it travels; the annotation of a field of a message."""

    number: int
    wire: int
    repeated: bool = False
    message: "type[Message] | None" = None
    choices: type[IntEnum] | None = None


def varint(number: int) -> Form:
    """Return the form of an unsigned integer."""
    return Form(number, VARINT)


def fixed64(number: int) -> Form:
    """Return the form of an integer of eight bytes."""
    return Form(number, FIXED64)


def raw(number: int) -> Form:
    """Return the form of a string of bytes."""
    return Form(number, BYTES)


def raws(number: int) -> Form:
    """Return the form of a repeated string of bytes."""
    return Form(number, BYTES, repeated=True)


def choice(number: int, choices: type[IntEnum]) -> Form:
    """Return the form of an enumeration; a value that is not in it counts as absent, as the format demands."""
    return Form(number, VARINT, choices=choices)


def nested(number: int, message: "type[Message]") -> Form:
    """Return the form of a message within a message."""
    return Form(number, BYTES, message=message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message. The fields of its subclasses are annotated with their forms, and optional."""

    max_bytes: ClassVar[int] = 4096
    """Longer ones are refused unread."""

    def encode(self) -> bytes:
        """Return the bytes of the message."""
        out = bytearray()
        for name, form in _forms(type(self)).items():
            value = getattr(self, name)
            for one in value if form.repeated else [] if value is None else [value]:
                out += encode_varint(form.number << 3 | form.wire)
                if form.wire == VARINT:
                    out += encode_varint(one)
                elif form.wire == FIXED64:
                    out += struct.pack("<Q", one)
                else:
                    data = one.encode() if form.message is not None else one
                    out += encode_varint(len(data)) + data
        return bytes(out)

    def framed(self) -> bytes:
        """Return the bytes of the message after their number: how it travels on a stream."""
        data = self.encode()
        return encode_varint(len(data)) + data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Return the message in bytes. Raises MalformedMessage. Of a field that is given twice the last one counts."""
        if len(data) > cls.max_bytes:
            raise MalformedMessage(f"a message of {len(data)} bytes: expected at most {cls.max_bytes}")
        found: defaultdict[int, list[tuple[int, int | bytes]]] = defaultdict(list)
        for number, wire, value in _split(data):
            found[number].append((wire, value))
        values: dict[str, Any] = {}
        for name, form in _forms(cls).items():
            loaded = [_load(form, wire, value) for wire, value in found.get(form.number, ())]
            if form.repeated:
                values[name] = tuple(loaded)
            elif loaded:
                values[name] = loaded[-1]
        return cls(**values)


_FORMS: Final[dict[type[Any], dict[str, Form]]] = {}


def _forms(cls: type[Any]) -> dict[str, Form]:
    """Return the forms of the fields of a message by name, in the order of their numbers; read once."""
    if (found := _FORMS.get(cls)) is not None:
        return found
    hints = get_type_hints(cls, include_extras=True)
    forms = {each.name: hints[each.name].__metadata__[0] for each in fields(cls)}
    found = _FORMS[cls] = dict(sorted(forms.items(), key=lambda item: item[1].number))
    return found


def _load(form: Form, wire: int, value: int | bytes) -> Any:
    if wire != form.wire:
        raise MalformedMessage(f"field {form.number} has the wire type {wire}: expected {form.wire}")
    if form.message is not None:
        assert isinstance(value, bytes)
        return form.message.decode(value)
    if form.choices is not None:
        return form.choices(value) if value in {each.value for each in form.choices} else None
    return value


def _split(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """Yield number, wire type and value of each field."""
    position = 0
    for _ in range(MAX_FIELDS):
        if position == len(data):
            return
        tag, position = decode_varint(data, position)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise MalformedMessage("a field has the number 0")
        if wire == VARINT:
            value, position = decode_varint(data, position)
            yield number, wire, value
            continue
        if wire == BYTES:
            size, position = decode_varint(data, position)
        elif wire in {FIXED64, FIXED32}:
            size = 8 if wire == FIXED64 else 4
        else:
            raise MalformedMessage(f"field {number} has the unknown wire type {wire}")
        chunk = data[position : position + size]
        if len(chunk) < size:
            raise MalformedMessage("the message is cut off")
        position += size
        yield number, wire, chunk if wire == BYTES else int.from_bytes(chunk, "little")
    if position != len(data):
        raise MalformedMessage(f"a message has at most {MAX_FIELDS} fields")


def encode_varint(value: int) -> bytes:
    """Return an unsigned integer in groups of seven bits, the lowest first."""
    if not 0 <= value <= MAX_VARINT:
        raise ValueError(f"{value} is not an unsigned integer of 64 bits")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the integer at a position, and the position after it. Raises MalformedMessage."""
    value = 0
    for count, byte in enumerate(data[position : position + 10]):
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            if value > MAX_VARINT:
                break
            return value, position + count + 1
    raise MalformedMessage("an integer is cut off, or has more than 64 bits")


class FrameReader:
    """Finds the messages in what arrives on a stream: each is preceded by the number of its bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    @property
    def missing(self) -> int:
        """How many bytes to read at most: no byte beyond the next message, which may belong to a circuit."""
        try:
            size, start = decode_varint(bytes(self._buffer[:10]), 0)
        except MalformedMessage:
            return 1
        return start + size - len(self._buffer)

    def feed(self, data: bytes) -> bytes | None:
        """Take what was read, of at most `missing` bytes; return the message once it is whole.

        Raises MalformedMessage for one that is too long.
        """
        self._buffer += data
        if self._buffer[-1] >= 0x80 and len(self._buffer) < 3:
            return None
        size, start = decode_varint(bytes(self._buffer[:10]), 0)
        if size > self._max_bytes:
            raise MalformedMessage(f"a message of {size} bytes: expected at most {self._max_bytes}")
        if len(self._buffer) < start + size:
            return None
        message = bytes(self._buffer[start:])
        self._buffer.clear()
        return message
