"""Peers met before, so that a node that starts again finds its swarm without anybody's help."""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from node.storage.database import Database
from protocol.identity import PeerId
from protocol.limits import MAX_ADDRESSES

MAX_REMEMBERED: Final = 1024
"""Peers kept; those seen longest ago make room."""


@dataclass(frozen=True, slots=True)
class RememberedPeer:
    """Where a peer was last reached, and when, in Unix time."""

    peer: PeerId
    multiaddrs: tuple[str, ...]
    last_seen_s: int


class PeerBook:
    """The peers that this node has met. Every method raises StorageError where the database fails it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def remember(self, peers: Iterable[RememberedPeer]) -> None:
        """Keep peers, in place of what was known of them unless that is newer."""
        rows = [(each.peer, json.dumps(each.multiaddrs[:MAX_ADDRESSES]), each.last_seen_s) for each in peers]
        await self._database.write(lambda connection: _remember(connection, rows))

    async def recall(self, limit: int = 64) -> tuple[RememberedPeer, ...]:
        """Return the peers seen last, the latest first."""
        return await self._database.read(lambda connection: _recall(connection, limit))


def _remember(connection: sqlite3.Connection, rows: Sequence[tuple[str, str, int]]) -> None:
    insert = """
        INSERT INTO peers (peer, multiaddrs, last_seen_s) VALUES (?, ?, ?) ON CONFLICT (peer) DO UPDATE
        SET multiaddrs = excluded.multiaddrs, last_seen_s = excluded.last_seen_s
        WHERE excluded.last_seen_s >= last_seen_s
    """
    prune = """
        DELETE FROM peers WHERE peer IN (SELECT peer FROM peers ORDER BY last_seen_s DESC, peer LIMIT -1 OFFSET ?)
    """
    connection.executemany(insert, rows)
    connection.execute(prune, (MAX_REMEMBERED,))


def _recall(connection: sqlite3.Connection, limit: int) -> tuple[RememberedPeer, ...]:
    query = "SELECT peer, multiaddrs, last_seen_s FROM peers ORDER BY last_seen_s DESC, peer LIMIT ?"
    return tuple(
        RememberedPeer(PeerId(peer), tuple(json.loads(multiaddrs)), last_seen_s)
        for peer, multiaddrs, last_seen_s in connection.execute(query, (limit,))
    )
