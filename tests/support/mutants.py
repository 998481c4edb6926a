"""What a peer might send: whatever has a decoder here, and ways to spoil it that get past its first checks.

A new kind of frame or record joins by a line in `targets`; `benchmarks/mutations.py` and the property tests take all.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from protocol import canonical, chains
from protocol.announcements import Heartbeat, Placement, Record, ServedSpan, SpanRecord
from protocol.blobs import BlobFound, BlobInitiator, BlobRequest, BlobResponder
from protocol.capabilities import CapabilityRecord
from protocol.codec import decode_control, decode_step_header, encode_control, encode_step_header
from protocol.consensus import Body, sign_message, verify_message
from protocol.consensus_values import (
    Cell,
    CellReadings,
    Commit,
    EquivocationProof,
    Member,
    PeerReading,
    Reading,
    Reveal,
    Signature,
    Statement,
)
from protocol.half_duplex import Busy
from protocol.history import HistoryDigest, decode_batch, encode_batch
from protocol.identity import BlockRange, ModelId
from protocol.messages import Load
from protocol.observations import verify_observation
from protocol.presence import PresenceReader, encode_present
from protocol.reconciliation import Equal, Listing, PackedIds, Split, Summary
from protocol.records import seal, verify_envelope, verify_record
from protocol.states import Role
from protocol.sync import Answers, Compare, Get, Greeting, Items, Message, Put, SyncConnection, Taken, Welcome
from tests.support.capabilities import EPYC
from tests.support.observations import NOW_S, key, peer, signed
from tests.unit.protocol.job_streams import MESSAGES, failed, hello, new_connection, open_message, opened, rows, wire

_MODEL: Final = ModelId("5a" * 32)
_DIGEST: Final = bytes(range(32))

_SPLICES: Final = (
    b"\x91" * 40,  # arrays, one in another
    b"\x81\xa1a" * 20,  # maps, one in another
    b"\xdd\xff\xff\xff\xff",  # an array of four thousand million
    b"\xdf\xff\xff\xff\xff",  # a map of as many
    b"\xc6\xff\xff\xff\xff",  # so many bytes
    b"\xdb\xff\xff\xff\xff",  # a text of so many
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",  # the greatest integer
    b"\xd3\x80\x00\x00\x00\x00\x00\x00\x00",  # the least
    b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00",  # infinity
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",  # no number
    b"\xc1",  # what msgpack never uses
    b"\xd4\x00\x00",  # an extension
    b"\xa1\xff",  # text that is no UTF-8
    b"\xc0",
    b"\xc3",
)
"""Pieces of msgpack that a decoder may trip over."""


@dataclass(frozen=True)
class Target:
    """One decoder. `seeds`: what it takes. `decode`: raises RemoteProtocolError for what it does not."""

    name: str
    seeds: tuple[bytes, ...]
    decode: Callable[[bytes], object]


def targets() -> tuple[Target, ...]:
    """Return every decoder of what peers send."""
    return (
        Target("control frame", tuple(map(encode_control, MESSAGES.values())), decode_control),
        Target("step header", (encode_step_header(rows(3)),), decode_step_header),
        Target("job stream, initiator", (wire(hello(), opened(), failed()),), _hear_answers),
        Target(
            "job stream, responder", (wire(hello(), *map(MESSAGES.__getitem__, ("open", "close", "ping"))),), _hear_work
        ),
        Target("blob request", (BlobInitiator().request(_REQUEST),), lambda data: BlobResponder().receive_data(data)),
        Target("blob answer", (_blob_answer(),), _hear_blob),
        *_sync_targets(),
        *_chain_targets(),
        Target("presence", (b"".join(encode_present(_PRESENT)),), lambda data: PresenceReader().receive_data(data)),
        Target("batch of envelopes", (encode_batch([signed(1).envelope, signed(2).envelope]),), decode_batch),
        *_signed_targets("observation", [signed(1).envelope, signed(2, stages=(3, 4, 5)).envelope], verify_observation),
        *(
            each
            for record in _RECORDS
            for each in _signed_targets(
                record.kind, [seal(record, key(0))], partial(verify_record, type(record), now_s=NOW_S)
            )
        ),
        *(
            each
            for body in _EPOCH
            for message in [sign_message(body, key(0))]
            for each in _signed_targets(_kind_of(message.envelope), [message.envelope], verify_message)
        ),
    )


def mutant(dice: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Return one of the seeds, spoilt in one to three places."""
    data = bytearray(dice.choice(seeds))
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        place = dice.randrange(len(data) + 1)
        length = dice.choice((1, 1, 2, 4, 8, 32))
        match dice.randrange(8):
            case 0 if data:
                data[place % len(data)] ^= 1 << dice.randrange(8)
            case 1 if data:
                data[place % len(data)] = dice.randrange(256)
            case 2:
                del data[place : place + length]
            case 3:
                del data[place:]
            case 4:
                data[place:place] = dice.randbytes(length)
            case 5:
                data[place:place] = data[place : place + 8 * length]
            case 6:
                data[place : place + dice.choice((0, 1, length))] = dice.choice(_SPLICES)
            case _:
                other = dice.choice(seeds)
                start = dice.randrange(len(other))
                data[place : place + length] = other[start : start + length]
    return bytes(data)


