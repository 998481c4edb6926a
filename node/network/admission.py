"""Whom we let in: strangers who only hold connections open must not lock out those who talk."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

import trio

from node.network.addresses import address_range, origin

MAX_HANDSHAKES: Final = 256

HANDSHAKE_INTERVAL_S: Final = 0.025
"""Between two handshakes of one origin, once it has had its burst: each costs some 10 ms of a processor."""

HANDSHAKE_BURST: Final = 16

SILENT_S: Final = 1.0
"""A connection on which nothing was ever said makes room for a newcomer after this: honest peers talk at once."""

IDLE_S: Final = 10.0
"""One on which something was said, after this: gossip says something every other second."""


class Handshakes:
    """Unfinished handshakes are few, and a new one pushes out the oldest: an honest peer needs milliseconds."""

    def __init__(self, limit: int = MAX_HANDSHAKES) -> None:
        """Allow so many in all, and an eighth of them from one origin."""
        self._limit = limit
        self._limit_per_origin = max(2, limit // 8)
        self._scopes: dict[str, dict[trio.CancelScope, None]] = {}
        self._turns: OrderedDict[str, _Turn] = OrderedDict()

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

    async def turn(self, host: str) -> None:
        """Wait until another handshake from there may begin: who connects without end leaves time to others."""
        turn = self._turns.setdefault(origin(host), _Turn())
        self._turns.move_to_end(origin(host))
        while len(self._turns) > MAX_HANDSHAKES:
            self._turns.popitem(last=False)
        async with turn.lock:
            await trio.sleep_until(turn.next_s)
            earliest_s = trio.current_time() - HANDSHAKE_BURST * HANDSHAKE_INTERVAL_S
            turn.next_s = max(turn.next_s, earliest_s) + HANDSHAKE_INTERVAL_S


@dataclass(slots=True)
class _Turn:
    """Whose handshake is the next of one origin, and when it may begin."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    next_s: float = -math.inf


@dataclass(frozen=True, slots=True)
class InboundLimits:
    """How many finished connections others may hold to us."""

    total: int
    per_origin: int
    """From one IPv4 address or IPv6 /64."""
    per_range: int
    """From one public /24 or /56: who pays for one range shall not be most of those that we know."""


class Held(Protocol):
    """A finished connection that a peer has opened to us."""

    @property
    def host(self) -> str | None:
        """The address of the peer; None for one that comes through a relay."""
        ...

    @property
    def established_s(self) -> float:
        """When the handshake was over."""
        ...

    @property
    def last_data_s(self) -> float | None:
        """When the peer last said anything on a stream."""
        ...


H = TypeVar("H", bound=Held)


class Crowded(Exception):
    """There is no place for a newcomer, and nobody who could make room for it. The message says where."""


def make_room(newcomer: Held, held: Sequence[H], limits: InboundLimits, now_s: float) -> H | None:
    """Return the connection that has to make room for a newcomer, None where there is room; raise Crowded.

    The one that has been idle for longest goes, out of the narrowest group that is full.
    """
    groups: list[tuple[str, int, list[H]]] = []
    if newcomer.host is not None:
        here = origin(newcomer.host)
        groups.append((here, limits.per_origin, [one for one in held if one.host and origin(one.host) == here]))
        if (wider := address_range(newcomer.host)) is not None:
            members = [one for one in held if one.host and address_range(one.host) == wider]
            groups.append((wider, limits.per_range, members))
    groups.append(("all origins", limits.total, list(held)))
    for name, limit, members in groups:
        if len(members) >= limit:
            idlest = max(members, key=lambda one: _idleness(one, now_s))
            if _idleness(idlest, now_s) < 0:
                raise Crowded(f"{len(members)} connections from {name} are in use")
            return idlest
    return None


def _idleness(connection: Held, now_s: float) -> float:
    """Return for how long a connection could have made room already; negative for one that need not."""
    if connection.last_data_s is None:
        return now_s - connection.established_s - SILENT_S
    return now_s - connection.last_data_s - IDLE_S
