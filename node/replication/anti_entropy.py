"""One anti-entropy session: two peers compare their histories over a stream and hand each other what is missing.

Everything that arrives is stored as it arrives, so that a session that breaks has not been for nothing. A session has
an end: what it did not get to is the next one's.
"""

import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio

from node.network import channel
from node.network.channel import Channel
from node.network.interface import NetworkError, Stream
from node.replication.replica import Replica, verification_cost
from protocol.conversation import MAX_PAYLOAD_BYTES
from protocol.errors import RemoteProtocolError
from protocol.limits import MAX_GET, MAX_QUERIES
from protocol.reconciliation import Answer, Equal, Gap, Listing, SetTree, Split, Summary
from protocol.states import Role
from protocol.sync import (
    Answers,
    Busy,
    Compare,
    Get,
    Greeting,
    Items,
    Put,
    SyncConnection,
    Taken,
    Welcome,
    answer_bytes,
    envelope_bytes,
)

MAX_BARREN_COMPARES = 64
"""Messages with queries in a row that brought nothing: more than an honest difference needs, even at its deepest."""

MAX_FRONTIER = 4096
"""Prefixes that wait to be asked about; what does not fit is found again by the next session."""

MAX_PUT_ENVELOPES = 128
"""Envelopes that an initiator hands over in one session. A peer that lacks more gets them itself, from many at once."""

MAX_PASSES = 3

MAX_UNDELIVERED = 64
"""Envelopes that a peer may list and then not have: some may have been dropped meanwhile. More is a lie."""

GET_CHUNK = 64
VERIFIED_AT_A_TIME = 4

QUERY_COST = 0.1
HASHING_COST = 1 / 5000
"""Work of answering a query, and of each id that is hashed for it, measured in signatures verified."""


class Payer(Protocol):
    """Slows a session down to what its peer and all sessions together are allowed."""

    async def pay_work(self, amount: float) -> None:
        """Wait until so much work, in signatures to verify, is paid for."""
        ...

    async def pay_traffic(self, sent_bytes: int) -> None:
        """Wait until so many bytes are paid for."""
        ...


@dataclass(slots=True)
class Outcome(channel.Outcome):
    """What a session came to. `received`: new to us; `sent`: new to them, or what they asked for."""

    equal: bool = False
    """At the end both held the same, as far as they compare."""
    differed: bool = False


async def admit(envelopes: Iterable[bytes], replica: Replica, payer: Payer, wanted: set[bytes] | None = None) -> int:
    """Verify envelopes that a peer sent and keep them; return how many were new.

    Those in `wanted` are taken out of it. Raises RemoteProtocolError for an envelope that is not valid or not wanted.
    """
    observations = []
    for number, envelope in enumerate(envelopes, 1):
        await payer.pay_work(verification_cost(envelope))
        observation = replica.open(envelope)
        if wanted is not None:
            if observation.id not in wanted:
                raise RemoteProtocolError("an observation came that was not asked for")
            wanted.remove(observation.id)
        observations.append(observation)
        if number % VERIFIED_AT_A_TIME == 0:
            # Everybody else on the event loop gets a turn every millisecond or so.
            await trio.lowlevel.checkpoint()
    return await replica.take_in(observations)


