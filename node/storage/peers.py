"""Known peers, so that a restarted node finds its swarm without bootstrap peers."""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from node.storage.database import Database
from protocol.identity import PeerId
from protocol.limits import MAX_ADDRESSES

MAX_KNOWN_PEERS: Final = 1024
"""Peers stored; those seen longest ago are evicted."""


@dataclass(frozen=True, slots=True)
class KnownPeer:
    """The addresses at which a peer was last reached, and when, in Unix time."""

    peer: PeerId
    multiaddrs: tuple[str, ...]
    last_seen_s: int


class KnownPeerStore:
    """The peers that this node was connected to. Every method may raise StorageError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, peers: Iterable[KnownPeer]) -> None:
        """Store peers that are connected now, over older entries of the same ones."""
        rows = [(each.peer, json.dumps(each.multiaddrs[:MAX_ADDRESSES]), each.last_seen_s) for each in peers]
        await self._database.write(lambda connection: _put(connection, rows))

    async def latest(self, limit: int) -> tuple[KnownPeer, ...]:
        """Return the peers seen last, the latest first."""
        return await self._database.read(lambda connection: _latest(connection, limit))


def _put(connection: sqlite3.Connection, rows: Sequence[tuple[str, str, int]]) -> None:
    # Others seen later still: the clock was ahead, and they would come first until it is that late; or it is behind,
    # as after a boot without a battery. All are set back by as much, so that neither costs them their order.
    set_back = "UPDATE peers SET last_seen_s = last_seen_s - ?"
    insert = """
        INSERT INTO peers (peer, multiaddrs, last_seen_s) VALUES (?, ?, ?) ON CONFLICT (peer) DO UPDATE
        SET multiaddrs = excluded.multiaddrs, last_seen_s = excluded.last_seen_s
    """
    prune = """
        DELETE FROM peers WHERE peer IN (SELECT peer FROM peers ORDER BY last_seen_s DESC, peer LIMIT -1 OFFSET ?)
    """
    if rows:
        present_s = max(seen_s for _, _, seen_s in rows)
        (latest_s,) = connection.execute("SELECT max(last_seen_s) FROM peers").fetchone()
        if latest_s is not None and latest_s > present_s:
            connection.execute(set_back, (latest_s - present_s + 1,))
    connection.executemany(insert, rows)
    connection.execute(prune, (MAX_KNOWN_PEERS,))


def _latest(connection: sqlite3.Connection, limit: int) -> tuple[KnownPeer, ...]:
    query = "SELECT peer, multiaddrs, last_seen_s FROM peers ORDER BY last_seen_s DESC, peer LIMIT ?"
    return tuple(
        KnownPeer(PeerId(peer), tuple(json.loads(multiaddrs)), last_seen_s)
        for peer, multiaddrs, last_seen_s in connection.execute(query, (limit,))
    )
