"""The messages of AutoNAT v2, by the libp2p specification. No I/O."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, ClassVar, Final

from node.network.protobuf import Message, choice, fixed64, nested, raw, raws, varint

DIAL_REQUEST_PROTOCOL: Final = "/libp2p/autonat/2/dial-request"
DIAL_BACK_PROTOCOL: Final = "/libp2p/autonat/2/dial-back"

MAX_DIAL_DATA_BYTES: Final = 4096
"""The data of one DialDataResponse."""


class ResponseStatus(IntEnum):
    """Whether a server has dialled an address at all."""

    E_INTERNAL_ERROR = 0
    E_REQUEST_REJECTED = 100
    E_DIAL_REFUSED = 101
    OK = 200


class DialStatus(IntEnum):
    """Whether the address could be dialled."""

    UNUSED = 0
    E_DIAL_ERROR = 100
    E_DIAL_BACK_ERROR = 101
    OK = 200


class DialBackStatus(IntEnum):
    """The answer to a dial-back."""

    OK = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DialRequest(Message):
    """Addresses to dial, by priority, and the number that the dial-back has to carry."""

    addrs: Annotated[tuple[bytes, ...], raws(1)] = ()
    nonce: Annotated[int | None, fixed64(2)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DialResponse(Message):
    """The outcome for the address with this index."""

    status: Annotated[ResponseStatus | None, choice(1, ResponseStatus)] = None
    addr_index: Annotated[int | None, varint(2)] = None
    dial_status: Annotated[DialStatus | None, choice(3, DialStatus)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DialDataRequest(Message):
    """The price of dialling an address that is not the client's own: so many bytes."""

    addr_index: Annotated[int | None, varint(1)] = None
    byte_count: Annotated[int | None, varint(2)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DialDataResponse(Message):
    """A part of that price."""

    max_bytes: ClassVar[int] = MAX_DIAL_DATA_BYTES + 16

    data: Annotated[bytes | None, raw(1)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AutonatMessage(Message):
    """A message of a dial request's stream: exactly one of these."""

    max_bytes: ClassVar[int] = MAX_DIAL_DATA_BYTES + 32

    dial_request: Annotated[DialRequest | None, nested(1, DialRequest)] = None
    dial_response: Annotated[DialResponse | None, nested(2, DialResponse)] = None
    dial_data_request: Annotated[DialDataRequest | None, nested(3, DialDataRequest)] = None
    dial_data_response: Annotated[DialDataResponse | None, nested(4, DialDataResponse)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DialBack(Message):
    """Shows that the server has reached the client."""

    nonce: Annotated[int | None, fixed64(1)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DialBackResponse(Message):
    """Shows that the client has received it."""

    status: Annotated[DialBackStatus | None, choice(1, DialBackStatus)] = None
