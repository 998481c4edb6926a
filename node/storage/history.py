"""The history on disk: a set of signed observations by the hour of issue."""

import hashlib
import math
import sqlite3
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from node.storage.database import Database
from protocol.identity import PeerId
from protocol.observations import ObservationId, SignedObservation, bucket_of, oldest_bucket
from protocol.reconciliation import BucketDigest
from selector.retention import HistoryBounds, Share, shares_to_drop

PAGE: Final = 500
"""Records per read of an iteration."""

GRACE_BUCKETS: Final = 1
"""A bucket is closed this many buckets after its hour: its observations have reached every peer by then."""


@dataclass(frozen=True, slots=True)
class _Known:
    revision: int
    digest: BucketDigest


class StoredObservation(NamedTuple):
    """A row of the observations table."""

    id: ObservationId
    bucket: int
    observer: PeerId
    envelope: bytes


class HistoryStore:
    """The stored observations. Those that `add_many` returned survive a kill of the process.

    Every method may raise StorageError.
    """

    def __init__(self, database: Database, bounds: HistoryBounds | None = None) -> None:
        self._database = database
        self._bounds = bounds or HistoryBounds()
        self._digests: dict[int, _Known] = {}

    async def add_many(self, observations: Sequence[SignedObservation]) -> tuple[SignedObservation, ...]:
        """Store verified observations; return the new ones, once they are durable.

        Observations beyond the bounds on a flood are dropped, or displace others: see `HistoryBounds`.
        """
        if not observations:
            return ()
        return await self._database.write(lambda connection: _add(connection, observations, self._bounds))

    async def bucket_digests(self) -> dict[int, BucketDigest]:
        """Return count and digest of every bucket that is not empty; recomputed only for changed buckets."""
        known = self._digests
        self._digests = await self._database.read(lambda connection: _digests(connection, known))
        return {bucket: found.digest for bucket, found in self._digests.items()}

    async def digest(self) -> BucketDigest:
        """Return the total count, and one digest: the sha256 over every bucket, ascending, and its digest."""
        buckets = await self.bucket_digests()
        hashed = hashlib.sha256()
        for bucket in sorted(buckets):
            hashed.update(bucket.to_bytes(4, "big") + buckets[bucket].digest)
        return BucketDigest(sum(found.count for found in buckets.values()), hashed.digest())

    async def ids_in(self, bucket: int) -> tuple[ObservationId, ...]:
        """Return the ids of one bucket, ascending."""
        return await self._database.read(lambda connection: tuple(_ids_in(connection, bucket)))

    async def get_many(self, ids: Sequence[bytes]) -> tuple[bytes, ...]:
        """Return the envelopes of those of the ids that are stored, in their order."""
        return await self._database.read(lambda connection: tuple(_envelopes(connection, ids)))

    async def count_by_observer(self) -> dict[PeerId, int]:
        """Return the number of observations by observer."""
        query = "SELECT observer, sum(count) FROM shares GROUP BY observer"
        return await self._database.read(lambda connection: dict(connection.execute(query).fetchall()))

    async def pages(self) -> AsyncGenerator[list[StoredObservation], None]:
        """Yield all observations by bucket and id, in pages. Those added meanwhile may or may not be included."""
        after = (0, b"")
        while True:
            page = await self._database.read(partial(_page, after=after))
            if page:
                after = (page[-1].bucket, page[-1].id)
                yield page
            if len(page) < PAGE:
                return

    async def discard(self, ids: Iterable[ObservationId]) -> None:
        """Delete observations that failed verification."""
        await self._database.write(partial(_delete, ids=tuple(ids)))

    async def retain(self, now_s: float, *, by_age: bool = True) -> int:
        """Delete observations beyond the bounds or the age limit; return their number.

        Cheap when there is nothing to delete: call it every minute or so. `now_s`: Unix time. Without `by_age` the age
        does not count: a clock that is weeks ahead would delete everything. With it our own of a clock that was ahead
        go, too: no peer takes them before that time.
        """
        present = bucket_of(int(now_s))
        drop = partial(
            shares_to_drop,
            first_bucket=oldest_bucket(now_s) if by_age else 0,
            last_bucket=present + 1 if by_age else math.inf,
            open_bucket=present - GRACE_BUCKETS,
            bounds=self._bounds,
        )
        excess = await self._database.read(lambda connection: drop(_shares(connection)))
        # One transaction each, so that other writes need not wait for all of them.
        return sum([await self._database.write(partial(_drop, share=share)) for share in sorted(excess)])


