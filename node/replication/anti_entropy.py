"""One anti-entropy session: two peers compare their histories over a stream and exchange what is missing.

Records are stored as they arrive, so that a session that breaks was not in vain. A session is bounded; the next one
continues.
"""

import random
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial

import trio

from node.network.interface import NetworkError, Stream
from node.replication.replica import Replica, verification_cost
from node.replication.session import Responder, Session, Throttle
from protocol.errors import RemoteProtocolError
from protocol.half_duplex import MAX_PAYLOAD_BYTES, Busy
from protocol.limits import MAX_GET, MAX_QUERIES
from protocol.reconciliation import Answer, Equal, Gap, Listing, SetTree, Split, Summary
from protocol.states import Role
from protocol.sync import (
    Answers,
    Compare,
    Get,
    Greeting,
    Items,
    Message,
    Put,
    SyncConnection,
    SyncState,
    Taken,
    Welcome,
    answer_bytes,
    envelope_bytes,
)

MAX_FRUITLESS_COMPARES = 64
"""Messages with queries in a row that brought nothing: more than an honest difference takes, even at its deepest."""

MAX_FRONTIER = 4096
"""Prefixes that wait to be queried; the next session finds those beyond it again."""

MAX_PUT_ENVELOPES = 128
"""Envelopes that an initiator hands over in one session. A peer that lacks more fetches them, from several peers."""

MAX_PASSES = 3

MAX_UNDELIVERED = 64
"""Envelopes that a peer may list and not deliver: some may have been dropped meanwhile. More is a violation."""

GET_CHUNK = 64
VERIFIED_AT_A_TIME = 4

QUERY_COST = 0.1
HASHING_COST = 1 / 5000
"""Work to answer a query, and to hash an id for it, measured in signatures verified."""


async def verify_and_store(
    envelopes: Iterable[bytes], replica: Replica, throttle: Throttle, wanted: set[bytes] | None = None
) -> int:
    """Verify envelopes from a peer and store them; return how many were new.

    Removes them from `wanted`. Raises RemoteProtocolError for an envelope that is not valid or was not requested.
    """
    observations = []
    for number, envelope in enumerate(envelopes, 1):
        await throttle.pay_work(verification_cost(envelope))
        observation = replica.verify(envelope)
        if wanted is not None:
            if observation.id not in wanted:
                raise RemoteProtocolError("received an observation that was not requested")
            wanted.remove(observation.id)
        observations.append(observation)
        if number % VERIFIED_AT_A_TIME == 0:
            # Verification blocks the event loop: let other tasks run every millisecond or so.
            await trio.lowlevel.checkpoint()
    return await replica.store(observations)


class SyncInitiator(Session[Message, SyncState]):
    """The side that begins a session, and compares."""

    def __init__(self, stream: Stream, throttle: Throttle, replica: Replica, jitter: random.Random) -> None:
        super().__init__(stream, SyncConnection(Role.INITIATOR), throttle)
        self._replica = replica
        self._jitter = jitter
        self._fruitless_compares = 0
        self._puts_left = MAX_PUT_ENVELOPES
        self._undelivered = 0

    async def run(self) -> None:
        """Compare and exchange until both sets are equal, or a bound of the session is reached."""
        tree = await self._replica.tree()
        root = tree.summary("")
        await self._send(Greeting(first_bucket=self._replica.first_bucket(), count=root.count, digest=root.digest))
        match await self._receive_any():
            case Welcome(first_bucket=first_bucket, answer=answer):
                pass
            case Busy(retry_s=retry_s):
                self.outcome.retry_s = float(retry_s)
                return
            case _:
                raise NetworkError("the peer ended the session")
        self.outcome.equal = isinstance(answer, Equal)
        tree = tree.since(first_bucket)
        for _ in range(MAX_PASSES):
            if self.outcome.equal:
                return
            self.outcome.differed = True
            before = self.outcome.received + self.outcome.sent
            await self._walk(tree, answer)
            tree = await self._replica.tree(first_bucket)
            answer, *_ = await self._compare([tree.summary("")])
            self.outcome.equal = isinstance(answer, Equal)
            if self.outcome.received + self.outcome.sent == before:
                return

    async def _walk(self, tree: SetTree, root: Answer) -> None:
        """Go down from the answer about the root to where the sets differ, and exchange what is found on the way."""
        frontier: list[Summary] = []
        missing: list[bytes] = []
        queries, answers = [tree.summary("")], [root]
        while True:
            surplus: list[Gap] = []
            for query, answer in zip(queries, answers, strict=False):
                found = await self._replica.resolve(tree, partial(tree.difference, query.prefix, answer))
                for bucket, ids in found.listed:
                    lacking = await self._replica.resolve(tree, partial(tree.lacking, bucket, ids))
                    missing += [content_id for content_id in lacking if self._replica.wants(content_id)]
                surplus += found.surplus
                # Two sessions at a time rarely go the same way, and so seldom ask for the same.
                self._jitter.shuffle(found.ask)
                frontier += found.ask
            frontier += queries[len(answers) :]
            del frontier[:-MAX_FRONTIER]
            while len(missing) >= MAX_GET or (missing and not frontier):
                wanted, missing = missing[:MAX_GET], missing[MAX_GET:]
                await self._get(wanted)
            await self._put(tree, surplus)
            if not frontier or self._fruitless_compares >= MAX_FRUITLESS_COMPARES:
                break
            queries = frontier[-MAX_QUERIES:]
            del frontier[-len(queries) :]
            answers = await self._compare(queries)
        if missing:
            await self._get(missing)

    async def _compare(self, queries: Sequence[Summary]) -> list[Answer]:
        self._fruitless_compares += 1
        await self._send(Compare(tuple(queries)))
        return list((await self._receive(Answers)).answers)

    async def _get(self, ids: Iterable[bytes]) -> None:
        wanted = {content_id for content_id in ids if self._replica.wants(content_id)}
        if not wanted:
            return
        asked = frozenset(wanted)
        self._replica.requested |= asked
        try:
            await self._send(Get(tuple(sorted(asked))))
            last = False
            while not last:
                items = await self._receive(Items)
                last = items.last
                self.outcome.received += await verify_and_store(items.envelopes, self._replica, self._throttle, wanted)
                self._fruitless_compares = 0
        finally:
            self._replica.requested -= asked
        self._undelivered += len(wanted)
        if self._undelivered > MAX_UNDELIVERED:
            raise RemoteProtocolError(f"{self._undelivered} observations were listed but not delivered")

    async def _put(self, tree: SetTree, gaps: list[Gap]) -> None:
        """Hand over what the responder lacks, as far as the session allows."""
        self._jitter.shuffle(gaps)
        for gap in gaps:
            for bucket in tree.buckets_in(gap):
                if not self._puts_left:
                    return
                ids = await self._replica.resolve(tree, partial(tree.ids_in, gap, bucket))
                self._jitter.shuffle(ids)
                del ids[self._puts_left :]
                self._puts_left -= len(ids)
                for start in range(0, len(ids), GET_CHUNK):
                    envelopes = deque(await self._replica.envelopes(ids[start : start + GET_CHUNK]))
                    while envelopes:
                        await self._send(Put(fill_message(envelopes)))
                        self.outcome.sent += (await self._receive(Taken)).count
                        self._fruitless_compares = 0


