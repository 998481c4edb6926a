"""The sync protocol: two peers make their histories equal over a stream. Bytes in, messages out, and back.

The initiator compares its set with the responder's from the root of the tree down (`protocol.reconciliation`), gets the
envelopes it lacks and puts those that the responder lacks. The responder remembers nothing from one request to the
next, so that a broken exchange is resumed by beginning another: what was exchanged differs no more.

One party speaks at a time. `TABLE` says who may say what when, and is the same for both ends.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

from protocol import fields, half_duplex
from protocol.canonical import Value
from protocol.errors import RemoteProtocolError
from protocol.fields import Fields
from protocol.half_duplex import Busy, HalfDuplexConnection, Turn
from protocol.limits import (
    MAX_BUCKET,
    MAX_BUSY_S,
    MAX_COUNT,
    MAX_GET,
    MAX_LISTED,
    MAX_QUERIES,
)
from protocol.reconciliation import (
    ID_BYTES,
    KEY_DIGITS,
    Answer,
    Equal,
    Listing,
    PackedIds,
    Split,
    Summary,
    key_range,
    parse_prefix,
)
from protocol.states import Role

PROTOCOL_ID: Final = "/metaswarm/sync/1.0.0"

_ID_BITS: Final = 8 * ID_BYTES

_T = TypeVar("_T", bytes, str, int)


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """The initiator begins: from this bucket on it has so many ids, with this digest, and keeps nothing older."""

    first_bucket: int
    count: int
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The responder agrees to compare from the later of both first buckets on; what it has there is its answer."""

    first_bucket: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class Compare:
    """The initiator has this much under these prefixes: what has the responder?"""

    queries: tuple[Summary, ...]


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to the first queries of a Compare, in order; to as many as fit, and at least to one."""

    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Get:
    """The initiator wants the envelopes with these ids."""

    ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Items:
    """Envelopes that the initiator wanted, in any order; `last` ends the answer, also when some are not there."""

    envelopes: tuple[bytes, ...]
    last: bool


@dataclass(frozen=True, slots=True)
class Put:
    """Envelopes that the responder was found to lack."""

    envelopes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The responder has stored so many of the envelopes as new."""

    count: int


Message: TypeAlias = Greeting | Welcome | Busy | Compare | Answers | Get | Items | Put | Taken


class SyncState(enum.StrEnum):
    """How far the conversation is; the same at both ends."""

    NEW = "new"
    GREETED = "greeted"
    IDLE = "idle"
    COMPARING = "comparing"
    GETTING = "getting"
    PUTTING = "putting"
    REFUSED = "refused"
    CLOSED = "closed"
    """The remote ended the stream."""
    ERROR = "error"
    """The remote broke the protocol."""


_I, _R = Role.INITIATOR, Role.RESPONDER

TABLE: Final[Mapping[tuple[SyncState, type[Message]], Turn[SyncState]]] = {
    (SyncState.NEW, Greeting): Turn(_I, SyncState.GREETED),
    (SyncState.GREETED, Welcome): Turn(_R, SyncState.IDLE),
    (SyncState.GREETED, Busy): Turn(_R, SyncState.REFUSED),
    (SyncState.IDLE, Compare): Turn(_I, SyncState.COMPARING),
    (SyncState.COMPARING, Answers): Turn(_R, SyncState.IDLE),
    (SyncState.IDLE, Get): Turn(_I, SyncState.GETTING),
    # Items that are not the last leave the state as it is.
    (SyncState.GETTING, Items): Turn(_R, SyncState.IDLE),
    (SyncState.IDLE, Put): Turn(_I, SyncState.PUTTING),
    (SyncState.PUTTING, Taken): Turn(_R, SyncState.IDLE),
}


