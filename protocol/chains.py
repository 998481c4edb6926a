"""The chain protocol: a peer fetches from a neighbour what it missed of a consensus. Bytes to messages, without I/O.

Gossip loses messages; this protocol recovers them. The initiator sends its position in the chain and a digest of its
recent records; the responder returns the statements after that position with their signatures, then the recent records
that the initiator lacks, and on request the state after a statement, which the initiator checks against the statement's
digests. Nothing here needs trust: everything returned is a signed record of `protocol.consensus`, and every peer may
ask every other.

`PROTOCOL.table` is the same for both ends. Between two requests the responder remembers only the chain.
"""

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, TypeAlias

from protocol.consensus_values import MAX_CANDIDATES, MeasuredCell, Member, load_peer
from protocol.errors import RemoteProtocolError
from protocol.fields import SHA256_BYTES
from protocol.forms import Digest, Envelope
from protocol.framing import FrameReader
from protocol.half_duplex import MAX_PAYLOAD_BYTES, Busy, HalfDuplexConnection, HalfDuplexProtocol, Turn, packed
from protocol.identity import PeerId, public_key_of
from protocol.limits import MAX_CHAIN_ITEMS, MAX_HAVE, MAX_LOCATOR, MAX_PART_CELLS, MAX_PART_MEMBERS
from protocol.schema import Count, Form, MessageTypes
from protocol.states import Role

PROTOCOL_ID: Final = "/metaswarm/chain/2.0.0"

SHORT_ID_BYTES: Final = 8
"""Length of the prefix that stands for a record's id in an inventory. A collision by malice harms only its makers."""


def _packed_peers(value: object, what: str) -> tuple[PeerId, ...]:
    return tuple(load_peer(key, what) for key in packed(SHA256_BYTES, MAX_PART_MEMBERS).load(value, what))


class Remaining(enum.StrEnum):
    """What an answer left out."""

    NOTHING = "nothing"
    STATEMENTS = "standing"
    """More statements follow: request them from the last one received."""
    RECENT = "recent"
    """The recent records differ: send an inventory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GetStatements:
    """The initiator requests the statements of a chain after its own."""

    chain: Digest
    locator: Annotated[tuple[bytes, ...], packed(SHA256_BYTES, MAX_LOCATOR)]
    """Statements on its branch, newest first, sparser further back. The answer starts after the first shared one."""
    digest: Digest
    """Of the short ids of its recent records, ascending, end to end."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """Short ids of the initiator's recent records, ascending."""

    ids: Annotated[tuple[bytes, ...], packed(SHORT_ID_BYTES, MAX_HAVE, ascending=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Signed records, each statement before its signatures and before the statements that follow it."""

    envelopes: Annotated[tuple[Envelope, ...], Count(MAX_CHAIN_ITEMS)]
    last: bool
    """Ends the answer."""
    rest: Remaining = Remaining.NOTHING
    """Valid in the last message of an answer."""


@dataclass(frozen=True, slots=True)
class GetState:
    """The initiator requests the state after a statement."""

    statement: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePart:
    """A part of a state. A state that is unknown to the responder is one empty part."""

    members: Annotated[tuple[Member, ...], Count(MAX_PART_MEMBERS)] = ()
    candidates: Annotated[tuple[Member, ...], Count(MAX_CANDIDATES)] = ()
    cells: Annotated[tuple[MeasuredCell, ...], Count(MAX_PART_CELLS)] = ()
    expelled: Annotated[tuple[PeerId, ...], Form(_packed_peers, lambda peers: b"".join(map(public_key_of, peers)))] = ()
    last: bool = False


Message: TypeAlias = GetStatements | Inventory | Records | GetState | StatePart | Busy


class ChainState(enum.StrEnum):
    """The state of a chain session, the same at both ends."""

    NEW = "new"
    IDLE = "idle"
    ASKED = "asked"
    WANTED = "wanted"
    REFUSED = "refused"
    CLOSED = "closed"
    """The remote ended the stream."""
    ERROR = "error"
    """The remote violated the protocol."""


_I, _R = Role.INITIATOR, Role.RESPONDER

PROTOCOL: Final[HalfDuplexProtocol[Message, ChainState]] = HalfDuplexProtocol(
    messages=MessageTypes(
        {
            "ask": GetStatements,
            "have": Inventory,
            "items": Records,
            "want": GetState,
            "statepart": StatePart,
            "busy": Busy,
        }
    ),
    table={
        (ChainState.NEW, GetStatements): Turn(_I, ChainState.ASKED),
        (ChainState.IDLE, GetStatements): Turn(_I, ChainState.ASKED),
        (ChainState.IDLE, Inventory): Turn(_I, ChainState.ASKED),
        # Records and state parts that are not the last leave the state unchanged.
        (ChainState.ASKED, Records): Turn(_R, ChainState.IDLE),
        (ChainState.ASKED, Busy): Turn(_R, ChainState.REFUSED),
        (ChainState.IDLE, GetState): Turn(_I, ChainState.WANTED),
        (ChainState.WANTED, StatePart): Turn(_R, ChainState.IDLE),
    },
    first=ChainState.NEW,
    closed=ChainState.CLOSED,
    error=ChainState.ERROR,
)


class ChainConnection(HalfDuplexConnection[Message, ChainState]):
    """One end of a chain stream."""

    def __init__(self, role: Role) -> None:
        super().__init__(role, PROTOCOL)


def fill_records(envelopes: Iterable[bytes], rest: Remaining) -> Iterator[Records]:
    """Yield envelopes in as few messages as possible, at least one; the last one carries `rest`."""
    taken: list[bytes] = []
    room = MAX_PAYLOAD_BYTES
    for envelope in envelopes:
        if taken and (len(envelope) + 5 > room or len(taken) == MAX_CHAIN_ITEMS):
            yield Records(envelopes=tuple(taken), last=False)
            taken, room = [], MAX_PAYLOAD_BYTES
        taken.append(envelope)
        room -= len(envelope) + 5
    yield Records(envelopes=tuple(taken), last=True, rest=rest)


def split_state(
    members: Sequence[Member], candidates: Sequence[Member], cells: Sequence[MeasuredCell], expelled: Sequence[PeerId]
) -> Iterator[StatePart]:
    """Yield a state in parts that each fit into a message."""
    if candidates:
        yield StatePart(candidates=tuple(candidates))
    for start in range(0, len(members), MAX_PART_MEMBERS):
        yield StatePart(members=tuple(members[start : start + MAX_PART_MEMBERS]))
    for start in range(0, len(expelled), MAX_PART_MEMBERS):
        yield StatePart(expelled=tuple(expelled[start : start + MAX_PART_MEMBERS]))
    for start in range(0, len(cells), MAX_PART_CELLS):
        yield StatePart(cells=tuple(cells[start : start + MAX_PART_CELLS]))
    yield StatePart(last=True)


def encode_state(parts: Iterable[StatePart]) -> bytes:
    """Return the bytes in which a state is stored: its parts, a frame each."""
    return b"".join(map(PROTOCOL.encode, parts))


def decode_state(data: bytes) -> list[StatePart]:
    """Return the parts that `encode_state` was given. Raises RemoteProtocolError for other bytes."""
    parts = []
    for frame in FrameReader().receive_data(data):
        message = PROTOCOL.decode(frame)
        if not isinstance(message, StatePart):
            raise RemoteProtocolError("not a part of a state")
        parts.append(message)
    return parts
