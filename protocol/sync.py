"""The sync protocol: two peers reconcile their histories over a stream. Bytes to messages, without I/O.

The initiator compares its set with the responder's from the root of the tree down (`protocol.reconciliation`), fetches
the envelopes that it lacks and sends those that the responder lacks. The responder keeps nothing from one request to
the next, so that a session that broke is resumed by a new one: what was exchanged differs no more.

`PROTOCOL.table` is the same for both ends.
"""

import enum
from dataclasses import dataclass
from typing import Annotated, Final, TypeAlias

from protocol import fields
from protocol.canonical import Value
from protocol.errors import RemoteProtocolError
from protocol.forms import Digest, Envelope
from protocol.half_duplex import Busy, HalfDuplexConnection, HalfDuplexProtocol, Turn, packed, require_ascending
from protocol.limits import MAX_BUCKET, MAX_COUNT, MAX_GET, MAX_LISTED, MAX_QUERIES
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
from protocol.schema import ARRAY, Count, Form, MessageTypes, Range, from_map
from protocol.states import Role

PROTOCOL_ID: Final = "/metaswarm/sync/1.0.0"

_ID_BITS: Final = 8 * ID_BYTES


def _query(value: object, what: str) -> Summary:
    prefix, count, digest = fields.tuple_of(value, 3, what)
    return Summary(
        parse_prefix(prefix, 0, KEY_DIGITS, "query prefix"),
        fields.integer(count, 0, MAX_COUNT, "query count"),
        fields.raw(digest, ID_BYTES, "query digest"),
    )


def _bucket(value: object, what: str) -> tuple[int, PackedIds]:
    bucket, ids = fields.tuple_of(value, 2, what)
    listed = packed(ID_BYTES, MAX_LISTED, min_count=1, ascending=True).load(ids, "ids")
    return fields.integer(bucket, 0, MAX_BUCKET, "bucket"), PackedIds(b"".join(listed))


@dataclass(frozen=True, slots=True)
class _Part:
    digit: Annotated[str, Form(lambda value, what: parse_prefix(value, 1, 1, what))]
    count: Annotated[int, Range(1, MAX_COUNT)]
    digest: Digest


@dataclass(frozen=True, slots=True)
class _Split:
    stem: Annotated[str, Form(lambda value, what: parse_prefix(value, 0, KEY_DIGITS - 1, what))]
    parts: Annotated[tuple[Annotated[_Part, ARRAY], ...], Count(16, 1)]


@dataclass(frozen=True, slots=True)
class _Listing:
    buckets: Annotated[tuple[Annotated[tuple[int, PackedIds], Form(_bucket)], ...], Count(MAX_LISTED)]


def _answer(value: object, what: str) -> Answer:
    if value is None:
        return Equal()
    if isinstance(value, dict) and "buckets" in value:
        buckets = from_map(_Listing, value, what).buckets
        if sum(len(ids) for _, ids in buckets) > MAX_LISTED:
            raise RemoteProtocolError(f"more than {MAX_LISTED} ids are listed")
        return Listing(buckets)
    split = from_map(_Split, value, what)
    return Split(tuple(Summary(split.stem + part.digit, part.count, part.digest) for part in split.parts))


def _answer_value(answer: Answer) -> Value:
    match answer:
        case Equal():
            return None
        case Split(parts):
            stem = parts[0].prefix[:-1]
            return {"stem": stem, "parts": [[part.prefix[len(stem) :], part.count, part.digest] for part in parts]}
        case Listing(buckets):
            return {"buckets": [[bucket, ids.packed] for bucket, ids in buckets]}


