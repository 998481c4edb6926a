"""The chain store in memory and without threads, for simulations in virtual time."""

import sqlite3
from collections.abc import Callable
from typing import TypeVar

import trio

from node.storage.chain_store import ChainStore
from node.storage.database import Database
from node.storage.schema import MIGRATIONS

_T = TypeVar("_T")


class MemoryDatabase(Database):
    """The database's tables in memory; they live as long as the object."""

    def __init__(self) -> None:
        self._connection = sqlite3.connect(":memory:")
        for statement in (statement for step in MIGRATIONS for statement in step):
            self._connection.execute(statement)

    async def write(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run `work` inline, in a transaction."""
        await trio.lowlevel.checkpoint()
        with self._connection:
            return work(self._connection)

    async def read(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run `work` inline."""
        await trio.lowlevel.checkpoint()
        return work(self._connection)

    def close(self) -> None:
        """Drop everything."""
        self._connection.close()


def memory_chain_store() -> ChainStore:
    """Return an empty store of its own."""
    return ChainStore(MemoryDatabase())
