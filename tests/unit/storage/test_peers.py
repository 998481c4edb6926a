"""Peers remembered across restarts."""

from pathlib import Path

import pytest

from node.storage.database import open_database
from node.storage.peers import KnownPeer, KnownPeerStore
from protocol.limits import MAX_ADDRESSES
from tests.support.observations import peer


def met(number: int, last_seen_s: int, *ports: int) -> KnownPeer:
    return KnownPeer(peer(number), tuple(f"/ip4/127.0.0.1/tcp/{port}" for port in ports), last_seen_s)


async def test_known_peers_survive_a_restart_latest_first(tmp_path: Path) -> None:
    async with open_database(tmp_path / "db") as database:
        await KnownPeerStore(database).put([met(1, 100, 4001), met(2, 300, 4002, 4003), met(3, 200)])
    async with open_database(tmp_path / "db") as database:
        store = KnownPeerStore(database)
        assert await store.latest(64) == (met(2, 300, 4002, 4003), met(3, 200), met(1, 100, 4001))
        assert await store.latest(1) == (met(2, 300, 4002, 4003),)


async def test_newer_addresses_replace_older_ones(tmp_path: Path) -> None:
    async with open_database(tmp_path / "db") as database:
        store = KnownPeerStore(database)
        await store.put([met(1, 100, 4001)])
        await store.put([met(1, 200, 5001)])
        assert await store.latest(64) == (met(1, 200, 5001),)
        await store.put([])


async def test_what_was_seen_by_a_clock_that_was_ahead_comes_behind_what_is_seen_now(tmp_path: Path) -> None:
    async with open_database(tmp_path / "db") as database:
        store = KnownPeerStore(database)
        await store.put([met(1, 100), met(2, 100)])
        await store.put([met(3, 9001, 4001), met(4, 9002)])
        await store.put([met(3, 200, 5001), met(5, 200)])
        latest = await store.latest(64)
        assert {latest[0], latest[1]} == {met(3, 200, 5001), met(5, 200)}
        assert [each.peer for each in latest[2:]] == [peer(4), *sorted([peer(1), peer(2)])]


async def test_peers_keep_their_order_when_the_clock_is_behind_for_a_while(tmp_path: Path) -> None:
    async with open_database(tmp_path / "db") as database:
        store = KnownPeerStore(database)
        await store.put([met(1, 9000), met(2, 9002), met(3, 8000), met(4, 9001)])
        await store.put([met(5, 10)])
        await store.put([met(6, 9060)])
        assert [each.peer for each in await store.latest(64)] == [peer(number) for number in (6, 5, 2, 4, 1, 3)]


async def test_known_peers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.storage.peers.MAX_KNOWN_PEERS", 3)
    async with open_database(tmp_path / "db") as database:
        store = KnownPeerStore(database)
        await store.put([met(n, 100 + n) for n in range(6)])
        assert await store.latest(64) == (met(5, 105), met(4, 104), met(3, 103))
        await store.put([met(1, 200, *range(4000, 4000 + 2 * MAX_ADDRESSES))])
        assert len((await store.latest(1))[0].multiaddrs) == MAX_ADDRESSES
