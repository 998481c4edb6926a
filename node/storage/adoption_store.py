"""What this node's own trials said of methods, so that a node that starts again need not try them anew."""

import sqlite3
from collections.abc import Mapping
from typing import Final

from node.storage.database import Database

MAX_KINDS: Final = 512
"""Kinds of tasks kept; those tried longest ago make room."""

Standings = Mapping[str, tuple[float, int]]
"""Of methods: the natural logarithm of the cost over the baseline's, and when that was found, in Unix time."""


class StandingStore:
    """The outcomes of trials by kind of task. Every method raises StorageError where the database fails it."""

    def __init__(self, database: Database, software: str) -> None:
        """`software`: the versions in use; what was found with others is not recalled."""
        self._database = database
        self._software = software

    async def keep(self, kind: str, standings: Standings) -> None:
        """Keep what trials said about a kind of task, in place of what was kept of it."""
        rows = [(kind, name, log_ratio, at_s, self._software) for name, (log_ratio, at_s) in standings.items()]

        def replace(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM standings WHERE kind = ?", (kind,))
            connection.executemany("INSERT INTO standings VALUES (?, ?, ?, ?, ?)", rows)
            connection.execute(_PRUNE, (MAX_KINDS,))

        await self._database.write(replace)

    async def recall(self) -> Mapping[str, Standings]:
        """Return what was kept, by kind of task, those tried longest ago first."""
        query = "SELECT kind, method, log_ratio, tried_at_s FROM standings WHERE software = ? ORDER BY tried_at_s, kind"
        rows = await self._database.read(lambda connection: connection.execute(query, (self._software,)).fetchall())
        found: dict[str, dict[str, tuple[float, int]]] = {}
        for kind, name, log_ratio, at_s in rows:
            found.setdefault(kind, {})[name] = (log_ratio, at_s)
        return found


_PRUNE = """
    DELETE FROM standings WHERE kind IN (
        SELECT kind FROM standings GROUP BY kind ORDER BY max(tried_at_s) DESC, kind LIMIT -1 OFFSET ?
    )
"""
