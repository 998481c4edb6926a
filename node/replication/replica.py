"""This node's copy of the history as anti-entropy sees it: a tree of digests, and the ids to request."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import trio
from cachetools import LRUCache

from node.replication.gossip_topic import Verifier
from node.replication.history import History
from protocol.limits import MAX_CLOCK_SKEW_S
from protocol.observations import SignedObservation, oldest_bucket, verify_observation
from protocol.reconciliation import IdCache, SetTree, Unloaded

SNAPSHOT_S = 1.0
"""Maximum age of a snapshot: other tasks write to the history, too."""

VERIFIED_ENVELOPES = 512
"""Envelopes remembered as verified, so that gossip is verified once: in the validator."""

DECLINED_IDS = 8192
DECLINED_S = 60.0
"""How long an observation that we received and did not store is not requested again."""

_T = TypeVar("_T")


def verification_cost(envelope: bytes) -> float:
    """Return about how many signatures an envelope takes to verify: its own, and one for each stage of the route."""
    return 1 + len(envelope) / 256


class Replica:
    """The history, with what it takes to compare it and to store the observations of others."""

    def __init__(
        self,
        history: History,
        wall_clock: Callable[[], float],
        verify_envelope: Callable[[bytes], SignedObservation] = verify_observation,
    ) -> None:
        self.requested: set[bytes] = set()
        """Ids that a session is fetching now; others do not request them."""
        self.verifier = Verifier(verify_envelope, VERIFIED_ENVELOPES, verification_cost)
        self.verify = self.verifier.verify
        self._history = history
        self._wall_clock = wall_clock
        self._cache = IdCache()
        self._snapshot = SetTree({}, self._cache)
        self._snapshot_ends_s = -math.inf
        self._reading = trio.Lock()
        self._declined_until_s: LRUCache[bytes, float] = LRUCache(DECLINED_IDS)

    def first_bucket(self) -> int:
        """Return the first bucket to compare: the second of those that we store, because clocks differ."""
        return oldest_bucket(self._wall_clock()) + 1

    async def tree(self, first_bucket: int = 0) -> SetTree:
        """Return a recent snapshot of the set, from a bucket on."""
        async with self._reading:
            if trio.current_time() >= self._snapshot_ends_s:
                # Set before the wait: an observation that is added meanwhile outdates the snapshot.
                self._snapshot_ends_s = trio.current_time() + SNAPSHOT_S
                self._snapshot = SetTree(await self._history.bucket_digests(), self._cache)
        return self._snapshot.since(max(first_bucket, self.first_bucket()))

    async def resolve(self, tree: SetTree, question: Callable[[], _T]) -> _T:
        """Return the result of a question to a tree, after loading the buckets that it needs."""
        while True:
            try:
                return question()
            except Unloaded as unloaded:
                for bucket in unloaded.buckets:
                    tree.load(bucket, await self._history.ids_in(bucket))

    async def envelopes(self, ids: Sequence[bytes]) -> Sequence[bytes]:
        """Return the envelopes of those of the ids that are stored."""
        return await self._history.get_many(ids)

    def untimely_s(self, observation: SignedObservation) -> float:
        """Return for how many seconds an observation is not to be stored; 0 for a timely one.

        The sender's clock may be wrong, and so may ours: an untimely observation is not a violation.
        """
        if observation.bucket < oldest_bucket(self._wall_clock()):
            return DECLINED_S
        return max(0.0, observation.observation.issued_at_s - MAX_CLOCK_SKEW_S - self._wall_clock())

    async def store(self, observations: Iterable[SignedObservation]) -> int:
        """Store verified observations; return how many were new."""
        timely = []
        for observation in observations:
            if untimely_s := self.untimely_s(observation):
                self._decline(observation.id, min(untimely_s, DECLINED_S))
            else:
                timely.append(observation)
        if not timely:
            return 0
        new = await self._history.add_many(timely)
        if new:
            self._snapshot_ends_s = -math.inf
        added = {observation.id for observation in new}
        for observation in timely:
            if observation.id not in added:
                self._decline(observation.id, DECLINED_S)
        return len(new)

    def wants(self, content_id: bytes) -> bool:
        """Return whether an id that we lack is to be requested now."""
        return content_id not in self.requested and self._declined_until_s.get(content_id, 0) <= trio.current_time()

    def _decline(self, content_id: bytes, seconds: float) -> None:
        self._declined_until_s[content_id] = trio.current_time() + seconds
