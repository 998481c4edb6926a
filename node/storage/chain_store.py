"""Durable consensus state of every chain: own messages, the canonical branch, and the state after its head."""

import sqlite3
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from node.storage.database import Database
from protocol.identity import PeerId
from selector.consensus.epoch_set import EpochRange, EpochSet

UNFOLLOWED_S: Final = 30 * 86_400
"""How long a chain is stored that is not followed."""

MAX_CHAINS: Final = 64
"""Chains stored, those that were followed last: a peer may serve ever new models."""

MAX_FORMER_STATES: Final = 8
"""States before gaps that are stored of a chain: a clock that is ahead may leave several gaps until it is corrected."""

SCANNED: Final = 4096
"""Observations that one search for own uncommitted ones reads."""


class StoredStatement(NamedTuple):
    """A statement of the canonical branch and the signatures under it, as envelopes."""

    epoch: int
    id: bytes
    envelope: bytes
    signatures: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class StoredState:
    """The state after a statement, as `protocol.chains.encode_state` packs it."""

    statement: bytes
    state: bytes


class Uncommitted(NamedTuple):
    """Own observations that no commit has named, and the number in the history up to which they were searched."""

    ids: tuple[bytes, ...]
    number: int


class ChainStore:
    """The chains in the database. Every method raises StorageError where the database fails."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def save_messages(
        self,
        chain: bytes,
        rows: Sequence[tuple[bytes, int, bytes]],
        oldest_epoch: int,
        withheld: Sequence[bytes] | None = None,
    ) -> None:
        """Save own messages (id, epoch, envelope), durable on return; delete those before `oldest_epoch`.

        Of these the epochs stay known: see `closed_epochs`. `withheld`: replaces the observations that are withheld.
        """
        deleted = "SELECT DISTINCT epoch FROM consensus_records WHERE chain = ? AND epoch >= 0 AND epoch < ?"
        delete = "DELETE FROM consensus_records WHERE chain = ? AND epoch >= 0 AND epoch < ?"
        insert = "INSERT OR IGNORE INTO consensus_records (id, chain, epoch, envelope) VALUES (?, ?, ?, ?)"

        def save(connection: sqlite3.Connection) -> None:
            if epochs := [epoch for (epoch,) in connection.execute(deleted, (chain, oldest_epoch))]:
                _close_epochs(connection, chain, epochs)
                connection.execute(delete, (chain, oldest_epoch))
            connection.executemany(insert, [(key, chain, epoch, envelope) for key, epoch, envelope in rows])
            if withheld is not None:
                _replace_withheld(connection, chain, withheld)

        await self._database.write(save)

    async def messages(self, chain: bytes) -> list[bytes]:
        """Return the envelopes of own messages, the oldest first."""
        query = "SELECT envelope FROM consensus_records WHERE chain = ? ORDER BY epoch, id"
        return await self._database.read(lambda connection: [row[0] for row in connection.execute(query, (chain,))])

    async def withheld(self, chain: bytes) -> list[bytes]:
        """Return the envelopes of the own observations that are withheld until their readings are revealed."""
        query = "SELECT envelope FROM consensus_withheld WHERE chain = ? ORDER BY rowid"
        return await self._database.read(lambda connection: [row[0] for row in connection.execute(query, (chain,))])

    async def replace_withheld(self, chain: bytes, envelopes: Sequence[bytes]) -> None:
        """Replace the observations that are withheld."""
        await self._database.write(lambda connection: _replace_withheld(connection, chain, envelopes))

    async def closed_epochs(self, chain: bytes) -> tuple[EpochRange, ...]:
        """Return the epochs of which own messages were deleted."""
        return (await self._database.read(partial(_closed_epochs, chain=chain))).ranges

    async def save_branch(
        self,
        chain: bytes,
        after_epoch: int,
        statements: Sequence[StoredStatement],
        state: StoredState | None,
        *,
        keeps_former: bool = False,
    ) -> None:
        """Replace the canonical branch after an epoch by these statements, and the state by that given, if any.

        `keeps_former`: keep the state that was saved last as a former one, the newest of `MAX_FORMER_STATES`.
        """
        delete = "DELETE FROM consensus_statements WHERE chain = ? AND epoch > ?"
        insert = "INSERT INTO consensus_statements (chain, epoch, id, envelope, signatures) VALUES (?, ?, ?, ?, ?)"
        replace = "INSERT OR REPLACE INTO consensus_states (chain, statement, state) VALUES (?, ?, ?)"
        rows = [(chain, each.epoch, each.id, each.envelope, _packed(each.signatures)) for each in statements]

        def save(connection: sqlite3.Connection) -> None:
            connection.execute(delete, (chain, after_epoch))
            connection.executemany(insert, rows)
            if state is not None:
                if keeps_former:
                    _keep_former(connection, chain)
                connection.execute(replace, (chain, state.statement, state.state))

        await self._database.write(save)

    async def statements(self, chain: bytes, *, after_epoch: int = -1, limit: int = 64) -> list[StoredStatement]:
        """Return statements of the canonical branch after an epoch, in order."""
        query = """
            SELECT epoch, id, envelope, signatures FROM consensus_statements
            WHERE chain = ? AND epoch > ? ORDER BY epoch LIMIT ?
        """

        def read(connection: sqlite3.Connection) -> list[StoredStatement]:
            rows = connection.execute(query, (chain, after_epoch, limit))
            return [StoredStatement(epoch, key, envelope, _unpacked(packed)) for epoch, key, envelope, packed in rows]

        return await self._database.read(read)

    async def epoch_of(self, chain: bytes, statements: Iterable[bytes]) -> int | None:
        """Return the epoch of the first of these statements that is on the canonical branch."""
        query = "SELECT epoch FROM consensus_statements WHERE id = ? AND chain = ?"
        ids = tuple(statements)

        def read(connection: sqlite3.Connection) -> int | None:
            rows = (connection.execute(query, (each, chain)).fetchone() for each in ids)
            return next((int(row[0]) for row in rows if row), None)

        return await self._database.read(read)

    async def states(self, chain: bytes) -> list[StoredState]:
        """Return the state saved last, and the former ones, the newest first."""
        queries = (
            "SELECT statement, state FROM consensus_states WHERE chain = ?",
            "SELECT statement, state FROM consensus_former_states WHERE chain = ? ORDER BY rowid DESC",
        )

        def read(connection: sqlite3.Connection) -> list[StoredState]:
            return [StoredState(*row) for query in queries for row in connection.execute(query, (chain,))]

        return await self._database.read(read)

    async def retain(self, followed: Collection[bytes], now_s: float, *, by_age: bool) -> int:
        """Note which chains are followed, delete those that long were not, and return how many these were.

        `by_age`: whether the clock can be trusted for that.
        """
        return await self._database.write(partial(_retain, followed=tuple(followed), now_s=int(now_s), by_age=by_age))

    async def uncommitted(self, chain: bytes, observer: PeerId, limit: int) -> Uncommitted:
        """Return the first own observations that no commit on a chain has named."""
        return await self._database.read(partial(_uncommitted, chain=chain, observer=observer, limit=limit))

    async def mark_committed(self, chain: bytes, number: int) -> None:
        """Record that commits have named the own observations up to this number in the history."""
        query = "INSERT OR REPLACE INTO consensus_named (chain, number) VALUES (?, ?)"
        await self._database.write(lambda connection: connection.execute(query, (chain, number)))


def _closed_epochs(connection: sqlite3.Connection, chain: bytes) -> EpochSet:
    return EpochSet(connection.execute("SELECT first, last FROM consensus_closed WHERE chain = ?", (chain,)))


def _close_epochs(connection: sqlite3.Connection, chain: bytes, epochs: Iterable[int]) -> None:
    closed = _closed_epochs(connection, chain)
    closed.add(*epochs)
    connection.execute("DELETE FROM consensus_closed WHERE chain = ?", (chain,))
    insert = "INSERT INTO consensus_closed (chain, first, last) VALUES (?, ?, ?)"
    connection.executemany(insert, [(chain, *each) for each in closed.ranges])


def _keep_former(connection: sqlite3.Connection, chain: bytes) -> None:
    insert = """
        INSERT OR REPLACE INTO consensus_former_states (chain, statement, state)
        SELECT chain, statement, state FROM consensus_states WHERE chain = ?
    """
    delete = """
        DELETE FROM consensus_former_states WHERE chain = :chain AND rowid NOT IN (
            SELECT rowid FROM consensus_former_states WHERE chain = :chain ORDER BY rowid DESC LIMIT :most
        )
    """
    connection.execute(insert, (chain,))
    connection.execute(delete, {"chain": chain, "most": MAX_FORMER_STATES})


def _replace_withheld(connection: sqlite3.Connection, chain: bytes, envelopes: Sequence[bytes]) -> None:
    connection.execute("DELETE FROM consensus_withheld WHERE chain = ?", (chain,))
    insert = "INSERT INTO consensus_withheld (chain, envelope) VALUES (?, ?)"
    connection.executemany(insert, [(chain, envelope) for envelope in envelopes])


def _retain(connection: sqlite3.Connection, followed: Sequence[bytes], now_s: int, *, by_age: bool) -> int:
    connection.execute(
        """
        INSERT OR IGNORE INTO consensus_chains
            SELECT chain, :now_s FROM consensus_records UNION SELECT chain, :now_s FROM consensus_statements
            UNION SELECT chain, :now_s FROM consensus_named
        """,
        {"now_s": now_s},
    )
    update = "UPDATE consensus_chains SET followed_at_s = ? WHERE chain = ?"
    connection.executemany(update, [(now_s, chain) for chain in followed])
    if by_age:  # a wrong clock noted times in the future
        connection.execute("UPDATE consensus_chains SET followed_at_s = min(followed_at_s, ?)", (now_s,))
    rows = connection.execute("SELECT followed_at_s, chain FROM consensus_chains ORDER BY followed_at_s DESC, chain")
    stored = [(at_s, chain) for at_s, chain in rows if chain not in followed]
    room = max(0, MAX_CHAINS - len(followed))
    is_old = [by_age and at_s < now_s - UNFOLLOWED_S for at_s, _ in stored]
    dropped = [(chain,) for number, (_, chain) in enumerate(stored) if number >= room or is_old[number]]
    for delete in (
        "DELETE FROM consensus_records WHERE chain = ?",
        "DELETE FROM consensus_statements WHERE chain = ?",
        "DELETE FROM consensus_states WHERE chain = ?",
        "DELETE FROM consensus_former_states WHERE chain = ?",
        "DELETE FROM consensus_named WHERE chain = ?",
        "DELETE FROM consensus_closed WHERE chain = ?",
        "DELETE FROM consensus_withheld WHERE chain = ?",
        "DELETE FROM consensus_chains WHERE chain = ?",
    ):
        connection.executemany(delete, dropped)
    return len(dropped)


def _uncommitted(connection: sqlite3.Connection, chain: bytes, observer: PeerId, limit: int) -> Uncommitted:
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
    return Uncommitted(tuple(ids), number)


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
