"""The stage server of this node: serves spans, and opens, begins and closes the sessions of coordinators on them.

Admission is in `session_admission`, the agreement on a method in `voting`; `session` and `span` process the rows.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.engine.base import Engine
from node.engine.interface import BadRequest, EngineError, Variant
from node.links.inbound_link import InboundLink
from node.links.link_pool import LinkPool
from node.network.interface import Network
from node.stages.background_allowance import USUAL_SHARE, BackgroundAllowance
from node.stages.dials_for_others import DialsForOthers
from node.stages.draft_model import DraftModel
from node.stages.peer_penalties import PeerPenalties, SessionTotals, StagePeerStatistics
from node.stages.replay_buffer import REPLAY_BYTES
from node.stages.scheduler import PolicyController
from node.stages.session import StageSession
from node.stages.session_admission import SessionAdmission
from node.stages.session_report import NoStageObserver, StageObserver
from node.stages.span import Span, SpanTable
from node.stages.speculation import Drafter, PromptLookup
from node.stages.voter import Agreement, Voter, tally_fault
from protocol.announcements import ServedSpan
from protocol.identity import ModelId, PeerId, SessionId
from protocol.measurements import StageObservation
from protocol.messages import Begin, Closed, FailureReason, Open, Opened, Refused, SessionStatistics, TokenHistory
from protocol.observations import countersign
from protocol.reports import Progress, Timings
from selector.task import Method, parse_method

WITHDRAWAL_S = 5.0
"""How long a withdrawn span admits sessions of peers that have not received the news yet."""


class StageServer:
    """All spans of this node. Implements `SessionHandler`."""

    def __init__(
        self,
        network: Network,
        agent: str,
        *,
        private_key: Ed25519PrivateKey,
        hardware: Callable[[], str],
        voter: Voter,
        controller: Callable[[], PolicyController],
        agreed: Callable[[ModelId], Agreement | None],
        background: BackgroundAllowance | None = None,
    ) -> None:
        """`private_key` countersigns what jobs cost here, `hardware` names what they ran on.

        `voter` predicts the cost of methods; `controller` makes, for each span, what decides over its policy; `agreed`
        returns what the swarm has agreed about a model. `background`: what measurements of other peers may take.
        """
        self.link_pool = LinkPool(network, agent, self)
        self.observer: StageObserver = NoStageObserver()
        """Of the spans that are served from now on."""
        self._table = SpanTable()
        self._records = PeerPenalties(self.link_pool.peer_id)
        self._background = background or BackgroundAllowance(USUAL_SHARE)
        dials = DialsForOthers(network)
        self._admission = SessionAdmission(
            self._table, self.link_pool, dials, self._records, voter, agreed, self._background
        )
        self._controller = controller
        self._private_key = private_key
        self._hardware = hardware
        self._session_ended = trio.lowlevel.ParkingLot()
        self.served_s = 0.0
        """Seconds of computing for users' jobs since the start, measurements apart."""

    # What is served

    @property
    def is_draining(self) -> bool:
        """Whether this node is about to leave."""
        return self._table.is_draining

    def spans(self) -> tuple[Span, ...]:
        """Return the spans that are served now."""
        return tuple(self._table.spans.values())

    def served_spans(self) -> tuple[ServedSpan, ...]:
        """Return the spans that heartbeats announce; none once this node is about to leave."""
        return tuple(
            ServedSpan(model=span.info.model, blocks=span.info.blocks, load=span.load())
            for span in self.spans()
            if not self.is_draining and span not in self._table.withdrawn
        )

    def peer_statistics(self) -> Mapping[PeerId, StagePeerStatistics]:
        """Return what each peer has requested of the stages here and holds now; bounded to recent peers."""
        found = dict(self._records.statistics())
        for session in self._table.sessions():
            peer = session.opened_by.peer
            so_far = found.get(peer, StagePeerStatistics())
            found[peer] = replace(
                so_far,
                sessions=so_far.sessions + 1,
                positions=so_far.positions + session.state.reserved_positions,
                bytes=so_far.bytes + session.held_bytes,
            )
        return found

    def session_totals(self) -> SessionTotals:
        """Return what the other peers together have requested of the stages here since the start."""
        return self._records.totals

    async def serve(
        self,
        engine: Engine,
        replay_bytes: int = REPLAY_BYTES,
        *,
        task_status: trio.TaskStatus[Span] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve an engine's span until cancelled, or until its worker is gone; sessions that are left then fail.

        The latter raises EngineCrashed, in a group. `replay_bytes`: for the replay buffers of its sessions.
        """
        spans, key = self._table.spans, (engine.info.model, engine.info.blocks)
        if key in spans:
            raise EngineError(f"blocks {engine.info.blocks} are served already")
        span = spans[key] = Span(
            engine,
            self.link_pool,
            self._session_ended,
            self._controller(),
            replay_bytes,
            self._records,
            self.observer,
            self._account,
        )
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(span.run)
                task_status.started(span)
        finally:
            del spans[key]
            self._table.withdrawn.discard(span)
            self._table.closed.discard(span)

    async def run_draft_model(
        self,
        engine: Engine,
        variant: Variant,
        models: Collection[ModelId],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Draft with the engine of a whole model for others, until cancelled, or until its worker is gone.

        `models`: those with the same tokenizer. A worker that is gone raises EngineCrashed, in a group.
        """
        draft_model = DraftModel(engine, variant, self.link_pool.peer_id)
        async with trio.open_nursery() as nursery:
            await nursery.start(draft_model.run)
            self._table.draft_models |= dict.fromkeys(models, draft_model)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self.register_draft(models)

    def register_draft(self, models: Iterable[ModelId]) -> None:
        """Announce that methods with a draft model will be offered for these models, and are not yet."""
        self._table.draft_models |= dict.fromkeys(models)

    # What is about to go

    def withdraw_span(self, span: Span) -> None:
        """Leave a span, which is about to go, out of announcements."""
        self._table.withdrawn.add(span)

    def restore_span(self, span: Span) -> None:
        """Announce a withdrawn span and admit sessions to it again, as it does not go after all."""
        self._table.withdrawn.discard(span)
        self._table.closed.discard(span)

    async def drain_span(self, span: Span) -> None:
        """Wait until a withdrawn span has no session left; after a while it admits no new ones."""
        await trio.sleep(WITHDRAWAL_S)
        self._table.closed.add(span)
        while span.sessions:
            await self._session_ended.park()

    def start_draining(self) -> None:
        """Admit no new sessions: this node is about to leave."""
        self._table.is_draining = True

    def migrate_sessions(self) -> None:
        """Ask the coordinators of all sessions, except our own, to go on elsewhere: this node is about to leave."""
        for session in self._table.sessions():
            self._ask_to_leave(session)

    def _ask_to_leave(self, session: StageSession) -> None:
        if session.method is not None and session.opened_by.peer != self.link_pool.peer_id:
            session.opened_by.reroute(session.wire_id, FailureReason.LEAVING, "this peer is about to leave")

    async def wait_idle(self) -> None:
        """Wait until no session is open here."""
        while any(span.sessions for span in self.spans()):
            await self._session_ended.park()

    # What coordinators request

    async def open(self, message: Open, link: InboundLink) -> Opened | Refused:
        """Open a session, or refuse it; see SessionAdmission."""
        return await self._admission.open(message, link)

    def add_history(self, message: TokenHistory, link: InboundLink) -> None:
        """Take tokens so far of a session that this link opened and that has not begun."""
        if found := self._find_unbegun(message.session, link):
            span, session = found
            if fault := session.add_history(message.tokens):
                span.fail(session, FailureReason.ENGINE, fault)

    async def begin(self, message: Begin, link: InboundLink) -> None:
        """Begin a session that this link opened with the method that the ballots come to, once that is verified."""
        if (found := self._find_unbegun(message.session, link)) is None:
            return  # lost meanwhile, which was reported
        span, session = found
        span.beginning.add(session.id)
        try:
            await self._begin(span, session, message, link)
        finally:
            span.beginning.discard(session.id)

    async def _begin(self, span: Span, session: StageSession, message: Begin, link: InboundLink) -> None:
        if fault := tally_fault(
            message,
            own_ballot=(self.link_pool.peer_id, session.votes),
            coordinator=link.peer,
            methods=session.request.methods,
            agreement=session.agreement,
        ):
            span.fail(session, FailureReason.TALLY, fault)
            return
        method = parse_method(message.method)
        reason = FailureReason.ENGINE
        try:
            if (fault := _history_fault(session, message)) is None:
                await session.begin_on_engine(span.engine, method)
                fault = None if session.is_ended else _start_fault(session, message, method)
        except BadRequest as error:
            fault, reason = str(error), FailureReason.REQUEST
        except EngineError as error:
            fault = str(error)
        if fault is not None:  # an engine's error may have no text
            span.fail(session, reason, fault)
            return
        drafter = await self._drafter(session, method)
        if not session.is_ended:
            session.begin(message, method, drafter)
            if self.is_draining:
                self._ask_to_leave(session)
            return
        if drafter is not None:
            drafter.close()
        span.start_freeing(session.id)

    def _find_unbegun(self, session: SessionId, link: InboundLink) -> tuple[Span, StageSession] | None:
        found = self._table.find(session, link)
        return found if found and found[1].method is None else None

    async def _drafter(self, session: StageSession, method: Method) -> Drafter | None:
        """Return the drafter of a session on a first stage; None also where the draft model is gone."""
        if not session.info.is_first or method.drafter == "off":
            return None
        if method.drafter == "ngram":
            return PromptLookup()
        model = self._table.draft_models.get(session.info.model)
        if model is None:
            return None
        peer, positions = session.opened_by.peer, session.request.positions
        return await model.open(session.id, peer, positions, session.info.vocabulary_size, session.prefix)

    def progress(self, session: SessionId, link: InboundLink) -> Progress:
        """Return how far a session that this link opened has come; nowhere where there is none."""
        if found := self._table.find(session, link):
            return found[1].progress()
        return Progress(session=session, received=0, computed=0, sent=0)

    def timings(self, session: SessionId, link: InboundLink) -> Timings:
        """Return the timing of a session that this link opened since the last call; nothing where there is none."""
        if found := self._table.find(session, link):
            return found[1].collect_timings()
        return Timings(session=session, clock_s=trio.current_time())

    async def close(self, session: SessionId, link: InboundLink) -> Closed:
        """Free a session that this link opened and return what it cost, signed, as its coordinator may publish it."""
        if (found := self._table.find(session, link)) is None:
            return Closed(session=session, statistics=SessionStatistics())
        span, closing = found
        await closing.admitted.wait()
        span.end(closing)
        statistics = closing.state.counters.statistics()
        observed = StageObservation(
            peer=self.link_pool.peer_id, blocks=closing.info.blocks, hardware=self._hardware(), statistics=statistics
        )
        if closing.method is not None:
            observed = countersign(
                observed,
                job=session.job,
                observer=closing.opened_by.peer,
                model=closing.info.model,
                method=closing.method.name,
                private_key=self._private_key,
            )
        return Closed(
            session=session,
            statistics=observed.statistics,
            hardware=observed.hardware,
            countersignature=observed.countersignature,
        )

    def link_broken(self, link: InboundLink) -> None:
        """Free every session that was opened over the link: its coordinator is gone."""
        for span in self.spans():
            for session in tuple(span.sessions.values()):
                if session.opened_by is link:
                    span.end(session, "disconnected")

    def _account(self, session: StageSession) -> None:
        """Count what a session computed that has ended."""
        compute_s = session.state.counters.compute_s
        if not session.request.background:
            self.served_s += compute_s
            self._background.earn(compute_s)
        elif session.opened_by.peer != self.link_pool.peer_id:
            self._background.charge(compute_s)


def _history_fault(session: StageSession, message: Begin) -> str | None:
    """Return why the history of a session does not suffice, if it does not."""
    if session.needs_history and session.known_tokens <= message.start:
        return (
            f"draws depend on the history, of which {session.known_tokens} tokens were sent and "
            f"{message.start} positions are held"
        )
    return None


def _start_fault(session: StageSession, message: Begin, method: Method) -> str | None:
    """Return why a session cannot start where it is to, if it cannot."""
    state = session.state
    if state.method is not None and state.method.without_speculation != method.without_speculation:
        return f"what was calculated by {state.method.name} cannot be continued by another method"
    if message.start > state.computed:
        return f"{message.start} positions were to be held, {state.computed} are"
    is_last = session.request.sampling is not None
    if not is_last and message.onward < message.start and message.onward < state.replay_from:
        return f"outputs from position {message.onward} on were to be retained, those from {state.replay_from} on are"
    return None
