"""The live peers and the spans they serve, from heartbeats. No I/O and no clock of its own.

A peer is alive for `LIFE_IN_INTERVALS` of the intervals that its last heartbeat names, by our monotonic clock. The
sender's clock decides nothing; its sequence numbers order its heartbeats.

Identities cost nothing, so a heartbeat alone proves nothing. Its spans and placements count only while the peer is
*reached*: connected to us, or dialled by us with success since its first heartbeat. Unreached peers are stored so that
they can be dialled; their number is bounded in total, by the peer that relayed them and by address range, and they are
evicted first.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, NamedTuple

from node.network.addresses import address_range, is_private, origin
from protocol.announcements import Heartbeat, Placement, Reachability, ServedSpan, Verdict
from protocol.identity import BlockRange, ModelId, PeerId, Stage
from protocol.limits import MAX_CLOCK_SKEW_S, MAX_PRESENT
from protocol.messages import Load
from selector.placement import Server
from selector.reachability import Location, can_open

LIFE_IN_INTERVALS = 4
"""A peer expires after this many missed heartbeats: two may get lost. That is 10 s in a swarm of up to ten peers."""

LOADING_S = 1800.0
"""Blocks that a peer has announced for so long without serving them do not count in plans until it does: 20 GB have
come by then at 100 Mbit/s. A peer that takes longer loses nothing but, perhaps, the need for its blocks."""

RESTART_S = 300.0
"""So long they count at least, from the first heartbeat that we hear of a peer: it may have served them for days, which
we cannot know, and be starting its engine again."""

MAX_BLOCKS_PER_S = 1e5
"""An announced rate counts up to so many blocks a second, more than a GPU passes of a small model."""

ANNOUNCEMENTS_PER_PEER = 4
"""Latest placement announcements stored of a peer: plans depend on those before a cut-off."""

MAX_UNREACHED = 1024

MAX_UNREACHED_PER_RELAY = 256
"""Unreached peers that one peer may have relayed in its answer to a presence query."""

MAX_UNREACHED_PER_RANGE = 32
"""Unreached peers that may claim addresses within one public IPv4 /24 or IPv6 /56."""

MAX_PER_RANGE = 256
"""Peers that were reached within one such range. What others claim does not count: anybody may claim any address."""


class AnnouncedPlacements(NamedTuple):
    """The blocks that a peer is going to serve, and since when: Unix time in milliseconds, by its own clock."""

    since_ms: int
    placements: tuple[Placement, ...]


class _Left(NamedTuple):
    """The heartbeat by which a peer left."""

    sequence: int
    expires_at_s: int


@dataclass(slots=True)
class PeerEntry:
    """The last heartbeat of one live peer."""

    peer: PeerId
    sequence: int
    agent: str
    multiaddrs: tuple[str, ...]
    spans: tuple[ServedSpan, ...]
    announcements: tuple[AnnouncedPlacements, ...]
    """The latest ones that differ, oldest first."""
    unserved_since_ms: Mapping[ModelId, int]
    """Since when it has announced blocks of a model that it does not serve, whichever they are, by its own clock."""
    overdue: frozenset[ModelId]
    """The models of which that has been so for longer than `LOADING_S`."""
    last_heard_s: float
    interval_s: float
    """The announced time until its next heartbeat."""
    envelope: bytes | None
    """The signed heartbeat; None for a peer that was found in the DHT."""
    dialled: bool
    """Whether our last dial succeeded."""
    relay: PeerId | None
    """The peer whose presence answer contained it, unless it was gossiped since."""
    reached_in: str | None
    """The public address range to which the last connection with it led; None without one, or for no such address."""
    ranges: frozenset[str]
    """The public address ranges that it claims to be in."""
    place: str
    """The key by which dials are rationed: one of these ranges, else its first host."""
    reachability: Reachability | None
    """What the peer says of how it can be reached; None where it says nothing."""
    location: Location


UNREPORTED_LOAD: Final = Load()
"""Of a span of which only the record was found. A peer without free positions has sessions."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live peer that serves a span of a model, and its load."""

    stage: Stage
    load: Load


