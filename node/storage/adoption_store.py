"""Results of this node's adoption trials, so that a restarted node need not repeat them."""

import sqlite3
from collections.abc import Mapping

from node.storage.database import Database
from selector.adoption import MAX_BUCKETS

StoredTrials = Mapping[str, tuple[float, int]]
"""By method: the natural logarithm of its cost over the baseline's, and the Unix time of the trial."""


class AdoptionStore:
    """Trial results by task bucket. Every method may raise StorageError."""

    def __init__(self, database: Database, software: str) -> None:
        """`software`: the versions in use; results of others are not loaded."""
        self._database = database
        self._software = software

    async def save(self, bucket: str, trials: StoredTrials) -> None:
        """Replace the results of a task bucket."""
        rows = [(bucket, name, log_ratio, at_s, self._software) for name, (log_ratio, at_s) in trials.items()]

        def replace(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM standings WHERE kind = ?", (bucket,))
            connection.executemany("INSERT INTO standings VALUES (?, ?, ?, ?, ?)", rows)
            connection.execute(_PRUNE, (MAX_BUCKETS,))

        await self._database.write(replace)

    async def load(self) -> Mapping[str, StoredTrials]:
        """Return the results by task bucket, the longest untried first."""
        query = "SELECT kind, method, log_ratio, tried_at_s FROM standings WHERE software = ? ORDER BY tried_at_s, kind"
        rows = await self._database.read(lambda connection: connection.execute(query, (self._software,)).fetchall())
        found: dict[str, dict[str, tuple[float, int]]] = {}
        for bucket, name, log_ratio, at_s in rows:
            found.setdefault(bucket, {})[name] = (log_ratio, at_s)
        return found


_PRUNE = """
    DELETE FROM standings WHERE kind IN (
        SELECT kind FROM standings GROUP BY kind ORDER BY max(tried_at_s) DESC, kind LIMIT -1 OFFSET ?
    )
"""
