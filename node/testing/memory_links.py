"""The links of the simulated network: latency, jitter, bandwidth, loss, partitions. Deterministic given its generator.

Time is trio's clock, so that hours pass in seconds under `trio.testing.MockClock`.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, Protocol, TypeVar

import trio

from node.network.addresses import AddressBook
from node.testing.memory_stream import Packet
from protocol.identity import PeerId

CONNECTION_TIMEOUT_S: Final = 20.0
"""A blocked connection breaks after this long, as by the real one's keepalive."""
RETRANSMISSION_S: Final = 0.2

Latency = Callable[[PeerId, PeerId], float]


@dataclass(slots=True)
class LinkModel:
    """Properties of the link between two peers."""

    latency_s: float | Latency = 0.01
    """One way; a constant, or a function of sender and receiver."""
    jitter_s: float = 0.0
    """Added to the latency, uniformly between 0 and this."""
    loss: float = 0.0
    """Share of packets lost. A gossip message that is lost is gone; a piece of a stream comes late."""
    bandwidth: float | None = None
    """Bytes per second of each directed pair; None is without bound."""
    resolution_s: float = 0.0
    """Packets arrive at multiples of this, a little late: in a large swarm many then share one tick of the clock."""


class SimulatedHost(Protocol):
    """The network of one simulated peer, as far as links concern it."""

    peer_id: PeerId
    connections: dict[PeerId, Any]

    @property
    def alive(self) -> bool:
        """Whether it runs."""

    def lose_connection(self, peer: PeerId) -> None:
        """Break the connection to a peer."""


H = TypeVar("H", bound=SimulatedHost)


class MemoryLinks(Generic[H]):
    """Carries packets between the networks of all peers of a simulation, and injects faults."""

    def __init__(
        self, rng: random.Random, link: LinkModel | None = None, *, address_book: AddressBook | None = None
    ) -> None:
        """Start with no peers; every random choice is drawn from `rng`.

        With an `address_book` all peers share it, so that each can be dialled by all.
        """
        self.address_book = address_book
        self.rng = rng
        self.link = link or LinkModel()
        self.networks: dict[PeerId, H] = {}
        self.by_endpoint: dict[str, H] = {}
        self.connection_numbers = itertools.count(1)
        # One count for all: a peer that comes back must not repeat numbers, or its messages count as seen.
        self.message_numbers = itertools.count(1)
        self._groups: dict[PeerId, int] = {}
        self._stopped: dict[PeerId, None] = {}
        self._blocked_since: dict[tuple[PeerId, PeerId], float] = {}
        self._held: list[Packet] = []
        self._link_free_at: dict[tuple[PeerId, PeerId], float] = {}
        self._sequence = itertools.count()
        self._queue: list[tuple[float, int, H, Packet]] = []
        self._queue_changed = trio.lowlevel.ParkingLot()
        self._carrying = trio.Lock()

    def partition(self, groups: Sequence[Iterable[PeerId]]) -> None:
        """Partition the network into groups; peers in none form one more."""
        self._groups = {peer: number for number, group in enumerate(groups, 1) for peer in group}
        self._reachability_changed()

    def heal(self) -> None:
        """End the partition."""
        self._groups = {}
        self._reachability_changed()

    def stop(self, peer: PeerId) -> None:
        """Freeze a peer as SIGSTOP does: it neither receives nor sends, and its connections stay up for a while."""
        self._stopped[peer] = None
        self._reachability_changed()

    def resume(self, peer: PeerId) -> None:
        """Unfreeze a peer."""
        self._stopped.pop(peer, None)
        self._reachability_changed()

    def blocked(self, a: PeerId, b: PeerId) -> bool:
        """Return whether nothing passes between two peers."""
        return a in self._stopped or b in self._stopped or self._groups.get(a, 0) != self._groups.get(b, 0)

    def latency(self, sender: PeerId, receiver: PeerId) -> float:
        """Draw the latency of a packet."""
        latency = self.link.latency_s
        seconds = latency(sender, receiver) if callable(latency) else latency
        return seconds + (self.rng.uniform(0, self.link.jitter_s) if self.link.jitter_s else 0.0)

    def send(self, packet: Packet) -> None:
        """Send a packet: it arrives after its latency, or when the partition ends."""
        pair = (packet.sender, packet.receiver)
        if self.blocked(*pair):
            if not packet.droppable:
                self._held.append(packet)
            return
        lost = self.link.loss > 0 and self.rng.random() < self.link.loss
        if lost and packet.droppable:
            return
        when = trio.current_time()
        if self.link.bandwidth is not None:
            when = max(when, self._link_free_at.get(pair, 0.0)) + packet.size / self.link.bandwidth
            self._link_free_at[pair] = when
        when += self.latency(*pair) + (RETRANSMISSION_S if lost else 0.0)
        if resolution_s := self.link.resolution_s:
            when = math.ceil(when / resolution_s) * resolution_s
        receiver = self.networks.get(packet.receiver)
        if receiver is not None and receiver.alive:
            self._schedule(when, receiver, packet)

    def _schedule(self, when: float, receiver: H, packet: Packet) -> None:
        """Deliver a packet to a network at a time, if that still runs then."""
        heapq.heappush(self._queue, (when, next(self._sequence), receiver, packet))
        if self._queue[0][3] is packet:
            self._queue_changed.unpark_all()

    async def carry(self) -> None:
        """Deliver the packets of all networks, until cancelled. Every network calls it; one runs it."""
        async with self._carrying:
            while True:
                if not self._queue:
                    await self._queue_changed.park()
                    continue
                wait = self._queue[0][0] - trio.current_time()
                if wait > 0:
                    with trio.move_on_after(wait):
                        await self._queue_changed.park()
                    continue
                _, _, receiver, packet = heapq.heappop(self._queue)
                if not receiver.alive:
                    continue
                if self.blocked(packet.sender, packet.receiver) and packet.sender != packet.receiver:
                    self.send(packet)
                else:
                    packet.deliver()

    def _reachability_changed(self) -> None:
        now = trio.current_time()
        still: dict[tuple[PeerId, PeerId], float] = {}
        for network in self.networks.values():
            for other in network.connections:
                pair = (network.peer_id, other)
                if self.blocked(*pair):
                    still[pair] = self._blocked_since.get(pair, now)
                    if pair not in self._blocked_since:
                        timeout = partial(self._time_out, network, other, now)
                        packet = Packet(network.peer_id, network.peer_id, timeout)
                        self._schedule(now + CONNECTION_TIMEOUT_S, network, packet)
        self._blocked_since = still
        held, self._held = self._held, []
        for packet in held:
            self.send(packet)

    def _time_out(self, network: H, other: PeerId, since: float) -> None:
        if self._blocked_since.get((network.peer_id, other)) == since:
            network.lose_connection(other)
