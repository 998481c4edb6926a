"""A span served here: an engine, its sessions, and the steps it takes for them.

Rows wait in the scheduler, pass through the engine in batches, and leave for the next stage through the sessions'
outboxes. The last span draws tokens, sends them to the coordinator, and starts the next round at the first stage, so
that the coordinator is not on the path from one token to the next.
"""

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress

import structlog
import trio

from node.engine.base import Engine
from node.engine.interface import (
    PAGE_POSITIONS,
    EngineError,
    SliceFault,
    SpanInfo,
    StepFailed,
    StepResult,
    Variant,
    variant_of,
)
from node.links.inbound_link import InboundLink
from node.links.link_pool import LinkPool
from node.stages.draft_model import DraftModel
from node.stages.engine_loop import EngineLoop
from node.stages.fair_share import UnmetDemand
from node.stages.local_id import local_id
from node.stages.outbox import Output, send_outputs
from node.stages.peer_penalties import Charge, PeerPenalties
from node.stages.replay_buffer import ReplayMemory
from node.stages.scheduler import PolicyController, Scheduler, Work
from node.stages.session import StageSession
from node.stages.session_report import SessionReport, StageObserver
from node.stages.variant_builder import VariantBuilder
from node.util.signal import Signal
from protocol.identity import BlockRange, ModelId, PeerId, SessionId
from protocol.messages import FailureReason, Load
from selector.task import Method, MethodError, parse_method

IDLE_LIMIT_S = 300.0
"""A session whose coordinator lives, but that gets no rows for this long, is closed; not while rows of it wait here."""

SHORT_IDLE_LIMIT_S = 95.0
"""The same while KV memory is short, for sessions of the peer that holds most of it.

Sessions that wait for another route are idle, too, and coordinators look for one for 90 s."""

SHORT_TOTAL_S = 1800.0
"""For so long in all such a session may be idle, or wait for another stage: a row now and then would hold memory."""

BEGIN_LIMIT_S = 10.0
"""A session whose Begin has not arrived this long after it was opened is closed; if it has, after IDLE_LIMIT_S."""

EXPIRY_ROUND_S = 1.0
"""How often sessions are checked for these limits."""

IDLE_MOMENT_S = 1.0
"""Without a session for so long a span counts as idle."""

_logger = structlog.get_logger(__name__)


