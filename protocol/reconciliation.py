"""Set reconciliation by a digest tree: the pure half of anti-entropy.

A set is a tree over hexadecimal digits. The first eight digits of a key are the time bucket of an id, the other 64 the
id itself, so that prefixes cover ranges of buckets, one bucket, and parts of a large bucket alike. Peers compare the
digests of prefixes and descend only where they differ: the cost grows with the difference, not with the sets.

The digest of a prefix inside a bucket, or of a whole bucket, is the sha256 over its ids in ascending order. That of a
shorter prefix is the sha256 over its buckets in ascending order, each as u32 big-endian and digest.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from cachetools import LRUCache

from protocol.errors import RemoteProtocolError
from protocol.fields import SHA256_BYTES, text
from protocol.limits import MAX_BUCKET, MAX_LISTED

ID_BYTES: Final = SHA256_BYTES
BUCKET_DIGITS: Final = 8
KEY_DIGITS: Final = BUCKET_DIGITS + 2 * ID_BYTES

LEAF_COUNT: Final = 48
"""Ids up to this number are listed at once: another round of digests would cost as much."""

CACHE_BYTES: Final = 8 << 20
"""Bound on the ids cached in memory."""

_ID_BITS: Final = 8 * ID_BYTES
_DIGITS: Final = "0123456789abcdef"
_DIGIT_SET: Final = frozenset(_DIGITS)


class Unloaded(Exception):
    """Ids of some buckets are missing: `SetTree.load` them and retry. Together they fit into the cache."""

    def __init__(self, buckets: tuple[int, ...]) -> None:
        super().__init__(f"{len(buckets)} buckets are not loaded")
        self.buckets = buckets


class PackedIds:
    """Distinct ids in ascending order, in one bytes object: small, and hashed in one call."""

    __slots__ = ("packed",)

    def __init__(self, packed: bytes) -> None:
        self.packed = packed

    @classmethod
    def of(cls, ids: Iterable[bytes]) -> "PackedIds":
        """Pack ids in any order."""
        return cls(b"".join(sorted(ids)))

    def __len__(self) -> int:
        return len(self.packed) // ID_BYTES

    def __getitem__(self, index: int) -> bytes:
        return self.packed[index * ID_BYTES : (index + 1) * ID_BYTES]

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(len(self)))

    def __contains__(self, content_id: bytes) -> bool:
        index = bisect_left(self, content_id)
        return index < len(self) and self[index] == content_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedIds) and other.packed == self.packed

    def __hash__(self) -> int:
        return hash(self.packed)

    def between(self, low: int, end: int) -> "PackedIds":
        """Return the ids that, as integers, are at least `low` and less than `end`."""
        first = 0 if low <= 0 else bisect_left(self, low, key=int.from_bytes)
        last = len(self) if end >> _ID_BITS else bisect_left(self, end, key=int.from_bytes)
        return PackedIds(self.packed[first * ID_BYTES : last * ID_BYTES])

    def digest(self) -> bytes:
        """Return the sha256 over all of them."""
        return hashlib.sha256(self.packed).digest()


@dataclass(frozen=True, slots=True)
class BucketDigest:
    """Number of the ids of a bucket, and the sha256 over them in ascending order."""

    count: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Summary:
    """Number and digest of the ids with a prefix."""

    prefix: str
    count: int
    digest: bytes


class Equal(NamedTuple):
    """Both sets are equal under the prefix."""


class Split(NamedTuple):
    """The answerer's ids under the prefix, summarised by longer prefixes in ascending order."""

    summaries: tuple[Summary, ...]


class Listing(NamedTuple):
    """The answerer's ids under the prefix, by bucket in ascending order."""

    buckets: tuple[tuple[int, PackedIds], ...]


Answer = Equal | Split | Listing


class Gap(NamedTuple):
    """Keys from `low` up to `end`, except those listed by bucket and id, that the other side lacks."""

    low: int
    end: int
    listed: frozenset[tuple[int, bytes]] = frozenset()


