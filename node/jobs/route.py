"""An open route: the sessions of one job on all its stages, and the coordinator's end of them."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from node.jobs.link import InboundLink, LinkBroken, OutboundLink, SessionLost, SessionRefused
from node.jobs.switchboard import Switchboard
from protocol.identity import BlockRange, JobId, ModelId, PeerId, SessionId
from protocol.limits import MAX_STEP_BYTES
from protocol.messages import (
    Closed,
    FailureReason,
    FinishReason,
    Open,
    Opened,
    RefusalReason,
    Sampling,
    SessionStatistics,
    Slice,
    Step,
)
from protocol.tensors import Tensor, tensor_from_tokens, tokens_from_tensor

CLOSE_TIMEOUT_S = 1.0
"""How long the end of a job waits for its stages; a stage that misses it frees the session when the link breaks."""


@dataclass(frozen=True, slots=True)
class Stop:
    """A stage of a route before it is opened: who, and which blocks."""

    peer: PeerId
    blocks: BlockRange


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a peer could not take its stage. `reason` is None where the peer could not be reached at all."""

    peer: PeerId
    reason: RefusalReason | None
    message: str


class RouteRejected(Exception):
    """Some stages did not open."""

    def __init__(self, rejections: Sequence[Rejection]) -> None:
        super().__init__("; ".join(f"{r.peer}: {r.message}" for r in rejections))
        self.rejections = tuple(rejections)


class RouteLost(Exception):
    """A stage was lost on the way; `blamed` is the peer at fault."""

    def __init__(self, lost: SessionLost) -> None:
        super().__init__(f"{lost.blamed}: {lost.message}")
        self.reporter = lost.reporter
        self.blamed = lost.blamed
        self.reason = lost.reason
        self.message = lost.message


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token as it arrived from the last stage."""

    position: int
    token: int
    finish_reason: FinishReason | None


class OpenRoute:
    """The stages of one job, and the receiver of the last stage's tokens. `close` follows every `open`."""

    def __init__(self, stops: Sequence[Stop], switchboard: Switchboard, sampling: Sampling) -> None:
        self.stops = tuple(stops)
        self.answers: list[Opened | None] = [None] * len(stops)
        self._switchboard = switchboard
        self._job = JobId(secrets.token_hex(16))
        self._sink = SessionId(self._job, len(stops))
        self._links: dict[int, OutboundLink] = {}
        self._unwatch: list[Callable[[], None]] = []
        self._sources: set[InboundLink] = set()
        # The last stage may send this many tokens and no more: the channel is full only if it lies.
        self._tokens_in, self._tokens = trio.open_memory_channel[Drawn](sampling.max_tokens)
        self._lost: SessionLost | None = None
        self._sending = trio.CancelScope()

    def permits(self, peer: PeerId) -> bool:
        """Only the last stage tells the coordinator tokens."""
        return peer == self.stops[-1].peer

    def receive(self, part: Slice, tensor: Tensor, link: InboundLink) -> None:
        """Take tokens of the last stage."""
        if self._lost:
            return
        self._sources.add(link)
        try:
            for offset, token in enumerate(tokens_from_tensor(tensor)):
                self._tokens_in.send_nowait(Drawn(part.position + offset, token, part.finish_reason))
        except (ValueError, trio.WouldBlock):
            self.lose(SessionLost(link.peer, link.peer, FailureReason.ENGINE, "sent what cannot be the job's tokens"))
        link.consumed(part.session, len(tensor.data))

    def lose(self, lost: SessionLost) -> None:
        """Take note that a stage is lost: the next `next_token` raises RouteLost."""
        self._lost = self._lost or lost
        self._sending.cancel()
        self._tokens_in.close()

    async def send_prompt(self, tokens: Sequence[int], hidden_size: int) -> None:
        """Send the prompt to the first stage, in parts whose hidden states fit into one step later on the route."""
        part_rows = max(1, MAX_STEP_BYTES // (4 * hidden_size))
        first = SessionId(self._job, 0)
        try:
            with self._sending:
                for start in range(0, len(tokens), part_rows):
                    rows = tokens[start : start + part_rows]
                    draws = 1 if start + len(rows) == len(tokens) else 0
                    part = Slice(session=first, position=start, rows=len(rows), draws=draws)
                    await self._links[0].send_step(Step(slices=(part,), tensor=tensor_from_tokens(rows)))
        except LinkBroken as broken:
            raise RouteLost(SessionLost(broken.peer, broken.peer, FailureReason.DOWNSTREAM, str(broken))) from None
        if self._lost is not None:
            raise RouteLost(self._lost)

    async def next_token(self) -> Drawn:
        """Wait for the next token; raise RouteLost when a stage is lost."""
        try:
            return await self._tokens.receive()
        except trio.EndOfChannel:
            if self._lost is None:
                raise AssertionError("the channel of tokens ends only when a stage is lost") from None
            raise RouteLost(self._lost) from None

    @property
    def job(self) -> JobId:
        """The id under which the stages know the job; a replay has another."""
        return self._job

    async def close(self) -> tuple[Closed, ...]:
        """Close every stage, within a bounded time even under cancellation; return what each has cost."""
        self._switchboard.receivers.remove(self._sink)
        for unwatch in self._unwatch:
            unwatch()
        for source in self._sources:
            source.forget(self._sink)
        sessions = [SessionId(self._job, stage) for stage in range(len(self.stops))]
        closed = [Closed(session=session, statistics=SessionStatistics()) for session in sessions]

        async def close_stage(stage: int) -> None:
            closed[stage] = await self._links[stage].close(SessionId(self._job, stage))

        with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S, shield=True):
            async with trio.open_nursery() as nursery:
                for stage in self._links:
                    nursery.start_soon(close_stage, stage)
        return tuple(closed)

    async def open(self, model: ModelId, method: str, positions: int, sampling: Sampling) -> None:
        """Open all stages at once. Raises RouteRejected with everything that is against it."""
        rejections: list[Rejection] = []

        async def open_stage(stage: int) -> None:
            peer = self.stops[stage].peer
            try:
                link = await self._switchboard.link_to(peer)
                self._links[stage] = link
                self._unwatch.append(link.watch(SessionId(self._job, stage), self.lose))
                self.answers[stage] = await link.open(self._opening(stage, model, method, positions, sampling))
            except SessionRefused as refused:
                rejections.append(Rejection(peer, refused.reason, str(refused)))
                del self._links[stage]
            except LinkBroken as broken:
                rejections.append(Rejection(peer, None, str(broken)))

        self._switchboard.receivers.add(self._sink, self)
        async with trio.open_nursery() as nursery:
            for stage in range(len(self.stops)):
                nursery.start_soon(open_stage, stage)
        if rejections:
            raise RouteRejected(sorted(rejections, key=lambda rejection: rejection.peer))

    def _opening(self, stage: int, model: ModelId, method: str, positions: int, sampling: Sampling) -> Open:
        is_last = stage == len(self.stops) - 1
        before = self.stops[stage - 1].peer  # of the first stage: the last one, which feeds tokens back
        return Open(
            session=SessionId(self._job, stage),
            model=model,
            blocks=self.stops[stage].blocks,
            method=method,
            positions=positions,
            upstream=(before,),
            downstream=None if is_last else self.stops[stage + 1].peer,
            feedback=self.stops[0].peer if is_last else None,
            sampling=sampling if is_last else None,
        )