class Span(EngineLoop):
    """A span served here. Implements `SpanPort`."""

    def __init__(
        self,
        engine: Engine,
        link_pool: LinkPool,
        session_ended: trio.lowlevel.ParkingLot,
        controller: PolicyController,
        replay_bytes: int,
        records: PeerPenalties,
        observer: StageObserver,
        account: Callable[[StageSession], None],
    ) -> None:
        """`account` is called once for what a session, and those that it continued, computed here."""
        super().__init__(engine)
        self._observer = observer
        self._account = account
        self.sessions: dict[SessionId, StageSession] = {}
        self.beginning: set[SessionId] = set()
        """Sessions whose Begin has arrived: the engine may have to load something for them."""
        self.variants = VariantBuilder(engine, self._variants_in_use, self._wait_idle)
        self.unmet_demand = UnmetDemand()
        """KV pages that peers were refused."""
        self.replay_memory = ReplayMemory(replay_bytes)
        self._records = records
        self._controller = controller
        self.scheduler: Scheduler[InboundLink] = Scheduler(self._controller.policy)
        self._link_pool = link_pool
        self._session_added = Signal()
        self._session_ended = session_ended
        self._step_times_s: deque[float] = deque(maxlen=64)
        self._stepped = trio.lowlevel.ParkingLot()
        self._continuing: dict[SessionId, StageSession] = {}
        """Sessions that have ended here, and whose successors wait for what they hold."""

    @property
    def info(self) -> SpanInfo:
        """What the engine holds."""
        return self.engine.info

    def load(self) -> Load:
        """Return how busy the span is."""
        statistics = self.engine.statistics()
        times_s = sorted(self._step_times_s)
        return Load(
            sessions=sum(not session.request.background for session in self.sessions.values()),
            queued_rows=self.scheduler.rows,
            free_positions=max(0, self.info.kv_positions - statistics.reserved_positions),
            step_s=times_s[len(times_s) // 2] if times_s else 0.0,
        )

    def held_pages(self) -> Counter[PeerId]:
        """Return how many pages of KV memory the sessions of each peer hold, or are about to."""
        held: Counter[PeerId] = Counter()
        for session in (*self.sessions.values(), *self._continuing.values()):
            if session.state.reserved_positions:
                held[session.opened_by.peer] += pages_of(session.state.reserved_positions)
        return held

    def _background_tasks(self) -> Sequence[Callable[[], Awaitable[None]]]:
        return self._expiry_loop, self.variants.run

    def _on_stopped(self) -> None:
        for session in tuple(self.sessions.values()):
            self.fail(session, FailureReason.ENGINE, "the span is no longer served here")

    # Sessions

    def add(self, session: StageSession) -> None:
        """Take in a session that is being opened."""
        self.sessions[session.id] = session
        self._session_added.set()

    def fail(self, session: StageSession, reason: FailureReason, message: str, blamed: PeerId | None = None) -> None:
        """Report to the coordinator that the session is lost here, and free it."""
        if not session.is_ended:
            peer, request_id = session.opened_by.peer, session.request.request_id
            self._records.failed(peer, reason, session=session.wire_id, request_id=request_id, why=message)
            session.opened_by.fail(session.wire_id, reason, message, blamed)
            self.end(session, "failed", reason)

    def reject(self, session: StageSession, sender: InboundLink, fault: str, charged: Charge = Charge.OPENER) -> None:
        """Fail a session because of invalid rows, and tell the opener who sent them.

        The opener is charged for them, as it can make an honest stage send rows of the wrong shape, number or position;
        the sender for those that only it can have made.
        """
        if session.is_ended:
            return
        self.engine.uncache(session.id)  # what the sender sent before may be wrong, too
        opener = session.opened_by.peer
        if charged is not Charge.NOBODY or sender.peer == opener:
            self._records.fault(
                sender.peer if charged is Charge.SENDER else opener,
                trio.current_time(),
                session=str(session.wire_id),
                request_id=session.request.request_id or "-",
                sender=sender.peer,
                reason=fault,
            )
        self.fail(session, FailureReason.ENGINE, f"cannot take rows of {sender.peer}: {fault}", sender.peer)

    def end(self, session: StageSession, outcome: str = "closed", error: FailureReason | None = None) -> None:
        """Free a session: from now on its rows are unknown here. `outcome`, `error`: see `SessionReport`."""
        if not session.is_ended:
            self._report(session, outcome, error)
            self._remove(session)
            self._account(session)
            session.state.replay.drop()
            if session.id not in self._in_step:
                self.start_freeing(session.id)

    def _report(self, session: StageSession, outcome: str, error: FailureReason | None = None) -> None:
        """Report what was done for a session that ends now, if it ever began."""
        if session.method is not None:
            self._observer.on_session_ended(_report_of(session, session.method, outcome, error))

    def _remove(self, session: StageSession) -> None:
        """Take a session out of everything here but the engine."""
        session.end()
        if session.method is not None:
            self.variants.used(variant_of(session.method))
        self.scheduler.remove(session.id)
        self.sessions.pop(session.id, None)
        self._link_pool.receivers.pop(session.wire_id, None)
        self._session_ended.unpark_all()

    async def carry_on(self, former: StageSession, session: StageSession) -> bool:
        """End a session of a former attempt after the step it is in, and let another take it over if that succeeds."""
        self._continuing[former.id] = former
        self._report(former, "continued")
        self._remove(former)
        with trio.CancelScope(shield=True):  # for a step at most: else what the former one holds would leak
            while former.id in self._in_step:
                await self._stepped.park()
            try:
                await self.engine.rename(former.id, session.id)
            except EngineError as error:
                _logger.info("session not resumed", session=former.wire_id, why=str(error))
                self._account(former)
                former.state.replay.drop()
                await self._free(former.id)
                return False
            finally:  # until then the former one counts
                del self._continuing[former.id]
            session.take_over(former)
            if session.is_ended:  # before there was anything to be freed under its id, perhaps as its rows were wrong
                self.engine.uncache(session.id)
                self._account(session)
                session.state.replay.drop()
                await self._free(session.id)
        return True

    async def _expiry_loop(self) -> None:
        while True:
            while not self.sessions:
                await self._session_added.wait()
            await trio.sleep(EXPIRY_ROUND_S)
            now_s = trio.current_time()
            held = self.held_pages() if self.unmet_demand else Counter[PeerId]()
            others = (peer for peer in held if peer != self._link_pool.peer_id)
            largest = max(others, key=held.__getitem__, default=None)
            for session in tuple(self.sessions.values()):
                if session.method is None and session.admitted.is_set():
                    limit_s = IDLE_LIMIT_S if session.id in self.beginning else BEGIN_LIMIT_S
                    if now_s - session.opened_s > limit_s:
                        self.fail(session, FailureReason.EXPIRED, f"not begun {limit_s:.0f} s after it was opened")
                    continue
                is_short = session.opened_by.peer == largest
                limit_s = self._idle_limit_s(session, is_short=is_short)
                if is_short and limit_s < float("inf"):
                    session.state.short_idle_s += min(EXPIRY_ROUND_S, now_s - session.active_s)
                if now_s - session.active_s > limit_s:
                    self.fail(session, FailureReason.EXPIRED, f"no rows arrived for {limit_s:.0f} s")
                elif session.state.short_idle_s > SHORT_TOTAL_S:
                    why = f"idle or waiting for {SHORT_TOTAL_S:.0f} s in all, while others were refused KV memory"
                    self.fail(session, FailureReason.EXPIRED, why)

    def _idle_limit_s(self, session: StageSession, *, is_short: bool) -> float:
        """Return how long nothing may happen to a session. `is_short`: its peer holds most of the memory others want.

        It is not idle while its rows wait for the engine or are in it, only while it waits for others: for rows, for
        the receivers of its outputs, or, with its outbox closed, for another route.
        """
        outbox = session.outbox
        if session.id in self._in_step or (session.held_rows and not outbox.is_busy and not outbox.is_closed):
            return float("inf")
        has_begun = session.info.is_first or session.phases.has_rows
        waits_for_stage = not outbox.is_closed and (outbox.is_busy or not has_begun)  # which may be busy with others
        return SHORT_IDLE_LIMIT_S if is_short and not waits_for_stage else IDLE_LIMIT_S

    # Variants

    def _variants_in_use(self) -> set[Variant]:
        """Return the variants of the sessions; of those that have not begun all that they ask for."""
        in_use: set[Variant] = set()
        for session in (*self.sessions.values(), *self._continuing.values()):
            for name in [session.method.name] if session.method else session.request.methods:
                with suppress(MethodError):  # of another version
                    in_use.add(variant_of(parse_method(name)))
        return in_use

    async def _wait_idle(self) -> None:
        """Wait until there has been no session for a moment."""
        while True:
            while self.sessions:
                await self._session_ended.park()
            await trio.sleep(IDLE_MOMENT_S)
            if not self.sessions:
                return

    # Steps

    async def _step_loop(self) -> None:
        while True:
            now_s = trio.current_time()
            if batch := self.scheduler.next_batch(now_s):
                await self._step(batch)
                continue
            chance_s = self.scheduler.next_chance_s(now_s)
            with trio.CancelScope(deadline=float("inf") if chance_s is None else chance_s):
                await self.scheduler.changed.wait()

    async def _step(self, batch: Sequence[Work[InboundLink]]) -> None:
        now_s = trio.current_time()
        sessions = [self.sessions[work.session] for work in batch]
        self._in_step = frozenset(work.session for work in batch)
        result: StepResult | None = None
        try:
            inputs = [session.slice_input(work) for work, session in zip(batch, sessions, strict=True)]
            result = await self.engine.step(inputs)
            faults = result.faults
        except StepFailed as failed:
            faults = failed.faults
        except EngineError as error:
            faults = tuple(SliceFault(work.session, str(error)) for work in batch)
        finally:
            for session_id in self._in_step - self.sessions.keys() - self._continuing.keys():
                self.start_freeing(session_id)
            self._in_step = frozenset()
            self._stepped.unpark_all()  # they run once the outputs are sent: there is no checkpoint before
        failed_in = {fault.session: fault for fault in faults}
        left_out = result.left_out if result is not None else ()
        for work, session in zip(batch, sessions, strict=True):
            if fault := failed_in.get(work.session):
                self._fail_slice(work, fault)
            elif work.session in left_out and not session.is_ended:
                self.scheduler.put_back(work)
        if result is not None:
            without = failed_in.keys() | set(left_out)
            self._on_computed([work for work in batch if work.session not in without], batch, result, now_s)

    def _fail_slice(self, work: Work[InboundLink], fault: SliceFault) -> None:
        """Give up the session of a slice that failed in the engine."""
        session = self.sessions.get(work.session)
        if session is None:
            return
        if fault.by_rows and not session.info.is_first:  # token ids that the model itself drew are not a fault
            self.reject(session, work.origin, fault.message)
        else:
            reason = FailureReason.REQUEST if fault.by_request else FailureReason.ENGINE
            self.fail(session, reason, fault.message)

    def _on_computed(
        self, batch: Sequence[Work[InboundLink]], whole: Sequence[Work[InboundLink]], result: StepResult, began_s: float
    ) -> None:
        """Send the outputs of a step that began at `began_s`, and return credit for its rows.

        `whole`: with the rows that have no output, which took a part of its time.
        """
        self._observer.on_step(self.info.model, result.compute_s)
        rows = sum(work.rows for work in whole)
        if not any(work.is_prefill for work in whole):
            self._step_times_s.append(result.compute_s * self._whole_span_ratio(batch))
        now_s, is_whole = trio.current_time(), len(batch) == len(whole)
        self.scheduler.on_computed(batch, now_s - began_s, now_s, is_whole=is_whole)
        if not any(work.is_scored for work in whole):  # which take longer than those that the row budget is for
            self.scheduler.policy = self._controller.observe(rows, result.compute_s, trio.current_time())
        outputs: list[Output] = []
        computed: list[tuple[StageSession, Work[InboundLink]]] = []
        for work, output in zip(batch, result.outputs, strict=True):
            session = self.sessions.get(work.session) or self._continuing.get(work.session)
            if session is None:
                continue
            queue_s = max(0.0, began_s - work.arrived_s)
            session.on_computed(work, result.compute_s * work.rows / rows, queue_s)
            phase = "prefill" if work.is_prefill else "decode"
            self._observer.on_slice(self.info.model, phase, queue_s, result.compute_s)
            outputs += session.outputs_of(work.part, output.tensor)
            computed.append((session, work))
        send_outputs(outputs)
        sent_s = trio.current_time()
        for session, work in computed:
            session.on_sent(work, began_s, result.compute_s, sent_s)
            if not session.is_ended:
                session.outbox.on_computed(work)

    def _whole_span_ratio(self, batch: Sequence[Work[InboundLink]]) -> float:
        """Return how much longer a step through the whole span would have taken: sessions may run a part of it."""
        parts = {session.info.blocks for work in batch if (session := self.sessions.get(work.session))}
        blocks = sum(len(part) for part in parts)
        return len(self.info.blocks) / blocks if blocks else 1.0


def pages_of(positions: int) -> int:
    """Return how many pages of KV memory a number of positions takes."""
    return -(-positions // PAGE_POSITIONS)


class SpanTable:
    """The spans that this node serves, their sessions, and the draft models beside them."""

    def __init__(self) -> None:
        self.is_draining = False
        """This node is about to leave: it admits no new sessions."""
        self.spans: dict[tuple[ModelId, BlockRange], Span] = {}
        self.draft_models: dict[ModelId, DraftModel | None] = {}
        """By the model they draft for, whose first blocks are served here; None while one is being loaded."""
        self.withdrawn: set[Span] = set()
        """Spans that are about to go: they are not announced any more."""
        self.closed: set[Span] = set()
        """Of those, the ones that admit no new sessions any more."""

    def sessions(self) -> Iterator[StageSession]:
        """Yield the sessions of all spans."""
        for span in self.spans.values():
            yield from tuple(span.sessions.values())

    def find(self, session: SessionId | None, link: InboundLink) -> tuple[Span, StageSession] | None:
        """Return a session that was opened over this link, and its span."""
        here = local_id(session, link.peer) if session is not None else None
        for span in self.spans.values():
            if here is not None and (found := span.sessions.get(here)) and found.opened_by is link:
                return span, found
        return None

    def holding(self, model: ModelId, blocks: BlockRange) -> Span | None:
        """Return the smallest span that has all of these blocks, if it admits new sessions."""
        holding = [
            span
            for key, span in self.spans.items()
            if key[0] == model and span.info.blocks.holds(blocks) and span not in self.closed
        ]
        return min(holding, key=lambda span: len(span.info.blocks), default=None)


def _report_of(session: StageSession, method: Method, outcome: str, error: FailureReason | None) -> SessionReport:
    bytes_in, bytes_out = session.state.report_bytes()
    return SessionReport(
        job=session.wire_id.job,
        request_id=session.request.request_id,
        trace_parent=session.request.trace_parent,
        coordinator=session.opened_by.peer,
        model=session.info.model,
        blocks=session.info.blocks,
        method=method.name,
        outcome=outcome,
        error=error,
        is_background=session.request.background,
        opened_s=session.opened_s,
        ended_s=trio.current_time(),
        cached_rows=session.cached_rows,
        phases=session.phases,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
    )
