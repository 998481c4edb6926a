"""Any two sets become equal, at a cost that grows with what they differ in and not with what they have in common."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.limits import MAX_LISTED
from protocol.reconciliation import (
    BucketDigest,
    Equal,
    IdCache,
    PackedIds,
    SetTree,
    Summary,
    Unloaded,
    bucket_prefix,
    digest_of,
)
from protocol.sync import answer_bytes

Key = tuple[int, bytes]
"""Bucket and id."""

CACHE_BYTES = 32 << 10
"""Little, so that buckets are loaded again and again."""

T = TypeVar("T")


def content_id(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "big")).digest()


class Peer:
    """A set and the tree over it, whose buckets are loaded when they are asked for."""

    def __init__(self, keys: set[Key]) -> None:
        self.keys = keys
        self.buckets: dict[int, list[bytes]] = {}
        for bucket, an_id in keys:
            self.buckets.setdefault(bucket, []).append(an_id)
        digests = {bucket: digest_of(ids) for bucket, ids in self.buckets.items()}
        self.tree = SetTree(digests, IdCache(CACHE_BYTES))

    def ask(self, question: Callable[[], T]) -> T:
        for _ in range(MAX_LISTED):
            try:
                return question()
            except Unloaded as unloaded:
                for bucket in unloaded.buckets:
                    self.tree.load(bucket, self.buckets[bucket])
        raise AssertionError("the same buckets are asked for again and again")


def compare(initiator: Peer, responder: Peer) -> tuple[set[bytes], set[bytes], int]:
    """Return what the initiator lacks, what the responder lacks, and about how many bytes it took to find out."""
    frontier = [initiator.tree.summary("")]
    missing: set[bytes] = set()
    surplus: set[bytes] = set()
    cost_bytes = 0
    while frontier:
        query = frontier.pop()
        answer = responder.ask(partial(responder.tree.answer, query))
        cost_bytes += answer_bytes(answer) + len(query.prefix) + 42
        found = initiator.ask(partial(initiator.tree.difference, query.prefix, answer))
        frontier += found.ask
        for bucket, ids in found.listed:
            missing |= set(initiator.ask(partial(initiator.tree.lacking, bucket, ids)))
        for gap in found.surplus:
            for bucket in initiator.tree.buckets_in(gap):
                surplus |= set(initiator.ask(partial(initiator.tree.ids_in, gap, bucket)))
    return missing, surplus, cost_bytes


def only_ids(keys: Iterable[Key]) -> set[bytes]:
    return {an_id for _, an_id in keys}


buckets = st.one_of(st.integers(0, 3), st.integers(480_000, 480_400), st.sampled_from([0, 0xFF, 0x100, 0xFFFFFFFF]))
ids = st.one_of(
    st.integers(0, 400).map(content_id),
    # Ids that share long prefixes, down to the last digit.
    st.integers(0, 40).map(lambda n: bytes(30) + n.to_bytes(2, "big")),
    st.sampled_from([bytes(32), b"\xff" * 32]),
)
key_sets = st.sets(st.tuples(buckets, ids), max_size=200)


@given(key_sets, key_sets, key_sets)
@settings(deadline=None, max_examples=300)
def test_any_two_sets_learn_exactly_what_each_lacks(common: set[Key], left: set[Key], right: set[Key]) -> None:
    initiator, responder = Peer(common | left), Peer(common | right)
    missing, surplus, _ = compare(initiator, responder)
    assert missing == only_ids(responder.keys - initiator.keys)
    assert surplus == only_ids(initiator.keys - responder.keys)


@given(key_sets)
@settings(deadline=None)
def test_equal_sets_take_one_answer(keys: set[Key]) -> None:
    initiator, responder = Peer(keys), Peer(set(keys))
    assert isinstance(responder.tree.answer(initiator.tree.summary("")), Equal)


@given(key_sets, st.integers(0, 0xFFFFFFFF))
@settings(deadline=None)
def test_buckets_before_the_first_are_not_compared(keys: set[Key], first_bucket: int) -> None:
    newer = {key for key in keys if key[0] >= first_bucket}
    assert Peer(keys).tree.since(first_bucket).summary("") == Peer(newer).tree.summary("")


def large_sets(common: int, difference: int, bucket_count: int) -> tuple[Peer, Peer]:
    keys = [(number % bucket_count, content_id(number)) for number in range(common + difference)]
    ours, theirs = keys[common::2], keys[common + 1 :: 2]
    return Peer({*keys[:common], *ours}), Peer({*keys[:common], *theirs})


@pytest.mark.parametrize("bucket_count", [1, 20, 700])
def test_the_cost_grows_with_the_difference(bucket_count: int) -> None:
    costs = {difference: compare(*large_sets(20_000, difference, bucket_count))[2] for difference in (1, 10, 100)}
    assert costs[1] < 6_000
    assert costs[10] < 10 * costs[1]
    assert costs[100] < 10 * costs[10]
    # Sending the ids of a set alone would be 640,000 bytes.
    assert costs[100] < 250_000


def test_the_cost_hardly_grows_with_the_sets() -> None:
    small = compare(*large_sets(500, 10, 1))[2]
    large = compare(*large_sets(50_000, 10, 1))[2]
    assert large < small * (1 + math.log(100, 16)) * 1.5


def test_a_newcomer_pays_little_more_than_the_ids() -> None:
    keys = {(number // 100, content_id(number)) for number in range(10_000)}
    missing, surplus, cost_bytes = compare(Peer(set()), Peer(keys))
    assert missing == only_ids(keys)
    assert not surplus
    assert cost_bytes < 1.5 * 32 * len(keys)


def test_bucket_changed_since_the_snapshot_is_current() -> None:
    old, new = content_id(1), content_id(2)
    tree = SetTree({7: digest_of([old])}, IdCache())
    prefix = bucket_prefix(7) + new.hex()[0]
    with pytest.raises(Unloaded):
        tree.summary(prefix)
    tree.load(7, [new])
    assert tree.summary(prefix) == Summary(prefix, 1, digest_of([new]).digest)
    assert tree.summary(bucket_prefix(7)).digest == digest_of([new]).digest


def test_id_cache_is_bounded_and_evicts_the_least_recently_used() -> None:
    cache = IdCache(max_bytes=100 * 32)
    packs: Sequence[PackedIds] = [
        PackedIds.of(content_id(bucket * 100 + number) for number in range(30)) for bucket in range(5)
    ]
    for bucket, ids_of_bucket in enumerate(packs):
        cache[bucket, ids_of_bucket.digest()] = ids_of_bucket
        assert cache.get((0, packs[0].digest())) is packs[0]
    held = [bucket for bucket, found in enumerate(packs) if cache.get((bucket, found.digest()))]
    assert held == [0, 3, 4]


def test_digests_are_those_of_the_specification() -> None:
    first, second = sorted([content_id(1), content_id(2)])
    tree = SetTree({3: digest_of([second, first]), 4: digest_of([first])}, IdCache())
    whole = hashlib.sha256(first + second).digest()
    assert tree.buckets[3] == BucketDigest(2, whole)
    assert tree.summary(bucket_prefix(3)) == Summary("00000003", 2, whole)
    ranged = hashlib.sha256(b"\0\0\0\x03" + whole + b"\0\0\0\x04" + hashlib.sha256(first).digest()).digest()
    assert tree.summary("") == Summary("", 3, ranged)
    assert tree.summary("0000000") == Summary("0000000", 3, ranged)
