"""The chain protocol: a peer has a neighbour tell it what it missed of a consensus. Bytes in, messages out, and back.

Gossip loses messages; this does not. The initiator says how far it stands and what it heard of late; the responder
hands over the statements after that with their signatures, then whatever of late the initiator lacks, and on request
the state after a statement, which is checked against the statement's digests. Nothing here needs trust: what is handed
over are the signed records of `protocol.consensus`, and everybody may ask everybody.

One party speaks at a time. `TABLE` says who may say what when, and is the same for both ends. The responder remembers
nothing from one request to the next but which chain was asked about.
"""

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from protocol import half_duplex
from protocol.canonical import Value, decode, encode
from protocol.consensus_values import (
    MAX_EPOCH,
    MAX_READING,
    Cell,
    CellReadings,
    Member,
    PeerReading,
    Reputation,
)
from protocol.errors import RemoteProtocolError
from protocol.fields import SHA256_BYTES, Fields, array, integer, name, peer_id, raw, tuple_of
from protocol.framing import FrameReader, FrameType, encode_frame
from protocol.half_duplex import MAX_PAYLOAD_BYTES, Busy, HalfDuplexConnection, Turn
from protocol.identity import PeerId, peer_id_from_public_key, public_key_of
from protocol.limits import (
    MAX_BUSY_S,
    MAX_CELL_REPLICAS,
    MAX_CHAIN_ITEMS,
    MAX_CONTROL_BYTES,
    MAX_HARDWARE_BYTES,
    MAX_HAVE,
    MAX_INTEGER,
    MAX_LOCATOR,
    MAX_NAME_BYTES,
    MAX_PART_CELLS,
    MAX_PART_MEMBERS,
)
from protocol.states import Role

PROTOCOL_ID: Final = "/metaswarm/chain/1.0.0"

SHORT_ID_BYTES: Final = 8
"""The first bytes of a record's id stand for it where records are only counted up. Two that are alike by ill will cost
those who made them."""