class SyncResponder(Responder[Message, SyncState]):
    """The side that answers; it remembers nothing between two requests but the range that is compared."""

    def __init__(self, stream: Stream, throttle: Throttle, replica: Replica) -> None:
        super().__init__(stream, SyncConnection(Role.RESPONDER), throttle)
        self._replica = replica

    async def run(self) -> None:
        """Answer until the initiator ends the session."""
        greeting = await self._receive(Greeting)
        first_bucket = max(greeting.first_bucket, self._replica.first_bucket())
        tree = await self._replica.tree(first_bucket)
        query = Summary("", greeting.count, greeting.digest)
        answer = await self._replica.resolve(tree, partial(tree.answer, query))
        self.outcome.equal = isinstance(answer, Equal)
        self.outcome.differed = not self.outcome.equal
        await self._send(Welcome(first_bucket=first_bucket, answer=answer))
        while (message := await self._receive_any()) is not None:
            match message:
                case Compare(queries):
                    if not queries[0].prefix:
                        tree = await self._replica.tree(first_bucket)
                    await self._answer(tree, queries)
                case Get(ids):
                    await self._deliver(ids)
                case Put(envelopes):
                    stored = await verify_and_store(envelopes, self._replica, self._throttle)
                    self.outcome.received += stored
                    await self._send(Taken(count=stored))
                case _:
                    raise AssertionError(f"the table of states lets {message} through to a responder")

    async def _answer(self, tree: SetTree, queries: Sequence[Summary]) -> None:
        answers: list[Answer] = []
        room = MAX_PAYLOAD_BYTES
        for query in queries:
            answer = await self._replica.resolve(tree, partial(tree.answer, query))
            room -= answer_bytes(answer)
            if room < 0 and answers:
                break
            answers.append(answer)
            await self._throttle.pay_work(QUERY_COST + HASHING_COST * _count(query, answer))
        self.outcome.equal = len(answers) == 1 and not queries[0].prefix and isinstance(answers[0], Equal)
        await self._send(Answers(tuple(answers)))

    async def _deliver(self, ids: Sequence[bytes]) -> None:
        for start in range(0, len(ids), GET_CHUNK):
            envelopes = deque(await self._replica.envelopes(ids[start : start + GET_CHUNK]))
            while envelopes:
                items = Items(fill_message(envelopes), last=False)
                self.outcome.sent += len(items.envelopes)
                await self._send(items)
        await self._send(Items((), last=True))


def _count(query: Summary, answer: Answer) -> int:
    """Return how many ids of ours an answer speaks of."""
    match answer:
        case Equal():
            return query.count
        case Split(parts):
            return sum(part.count for part in parts)
        case Listing(buckets):
            return sum(len(ids) for _, ids in buckets)


def fill_message(envelopes: deque[bytes]) -> tuple[bytes, ...]:
    """Take envelopes from the left as long as they fit into one message; at least one always does."""
    taken = []
    room = MAX_PAYLOAD_BYTES
    while envelopes and room >= envelope_bytes(envelopes[0]):
        room -= envelope_bytes(envelopes[0])
        taken.append(envelopes.popleft())
    return tuple(taken)
