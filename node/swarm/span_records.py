"""Span and provider records in the DHT, by which a newcomer finds the peers of a model before their heartbeats."""

from collections.abc import Callable, Iterator
from contextlib import suppress

import structlog
import trio

from node.identity import Identity
from node.network.interface import Network, NetworkError
from node.swarm.dht_records import RecordKinds
from node.swarm.directory import UNREPORTED_LOAD, Directory
from node.util.elapsed import Elapsed
from protocol.announcements import Heartbeat, ServedSpan, SpanRecord, provider_key, span_key
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.identity import BlockRange, ModelId, PeerId
from protocol.records import seal, verify_dht_record

RECORD_LIFETIME_S = 1800
RECORD_REFRESH_S = 600

LOOKUP_TIMEOUT_S = 5.0

_logger = structlog.get_logger(__name__)


class SpanRecords:
    """Keeps this node's records current, and looks up those of others."""

    def __init__(
        self,
        network: Network,
        identity: Identity,
        directory: Directory,
        records: RecordKinds,
        served_spans: Callable[[], tuple[ServedSpan, ...]],
        sequence: Iterator[int],
        wall_clock: Callable[[], float],
    ) -> None:
        """Accept the records of this kind."""
        self._network = network
        self._identity = identity
        self._directory = directory
        self._served_spans = served_spans
        self._sequence = sequence
        self._wall_clock = wall_clock
        records.register(SpanRecord.kind, self._validate_record)

    def _validate_record(self, key: str, data: bytes) -> bool:
        verify_dht_record(SpanRecord, key, data, self._wall_clock())
        return True

    async def run(self) -> None:
        """Put our provider and span records on every change, and long before they expire, until cancelled."""
        put: dict[ModelId, tuple[BlockRange, ...]] = {}
        put_to, since_put = 0, Elapsed(self._wall_clock)
        while True:
            spans: dict[ModelId, tuple[BlockRange, ...]] = {}
            for span in self._served_spans():
                spans[span.model] = (*spans.get(span.model, ()), span.blocks)
            connected = len(self._network.connected_peers())
            # A record that was put without any neighbour is stored nowhere else: put it again with the first ones. A
            # machine that wakes up notices late that those are gone that it was put to.
            put_to = min(put_to, connected)
            stale = since_put.seconds() >= RECORD_REFRESH_S or (connected and not put_to)
            for model in {*spans, *put}:
                if stale or spans.get(model) != put.get(model):
                    await self._put(model, spans.get(model, ()))
            if stale or spans != put:
                put, put_to = spans, connected
                since_put.restart()
            await trio.sleep(1)

    async def _put(self, model: ModelId, spans: tuple[BlockRange, ...]) -> None:
        now_s = int(self._wall_clock())
        record = SpanRecord(
            peer=self._network.peer_id,
            model=model,
            blocks=spans,
            sequence=next(self._sequence),
            issued_at_s=now_s,
            expires_at_s=now_s + RECORD_LIFETIME_S,
        )
        try:
            if spans:
                await self._network.provide(provider_key(model))
            key = span_key(model, record.peer)
            await self._network.put_record(key, seal(record, self._identity.private_key))
        except (NetworkError, LocalProtocolError) as error:
            _logger.debug("span record not stored", model=model, reason=str(error))

    async def live_providers(self, key: bytes) -> tuple[PeerId, ...]:
        """Return the providers of a key that answer a ping: provider records outlive their peers by hours."""
        live: list[PeerId] = []

        async def ping(peer: PeerId) -> None:
            with suppress(NetworkError):
                await self._network.ping(peer)
                live.append(peer)

        with trio.move_on_after(LOOKUP_TIMEOUT_S):
            found = await self._find_providers(key)
            async with trio.open_nursery() as nursery:
                for peer in found:
                    nursery.start_soon(ping, peer)
        return tuple(live)

    async def find_peers(self, model: ModelId, interval_ms: int) -> None:
        """Look up the peers of a model, and enter the reachable ones in the directory, with this heartbeat interval."""
        peers = await self._find_providers(provider_key(model))
        async with trio.open_nursery() as nursery:
            for peer in peers:
                if self._directory.get(peer) is None:
                    nursery.start_soon(self._enter, peer, model, interval_ms)

    async def _find_providers(self, key: bytes) -> tuple[PeerId, ...]:
        try:
            return await self._network.find_providers(key)
        except NetworkError as error:
            _logger.info("provider lookup failed", key=key.hex(), reason=str(error))
            return ()

    async def _enter(self, peer: PeerId, model: ModelId, interval_ms: int) -> None:
        """Read a peer's span record, and enter it once the peer answers a ping: a record does not prove liveness."""
        try:
            key = span_key(model, peer)
            data = await self._network.get_record(key)
            if data is None:
                return
            record = verify_dht_record(SpanRecord, key, data, self._wall_clock())
            if not record.blocks:
                return  # it serves nothing any more, and may be draining, which only its heartbeats tell
            await self._network.ping(peer)
        except (NetworkError, RemoteProtocolError) as error:
            _logger.info("provider not available", peer=peer, reason=str(error))
            return
        self._directory.update(
            Heartbeat(
                peer=peer,
                sequence=record.sequence,
                issued_at_s=record.issued_at_s,
                expires_at_s=record.expires_at_s,
                interval_ms=interval_ms,
                multiaddrs=self._network.addresses_of(peer),
                agent="",
                spans=tuple(ServedSpan(model=model, blocks=blocks, load=UNREPORTED_LOAD) for blocks in record.blocks),
            ),
            trio.current_time(),
            dialled=True,
        )