# Streams


def _hear_work(data: bytes) -> None:
    connection = new_connection(Role.RESPONDER)
    connection.send(hello())
    connection.receive_data(data)
    connection.receive_data(b"")


def _hear_answers(data: bytes) -> None:
    connection = new_connection(Role.INITIATOR)
    connection.send(hello())
    connection.send(open_message())
    connection.receive_data(data)
    connection.receive_data(b"")


_REQUEST: Final = BlobRequest(sha256="5a" * 32, offset=3, length=40)


def _blob_answer() -> bytes:
    responder = BlobResponder()
    responder.receive_data(BlobInitiator().request(_REQUEST))
    return responder.answer(BlobFound(size=100, length=40)) + b"".join(responder.send_data(bytes(40)))


def _hear_blob(data: bytes) -> None:
    initiator = BlobInitiator()
    initiator.request(_REQUEST)
    initiator.receive_data(data)
    initiator.receive_data(b"")


_SUMMARY: Final = Summary("", 3, _DIGEST)
_GREETING: Final = Greeting(first_bucket=7, count=3, digest=_DIGEST)
_WELCOME: Final = Welcome(
    first_bucket=7, answer=Split((Summary("00000007a", 1, _DIGEST), Summary("00000007b", 2, _DIGEST)))
)
_CONVERSATIONS: Final[tuple[tuple[Message, ...], ...]] = (
    (_GREETING,),
    (_GREETING, _WELCOME),
    (_GREETING, _WELCOME, Compare((_SUMMARY,))),
    (_GREETING, _WELCOME, Compare((_SUMMARY,)), Answers((Listing(((7, PackedIds(_DIGEST)),)),))),
    (_GREETING, _WELCOME, Compare((_SUMMARY,)), Answers((Equal(),))),
    (_GREETING, _WELCOME, Get((_DIGEST,))),
    (_GREETING, _WELCOME, Get((_DIGEST,)), Items((b"envelope",), last=True)),
    (_GREETING, _WELCOME, Put((b"envelope", b"another"))),
    (_GREETING, _WELCOME, Put((b"envelope",)), Taken(count=1)),
)


def _sync_targets() -> list[Target]:
    """For every message of the sync protocol the end that hears it, with all that was said before."""
    found = []
    for said in _CONVERSATIONS:
        listener = Role.RESPONDER if len(said) % 2 else Role.INITIATOR
        data = _converse(said[:-1])[_other(listener)].send(said[-1])
        found.append(
            Target(f"sync {type(said[-1]).__name__.lower()}", (data,), partial(_hear_next, said[:-1], listener))
        )
    return found


def _hear_next(said: Sequence[Message], listener: Role, data: bytes) -> None:
    connection = _converse(said)[listener]
    connection.receive_data(data)
    connection.receive_data(b"")


def _converse(said: Sequence[Message]) -> dict[Role, SyncConnection]:
    ends = {role: SyncConnection(role) for role in Role}
    for number, message in enumerate(said):
        speaker = Role.RESPONDER if number % 2 else Role.INITIATOR
        ends[_other(speaker)].receive_data(ends[speaker].send(message))
    return ends


def _other(role: Role) -> Role:
    return Role.INITIATOR if role is Role.RESPONDER else Role.RESPONDER


_ASK: Final = chains.GetStatements(chain=_DIGEST, locator=(_DIGEST, _DIGEST), digest=_DIGEST)
_CHAIN_CONVERSATIONS: Final[tuple[tuple[chains.Message, ...], ...]] = (
    (_ASK,),
    (_ASK, chains.Records(envelopes=(b"one", b"other"), last=True, rest=chains.Remaining.STATEMENTS)),
    (_ASK, Busy(retry_s=5)),
    (
        _ASK,
        chains.Records(envelopes=(), last=True, rest=chains.Remaining.RECENT),
        chains.Inventory((b"12345678", b"23456789")),
    ),
    (_ASK, chains.Records(envelopes=(), last=True), chains.GetState(_DIGEST)),
    (
        _ASK,
        chains.Records(envelopes=(), last=True),
        chains.GetState(_DIGEST),
        chains.StatePart(
            members=(Member(peer(0), "two cores", 4096, 1024, 1, 3),),
            candidates=(Member(peer(1), "two cores", since=6),),
            cells=(
                (
                    Cell("two cores", "short", "fast"),
                    CellReadings(7, (PeerReading(peer(0), -5), PeerReading(peer(1), 5))),
                ),
            ),
            expelled=(peer(2),),
            last=True,
        ),
    ),
)


