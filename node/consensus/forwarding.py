"""Gossips onward what this node fetched from a neighbour and gossip did not bring.

Otherwise a peer could answer some neighbours only, and so decide who has its contribution in time: those who have it
would require it in the statement, and the others refuse it.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio
from cachetools import LRUCache

from node.consensus.chain_node import ChainNode
from protocol.consensus import SignedMessage
from protocol.consensus_values import Commit, Reveal

MAX_GOSSIPED: Final = 4096
"""Messages remembered that came by gossip."""

MAX_WAITING: Final = 48
"""Messages of a chain that wait to be forwarded, and the most in a batch: below what a peer may publish at once."""


class Forwarder:
    """Waits a while, and gossips the fetched contributions that nobody else has gossiped meanwhile."""

    def __init__(
        self, publish: Callable[[Sequence[SignedMessage]], Awaitable[None]], pause_s: float, jitter: random.Random
    ) -> None:
        """`publish`: gossips a batch at once. `pause_s`: mean time between batches."""
        self._publish = publish
        self._pause_s = pause_s
        self._jitter = jitter
        self._gossiped: LRUCache[bytes, None] = LRUCache(MAX_GOSSIPED)
        self._waiting: dict[ChainNode, dict[bytes, SignedMessage]] = {}

    def on_gossip(self, records: Sequence[SignedMessage]) -> None:
        """Note what has spread by gossip."""
        self._gossiped.update((record.id, None) for record in records)

    def on_fetched(self, chain: ChainNode, records: Sequence[SignedMessage]) -> None:
        """Note what a neighbour answered."""
        waiting = self._waiting.setdefault(chain, {})
        for record in records:
            if isinstance(record.body, Commit | Reveal) and len(waiting) < MAX_WAITING:
                waiting[record.id] = record

    async def run(self) -> None:
        """Forward until cancelled."""
        while True:
            await trio.sleep(self._jitter.uniform(0.5, 1.5) * self._pause_s)
            waiting, self._waiting = self._waiting, {}
            for chain, records in waiting.items():
                missing = [each for key, each in records.items() if key not in self._gossiped]
                if batch := [each for each in missing if chain.awaits(each)]:
                    await self._publish(batch)