class Directory:
    """The live peers and their spans."""

    def __init__(
        self,
        *,
        own_peer: PeerId,
        connected: Callable[[], Collection[PeerId]] = tuple,
        range_of: Callable[[PeerId], str | None] = lambda peer: None,
    ) -> None:
        """`connected` returns the peers with a live, authenticated connection to us, `range_of` where that leads to."""
        self._own_peer = own_peer
        self._connected = connected
        self._range_of = range_of
        self._entries: dict[PeerId, PeerEntry] = {}
        self._draining: dict[PeerId, PeerEntry] = {}
        self._tombstones: dict[PeerId, _Left] = {}

    def update(
        self,
        heartbeat: Heartbeat,
        now_s: float,
        envelope: bytes | None = None,
        *,
        dialled: bool = False,
        relay: PeerId | None = None,
    ) -> bool:
        """Enter a verified heartbeat, with its envelope to relay; return whether it was newer than the known one.

        `dialled`: whether the peer was just dialled with success. `relay`: the peer that relayed it, unless it was
        gossiped. A peer that announced its shutdown is no candidate, though it sends heartbeats while it drains, and
        older ones do not revive it. What was issued after the last of these expired is newer, whatever its number.
        """
        known, left = self._entries.get(heartbeat.peer), self._tombstones.get(heartbeat.peer)
        if known is not None and heartbeat.sequence <= known.sequence:
            return False
        if left is not None and heartbeat.sequence <= left.sequence and heartbeat.issued_at_s < left.expires_at_s:
            return False
        ranges = address_ranges(heartbeat.multiaddrs)
        unserved_since_ms = _unserved_since_ms(known, heartbeat)
        oldest_ms = 1000 * (heartbeat.issued_at_s - LOADING_S)
        entry = PeerEntry(
            peer=heartbeat.peer,
            sequence=heartbeat.sequence,
            agent=heartbeat.agent,
            multiaddrs=heartbeat.multiaddrs,
            spans=heartbeat.spans,
            announcements=_announcements(known.announcements if known else (), heartbeat),
            unserved_since_ms=unserved_since_ms,
            overdue=frozenset(model for model, since_ms in unserved_since_ms.items() if since_ms < oldest_ms),
            last_heard_s=now_s,
            interval_s=heartbeat.interval_ms / 1000,
            envelope=envelope,
            dialled=dialled or (known is not None and known.dialled),
            relay=relay,
            reached_in=self._range_of(heartbeat.peer) or (known.reached_in if known else None),
            ranges=ranges,
            place=min(ranges) if ranges else _host(next(iter(heartbeat.multiaddrs), "")),
            reachability=heartbeat.reachability,
            location=_location(heartbeat),
        )
        if known is None and heartbeat.peer not in self._draining and not self._make_room(entry):
            return False
        self._entries.pop(heartbeat.peer, None)
        self._draining.pop(heartbeat.peer, None)
        self._tombstones.pop(heartbeat.peer, None)
        if heartbeat.leaving:
            self._draining[heartbeat.peer] = entry
            self._tombstones[heartbeat.peer] = _Left(heartbeat.sequence, heartbeat.expires_at_s)
            if len(self._tombstones) > MAX_PRESENT:
                del self._tombstones[next(iter(self._tombstones))]
        else:
            self._entries[heartbeat.peer] = entry  # ordered by the time of the last heartbeat
        return True

    def _make_room(self, newcomer: PeerEntry) -> bool:
        """Evict an entry for a new peer if need be; return False if a bound excludes the new peer itself."""
        entries = [*self._entries.values(), *self._draining.values()]
        is_reached = self._reached_predicate()
        unreached = [each for each in entries if not is_reached(each)]
        if is_reached(newcomer):
            if (crowd := self._crowd_of(newcomer)) and not self._yields(crowd, newcomer):
                return False
        else:
            if _most_in_a_range(newcomer, unreached) >= MAX_UNREACHED_PER_RANGE:
                return False
            if newcomer.relay is not None and self.relayed_by(newcomer.relay) >= MAX_UNREACHED_PER_RELAY:
                return False
            if len(unreached) >= MAX_UNREACHED:
                self.forget(_most_crowded(unreached).peer)
        if len(entries) >= MAX_PRESENT:
            self.forget(next(iter(unreached), entries[0]).peer)
        return True

    def _crowd_of(self, reached: PeerEntry) -> list[PeerEntry]:
        """Return the others that were reached where a peer was, if these are enough."""
        others = (*self._entries.values(), *self._draining.values())
        same = [
            each
            for each in others
            if reached.reached_in is not None and each.reached_in == reached.reached_in and each.peer != reached.peer
        ]
        return same if len(same) >= MAX_PER_RANGE else []

    def _yields(self, crowd: Iterable[PeerEntry], newcomer: PeerEntry) -> bool:
        """Evict one of a crowd that is not connected, for a newcomer that is; return whether there was one."""
        connected = set(self._connected())
        absent = next((each for each in crowd if each.peer not in connected), None)
        if absent is None or newcomer.peer not in connected:
            return False
        self.forget(absent.peer)
        return True

    def relayed_by(self, relay: PeerId) -> int:
        """Return the number of unreached peers that a peer relayed."""
        return sum(each.relay == relay for each in self.unreached())

    def _reached_predicate(self) -> Callable[[PeerEntry], bool]:
        connected = set(self._connected())
        return lambda each: each.dialled or each.peer in connected or each.peer == self._own_peer

    def reached(self) -> tuple[PeerEntry, ...]:
        """Return the reached peers that are not draining, ourselves included once we sent a heartbeat."""
        return tuple(filter(self._reached_predicate(), self._entries.values()))

    def unreached(self) -> tuple[PeerEntry, ...]:
        """Return the live peers that are neither reached nor draining."""
        is_reached = self._reached_predicate()
        return tuple(each for each in self._entries.values() if not is_reached(each))

    def on_dialled(self, peer: PeerId, success: bool) -> None:
        """Record the result of a dial."""
        if entry := self._entries.get(peer):
            entry.reached_in = self._range_of(peer) or entry.reached_in
            entry.dialled = success and (entry.dialled or not self._crowd_of(entry))

    def forget(self, peer: PeerId) -> None:
        """Drop a peer that was found dead; its next heartbeat revives it."""
        self._entries.pop(peer, None)
        self._draining.pop(peer, None)

    def expire(self, now_s: float, longest_interval_s: float) -> tuple[PeerId, ...]:
        """Drop the peers whose heartbeats are overdue; return those of them that were not draining.

        An announced interval above `longest_interval_s` counts as that.
        """

        def overdue(entries: dict[PeerId, PeerEntry]) -> list[PeerId]:
            return [
                each.peer
                for each in entries.values()
                if now_s - each.last_heard_s > LIFE_IN_INTERVALS * min(each.interval_s, longest_interval_s)
            ]

        expired = overdue(self._entries)
        for peer in expired:
            del self._entries[peer]
        for peer in overdue(self._draining):
            del self._draining[peer]
        return tuple(expired)

    def entries(self) -> tuple[PeerEntry, ...]:
        """Return the live peers that are not draining, reached or not, ourselves included."""
        return tuple(self._entries.values())

    def draining(self) -> tuple[PeerEntry, ...]:
        """Return the peers that announced their shutdown and still send heartbeats: they finish their work."""
        return tuple(self._draining.values())

    def knows(self, peer: PeerId) -> bool:
        """Return whether a peer has an entry, or has left recently."""
        return peer in self._entries or peer in self._tombstones

    def get(self, peer: PeerId) -> PeerEntry | None:
        """Return the entry of a live peer."""
        return self._entries.get(peer)

    def candidates(self, model: ModelId, *, without: Iterable[PeerId] = ()) -> tuple[Candidate, ...]:
        """Return the reached peers that serve spans of a model, except some peers."""
        excluded = set(without)
        return tuple(
            Candidate(Stage(entry.peer, span.blocks), span.load)
            for entry in self.reached()
            if entry.peer not in excluded
            for span in entry.spans
            if span.model == model
        )

    def expected(self, model: ModelId) -> tuple[BlockRange, ...]:
        """Return the blocks of a model that reached peers serve, or announced and may be loading."""
        reached = self.reached()
        found = [span.blocks for each in reached for span in each.spans if span.model == model]
        for entry in reached:
            announced = entry.announcements[-1].placements if entry.announcements else ()
            found += [placed.blocks for placed in announced if placed.model == model]
        return tuple(dict.fromkeys(found))

    def servers(self, model: ModelId, until_ms: int) -> tuple[Server, ...]:
        """Return the placements of a model that reached peers announced up to a moment.

        Deterministic: peers that heard the same heartbeats return the same, whenever they are asked. Excludes peers
        that announce no placements; their spans show what they serve. Whether this node can reach them does not count,
        as every node must plan with the same servers. Where a peer has not served what it announces for `LOADING_S`,
        what it serves counts. Of when that began, a node that has heard of the peer only lately knows nothing but the
        announcement, so that until the peer serves its blocks it may count other ones than nodes of longer standing.
        """
        found = []
        for entry in self.reached():
            until = tuple(takewhile(lambda announced: announced.since_ms <= until_ms, entry.announcements))
            placements = [placed for placed in (until[-1].placements if until else ()) if placed.model == model]
            if placements and model in entry.overdue:
                rate = min(placed.rate for placed in placements)
                placements = [
                    Placement(model=model, blocks=span.blocks, rate=rate, movable=False)
                    for span in entry.spans
                    if span.model == model
                ]
            found += [
                Server(
                    Stage(entry.peer, placed.blocks),
                    min(placed.rate, MAX_BLOCKS_PER_S / len(placed.blocks)),
                    placed.movable,
                )
                for placed in placements
            ]
        return tuple(sorted(found))

    def location_of(self, peer: PeerId) -> Location:
        """Return where a peer is, as far as it says so."""
        entry = self._entries.get(peer) or self._draining.get(peer)
        return Location() if entry is None else entry.location

    def can_open(self, sender: PeerId, receiver: PeerId) -> bool:
        """Return whether a peer can open a stream to another, as far as is known."""
        there = self.location_of(receiver)
        if there.relays:
            there = there._replace(relays=tuple(each for each in there.relays if self._relays_for_others(PeerId(each))))
        if can_open(self.location_of(sender), there) or sender == receiver:
            return True
        return self._own_peer in {sender, receiver} and not {sender, receiver}.isdisjoint(self._connected())

    def _relays_for_others(self, peer: PeerId) -> bool:
        """Return whether a peer that another one names as its relay is one: anybody may name any id."""
        return peer == self._own_peer or peer in self._connected() or self.is_relay(peer)

    def is_relay(self, peer: PeerId) -> bool:
        """Return whether a live peer says that it relays, and does not say that nobody can dial it."""
        entry = self._entries.get(peer)
        known = entry.reachability if entry is not None else None
        return known is not None and known.verdict is not Verdict.PRIVATE and known.relay_bytes_per_s > 0

    def relay_rate(self, relay: PeerId) -> float:
        """Return the bytes per second that a peer relays in all, as it announces; infinite where it says nothing."""
        entry = self._entries.get(relay)
        rate = entry.reachability.relay_bytes_per_s if entry is not None and entry.reachability is not None else 0.0
        return rate or math.inf

    def models(self) -> dict[ModelId, tuple[PeerId, ...]]:
        """Return the models of which reached peers serve spans, and these peers."""
        found: dict[ModelId, dict[PeerId, None]] = {}
        for entry in self.reached():
            for span in entry.spans:
                found.setdefault(span.model, {})[entry.peer] = None
        return {model: tuple(peers) for model, peers in found.items()}


