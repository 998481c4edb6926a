"""Who is alive and who serves what, as far as this peer has heard. No I/O and no clock of its own.

Liveness is a matter of hearing: after a heartbeat arrived a peer is alive for `LIFE_IN_INTERVALS` of the intervals that
it names, by our monotonic clock. The sender's clock decides nothing; its sequence number says which heartbeat of it is
the newer.

Identities cost nothing, so a heartbeat alone proves nothing. Its spans and placements count only while the peer is
*reached*: connected to us, or dialled by us with success since it was first heard. The unreached are kept so that they
can be dialled; how many there may be is bounded in total, per peer that told of them and per address range, and they
are the first to make room.
"""

import ipaddress
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from protocol.announcements import Heartbeat, Placement, ServedSpan
from protocol.identity import BlockRange, ModelId, PeerId, Stage
from protocol.limits import MAX_PRESENT
from protocol.messages import Load
from selector.placement import Server

LIFE_IN_INTERVALS = 4
"""A peer that misses so many heartbeats is forgotten: two may get lost. In a swarm of up to ten peers that is 10 s."""

KEPT_STATEMENTS = 4
"""Of a peer's statements of what it means to serve the last few: plans are about what was said until a moment."""

MAX_UNREACHED = 1024
"""Peers that were heard of and not reached yet."""

MAX_UNREACHED_PER_TELLER = 256
"""Of those, that one peer may have told of when it was asked who is here."""

MAX_UNREACHED_PER_RANGE = 32
"""Of those, that may claim addresses within one public IPv4 /24 or IPv6 /48."""

MAX_PER_RANGE = 256
"""Peers, reached or not, that may claim addresses within one such range."""


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
    interval_s: float
    """How long it will be until its next heartbeat, as it says."""
    envelope: bytes | None
    """Its last heartbeat as it signed it; None where we know of it otherwise."""
    dialled: bool
    """Whether we have dialled it with success since it was first heard."""
    teller: PeerId | None
    """Who told of it when asked who is here, where its heartbeats did not come by gossip since."""
    ranges: frozenset[str]
    """The public address ranges that it claims to be in."""
    place: str
    """What stands for where it is when dials are rationed: one of these ranges, else its first host."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live peer that serves a span of a model, and its load."""

    stage: Stage
    load: Load