class SyncConnection(HalfDuplexConnection[Message, SyncState]):
    """One end of a sync stream.

    Checks as well that answers fit what was asked: that they lie under their prefix, and are no more than wanted.
    """

    def __init__(self, role: Role) -> None:
        super().__init__(
            role, TABLE, _to_map, _from_map, first=SyncState.NEW, closed=SyncState.CLOSED, error=SyncState.ERROR
        )
        self._queries: tuple[Summary, ...] = ()
        self._wanted = 0

    def _check(self, message: Message) -> None:
        if isinstance(message, Welcome):
            _check_answers((message.answer,), self._queries)
        if isinstance(message, Answers):
            _check_answers(message.answers, self._queries)
        if isinstance(message, Items) and len(message.envelopes) > self._wanted:
            raise RemoteProtocolError("more envelopes came than were asked for")

    def _record(self, message: Message) -> None:
        if isinstance(message, Greeting):
            self._queries = (Summary("", message.count, message.digest),)
        elif isinstance(message, Compare):
            self._queries = message.queries
        elif isinstance(message, Get):
            self._wanted = len(message.ids)
        elif isinstance(message, Items):
            self._wanted -= len(message.envelopes)


def answer_bytes(answer: Answer) -> int:
    """Return about how many bytes, rather more than fewer, an answer takes in a message."""
    match answer:
        case Equal():
            return 1
        case Split(parts):
            return KEY_DIGITS + 64 + (ID_BYTES + 16) * len(parts)
        case Listing(buckets):
            return 16 + sum(16 + len(ids.packed) for _, ids in buckets)


def envelope_bytes(envelope: bytes) -> int:
    """Return how many bytes, rather more than fewer, an envelope takes in a message."""
    return len(envelope) + 5


def _to_map(message: Message) -> dict[str, Value]:
    match message:
        case Greeting():
            return {
                "type": "greeting",
                "first_bucket": message.first_bucket,
                "count": message.count,
                "digest": message.digest,
            }
        case Welcome():
            return {
                "type": "welcome",
                "first_bucket": message.first_bucket,
                "answer": _answer_to_value(message.answer),
            }
        case Busy():
            return {"type": "busy", "retry_s": message.retry_s}
        case Compare():
            return {"type": "compare", "queries": [[q.prefix, q.count, q.digest] for q in message.queries]}
        case Answers():
            return {"type": "answers", "answers": [_answer_to_value(answer) for answer in message.answers]}
        case Get():
            return {"type": "get", "ids": b"".join(message.ids)}
        case Items():
            return {"type": "items", "envelopes": message.envelopes, "last": message.last}
        case Put():
            return {"type": "put", "envelopes": message.envelopes}
        case Taken():
            return {"type": "taken", "count": message.count}


def _answer_to_value(answer: Answer) -> Value:
    match answer:
        case Equal():
            return None
        case Split(parts):
            stem = parts[0].prefix[:-1]
            return {"stem": stem, "parts": [[part.prefix[len(stem) :], part.count, part.digest] for part in parts]}
        case Listing(buckets):
            return {"buckets": [[bucket, ids.packed] for bucket, ids in buckets]}


def _from_map(taken: Fields) -> Message:
    kind = taken.name("type", 16)
    message: Message
    match kind:
        case "greeting":
            message = Greeting(
                first_bucket=taken.integer("first_bucket", 0, MAX_BUCKET),
                count=taken.integer("count", 0, MAX_COUNT),
                digest=taken.raw("digest", ID_BYTES),
            )
        case "welcome":
            message = Welcome(
                first_bucket=taken.integer("first_bucket", 0, MAX_BUCKET),
                answer=_answer(taken.take("answer")),
            )
        case "busy":
            message = Busy(retry_s=taken.integer("retry_s", 0, MAX_BUSY_S))
        case "compare":
            message = Compare(tuple(_query(query) for query in taken.array("queries", MAX_QUERIES)))
            if not message.queries:
                raise RemoteProtocolError("a compare without queries")
        case "answers":
            message = Answers(tuple(_answer(answer) for answer in taken.array("answers", MAX_QUERIES)))
        case "get":
            message = Get(tuple(_packed_ids(taken.take("ids"), MAX_GET)))
        case "items":
            message = Items(half_duplex.envelopes(taken, MAX_GET), last=taken.flag("last"))
        case "put":
            message = Put(half_duplex.envelopes(taken, MAX_GET))
        case "taken":
            message = Taken(count=taken.integer("count", 0, MAX_GET))
        case _:
            raise RemoteProtocolError(f"unknown message {kind!r}")
    taken.finish()
    return message