def _location(heartbeat: Heartbeat) -> Location:
    if (known := heartbeat.reachability) is None:
        return Location()
    seen = (*known.observed, *(each for each in heartbeat.multiaddrs if "/p2p-circuit" not in each))
    return Location(
        private=known.verdict is Verdict.PRIVATE,
        networks=frozenset(origin(host) for host in map(_host, seen) if not is_private(host)),
        relays=known.relays,
        endpoint_dependent=known.endpoint_dependent,
    )


def address_ranges(multiaddrs: Iterable[str]) -> frozenset[str]:
    """Return the public ranges of the addresses that a peer claims: see `address_range`."""
    return frozenset(found for address in multiaddrs if (found := address_range(_host(address))) is not None)


def _host(multiaddr: str) -> str:
    parts = multiaddr.split("/")
    return parts[2] if len(parts) > 2 else ""


def _most_in_a_range(newcomer: PeerEntry, entries: Iterable[PeerEntry]) -> int:
    """Return the number of entries in the most crowded of the newcomer's ranges."""
    counts = Counter(name for each in entries for name in each.ranges & newcomer.ranges)
    return max(counts.values(), default=0)


def _most_crowded(entries: Sequence[PeerEntry]) -> PeerEntry:
    """Return the entry with the oldest heartbeat in the most crowded place."""
    counts = Counter(each.place for each in entries)
    return max(entries, key=lambda each: counts[each.place])


