"""Admission control of inbound connections: idle ones must not lock out active peers."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

import trio
from cachetools import LRUCache

from node.network.addresses import address_range, origin

MAX_HANDSHAKES: Final = 256

HANDSHAKE_INTERVAL_S: Final = 0.025
"""Between two handshakes of one origin after its burst: each costs some 10 ms of CPU."""

HANDSHAKE_BURST: Final = 16

SILENT_S: Final = 1.0
"""A connection that never carried data may be evicted after this: honest peers talk at once."""

IDLE_S: Final = 10.0
"""One that did, after this without data: gossip sends something every other second."""


class HandshakeLimiter:
    """Bounds unfinished handshakes; a new one evicts the oldest, as an honest peer needs milliseconds.

    At most `limit` in all, and an eighth of them from one origin.
    """

    def __init__(self, limit: int = MAX_HANDSHAKES) -> None:
        self._limit = limit
        self._limit_per_origin = max(2, limit // 8)
        self._scopes: dict[str, dict[trio.CancelScope, None]] = {}
        self._turns: LRUCache[str, _Turn] = LRUCache(MAX_HANDSHAKES)

    @contextmanager
    def place(self, host: str) -> Iterator[trio.CancelScope]:
        """Hold a place among the unfinished handshakes; the scope is cancelled when a newer one needs the place."""
        key = origin(host)
        scope = trio.CancelScope()
        scopes = self._scopes.setdefault(key, {})
        scopes[scope] = None
        if len(scopes) > self._limit_per_origin:
            next(iter(scopes)).cancel()
        elif sum(map(len, self._scopes.values())) > self._limit:
            crowded = max(self._scopes, key=lambda host: len(self._scopes[host]))
            next(iter(self._scopes[crowded])).cancel()
        try:
            with scope:
                yield scope
        finally:
            del scopes[scope]
            if not scopes and self._scopes.get(key) is scopes:
                del self._scopes[key]

    async def wait_turn(self, host: str) -> None:
        """Wait until another handshake from this origin may begin: a rate limit."""
        turn = self._turns.setdefault(origin(host), _Turn())
        async with turn.lock:
            await trio.sleep_until(turn.next_s)
            earliest_s = trio.current_time() - HANDSHAKE_BURST * HANDSHAKE_INTERVAL_S
            turn.next_s = max(turn.next_s, earliest_s) + HANDSHAKE_INTERVAL_S


@dataclass(slots=True)
class _Turn:
    """The queue of one origin's handshakes, and when the next may begin."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    next_s: float = -math.inf


@dataclass(frozen=True, slots=True)
class InboundLimits:
    """Bounds on established inbound connections."""

    total: int
    per_origin: int
    """From one IPv4 address or IPv6 /64."""
    per_range: int
    """From one public /24 or /56: the owner of one range must not become most of our neighbours."""
    per_relay: int = 32
    """Through one relay, which may have invented all peers behind it."""


class InboundConnection(Protocol):
    """An established connection that a peer opened."""

    @property
    def host(self) -> str | None:
        """The address of the peer; None for one that comes through a relay."""

    @property
    def relay(self) -> str | None:
        """The id of that relay; None for a direct connection."""

    @property
    def established_s(self) -> float:
        """When the handshake was finished."""

    @property
    def last_data_s(self) -> float | None:
        """When the peer last sent data on a stream."""


H = TypeVar("H", bound=InboundConnection)


class NoRoom(Exception):
    """A limit is reached and no connection is idle enough to be evicted. The message says which limit."""


def choose_eviction(newcomer: InboundConnection, held: Sequence[H], limits: InboundLimits, now_s: float) -> H | None:
    """Return the connection to evict for a newcomer, None where there is room; raise NoRoom.

    It is the one idle for longest in the narrowest group that is full.
    """
    groups: list[tuple[str, int, list[H]]] = []
    if newcomer.host is not None:
        here = origin(newcomer.host)
        groups.append((here, limits.per_origin, [one for one in held if one.host and origin(one.host) == here]))
        if (wider := address_range(newcomer.host)) is not None:
            members = [one for one in held if one.host and address_range(one.host) == wider]
            groups.append((wider, limits.per_range, members))
    if newcomer.relay is not None:
        members = [one for one in held if one.relay == newcomer.relay]
        groups.append((f"the relay {newcomer.relay}", limits.per_relay, members))
    groups.append(("all origins", limits.total, list(held)))
    for name, limit, members in groups:
        if len(members) >= limit:
            idlest = max(members, key=lambda one: _idleness(one, now_s))
            if _idleness(idlest, now_s) < 0:
                raise NoRoom(f"{len(members)} connections from {name} are in use")
            return idlest
    return None


def _idleness(connection: InboundConnection, now_s: float) -> float:
    """Return for how long a connection has been evictable; negative while it is not."""
    if connection.last_data_s is None:
        return now_s - connection.established_s - SILENT_S
    return now_s - connection.last_data_s - IDLE_S
