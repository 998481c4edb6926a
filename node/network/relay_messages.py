"""The messages of circuit relay v2 and of DCUtR, by the libp2p specifications. No I/O."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Final

from node.network.protobuf import Message, choice, nested, raw, raws, varint

HOP_PROTOCOL: Final = "/libp2p/circuit/relay/0.2.0/hop"
STOP_PROTOCOL: Final = "/libp2p/circuit/relay/0.2.0/stop"
DCUTR_PROTOCOL: Final = "/libp2p/dcutr"


class Status(IntEnum):
    """The outcome of a request to a relay, or of a relay's request."""

    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


class HopType(IntEnum):
    """What a message between a peer and its relay is."""

    RESERVE = 0
    CONNECT = 1
    STATUS = 2


class StopType(IntEnum):
    """What a message between a relay and the peer behind it is."""

    CONNECT = 0
    STATUS = 1


class HolePunchType(IntEnum):
    """What a message between two peers that punch a hole is."""

    CONNECT = 100
    SYNC = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer(Message):
    """A peer's id in binary form."""

    id: Annotated[bytes | None, raw(1)] = None
    addrs: Annotated[tuple[bytes, ...], raws(2)] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation(Message):
    """When a reservation expires, in Unix time, and the addresses of the relay, with its id."""

    expire: Annotated[int | None, varint(1)] = None
    addrs: Annotated[tuple[bytes, ...], raws(2)] = ()
    voucher: Annotated[bytes | None, raw(3)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit(Message):
    """Limits of each circuit: seconds, and bytes in either direction; 0 or absent for none."""

    duration: Annotated[int | None, varint(1)] = None
    data: Annotated[int | None, varint(2)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HopMessage(Message):
    """Between a peer and its relay."""

    type: Annotated[HopType | None, choice(1, HopType)] = None
    peer: Annotated[Peer | None, nested(2, Peer)] = None
    reservation: Annotated[Reservation | None, nested(3, Reservation)] = None
    limit: Annotated[Limit | None, nested(4, Limit)] = None
    status: Annotated[Status | None, choice(5, Status)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StopMessage(Message):
    """Between a relay and the peer behind it."""

    type: Annotated[StopType | None, choice(1, StopType)] = None
    peer: Annotated[Peer | None, nested(2, Peer)] = None
    limit: Annotated[Limit | None, nested(3, Limit)] = None
    status: Annotated[Status | None, choice(4, Status)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HolePunch(Message):
    """Between two peers that punch a hole: the addresses that others observed of the sender."""

    type: Annotated[HolePunchType | None, choice(1, HolePunchType)] = None
    addrs: Annotated[tuple[bytes, ...], raws(2)] = ()
