import hashlib
from collections import deque

import pytest

from protocol.canonical import encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.history import (
    HistoryDigest,
    decode_batch,
    encode_batch,
    history_key,
    summarise,
    take_batch,
)
from protocol.limits import MAX_BATCH_BYTES, MAX_BATCH_ENVELOPES, MAX_PARTS, MAX_RECORD_BYTES
from protocol.reconciliation import IdCache, SetTree, Summary, digest_of
from protocol.records import seal, verify_dht_record
from tests.support.observations import NOW_S, key, peer

BUCKET = NOW_S // 3600


def tree_of(counts: dict[int, int]) -> SetTree:
    """Return the tree of a set with so many ids in each bucket."""
    return SetTree(
        {
            bucket: digest_of(hashlib.sha256(f"{bucket} {number}".encode()).digest() for number in range(count))
            for bucket, count in counts.items()
        },
        IdCache(),
    )


def digest(tree: SetTree, **changes: object) -> HistoryDigest:
    root = tree.summary("")
    values = {
        "peer": peer(1),
        "sequence": 1,
        "issued_at_s": NOW_S,
        "expires_at_s": NOW_S + 1800,
        "first_bucket": BUCKET - 720,
        "count": root.count,
        "digest": root.digest,
        "parts": summarise(tree),
        **changes,
    }
    return HistoryDigest(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("bucket_count", [0, 1, 5, 100, 720])
def test_digest_record_covers_the_history_within_its_bound(bucket_count: int) -> None:
    tree = tree_of({BUCKET - number: 1 + number % 3 for number in range(bucket_count)})
    record = digest(tree)
    sealed = seal(record, key(1))
    assert len(sealed) <= MAX_RECORD_BYTES
    assert verify_dht_record(HistoryDigest, history_key(peer(1)), sealed, NOW_S) == record
    assert len(record.parts) <= MAX_PARTS
    assert sum(part.count for part in record.parts) == tree.summary("").count
    assert all(part == tree.summary(part.prefix) for part in record.parts)


def test_newest_buckets_have_digests_of_their_own() -> None:
    tree = tree_of({BUCKET - number: 1 for number in range(720)})
    alone = {part.prefix for part in summarise(tree) if len(part.prefix) == 8}
    assert {f"{BUCKET - number:08x}" for number in range(24)} <= alone


def test_estimates_missing_observations_from_a_digest_record() -> None:
    theirs = tree_of({BUCKET: 100, BUCKET - 1: 50})
    record = digest(theirs)
    assert record.estimate_missing(tree_of({})) == 150
    assert record.estimate_missing(tree_of({BUCKET: 100})) == 50
    assert record.estimate_missing(theirs) == 0


def test_rejects_digest_record_under_another_dht_key() -> None:
    sealed = seal(digest(tree_of({BUCKET: 1})), key(1))
    with pytest.raises(RemoteProtocolError, match="another key"):
        verify_dht_record(HistoryDigest, history_key(peer(2)), sealed, NOW_S)
    with pytest.raises(RemoteProtocolError, match="expired"):
        verify_dht_record(HistoryDigest, history_key(peer(1)), sealed, NOW_S + 1800)


@pytest.mark.parametrize(
    "parts",
    [
        (Summary("1", 1, bytes(32)), Summary("12", 1, bytes(32))),
        (Summary("2", 1, bytes(32)), Summary("1", 1, bytes(32))),
        (Summary("1", 1, bytes(32)), Summary("1", 1, bytes(32))),
        (Summary("1", 1, bytes(32)),),
        (Summary("000000000", 2, bytes(32)),),
        (Summary("x", 2, bytes(32)),),
        (Summary("1", 2, bytes(31)),),
        (Summary("1", 2, bytes(32)), Summary("2", 0, bytes(32))),
    ],
    ids=["overlap", "descend", "twice", "do not add up", "inside a bucket", "no digit", "short digest", "empty"],
)
def test_rejects_invalid_digest_parts(parts: tuple[Summary, ...]) -> None:
    with pytest.raises(LocalProtocolError, match="history"):
        seal(digest(tree_of({}), count=2, parts=parts), key(1))


def test_batches_are_filled_in_order() -> None:
    envelopes = [bytes([number]) * 1000 for number in range(100)]
    waiting = deque(envelopes)
    taken: list[bytes] = []
    while waiting:
        batch = take_batch(waiting)
        assert len(batch) <= MAX_BATCH_BYTES
        taken += decode_batch(batch)
    assert taken == envelopes
    waiting = deque([b"small"] * (MAX_BATCH_ENVELOPES + 1))
    take_batch(waiting)
    assert len(waiting) == 1


@pytest.mark.parametrize(
    "value",
    [
        {"envelopes": []},
        {"envelopes": [b""]},
        {"envelopes": [b"x"], "more": 1},
        {"envelopes": ["text"]},
        {"envelopes": [b"x"] * (MAX_BATCH_ENVELOPES + 1)},
        {"envelopes": [bytes(MAX_RECORD_BYTES + 1)]},
        {},
        [],
    ],
    ids=lambda value: str(value)[:40],
)
def test_rejects_malformed_batches(value: dict[str, list[bytes]]) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_batch(encode(value))


def test_rejects_oversized_batches_at_both_ends() -> None:
    envelopes = [bytes(MAX_RECORD_BYTES)] * 2
    with pytest.raises(LocalProtocolError):
        encode_batch(envelopes)
    with pytest.raises(RemoteProtocolError):
        decode_batch(encode({"envelopes": envelopes}))
