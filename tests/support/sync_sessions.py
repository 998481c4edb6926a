"""Two peers with a network in memory between them, for sessions of which one end may be a liar."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import cache, lru_cache

from node.network.interface import Stream, StreamHandler
from node.replication.anti_entropy import SyncInitiator, SyncResponder
from node.replication.replica import Replica
from node.replication.session import Throttle
from node.testing.memory_history import MemoryHistory
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetworkHub
from protocol.observations import BUCKET_S, SignedObservation, verify_observation
from protocol.states import Role
from protocol.sync import PROTOCOL_ID, Message, SyncConnection
from tests.support.observations import NOW_S, peer, signed

OURS, THEIRS = peer(1), peer(2)

open_once = lru_cache(maxsize=4096)(verify_observation)
"""Verification, remembered: the tests look at the same few observations again and again."""


@cache
def made(number: int, hours_ago: int = 0) -> SignedObservation:
    """Return an observation; the same for the same arguments."""
    return signed(number, observer=number % 3, issued_at_s=NOW_S - hours_ago * BUCKET_S)


class CountingThrottle(Throttle):
    """Never waits, and adds up what it would have charged."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0.0
        self.traffic = 0

    async def pay_work(self, amount: float) -> None:
        self.work += amount

    async def pay_traffic(self, sent_bytes: int) -> None:
        self.traffic += sent_bytes


class Peer:
    """A history and what it takes to compare it."""

    def __init__(self, observations: Iterable[SignedObservation] = (), *, now_s: float = NOW_S) -> None:
        self.history = MemoryHistory()
        self.initial = list(observations)
        self.replica = Replica(self.history, lambda: now_s, open_once)
        self.throttle = CountingThrottle()

    @property
    def ids(self) -> set[bytes]:
        return set(self.history.envelopes)


@asynccontextmanager
async def stream_to(serve: StreamHandler) -> AsyncIterator[Stream]:
    """Open a stream from us to a peer that serves it in this way."""
    hub = MemoryNetworkHub(random.Random(0), LinkModel(latency_s=0.01))
    ours, theirs = hub.network(OURS), hub.network(THEIRS)
    theirs.set_stream_handler(PROTOCOL_ID, serve)
    async with ours.running(), theirs.running():
        await ours.connect(theirs.multiaddrs[0])
        stream = await ours.open_stream(THEIRS, PROTOCOL_ID)
        yield stream
        await stream.aclose()


async def synchronise(initiator: Peer, responder: Peer) -> tuple[SyncInitiator, SyncResponder]:
    """Run one session between two honest peers."""
    for each in (initiator, responder):
        await each.history.add_many(each.initial)
    responders = []

    async def serve(stream: Stream) -> None:
        responders.append(SyncResponder(stream, responder.throttle, responder.replica))
        await responders[0].run()

    async with stream_to(serve) as stream:
        session = SyncInitiator(stream, initiator.throttle, initiator.replica, random.Random(0))
        await session.run()
    return session, responders[0]


class ScriptedEnd:
    """One end of a sync stream that sends what its test scripts."""

    def __init__(self, stream: Stream, role: Role) -> None:
        self.connection = SyncConnection(role)
        self._stream = stream
        self._received: list[Message] = []

    async def send(self, message: Message) -> None:
        await self._stream.send_all(self.connection.send(message))

    async def receive(self) -> Message | None:
        while not self._received:
            data = await self._stream.receive_some()
            self._received += self.connection.receive_data(data)
            if not data:
                return None
        return self._received.pop(0)


async def meet(initiator: Peer, liar: Callable[[ScriptedEnd], Awaitable[None]]) -> SyncInitiator:
    """Run one session of ours with a responder that lies."""
    await initiator.history.add_many(initiator.initial)

    async def serve(stream: Stream) -> None:
        await liar(ScriptedEnd(stream, Role.RESPONDER))

    async with stream_to(serve) as stream:
        session = SyncInitiator(stream, initiator.throttle, initiator.replica, random.Random(0))
        await session.run()
    return session