class Initiation:
    """The initiator's side of one session."""

    def __init__(self, stream: Stream, replica: Replica, payer: Payer, jitter: random.Random) -> None:
        self.outcome = Outcome()
        self._channel = Channel(stream, SyncConnection(Role.INITIATOR), self.outcome)
        self._replica = replica
        self._payer = payer
        self._jitter = jitter
        self._barren_compares = 0
        self._puts_left = MAX_PUT_ENVELOPES
        self._undelivered = 0

    async def run(self) -> None:
        """Compare and exchange until equal or until the session's bounds; `outcome` tells what came of it.

        Raises NetworkError when the session broke, RemoteProtocolError when the peer cheated.
        """
        tree = await self._replica.tree()
        root = tree.summary("")
        greeting = Greeting(first_bucket=self._replica.first_bucket(), count=root.count, digest=root.digest)
        await self._channel.say(greeting)
        match await self._channel.hear_any():
            case Welcome(first_bucket=first_bucket, answer=answer):
                pass
            case Busy() as busy:
                self.outcome.retry_s = float(busy.retry_s)
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
            if not frontier or self._barren_compares >= MAX_BARREN_COMPARES:
                break
            queries = frontier[-MAX_QUERIES:]
            del frontier[-len(queries) :]
            answers = await self._compare(queries)
        if missing:
            await self._get(missing)

    async def _compare(self, queries: Sequence[Summary]) -> list[Answer]:
        self._barren_compares += 1
        await self._channel.say(Compare(tuple(queries)))
        return list((await self._channel.hear(Answers)).answers)

    async def _get(self, ids: Iterable[bytes]) -> None:
        wanted = {content_id for content_id in ids if self._replica.wants(content_id)}
        if not wanted:
            return
        asked = frozenset(wanted)
        self._replica.requested |= asked
        try:
            await self._channel.say(Get(tuple(sorted(asked))))
            last = False
            while not last:
                items = await self._channel.hear(Items)
                last = items.last
                self.outcome.received += await admit(items.envelopes, self._replica, self._payer, wanted)
                self._barren_compares = 0
        finally:
            self._replica.requested -= asked
        self._undelivered += len(wanted)
        if self._undelivered > MAX_UNDELIVERED:
            raise RemoteProtocolError(f"{self._undelivered} observations were listed and not delivered")

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
                        await self._payer.pay_traffic(await self._channel.say(Put(fill_message(envelopes))))
                        self.outcome.sent += (await self._channel.hear(Taken)).count
                        self._barren_compares = 0


class Response:
    """The responder's side of one session."""

    def __init__(self, stream: Stream, replica: Replica, payer: Payer) -> None:
        self.outcome = Outcome()
        self._channel = Channel(stream, SyncConnection(Role.RESPONDER), self.outcome)
        self._replica = replica
        self._payer = payer

    async def refuse(self, retry_s: int) -> None:
        """Send the initiator away for some seconds."""
        if await self._channel.hear_any() is not None:
            await self._channel.say(Busy(retry_s=retry_s))

    async def run(self) -> None:
        """Answer until the initiator ends the session. Raises NetworkError and RemoteProtocolError."""
        greeting = await self._channel.hear(Greeting)
        first_bucket = max(greeting.first_bucket, self._replica.first_bucket())
        tree = await self._replica.tree(first_bucket)
        query = Summary("", greeting.count, greeting.digest)
        answer = await self._replica.resolve(tree, partial(tree.answer, query))
        self.outcome.equal = isinstance(answer, Equal)
        self.outcome.differed = not self.outcome.equal
        await self._payer.pay_traffic(await self._channel.say(Welcome(first_bucket=first_bucket, answer=answer)))
        while (message := await self._channel.hear_any()) is not None:
            match message:
                case Compare(queries):
                    if not queries[0].prefix:
                        tree = await self._replica.tree(first_bucket)
                    await self._answer(tree, queries)
                case Get(ids):
                    await self._deliver(ids)
                case Put(envelopes):
                    taken = await admit(envelopes, self._replica, self._payer)
                    self.outcome.received += taken
                    await self._channel.say(Taken(count=taken))
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
            await self._payer.pay_work(QUERY_COST + HASHING_COST * _count(query, answer))
        self.outcome.equal = len(answers) == 1 and not queries[0].prefix and isinstance(answers[0], Equal)
        await self._payer.pay_traffic(await self._channel.say(Answers(tuple(answers))))

    async def _deliver(self, ids: Sequence[bytes]) -> None:
        for start in range(0, len(ids), GET_CHUNK):
            envelopes = deque(await self._replica.envelopes(ids[start : start + GET_CHUNK]))
            while envelopes:
                items = Items(fill_message(envelopes), last=False)
                self.outcome.sent += len(items.envelopes)
                await self._payer.pay_traffic(await self._channel.say(items))
        await self._channel.say(Items((), last=True))


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