class Rest(enum.StrEnum):
    """What an answer has left out."""

    NOTHING = "nothing"
    STANDING = "standing"
    """More statements follow those that were handed over: ask again from there."""
    RECENT = "recent"
    """What was heard of late differs: say what you have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """The initiator asks about a chain.

    `locator`: statements it stands by, the newest first, ever fewer further back; the responder begins after the first
    that it stands by itself. `digest`: of the short ids of the records of late that it holds, ascending, end to end.
    """

    chain: bytes
    locator: tuple[bytes, ...]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Have:
    """The initiator holds these records of late, by their short ids, ascending."""

    ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """Signed records, a statement before its signatures and before those that follow it.

    The last message of an answer says what was left out.
    """

    envelopes: tuple[bytes, ...]
    last: bool
    rest: Rest = Rest.NOTHING


@dataclass(frozen=True, slots=True)
class Want:
    """The initiator wants the state after a statement."""

    statement: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePart:
    """A part of a state. A state that the responder does not know is one part without anything in it."""

    members: tuple[Member, ...] = ()
    cells: tuple[tuple[Cell, CellReadings], ...] = ()
    expelled: tuple[PeerId, ...] = ()
    last: bool = False


Message: TypeAlias = Ask | Have | Items | Want | StatePart | Busy


class ChainState(enum.StrEnum):
    """How far the conversation is; the same at both ends."""

    NEW = "new"
    IDLE = "idle"
    ASKED = "asked"
    WANTED = "wanted"
    REFUSED = "refused"
    CLOSED = "closed"
    """The remote ended the stream."""
    ERROR = "error"
    """The remote broke the protocol."""


_I, _R = Role.INITIATOR, Role.RESPONDER

TABLE: Final[Mapping[tuple[ChainState, type[Message]], Turn[ChainState]]] = {
    (ChainState.NEW, Ask): Turn(_I, ChainState.ASKED),
    (ChainState.IDLE, Ask): Turn(_I, ChainState.ASKED),
    (ChainState.IDLE, Have): Turn(_I, ChainState.ASKED),
    # Items and parts of a state that are not the last leave the state as it is.
    (ChainState.ASKED, Items): Turn(_R, ChainState.IDLE),
    (ChainState.ASKED, Busy): Turn(_R, ChainState.REFUSED),
    (ChainState.IDLE, Want): Turn(_I, ChainState.WANTED),
    (ChainState.WANTED, StatePart): Turn(_R, ChainState.IDLE),
}


class ChainConnection(HalfDuplexConnection[Message, ChainState]):
    """One end of a chain stream."""

    def __init__(self, role: Role) -> None:
        super().__init__(
            role, TABLE, _to_map, _from_map, first=ChainState.NEW, closed=ChainState.CLOSED, error=ChainState.ERROR
        )


def fill_items(envelopes: Iterable[bytes], rest: Rest) -> Iterator[Items]:
    """Yield envelopes in as few messages as they fit into, at least one, of which the last says what is left out."""
    taken: list[bytes] = []
    room = MAX_PAYLOAD_BYTES
    for envelope in envelopes:
        if taken and (len(envelope) + 5 > room or len(taken) == MAX_CHAIN_ITEMS):
            yield Items(envelopes=tuple(taken), last=False)
            taken, room = [], MAX_PAYLOAD_BYTES
        taken.append(envelope)
        room -= len(envelope) + 5
    yield Items(envelopes=tuple(taken), last=True, rest=rest)


def split_state(
    members: Sequence[Member], cells: Sequence[tuple[Cell, CellReadings]], expelled: Sequence[PeerId]
) -> Iterator[StatePart]:
    """Yield a state in parts, of which each fits into a message."""
    for start in range(0, len(members), MAX_PART_MEMBERS):
        yield StatePart(members=tuple(members[start : start + MAX_PART_MEMBERS]))
    for start in range(0, len(expelled), MAX_PART_MEMBERS):
        yield StatePart(expelled=tuple(expelled[start : start + MAX_PART_MEMBERS]))
    for start in range(0, len(cells), MAX_PART_CELLS):
        yield StatePart(cells=tuple(cells[start : start + MAX_PART_CELLS]))
    yield StatePart(last=True)


def encode_state(parts: Iterable[StatePart]) -> bytes:
    """Return the bytes of a state as it is kept: its parts, each in a frame."""
    return b"".join(encode_frame(FrameType.CONTROL, encode(_to_map(part))) for part in parts)


def decode_state(data: bytes) -> list[StatePart]:
    """Return the parts that `encode_state` was given. Raises RemoteProtocolError where the bytes are something else."""
    parts = []
    for frame in FrameReader().receive_data(data):
        message = _from_map(Fields(decode(frame.body, max_bytes=MAX_CONTROL_BYTES), "message"))
        if not isinstance(message, StatePart):
            raise RemoteProtocolError("no part of a state")
        parts.append(message)
    return parts


def _to_map(message: Message) -> dict[str, Value]:
    match message:
        case Ask():
            locator = b"".join(message.locator)
            return {"type": "ask", "chain": message.chain, "locator": locator, "digest": message.digest}
        case Have():
            return {"type": "have", "ids": b"".join(message.ids)}
        case Items():
            return {"type": "items", "envelopes": message.envelopes, "last": message.last, "rest": str(message.rest)}
        case Want():
            return {"type": "want", "statement": message.statement}
        case StatePart():
            return {
                "type": "statepart",
                "members": [
                    [public_key_of(each.peer), each.hardware, *each.reputation, each.absences]
                    for each in message.members
                ],
                "cells": [
                    [*cell, measured.epoch, [[public_key_of(peer), value] for peer, value in measured.readings]]
                    for cell, measured in message.cells
                ],
                "expelled": b"".join(map(public_key_of, message.expelled)),
                "last": message.last,
            }
        case Busy():
            return {"type": "busy", "retry_s": message.retry_s}


def _from_map(taken: Fields) -> Message:
    kind = taken.name("type", 16)
    message: Message
    match kind:
        case "ask":
            message = Ask(
                chain=taken.raw("chain", SHA256_BYTES),
                locator=_packed(taken.take("locator"), SHA256_BYTES, MAX_LOCATOR, "locator"),
                digest=taken.raw("digest", SHA256_BYTES),
            )
        case "have":
            message = Have(_packed(taken.take("ids"), SHORT_ID_BYTES, MAX_HAVE, "ids"))
            if list(message.ids) != sorted(set(message.ids)):
                raise RemoteProtocolError("ids do not ascend")
        case "items":
            envelopes = half_duplex.envelopes(taken, MAX_CHAIN_ITEMS)
            message = Items(envelopes=envelopes, last=taken.flag("last"), rest=taken.choice("rest", Rest))
        case "want":
            message = Want(taken.raw("statement", SHA256_BYTES))
        case "statepart":
            message = StatePart(
                members=tuple(_member(each) for each in taken.array("members", MAX_PART_MEMBERS)),
                cells=tuple(_cell(each) for each in taken.array("cells", MAX_PART_CELLS)),
                expelled=tuple(
                    peer_id(peer_id_from_public_key(key), "expelled")
                    for key in _packed(taken.take("expelled"), SHA256_BYTES, MAX_PART_MEMBERS, "expelled")
                ),
                last=taken.flag("last"),
            )
        case "busy":
            message = Busy(retry_s=taken.integer("retry_s", 0, MAX_BUSY_S))
        case _:
            raise RemoteProtocolError(f"unknown message {kind!r}")
    taken.finish()
    return message


def _member(value: object) -> Member:
    key, hardware, agreed, deviated, absences = tuple_of(value, 5, "member")
    return Member(
        _peer(key, "member"),
        name(hardware, MAX_HARDWARE_BYTES, "member hardware"),
        Reputation(
            integer(agreed, 0, MAX_INTEGER, "member agreed"), integer(deviated, 0, MAX_INTEGER, "member deviated")
        ),
        integer(absences, 0, MAX_EPOCH, "member absences"),
    )


def _cell(value: object) -> tuple[Cell, CellReadings]:
    hardware, workload, method, epoch, readings = tuple_of(value, 5, "cell")
    cell = Cell(
        name(hardware, MAX_HARDWARE_BYTES, "cell hardware"),
        name(workload, MAX_NAME_BYTES, "cell workload"),
        name(method, MAX_NAME_BYTES, "cell method"),
    )
    measured = tuple(_reading(each) for each in array(readings, MAX_CELL_REPLICAS, "cell readings"))
    return cell, CellReadings(integer(epoch, 0, MAX_EPOCH, "cell epoch"), measured)


def _reading(value: object) -> PeerReading:
    key, reading = tuple_of(value, 2, "cell reading")
    return PeerReading(_peer(key, "cell reading"), integer(reading, -MAX_READING, MAX_READING, "cell reading"))


def _peer(key: object, what: str) -> PeerId:
    return peer_id(peer_id_from_public_key(raw(key, SHA256_BYTES, what)), what)


def _packed(value: object, size: int, max_count: int, what: str) -> tuple[bytes, ...]:
    """Return ids of equal length that travel end to end; there may be none."""
    if type(value) is not bytes or len(value) % size or len(value) > max_count * size:
        raise RemoteProtocolError(f"{what} are not at most {max_count} times {size} bytes")
    return tuple(value[start : start + size] for start in range(0, len(value), size))
