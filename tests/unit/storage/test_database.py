"""The database file: made, migrated, damaged, full, in use by others."""

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from node.storage import schema
from node.storage.database import Database, StorageDamaged, StorageError, StorageFull, open_database
from node.storage.history import HistoryStore
from protocol.observations import BUCKET_S
from selector.retention import HistoryBounds
from tests.support.observations import NOW_S, signed

RECORDS = [signed(n) for n in range(60)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node" / "metaswarm.sqlite3"


def content(path: Path) -> bytes:
    return path.read_bytes()


async def filled(path: Path) -> None:
    async with open_database(path) as database:
        await HistoryStore(database).add_many(RECORDS)


async def test_new_database_is_created_with_its_folder(path: Path) -> None:
    async with open_database(path) as database:
        assert database.set_aside is None
        assert await HistoryStore(database).bucket_digests() == {}
    assert content(path).startswith(b"SQLite")


def cut_in_the_middle_of_a_page(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 + 100])


def cut_the_end_of_the_last_page(path: Path) -> None:
    """SQLite's own check finds nothing: it reads zeros where an observation was."""
    os.truncate(path, path.stat().st_size - 1000)


def overwrite_the_beginning(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xa5" * 4096)


def overwrite_pages_inside(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(b"\xa5" * 5 * 4096)


def replace_by_text(path: Path) -> None:
    path.write_text("this was a database once\n" * 100)


@pytest.mark.parametrize(
    "damage",
    [
        cut_in_the_middle_of_a_page,
        cut_the_end_of_the_last_page,
        overwrite_the_beginning,
        overwrite_pages_inside,
        replace_by_text,
    ],
)
async def test_damaged_database_is_set_aside_and_replaced(path: Path, damage: Callable[[Path], None]) -> None:
    await filled(path)
    damage(path)
    broken = content(path)
    with pytest.raises(StorageDamaged, match="is damaged"):
        async with open_database(path, set_aside=False):
            pass
    assert content(path) == broken, "only a starting node may set a file aside"
    async with open_database(path) as database:
        assert database.set_aside is not None
        assert content(database.set_aside) == broken
        store = HistoryStore(database)
        assert await store.bucket_digests() == {}
        assert len(await store.add_many(RECORDS)) == len(RECORDS)
    async with open_database(path) as database:
        assert database.set_aside is None
        assert (await HistoryStore(database).digest()).count == len(RECORDS)


def copy_crashed(path: Path, to: Path) -> None:
    """Copy a file in use with its log, as a crash would leave them, and spoil the file."""
    for suffix in ("", "-wal"):
        to.with_name(to.name + suffix).write_bytes(path.with_name(path.name + suffix).read_bytes())
    replace_by_text(to)


async def test_log_of_a_damaged_database_is_not_replayed_into_the_new_one(path: Path, tmp_path: Path) -> None:
    await filled(path)
    crashed = tmp_path / "crashed.sqlite3"
    async with open_database(path) as database:
        await HistoryStore(database).add_many([signed(100)])
        copy_crashed(path, crashed)
    async with open_database(crashed) as database:
        assert database.set_aside is not None
        assert len(content(database.set_aside.with_name(database.set_aside.name + "-wal"))) > 0
        assert await HistoryStore(database).bucket_digests() == {}
        assert len(await HistoryStore(database).add_many(RECORDS)) == len(RECORDS)


async def test_damage_at_runtime_is_an_error_that_a_restart_repairs(path: Path) -> None:
    await filled(path)
    async with open_database(path) as database:
        overwrite_pages_inside(path)
        with pytest.raises(StorageDamaged, match="restart"):
            async for _ in HistoryStore(database).pages():
                pass
    async with open_database(path) as database:
        assert database.set_aside is not None


async def limit_pages(database: Database, extra: int) -> None:
    """Leave room for a number of further pages, as a disk would."""

    def limit(connection: sqlite3.Connection) -> None:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + extra}")

    await database.write(limit)


async def test_full_disk_fails_each_write_and_later_writes_work(path: Path) -> None:
    async with open_database(path) as database:
        store = HistoryStore(database)
        await store.add_many([RECORDS[0]])
        await limit_pages(database, extra=2)
        for _ in range(3):
            with pytest.raises(StorageFull, match=r"no space left to write .*metaswarm\.sqlite3"):
                await store.add_many(RECORDS)
        assert (await store.digest()).count == 1, "nothing of a failed write is left"
        assert await store.get_many([RECORDS[0].id]) == (RECORDS[0].envelope,)
        await limit_pages(database, extra=1000)
        assert len(await store.add_many(RECORDS)) == len(RECORDS) - 1


async def test_database_of_a_newer_version_is_not_touched(path: Path) -> None:
    await filled(path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StorageError, match="newer metaswarm"):
        async with open_database(path):
            pass
    assert list(path.parent.glob("*damaged*")) == []


async def test_migrations_keep_the_rows_of_an_older_database(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(path)
    step = ("CREATE TABLE later (value INTEGER)", "INSERT INTO later SELECT count(*) FROM observations")
    monkeypatch.setattr("node.storage.database.MIGRATIONS", (*schema.MIGRATIONS, step))
    for _ in range(2):
        async with open_database(path) as database:
            rows = await database.read(lambda connection: connection.execute("SELECT value FROM later").fetchall())
            assert rows == [(len(RECORDS),)]
            assert (await HistoryStore(database).digest()).count == len(RECORDS)


async def test_bytes_of_an_older_database_count_towards_the_bounds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("node.storage.database.MIGRATIONS", schema.MIGRATIONS[:3])
        async with open_database(path) as database:
            row = "INSERT INTO observations (id, bucket, observer, envelope) VALUES (?, ?, ?, ?)"
            rows = [(each.id, each.bucket, each.observation.observer, each.envelope) for each in RECORDS]
            await database.write(lambda connection: connection.executemany(row, rows).rowcount)
    later_s = NOW_S + 10 * BUCKET_S
    held = 2048 * len(RECORDS)  # each is smaller than one step
    async with open_database(path) as database:
        assert await HistoryStore(database, HistoryBounds(all_bytes=held)).retain(later_s) == 0
        assert await HistoryStore(database, HistoryBounds(all_bytes=held - 1)).retain(later_s) > 0


async def test_failed_migration_is_rolled_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(path)
    step = ("CREATE TABLE later (value INTEGER)", "INSERT INTO nowhere VALUES (1)")
    with monkeypatch.context() as patch:
        patch.setattr("node.storage.database.MIGRATIONS", (*schema.MIGRATIONS, step))
        with pytest.raises(StorageError, match="nowhere"):
            async with open_database(path):
                pass
    async with open_database(path) as database:
        names = await database.read(lambda connection: connection.execute("SELECT name FROM sqlite_master").fetchall())
        assert ("later",) not in names
        assert (await HistoryStore(database).digest()).count == len(RECORDS)


async def test_lock_timeout_names_the_other_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(path)
    monkeypatch.setattr("node.storage.database.BUSY_TIMEOUT_S", 0.0)
    async with open_database(path) as database:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="another process"):
            await HistoryStore(database).add_many([signed(100)])
        other.execute("ROLLBACK")
        other.close()
        assert await HistoryStore(database).add_many([signed(100)])


async def test_unwritable_path_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot use") as caught:
        async with open_database(tmp_path / "file" / "metaswarm.sqlite3"):
            pass
    assert "\n" not in str(caught.value)


async def test_readers_cannot_write(path: Path) -> None:
    await filled(path)
    async with open_database(path) as database:
        with pytest.raises(StorageError, match="readonly"):
            await database.read(lambda connection: connection.execute("DELETE FROM observations"))
        assert (await HistoryStore(database).digest()).count == len(RECORDS)
