"""Who is alive and who serves what, as far as this peer has heard. No I/O and no clock of its own.

Liveness is a matter of hearing: after a heartbeat arrived a peer is alive for `LIFE_IN_INTERVALS` of the intervals that
it names, by our monotonic clock. The sender's clock decides nothing; its sequence number says which heartbeat of it is
the newer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from protocol.identity import BlockRange, ModelId, PeerId
from protocol.limits import MAX_PRESENT
from protocol.messages import Load
from protocol.records import Heartbeat, Placement, ServedSpan
from selector.placement import Server

LIFE_IN_INTERVALS = 4
"""A peer that misses so many heartbeats is forgotten: two may get lost. In a swarm of up to ten peers that is 10 s."""

KEPT_STATEMENTS = 4
"""Of a peer's statements of what it means to serve the last few: plans are about what was said until a moment."""


class Statement(NamedTuple):
    """What a peer means to serve, and since when it says so: Unix time in milliseconds, by its own clock."""

    said_at_ms: int
    placements: tuple[Placement, ...]


@dataclass(slots=True)
class Presence:
    """What we last heard of one live peer."""

    peer: PeerId
    sequence: int
    agent: str
    multiaddrs: tuple[str, ...]
    spans: tuple[ServedSpan, ...]
    statements: tuple[Statement, ...]
    """The last few that differ, in their order."""
    last_heard_s: float
    silent_at_s: float
    """When it is forgotten unless it is heard again."""
    envelope: bytes | None
    """Its last heartbeat as it signed it; None where we know of it otherwise."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live peer that serves a span of a model."""

    peer: PeerId
    blocks: BlockRange
    load: Load


class Directory:
    """The live peers and their spans."""

    def __init__(self, *, own_peer: PeerId) -> None:
        self._own_peer = own_peer
        self._presences: dict[PeerId, Presence] = {}
        self._departing: dict[PeerId, Presence] = {}
        self._departed: dict[PeerId, int] = {}

    def hear(self, heartbeat: Heartbeat, now_s: float, envelope: bytes | None = None) -> bool:
        """Take in a verified heartbeat, and its envelope to hand it on; return whether it told anything new.

        A peer that said it leaves is no candidate any more, and older heartbeats of it still under way do not revive
        it; while it ends its work it goes on saying so.
        """
        known = self._presences.get(heartbeat.peer)
        newest = known.sequence if known else self._departed.get(heartbeat.peer, -1)
        if heartbeat.sequence <= newest:
            return False
        presence = Presence(
            peer=heartbeat.peer,
            sequence=heartbeat.sequence,
            agent=heartbeat.agent,
            multiaddrs=heartbeat.multiaddrs,
            spans=heartbeat.spans,
            statements=_statements(known.statements if known else (), heartbeat),
            last_heard_s=now_s,
            silent_at_s=now_s + LIFE_IN_INTERVALS * heartbeat.interval_ms / 1000,
            envelope=envelope,
        )
        self._presences.pop(heartbeat.peer, None)
        self._departing.pop(heartbeat.peer, None)
        self._departed.pop(heartbeat.peer, None)
        if heartbeat.leaving:
            _remember(self._departing, presence)
            self._departed[heartbeat.peer] = heartbeat.sequence
            if len(self._departed) > MAX_PRESENT:
                del self._departed[next(iter(self._departed))]
        else:
            _remember(self._presences, presence)
        return True

    def forget(self, peer: PeerId) -> None:
        """Drop a peer that was found dead; its next heartbeat revives it."""
        self._presences.pop(peer, None)
        self._departing.pop(peer, None)

    def expire(self, now_s: float) -> tuple[PeerId, ...]:
        """Forget the peers that were not heard for too long and return them, without those that said they leave."""
        dead = _silent(self._presences, now_s)
        for peer in dead:
            del self._presences[peer]
        for peer in _silent(self._departing, now_s):
            del self._departing[peer]
        return dead

    def presences(self) -> tuple[Presence, ...]:
        """Return every live peer that means to stay, ourselves included where we heard ourselves."""
        return tuple(self._presences.values())

    def departing(self) -> tuple[Presence, ...]:
        """Return the peers that said they leave and were heard since: they end the work that they have."""
        return tuple(self._departing.values())

    def get(self, peer: PeerId) -> Presence | None:
        """Return what is known of a live peer."""
        return self._presences.get(peer)

    def candidates(self, model: ModelId, *, without: Iterable[PeerId] = ()) -> tuple[Candidate, ...]:
        """Return who serves spans of a model now, except some peers."""
        excluded = set(without)
        return tuple(
            Candidate(presence.peer, span.blocks, span.load)
            for presence in self._presences.values()
            if presence.peer not in excluded
            for span in presence.spans
            if span.model == model
        )

    def servers(self, model: ModelId, until_ms: int) -> tuple[Server, ...]:
        """Return who of the live peers means to serve what of a model, by what they had said until a moment.

        Everybody who heard the same returns the same, whenever it is asked. Who says nothing of what it means to serve
        is left out: what it serves is in its spans.
        """
        found = []
        for presence in self._presences.values():
            until = tuple(takewhile(lambda statement: statement.said_at_ms <= until_ms, presence.statements))
            found += [
                Server(presence.peer, placed.blocks.start, placed.blocks.end, placed.rate, placed.movable)
                for placed in (until[-1].placements if until else ())
                if placed.model == model
            ]
        return tuple(sorted(found))

    def models(self) -> dict[ModelId, tuple[PeerId, ...]]:
        """Return the models that live peers serve, wholly or in part, and by whom."""
        found: dict[ModelId, dict[PeerId, None]] = {}
        for presence in self._presences.values():
            for span in presence.spans:
                found.setdefault(span.model, {})[presence.peer] = None
        return {model: tuple(peers) for model, peers in found.items()}


def _remember(presences: dict[PeerId, Presence], presence: Presence) -> None:
    """Put a presence last, so that the dictionary's order is the order of hearing, and make room for it."""
    presences[presence.peer] = presence
    if len(presences) > MAX_PRESENT:
        del presences[next(iter(presences))]


def _statements(before: tuple[Statement, ...], heartbeat: Heartbeat) -> tuple[Statement, ...]:
    said = Statement(heartbeat.placed_at_ms, heartbeat.placements)
    if before and said.said_at_ms <= before[-1].said_at_ms:
        return before
    return (*before, said)[-KEPT_STATEMENTS:]


def _silent(presences: dict[PeerId, Presence], now_s: float) -> tuple[PeerId, ...]:
    return tuple(presence.peer for presence in presences.values() if now_s > presence.silent_at_s)