@dataclass(slots=True)
class Difference:
    """What follows from an answer."""

    ask: list[Summary] = field(default_factory=list)
    """Own summaries of the prefixes to query next."""
    listed: tuple[tuple[int, PackedIds], ...] = ()
    """Buckets and ids of the other side; `SetTree.lacking` returns those that we lack."""
    surplus: list[Gap] = field(default_factory=list)
    """Key ranges of the ids that the other side lacks; some may be empty."""


def digest_of(ids: Iterable[bytes]) -> BucketDigest:
    """Return the digest of a bucket's ids, in any order."""
    packed = PackedIds.of(ids)
    return BucketDigest(len(packed), packed.digest())


def key_range(prefix: str) -> tuple[int, int]:
    """Return the first key with a prefix and the first one after it, as integers."""
    shift = 4 * (KEY_DIGITS - len(prefix))
    number = int(prefix or "0", 16)
    return number << shift, (number + 1) << shift


def parse_prefix(value: object, shortest: int, longest: int, what: str) -> str:
    """Return a prefix, or a part of one, from a peer. Raises RemoteProtocolError."""
    digits = text(value, longest, what)
    if len(digits) < shortest or not _DIGIT_SET.issuperset(digits):
        raise RemoteProtocolError(f"{what} is not {shortest} to {longest} hexadecimal digits")
    return digits


def bucket_prefix(bucket: int) -> str:
    """Return the prefix of a whole bucket."""
    return f"{bucket:0{BUCKET_DIGITS}x}"


