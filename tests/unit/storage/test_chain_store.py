"""Saved chains survive a restart, and a new canonical branch replaces the old one."""

import sqlite3
from pathlib import Path

from node.storage.chain_store import (
    MAX_CHAINS,
    MAX_FORMER_STATES,
    UNFOLLOWED_S,
    ChainStore,
    StoredState,
    StoredStatement,
)
from node.storage.database import Database, open_database
from node.storage.history import HistoryStore
from protocol.identity import PeerId
from protocol.limits import MAX_OBSERVATION_AGE_S
from tests.support.observations import NOW_S, peer, signed

CHAIN, OTHER = bytes(32), bytes([1]) * 32


def statement(epoch: int, branch: int = 0) -> StoredStatement:
    return StoredStatement(epoch, bytes([branch, epoch]) * 16, b"statement %d" % epoch, (b"one", b"the other"))


async def test_own_messages_survive_a_restart_and_old_epochs_are_pruned(tmp_path: Path) -> None:
    async with open_database(tmp_path / "history") as database:
        store = ChainStore(database)
        await store.save_messages(CHAIN, [(b"a", 4, b"A"), (b"p", -1, b"proof")], oldest_epoch=3)
        await store.save_messages(CHAIN, [(b"b", 6, b"B"), (b"b", 6, b"B")], oldest_epoch=5)
        await store.save_messages(OTHER, [(b"c", 6, b"C")], oldest_epoch=5)
    async with open_database(tmp_path / "history") as database:
        assert await ChainStore(database).messages(CHAIN) == [b"proof", b"B"]


async def test_canonical_branch_is_read_in_order_and_its_end_replaced(tmp_path: Path) -> None:
    async with open_database(tmp_path / "history") as database:
        store = ChainStore(database)
        await store.save_branch(CHAIN, -1, [statement(1), statement(2), statement(5)], StoredState(b"s", b"state"))
        assert await store.statements(CHAIN, after_epoch=1, limit=1) == [statement(2)]
        await store.save_branch(CHAIN, 1, [statement(3, branch=1)], None)
        assert await store.statements(CHAIN) == [statement(1), statement(3, branch=1)]
        assert await store.statements(OTHER) == []
        assert await store.epoch_of(CHAIN, [statement(5).id, statement(1).id]) == 1
        assert await store.epoch_of(OTHER, [statement(1).id]) is None
        assert await store.states(CHAIN) == [StoredState(b"s", b"state")]
        assert await store.states(OTHER) == []


async def test_newest_states_before_gaps_are_kept(tmp_path: Path) -> None:
    states = [StoredState(bytes([number]), b"state %d" % number) for number in range(MAX_FORMER_STATES + 3)]
    async with open_database(tmp_path / "history") as database:
        store = ChainStore(database)
        await store.save_branch(OTHER, -1, [], states[0])
        await store.save_branch(OTHER, -1, [], states[1], keeps_former=True)
        for state in states:
            await store.save_branch(CHAIN, -1, [], state, keeps_former=True)
        assert await store.states(CHAIN) == states[: -MAX_FORMER_STATES - 2 : -1]
        assert await store.states(OTHER) == states[1::-1]
        await store.save_branch(CHAIN, -1, [], states[-2])
        assert await store.states(CHAIN) == [states[-2], *states[-2 : -MAX_FORMER_STATES - 2 : -1]]


async def test_each_own_observation_is_committed_once(tmp_path: Path) -> None:
    async with open_database(tmp_path / "history") as database:
        store, history = ChainStore(database), HistoryStore(database)
        ours = [signed(number) for number in range(5)]
        for each in ours:
            await history.add_many([each])
        observer = peer(0)
        first = await store.uncommitted(CHAIN, observer, limit=3)
        assert list(first.ids) == [each.id for each in ours[:3]]
        assert await store.uncommitted(CHAIN, observer, limit=3) == first
        await store.mark_committed(CHAIN, first.number)
        rest = await store.uncommitted(CHAIN, observer, limit=3)
        assert list(rest.ids) == [each.id for each in ours[3:]]
        assert (await store.uncommitted(CHAIN, PeerId("somebody else"), limit=3)).ids == ()


async def test_own_observations_are_committed_after_all_former_ones_aged_out(tmp_path: Path) -> None:
    async with open_database(tmp_path / "history") as database:
        store, history = ChainStore(database), HistoryStore(database)
        later_s = NOW_S + MAX_OBSERVATION_AGE_S + 86_400
        await history.add_many([signed(number) for number in range(5)])
        await store.mark_committed(CHAIN, (await store.uncommitted(CHAIN, peer(0), limit=9)).number)
        await history.retain(later_s, by_age=True)
        ours = [signed(number, issued_at_s=later_s) for number in range(5, 8)]
        await history.add_many(ours)
        assert set((await store.uncommitted(CHAIN, peer(0), limit=9)).ids) == {each.id for each in ours}


async def stored(database: Database, chain: bytes) -> int:
    """Return how many rows there are of a chain."""

    def count(connection: sqlite3.Connection) -> int:
        tables = [row[0] for row in connection.execute(TABLES)]
        queries = [f"SELECT count(*) FROM {table} WHERE chain = ?" for table in tables]
        return sum(connection.execute(query, (chain,)).fetchone()[0] for query in queries)

    return await database.read(count)


TABLES = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name LIKE 'consensus_%'"


async def fill(store: ChainStore, chain: bytes) -> None:
    """Store something of every kind of a chain."""
    for epoch in (4, 6):
        await store.save_messages(chain, [(chain + b"%d" % epoch, epoch, b"A")], oldest_epoch=epoch - 1)
        await store.save_branch(chain, -1, [statement(1)], StoredState(b"s", b"state"), keeps_former=True)
    await store.mark_committed(chain, 3)
    await store.replace_withheld(chain, [b"observation"])


async def test_chain_that_is_not_followed_is_deleted_after_a_month_by_a_clock_that_peers_confirm(
    tmp_path: Path,
) -> None:
    async with open_database(tmp_path / "history") as database:
        store = ChainStore(database)
        await fill(store, CHAIN)
        await fill(store, OTHER)
        assert await store.retain([CHAIN], 0, by_age=True) == 0
        assert await stored(database, OTHER) == 8, "one row in each table"
        assert await store.retain([CHAIN], 10 * UNFOLLOWED_S, by_age=False) == 0, "the clock may be wrong"
        assert await store.retain([CHAIN], UNFOLLOWED_S, by_age=True) == 0
        assert await store.retain([CHAIN], UNFOLLOWED_S + 1, by_age=True) == 1
        assert await stored(database, OTHER) == 0
        assert await stored(database, CHAIN) == 8


async def test_peer_that_serves_ever_new_models_does_not_fill_the_disk(tmp_path: Path) -> None:
    async with open_database(tmp_path / "history") as database:
        store = ChainStore(database)
        await fill(store, CHAIN)
        for number in range(3 * MAX_CHAINS):
            await store.save_messages(bytes([number]) * 16, [(bytes([number]) * 8, 6, b"A")], oldest_epoch=5)
            await store.retain([CHAIN], number, by_age=False)
        assert [bool(await stored(database, bytes([each]) * 16)) for each in range(3 * MAX_CHAINS)] == [
            *([False] * (2 * MAX_CHAINS + 1)),
            *([True] * (MAX_CHAINS - 1)),
        ]
        assert await stored(database, CHAIN) == 8
