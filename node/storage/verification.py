"""Verifies the stored history: every signature, id and digest."""

import hashlib
import sqlite3
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import trio

from node.storage.database import Database, StorageDamaged
from node.storage.history import HistoryStore, StoredObservation
from protocol.errors import RemoteProtocolError
from protocol.observations import ObservationId, verify_observation
from protocol.reconciliation import BucketDigest


@dataclass(slots=True)
class HistoryVerification:
    """The result. `faults`: reasons by the ids of invalid observations."""

    count: int = 0
    countersigned: int = 0
    faults: dict[ObservationId, str] = field(default_factory=dict)


async def verify_history(
    database: Database, store: HistoryStore, progress: Callable[[int], None]
) -> HistoryVerification:
    """Verify the whole history; `progress` is called with the number of verified observations.

    Raises StorageDamaged if counts or digests do not match the rows, and StorageError if the database is unreadable.
    """
    await database.read(_check_file)
    found = HistoryVerification()
    before = await store.bucket_digests()
    seen: dict[int, tuple[int, hashlib._Hash]] = {}
    async with aclosing(store.pages()) as pages:
        async for page in pages:
            await trio.to_thread.run_sync(_check_page, page, found)
            for stored in page:
                count, hashed = seen.get(stored.bucket, (0, hashlib.sha256()))
                hashed.update(stored.id)
                seen[stored.bucket] = (count + 1, hashed)
            found.count += len(page)
            progress(found.count)
    counted = {bucket: BucketDigest(count, hashed.digest()) for bucket, (count, hashed) in seen.items()}
    after = await store.bucket_digests()
    for bucket in before.keys() | counted.keys() | after.keys():
        # A running node may add to a bucket meanwhile: buckets that changed during the verification are skipped.
        if before.get(bucket) == after.get(bucket) != counted.get(bucket):
            raise StorageDamaged(f"{database.path}: the digest of bucket {bucket} does not match its observations")
    return found


def _check_page(page: list[StoredObservation], found: HistoryVerification) -> None:
    for stored in page:
        try:
            signed = verify_observation(stored.envelope)
        except RemoteProtocolError as error:
            found.faults[stored.id] = str(error)
            continue
        if (signed.id, signed.bucket, signed.observation.observer) != (stored.id, stored.bucket, stored.observer):
            found.faults[stored.id] = "is stored under another id, time or observer than it has"
        found.countersigned += signed.observation.is_countersigned


def _check_file(connection: sqlite3.Connection) -> None:
    (result,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if result != "ok":
        raise StorageDamaged(" ".join(str(result).split()))
