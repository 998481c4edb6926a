"""What a peer announces about itself: the fields of its records, and the DHT keys under which they are found.

`protocol.records` signs them and reads them back. A new kind of record is a subclass of `Record`.
"""

import abc
import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar, Final

from protocol import fields
from protocol.errors import RemoteProtocolError
from protocol.forms import Counter, Name
from protocol.identity import BlockRange, ModelId, PeerId
from protocol.limits import (
    MAX_ADDRESSES,
    MAX_HEARTBEAT_INTERVAL_MS,
    MAX_NAME_BYTES,
    MAX_NUMBER,
    MAX_OBSERVED,
    MAX_RATE,
    MAX_RELAYS,
    MAX_SPANS,
)
from protocol.messages import Load
from protocol.schema import LOCAL, Count, Form, Range

DHT_NAMESPACE: Final = "metaswarm"
"""The first part of every DHT key of ours."""

HEARTBEAT_TOPIC: Final = "metaswarm/1/heartbeats"
"""The gossip topic of heartbeats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The fields of every record.

    `peer`: the signer. `sequence`: higher than in any earlier record of this kind and subject by this peer, also across
    restarts; Unix time in milliseconds will do. `issued_at_s`, `expires_at_s`: Unix time in whole seconds.
    """

    kind: ClassVar[str]

    peer: Annotated[PeerId, LOCAL]
    sequence: Counter
    issued_at_s: Counter
    expires_at_s: Counter


@dataclass(frozen=True, slots=True, kw_only=True)
class DhtRecord(Record, abc.ABC):
    """A record that is stored in the DHT."""

    @property
    @abc.abstractmethod
    def key(self) -> str:
        """The DHT key under which it is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanRecord(DhtRecord):
    """The blocks of a model that a peer serves; no blocks withdraw an earlier record."""

    kind: ClassVar[str] = "span"

    model: ModelId
    blocks: Annotated[tuple[BlockRange, ...], Count(MAX_SPANS)]

    @property
    def key(self) -> str:
        """The DHT key under which it is stored."""
        return span_key(self.model, self.peer)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSpan:
    """Blocks of a model that a peer serves, and their load."""

    model: ModelId
    blocks: BlockRange
    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Blocks of a model that a peer has placed on itself, from when it begins to load them.

    `rate`: tokens per second through all of these blocks. `movable`: the peer chose them by itself, and will replace
    them by others where the swarm lacks those more; not for a while after it failed to.
    """

    model: ModelId
    blocks: BlockRange
    rate: Annotated[float, Range(0, MAX_RATE)]
    movable: bool


class Verdict(StrEnum):
    """Whether a peer can be dialled from anywhere, as other peers found by dialling it."""

    PUBLIC = "public"
    PRIVATE = "private"
    UNKNOWN = "unknown"


def _multiaddr(value: object, what: str) -> str:
    address = fields.name(value, MAX_NAME_BYTES, what)
    if not address.startswith("/"):
        raise RemoteProtocolError(f"{what} {address!r} does not begin with /")
    return address


@dataclass(frozen=True, slots=True, kw_only=True)
class Reachability:
    """How a peer can be reached.

    `observed`: the addresses at which others see it, public or not. `endpoint_dependent`: its NAT maps its port to
    another one for each destination (symmetric), so that no hole can be punched. `port_mapped`: its gateway forwards a
    port to it. `relays`: where it has reservations. `relay_bytes_per_s`: what it relays for others in all, 0 where it
    is not a relay.
    """

    extensible: ClassVar[bool] = True

    verdict: Verdict = Verdict.UNKNOWN
    observed: Annotated[tuple[Annotated[str, Form(_multiaddr)], ...], Count(MAX_OBSERVED)] = ()
    endpoint_dependent: bool = False
    port_mapped: bool = False
    relays: Annotated[tuple[PeerId, ...], Count(MAX_RELAYS)] = ()
    relay_bytes_per_s: Annotated[float, Range(0, MAX_NUMBER)] = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(Record):
    """Sign of life of a peer: its addresses, software, spans and placements, and whether it drains.

    `interval_ms`: the approximate time until its next heartbeat. `placed_at_ms`: Unix time of its latest change of
    `placements`; planners consider all placements up to one moment. `reachability`: None of a peer that does not say.
    """

    kind: ClassVar[str] = "heartbeat"
    extensible: ClassVar[bool] = True

    interval_ms: Annotated[int, Range(1, MAX_HEARTBEAT_INTERVAL_MS)]
    multiaddrs: Annotated[tuple[Annotated[str, Form(_multiaddr)], ...], Count(MAX_ADDRESSES)]
    agent: Name
    spans: Annotated[tuple[ServedSpan, ...], Count(MAX_SPANS)] = ()
    placements: Annotated[tuple[Placement, ...], Count(MAX_SPANS)] = ()
    placed_at_ms: Counter = 0
    leaving: bool = False
    reachability: Reachability | None = None


def span_key(model: ModelId, peer: PeerId) -> str:
    """Return the DHT key of a peer's span record."""
    return f"/{DHT_NAMESPACE}/span/{model}/{peer}"


def provider_key(model: ModelId) -> bytes:
    """Return the provider key of peers that serve any block of a model."""
    return hashlib.sha256(f"metaswarm/model/{model}".encode("ascii")).digest()


def blob_provider_key(sha256: str) -> bytes:
    """Return the provider key of peers that have a file: its sha256 (64 hex digits) as bytes."""
    key = bytes.fromhex(sha256)
    if len(key) != fields.SHA256_BYTES:
        raise ValueError(f"{sha256[:80]!r} is not a sha256: expected 64 hexadecimal digits")
    return key
