"""The Kademlia DHT: the library's tables and messages, with lookups of our own that ask the network.

On the wire a record stands under `/<namespace>/<hash>`, where the hash is the first 24 bytes of the sha256 of the full
key in base64url, because the library refuses lookups for keys longer than 50 bytes; the value begins with the full key
(two bytes of length, then UTF-8), so that whoever stores it can check it.
"""

import base64
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.kad_dht.value_store import ValueStore
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.validator import NamespacedValidator, Validator

from node.network.guarded_host import GuardedHost, limit_requests, start_service
from node.network.interface import NetworkError, RecordSelector, RecordValidator
from node.network.transport import reason
from node.util.signal import Signal
from protocol.identity import PeerId, parse_peer_id
from protocol.limits import MAX_RECORD_BYTES

logger = logging.getLogger(__name__)

MAX_KEY_BYTES: Final = 512
MAX_STORED_RECORDS: Final = 8192
MAX_STORED_PROVIDER_KEYS: Final = 65536
QUERY_TIMEOUT_S: Final = 4.0
"""Timeout of a single peer's answer."""
CONCURRENCY: Final = 10
REFRESH_DEBOUNCE_S: Final = 0.2
REFRESH_INTERVAL_S: Final = 5.0


def wire_key(key: str) -> str:
    """Return the key of a record in the library's DHT."""
    namespace = _namespace_of(key)
    if not namespace or len(key.encode()) > MAX_KEY_BYTES:
        raise NetworkError(f"{key[:80]!r} is not a valid record key: expected /<namespace>/<name>")
    digest = hashlib.sha256(key.encode()).digest()[:24]
    return f"/{namespace}/{base64.urlsafe_b64encode(digest).decode()}"


def wire_value(key: str, value: bytes) -> bytes:
    """Return a record's value in the library's DHT."""
    if len(value) > MAX_RECORD_BYTES:
        raise NetworkError(f"a record has at most {MAX_RECORD_BYTES} bytes, not {len(value)}")
    name = key.encode()
    return len(name).to_bytes(2, "big") + name + value


def parse_wire_value(stored_under: str, data: bytes) -> tuple[str, bytes]:
    """Return full key and value of a wire value; raise ValueError if it does not belong under its wire key."""
    size = int.from_bytes(data[:2], "big")
    if size > MAX_KEY_BYTES or len(data) < 2 + size or len(data) - 2 - size > MAX_RECORD_BYTES:
        raise ValueError("a record of an invalid length")
    key = data[2 : 2 + size].decode("utf-8")
    try:
        if wire_key(key) != stored_under:
            raise ValueError("a record of another key")
    except NetworkError as error:
        raise ValueError(str(error)) from None
    return key, data[2 + size :]


def _namespace_of(key: str) -> str:
    parts = key.split("/", 2)
    return parts[1] if len(parts) == 3 and parts[0] == "" and parts[2] else ""


class _Records(Validator):
    """One namespace's validator and selector in the library's terms."""

    def __init__(self, validator: RecordValidator, selector: RecordSelector) -> None:
        self._validator = validator
        self._selector = selector

    def validate(self, key: str, value: bytes) -> None:
        """Raise ValueError unless the record is valid under the key."""
        name, payload = parse_wire_value(key, value)
        if not self._validator(name, payload):
            raise ValueError(f"not a valid record under {name}")

    def select(self, key: str, values: list[bytes]) -> int:
        """Return the index of the best of several valid records."""
        parsed = [parse_wire_value(key, value) for value in values]
        return self._selector(parsed[0][0], [payload for _, payload in parsed])


class _BoundedValueStore(ValueStore):
    """The library scans all of up to 50,000 records for the oldest at every put once it is full."""

    def _evict_if_full(self) -> None:
        while len(self.store) >= MAX_STORED_RECORDS:
            del self.store[next(iter(self.store))]


class _BoundedProviderStore(ProviderStore):
    """The library remembers every key that was ever announced."""

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        """Remember a provider."""
        if key not in self.providers:
            while len(self.providers) >= MAX_STORED_PROVIDER_KEYS:
                del self.providers[next(iter(self.providers))]
        super().add_provider(key, provider)


