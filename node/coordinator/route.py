"""An open route: the sessions of one job on all its stages, and the receiver of its tokens."""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import trio

from node.coordinator.method_choice import Votes
from node.coordinator.refusals import RouteRejected, StageRefusal
from node.coordinator.route_output import LastStageOutput, OutputReader, PromptScores
from node.coordinator.session_request import SessionRequest
from node.coordinator.straggler_detector import Progress, StragglerDetector
from node.coordinator.submission import JobError
from node.links.base_link import LinkBroken
from node.links.inbound_link import InboundLink
from node.links.link_pool import LinkPool
from node.links.outbound_link import OutboundLink, SessionLost, SessionRefused
from node.stages.replay_buffer import ResumePoint, plan_resume
from node.stages.voter import TableVersion
from protocol.codec import adapted, minor_of
from protocol.identity import JOB_NONCE_BYTES, PeerId, SessionId, Stage, job_id_of
from protocol.limits import MAX_STEP_BYTES
from protocol.messages import Ballot, Begin, Closed, FailureReason, Load, Open, Opened, RefusalReason, Slice, Step
from protocol.reports import ProgressRequest
from protocol.tensors import DType, Tensor, tensor_from_tokens
from selector.task import Method
from selector.voting import tally

CLOSE_TIMEOUT_S = 1.0
"""How long the end of a job waits for its stages, beside what slow links take.

A stage that misses it frees the session when the link breaks, and has not stated what the job cost there.
"""


class RouteLost(Exception):
    """A stage was lost."""

    def __init__(self, lost: SessionLost) -> None:
        super().__init__(f"{lost.blamed}: {lost.message}")
        self.session = lost