class Directory:
    """The live peers and their spans."""

    def __init__(self, *, own_peer: PeerId, connected: Callable[[], Collection[PeerId]] = tuple) -> None:
        """Know nobody yet. `connected` returns the peers with a live, authenticated connection to us."""
        self._own_peer = own_peer
        self._connected = connected
        self._presences: dict[PeerId, Presence] = {}
        self._departing: dict[PeerId, Presence] = {}
        self._departed: dict[PeerId, int] = {}

    def hear(
        self,
        heartbeat: Heartbeat,
        now_s: float,
        envelope: bytes | None = None,
        *,
        dialled: bool = False,
        teller: PeerId | None = None,
    ) -> bool:
        """Take in a verified heartbeat, and its envelope to hand it on; return whether it told anything new.

        `dialled`: whether the peer was just dialled with success. `teller`: who told of it, where it did not come by
        gossip. A peer that said it leaves is no candidate any more, and older heartbeats of it still under way do not
        revive it; while it ends its work it goes on saying so.
        """
        known = self._presences.get(heartbeat.peer)
        newest = known.sequence if known else self._departed.get(heartbeat.peer, -1)
        if heartbeat.sequence <= newest:
            return False
        ranges = address_ranges(heartbeat.multiaddrs)
        presence = Presence(
            peer=heartbeat.peer,
            sequence=heartbeat.sequence,
            agent=heartbeat.agent,
            multiaddrs=heartbeat.multiaddrs,
            spans=heartbeat.spans,
            statements=_statements(known.statements if known else (), heartbeat),
            last_heard_s=now_s,
            interval_s=heartbeat.interval_ms / 1000,
            envelope=envelope,
            dialled=dialled or (known is not None and known.dialled),
            teller=teller,
            ranges=ranges,
            place=min(ranges) if ranges else _first_host(heartbeat.multiaddrs),
        )
        if known is None and heartbeat.peer not in self._departing and not self._make_room(presence):
            return False
        self._presences.pop(heartbeat.peer, None)
        self._departing.pop(heartbeat.peer, None)
        self._departed.pop(heartbeat.peer, None)
        if heartbeat.leaving:
            self._departing[heartbeat.peer] = presence
            self._departed[heartbeat.peer] = heartbeat.sequence
            if len(self._departed) > MAX_PRESENT:
                del self._departed[next(iter(self._departed))]
        else:
            self._presences[heartbeat.peer] = presence  # the dictionary's order is the order of hearing
        return True

    def _make_room(self, newcomer: Presence) -> bool:
        """Make room for a peer that was not known; return False where it is one too many of its kind."""
        everybody = [*self._presences.values(), *self._departing.values()]
        if _most_in_a_range(newcomer, everybody) >= MAX_PER_RANGE:
            return False
        reached = self._is_reached()
        unreached = [each for each in everybody if not reached(each)]
        if not reached(newcomer):
            if _most_in_a_range(newcomer, unreached) >= MAX_UNREACHED_PER_RANGE:
                return False
            if newcomer.teller is not None and self.told_by(newcomer.teller) >= MAX_UNREACHED_PER_TELLER:
                return False
            if len(unreached) >= MAX_UNREACHED:
                self.forget(_most_crowded(unreached).peer)
        if len(everybody) >= MAX_PRESENT:
            self.forget(next(iter(unreached), everybody[0]).peer)
        return True

    def told_by(self, teller: PeerId) -> int:
        """Return of how many unreached peers a peer has told."""
        reached = self._is_reached()
        return sum(each.teller == teller and not reached(each) for each in self._presences.values())

    def _is_reached(self) -> Callable[[Presence], bool]:
        connected = set(self._connected())
        return lambda each: each.dialled or each.peer in connected or each.peer == self._own_peer

    def reached(self) -> tuple[Presence, ...]:
        """Return the live peers that mean to stay and are reached, ourselves included where we heard ourselves."""
        return tuple(filter(self._is_reached(), self._presences.values()))

    def unreached(self) -> tuple[Presence, ...]:
        """Return the live peers that mean to stay and are not reached."""
        reached = self._is_reached()
        return tuple(each for each in self._presences.values() if not reached(each))

    def was_dialled(self, peer: PeerId, success: bool) -> None:
        """Note whether we could reach a peer that we dialled."""
        if presence := self._presences.get(peer):
            presence.dialled = success

    def forget(self, peer: PeerId) -> None:
        """Drop a peer that was found dead; its next heartbeat revives it."""
        self._presences.pop(peer, None)
        self._departing.pop(peer, None)

    def expire(self, now_s: float, longest_interval_s: float) -> tuple[PeerId, ...]:
        """Forget the peers that were not heard for too long and return them, without those that said they leave.

        Whatever interval a peer names, it is not waited for as if that were longer than `longest_interval_s`.
        """

        def silent(presences: dict[PeerId, Presence]) -> list[PeerId]:
            return [
                each.peer
                for each in presences.values()
                if now_s - each.last_heard_s > LIFE_IN_INTERVALS * min(each.interval_s, longest_interval_s)
            ]

        dead = silent(self._presences)
        for peer in dead:
            del self._presences[peer]
        for peer in silent(self._departing):
            del self._departing[peer]
        return tuple(dead)

    def presences(self) -> tuple[Presence, ...]:
        """Return every live peer that means to stay, reached or not, ourselves included where we heard ourselves."""
        return tuple(self._presences.values())

    def departing(self) -> tuple[Presence, ...]:
        """Return the peers that said they leave and were heard since: they end the work that they have."""
        return tuple(self._departing.values())

    def knows(self, peer: PeerId) -> bool:
        """Return whether a peer was taken in and not forgotten since, or has said that it leaves."""
        return peer in self._presences or peer in self._departed

    def get(self, peer: PeerId) -> Presence | None:
        """Return what is known of a live peer."""
        return self._presences.get(peer)

    def candidates(self, model: ModelId, *, without: Iterable[PeerId] = ()) -> tuple[Candidate, ...]:
        """Return who of the reached peers serves spans of a model now, except some peers."""
        excluded = set(without)
        return tuple(
            Candidate(Stage(presence.peer, span.blocks), span.load)
            for presence in self.reached()
            if presence.peer not in excluded
            for span in presence.spans
            if span.model == model
        )

    def expected(self, model: ModelId) -> tuple[BlockRange, ...]:
        """Return the blocks of a model that reached peers serve, or mean to serve, and may be loading."""
        reached = self.reached()
        found = [span.blocks for each in reached for span in each.spans if span.model == model]
        for presence in reached:
            meant = presence.statements[-1].placements if presence.statements else ()
            found += [placed.blocks for placed in meant if placed.model == model]
        return tuple(dict.fromkeys(found))

    def servers(self, model: ModelId, until_ms: int) -> tuple[Server, ...]:
        """Return who of the reached peers means to serve what of a model, by what they had said until a moment.

        Everybody who heard the same returns the same, whenever it is asked. Who says nothing of what it means to serve
        is left out: what it serves is in its spans.
        """
        found = []
        for presence in self.reached():
            until = tuple(takewhile(lambda statement: statement.said_at_ms <= until_ms, presence.statements))
            found += [
                Server(Stage(presence.peer, placed.blocks), placed.rate, placed.movable)
                for placed in (until[-1].placements if until else ())
                if placed.model == model
            ]
        return tuple(sorted(found))

    def models(self) -> dict[ModelId, tuple[PeerId, ...]]:
        """Return the models that reached peers serve, wholly or in part, and by whom."""
        found: dict[ModelId, dict[PeerId, None]] = {}
        for presence in self.reached():
            for span in presence.spans:
                found.setdefault(span.model, {})[presence.peer] = None
        return {model: tuple(peers) for model, peers in found.items()}