def _query(value: object) -> Summary:
    prefix, count, digest = fields.tuple_of(value, 3, "query")
    return Summary(
        parse_prefix(prefix, 0, KEY_DIGITS, "query prefix"),
        fields.integer(count, 0, MAX_COUNT, "query count"),
        fields.raw(digest, ID_BYTES, "query digest"),
    )


def _answer(value: object) -> Answer:
    if value is None:
        return Equal()
    taken = Fields(value, "answer")
    answer: Answer
    if "buckets" in taken:
        answer = Listing(tuple(_bucket(bucket) for bucket in taken.array("buckets", MAX_LISTED)))
        if sum(len(ids) for _, ids in answer.buckets) > MAX_LISTED:
            raise RemoteProtocolError(f"more than {MAX_LISTED} ids are listed")
    else:
        stem = parse_prefix(taken.take("stem"), 0, KEY_DIGITS - 1, "stem")
        answer = Split(tuple(_part(part, stem) for part in taken.array("parts", 16)))
        if not answer.summaries:
            raise RemoteProtocolError("a split into no parts")
    taken.finish()
    return answer


def _part(value: object, stem: str) -> Summary:
    digit, count, digest = fields.tuple_of(value, 3, "part")
    return Summary(
        stem + parse_prefix(digit, 1, 1, "part digit"),
        fields.integer(count, 1, MAX_COUNT, "part count"),
        fields.raw(digest, ID_BYTES, "part digest"),
    )


def _bucket(value: object) -> tuple[int, PackedIds]:
    bucket, ids = fields.tuple_of(value, 2, "bucket")
    return fields.integer(bucket, 0, MAX_BUCKET, "bucket"), _packed_ids(ids, MAX_LISTED)


def _packed_ids(value: object, max_count: int) -> PackedIds:
    """Return ids that travel end to end, and are all different because they ascend."""
    if type(value) is not bytes or not value or len(value) % ID_BYTES or len(value) > max_count * ID_BYTES:
        raise RemoteProtocolError(f"ids are not 1 to {max_count} times {ID_BYTES} bytes")
    ids = PackedIds(value)
    _require_ascending(list(ids), "ids")
    return ids


def _require_ascending(values: Sequence[_T], what: str) -> None:
    if list(values) != sorted(set(values)):
        raise RemoteProtocolError(f"{what} do not ascend")


def _check_answers(answers: tuple[Answer, ...], queries: tuple[Summary, ...]) -> None:
    """Raise RemoteProtocolError unless every answer speaks of what its query is about."""
    if not 1 <= len(answers) <= len(queries):
        raise RemoteProtocolError(f"{len(answers)} answers to {len(queries)} queries")
    for answer, query in zip(answers, queries, strict=False):
        low, end = key_range(query.prefix)
        match answer:
            case Split(parts):
                prefixes = [part.prefix for part in parts]
                _require_ascending(prefixes, "parts")
                if len(prefixes[0]) <= len(query.prefix) or not prefixes[0].startswith(query.prefix):
                    raise RemoteProtocolError(f"a split of {prefixes[0]!r} where {query.prefix!r} was asked about")
            case Listing(buckets):
                _require_ascending([bucket for bucket, _ in buckets], "buckets")
                for bucket, ids in buckets:
                    first, last = (bucket << _ID_BITS | int.from_bytes(ids[index]) for index in (0, len(ids) - 1))
                    if not low <= first <= last < end:
                        raise RemoteProtocolError(f"ids that are not under the prefix {query.prefix!r}")
            case Equal():
                pass
