"""The Kademlia DHT: the library's tables and messages, with lookups of our own that ask the network.

On the wire a record stands under `/<namespace>/<hash>`, where the hash is the first 24 bytes of the sha256 of the full
key in base64url, because the library refuses lookups for keys longer than 50 bytes; the value begins with the full key
(two bytes of length, then UTF-8), so that whoever stores it can check it.
"""

import base64
import hashlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio
from libp2p.kad_dht.common import BUCKET_SIZE, PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Record
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
from protocol.limits import MAX_ADDRESSES, MAX_RECORD_BYTES

logger = logging.getLogger(__name__)

MAX_KEY_BYTES: Final = 512
MAX_STORED_RECORDS: Final = 8192
MAX_RECORDS_PER_OWNER: Final = 64
"""Records of one peer: two, and one for each model of which it serves spans."""
MAX_STORED_PROVIDERS: Final = 65536
MAX_KEYS_PER_PROVIDER: Final = 8192
PROVIDER_LIFETIME_S: Final = 25 * 3600.0
"""Twice the time after which a node announces its files again."""
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
    """Records of others, with a share for each owner: the peer that a record's key ends with and that signed it.

    The library scans all of up to 50,000 records for the oldest at every put once it is full.
    """

    def __init__(self, host: GuardedHost, local_peer_id: ID) -> None:
        super().__init__(host, local_peer_id)
        self._owners: dict[bytes, str] = {}

    def put(self, key: bytes, value: bytes, validity: float = 0.0) -> None:
        """Store a record of ours, or one that we looked up."""
        self._make_room(key, value)
        super().put(key, value, validity)

    def put_record(self, key: bytes, record: Record) -> None:
        """Store a record that a peer sent."""
        self._make_room(key, record.value)
        super().put_record(key, record)

    def _evict_if_full(self) -> None:
        """Evict nothing: `_make_room` did."""

    def _make_room(self, key: bytes, value: bytes) -> None:
        """Evict the oldest record of an owner that has all its share, or, of a full store, of the owner with most."""
        if key in self.store:
            self._owners[key] = self._owners.pop(key)  # the newest now
            return
        if len(self._owners) > len(self.store):  # some have expired
            self._owners = {held: owner for held, owner in self._owners.items() if held in self.store}
        owner = parse_wire_value(key.decode(), value)[0].rpartition("/")[2]
        counts = Counter(self._owners.values())
        if counts[owner] >= MAX_RECORDS_PER_OWNER:
            self._evict_of(owner)
        elif len(self.store) >= MAX_STORED_RECORDS:
            counts.pop(self.local_peer_id.to_base58(), None)
            self._evict_of(max(counts, key=lambda each: counts[each], default=owner))
        self._owners[key] = owner

    def _evict_of(self, owner: str) -> None:
        oldest = next((key for key, each in self._owners.items() if each == owner), None)
        if oldest is not None:
            del self._owners[oldest]
            self.remove(oldest)


class _BoundedProviderStore(ProviderStore):
    """Providers, with a share for each.

    The library remembers every key that was ever announced, and the first 20 peers that announced it, for two days.
    """

    def __init__(self, host: GuardedHost, peer_routing: object) -> None:
        super().__init__(host, peer_routing)
        self._keys_of: dict[str, dict[bytes, None]] = {}
        """By provider, those announced longest ago first."""

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        """Remember a provider; of a key with many the one that announced it longest ago makes room."""
        self._expire(key)
        peer, known = str(provider.peer_id), self.providers.get(key, {})
        if peer not in known:
            if len(known) >= BUCKET_SIZE:
                self._forget(key, min(known, key=lambda each: known[each].timestamp))
            self._make_room(peer)
        super().add_provider(key, PeerInfo(provider.peer_id, provider.addrs[:MAX_ADDRESSES]))
        keys = self._keys_of.setdefault(peer, {})
        keys.pop(key, None)
        keys[key] = None

    def _make_room(self, peer: str) -> None:
        if len(self._keys_of.get(peer, ())) < MAX_KEYS_PER_PROVIDER:
            if sum(map(len, self._keys_of.values())) < MAX_STORED_PROVIDERS:
                return
            others = [each for each in self._keys_of if each != str(self.local_peer_id)]
            peer = max(others, key=lambda each: len(self._keys_of[each]), default=peer)
        self._forget(next(iter(self._keys_of[peer])), peer)

    def get_providers(self, key: bytes) -> list[PeerInfo]:
        """Return the providers of a key."""
        self._expire(key)
        return super().get_providers(key)

    def cleanup_expired(self) -> None:
        """Forget the providers that have not announced a key again."""
        for key in list(self.providers):
            self._expire(key)

    def _expire(self, key: bytes) -> None:
        overdue_s = time.time() - PROVIDER_LIFETIME_S
        for peer in [peer for peer, each in self.providers.get(key, {}).items() if each.timestamp < overdue_s]:
            self._forget(key, peer)

    def _forget(self, key: bytes, peer: str) -> None:
        del self.providers[key][peer], self._keys_of[peer][key]
        if not self.providers[key]:
            del self.providers[key]
        if not self._keys_of[peer]:
            del self._keys_of[peer]


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
