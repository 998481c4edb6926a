"""How the history of observations is told: in small batches by gossip, and as digests in the DHT.

Gossip is fast and loses messages; it never has the last word. A peer's digest record says what it holds, so that a
newcomer knows whom to ask first and what for.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Final, Self

from protocol import fields as check
from protocol.canonical import Value, decode, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.fields import Fields
from protocol.identity import PeerId, parse_peer_id
from protocol.limits import MAX_BATCH_BYTES, MAX_BATCH_ENVELOPES, MAX_BUCKET, MAX_COUNT, MAX_PARTS, MAX_RECORD_BYTES
from protocol.reconciliation import (
    BUCKET_DIGITS,
    ID_BYTES,
    SetTree,
    Summary,
    parse_prefix,
)
from protocol.records import DHT_NAMESPACE, Header, Record, unseal

_ENVELOPE_OVERHEAD_BYTES: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryDigest(Record):
    """What a peer holds of the history: its digest in all and by ranges of time, the finer the newer.

    `first_bucket`: nothing older is kept. `parts`: prefixes of at most a bucket each, in ascending order, which
    together cover everything the peer holds.
    """

    kind: ClassVar[str] = "history"

    first_bucket: int
    count: int
    digest: bytes
    parts: tuple[Summary, ...]

    def body(self) -> dict[str, Value]:
        """Return the fields of this kind as they travel."""
        return {
            "first_bucket": self.first_bucket,
            "count": self.count,
            "digest": self.digest,
            "parts": [[part.prefix, part.count, part.digest] for part in self.parts],
        }

    @classmethod
    def from_fields(cls, peer: PeerId, header: Header, fields: Fields) -> Self:
        """Return the record made of the fields of this kind. Raises RemoteProtocolError."""
        record = cls(
            peer=peer,
            sequence=header.sequence,
            issued_at_s=header.issued_at_s,
            expires_at_s=header.expires_at_s,
            first_bucket=fields.integer("first_bucket", 0, MAX_BUCKET),
            count=fields.integer("count", 0, MAX_COUNT),
            digest=fields.raw("digest", ID_BYTES),
            parts=tuple(_part(part) for part in fields.array("parts", MAX_PARTS)),
        )
        prefixes = [part.prefix for part in record.parts]
        if any(after <= before or after.startswith(before) for before, after in pairwise(prefixes)):
            raise RemoteProtocolError("history parts overlap or do not ascend")
        if sum(part.count for part in record.parts) != record.count:
            raise RemoteProtocolError("history parts do not add up to the count")
        return record

    def estimate_lacking(self, tree: SetTree) -> int:
        """Return about how many of the peer's ids a set lacks, rather too few than too many."""
        own = [(part, tree.summary(part.prefix)) for part in self.parts]
        return sum(max(1, part.count - mine.count) for part, mine in own if part != mine)


def summarise(tree: SetTree) -> tuple[Summary, ...]:
    """Return at most MAX_PARTS summaries that cover a set: the newest buckets alone, older ones together."""
    root = tree.summary("")
    if not root.count:
        return ()
    # A heap by the newest prefix; prefixes of the same length or not, text compares them by time.
    splittable = [_Newest(root)]
    parts: list[Summary] = []
    while splittable:
        part = heapq.heappop(splittable).part
        smaller = tree.parts(part.prefix)
        if len(parts) + len(splittable) + len(smaller) > MAX_PARTS:
            parts.append(part)
            continue
        for each in smaller:
            if len(each.prefix) == BUCKET_DIGITS:
                parts.append(each)
            else:
                heapq.heappush(splittable, _Newest(each))
    return tuple(sorted(parts, key=lambda part: part.prefix))


@dataclass(frozen=True, slots=True)
class _Newest:
    part: Summary

    def __lt__(self, other: "_Newest") -> bool:
        return self.part.prefix > other.part.prefix


def history_key(peer: PeerId) -> str:
    """Return the DHT key of a peer's digest record."""
    return f"/{DHT_NAMESPACE}/history/{peer}"


def parse_history_key(key: str) -> PeerId:
    """Return the peer in the DHT key of a digest record; raise ValueError for any other key."""
    parts = key.split("/")
    if len(parts) != 4 or parts[:3] != ["", DHT_NAMESPACE, "history"]:
        raise ValueError(f"{key[:200]!r} is no key of a history record")
    return parse_peer_id(parts[3])


def unseal_history(key: str, envelope: bytes, now_s: float) -> HistoryDigest:
    """Return the digest record found under a DHT key. Raises RemoteProtocolError, also when it belongs elsewhere."""
    record = unseal(HistoryDigest, envelope, now_s)
    if history_key(record.peer) != key:
        raise RemoteProtocolError(f"history record of {record.peer} lies under another key")
    return record


def take_batch(waiting: deque[bytes]) -> bytes:
    """Take envelopes from the left as long as they fit into one gossip message, and return it."""
    envelopes: list[bytes] = []
    room = MAX_BATCH_BYTES - 32
    while waiting and len(envelopes) < MAX_BATCH_ENVELOPES:
        room -= len(waiting[0]) + _ENVELOPE_OVERHEAD_BYTES
        if room < 0:
            break
        envelopes.append(waiting.popleft())
    return encode_batch(envelopes)


def encode_batch(envelopes: Sequence[bytes]) -> bytes:
    """Return the gossip message of some envelopes. Raises LocalProtocolError for none or too many."""
    data = encode({"envelopes": list(envelopes)})
    if not 1 <= len(envelopes) <= MAX_BATCH_ENVELOPES or len(data) > MAX_BATCH_BYTES:
        raise LocalProtocolError(f"{len(envelopes)} envelopes in {len(data)} bytes are no batch")
    return data


def decode_batch(data: bytes) -> tuple[bytes, ...]:
    """Return the envelopes of a gossip message; none of them is verified. Raises RemoteProtocolError."""
    fields = Fields(decode(data, max_bytes=MAX_BATCH_BYTES), "batch")
    envelopes = []
    for envelope in fields.array("envelopes", MAX_BATCH_ENVELOPES):
        if type(envelope) is not bytes or not 0 < len(envelope) <= MAX_RECORD_BYTES:
            raise RemoteProtocolError(f"an envelope is not 1 to {MAX_RECORD_BYTES} bytes")
        envelopes.append(envelope)
    fields.finish()
    if not envelopes:
        raise RemoteProtocolError("a batch without envelopes")
    return tuple(envelopes)


def _part(value: object) -> Summary:
    prefix, count, digest = check.tuple_of(value, 3, "history part")
    return Summary(
        parse_prefix(prefix, 0, BUCKET_DIGITS, "history part prefix"),
        check.integer(count, 1, MAX_COUNT, "history part count"),
        check.raw(digest, ID_BYTES, "history part digest"),
    )