def _add(
    connection: sqlite3.Connection, observations: Sequence[SignedObservation], bounds: HistoryBounds
) -> tuple[SignedObservation, ...]:
    insert = "INSERT INTO observations (id, bucket, observer, envelope) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO NOTHING"
    new = {}
    for signed in observations:
        row = (signed.id, signed.bucket, signed.observation.observer, signed.envelope)
        if connection.execute(insert, row).rowcount == 1:
            new[signed.id] = signed
    for gone in _trim(connection, {Share(each.bucket, each.observation.observer) for each in new.values()}, bounds):
        new.pop(gone, None)
    return tuple(new.values())


def _trim(connection: sqlite3.Connection, touched: set[Share], bounds: HistoryBounds) -> list[ObservationId]:
    """Delete the observations that count most of shares and buckets above their bound; return their ids."""
    gone: list[ObservationId] = []
    for share in sorted(touched):
        gone += _trim_to(connection, _SHARE, share, bounds.share_bytes)
    for bucket in sorted({share.bucket for share in touched}):
        gone += _trim_to(connection, _BUCKET, (bucket,), bounds.bucket_bytes)
    return gone


class _Bounded(NamedTuple):
    """The queries for what counts towards one bound.

    `by_size` is in the order of what is summed up: in any other, what was dropped would make room for what comes after
    it, and peers would hold what they heard first.
    """

    held: str
    by_size: str


_SHARE: Final = _Bounded(
    "SELECT bytes FROM shares WHERE bucket = ? AND observer = ?",
    "SELECT id, counted_bytes FROM observations WHERE bucket = ? AND observer = ? ORDER BY counted_bytes DESC, id DESC",
)
_BUCKET: Final = _Bounded(
    "SELECT bytes FROM buckets WHERE bucket = ?",
    "SELECT id, counted_bytes FROM observations WHERE bucket = ? ORDER BY counted_bytes DESC, id DESC",
)


def _trim_to(
    connection: sqlite3.Connection, bounded: _Bounded, key: tuple[object, ...], bound: int
) -> list[ObservationId]:
    (held,) = connection.execute(bounded.held, key).fetchone()
    gone: list[ObservationId] = []
    if held > bound:
        with closing(connection.execute(bounded.by_size, key)) as largest:
            while held > bound:
                content_id, size = next(largest)
                gone.append(content_id)
                held -= size
        _delete(connection, gone)
    return gone


def _delete(connection: sqlite3.Connection, ids: Iterable[ObservationId]) -> None:
    connection.executemany("DELETE FROM observations WHERE id = ?", [(content_id,) for content_id in ids])


def _digests(connection: sqlite3.Connection, known: dict[int, _Known]) -> dict[int, _Known]:
    found: dict[int, _Known] = {}
    query = "SELECT bucket, count, revision FROM buckets WHERE count > 0"
    for bucket, count, revision in connection.execute(query).fetchall():
        before = known.get(bucket)
        if before and before.revision == revision:
            found[bucket] = before
        else:
            packed = b"".join(_ids_in(connection, bucket))
            found[bucket] = _Known(revision, BucketDigest(count, hashlib.sha256(packed).digest()))
    return found


def _ids_in(connection: sqlite3.Connection, bucket: int) -> list[ObservationId]:
    query = "SELECT id FROM observations WHERE bucket = ? ORDER BY id"
    return [row[0] for row in connection.execute(query, (bucket,))]


def _envelopes(connection: sqlite3.Connection, ids: Iterable[bytes]) -> list[bytes]:
    query = "SELECT envelope FROM observations WHERE id = ?"
    rows = (connection.execute(query, (content_id,)).fetchone() for content_id in ids)
    return [row[0] for row in rows if row]


def _page(connection: sqlite3.Connection, after: tuple[int, bytes]) -> list[StoredObservation]:
    query = """
        SELECT id, bucket, observer, envelope FROM observations
        WHERE (bucket, id) > (?, ?) ORDER BY bucket, id LIMIT ?
    """
    return [StoredObservation(*row) for row in connection.execute(query, (*after, PAGE))]


def _shares(connection: sqlite3.Connection) -> dict[Share, int]:
    rows = connection.execute("SELECT bucket, observer, bytes FROM shares")
    return {Share(bucket, observer): size for bucket, observer, size in rows}


def _drop(connection: sqlite3.Connection, share: Share) -> int:
    return connection.execute("DELETE FROM observations WHERE bucket = ? AND observer = ?", share).rowcount
