"""The history in memory, for tests and simulations."""

from collections.abc import Iterable, Mapping, Sequence

import trio

from protocol.observations import SignedObservation
from protocol.reconciliation import BucketDigest, digest_of


class MemoryHistory:
    """Stores the history in memory."""

    def __init__(self) -> None:
        self.envelopes: dict[bytes, bytes] = {}
        self._buckets: dict[int, set[bytes]] = {}
        self._digests: dict[int, BucketDigest] = {}

    def __len__(self) -> int:
        return len(self.envelopes)

    async def add_many(self, observations: Sequence[SignedObservation]) -> Sequence[SignedObservation]:
        """Store verified observations; return the new ones."""
        await trio.lowlevel.checkpoint()
        new = []
        for observation in observations:
            if observation.id not in self.envelopes:
                self.envelopes[observation.id] = observation.envelope
                self._buckets.setdefault(observation.bucket, set()).add(observation.id)
                self._digests.pop(observation.bucket, None)
                new.append(observation)
        return new

    async def bucket_digests(self) -> Mapping[int, BucketDigest]:
        """Return count and digest of every bucket."""
        await trio.lowlevel.checkpoint()
        for bucket in self._buckets.keys() - self._digests.keys():
            self._digests[bucket] = digest_of(self._buckets[bucket])
        return dict(self._digests)

    async def ids_in(self, bucket: int) -> Iterable[bytes]:
        """Return the ids of one bucket."""
        await trio.lowlevel.checkpoint()
        return tuple(self._buckets.get(bucket, ()))

    async def get_many(self, ids: Sequence[bytes]) -> Sequence[bytes]:
        """Return the envelopes of those of the ids that are stored."""
        await trio.lowlevel.checkpoint()
        return [self.envelopes[content_id] for content_id in ids if content_id in self.envelopes]