Bucket = Annotated[int, Range(0, MAX_BUCKET)]
Query = Annotated[Summary, Form(_query, lambda query: [query.prefix, query.count, query.digest])]
QueryAnswer = Annotated[Answer, Form(_answer, _answer_value)]
Envelopes = Annotated[tuple[Envelope, ...], Count(MAX_GET)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """The initiator begins: the ids that it stores from a bucket on, by count and digest. It stores none before."""

    first_bucket: Bucket
    count: Annotated[int, Range(0, MAX_COUNT)]
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The responder begins the comparison at the later of both first buckets, and answers for the whole of it."""

    first_bucket: Bucket
    answer: QueryAnswer


@dataclass(frozen=True, slots=True)
class Compare:
    """The initiator summarises what it stores under some prefixes."""

    queries: Annotated[tuple[Query, ...], Count(MAX_QUERIES, 1)]


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to the first queries of a Compare, in order: as many as fit, at least one."""

    answers: Annotated[tuple[QueryAnswer, ...], Count(MAX_QUERIES)]


@dataclass(frozen=True, slots=True)
class Get:
    """The initiator requests the envelopes with these ids."""

    ids: Annotated[tuple[bytes, ...], packed(ID_BYTES, MAX_GET, min_count=1, ascending=True)]


@dataclass(frozen=True, slots=True)
class Items:
    """Requested envelopes, in any order; `last` ends the answer, which may lack some of them."""

    envelopes: Envelopes
    last: bool


@dataclass(frozen=True, slots=True)
class Put:
    """Envelopes that the responder lacks."""

    envelopes: Envelopes


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The responder stored this many of the envelopes as new."""

    count: Annotated[int, Range(0, MAX_GET)]


Message: TypeAlias = Greeting | Welcome | Busy | Compare | Answers | Get | Items | Put | Taken


class SyncState(enum.StrEnum):
    """The state of a sync session, the same at both ends."""

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
    """The remote violated the protocol."""


_I, _R = Role.INITIATOR, Role.RESPONDER

PROTOCOL: Final[HalfDuplexProtocol[Message, SyncState]] = HalfDuplexProtocol(
    messages=MessageTypes(
        {
            "greeting": Greeting,
            "welcome": Welcome,
            "busy": Busy,
            "compare": Compare,
            "answers": Answers,
            "get": Get,
            "items": Items,
            "put": Put,
            "taken": Taken,
        }
    ),
    table={
        (SyncState.NEW, Greeting): Turn(_I, SyncState.GREETED),
        (SyncState.GREETED, Welcome): Turn(_R, SyncState.IDLE),
        (SyncState.GREETED, Busy): Turn(_R, SyncState.REFUSED),
        (SyncState.IDLE, Compare): Turn(_I, SyncState.COMPARING),
        (SyncState.COMPARING, Answers): Turn(_R, SyncState.IDLE),
        (SyncState.IDLE, Get): Turn(_I, SyncState.GETTING),
        # Items that are not the last leave the state unchanged.
        (SyncState.GETTING, Items): Turn(_R, SyncState.IDLE),
        (SyncState.IDLE, Put): Turn(_I, SyncState.PUTTING),
        (SyncState.PUTTING, Taken): Turn(_R, SyncState.IDLE),
    },
    first=SyncState.NEW,
    closed=SyncState.CLOSED,
    error=SyncState.ERROR,
)


class SyncConnection(HalfDuplexConnection[Message, SyncState]):
    """One end of a sync stream. Checks also that answers lie under their prefix, and are no more than requested."""

    def __init__(self, role: Role) -> None:
        super().__init__(role, PROTOCOL)
        self._queries: tuple[Summary, ...] = ()
        self._requested = 0

    def _check(self, message: Message) -> None:
        if isinstance(message, Welcome):
            _check_answers((message.answer,), self._queries)
        if isinstance(message, Answers):
            _check_answers(message.answers, self._queries)
        if isinstance(message, Items) and len(message.envelopes) > self._requested:
            raise RemoteProtocolError("received more envelopes than were requested")

    def _record(self, message: Message) -> None:
        if isinstance(message, Greeting):
            self._queries = (Summary("", message.count, message.digest),)
        elif isinstance(message, Compare):
            self._queries = message.queries
        elif isinstance(message, Get):
            self._requested = len(message.ids)
        elif isinstance(message, Items):
            self._requested -= len(message.envelopes)


def answer_bytes(answer: Answer) -> int:
    """Return an upper estimate of the bytes that an answer takes in a message."""
    match answer:
        case Equal():
            return 1
        case Split(parts):
            return KEY_DIGITS + 64 + (ID_BYTES + 16) * len(parts)
        case Listing(buckets):
            return 16 + sum(16 + len(ids.packed) for _, ids in buckets)


def envelope_bytes(envelope: bytes) -> int:
    """Return an upper estimate of the bytes that an envelope takes in a message."""
    return len(envelope) + 5


def _check_answers(answers: tuple[Answer, ...], queries: tuple[Summary, ...]) -> None:
    """Raise RemoteProtocolError unless every answer lies under the prefix of its query."""
    if not 1 <= len(answers) <= len(queries):
        raise RemoteProtocolError(f"{len(answers)} answers to {len(queries)} queries")
    for answer, query in zip(answers, queries, strict=False):
        low, end = key_range(query.prefix)
        match answer:
            case Split(parts):
                prefixes = [part.prefix for part in parts]
                require_ascending(prefixes, "parts")
                if len(prefixes[0]) <= len(query.prefix) or not prefixes[0].startswith(query.prefix):
                    raise RemoteProtocolError(f"a split of {prefixes[0]!r} answers a query about {query.prefix!r}")
            case Listing(buckets):
                require_ascending([bucket for bucket, _ in buckets], "buckets")
                for bucket, ids in buckets:
                    first, last = (bucket << _ID_BITS | int.from_bytes(ids[index]) for index in (0, len(ids) - 1))
                    if not low <= first <= last < end:
                        raise RemoteProtocolError(f"ids outside the prefix {query.prefix!r}")
            case Equal():
                pass
