"""A coordinator in a test's hands: opens sessions at one stage and sends it whatever the test wants."""

import random
from array import array
from dataclasses import dataclass, field, replace

import trio

from node.links.outbound_link import OutboundLink, SessionLost
from protocol.identity import JobId, PeerId, SessionId
from protocol.messages import Ballot, Begin, Open, Opened, Sampling, Slice, Step
from protocol.tensors import DType, Tensor
from selector.task import BASELINE
from tests.support.job_peers import Peer, Swarm

HIDDEN, POSITIONS = 32, 64


@dataclass
class RawCoordinator:
    """Opens sessions at a victim, past all checks of a real coordinator."""

    peer: Peer
    victim: Peer
    link: OutboundLink
    lost: list[SessionLost] = field(default_factory=list)
    opened: int = 0

    @property
    def id(self) -> PeerId:
        return self.peer.id

    def opening(self, positions: int = POSITIONS) -> Open:
        """Return what opens a session of the victim's whole span."""
        info = self.victim.engines[0].info
        self.opened += 1
        job = JobId(f"{random.Random(self.id).getrandbits(96):024x}{self.opened:08x}")
        last = info.is_last
        return Open(
            session=SessionId(job, 0),
            model=info.model,
            blocks=info.blocks,
            methods=(BASELINE.name,),
            positions=positions,
            downstream=None if last else self.id,
            sampling=Sampling(max_tokens=positions) if last else None,
        )

    async def open(self, positions: int = POSITIONS) -> SessionId:
        """Open a session without beginning it."""
        return await self.begin(positions, is_begun=False)

    async def open_with(self, opening: Open) -> Opened:
        self.link.watch(opening.session, self.lost.append)
        return await self.link.open(opening)

    async def begin(
        self, positions: int = POSITIONS, *, upstream: tuple[PeerId, ...] = (), is_begun: bool = True
    ) -> SessionId:
        """Open a session and begin it, unless it is not to be."""
        opening = replace(self.opening(positions), upstream=upstream)
        opened = await self.open_with(opening)
        if not is_begun:
            return opening.session
        ballots = (Ballot(self.victim.id, (opened.votes[BASELINE.name],)), Ballot(self.id, (0.0,)))
        self.link.begin(Begin(session=opening.session, method=BASELINE.name, ballots=ballots))
        return opening.session

    async def send(self, part: Slice, tensor: Tensor) -> None:
        await self.link.send_step(Step(slices=(part,), tensor=tensor))

    async def send_raw(self, frame: bytes) -> None:
        """Send bytes past all that a link checks, and wait until they arrive."""
        await self.link._stream.send_all(frame)
        await trio.sleep(0.5)

    async def until_lost(self, count: int = 1) -> SessionLost:
        with trio.fail_after(5):
            while len(self.lost) < count:
                await trio.sleep(0.01)
        return self.lost[count - 1]


async def raw_coordinator_at(swarm: Swarm, victim: Peer) -> RawCoordinator:
    peer = await swarm.join()
    await swarm.settle()
    return RawCoordinator(peer, victim, await peer.stages.link_pool.link_to(victim.id))


def hidden(*values: float, rows: int = 1, width: int = HIDDEN) -> Tensor:
    """Return rows of f32, the first elements of which are given."""
    elements = array("f", [1.0] * rows * width)
    elements[: len(values)] = array("f", values)
    return Tensor(DType.FLOAT32, (rows, width), elements.tobytes())


def a_slice(
    session: SessionId, tensor: Tensor, position: int = 0, draws: int = 0, drafts: tuple[int, ...] = ()
) -> Slice:
    return Slice(session=session, position=position, rows=tensor.rows, draws=draws, drafts=drafts)