class Dht:
    """Records and providers of one host."""

    def __init__(self, timeout_s: float, learn: Callable[[PeerId, Sequence[str]], None]) -> None:
        """Bound every operation by `timeout_s`; `learn` is called with the addresses of found providers."""
        self._namespaces: dict[str, _Records] = {}
        self._timeout_s = timeout_s
        self._learn = learn
        self._kad: KadDHT | None = None
        self._peer_arrived = Signal()

    def register_record(self, namespace: str, validator: RecordValidator, selector: RecordSelector) -> None:
        """Accept records under /<namespace>/; before `start`."""
        if not 1 <= len(namespace) <= 16 or "/" in namespace:
            raise ValueError(f"{namespace!r} is not a valid namespace: expected 1 to 16 characters without a slash")
        self._namespaces[namespace] = _Records(validator, selector)

    async def start(self, nursery: trio.Nursery, host: GuardedHost) -> None:
        """Serve the DHT."""
        validator = NamespacedValidator(dict(self._namespaces), strict_validation=True)
        kad = KadDHT(
            host,
            DHTMode.SERVER,
            validator=validator,
            validator_changed=True,
            strict_validation=True,
            max_peers_per_subnet=8,
            max_peers_per_subnet_table=16,
        )
        kad.value_store = _BoundedValueStore(host, kad.local_peer_id)
        kad.provider_store = _BoundedProviderStore(host, kad.peer_routing)
        # The library takes ten announcements in ten seconds from a peer, and drops a model's other files in silence.
        kad._provider_rate_max = 1000  # noqa: SLF001
        kad._inbound_limiter.total_tokens = 64  # noqa: SLF001
        host.set_stream_handler(PROTOCOL_ID, limit_requests(kad.handle_stream))
        await start_service(nursery, kad)
        nursery.start_soon(self._refresh_after_arrivals, kad)
        self._kad = kad

    def stopped(self) -> None:
        """Refuse further operations."""
        self._kad = None

    def peer_connected(self) -> None:
        """Refresh the routing table soon: the library leaves it empty after a connection."""
        self._peer_arrived.set()

    async def _refresh_after_arrivals(self, kad: KadDHT) -> None:
        while True:
            await self._peer_arrived.wait()
            await trio.sleep(REFRESH_DEBOUNCE_S)
            self._peer_arrived.clear()  # one refresh for all that arrived meanwhile
            if not kad.host.get_connected_peers():
                continue  # gone already: a lookup would only dial it again
            try:
                with trio.move_on_after(self._timeout_s):
                    await kad.refresh_routing_table()
            except Exception as error:  # noqa: BLE001  # a lookup goes through peers' answers
                logger.debug("refreshing the routing table failed: %r", error)
            await trio.sleep(REFRESH_INTERVAL_S)

    async def put_record(self, key: str, value: bytes) -> None:
        """Store a record here and at the peers nearest to its key."""
        name = wire_key(key)
        data = wire_value(key, value)
        async with self._operation(f"storing {key}") as kad:
            self._store_locally(kad, name, data)
            accepted = 0

            async def store(peer: ID) -> None:
                nonlocal accepted
                accepted += await kad.value_store._store_at_peer(peer, name.encode(), data)  # noqa: SLF001

            peers = await self._nearest(kad, name.encode())
            await _ask_all(peers, store)
            logger.debug("stored %s at %d of %d peers", key, accepted, len(peers))

    def _records_of(self, key: str) -> _Records:
        records = self._namespaces.get(_namespace_of(key))
        if records is None:
            raise NetworkError(f"no record namespace is registered for {key}")
        return records

    def _store_locally(self, kad: KadDHT, name: str, data: bytes) -> None:
        """Store our own copy, unless we hold a better one."""
        records = self._records_of(name)
        records.validate(name, data)
        held = kad.value_store.get(name.encode())
        if held is not None and held.value != data and records.select(name, [held.value, data]) == 0:
            raise NetworkError("a newer record is stored already")
        kad.value_store.put(name.encode(), data)

    async def get_record(self, key: str) -> bytes | None:
        """Return the best record that we or the peers nearest to the key hold."""
        name = wire_key(key)
        records = self._records_of(key)
        found: list[bytes] = []
        async with self._operation(f"looking up {key}") as kad:
            if (held := kad.value_store.get(name.encode())) is not None:
                found.append(held.value)

            async def fetch(peer: ID) -> None:
                answer = await kad.value_store._get_from_peer(peer, name.encode())  # noqa: SLF001
                if isinstance(answer, bytes):
                    records.validate(name, answer)
                    found.append(answer)

            await _ask_all(await self._nearest(kad, name.encode()), fetch)
            if not found:
                return None
            distinct = list(dict.fromkeys(found))
            best = distinct[records.select(name, distinct)] if len(distinct) > 1 else distinct[0]
            if held is None or held.value != best:
                kad.value_store.put(name.encode(), best)
                kad.value_store.local_keys.discard(name.encode())
            return parse_wire_value(name, best)[1]

    async def provide(self, key: bytes) -> None:
        """Announce that we have the content with this key."""
        async with self._operation(f"announcing {key.hex()[:16]}") as kad:
            store = kad.provider_store
            store.providing_keys.add(key)
            store.add_provider(key, PeerInfo(kad.local_peer_id, kad.host.get_addrs()))

            async def announce(peer: ID) -> None:
                await store._send_add_provider(peer, key)  # noqa: SLF001

            await _ask_all(await self._nearest(kad, key), announce)

    async def find_providers(self, key: bytes, limit: int = 20) -> tuple[PeerId, ...]:
        """Return peers that announced the content, without us and without duplicates."""
        found: dict[PeerId, None] = {}

        def add(providers: Iterable[PeerInfo], ours: ID) -> None:
            for provider in providers:
                if provider.peer_id == ours:
                    continue
                try:
                    peer = parse_peer_id(provider.peer_id.to_base58())
                except ValueError:
                    continue
                found[peer] = None
                self._learn(peer, [str(address) for address in provider.addrs])

        async with self._operation(f"looking for providers of {key.hex()[:16]}") as kad:
            store = kad.provider_store
            add(store.get_providers(key), kad.local_peer_id)

            async def ask(peer: ID) -> None:
                providers, _ = await store._get_providers_from_peer_with_closers(peer, key)  # noqa: SLF001
                add(providers, kad.local_peer_id)

            await _ask_all(await self._nearest(kad, key), ask)
        return tuple(found)[:limit]

    async def _nearest(self, kad: KadDHT, key: bytes) -> list[ID]:
        peers = await kad.peer_routing.find_closest_peers_network(key)
        return [peer for peer in peers if peer != kad.local_peer_id]

    @asynccontextmanager
    async def _operation(self, what: str) -> AsyncIterator[KadDHT]:
        """Bound an operation in time, and turn whatever the library raises into a NetworkError."""
        if self._kad is None:
            raise NetworkError("the network is not running")
        try:
            with trio.fail_after(self._timeout_s):
                yield self._kad
        except NetworkError:
            raise
        except trio.TooSlowError:
            raise NetworkError(f"{what} took longer than {self._timeout_s:g} s") from None
        except Exception as error:
            raise NetworkError(f"{what} failed: {reason(error)}") from error


async def _ask_all(peers: Iterable[ID], ask: Callable[[ID], Awaitable[None]]) -> None:
    """Ask every peer, some at a time; slow and faulty ones are skipped."""
    limiter = trio.CapacityLimiter(CONCURRENCY)

    async def ask_one(peer: ID) -> None:
        async with limiter:
            try:
                with trio.move_on_after(QUERY_TIMEOUT_S):
                    await ask(peer)
            except Exception as error:  # noqa: BLE001  # a peer's answer
                logger.debug("asking %s failed: %r", peer, error)

    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(ask_one, peer)
