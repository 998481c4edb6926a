"""Dissemination of the observation history: in small batches by gossip, and as digests in the DHT.

Gossip is fast and loses messages; anti-entropy (`protocol.sync`) repairs that. A peer's digest record summarises its
history, so that a new peer knows which peers to sync with first.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Final

from protocol import fields
from protocol.announcements import DHT_NAMESPACE, DhtRecord
from protocol.canonical import decode, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.forms import Digest, Envelope
from protocol.identity import PeerId
from protocol.limits import MAX_BATCH_BYTES, MAX_BATCH_ENVELOPES, MAX_BUCKET, MAX_COUNT, MAX_PARTS
from protocol.reconciliation import BUCKET_DIGITS, ID_BYTES, SetTree, Summary, parse_prefix
from protocol.schema import Count, Form, Range, from_map

_ENVELOPE_OVERHEAD_BYTES: Final = 5


def _part(value: object, what: str) -> Summary:
    prefix, count, digest = fields.tuple_of(value, 3, what)
    return Summary(
        parse_prefix(prefix, 0, BUCKET_DIGITS, f"{what} prefix"),
        fields.integer(count, 1, MAX_COUNT, f"{what} count"),
        fields.raw(digest, ID_BYTES, f"{what} digest"),
    )


def _part_to_array(part: Summary) -> list[object]:
    return [part.prefix, part.count, part.digest]


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryDigest(DhtRecord):
    """Digests of a peer's history: of the whole and by ranges of time, the newer the finer.

    `first_bucket`: the oldest bucket that is retained. `parts`: prefixes of at most a bucket each, in ascending order,
    which together cover the whole history.
    """

    kind: ClassVar[str] = "history"

    first_bucket: Annotated[int, Range(0, MAX_BUCKET)]
    count: Annotated[int, Range(0, MAX_COUNT)]
    digest: Digest
    parts: Annotated[tuple[Annotated[Summary, Form(_part, _part_to_array)], ...], Count(MAX_PARTS)]

    @property
    def key(self) -> str:
        """The DHT key under which it is stored."""
        return history_key(self.peer)

    def check(self) -> None:
        """Raise RemoteProtocolError for parts that overlap, do not ascend, or do not add up to the count."""
        prefixes = [part.prefix for part in self.parts]
        if any(after <= before or after.startswith(before) for before, after in pairwise(prefixes)):
            raise RemoteProtocolError("history parts overlap or do not ascend")
        if sum(part.count for part in self.parts) != self.count:
            raise RemoteProtocolError("history parts do not add up to the count")

    def estimate_missing(self, tree: SetTree) -> int:
        """Return a low estimate of the number of the peer's ids that a set lacks."""
        own = [(part, tree.summary(part.prefix)) for part in self.parts]
        return sum(max(1, part.count - mine.count) for part, mine in own if part != mine)


def summarise(tree: SetTree) -> tuple[Summary, ...]:
    """Return at most MAX_PARTS summaries that cover a set: one for each of the newest buckets, older ones merged."""
    splittable = [tree.summary("")] if tree.summary("").count else []
    parts: list[Summary] = []
    while splittable:
        # The newest: prefixes of the same length or not, text compares them by time.
        part = max(splittable, key=lambda part: part.prefix)
        splittable.remove(part)
        smaller = tree.parts(part.prefix)
        if len(parts) + len(splittable) + len(smaller) > MAX_PARTS:
            parts.append(part)
            continue
        for each in smaller:
            (parts if len(each.prefix) == BUCKET_DIGITS else splittable).append(each)
    return tuple(sorted(parts, key=lambda part: part.prefix))


def history_key(peer: PeerId) -> str:
    """Return the DHT key of a peer's digest record."""
    return f"/{DHT_NAMESPACE}/history/{peer}"


@dataclass(frozen=True, slots=True)
class _Batch:
    envelopes: Annotated[tuple[Envelope, ...], Count(MAX_BATCH_ENVELOPES, 1)]


def take_batch(waiting: deque[bytes]) -> bytes:
    """Remove envelopes from the left as long as they fit into one gossip message, and return it."""
    envelopes: list[bytes] = []
    room = MAX_BATCH_BYTES - 32
    while waiting and len(envelopes) < MAX_BATCH_ENVELOPES:
        room -= len(waiting[0]) + _ENVELOPE_OVERHEAD_BYTES
        if room < 0:
            break
        envelopes.append(waiting.popleft())
    return encode_batch(envelopes)


def encode_batch(envelopes: Sequence[bytes]) -> bytes:
    """Return the gossip message of some envelopes. Raises LocalProtocolError for too few or too many."""
    data = encode({"envelopes": list(envelopes)})
    if not 1 <= len(envelopes) <= MAX_BATCH_ENVELOPES or len(data) > MAX_BATCH_BYTES:
        raise LocalProtocolError(f"{len(envelopes)} envelopes in {len(data)} bytes are not a valid batch")
    return data


def decode_batch(data: bytes) -> tuple[bytes, ...]:
    """Return the envelopes of a gossip message; none of them is verified. Raises RemoteProtocolError."""
    return from_map(_Batch, decode(data, max_bytes=MAX_BATCH_BYTES), "batch").envelopes