class OpenRoute:
    """The stages of one job, and the receiver of the last stage's tokens. `close` follows every `open`."""

    def __init__(
        self,
        stages: Sequence[Stage],
        link_pool: LinkPool,
        request: SessionRequest,
        held: Mapping[Stage, SessionId] | None = None,
    ) -> None:
        """Prepare a route. `held`: sessions of previous routes that stages may still hold; those are continued."""
        self.stages = tuple(stages)
        self.request = request
        self.answers: list[Opened | None] = [None] * len(stages)
        self.method: Method | None = None
        """The method agreed by the votes, once the route has begun;"""
        self.starts: list[int] = []
        """then also for each stage the first position whose row it computes,"""
        self.begun_rows: tuple[int, ...] = ()
        """the rows that it computes before the first token,"""
        self.detector: StragglerDetector | None = None
        """and the progress of all stages."""
        self.on_tokens: Callable[[int, int, float], None] = lambda position, tokens, now_s: None
        """Called with the position and the number of tokens that arrived, and the time."""
        self.is_kept_open = False
        """Whether stages keep their sessions until `close`, though the output is complete."""
        self.leaving: set[PeerId] = set()
        """Peers on the route that want to leave."""
        self.rounds = 0
        """Messages with tokens from the last stage: fewer than tokens where speculative decoding succeeds."""
        self.began_s = 0.0
        self.first_token_s = 0.0
        self.last_token_s = 0.0
        self._continued = dict(held or {})
        self._gone: set[int] = set()
        self._link_pool = link_pool
        self.job = job_id_of(link_pool.peer_id, secrets.token_bytes(JOB_NONCE_BYTES))
        """The job id on the wire; a replay has another."""
        self._sink = SessionId(self.job, len(stages))
        self._links: dict[int, OutboundLink] = {}
        self._unwatch: list[Callable[[], None]] = []
        self._sources: set[InboundLink] = set()
        self._reader = OutputReader(request.sampling, request.vocabulary_size)
        # The last stage may send this many outputs and no more: the channel is full only if it lies.
        self._outputs_in, self._outputs = trio.open_memory_channel[LastStageOutput](self._reader.most)
        self._lost: SessionLost | None = None
        self._sending = trio.CancelScope()
        self._opening = trio.CancelScope()
        self._refused: set[int] = set()
        self._late: dict[PeerId, StageRefusal] = {}
        """Peers that were given up while they opened."""
        self._stalled: JobError | None = None

    def permits(self, peer: PeerId) -> bool:
        """Return whether a peer may send tokens: only the last stage may."""
        return peer == self.stages[-1].peer

    def admit(self, part: Slice, dtype: DType, width: tuple[int, ...], link: InboundLink) -> bool:
        """Return whether a message has the form of the job's output; if not, its sender is lost."""
        self._sources.add(link)  # also of what is not taken the link has an entry, which `close` removes
        if (dtype, width) == self.request.output_form and part.rows <= self._reader.most:
            return True
        self.lose(SessionLost(link.peer, link.peer, FailureReason.ENGINE, "sent invalid output"))
        return False

    def receive(self, part: Slice, tensor: Tensor, link: InboundLink) -> None:
        """Receive what the last stage sends: tokens, scores, or an embedding.

        Once that is complete the stages free the session, however slowly the client reads it.
        """
        if self._lost or self._stalled or self.is_complete:
            return
        self.last_token_s = now_s = trio.current_time()
        try:
            outputs = self._reader.read(part, tensor, now_s)
            drawn = sum(not isinstance(output, PromptScores) for output in outputs)
            if drawn:
                self.rounds += 1
                self.on_tokens(part.position + tensor.rows - drawn, drawn, now_s)
            if not self.rounds or not self.first_token_s:  # where no text follows, the last of the scores counts
                self.first_token_s = now_s
            for output in outputs:
                self._outputs_in.send_nowait(output)
            if self.detector is not None and tensor.rows:
                self.detector.token(part.position + tensor.rows - 1, now_s, is_fed_back=drawn > 0)
        except (ValueError, trio.WouldBlock):
            self.lose(SessionLost(link.peer, link.peer, FailureReason.ENGINE, "sent invalid output"))
        else:
            if self._reader.is_complete and not self.is_kept_open:
                for stage, opened in self._links.items():
                    opened.send_close(SessionId(self.job, stage))
        link.consumed(part.session, len(tensor.data))

    def lose(self, lost: SessionLost) -> None:
        """Record that a stage is lost: the next `next_output` raises RouteLost."""
        self._lost = self._lost or lost
        self._sending.cancel()
        self._outputs_in.close()

    def stall(self, error: JobError) -> None:
        """Give the job up: `next_output` raises the error after the tokens that have come."""
        self._stalled = error
        self._outputs_in.close()

    @property
    def is_complete(self) -> bool:
        """Whether all output has arrived, though maybe nobody has taken it yet."""
        return self._reader.is_complete

    @property
    def unread(self) -> int:
        """How many tokens are waiting."""
        return self._outputs.statistics().current_buffer_used

    @property
    def has_output(self) -> bool:
        """Whether a token is waiting."""
        return self.unread > 0

    def held(self) -> dict[Stage, SessionId]:
        """Return the sessions that stages have opened and, as far as is known, still hold."""
        return {
            stage: SessionId(self.job, number)
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
        """Tally the votes, begin on every stage with the method that they agree on, and return it.

        Every stage has the message before this returns, so that no rows overtake it. Raises RouteRejected where no
        method is ready on all stages, RouteLost where a stage is gone.
        """
        method, ballots = self.agree()
        agreed = self.request.agreed
        statement = agreed.statement if agreed and self.is_weighted() else None
        self.starts = plan_resume(list(self._resume_points(method)), len(tokens) - 1)
        forward_from = [*self.starts[1:], self.starts[-1]]
        last = len(self.stages) - 1
        try:
            for number, link in sorted(self._links.items()):
                session = SessionId(self.job, number)
                if number == last and self.request.sampling.needs_history:
                    link.send_history(session, tokens)
                begin = Begin(
                    session=session,
                    method=method.name,
                    ballots=ballots,
                    start=self.starts[number],
                    onward=forward_from[number],
                    statement=statement,
                )
                link.begin(begin)
        except LinkBroken as broken:
            raise _lost_at(broken) from None
        self.method = method
        self.began_s = trio.current_time()
        self.begun_rows = tuple(len(tokens) - start for start in self.starts)
        self._reader.begin(tokens)
        return method

    def _resume_points(self, method: Method) -> Iterator[ResumePoint]:
        """Yield what each stage has of the job: computed for a previous route, or in its prefix cache.

        A stage that no session is continued at has computed nothing, whatever it says.
        """
        for stage, answer in zip(self.stages, self.answers, strict=True):
            if answer is None:
                continue
            if answer.held and stage in self._continued:
                yield ResumePoint(answer.held, answer.kept_from)
            else:
                cached = answer.cached.get(method.kv_key, 0) if method.prefix_cache else 0
                yield ResumePoint(cached, cached)

    def loads(self) -> list[Load]:
        """Return each stage's load when it opened."""
        return [answer.load if answer else Load() for answer in self.answers]

    def is_weighted(self) -> bool:
        """Whether reputation weighs the votes: where all stages follow the same agreed statement as this node."""
        agreed = self.request.agreed
        return agreed is not None and all(answer and answer.statement == agreed.statement for answer in self.answers)

    @property
    def learned_from(self) -> TableVersion | None:
        """The agreed table that all votes, our own included, were learned from; None where they differ."""
        table = self.request.choice.learned_from
        digests = {answer.table_digest if answer else None for answer in self.answers}
        return table if table is not None and digests == {table.digest} else None

    def agree(self) -> tuple[Method, tuple[Ballot, ...]]:
        """Return the method that the votes agree on, and all ballots, our own last. Raises RouteRejected for none."""
        votes = [answer.votes if answer else {} for answer in self.answers]
        peers = [*(stage.peer for stage in self.stages), self._link_pool.peer_id]
        agreed, names = self.request.agreed if self.is_weighted() else None, tuple(self.request.methods)

        def weigh(votes: Votes) -> Sequence[int] | None:
            return agreed.weigh(names, zip(peers, votes, strict=True)) if agreed else None

        votes.append(self.request.choice.ballot(votes, weigh))
        weights = weigh(votes)
        ballots = tuple(
            Ballot(peer, tuple(scores.get(name) for name in names)) for peer, scores in zip(peers, votes, strict=True)
        )
        name = tally(names, [ballot.scores for ballot in ballots], weights)
        if name is not None:
            return self.request.methods[name], ballots
        why = "the peers of this route have no method in common that is ready and that the job admits"
        raise RouteRejected([StageRefusal(self.stages[-1].peer, RefusalReason.NOT_READY, why)])

    async def send_prompt(self, tokens: Sequence[int], hidden_size: int) -> None:
        """Send the prompt to the first stage, in the method's chunks.

        A chunk's hidden states fit into one step later on the route. Positions that the first stage holds go first and
        are not computed: speculative decoding looks at them.
        """
        if self.method is None:
            raise AssertionError("a prompt is sent once the route has begun")
        chunk_rows = max(1, min(MAX_STEP_BYTES // (4 * hidden_size), self.method.prefill_chunk or len(tokens)))
        begun = self.starts[0]
        starts = [*([0] if begun else []), *range(begun, len(tokens), chunk_rows)]
        first = SessionId(self.job, 0)
        try:
            with self._sending:
                for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
                    rows = tokens[start:end]
                    draws = 1 if end == len(tokens) and self.request.sampling.max_tokens else 0
                    part = Slice(session=first, position=start, rows=len(rows), draws=draws)
                    await self._links[0].send_step(Step(slices=(part,), tensor=tensor_from_tokens(rows)))
        except LinkBroken as broken:
            raise _lost_at(broken) from None
        if self._lost is not None:
            raise RouteLost(self._lost)

    async def next_output(self) -> LastStageOutput:
        """Wait for the next token, or the embedding; raise RouteLost when a stage is lost."""
        try:
            return await self._outputs.receive()
        except trio.EndOfChannel:
            if self._stalled is not None:
                raise self._stalled from None
            if self._lost is None:
                raise AssertionError("the channel of tokens ends only when a stage is lost") from None
            raise RouteLost(self._lost) from None

    def linked_stages(self) -> list[tuple[Stage, SessionId, OutboundLink]]:
        """Return the stages that this node is linked to, with the sessions there."""
        return [(self.stages[number], SessionId(self.job, number), link) for number, link in self._links.items()]

    def unreporting(self) -> set[int]:
        """Return the stages whose version cannot report progress."""
        needed = minor_of(ProgressRequest(session=self._sink))
        return {stage for stage, link in self._links.items() if link.minor < needed}

    async def ask_progress(self, timeout_s: float) -> None:
        """Ask all stages for their progress; one whose link does not answer in time is lost."""

        async def ask(stage: int, link: OutboundLink) -> None:
            answer = await link.request_progress(SessionId(self.job, stage), timeout_s)
            if answer is not None and self.detector is not None:
                progress = Progress(answer.received, answer.computed, answer.sent)
                self.detector.report(stage, progress, trio.current_time())

        async with trio.open_nursery() as nursery:
            for stage, link in self._links.items():
                nursery.start_soon(link.probe, timeout_s)
                nursery.start_soon(ask, stage, link)

    async def close(self, *, is_done: bool = False) -> tuple[Closed | None, ...]:
        """Close every stage, within a bounded time even under cancellation; return what each one answered in it.

        `is_done`: the answers are needed, so that slow links get more time.
        """
        self._link_pool.receivers.pop(self._sink, None)
        for unwatch in self._unwatch:
            unwatch()
        for source in self._sources:
            source.forget(self._sink)
        closed: list[Closed | None] = [None] * len(self.stages)

        async def close_stage(stage: int) -> None:
            closed[stage] = await self._links[stage].close(SessionId(self.job, stage))

        slack_s = max((link.answer_slack_s for link in self._links.values()), default=0.0) if is_done else 0.0
        with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S + slack_s, shield=True):
            async with trio.open_nursery() as nursery:
                for stage in self._links:
                    nursery.start_soon(close_stage, stage)
        return tuple(closed)

    async def open(self) -> None:
        """Open all stages at once. Raises RouteRejected with all refusals."""
        refusals: dict[int, StageRefusal] = {}

        async def open_stage(stage: int) -> None:
            peer = self.stages[stage].peer
            try:
                link = await self._link_pool.link_to(peer)
                message = adapted(self._open_message(stage), link.minor)
                if minor_of(message) > link.minor:
                    why = f"speaks version 1.{link.minor} of the job protocol, which lacks a sampling option of the job"
                    refusals[stage] = StageRefusal(peer, RefusalReason.UNABLE, why, outdated=True)
                    self._refused.add(stage)
                    return
                self._links[stage] = link
                self._unwatch.append(link.watch(SessionId(self.job, stage), partial(self._stage_lost, stage)))
                self.answers[stage] = await link.open(message)
            except SessionRefused as refused:
                refusals[stage] = StageRefusal(
                    peer, refused.reason, str(refused), most_positions=refused.most_positions, load=refused.load
                )
                self._refused.add(stage)
                del self._links[stage]
            except LinkBroken as broken:
                refusals[stage] = StageRefusal(peer, None, str(broken))
                self._refused.add(stage)

        self._link_pool.receivers[self._sink] = self
        with self._opening:
            async with trio.open_nursery() as nursery:
                for stage in range(len(self.stages)):
                    nursery.start_soon(open_stage, stage)
        if self._late:
            raise RouteRejected([*self._late.values(), *(r for r in refusals.values() if r.reason)])
        if refusals:
            # A stage whose next one cannot be reached refuses for that one, not for itself.
            dead = {stage for stage, refusal in refusals.items() if refusal.reason is None}
            cut_off = {stage for stage, refusal in refusals.items() if refusal.reason is RefusalReason.UNREACHABLE}
            own = sorted(
                stage for stage in refusals if stage not in cut_off or (stage + 1) % len(self.stages) not in dead
            )
            raise RouteRejected([refusals[stage] for stage in own])

    def opening_late(self) -> set[PeerId]:
        """Return the peers that delay the opening: of stages without an answer those that do not wait for another."""
        late = {
            stage for stage in range(len(self.stages)) if self.answers[stage] is None and stage not in self._refused
        }
        # A stage answers once it is linked with the next, and the last with the first.
        own = {stage for stage in late if (stage + 1) % len(self.stages) not in late}
        return {self.stages[stage].peer for stage in own or late}

    def give_up_opening(self, refusal: StageRefusal) -> None:
        """Treat a stage that has not answered as one that refuses; `open` then raises RouteRejected."""
        self._late[refusal.peer] = refusal
        self._opening.cancel()

    def _open_message(self, stage: int) -> Open:
        request = self.request
        is_last = stage == len(self.stages) - 1
        before = self.stages[stage - 1].peer  # of the first stage: the last one, which feeds tokens back
        return Open(
            session=SessionId(self.job, stage),
            model=request.model,
            blocks=self.stages[stage].blocks,
            methods=tuple(request.methods),
            positions=request.positions,
            context=request.context.values(),
            stage_facts=request.context.stage_facts,
            prefix=request.prefix,
            upstream=(before,),
            downstream=None if is_last else self.stages[stage + 1].peer,
            feedback=self.stages[0].peer if is_last else None,
            sampling=request.sampling if is_last else None,
            continues=self._continued.get(self.stages[stage]),
            background=request.background,
            request_id=request.request_id,
            trace_parent=request.trace_parent,
        )


def _lost_at(broken: LinkBroken) -> RouteLost:
    return RouteLost(SessionLost(broken.peer, broken.peer, FailureReason.DOWNSTREAM, str(broken)))
