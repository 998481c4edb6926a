"""An open route: the sessions of one job on all its stages, and the coordinator's end of them."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from node.coordinator.straggler_detector import Progress, StragglerDetector
from node.coordinator.submission import JobError
from node.links.base_link import LinkBroken
from node.links.inbound_link import InboundLink
from node.links.link_pool import LinkPool
from node.links.outbound_link import OutboundLink, SessionLost, SessionRefused
from node.stages.replay_buffer import ResumePoint, plan_resume
from node.stages.voting import Agreement
from protocol.codec import minor_of
from protocol.identity import JobId, ModelId, PeerId, SessionId, Stage
from protocol.limits import MAX_STEP_BYTES
from protocol.messages import (
    Ballot,
    Begin,
    Closed,
    FailureReason,
    FinishReason,
    Load,
    Open,
    Opened,
    ProgressRequest,
    RefusalReason,
    Sampling,
    SessionStatistics,
    Slice,
    Step,
)
from protocol.tensors import DType, Tensor, tensor_from_tokens, tokens_from_tensor
from selector.task import Method
from selector.voting import tally, weights_of

CLOSE_TIMEOUT_S = 1.0
"""How long the end of a job waits for its stages; a stage that misses it frees the session when the link breaks."""


@dataclass(frozen=True, slots=True)
class StageRefusal:
    """Why a peer could not take its stage. `reason` is None where the peer could not be reached at all.

    `lagged`: it can be reached, but made no progress. `outdated`: its version cannot draw as the job asks, so that it
    may serve any stage but the last.
    """

    peer: PeerId
    reason: RefusalReason | None
    message: str
    lagged: bool = False
    outdated: bool = False


class RouteRejected(Exception):
    """Some stages did not open."""

    def __init__(self, rejections: Sequence[StageRefusal]) -> None:
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
        self.lagged = lost.lagged


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What every stage of a route is asked for.

    `methods`: by name, the coordinator's preference first. `ballot`: its own scores, once the stages' are known, and
    what all votes weigh. `agreed`: what the swarm has agreed about the model.
    """

    model: ModelId
    methods: Mapping[str, Method]
    ballot: Callable[[Sequence[Mapping[str, float]], Sequence[int] | None], Mapping[str, float]]
    context: Mapping[str, str | float]
    positions: int
    prefix: bytes
    sampling: Sampling
    background: bool = False
    agreed: Agreement | None = None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token as it arrived from the last stage."""

    position: int
    token: int
    finish_reason: FinishReason | None


class OpenRoute:
    """The stages of one job, and the receiver of the last stage's tokens. `close` follows every `open`."""

    def __init__(
        self,
        stages: Sequence[Stage],
        link_pool: LinkPool,
        opening: Opening,
        held: Mapping[Stage, SessionId] | None = None,
    ) -> None:
        """Open nothing yet. `held`: sessions of former attempts that stages may hold still; those are continued."""
        self.stages = tuple(stages)
        self.opening = opening
        self.answers: list[Opened | None] = [None] * len(stages)
        self.method: Method | None = None
        """What the votes came to, once it has begun."""
        self.starts: list[int] = []
        """Once it has begun: for each stage the first position whose row it computes."""
        self.leaving: set[PeerId] = set()
        """Peers on the route that would like to go."""
        self.rounds = 0
        """Times that the last stage has told tokens: fewer than tokens where guesses were right."""
        self.watch: StragglerDetector | None = None
        """How far its stages are, once it has begun."""
        self.began_s = 0.0
        self.begun_rows: tuple[int, ...] = ()
        """For each stage, the rows that it had to compute before the first token."""
        self.first_heard_s = 0.0
        """When the first token came, and the last that has come so far."""
        self.last_heard_s = 0.0
        self._continued = dict(held or {})
        self._gone: set[int] = set()
        self._link_pool = link_pool
        self._job = JobId(secrets.token_hex(16))
        self._sink = SessionId(self._job, len(stages))
        self._links: dict[int, OutboundLink] = {}
        self._unwatch: list[Callable[[], None]] = []
        self._sources: set[InboundLink] = set()
        # The last stage may send this many tokens and no more: the channel is full only if it lies.
        self._tokens_in, self._tokens = trio.open_memory_channel[SampledToken](opening.sampling.max_tokens)
        self._lost: SessionLost | None = None
        self._sending = trio.CancelScope()
        self._opening = trio.CancelScope()
        self._refused: set[int] = set()
        self._late: dict[PeerId, StageRefusal] = {}
        """Peers that were given up while they opened."""
        self._stalled: JobError | None = None

    def permits(self, peer: PeerId) -> bool:
        """Only the last stage tells the coordinator tokens."""
        return peer == self.stages[-1].peer

    def admit(self, part: Slice, dtype: DType, width: tuple[int, ...], link: InboundLink) -> bool:
        """Take no more at a time than the job's tokens."""
        if dtype is DType.INT32 and part.rows <= self.opening.sampling.max_tokens:
            return True
        self.lose(SessionLost(link.peer, link.peer, FailureReason.ENGINE, "sent what cannot be the job's tokens"))
        return False

    def receive(self, part: Slice, tensor: Tensor, link: InboundLink) -> None:
        """Take tokens of the last stage."""
        if self._lost or self._stalled:
            return
        self._sources.add(link)
        self.rounds += 1
        self.last_heard_s = trio.current_time()
        self.first_heard_s = self.first_heard_s or self.last_heard_s
        try:
            tokens = tokens_from_tensor(tensor)
            for offset, token in enumerate(tokens, 1):
                finish = part.finish_reason if offset == len(tokens) else None
                self._tokens_in.send_nowait(SampledToken(part.position + offset - 1, token, finish))
            if self.watch is not None and tokens:
                self.watch.token(part.position + len(tokens) - 1, self.last_heard_s)
        except (ValueError, trio.WouldBlock):
            self.lose(SessionLost(link.peer, link.peer, FailureReason.ENGINE, "sent what cannot be the job's tokens"))
        link.consumed(part.session, len(tensor.data))

    def lose(self, lost: SessionLost) -> None:
        """Take note that a stage is lost: the next `next_token` raises RouteLost."""
        self._lost = self._lost or lost
        self._sending.cancel()
        self._tokens_in.close()

    def stall(self, error: JobError) -> None:
        """Give the job up: once what has come is taken, `next_token` raises the error."""
        self._stalled = error
        self._tokens_in.close()

    @property
    def has_token(self) -> bool:
        """Whether a token has come that was not taken yet."""
        return self._tokens.statistics().current_buffer_used > 0

    def held(self) -> dict[Stage, SessionId]:
        """Return the sessions that stages have opened and, as far as is known, hold."""
        return {
            stage: SessionId(self._job, number)
            for number, stage in enumerate(self.stages)
            if self.answers[number] is not None and number not in self._gone
        }

    def _stage_lost(self, stage: int, lost: SessionLost) -> None:
        if lost.resumable and lost.reason is FailureReason.LEAVING:
            self.leaving.add(lost.reporter)
            return
        if not lost.resumable:
            self._gone.add(stage)
        self.lose(lost)

    def begin(self, tokens: Sequence[int]) -> Method:
        """Tally the votes, begin on every stage with what they come to, and return it.

        Every stage is told before this returns, so that no rows overtake it. Raises RouteRejected where no method is
        ready on all stages, RouteLost where a stage is gone.
        """
        method, ballots = self.agree()
        statement = self.opening.agreed.statement if self.opening.agreed and self.weighs() else None
        self.starts = plan_resume([_held(answer, method) for answer in self.answers if answer], len(tokens) - 1)
        forward_from = [*self.starts[1:], self.starts[-1]]
        last = len(self.stages) - 1
        try:
            for stage, link in sorted(self._links.items()):
                session = SessionId(self._job, stage)
                start = self.starts[stage]
                if stage == last and self.opening.sampling.needs_history:
                    link.send_history(session, tokens)
                link.begin(
                    Begin(
                        session=session,
                        method=method.name,
                        ballots=ballots,
                        start=start,
                        onward=forward_from[stage],
                        statement=statement,
                    ),
                )
        except LinkBroken as broken:
            raise RouteLost(SessionLost(broken.peer, broken.peer, FailureReason.DOWNSTREAM, str(broken))) from None
        self.method = method
        self.began_s = trio.current_time()
        self.begun_rows = tuple(len(tokens) - start for start in self.starts)
        return method

    def loads(self) -> list[Load]:
        """Return how busy each stage said it was when it opened."""
        return [answer.load if answer else Load() for answer in self.answers]

    def votes(self) -> list[Mapping[str, float]]:
        """Return what the stages voted, in order."""
        return [answer.votes if answer else {} for answer in self.answers]

    def weighs(self) -> bool:
        """Whether the votes count by the reputation of who gave them: where all stages stand by what we stand by."""
        agreed = self.opening.agreed
        return agreed is not None and all(answer and answer.statement == agreed.statement for answer in self.answers)

    def agree(self) -> tuple[Method, tuple[Ballot, ...]]:
        """Return what the votes come to, and the ballots: of the stages, then our own.

        Raises RouteRejected where no method is ready everywhere.
        """
        votes = self.votes()
        peers = [*(stage.peer for stage in self.stages), self._link_pool.peer_id]
        agreed = self.opening.agreed
        weights = weights_of(peers, agreed.weights) if agreed and self.weighs() else None
        names = tuple(self.opening.methods)
        ballots = tuple(
            Ballot(peer, tuple(scores.get(name) for name in names))
            for peer, scores in zip(peers, [*votes, self.opening.ballot(votes, weights)], strict=True)
        )
        name = tally(names, [ballot.scores for ballot in ballots], weights)
        if name is not None:
            return self.opening.methods[name], ballots
        why = "the peers of this route have no method in common that is ready and that the job admits"
        raise RouteRejected([StageRefusal(self.stages[-1].peer, RefusalReason.NOT_READY, why)])

    async def send_prompt(self, tokens: Sequence[int], hidden_size: int) -> None:
        """Send the prompt to the first stage, in chunks as the method says.

        Never more at a time than rows whose hidden states fit into one step later on the route. What the first stage
        holds goes first and is not computed: it looks at it to guess what follows.
        """
        if self.method is None:
            raise AssertionError("a prompt is sent once the route has begun")
        chunk_rows = max(1, min(MAX_STEP_BYTES // (4 * hidden_size), self.method.prefill_chunk or len(tokens)))
        begun = self.starts[0]
        starts = [*([0] if begun else []), *range(begun, len(tokens), chunk_rows)]
        first = SessionId(self._job, 0)
        try:
            with self._sending:
                for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
                    rows = tokens[start:end]
                    draws = 1 if end == len(tokens) else 0
                    part = Slice(session=first, position=start, rows=len(rows), draws=draws)
                    await self._links[0].send_step(Step(slices=(part,), tensor=tensor_from_tokens(rows)))
        except LinkBroken as broken:
            raise RouteLost(SessionLost(broken.peer, broken.peer, FailureReason.DOWNSTREAM, str(broken))) from None
        if self._lost is not None:
            raise RouteLost(self._lost)

    async def next_token(self) -> SampledToken:
        """Wait for the next token; raise RouteLost when a stage is lost."""
        try:
            return await self._tokens.receive()
        except trio.EndOfChannel:
            if self._stalled is not None:
                raise self._stalled from None
            if self._lost is None:
                raise AssertionError("the channel of tokens ends only when a stage is lost") from None
            raise RouteLost(self._lost) from None

    def mute(self) -> set[int]:
        """Return the stages whose version cannot say how far they are."""
        needed = minor_of(ProgressRequest(session=self._sink))
        return {stage for stage, link in self._links.items() if link.minor < needed}

    async def ask_progress(self, timeout_s: float) -> None:
        """Ask all stages how far they are, and tell the watch; one whose link says nothing at all in time is lost."""

        async def ask(stage: int, link: OutboundLink) -> None:
            answer = await link.request_progress(SessionId(self._job, stage), timeout_s)
            if answer is not None and self.watch is not None:
                told = Progress(answer.received, answer.computed, answer.sent)
                self.watch.report(stage, told, trio.current_time())

        async with trio.open_nursery() as nursery:
            for stage, link in self._links.items():
                nursery.start_soon(link.probe, timeout_s)
                nursery.start_soon(ask, stage, link)

    @property
    def job(self) -> JobId:
        """The id under which the stages know the job; a replay has another."""
        return self._job

    async def close(self) -> tuple[Closed, ...]:
        """Close every stage, within a bounded time even under cancellation; return what each has cost."""
        self._link_pool.registry.remove(self._sink)
        for unwatch in self._unwatch:
            unwatch()
        for source in self._sources:
            source.forget(self._sink)
        sessions = [SessionId(self._job, stage) for stage in range(len(self.stages))]
        closed = [Closed(session=session, statistics=SessionStatistics()) for session in sessions]

        async def close_stage(stage: int) -> None:
            closed[stage] = await self._links[stage].close(SessionId(self._job, stage))

        with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S, shield=True):
            async with trio.open_nursery() as nursery:
                for stage in self._links:
                    nursery.start_soon(close_stage, stage)
        return tuple(closed)

    async def open(self) -> None:
        """Open all stages at once. Raises RouteRejected with everything that is against it."""
        rejections: dict[int, StageRefusal] = {}

        async def open_stage(stage: int) -> None:
            peer = self.stages[stage].peer
            try:
                link = await self._link_pool.link_to(peer)
                message = self._open_message(stage)
                if minor_of(message) > link.minor:
                    why = f"speaks version 1.{link.minor} of the job protocol, which cannot draw as the job asks"
                    rejections[stage] = StageRefusal(peer, RefusalReason.UNABLE, why, outdated=True)
                    self._refused.add(stage)
                    return
                self._links[stage] = link
                self._unwatch.append(link.watch(SessionId(self._job, stage), partial(self._stage_lost, stage)))
                self.answers[stage] = await link.open(message)
            except SessionRefused as refused:
                rejections[stage] = StageRefusal(peer, refused.reason, str(refused))
                self._refused.add(stage)
                del self._links[stage]
            except LinkBroken as broken:
                rejections[stage] = StageRefusal(peer, None, str(broken))
                self._refused.add(stage)

        self._link_pool.registry.add(self._sink, self)
        with self._opening:
            async with trio.open_nursery() as nursery:
                for stage in range(len(self.stages)):
                    nursery.start_soon(open_stage, stage)
        if self._late:
            raise RouteRejected([*self._late.values(), *(r for r in rejections.values() if r.reason)])
        if rejections:
            raise RouteRejected([rejections[stage] for stage in sorted(rejections) if self._is_own(stage, rejections)])

    def opening_late(self) -> set[PeerId]:
        """Return who keeps the opening waiting: of stages without an answer those that do not wait for another."""
        late = {
            stage for stage in range(len(self.stages)) if self.answers[stage] is None and stage not in self._refused
        }
        # A stage answers once it is linked with the next, and the last with the first.
        own = {stage for stage in late if (stage + 1) % len(self.stages) not in late}
        return {self.stages[stage].peer for stage in own or late}

    def give_up_opening(self, rejection: StageRefusal) -> None:
        """Take a stage that has not answered for one that refuses; `open` then raises RouteRejected."""
        self._late[rejection.peer] = rejection
        self._opening.cancel()

    def _is_own(self, stage: int, rejections: Mapping[int, StageRefusal]) -> bool:
        """Whether a rejection is the stage's own matter: that it cannot reach one whom nobody reaches is not."""
        following = rejections.get((stage + 1) % len(self.stages))
        is_cut_off = rejections[stage].reason is RefusalReason.UNREACHABLE
        return not (is_cut_off and following is not None and following.reason is None)

    def _open_message(self, stage: int) -> Open:
        opening = self.opening
        is_last = stage == len(self.stages) - 1
        before = self.stages[stage - 1].peer  # of the first stage: the last one, which feeds tokens back
        return Open(
            session=SessionId(self._job, stage),
            model=opening.model,
            blocks=self.stages[stage].blocks,
            methods=tuple(opening.methods),
            positions=opening.positions,
            context=opening.context,
            prefix=opening.prefix,
            upstream=(before,),
            downstream=None if is_last else self.stages[stage + 1].peer,
            feedback=self.stages[0].peer if is_last else None,
            sampling=opening.sampling if is_last else None,
            continues=self._continued.get(self.stages[stage]),
            background=opening.background,
        )


def _held(answer: Opened, method: Method) -> ResumePoint:
    """Return what a stage has of the session: what it calculated for a former attempt, or what is in its cache."""
    if answer.held:
        return ResumePoint(answer.held, answer.kept_from)
    cached = answer.cached.get(method.kv_key, 0) if method.prefix_cache else 0
    return ResumePoint(cached, cached)
