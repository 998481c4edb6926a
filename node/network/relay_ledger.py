"""Who may use this node as a relay: reservations and circuits, and their bounds. No I/O and no clock of its own."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Final

from node.network.addresses import address_range, origin
from node.network.relay_messages import Status
from node.util.token_bucket import Allowance
from protocol.identity import PeerId

_REQUESTS: Final = Allowance(per_s=1.0, burst=32)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """What a relay gives at most."""

    reservations: int = 64
    reservations_per_origin: int = 8
    """From one IPv4 address or IPv6 /64."""
    reservations_per_range: int = 16
    """From one public /24 or /56."""
    circuits: int = 64
    circuits_of_outsiders: int = 16
    """In which a peer takes part that is not of this swarm."""
    circuits_per_peer: int = 16
    circuits_per_pair: int = 4
    circuits_per_origin: int = 24
    """From or to one IPv4 address or IPv6 /64: identities cost nothing."""
    circuits_per_range: int = 32
    """From or to one public /24 or /56."""
    requests: Allowance = _REQUESTS
    """Circuits that one address may ask for: each costs the peer behind us a handshake."""
    idle_s: float = 60.0
    """A circuit that carries nothing for so long is reset: multiplexers ping every 10 s, others' every 30 s."""
    reservation_s: int = 3600
    bytes_per_s: float = 16 << 20
    """Of all circuits together."""
    outsider_bytes: int = 128 << 10
    """In either direction of a circuit in which a peer takes part that is not of this swarm: enough to punch a hole."""
    outsider_s: int = 120


class RelayRefusal(Exception):
    """A circuit is refused, with the status that the peer is told."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Reservation:
    host: str
    expires_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Circuit:
    peers: frozenset[PeerId]
    origins: frozenset[str]
    ranges: frozenset[str]
    outsider: bool


class RelayLedger:
    """The reservations and circuits of a relay. A reservation belongs to the peer that was authenticated."""

    def __init__(self, limits: RelayLimits) -> None:
        self._limits = limits
        self._reservations: dict[PeerId, _Reservation] = {}
        self._circuits: set[_Circuit] = set()

    @property
    def circuits(self) -> int:
        """Circuits at present."""
        return len(self._circuits)

    def reserved(self, now_s: float) -> tuple[PeerId, ...]:
        """Return the peers with a reservation."""
        return tuple(peer for peer, each in self._reservations.items() if each.expires_s > now_s)

    def reserve(self, peer: PeerId, host: str, now_s: float) -> Status:
        """Make or renew a reservation for a peer that is connected from a host; return the outcome."""
        others = {each: held for each, held in self._reservations.items() if each != peer and held.expires_s > now_s}
        here, wider = origin(host), address_range(host)
        near = sum(origin(held.host) == here for held in others.values())
        around = sum(wider is not None and address_range(held.host) == wider for held in others.values())
        limits = self._limits
        if (
            len(others) >= limits.reservations
            or near >= limits.reservations_per_origin
            or around >= limits.reservations_per_range
        ):
            return Status.RESERVATION_REFUSED
        self._reservations = {**others, peer: _Reservation(host, now_s + limits.reservation_s)}
        return Status.OK

    def release(self, peer: PeerId) -> None:
        """End the reservation of a peer: it has no direct connection any more."""
        self._reservations.pop(peer, None)

    @contextmanager
    def circuit(
        self, source: PeerId, source_host: str, target: PeerId, now_s: float, *, outsider: bool = False
    ) -> Iterator[None]:
        """Hold a circuit between two peers inside the block. Raises RelayRefusal."""
        if target not in self.reserved(now_s):
            raise RelayRefusal(Status.NO_RESERVATION)
        hosts = (source_host, self._reservations[target].host)
        circuit = _Circuit(
            frozenset({source, target}),
            frozenset(map(origin, hosts)),
            frozenset(each for each in map(address_range, hosts) if each is not None),
            outsider,
        )
        if source == target or not self._has_room(circuit):
            raise RelayRefusal(Status.RESOURCE_LIMIT_EXCEEDED)
        self._circuits.add(circuit)
        try:
            yield
        finally:
            self._circuits.remove(circuit)

    def _has_room(self, new: _Circuit) -> bool:
        held, limits = self._circuits, self._limits
        pairs = Counter(each.peers for each in held)
        peers = Counter(chain.from_iterable(each.peers for each in held))
        origins = Counter(chain.from_iterable(each.origins for each in held))
        ranges = Counter(chain.from_iterable(each.ranges for each in held))
        return (
            len(held) < limits.circuits
            and pairs[new.peers] < limits.circuits_per_pair
            and all(peers[each] < limits.circuits_per_peer for each in new.peers)
            and all(origins[each] < limits.circuits_per_origin for each in new.origins)
            and all(ranges[each] < limits.circuits_per_range for each in new.ranges)
            and not (new.outsider and sum(each.outsider for each in held) >= limits.circuits_of_outsiders)
        )
