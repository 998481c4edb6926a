"""The network of the simulations: the same interface in memory, deterministic given its random generator.

Links have latency, jitter, bandwidth and loss; peers are killed, stopped and partitioned through the hub. The hub keeps
to trio's clock, so that hours pass in seconds under `trio.testing.MockClock`. Byte streams behave as the real ones do:
windows of 256 KiB, the same errors, the same time-outs.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from node.network.addresses import AddressBook, TcpAddress
from node.testing.memory_network import MemoryNetwork
from node.testing.memory_stream import Packet
from protocol.identity import PeerId

CUT_OFF_S: Final = 20.0
"""A connection through which nothing passes for so long is given up, as the real one's keepalive does."""
RETRANSMISSION_S: Final = 0.2

Latency = Callable[[PeerId, PeerId], float]


@dataclass(slots=True)
class LinkModel:
    """What lies between two peers."""

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


class MemoryNetworkHub:
    """What connects the networks of all peers of a simulation, and the hand of fate."""

    def __init__(
        self, rng: random.Random, link: LinkModel | None = None, *, address_book: AddressBook | None = None
    ) -> None:
        """Start with no peers; every random choice is drawn from `rng`.

        With an `address_book` all peers share it, so that each can be dialled by all.
        """
        self.address_book = address_book
        self.rng = rng
        self.link = link or LinkModel()
        self.networks: dict[PeerId, MemoryNetwork] = {}
        self.by_endpoint: dict[str, MemoryNetwork] = {}
        self._hosts = itertools.count(1)
        self.connection_numbers = itertools.count(1)
        # One count for all: a peer that comes back must not repeat numbers, or its messages count as seen.
        self.message_numbers = itertools.count(1)
        self._groups: dict[PeerId, int] = {}
        self._stopped: dict[PeerId, None] = {}
        self._blocked_since: dict[tuple[PeerId, PeerId], float] = {}
        self._held: list[Packet] = []
        self._link_free_at: dict[tuple[PeerId, PeerId], float] = {}
        self._sequence = itertools.count()
        self._agenda: list[tuple[float, int, MemoryNetwork, Packet]] = []
        self._agenda_changed = trio.lowlevel.ParkingLot()
        self._carrying = trio.Lock()

    def network(self, peer_id: PeerId) -> "MemoryNetwork":
        """Make the network of a peer; again for one that was killed and comes back."""
        number = next(self._hosts)
        address = TcpAddress("ip4", f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", 4001, peer_id)
        network = MemoryNetwork(self, peer_id, address)
        self.networks[peer_id] = network
        self.by_endpoint[address.endpoint] = network
        return network

    def partition(self, groups: Sequence[Iterable[PeerId]]) -> None:
        """Let nothing pass between groups; peers that are in none form one more."""
        self._groups = {peer: number for number, group in enumerate(groups, 1) for peer in group}
        self._reachability_changed()

    def heal(self) -> None:
        """End the partition."""
        self._groups = {}
        self._reachability_changed()

    def stop(self, peer: PeerId) -> None:
        """Freeze a peer as SIGSTOP does: it neither hears nor is heard, and its connections stay up for a while."""
        self._stopped[peer] = None
        self._reachability_changed()

    def resume(self, peer: PeerId) -> None:
        """Unfreeze a peer."""
        self._stopped.pop(peer, None)
        self._reachability_changed()

    def kill(self, peer: PeerId) -> None:
        """Crash a peer: its own calls fail from now on, and the others see their connections to it break."""
        self.networks[peer].crash()

    def blocked(self, a: PeerId, b: PeerId) -> bool:
        """Whether nothing passes between two peers."""
        return a in self._stopped or b in self._stopped or self._groups.get(a, 0) != self._groups.get(b, 0)

    def latency(self, sender: PeerId, receiver: PeerId) -> float:
        """Draw how long a packet takes."""
        latency = self.link.latency_s
        seconds = latency(sender, receiver) if callable(latency) else latency
        return seconds + (self.rng.uniform(0, self.link.jitter_s) if self.link.jitter_s else 0.0)

    def send(self, packet: "Packet") -> None:
        """Have a packet arrive after its time, or when the way is free again."""
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
        if receiver is not None:
            receiver.schedule(when, packet)

    def schedule(self, when: float, receiver: "MemoryNetwork", packet: "Packet") -> None:
        """Have a packet arrive at a network at a time, if that still runs then."""
        heapq.heappush(self._agenda, (when, next(self._sequence), receiver, packet))
        if self._agenda[0][3] is packet:
            self._agenda_changed.unpark_all()

    async def carry(self) -> None:
        """Deliver the packets of all networks, until cancelled. Every running network offers to; one of them does."""
        async with self._carrying:
            while True:
                if not self._agenda:
                    await self._agenda_changed.park()
                    continue
                wait = self._agenda[0][0] - trio.current_time()
                if wait > 0:
                    with trio.move_on_after(wait):
                        await self._agenda_changed.park()
                    continue
                _, _, receiver, packet = heapq.heappop(self._agenda)
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
                        network.schedule(now + CUT_OFF_S, Packet(pair[0], pair[0], self._cut_off_check(pair, now)))
        self._blocked_since = still
        held, self._held = self._held, []
        for packet in held:
            self.send(packet)

    def _cut_off_check(self, pair: tuple[PeerId, PeerId], since: float) -> Callable[[], None]:
        def check() -> None:
            if self._blocked_since.get(pair) == since:
                self.networks[pair[0]].lose_connection(pair[1])

        return check
