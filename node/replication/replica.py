"""This node's copy of the history, as it looks to whoever compares it with another: a tree of digests that keeps up."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import trio

from node.replication.history import History
from protocol.limits import MAX_CLOCK_SKEW_S
from protocol.observations import SignedObservation, oldest_bucket, open_observation
from protocol.reconciliation import IdCache, SetTree, Unloaded

SNAPSHOT_S = 1.0
"""How old a snapshot may get: others write to the history too."""

OPENED_ENVELOPES = 512
"""Envelopes remembered as verified, so that what came by gossip is verified once: when it is let through."""

DECLINED_IDS = 8192
DECLINED_S = 60.0
"""How long an observation that we were given and did not keep is not asked for again."""

_T = TypeVar("_T")


def verification_cost(envelope: bytes) -> float:
    """Return about how many signatures an envelope makes us verify: its own, and one for each stage of the route."""
    return 1 + len(envelope) / 256


class Replica:
    """The history, with what is needed to compare it and to take in what others hold."""

    def __init__(
        self,
        history: History,
        wall_clock: Callable[[], float],
        open_envelope: Callable[[bytes], SignedObservation] = open_observation,
    ) -> None:
        self.requested: set[bytes] = set()
        """Ids that are being fetched now: nobody else is asked for them."""
        self._history = history
        self._wall_clock = wall_clock
        self._open_envelope = open_envelope
        self._cache = IdCache()
        self._snapshot = SetTree({}, self._cache)
        self._snapshot_ends_s = -math.inf
        self._reading = trio.Lock()
        self._opened: OrderedDict[bytes, SignedObservation] = OrderedDict()
        self._declined: OrderedDict[bytes, float] = OrderedDict()

    def first_bucket(self) -> int:
        """Return the first bucket that we compare: the oldest that we take in, and one more for clocks that differ."""
        return oldest_bucket(self._wall_clock()) + 1

    async def tree(self, first_bucket: int = 0) -> SetTree:
        """Return the set as it is now, or was a moment ago, from a bucket on."""
        async with self._reading:
            if trio.current_time() >= self._snapshot_ends_s:
                # Set before the wait: what is added meanwhile makes the snapshot old at once.
                self._snapshot_ends_s = trio.current_time() + SNAPSHOT_S
                self._snapshot = SetTree(await self._history.bucket_digests(), self._cache)
        return self._snapshot.since(max(first_bucket, self.first_bucket()))

    async def resolve(self, tree: SetTree, question: Callable[[], _T]) -> _T:
        """Return what a question to a tree comes to, loading the buckets that it needs."""
        while True:
            try:
                return question()
            except Unloaded as unloaded:
                for bucket in unloaded.buckets:
                    tree.load(bucket, await self._history.ids_in(bucket))

    async def envelopes(self, ids: Sequence[bytes]) -> Sequence[bytes]:
        """Return the envelopes of those of the ids that we have."""
        return await self._history.get_many(ids)

    def is_open(self, envelope: bytes) -> bool:
        """Whether an envelope was verified of late, so that to `open` it costs nothing."""
        return hashlib.sha256(envelope).digest() in self._opened

    def open(self, envelope: bytes) -> SignedObservation:
        """Return the observation in an envelope. Raises RemoteProtocolError; times are not looked at."""
        key = hashlib.sha256(envelope).digest()
        if (known := self._opened.get(key)) is not None:
            return known
        observation = self._open_envelope(envelope)
        self._opened[key] = observation
        if len(self._opened) > OPENED_ENVELOPES:
            self._opened.popitem(last=False)
        return observation

    def untimely_s(self, observation: SignedObservation) -> float:
        """Return for how many seconds an observation is not to be taken in: 0 for most, for ever if it is too old.

        A sender's clock may be wrong, and so may ours: what is untimely is nobody's offence.
        """
        if observation.bucket < oldest_bucket(self._wall_clock()):
            return DECLINED_S
        return max(0.0, observation.observation.issued_at_s - MAX_CLOCK_SKEW_S - self._wall_clock())

    async def take_in(self, observations: Iterable[SignedObservation]) -> int:
        """Keep verified observations; return how many were new."""
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
        """Whether an id that we lack is worth asking for now."""
        if content_id in self.requested:
            return False
        until_s = self._declined.get(content_id)
        return until_s is None or until_s <= trio.current_time()

    def _decline(self, content_id: bytes, seconds: float) -> None:
        self._declined[content_id] = trio.current_time() + seconds
        self._declined.move_to_end(content_id)
        if len(self._declined) > DECLINED_IDS:
            self._declined.popitem(last=False)
