"""The database file: opened, checked, migrated, read by several threads, and written by group commit.

A write returns once it is committed. While one transaction is being committed, further writes queue, and the next
transaction contains them all.

Durability: WAL with `synchronous=NORMAL` loses nothing when the process is killed, at any instant. After a power
failure the commits since the last checkpoint (about 4 MiB of changes) may be lost, but the file stays intact; other
peers have the lost observations, and return them.
"""

import os
import sqlite3
import stat
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, cast

import structlog
import trio

from node.storage.schema import MIGRATIONS

DATABASE_FILE: Final = "metaswarm.sqlite3"

MAX_WAITING_WRITES: Final = 1024
"""Writes that wait for their transaction; later ones wait for a slot."""

MAX_BATCH: Final = 256
"""Writes in one transaction."""

_HEADER_BYTES: Final = 100

READERS: Final = 3
"""Concurrent reads."""

BUSY_TIMEOUT_S: Final = 10.0
"""Longest wait for a write of another process."""

MAX_LOG_BYTES: Final = 64 << 20
"""The write-ahead log is truncated to this after a large transaction."""

_T = TypeVar("_T")

_logger = structlog.get_logger(__name__)


class StorageError(Exception):
    """The database cannot be read or written. The message is one line, fit for a user."""


class StorageFull(StorageError):
    """The disk is full: nothing was written. Writes work again once there is space."""


class StorageDamaged(StorageError):
    """The file is damaged."""


@dataclass(slots=True, eq=False)
class _Write(Generic[_T]):
    """A queued write. Once it is `taken` into a batch, its `error` or `value` is set when the lock is released."""

    work: Callable[[sqlite3.Connection], _T]
    taken: bool = False
    error: Exception | None = None
    value: _T | None = None