def address_ranges(multiaddrs: Sequence[str]) -> frozenset[str]:
    """Return the public ranges (IPv4 /24, IPv6 /48) of the addresses that a peer claims.

    None for loopback, private and other addresses that the internet does not route, and for names: whole swarms live at
    one such address.
    """
    return frozenset(name for address in multiaddrs if (name := _public_range(address)) is not None)


def _public_range(multiaddr: str) -> str | None:
    parts = multiaddr.split("/")
    try:
        ip = ipaddress.ip_address(parts[2] if len(parts) > 2 else "")
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if not ip.is_global:
        return None
    return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 48), strict=False))


def _first_host(multiaddrs: Sequence[str]) -> str:
    parts = multiaddrs[0].split("/") if multiaddrs else []
    return parts[2] if len(parts) > 2 else ""


def _most_in_a_range(newcomer: Presence, presences: Iterable[Presence]) -> int:
    """Return how many of the peers claim the same range as the newcomer, for the range where those are most."""
    counts = Counter(name for each in presences for name in each.ranges & newcomer.ranges)
    return max(counts.values(), default=0)


def _most_crowded(presences: Sequence[Presence]) -> Presence:
    """Return the peer heard longest ago of those in the place that has most."""
    counts = Counter(each.place for each in presences)
    return max(presences, key=lambda each: counts[each.place])


def _statements(before: tuple[Statement, ...], heartbeat: Heartbeat) -> tuple[Statement, ...]:
    said = Statement(heartbeat.placed_at_ms, heartbeat.placements)
    if before and said.said_at_ms <= before[-1].said_at_ms:
        return before
    return (*before, said)[-KEPT_STATEMENTS:]
