"""Strict checks of decoded values. Each returns the value, or raises a RemoteProtocolError that names it.

Nothing is converted: a bool is not an integer, an integer is not a float. Every integer and length is compared with a
limit. `protocol.schema` applies these checks to whole maps.
"""

import enum
import re
from typing import Final, TypeVar

from protocol.errors import RemoteProtocolError
from protocol.identity import BlockRange, JobId, ModelId, PeerId, SessionId, parse_peer_id
from protocol.limits import MAX_BLOCKS, MAX_STAGES

JOB_ID_BYTES: Final = 16
SHA256_BYTES: Final = 32

CONTROL_CHARACTERS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""Not allowed in text on the wire, which ends up in other people's terminals and logs."""

_E = TypeVar("_E", bound=enum.StrEnum)


def integer(value: object, low: int, high: int, what: str) -> int:
    """Return an integer from `low` to `high`, both inclusive."""
    if type(value) is not int:
        raise RemoteProtocolError(f"{what} is not an integer")
    if not low <= value <= high:
        raise RemoteProtocolError(f"{what} is {value}: expected {low} to {high}")
    return value


def number(value: object, low: float, high: float, what: str) -> float:
    """Return a float from `low` to `high`, both inclusive."""
    if type(value) is not float:
        raise RemoteProtocolError(f"{what} is not a float")
    if not low <= value <= high:
        raise RemoteProtocolError(f"{what} is {value}: expected {low} to {high}")
    return value


def text(value: object, max_bytes: int, what: str) -> str:
    """Return text of at most `max_bytes` UTF-8 bytes without control characters."""
    if type(value) is not str:
        raise RemoteProtocolError(f"{what} is not text")
    if len(value) > max_bytes or len(value.encode("utf-8")) > max_bytes:
        raise RemoteProtocolError(f"{what} is longer than {max_bytes} bytes")
    if CONTROL_CHARACTERS.search(value) is not None:
        raise RemoteProtocolError(f"{what} contains a control character")
    return value


def name(value: object, max_bytes: int, what: str) -> str:
    """Return text that is not empty."""
    result = text(value, max_bytes, what)
    if not result:
        raise RemoteProtocolError(f"{what} is empty")
    return result


def raw(value: object, length: int, what: str) -> bytes:
    """Return exactly `length` bytes."""
    if type(value) is not bytes or len(value) != length:
        raise RemoteProtocolError(f"{what} is not {length} bytes")
    return value


def flag(value: object, what: str) -> bool:
    """Return a truth value."""
    if not isinstance(value, bool):
        raise RemoteProtocolError(f"{what} is neither true nor false")
    return value


def array(value: object, max_count: int, what: str, min_count: int = 0) -> list[object]:
    """Return an array of `min_count` to `max_count` elements."""
    if type(value) is not list:
        raise RemoteProtocolError(f"{what} is not an array")
    if not min_count <= len(value) <= max_count:
        raise RemoteProtocolError(f"{what} has {len(value)} elements: expected {min_count} to {max_count}")
    return value


def tuple_of(value: object, length: int, what: str) -> list[object]:
    """Return an array of exactly `length` elements."""
    if type(value) is not list or len(value) != length:
        raise RemoteProtocolError(f"{what} is not an array of {length} elements")
    return value


def mapping(value: object, max_count: int, what: str, min_count: int = 0) -> dict[str, object]:
    """Return a map of `min_count` to `max_count` entries."""
    if not isinstance(value, dict):
        raise RemoteProtocolError(f"{what} is not a map")
    if not min_count <= len(value) <= max_count:
        raise RemoteProtocolError(f"{what} has {len(value)} entries: expected {min_count} to {max_count}")
    return value


def choice(value: object, options: type[_E], what: str) -> _E:
    """Return the member of an enumeration of texts."""
    try:
        return options(text(value, 64, what))
    except ValueError:
        raise RemoteProtocolError(f"{what} is not one of {', '.join(options)}") from None


def peer_id(value: object, what: str) -> PeerId:
    """Return a peer id, which travels as text."""
    try:
        return parse_peer_id(text(value, 64, what))
    except ValueError as error:
        raise RemoteProtocolError(f"{what}: {error}") from None


def model_id(value: object, what: str) -> ModelId:
    """Return a model id, which travels as the 32 bytes of the sha256."""
    return ModelId(raw(value, SHA256_BYTES, what).hex())


def job_id(value: object, what: str) -> JobId:
    """Return a job id, which travels as its 16 bytes."""
    return JobId(raw(value, JOB_ID_BYTES, what).hex())


def session_id(value: object, what: str) -> SessionId:
    """Return a session id, which travels as [16 bytes of the job id, stage]."""
    job, stage = tuple_of(value, 2, what)
    return SessionId(job_id(job, what), integer(stage, 0, MAX_STAGES, what))


def block_range(value: object, what: str) -> BlockRange:
    """Return a range of blocks, which travels as [start, end]."""
    start, end = tuple_of(value, 2, what)
    try:
        return BlockRange(integer(start, 0, MAX_BLOCKS, what), integer(end, 0, MAX_BLOCKS, what))
    except ValueError as error:
        raise RemoteProtocolError(f"{what}: {error}") from None
