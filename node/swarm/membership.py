"""Membership: joins the swarm, announces what this node serves, and finds the peers that serve a model.

A peer's spans become known in three ways. Heartbeats by gossip announce every few seconds who is alive and serves what.
Records in the DHT let a newcomer find the peers of a model before any heartbeat has arrived. A dial that fails drops a
peer at once.

An announcement counts once the peer was reached: see `node.swarm.directory`.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import structlog
import trio

from node.identity import Identity
from node.network.interface import Network, NetworkError
from node.swarm.bootstrap import Bootstrap, BootstrapDialler
from node.swarm.dht_records import RecordKinds
from node.swarm.dialling import Dialler
from node.swarm.directory import Candidate, Directory
from node.swarm.heartbeats import Heartbeats, OwnServices
from node.swarm.sequence_numbers import SequenceNumbers
from node.swarm.span_records import LOOKUP_TIMEOUT_S, SpanRecords
from protocol.announcements import blob_provider_key, provider_key
from protocol.identity import BlockRange, ModelId, PeerId, Stage
from selector.cuts import Cuts
from selector.routing import Links, NoRouteError, check_complete

PING_ROUND_S = 10.0
"""Interval at which the round-trip times to the connected peers are measured."""

ROUND_TRIPS = 15
"""Latest round trips of which the shortest counts."""

_logger = structlog.get_logger(__name__)


class Membership:
    """This node's place in the swarm."""

    def __init__(
        self,
        *,
        network: Network,
        identity: Identity,
        services: OwnServices,
        bootstrap: Sequence[str],
        records: RecordKinds,
        jitter: random.Random,
        wall_clock: Callable[[], float] = time.time,
        on_round_trip: Callable[[PeerId, float], None] = lambda peer, seconds: None,
    ) -> None:
        """`on_round_trip` is called with a peer's estimated round-trip time, in seconds, after each ping."""
        self.directory = Directory(
            own_peer=network.peer_id, connected=network.connected_peers, range_of=lambda peer: _range_of(network, peer)
        )
        sequence = SequenceNumbers(wall_clock)
        self.heartbeats = Heartbeats(network, identity, self.directory, services, sequence, jitter, wall_clock)
        self._span_records = SpanRecords(
            network, identity, self.directory, records, services.served_spans, sequence, wall_clock
        )
        self._bootstrap = BootstrapDialler(network, bootstrap, jitter)
        self._dialler = Dialler(network, self.directory, jitter)
        self._network = network
        self._jitter = jitter
        self._on_round_trip = on_round_trip
        self._round_trips_s: dict[PeerId, deque[float]] = {}
        self.announce = self.heartbeats.announce
        self.leave = self.heartbeats.leave

    def bootstrap(self) -> tuple[Bootstrap, ...]:
        """Return the state of each bootstrap address."""
        return self._bootstrap.states()

    def served_models(self) -> tuple[ModelId, ...]:
        """Return the models of which reached peers serve spans."""
        return tuple(self.directory.models())

    def round_trip_s(self, peer: PeerId) -> float | None:
        """Return the shortest of the last round trips to a peer, in seconds: a busy machine answers late at times.

        This node's announcement says the same, so that two peers judge a link alike, whichever of them pings.
        """
        return min(self._round_trips_s.get(peer, ()), default=None)

    async def run(self) -> None:
        """Take part until cancelled; the network must be running."""
        async with trio.open_nursery() as nursery:
            for part in (self._bootstrap, self.heartbeats, self._span_records, self._dialler):
                nursery.start_soon(part.run)
            nursery.start_soon(self._ping_loop)

    def forget(self, peer: PeerId) -> None:
        """Treat a peer as dead until its next heartbeat."""
        self.directory.forget(peer)

    def known_candidates(self, model: ModelId, *, without: Iterable[PeerId]) -> tuple[Candidate, ...]:
        """Return the reached peers that serve spans of a model, without looking for others."""
        return self.directory.candidates(model, without=without)

    def unreached_stages(self, model: ModelId, blocks: Sequence[BlockRange]) -> tuple[Stage, ...]:
        """Return the spans with some of these blocks that live peers announce which this node has not reached."""
        return tuple(
            Stage(entry.peer, span.blocks)
            for entry in self.directory.unreached()
            for span in entry.spans
            if span.model == model and any(map(span.blocks.overlap, blocks))
        )

    async def candidates(
        self, model: ModelId, cuts: Cuts, links: Links, *, without: Iterable[PeerId]
    ) -> tuple[Candidate, ...]:
        """Return the reached peers that serve spans of a model.

        Dials unreached ones and queries the DHT where the reached ones make no route.
        """
        without = tuple(without)

        def is_complete() -> bool:
            found = self.directory.candidates(model, without=without)
            try:
                check_complete(cuts, [candidate.stage for candidate in found], links)
            except NoRouteError:
                return False
            return True

        if not is_complete():
            with trio.move_on_after(LOOKUP_TIMEOUT_S):
                await self._dialler.reach_servers(model, is_complete)
        if not is_complete():
            with trio.move_on_after(LOOKUP_TIMEOUT_S):
                await self._span_records.find_peers(model, self.heartbeats.interval_ms())
        return self.directory.candidates(model, without=without)

    async def providers(self, model: ModelId) -> tuple[PeerId, ...]:
        """Return peers that serve spans of a model, and so have its manifest; queries the DHT if none is known."""

        def known_providers() -> list[PeerId]:
            return [peer for peer in self.directory.models().get(model, ()) if peer != self._network.peer_id]

        if not known_providers():
            with trio.move_on_after(LOOKUP_TIMEOUT_S):
                await self._dialler.reach_servers(model, lambda: bool(known_providers()))
        if known := known_providers():
            return tuple(known)
        return await self._span_records.live_providers(provider_key(model))

    async def holders(self, sha256: str) -> tuple[PeerId, ...]:
        """Return live peers that announced a file in the DHT."""
        return await self._span_records.live_providers(blob_provider_key(sha256))

    async def _ping_loop(self) -> None:
        """Measure the round-trip times to the connected peers, one after another."""
        while True:
            peers = self._network.connected_peers()
            self._round_trips_s = {peer: s for peer, s in self._round_trips_s.items() if peer in peers}
            for peer in peers:
                try:
                    round_trip_s = await self._network.ping(peer)
                except NetworkError as error:
                    _logger.debug("ping failed", peer=peer, reason=str(error))
                    continue
                latest_s = self._round_trips_s.setdefault(peer, deque(maxlen=ROUND_TRIPS))
                latest_s.append(round_trip_s)
                self._on_round_trip(peer, min(latest_s))
            await trio.sleep(PING_ROUND_S * self._jitter.uniform(0.8, 1.2))


def _range_of(network: Network, peer: PeerId) -> str | None:
    way = network.way_to(peer)
    return way.range if way is not None else None