def _chain_targets() -> list[Target]:
    """For every message of the chain protocol the end that hears it, with all that was said before."""
    found = []
    for said in _CHAIN_CONVERSATIONS:
        listener = Role.RESPONDER if len(said) % 2 else Role.INITIATOR
        data = _converse_about_chains(said[:-1])[_other(listener)].send(said[-1])
        hear = partial(_hear_next_about_chains, said[:-1], listener)
        found.append(Target(f"chain {type(said[-1]).__name__.lower()}", (data,), hear))
    return found


def _hear_next_about_chains(said: Sequence[chains.Message], listener: Role, data: bytes) -> None:
    connection = _converse_about_chains(said)[listener]
    connection.receive_data(data)
    connection.receive_data(b"")


def _converse_about_chains(said: Sequence[chains.Message]) -> dict[Role, chains.ChainConnection]:
    ends = {role: chains.ChainConnection(role) for role in Role}
    for number, message in enumerate(said):
        speaker = Role.RESPONDER if number % 2 else Role.INITIATOR
        ends[_other(speaker)].receive_data(ends[speaker].send(message))
    return ends


# Signed records

_TIMES: Final[dict[str, Any]] = {"sequence": 3, "issued_at_s": NOW_S, "expires_at_s": NOW_S + 600}
_RECORDS: Final[tuple[Record, ...]] = (
    SpanRecord(peer=peer(0), model=_MODEL, blocks=(BlockRange(0, 15), BlockRange(20, 22)), **_TIMES),
    Heartbeat(
        peer=peer(0),
        interval_ms=2500,
        multiaddrs=("/ip4/127.0.0.1/tcp/4001",),
        agent="metaswarm/0.1.0",
        spans=(ServedSpan(model=_MODEL, blocks=BlockRange(0, 15), load=Load(sessions=2, step_s=0.02)),),
        placements=(Placement(model=_MODEL, blocks=BlockRange(0, 15), rate=40.0, movable=True),),
        placed_at_ms=NOW_S * 1000,
        **_TIMES,
    ),
    CapabilityRecord(peer=peer(0), capabilities=EPYC, **_TIMES),
    HistoryDigest(
        peer=peer(0), first_bucket=7, count=3, digest=_DIGEST, parts=(Summary("00000007", 3, _DIGEST),), **_TIMES
    ),
)

_PRESENT: Final = [seal(record, key(0)) for record in _RECORDS if isinstance(record, Heartbeat)]

_COMMIT: Final = Commit(
    chain=_DIGEST, epoch=5, parent=_DIGEST, peer=peer(0), hardware="cpu", commitment=_DIGEST, observations=(_DIGEST,)
)
_SIGNATURE: Final = Signature(_DIGEST, 5, peer(0), _DIGEST)
_EPOCH: Final[tuple[Body, ...]] = (
    _COMMIT,
    Reveal(_DIGEST, 5, peer(0), _DIGEST, (Reading(Cell("context", "method", "cpu"), 12_345),), b"\x05\x01"),
    Statement(
        chain=_DIGEST,
        epoch=5,
        parent=_DIGEST,
        proposer=peer(0),
        commits=(_DIGEST,),
        joined=(peer(1),),
        left=(),
        expelled=(peer(2),),
        beacon=_DIGEST,
        set_digest=_DIGEST,
        table_digest=_DIGEST,
        state_digest=_DIGEST,
    ),
    Statement(
        chain=_DIGEST,
        epoch=5,
        parent=_DIGEST,
        proposer=peer(0),
        commits=(_DIGEST,),
        joined=(),
        left=(),
        expelled=(),
        beacon=_DIGEST,
        set_digest=_DIGEST,
        table_digest=_DIGEST,
        state_digest=_DIGEST,
        remaining=b"\x05",
    ),
    _SIGNATURE,
    EquivocationProof(
        chain=_DIGEST,
        first=sign_message(_SIGNATURE, key(0)).envelope,
        second=sign_message(replace(_SIGNATURE, statement=bytes(32)), key(0)).envelope,
    ),
)


def _signed_targets(kind: str, envelopes: Sequence[bytes], decode: Callable[[bytes], object]) -> list[Target]:
    """An envelope spoilt by those who carry it, and a payload spoilt by whoever signs it."""
    payloads = tuple(verify_envelope(envelope, kind).payload for envelope in envelopes)
    return [
        Target(kind, tuple(envelopes), decode),
        Target(f"{kind}, signed", payloads, lambda payload: decode(_sign(kind, payload))),
    ]


def _sign(kind: str, payload: bytes) -> bytes:
    """Return the envelope of any payload, as a peer may make it that keeps to no rule (docs/protocol.md, Records)."""
    return canonical.encode(
        {
            "kind": kind,
            "public_key": key(0).public_key().public_bytes_raw(),
            "payload": payload,
            "signature": key(0).sign(f"metaswarm/1/{kind}\n".encode() + payload),
        }
    )


def _kind_of(envelope: bytes) -> str:
    fields = canonical.decode(envelope, max_bytes=len(envelope))
    assert isinstance(fields, dict)
    return str(fields["kind"])