def _announcements(before: tuple[AnnouncedPlacements, ...], heartbeat: Heartbeat) -> tuple[AnnouncedPlacements, ...]:
    announced = AnnouncedPlacements(heartbeat.placed_at_ms, heartbeat.placements)
    latest_ms = 1000 * (heartbeat.issued_at_s + MAX_CLOCK_SKEW_S)
    before = tuple(each for each in before if each.since_ms <= latest_ms)  # later ones: the clock has been set since
    if before and announced.since_ms <= before[-1].since_ms:
        return before
    return (*before, announced)[-ANNOUNCEMENTS_PER_PEER:]


def _unserved_since_ms(known: PeerEntry | None, heartbeat: Heartbeat) -> Mapping[ModelId, int]:
    """Return since when a peer has announced blocks of each model without serving them.

    This is the first heartbeat that does not show them as served: an engine that died has the full time to come back.
    Of a peer that was unknown it is the announcement, but not so long ago that less than `RESTART_S` are left to it.
    """
    since_ms = 1000 * heartbeat.issued_at_s
    if known is None:
        since_ms = max(heartbeat.placed_at_ms, since_ms - int(1000 * (LOADING_S - RESTART_S)))
    before = {} if known is None else known.unserved_since_ms
    return {
        placed.model: before.get(placed.model, since_ms)
        for placed in heartbeat.placements
        if not _is_served(placed, heartbeat.spans)
    }


def _is_served(placed: Placement, spans: Iterable[ServedSpan]) -> bool:
    """Return whether spans together have all blocks of a placement: several devices serve a part of it each."""
    reached = placed.blocks.start
    for blocks in sorted(span.blocks for span in spans if span.model == placed.model):
        if blocks.start <= reached:
            reached = max(reached, blocks.end)
    return reached >= placed.blocks.end
