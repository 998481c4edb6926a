"""Gossip of signed records on one topic: batched publishing, and rate limits and verification of what others publish.

Gossip is best effort: a bounded number of small batches, dropped wherever a queue or a rate limit is exhausted. What it
loses is fetched by the sessions of `node.replication.pull`.
"""

import hashlib
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, Generic, TypeVar

import structlog
import trio
from cachetools import LRUCache

from node.network.interface import Network, NetworkError
from node.replication.peer_limits import PeerLimits
from node.util.signal import Signal
from node.util.token_bucket import Allowance
from protocol.errors import RemoteProtocolError
from protocol.history import decode_batch, take_batch
from protocol.identity import PeerId

MAX_QUEUED: Final = 1024
"""Own records that wait to be gossiped; beyond this the oldest are left to anti-entropy."""

STALE_S: Final = 30.0
"""A record that waited this long has spread by anti-entropy, and is not gossiped any more."""

TOPIC_WINDOW_S: Final = 10.0
MAX_WINDOW_BATCHES: Final = 1024
"""Received batches that are remembered to measure the load of a topic."""

BATCH_COST: Final = 1.0
KNOWN_COST: Final = 0.1
"""Least work for a batch, and work for a record that was verified before, in signatures: every peer forwards a batch,
and receives each of its records, also where they are repeated without end."""

R = TypeVar("R")

_logger = structlog.get_logger(__name__)


class Verifier(Generic[R]):
    """Verifies signed envelopes, each once while its record is among the most recent ones."""

    def __init__(self, verify_envelope: Callable[[bytes], R], size: int, cost: Callable[[bytes], float]) -> None:
        """`verify_envelope` raises RemoteProtocolError; `cost`: signatures that it verifies for an envelope."""
        self._open_envelope = verify_envelope
        self._cost = cost
        self._verified: LRUCache[bytes, R] = LRUCache(size)

    def cost(self, envelope: bytes) -> float:
        """Return the work for an envelope, in signatures: little for one that was verified before."""
        return KNOWN_COST if hashlib.sha256(envelope).digest() in self._verified else self._cost(envelope)

    def verify(self, envelope: bytes) -> R:
        """Return the record in an envelope. Raises RemoteProtocolError."""
        key = hashlib.sha256(envelope).digest()
        if (record := self._verified.get(key)) is None:
            record = self._verified[key] = self._open_envelope(envelope)
        return record


class BatchPacer:
    """Adapts the pause between our batches to the load of the topic, so that no peer's validators are overrun.

    Slows down by half, at most to a fair share of the topic, while the topic is overloaded; recovers by a fifth.
    """

    def __init__(self, interval_s: float, topic_batches_per_s: float, jitter: random.Random) -> None:
        """`interval_s`: shortest pause; `topic_batches_per_s`: load that all peers together should not exceed."""
        self._shortest_s = self._interval_s = interval_s
        self._topic_batches_per_s = topic_batches_per_s
        self._jitter = jitter
        self._window: deque[tuple[float, PeerId]] = deque(maxlen=MAX_WINDOW_BATCHES)

    def on_batch(self, source: PeerId) -> None:
        """Count a received batch."""
        self._window.append((trio.current_time(), source))

    def pause_s(self) -> float:
        """Return the pause before our next batch."""
        now_s = trio.current_time()
        while self._window and now_s - self._window[0][0] > TOPIC_WINDOW_S:
            self._window.popleft()
        if len(self._window) > self._topic_batches_per_s * TOPIC_WINDOW_S:
            sources = 1 + len({source for _, source in self._window})
            fair_s = max(self._shortest_s, sources / self._topic_batches_per_s)
            self._interval_s = min(fair_s, self._interval_s * 1.5)
        else:
            self._interval_s = max(self._shortest_s, self._interval_s / 1.2)
        return self._interval_s * self._jitter.uniform(0.8, 1.2)


class GossipTopic(Generic[R]):
    """One topic of signed records. Made before the network runs; `run` needs it running."""

    def __init__(
        self,
        network: Network,
        topic: str,
        verifier: Verifier[R],
        peer_limits: PeerLimits,
        total: Allowance,
        *,
        accepts: Callable[[PeerId, R], bool],
        pacer: BatchPacer | None = None,
    ) -> None:
        """`total`: signatures verified for all publishers together. `accepts`: see `_validate`."""
        self._network = network
        self._topic = topic
        self._verifier = verifier
        self._peer_limits = peer_limits
        self._total = total.bucket(0.0)
        self._accepts = accepts
        self._pacer = pacer
        self._queue: deque[tuple[float, bytes]] = deque(maxlen=MAX_QUEUED)
        self._queued = Signal()
        network.join_topic(topic, self._validate)

    def publish(self, envelopes: Iterable[bytes]) -> None:
        """Queue records of our own."""
        now_s = trio.current_time()
        self._queue += [(now_s, envelope) for envelope in envelopes]
        self._queued.set()

    async def publish_batch(self, envelopes: Sequence[bytes]) -> None:
        """Gossip records at once, in a batch of their own: ours do not share its fate where it is refused."""
        await self._send(take_batch(deque(envelopes)))

    async def run(self, receive: Callable[[Sequence[R]], Awaitable[None]]) -> None:
        """Publish what is queued, and pass the records of others to `receive`, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._publish_loop)
            nursery.start_soon(self._receive_loop, receive)

    async def _publish_loop(self) -> None:
        while True:
            await self._queued.wait()
            while batch := self._next_batch():
                await self._send(batch)
                if self._pacer is not None:
                    await trio.sleep(self._pacer.pause_s())

    async def _send(self, batch: bytes) -> None:
        try:
            await self._network.publish(self._topic, batch)
        except NetworkError as error:
            _logger.debug("batch not gossiped", topic=self._topic, reason=str(error))

    def _next_batch(self) -> bytes | None:
        now_s = trio.current_time()
        while self._queue and now_s - self._queue[0][0] > STALE_S:
            self._queue.popleft()
        if not self._queue:
            return None
        envelopes = deque(envelope for _, envelope in self._queue)
        count = len(envelopes)
        batch = take_batch(envelopes)
        for _ in range(count - len(envelopes)):
            self._queue.popleft()
        return batch

    async def _receive_loop(self, receive: Callable[[Sequence[R]], Awaitable[None]]) -> None:
        async with self._network.subscribe(self._topic) as messages:
            async for message in messages:
                if self._pacer is not None:
                    self._pacer.on_batch(message.source)
                await receive([self._verifier.verify(envelope) for envelope in decode_batch(message.data)])

    def _validate(self, source: PeerId, data: bytes) -> bool:
        """Return whether a batch is delivered and forwarded: within the rate limits, verified, and accepted.

        Bans the publisher of an invalid batch, and raises RemoteProtocolError.
        """
        if source == self._network.peer_id:
            return True
        if self._peer_limits.of(source, trio.current_time()).is_banned(trio.current_time()):
            return False
        try:
            envelopes = decode_batch(data)
            if not self._within_rate_limit(source, max(BATCH_COST, sum(map(self._verifier.cost, envelopes)))):
                return False
            records = [self._verifier.verify(envelope) for envelope in envelopes]
            accepted = [self._accepts(source, record) for record in records]
        except RemoteProtocolError as error:
            self._peer_limits.ban(source, trio.current_time(), str(error))
            raise
        return all(accepted)

    def _within_rate_limit(self, source: PeerId, cost: float) -> bool:
        now_s = trio.current_time()
        return self._peer_limits.of(source, now_s).gossip.take(cost, now_s) and self._total.take(cost, now_s)
