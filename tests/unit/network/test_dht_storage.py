"""What this node stores of others' records and providers: a share for each peer, and live ones rather than others."""

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.kad_dht.common import BUCKET_SIZE
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from node.network.dht import PROVIDER_LIFETIME_S, _BoundedProviderStore, _BoundedValueStore, wire_key, wire_value

OWN = create_new_key_pair(bytes(32))
OWN_ID = ID.from_pubkey(OWN.public_key)
HOST = cast("Any", SimpleNamespace(get_id=lambda: OWN_ID, get_private_key=lambda: OWN.private_key))
KEY = b"k" * 32


def peer(number: int) -> ID:
    return ID.from_pubkey(create_new_key_pair(number.to_bytes(32, "big")).public_key)


def provider(number: int) -> PeerInfo:
    return PeerInfo(peer(number), [Multiaddr("/ip4/192.0.2.1/tcp/1")])


def providers_of(store: _BoundedProviderStore, key: bytes = KEY) -> set[ID]:
    return {each.peer_id for each in store.get_providers(key)}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [time.time()]
    monkeypatch.setattr("time.time", lambda: now_s[0])
    return now_s


def test_live_provider_replaces_the_one_that_announced_longest_ago(clock: list[float]) -> None:
    store = _BoundedProviderStore(HOST, None)
    for number in range(1, 1 + BUCKET_SIZE):
        store.add_provider(KEY, provider(number))
        clock[0] += 1
    store.add_provider(KEY, provider(1))  # again
    store.add_provider(KEY, provider(99))
    assert providers_of(store) == {peer(number) for number in (1, *range(3, 1 + BUCKET_SIZE), 99)}


def test_provider_that_announces_no_more_is_forgotten(clock: list[float]) -> None:
    store = _BoundedProviderStore(HOST, None)
    store.add_provider(KEY, provider(1))
    clock[0] += PROVIDER_LIFETIME_S / 2
    store.add_provider(KEY, provider(2))
    store.add_provider(b"another", provider(1))
    clock[0] += PROVIDER_LIFETIME_S / 2 + 1
    assert providers_of(store) == {peer(2)}
    clock[0] += PROVIDER_LIFETIME_S
    store.cleanup_expired()
    assert not store.providers
    assert not store._keys_of


def test_peer_that_announces_much_displaces_its_own_announcements_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.network.dht.MAX_KEYS_PER_PROVIDER", 5)
    store = _BoundedProviderStore(HOST, None)
    store.add_provider(KEY, provider(1))
    for number in range(20):
        store.add_provider(bytes([number]), provider(2))
    assert providers_of(store) == {peer(1)}
    assert set(store.providers) == {KEY, *(bytes([number]) for number in range(15, 20))}


def test_full_provider_store_evicts_from_who_has_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.network.dht.MAX_STORED_PROVIDERS", 6)
    store = _BoundedProviderStore(HOST, None)
    for number in range(5):
        store.add_provider(bytes([number]), PeerInfo(OWN_ID, []))
    for number in range(1, 6):
        store.add_provider(KEY, provider(number))
    assert all(providers_of(store, bytes([number])) == {OWN_ID} for number in range(5))
    assert providers_of(store) == {peer(5)}


def put(store: _BoundedValueStore, kind: str, owner: ID, version: str = "") -> bytes:
    name = f"/metaswarm/{kind}/{owner.to_base58()}"
    key = wire_key(name).encode()
    store.put(key, wire_value(name, version.encode()))
    return key


def test_owner_of_many_records_displaces_its_own_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.network.dht.MAX_RECORDS_PER_OWNER", 3)
    store = _BoundedValueStore(HOST, OWN_ID)
    honest = put(store, "cap", peer(1))
    spans = [put(store, f"span/{number}", peer(2)) for number in range(10)]
    assert set(store.store) == {honest, *spans[-3:]}


def test_full_store_evicts_from_the_owner_of_most_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.network.dht.MAX_STORED_RECORDS", 8)
    store = _BoundedValueStore(HOST, OWN_ID)
    own = {put(store, f"span/{number}", OWN_ID) for number in range(4)}
    honest = put(store, "cap", peer(1))
    spans = [put(store, f"span/{number}", peer(2)) for number in range(10)]
    assert set(store.store) == {*own, honest, *spans[-3:]}
    newcomer = put(store, "cap", peer(3))
    assert set(store.store) == {*own, honest, *spans[-2:], newcomer}


def test_new_version_of_a_record_evicts_nothing_from_a_full_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.network.dht.MAX_STORED_RECORDS", 3)
    store = _BoundedValueStore(HOST, OWN_ID)
    keys = {put(store, "cap", peer(number)) for number in range(1, 4)}
    for version in ("1", "2"):
        assert put(store, "cap", peer(3), version) in keys
    assert set(store.store) == keys


def test_expired_records_do_not_count(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.network.dht.MAX_RECORDS_PER_OWNER", 2)
    store = _BoundedValueStore(HOST, OWN_ID)
    for kind in ("a", "b"):
        put(store, kind, peer(1))
    clock[0] += 10 * 86_400
    store.cleanup_expired()
    assert not store.store
    later = {put(store, kind, peer(1)) for kind in ("c", "d")}
    assert set(store.store) == later
    assert len(store._owners) == 2
