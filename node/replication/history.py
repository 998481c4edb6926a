"""The history as replication needs it: a set of observations by the hour of issue."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from protocol.observations import SignedObservation
from protocol.reconciliation import BucketDigest


class History(Protocol):
    """Durable store of observations: none that `add_many` returned is lost. `node.storage.history` implements it."""

    async def add_many(self, observations: Sequence[SignedObservation]) -> Sequence[SignedObservation]:
        """Store verified observations; return the new ones, once they are durable."""

    async def bucket_digests(self) -> Mapping[int, BucketDigest]:
        """Return the number of ids in each bucket that is not empty, and the sha256 over them, ascending."""

    async def ids_in(self, bucket: int) -> Iterable[bytes]:
        """Return the ids of one bucket, in any order."""

    async def get_many(self, ids: Sequence[bytes]) -> Sequence[bytes]:
        """Return the envelopes of those of the ids that are stored, in any order."""
