"""Is the history what it claims to be? Every signature, every id, every digest, looked at again."""

import hashlib
import sqlite3
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import trio

from node.storage.database import Database, StorageDamaged
from node.storage.history import HistoryStore, StoredObservation
from protocol.errors import RemoteProtocolError
from protocol.observations import ObservationId, open_observation
from protocol.reconciliation import BucketDigest


@dataclass(slots=True)
class Verification:
    """What was found. `faults`: ids of what is not right, and why."""

    count: int = 0
    countersigned: int = 0
    faults: dict[ObservationId, str] = field(default_factory=dict)


async def verify_history(database: Database, store: HistoryStore, progress: Callable[[int], None]) -> Verification:
    """Look at everything in the history; `progress` is told how much was looked at.

    Raises StorageDamaged where counts or digests do not fit what is there, and StorageError where it cannot be read.
    """
    await database.read(_check_file)
    found = Verification()
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
        # A node that runs meanwhile may have added to a bucket: what changes while we look is not held against it.
        if before.get(bucket) == after.get(bucket) != counted.get(bucket):
            raise StorageDamaged(f"{database.path}: the digest of bucket {bucket} does not fit what is in it")
    return found


def _check_page(page: list[StoredObservation], found: Verification) -> None:
    for stored in page:
        try:
            signed = open_observation(stored.envelope)
        except RemoteProtocolError as error:
            found.faults[stored.id] = str(error)
            continue
        if (signed.id, signed.bucket, signed.observation.observer) != (stored.id, stored.bucket, stored.observer):
            found.faults[stored.id] = "is kept under another id, time or observer than it has"
        found.countersigned += signed.observation.is_countersigned


def _check_file(connection: sqlite3.Connection) -> None:
    (result,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if result != "ok":
        raise StorageDamaged(" ".join(str(result).split()))
