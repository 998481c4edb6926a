"""What of the consensus survives the process: our own word, the branch that stands, and the state that follows."""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from node.storage.database import Database
from protocol.identity import PeerId

SCANNED: Final = 4096
"""Observations that are looked at when ours are searched for those not named yet."""


class StoredStatement(NamedTuple):
    """A statement of the standing branch and signatures under it, as envelopes."""

    epoch: int
    id: bytes
    envelope: bytes
    signatures: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class StoredState:
    """The state after a statement, as `protocol.chains.encode_state` packs it."""

    statement: bytes
    state: bytes


class Named(NamedTuple):
    """Observations of ours that no commit has named, and how far into the history they reach."""

    ids: tuple[bytes, ...]
    number: int


class ConsensusStore:
    """What is kept of every chain. Every method raises StorageError where the database fails it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def keep_records(self, chain: bytes, records: Sequence[tuple[bytes, int, bytes]], oldest_epoch: int) -> None:
        """Keep records (id, epoch, envelope); on return they are safe. Those before `oldest_epoch` are forgotten."""
        await self._database.write(partial(_keep_records, chain=chain, records=records, oldest_epoch=oldest_epoch))

    async def records(self, chain: bytes) -> list[bytes]:
        """Return the envelopes of the records kept, the oldest first."""
        query = "SELECT envelope FROM consensus_records WHERE chain = ? ORDER BY epoch, id"
        return await self._database.read(lambda connection: _column(connection, query, (chain,)))

    async def keep_standing(
        self, chain: bytes, after_epoch: int, statements: Sequence[StoredStatement], state: StoredState | None
    ) -> None:
        """Let the branch after an epoch consist of these statements; and keep the state after the last, if given."""
        await self._database.write(
            partial(_keep_standing, chain=chain, after_epoch=after_epoch, statements=statements, state=state)
        )

    async def statements(self, chain: bytes, *, after_epoch: int = -1, limit: int = 64) -> list[StoredStatement]:
        """Return statements of the standing branch after an epoch, in their order."""
        return await self._database.read(partial(_statements, chain=chain, after_epoch=after_epoch, limit=limit))

    async def epoch_of(self, chain: bytes, statements: Iterable[bytes]) -> int | None:
        """Return the epoch of the first of these statements that is on the standing branch."""
        return await self._database.read(partial(_epoch_of, chain=chain, statements=tuple(statements)))

    async def state(self, chain: bytes) -> StoredState | None:
        """Return the state that was kept last."""
        query = "SELECT statement, state FROM consensus_states WHERE chain = ?"
        row = await self._database.read(lambda connection: connection.execute(query, (chain,)).fetchone())
        return StoredState(*row) if row else None

    async def unnamed(self, chain: bytes, observer: PeerId, limit: int) -> Named:
        """Return the first observations of ours that no commit of ours on a chain has named."""
        return await self._database.read(partial(_unnamed, chain=chain, observer=observer, limit=limit))

    async def name(self, chain: bytes, number: int) -> None:
        """Count what of the history is up to this number as named."""
        await self._database.write(partial(_name, chain=chain, number=number))


def _keep_records(
    connection: sqlite3.Connection, chain: bytes, records: Sequence[tuple[bytes, int, bytes]], oldest_epoch: int
) -> None:
    connection.execute(
        "DELETE FROM consensus_records WHERE chain = ? AND epoch >= 0 AND epoch < ?", (chain, oldest_epoch)
    )
    insert = "INSERT OR IGNORE INTO consensus_records (id, chain, epoch, envelope) VALUES (?, ?, ?, ?)"
    connection.executemany(insert, [(key, chain, epoch, envelope) for key, epoch, envelope in records])


def _keep_standing(
    connection: sqlite3.Connection,
    chain: bytes,
    after_epoch: int,
    statements: Sequence[StoredStatement],
    state: StoredState | None,
) -> None:
    connection.execute("DELETE FROM consensus_statements WHERE chain = ? AND epoch > ?", (chain, after_epoch))
    insert = "INSERT INTO consensus_statements (chain, epoch, id, envelope, signatures) VALUES (?, ?, ?, ?, ?)"
    rows = [(chain, each.epoch, each.id, each.envelope, _packed(each.signatures)) for each in statements]
    connection.executemany(insert, rows)
    if state is not None:
        replace = "INSERT OR REPLACE INTO consensus_states (chain, statement, state) VALUES (?, ?, ?)"
        connection.execute(replace, (chain, state.statement, state.state))


def _statements(connection: sqlite3.Connection, chain: bytes, after_epoch: int, limit: int) -> list[StoredStatement]:
    query = """
        SELECT epoch, id, envelope, signatures FROM consensus_statements
        WHERE chain = ? AND epoch > ? ORDER BY epoch LIMIT ?
    """
    rows = connection.execute(query, (chain, after_epoch, limit))
    return [StoredStatement(epoch, key, envelope, _unpacked(packed)) for epoch, key, envelope, packed in rows]


def _epoch_of(connection: sqlite3.Connection, chain: bytes, statements: Sequence[bytes]) -> int | None:
    query = "SELECT epoch FROM consensus_statements WHERE id = ? AND chain = ?"
    for statement in statements:
        if row := connection.execute(query, (statement, chain)).fetchone():
            return int(row[0])
    return None


def _unnamed(connection: sqlite3.Connection, chain: bytes, observer: PeerId, limit: int) -> Named:
    row = connection.execute("SELECT number FROM consensus_named WHERE chain = ?", (chain,)).fetchone()
    number = row[0] if row else 0
    ids: list[bytes] = []
    query = "SELECT number, id, observer FROM observations WHERE number > ? ORDER BY number LIMIT ?"
    for reached, key, by in connection.execute(query, (number, SCANNED)):
        if by == observer:
            if len(ids) == limit:
                break
            ids.append(key)
        number = reached
    return Named(tuple(ids), number)


def _name(connection: sqlite3.Connection, chain: bytes, number: int) -> None:
    connection.execute("INSERT OR REPLACE INTO consensus_named (chain, number) VALUES (?, ?)", (chain, number))


def _column(connection: sqlite3.Connection, query: str, parameters: tuple[object, ...]) -> list[bytes]:
    return [row[0] for row in connection.execute(query, parameters)]


def _packed(envelopes: Iterable[bytes]) -> bytes:
    return b"".join(len(envelope).to_bytes(4, "big") + envelope for envelope in envelopes)


def _unpacked(packed: bytes) -> tuple[bytes, ...]:
    envelopes = []
    position = 0
    while position < len(packed):
        end = position + 4 + int.from_bytes(packed[position : position + 4], "big")
        envelopes.append(packed[position + 4 : end])
        position = end
    return tuple(envelopes)