class Database:
    """An open database file. `open_database` makes one."""

    def __init__(self, path: Path, *, may_set_aside: bool) -> None:
        """Open the file. Blocks; raises StorageError."""
        self.path = path
        self.set_aside: Path | None = None
        """The new path of a damaged file that was found here; the swarm has to replace its contents."""
        self._room = trio.Semaphore(MAX_WAITING_WRITES)
        self._waiting: deque[_Write[Any]] = deque()
        self._writing = trio.Lock()
        self._committing = trio.CapacityLimiter(1)
        self._reading = trio.CapacityLimiter(READERS)
        self._idle_readers: list[sqlite3.Connection] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _keep_private(path)
            damage = find_damage(path)
            if damage:
                if not may_set_aside:
                    raise StorageDamaged(f"{path} is damaged ({damage}): start a node here, which sets it aside")
                self.set_aside = _set_aside(path)
                _logger.warning("corrupt database renamed", path=str(self.set_aside), damage=damage)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives its log the same mode
            self._writer = _connect(path)
            try:
                self._writer.execute("PRAGMA journal_mode = WAL")
                self._writer.execute("PRAGMA synchronous = NORMAL")
                self._writer.execute(f"PRAGMA journal_size_limit = {MAX_LOG_BYTES}")
                _migrate(self._writer, path)
            except BaseException:
                self._writer.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise _translated(error, path) from None

    async def write(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run `work` in a transaction, in a thread; return its result once it is committed.

        `work` is run again when a transaction that it shared with others fails. Raises StorageError if nothing was
        written. If the caller is cancelled, it may have been written.
        """
        async with self._room:
            write = _Write(work)
            self._waiting.append(write)
            try:
                # The first writer commits for all that are queued; the others find their write done.
                async with self._writing:
                    if not write.taken:
                        batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
                        for taken in batch:
                            taken.taken = True
                        with trio.CancelScope(shield=True):  # the batch contains the writes of others
                            await trio.to_thread.run_sync(self._commit, batch, limiter=self._committing)
            finally:
                if not write.taken:
                    self._waiting.remove(write)
        if write.error:
            raise write.error
        return cast("_T", write.value)

    async def read(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run `work` in a thread, on a snapshot of the database; return its result. Raises StorageError."""
        return await trio.to_thread.run_sync(self._read, work, limiter=self._reading)

    def close(self) -> None:
        """Close the file. Blocks; there must be no reads or writes."""
        for connection in (*self._idle_readers, self._writer):
            # Closing checkpoints the log, which a full disk prevents; the next opening does it then.
            with suppress(sqlite3.Error):
                connection.close()

    def _commit(self, batch: list[_Write[Any]]) -> None:
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for write in batch:
                write.value = write.work(self._writer)
            self._writer.execute("COMMIT")
        except Exception as error:  # noqa: BLE001  # each write reports its own error to its caller
            if self._writer.in_transaction:
                with suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK")
            if len(batch) > 1:
                for write in batch:
                    self._commit([write])
                return
            batch[0].error = _translated(error, self.path) if isinstance(error, sqlite3.Error) else error

    def _read(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            connection = self._idle_readers.pop() if self._idle_readers else _connect(self.path)
            try:
                connection.execute("PRAGMA query_only = ON")
                connection.execute("BEGIN")
                value = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                connection.close()
                raise
            self._idle_readers.append(connection)
        except sqlite3.Error as error:
            raise _translated(error, self.path) from None
        return value


@asynccontextmanager
async def open_database(path: Path, *, set_aside: bool = True) -> AsyncIterator[Database]:
    """Open a database file inside the block; create a missing one.

    `set_aside`: rename a damaged file and create a new one, see `Database.set_aside`; only for a starting node, never
    while another process may have the file open. Raises StorageError.
    """
    database = await trio.to_thread.run_sync(lambda: Database(path, may_set_aside=set_aside))
    try:
        yield database
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(database.close)


def _connect(path: Path) -> sqlite3.Connection:
    # Transactions are explicit. A connection moves between threads, and is used by one at a time.
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def _keep_private(path: Path) -> None:
    """Revoke the access of other users, which earlier versions granted: the database contains prompts' metadata."""
    for file in (path, *path.parent.glob(f"{path.name}[-.]*")):
        with suppress(FileNotFoundError, PermissionError):  # gone, or owned by another user
            if stat.S_IMODE(file.stat().st_mode) & 0o077:
                file.chmod(0o600)


def find_damage(path: Path) -> str | None:
    """Return the damage of an existing file, if any. Blocks; raises StorageError."""
    if not path.exists():
        return None
    if truncation := _find_truncation(path):
        return truncation
    connection = _connect(path)
    try:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        if isinstance(_translated(error, path), StorageDamaged):
            return str(error)
        raise _translated(error, path) from None
    finally:
        connection.close()
    return None if found == "ok" else " ".join(str(found).split())


def _find_truncation(path: Path) -> str | None:
    """Return the damage of a file that ends within a page, which SQLite itself reads as a page padded with zeros."""
    log = path.with_name(path.name + "-wal")
    if log.exists() and log.stat().st_size:
        return None  # truncated by a full disk: the log restores it
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    page_size = int.from_bytes(header[16:18], "big")  # 1 means 65536, which we never use
    return f"it ends in the middle of a page, after {size} bytes" if page_size > 1 and size % page_size else None


def _set_aside(path: Path) -> Path:
    """Rename a damaged file and return its new name."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    kept = path.with_name(f"{path.name}.damaged-{stamp}-{os.getpid()}")
    # The log first: a log left beside a new database would be replayed into it.
    for suffix in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(kept.with_name(kept.name + suffix))
    return kept


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Apply the missing migrations, each atomically."""
    version = _version(connection)
    if version > len(MIGRATIONS):
        raise StorageError(f"{path} has the format of a newer metaswarm (version {version}): upgrade this one")
    while version < len(MIGRATIONS):
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = _version(connection)  # another process may have migrated it
            for statement in MIGRATIONS[version] if version < len(MIGRATIONS) else ():
                connection.execute(statement)
            version = min(version + 1, len(MIGRATIONS))
            connection.execute(f"PRAGMA user_version = {version}")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _translated(error: Exception, path: Path) -> StorageError:
    """Return an error of SQLite or the file system as one for the user."""
    if isinstance(error, OSError):
        return StorageError(f"cannot use {path}: {error.strerror}")
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return StorageFull(f"no space left to write {path}: nothing was written; free some space")
    if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
        return StorageDamaged(f"{path} is damaged ({error}): restart the node, which sets it aside")
    if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return StorageError(f"another process has been writing {path} for {BUSY_TIMEOUT_S:.0f} s: nothing was written")
    return StorageError(f"cannot use {path}: {error}")