class IdCache(LRUCache[tuple[int, bytes], PackedIds]):
    """The ids of buckets, by bucket and digest. Bounded in bytes; a bucket above the bound is cached alone."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        super().__init__(max_bytes, getsizeof=lambda ids: min(len(ids.packed), max_bytes))


class SetTree:
    """A snapshot of a set: the digests of its buckets, and a cache of the ids in them.

    Methods that need the ids of a bucket raise `Unloaded` until they are cached.
    """

    def __init__(self, buckets: Mapping[int, BucketDigest], cache: IdCache, *, first_bucket: int = 0) -> None:
        """`buckets`: digest of every bucket; those before `first_bucket` are left out of every comparison."""
        self.cache = cache
        self.buckets = {
            bucket: buckets[bucket]
            for bucket in sorted(buckets)
            if first_bucket <= bucket <= MAX_BUCKET and buckets[bucket].count
        }
        self._order = list(self.buckets)

    def since(self, first_bucket: int) -> "SetTree":
        """Return the part of the set from a bucket on."""
        if not self._order or first_bucket <= self._order[0]:
            return self
        return SetTree(self.buckets, self.cache, first_bucket=first_bucket)

    def load(self, bucket: int, ids: Iterable[bytes]) -> None:
        """Cache the ids of a bucket, and update its digest in the snapshot to match them."""
        packed = PackedIds.of(ids)
        self.buckets[bucket] = BucketDigest(len(packed), packed.digest())
        self.cache[bucket, self.buckets[bucket].digest] = packed

    def summary(self, prefix: str) -> Summary:
        """Return the summary of a prefix."""
        if len(prefix) < BUCKET_DIGITS:
            count, hashed = 0, hashlib.sha256()
            for bucket in self._buckets_between(*key_range(prefix)):
                digest = self.buckets[bucket]
                count += digest.count
                hashed.update(bucket.to_bytes(4, "big") + digest.digest)
            return Summary(prefix, count, hashed.digest())
        bucket = int(prefix[:BUCKET_DIGITS], 16)
        if len(prefix) == BUCKET_DIGITS:
            whole = self.buckets.get(bucket, _EMPTY_BUCKET)
            return Summary(prefix, whole.count, whole.digest)
        ids = self._ids_between(bucket, *key_range(prefix))
        return Summary(prefix, len(ids), ids.digest())

    def answer(self, query: Summary) -> Answer:
        """Return the answer to another peer's summary of a prefix."""
        own = self.summary(query.prefix)
        if own == query:
            return Equal()
        # If the asker lacks at least half of ours, a list costs at most twice what it has to receive anyway.
        if own.count <= LEAF_COUNT or 2 * query.count <= own.count <= MAX_LISTED:
            return Listing(tuple(self._ids_under(query.prefix)))
        parts = self.split(query.prefix)
        return Split(parts) if parts else Listing(())

    def parts(self, prefix: str) -> tuple[Summary, ...]:
        """Return the summaries of the prefixes one digit longer, without empty ones."""
        parts = (self.summary(prefix + digit) for digit in _DIGITS)
        return tuple(part for part in parts if part.count)

    def split(self, prefix: str) -> tuple[Summary, ...]:
        """Return the parts of the longest common prefix of the ids under a prefix, of which there are at least two."""
        low, end = key_range(prefix)
        buckets = self._buckets_between(low, end)
        first, last = bucket_prefix(buckets[0]), bucket_prefix(buckets[-1])
        if first == last:
            ids = self._ids_between(buckets[0], low, end)
            first, last = first + ids[0].hex(), last + ids[len(ids) - 1].hex()
        stem = next((first[:length] for length in range(len(first)) if first[length] != last[length]), first)
        return self.parts(stem)

    def difference(self, prefix: str, answer: Answer) -> Difference:
        """Return the difference that another peer's answer about a prefix shows."""
        low, end = key_range(prefix)
        found = Difference()
        match answer:
            case Equal():
                pass
            case Listing(buckets):
                found.listed = buckets
                found.surplus.append(
                    Gap(low, end, frozenset((bucket, content_id) for bucket, ids in buckets for content_id in ids))
                )
            case Split(summaries):
                for part in summaries:
                    own_part = self.summary(part.prefix)
                    if own_part != part:
                        found.ask.append(own_part)
                    part_low, part_end = key_range(part.prefix)
                    found.surplus.append(Gap(low, part_low))
                    low = part_end
                found.surplus.append(Gap(low, end))
        found.surplus = [gap for gap in found.surplus if self._buckets_between(gap.low, gap.end)]
        return found

    def lacking(self, bucket: int, ids: PackedIds) -> list[bytes]:
        """Return those ids of a bucket that are not in the set."""
        own = self._ids_of(bucket)
        return [content_id for content_id in ids if content_id not in own]

    def buckets_in(self, gap: Gap) -> list[int]:
        """Return the buckets that a gap touches."""
        return self._buckets_between(gap.low, gap.end)

    def ids_in(self, gap: Gap, bucket: int) -> list[bytes]:
        """Return the ids of one bucket in a gap."""
        ids = self._ids_between(bucket, gap.low, gap.end)
        return [content_id for content_id in ids if (bucket, content_id) not in gap.listed]

    def _buckets_between(self, low: int, end: int) -> list[int]:
        first = bisect_left(self._order, low >> _ID_BITS)
        return self._order[first : bisect_left(self._order, ((end - 1) >> _ID_BITS) + 1)] if low < end else []

    def _ids_between(self, bucket: int, low: int, end: int) -> PackedIds:
        base = bucket << _ID_BITS
        return self._ids_of(bucket).between(low - base, end - base)

    def _ids_under(self, prefix: str) -> Iterator[tuple[int, PackedIds]]:
        low, end = key_range(prefix)
        buckets = self._buckets_between(low, end)
        self._require(buckets)
        for bucket in buckets:
            if ids := self._ids_between(bucket, low, end):
                yield bucket, ids

    def _ids_of(self, bucket: int) -> PackedIds:
        if bucket not in self.buckets:
            return _NO_IDS
        ids = self.cache.get((bucket, self.buckets[bucket].digest))
        if ids is None:
            raise Unloaded((bucket,))
        return ids

    def _require(self, buckets: list[int]) -> None:
        """Raise Unloaded for all the buckets that are not cached, so that they are loaded together."""
        unloaded = tuple(b for b in buckets if self.cache.get((b, self.buckets[b].digest)) is None)
        if unloaded:
            raise Unloaded(unloaded)


_NO_IDS: Final = PackedIds(b"")
_EMPTY_BUCKET: Final = BucketDigest(0, _NO_IDS.digest())
