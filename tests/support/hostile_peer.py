"""Peers over the in-memory network that promise and do not deliver: their messages are valid, they do nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import trio

from node.identity import Identity
from node.network.interface import Network, NetworkError, Stream
from node.swarm.dht_records import RecordKinds
from node.swarm.heartbeats import OwnServices
from node.swarm.membership import Membership
from node.testing.fake_engine import FAKE_MODEL
from protocol.announcements import ServedSpan
from protocol.connection import PROTOCOL_IDS, JobConnection
from protocol.identity import BlockRange, PeerId, SessionId
from protocol.messages import (
    Begin,
    Close,
    Closed,
    FinishReason,
    Load,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    SessionStatistics,
    Slice,
    Step,
)
from protocol.reports import Progress, ProgressRequest
from protocol.states import Role
from protocol.tensors import tensor_from_tokens
from tests.support.job_peers import BLOCKS, Swarm, wall_clock

PROMISE = Load(sessions=0, queued_rows=0, free_positions=100_000, step_s=1e-9)


@dataclass
class Hole:
    """Opens and begins every session, answers pings, and never sends a token nor credit.

    `protocols`: versions of the job stream that it speaks. `opens`: whether it answers an Open. `claims`: its answer
    to a progress request; None for none. `garbage`: it sends made-up tokens at once instead of none.
    """

    network: Network
    membership: Membership
    protocols: Sequence[str]
    opens: bool = True
    claims: Progress | None = None
    garbage: bool = False
    opened: list[PeerId] = field(default_factory=list)
    """Who opened a session, in order."""
    tokens: dict[SessionId, int] = field(default_factory=dict)
    begun: list[SessionId] = field(default_factory=list)

    @property
    def id(self) -> PeerId:
        return self.network.peer_id

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        for protocol in self.protocols:
            self.network.set_stream_handler(protocol, self._serve)
        async with self.network.running(), trio.open_nursery() as nursery:
            nursery.start_soon(self.membership.run)
            task_status.started()
            await trio.sleep_forever()

    async def _serve(self, stream: Stream) -> None:
        connection = JobConnection(Role.RESPONDER, agent="hole/1", window_bytes=64 << 20, protocol=stream.protocol)
        await _send(stream, connection.send_hello())
        async with trio.open_nursery() as nursery:
            while data := await stream.receive_some():
                for message in connection.receive_data(data):
                    if isinstance(message, Step) and self.garbage:
                        nursery.start_soon(self._invent, stream.peer, message)
                    answer = self._answer(stream.peer, message)
                    if answer is not None:
                        await _send(stream, connection.send(answer))
            nursery.cancel_scope.cancel()

    def _answer(self, peer: PeerId, message: Message) -> Message | None:
        match message:
            case Ping():
                return Pong(nonce=message.nonce)
            case Open():
                self.opened.append(peer)
                self.tokens[message.session] = message.sampling.max_tokens if message.sampling else 0
                if self.opens:
                    votes = dict.fromkeys(message.methods, -20.0)
                    return Opened(session=message.session, load=PROMISE, votes=votes, cached={}, policy={}, held=0)
            case Begin():
                self.begun.append(message.session)
            case ProgressRequest() if self.claims is not None:
                return replace(self.claims, session=message.session)
            case Close():
                return Closed(session=message.session, statistics=SessionStatistics())
        return None

    async def _invent(self, peer: PeerId, step: Step) -> None:
        """Send a made-up text to the coordinator, as the only stage of a route does."""
        stream = await self.network.open_stream(peer, *self.protocols)
        connection = JobConnection(Role.INITIATOR, agent="hole/1", window_bytes=64 << 20, protocol=stream.protocol)
        await _send(stream, connection.send_hello())
        while connection.remote_hello is None:
            connection.receive_data(await stream.receive_some())
        for part in step.slices:
            count = self.tokens[part.session] if part.draws else 0
            for number in range(count):
                drawn = Slice(
                    session=SessionId(part.session.job, part.session.stage + 1),
                    position=part.position + part.rows + number,
                    rows=1,
                    finish_reason=FinishReason.LENGTH if number == count - 1 else None,
                )
                await _send(stream, connection.send(Step(slices=(drawn,), tensor=tensor_from_tokens([7]))))
        await trio.sleep_forever()


async def _send(stream: Stream, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
    try:
        for piece in pieces:
            await stream.send_all(piece)
    except NetworkError:
        return


async def join_hole(
    swarm: Swarm,
    nursery: trio.Nursery,
    blocks: tuple[int, int] = (0, BLOCKS),
    *,
    protocols: Sequence[str] = PROTOCOL_IDS[-1:],
    load: Load = PROMISE,
    **ways: bool | Progress,
) -> Hole:
    """Start a hole that serves blocks of the fake model, and wait until every peer knows it."""
    identity = Identity(swarm.rng.randbytes(32))
    network = swarm.hub.network(identity.peer_id)
    membership = Membership(
        network=network,
        identity=identity,
        services=OwnServices(
            agent="hole/1", served_spans=lambda: (ServedSpan(model=FAKE_MODEL, blocks=BlockRange(*blocks), load=load),)
        ),
        bootstrap=swarm.peers[0].network.multiaddrs,
        records=RecordKinds(network),
        jitter=swarm.rng,
        wall_clock=wall_clock,
    )
    hole = Hole(network, membership, protocols, **ways)  # type: ignore[arg-type]
    await nursery.start(hole.run)
    while not all(peer.membership.directory.get(hole.id) for peer in swarm.peers):
        await trio.sleep(0.1)
    return hole
