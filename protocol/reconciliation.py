"""Two sets of ids compared by digests: the pure half of anti-entropy.

A set is a tree over hexadecimal digits. The first eight digits of a key are the time bucket of an id, the other 64 the
id itself, so that one kind of prefix names all there is to compare: ranges of buckets, one bucket, parts of a large
bucket. Peers compare the digests of prefixes and go down only where they differ: the difference decides the cost, not
the sets.

The digest of a prefix inside a bucket, or of a whole bucket, is the sha256 over its ids in ascending order. That of a
shorter prefix is the sha256 over its buckets in ascending order, each as u32 big-endian and digest.
"""

import hashlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from protocol.errors import RemoteProtocolError
from protocol.fields import SHA256_BYTES, text
from protocol.limits import MAX_BUCKET, MAX_LISTED

ID_BYTES: Final = SHA256_BYTES
BUCKET_DIGITS: Final = 8
KEY_DIGITS: Final = BUCKET_DIGITS + 2 * ID_BYTES

LEAF_COUNT: Final = 48
"""Up to so many ids are listed at once: another round of digests would cost as much."""

CACHE_BYTES: Final = 8 << 20
"""Ids of buckets kept in memory beside their digests."""

_ID_BITS: Final = 8 * ID_BYTES
_DIGITS: Final = "0123456789abcdef"
_DIGIT_SET: Final = frozenset(_DIGITS)


class Unloaded(Exception):
    """The ids of some buckets are needed: `SetTree.load` them and ask again. Together they fit into a cache."""

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
        """Pack ids that come in any order."""
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
    """How many ids a bucket holds, and the sha256 over them in ascending order."""

    count: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Summary:
    """How many ids of a set have a prefix, and their digest."""

    prefix: str
    count: int
    digest: bytes


class Equal(NamedTuple):
    """The answerer's set under the prefix is the same."""


class Split(NamedTuple):
    """Under the prefix the answerer's ids are those of these longer prefixes, in ascending order, and no others."""

    summaries: tuple[Summary, ...]


class Listing(NamedTuple):
    """Under the prefix the answerer's ids are these and no others, by bucket in ascending order."""

    buckets: tuple[tuple[int, PackedIds], ...]


Answer = Equal | Split | Listing


class Gap(NamedTuple):
    """Keys from `low` up to `end`, except those listed by bucket and id: a part that the other side lacks."""

    low: int
    end: int
    listed: frozenset[tuple[int, bytes]] = frozenset()


@dataclass(slots=True)
class Difference:
    """What an answer tells the asker."""

    ask: list[Summary] = field(default_factory=list)
    """Own summaries of the prefixes to ask about next."""
    listed: tuple[tuple[int, PackedIds], ...] = ()
    """Buckets and ids that the other side has; `SetTree.lacking` says which we do not."""
    surplus: list[Gap] = field(default_factory=list)
    """Where to find the ids that we have and the other side lacks; some of these may be empty."""


def digest_of(ids: Iterable[bytes]) -> BucketDigest:
    """Return count and digest of a bucket's ids, given in any order."""
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


class IdCache:
    """The ids of buckets that were asked about of late. Bounded, but for one bucket that is larger than the bound."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._loaded: OrderedDict[tuple[int, bytes], PackedIds] = OrderedDict()

    def put(self, bucket: int, digest: bytes, ids: PackedIds) -> None:
        """Keep the ids that have this digest; the least recently used of the others make room."""
        if (bucket, digest) in self._loaded:
            return
        self._loaded[bucket, digest] = ids
        self._bytes += len(ids.packed)
        while self._bytes > self._max_bytes and len(self._loaded) > 1:
            _, evicted = self._loaded.popitem(last=False)
            self._bytes -= len(evicted.packed)

    def get(self, bucket: int, digest: bytes) -> PackedIds | None:
        """Return the ids of a bucket with this digest, if they are here."""
        if (bucket, digest) not in self._loaded:
            return None
        self._loaded.move_to_end((bucket, digest))
        return self._loaded[bucket, digest]


class SetTree:
    """A snapshot of a set: the digests of its buckets, and a cache of the ids in them.

    Whatever looks into a bucket raises `Unloaded` until the bucket's ids are in the cache.
    """

    def __init__(self, buckets: Mapping[int, BucketDigest], cache: IdCache, *, first_bucket: int = 0) -> None:
        """Take count and digest of every bucket; those before `first_bucket` are left out of every comparison."""
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
        """Take in the ids of a bucket. What has changed in it since the snapshot, changes in the snapshot too."""
        packed = PackedIds.of(ids)
        self.buckets[bucket] = BucketDigest(len(packed), packed.digest())
        self.cache.put(bucket, self.buckets[bucket].digest, packed)

    def summary(self, prefix: str) -> Summary:
        """Return what there is under a prefix."""
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
        """Answer another peer that has said what it has under a prefix."""
        own = self.summary(query.prefix)
        if own == query:
            return Equal()
        # With at least half of ours unknown to the asker, a list costs no more than twice what it must learn anyway.
        if own.count <= LEAF_COUNT or 2 * query.count <= own.count <= MAX_LISTED:
            return Listing(tuple(self._ids_under(query.prefix)))
        parts = self.split(query.prefix)
        return Split(parts) if parts else Listing(())

    def parts(self, prefix: str) -> tuple[Summary, ...]:
        """Return what there is under each prefix that is one digit longer, as far as there is anything."""
        parts = (self.summary(prefix + digit) for digit in _DIGITS)
        return tuple(part for part in parts if part.count)

    def split(self, prefix: str) -> tuple[Summary, ...]:
        """Return the parts of a prefix with at least two ids: of the longest common prefix, one digit longer each."""
        low, end = key_range(prefix)
        buckets = self._buckets_between(low, end)
        first, last = bucket_prefix(buckets[0]), bucket_prefix(buckets[-1])
        if first == last:
            ids = self._ids_between(buckets[0], low, end)
            first, last = first + ids[0].hex(), last + ids[len(ids) - 1].hex()
        stem = next((first[:length] for length in range(len(first)) if first[length] != last[length]), first)
        return self.parts(stem)

    def difference(self, prefix: str, answer: Answer) -> Difference:
        """Return what follows from another peer's answer about a prefix."""
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
        ids = self.cache.get(bucket, self.buckets[bucket].digest)
        if ids is None:
            raise Unloaded((bucket,))
        return ids

    def _require(self, buckets: list[int]) -> None:
        """Raise Unloaded for all the buckets that are not here, so that they are loaded together."""
        unloaded = tuple(b for b in buckets if self.cache.get(b, self.buckets[b].digest) is None)
        if unloaded:
            raise Unloaded(unloaded)


_NO_IDS: Final = PackedIds(b"")
_EMPTY_BUCKET: Final = BucketDigest(0, _NO_IDS.digest())
