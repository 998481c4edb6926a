"""A span served here: an engine, its sessions, and the steps it takes for them.

Rows wait in the scheduler, pass through the engine in batches, and leave for the next stage. The rows of a batch that
go to the same peer leave in one frame. The last span draws tokens, tells the coordinator, and starts the next round at
the first stage, so that the coordinator is on nobody's path from one token to the next.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import structlog
import trio

from node.engine.base import Engine
from node.engine.interface import (
    PAGE_POSITIONS,
    EngineCrashed,
    EngineError,
    SliceFault,
    SliceInput,
    SpanInfo,
    StepFailed,
    StepResult,
    Variant,
)
from node.links.base_link import LinkBroken
from node.links.inbound_link import InboundLink
from node.links.link_pool import LinkPool
from node.links.outbound_link import OutboundLink, SessionLost
from node.stages.peer_records import PeerRecords, is_worth_logging
from node.stages.replay_buffer import REPLAY_BYTES, ReplayMemory
from node.stages.scheduler import Scheduler, Work
from node.stages.session import StageSession
from node.stages.stage_policy import PolicyController
from protocol.errors import LocalProtocolError
from protocol.identity import PeerId, SessionId
from protocol.limits import MAX_DRAFTS, MAX_SLICES, MAX_STEP_BYTES
from protocol.messages import FailureReason, Load, Slice, Step
from protocol.tensors import Tensor, join, tensor_from_tokens, tokens_from_tensor
from selector.task import Method

IDLE_LIMIT_S = 300.0
"""A session whose coordinator lives, but that gets no rows for this long, gives its memory back."""

SHORT_IDLE_LIMIT_S = 95.0
"""The same while KV memory is short, for sessions of the peer that holds most of it.

Sessions that wait for another route are idle, too, and coordinators look for one for 90 s."""

BEGIN_LIMIT_S = 10.0
"""A session that has not begun so long after it was opened gives its memory back."""

IDLE_ROUND_S = 1.0
"""How often sessions are looked for that are idle, or have not begun."""

SHORT_S = 30.0
"""KV memory counts as short for so long after somebody was refused for want of it."""

OUTGOING_ROWS = 512
OUTGOING_BYTES = 2 << 20
"""Outputs go out in steps of at most so many rows, or as many as take so many bytes if these are more."""

BUILD_PATIENCE_S = 30.0
"""So long a variant waits for the span to have no sessions; then it is built beside them, which slows them down."""

MAX_TURNED_AWAY = 64
"""Peers that were refused for want of KV memory and are remembered for a while."""

IDLE_MOMENT_S = 1.0
"""Without a session for so long a span counts as idle."""

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """Rows of one session that are to leave. `to`: the session's id where they go."""

    session: StageSession
    to: SessionId
    part: Slice
    tensor: Tensor


class Span:
    """A span served here."""

    def __init__(
        self,
        engine: Engine,
        link_pool: LinkPool,
        session_ended: trio.lowlevel.ParkingLot,
        controller: PolicyController | None = None,
        replay_bytes: int = REPLAY_BYTES,
        records: PeerRecords | None = None,
    ) -> None:
        self.engine = engine
        self.sessions: dict[SessionId, StageSession] = {}
        self.drafted = 0
        """Guesses of speculation that were checked at this span, where it is a first one."""
        self.accepted = 0
        self.records = records or PeerRecords()
        self._opened = trio.Event()
        """Set when a session is added; replaced while there are none."""
        self._wanted_pages: dict[PeerId, tuple[int, float]] = {}
        """Pages that peers were refused, and when that was."""
        self._controller = controller or PolicyController()
        self._scheduler: Scheduler[InboundLink] = Scheduler(self._controller.policy)
        self._session_ended = session_ended
        self._link_pool = link_pool
        self._queue_filled = trio.Event()
        self._step_times_s: deque[float] = deque(maxlen=64)
        self._nursery: trio.Nursery | None = None
        self._in_step: set[SessionId] = set()
        """Sessions in the step that the engine is at; to take one away from under it would cost the others."""
        self._stepped = trio.lowlevel.ParkingLot()
        self._passing_on: dict[SessionId, StageSession] = {}
        """Sessions that have ended here, and whose successors wait for what they hold."""
        self.replay_memory = ReplayMemory(replay_bytes)
        """For the outputs that sessions keep."""
        self._wanted_in, self._wanted = trio.open_memory_channel[Variant](64)
        self._asked: set[Variant] = set()
        self.unable: set[Variant] = set()
        """Variants that were asked for and cannot be built here."""

    @property
    def info(self) -> SpanInfo:
        """What the engine holds."""
        return self.engine.info

    @property
    def policy(self) -> dict[str, str]:
        """The stage's own switches in force."""
        return self._scheduler.policy.switches()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take steps until cancelled, or until the engine's worker is gone: then EngineCrashed passes."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._wait_for_crash)
                nursery.start_soon(self._expire)
                nursery.start_soon(self._prepare_wanted)
                task_status.started()
                try:
                    await self._work()
                finally:
                    self._nursery = None
        finally:
            for session in tuple(self.sessions.values()):
                self.fail(session, FailureReason.ENGINE, "the span is no longer served here")

    def load(self) -> Load:
        """Return how busy the span is."""
        statistics = self.engine.statistics()
        times_s = sorted(self._step_times_s)
        return Load(
            sessions=len(self.sessions),
            queued_rows=self._scheduler.rows,
            free_positions=max(0, self.info.kv_positions - statistics.reserved_positions),
            step_s=times_s[len(times_s) // 2] if times_s else 0.0,
        )

    def add(self, session: StageSession) -> None:
        """Take in a session that is being opened."""
        self.sessions[session.id] = session
        self._opened.set()

    def held_pages(self) -> dict[PeerId, int]:
        """Return how many pages of KV memory the sessions of each peer hold, or are about to."""
        held: dict[PeerId, int] = {}
        for session in (*self.sessions.values(), *self._passing_on.values()):
            if session.reserved_positions:
                peer = session.opened_by.peer
                held[peer] = held.get(peer, 0) + pages_of(session.reserved_positions)
        return held

    def turn_away(self, peer: PeerId, pages: int) -> None:
        """Take note that a peer was refused pages: for a while they are not for those who hold most."""
        now_s = trio.current_time()
        fresh = {each: told for each, told in self._wanted_pages.items() if told[1] > now_s - SHORT_S}
        self._wanted_pages = dict(list(fresh.items())[-MAX_TURNED_AWAY:]) | {peer: (pages, now_s)}

    def wanted_pages(self, but: PeerId) -> int:
        """Return how many pages other peers than this one were refused a moment ago."""
        oldest_s = trio.current_time() - SHORT_S
        return sum(n for each, (n, when_s) in self._wanted_pages.items() if each != but and when_s > oldest_s)

    def want(self, variants: Iterable[Variant]) -> None:
        """Have variants built that jobs have asked for, one after another; each is asked for once."""
        for variant in variants:
            if variant not in self._asked and len(self._asked) < 64:
                self._asked.add(variant)
                self._wanted_in.send_nowait(variant)

    def queue(self, work: Work[InboundLink]) -> None:
        """Put rows in line for the engine."""
        self._scheduler.add(work)
        self._queue_filled.set()

    def fail(self, session: StageSession, reason: FailureReason, message: str, blamed: PeerId | None = None) -> None:
        """Tell the coordinator that the session is lost here, and free it."""
        if not session.ended.is_set():
            opener = session.opened_by.peer
            count = self.records.failed(opener, reason)
            if is_worth_logging(count):
                name = str(session.id)
                _logger.info("session failed", peer=opener, session=name, reason=reason, message=message, count=count)
            session.opened_by.fail(session.id, reason, message, blamed)
            self.end(session)

    def reject(self, session: StageSession, sender: InboundLink, fault: str, *, by_sender: bool = False) -> None:
        """Give a session up because of rows that cannot be taken.

        The opener is told who sent them. It is put down to the opener, who can make an honest stage send rows of the
        wrong shape, number or position; `by_sender`: to the sender, because nobody else can have made them.
        """
        if session.ended.is_set():
            return
        opener = session.opened_by.peer
        count = self.records.fault(sender.peer if by_sender else opener, trio.current_time())
        if is_worth_logging(count):
            _logger.warning(
                "rows refused",
                peer=sender.peer,
                session=str(session.id),
                opened_by=opener,
                reason=fault,
                count=count,
            )
        self.fail(session, FailureReason.ENGINE, f"cannot take rows of {sender.peer}: {fault}", sender.peer)

    def start_checking(self, session: StageSession) -> None:
        """Have the rows of a session checked piece by piece."""
        if self._nursery is not None:
            self._nursery.start_soon(session.check)

    def lost(self, session: StageSession, lost: SessionLost) -> None:
        """Ask the coordinator for another way on, because the other side of an output gave the session up."""
        self._cut_off(session, lost.message, lost.blamed)

    def _cut_off(self, session: StageSession, message: str, blamed: PeerId) -> None:
        """Send nothing of a session on any more, and hold it until its coordinator has found another route."""
        if session.ended.is_set() or session.cut_off:
            return
        if session.method is None:  # it has nothing yet that would be worth holding
            self.fail(session, FailureReason.DOWNSTREAM, message, blamed)
            return
        session.cut_off = True
        session.sending.cancel()
        session.backlog.clear()
        session.again = None
        session.opened_by.reroute(session.id, FailureReason.DOWNSTREAM, message, blamed)

    async def carry_on(self, former: StageSession, session: StageSession) -> bool:
        """Let a session take over what one of a former attempt holds, which ends by that; say whether it could.

        It waits for the step that the former one may be in.
        """
        self._passing_on[former.id] = former
        self._leave(former)
        with trio.CancelScope(shield=True):  # for a step at most: else nobody would hold what the former one held
            while former.id in self._in_step:
                await self._stepped.park()
            try:
                await self.engine.rename(former.id, session.id)
            except EngineError as error:
                _logger.info("session not carried on", session=former.id, why=str(error))
                former.kept.drop()
                await self._free(former.id)
                return False
            finally:  # until then the former one counts
                del self._passing_on[former.id]
            session.take_over(former)
            if session.ended.is_set():  # its coordinator went away, when there was nothing yet to be freed under its id
                session.kept.drop()
                await self._free(session.id)
        return True

    def send_again(self, session: StageSession, method: Method, start: int) -> None:
        """Send the next stage the outputs that it lacks and that lie before what is computed now."""
        if session.forward_from >= start or session.sampling is not None or self._nursery is None:
            return
        rows = max(1, min(self._outgoing_rows(4 * self.info.hidden_size), method.prefill_chunk or start))
        session.again = session.forward_from, start, rows
        self._start_sending(session)

    def end(self, session: StageSession) -> None:
        """Free a session: from now on its rows are unknown here."""
        if session.ended.is_set():
            return
        self._leave(session)
        session.kept.drop()
        if session.id not in self._in_step:
            self.start_freeing(session.id)

    def _leave(self, session: StageSession) -> None:
        """Take a session out of everything here but the engine."""
        session.ended.set()
        session.sending.cancel()
        session.backlog.clear()
        session.again = None
        session.owed.clear()
        if session.feed is not None:
            self.drafted += session.feed.drafted
            self.accepted += session.feed.accepted
        if session.drafter is not None:
            session.drafter.close()
        self._scheduler.remove(session.id)
        self.sessions.pop(session.id, None)
        self._link_pool.registry.remove(session.id)
        for unwatch in session.unwatch:
            unwatch()
        for to, link in session.outputs.items():
            link.forget(to)
        for source in session.sources - {session.opened_by}:
            source.forget(session.id)
        self._queue_filled.set()  # a static batch may be over with it
        self._session_ended.unpark_all()

    def start_freeing(self, session: SessionId) -> None:
        """Have the engine forget a session; one that it does not know is no error."""
        if self._nursery:
            self._nursery.start_soon(self._free, session)

    async def _free(self, session: SessionId) -> None:
        try:
            await self.engine.close(session)
        except EngineError as error:
            _logger.debug("engine gone before a session was closed", session=session, error=str(error))

    async def _wait_for_crash(self) -> None:
        raise EngineCrashed(await self.engine.wait_crashed())

    async def _expire(self) -> None:
        while True:
            while not self.sessions:
                self._opened = trio.Event()
                await self._opened.wait()
            await trio.sleep(IDLE_ROUND_S)
            now_s = trio.current_time()
            largest = self._largest_holder() if self._is_short() else None
            for session in tuple(self.sessions.values()):
                limit_s = SHORT_IDLE_LIMIT_S if session.opened_by.peer == largest else IDLE_LIMIT_S
                if session.method is None and session.opened.is_set() and now_s - session.opened_s > BEGIN_LIMIT_S:
                    self.fail(session, FailureReason.EXPIRED, f"not begun {BEGIN_LIMIT_S:.0f} s after it was opened")
                elif now_s - session.active_s > limit_s:
                    self.fail(session, FailureReason.EXPIRED, f"no rows came for {limit_s:.0f} s")

    def _is_short(self) -> bool:
        """Whether somebody was refused a moment ago for want of KV memory."""
        oldest_s = trio.current_time() - SHORT_S
        return any(when_s > oldest_s for _, when_s in self._wanted_pages.values())

    def _largest_holder(self) -> PeerId | None:
        held = self.held_pages()
        held.pop(self._link_pool.peer_id, None)
        return max(held, key=lambda peer: held[peer], default=None)

    async def _prepare_wanted(self) -> None:
        async for variant in self._wanted:
            with trio.move_on_after(BUILD_PATIENCE_S):
                await self._idle()
            try:
                await self.engine.prepare(variant)
            except EngineCrashed:
                return  # said by the task that waits for it
            except EngineError as error:
                self.unable.add(variant)
                _logger.info("variant not to be had", variant=str(variant), span=str(self.info.blocks), why=str(error))

    async def _idle(self) -> None:
        """Wait until there has been no session for a moment."""
        while True:
            while self.sessions:
                await self._session_ended.park()
            await trio.sleep(IDLE_MOMENT_S)
            if not self.sessions:
                return

    async def _work(self) -> None:
        while True:
            batch = self._scheduler.next_batch(trio.current_time())
            if batch:
                await self._step(batch)
                continue
            self._queue_filled = trio.Event()
            chance_s = self._scheduler.next_chance_s(trio.current_time())
            with trio.CancelScope(deadline=float("inf") if chance_s is None else chance_s):
                await self._queue_filled.wait()

    async def _step(self, batch: Sequence[Work[InboundLink]]) -> None:
        now_s = trio.current_time()
        for work in batch:
            self.sessions[work.session].queue_s += now_s - work.arrived_s
        self._in_step = {work.session for work in batch}
        result: StepResult | None = None
        try:
            result = await self.engine.step([self._input(work) for work in batch])
            faults = result.faults
        except StepFailed as failed:
            faults = failed.faults
        except EngineError as error:
            faults = tuple(SliceFault(work.session, str(error)) for work in batch)
        finally:
            for session_id in self._in_step:
                if session_id not in self.sessions and session_id not in self._passing_on:
                    self.start_freeing(session_id)
            self._in_step = set()
            self._stepped.unpark_all()  # they run once the outcome is handed on: there is no checkpoint before
        failed_in = {fault.session: fault for fault in faults}
        for work in batch:
            if fault := failed_in.get(work.session):
                self._fail_slice(work, fault)
        if result is not None:
            self._hand_on([work for work in batch if work.session not in failed_in], result)

    def _fail_slice(self, work: Work[InboundLink], fault: SliceFault) -> None:
        """Give up the session of a slice that failed in the engine."""
        session = self.sessions.get(work.session)
        if session is None:
            return
        if fault.by_rows and not session.info.is_first:  # token ids that are the model's own are nobody's fault
            self.reject(session, work.origin, fault.message)
        else:
            self.fail(session, FailureReason.ENGINE, fault.message)

    def _hand_on(self, batch: Sequence[Work[InboundLink]], result: StepResult) -> None:
        """Send what a step has brought, and give credit for what went in."""
        rows = sum(work.rows for work in batch)
        if not any(work.is_prefill for work in batch):
            self._step_times_s.append(result.compute_s * self._share_run(batch))
        self._scheduler.policy = self._controller.observe(rows, result.compute_s, trio.current_time())
        outgoing: list[_Outgoing] = []
        served: list[tuple[StageSession, Work[InboundLink]]] = []
        for work, output in zip(batch, result.outputs, strict=True):
            session = self.sessions.get(work.session) or self._passing_on.get(work.session)
            if session is None:
                continue
            self._account(session, work, result, rows)
            outgoing += self._outputs(session, work.part, output.tensor)
            served.append((session, work))
        self._send_all(outgoing)
        for session, work in served:
            if not session.ended.is_set():
                session.owed.append(work)
                if not session.backlog:
                    self._pay(session)

    def _share_run(self, batch: Sequence[Work[InboundLink]]) -> float:
        """Return by how much longer a step would have taken through the whole span: sessions may run a part of it."""
        parts = {session.info.blocks for work in batch if (session := self.sessions.get(work.session))}
        blocks = sum(len(part) for part in parts)
        return len(self.info.blocks) / blocks if blocks else 1.0

    def _input(self, work: Work[InboundLink]) -> SliceInput:
        part = work.part
        session = self.sessions.get(work.session)
        drafts = part.drafts if session is not None and session.info.is_last else ()
        return SliceInput(
            session=part.session,
            position=part.position,
            tensor=work.tensor,
            draws=part.draws,
            drafts=drafts,
            history=session.take_history() if session is not None and part.draws else None,
        )

    def _account(self, session: StageSession, work: Work[InboundLink], result: StepResult, rows: int) -> None:
        """Put a session's share of a step down to it: that of its rows."""
        session.active_s = trio.current_time()
        session.steps += 1
        session.rows += work.rows
        session.compute_s += result.compute_s * work.rows / rows
        session.computed = work.part.position + work.rows
        session.reached = max(session.reached, session.computed - len(work.part.drafts))

    def _outputs(self, session: StageSession, part: Slice, output: Tensor) -> list[_Outgoing]:
        """Return where what the engine made of a slice has to go."""
        job, stage = session.id
        if session.sampling is None:
            session.kept.write(part.position, output)
            known = min(part.rows, max(0, session.forward_from - part.position))
            if known == part.rows:
                return []
            following = SessionId(job, stage + 1)
            forward_from = replace(part, session=following, position=part.position + known, rows=part.rows - known)
            return [_Outgoing(session, following, forward_from, output.cut(known, part.rows))]
        if not part.draws:
            return []
        position = part.position + part.rows - part.draws + 1
        tokens, finish = session.told(tokens_from_tensor(output))
        session.known = position + len(tokens)
        tensor = tensor_from_tokens(tokens)
        told = Slice(
            session=SessionId(job, stage + 1), position=position, rows=len(tokens), draws=0, finish_reason=finish
        )
        outgoing = [_Outgoing(session, told.session, told, tensor)]
        if finish is None:
            again = replace(told, session=SessionId(job, 0), draws=1)
            outgoing.append(_Outgoing(session, again.session, again, tensor))
        return outgoing

    def _send_all(self, outgoing: Iterable[_Outgoing]) -> None:
        """Send what a batch brought: in one frame for each peer, save for sessions that have to wait for credit."""
        groups: dict[tuple[OutboundLink, str, tuple[int, ...]], list[_Outgoing]] = {}
        for each in outgoing:
            if each.session.ended.is_set() or each.session.cut_off:
                continue
            each.session.bytes_out += len(each.tensor.data)
            link = each.session.outputs[each.to]
            if each.tensor.rows > self._outgoing_rows(each.tensor.row_bytes):
                for piece in self._cut(each):
                    self._put_off(piece)
            elif each.session.backlog or each.session.again or not link.has_credit(each.to, len(each.tensor.data)):
                self._put_off(each)
            else:
                groups.setdefault((link, each.tensor.dtype, each.tensor.shape[1:]), []).append(each)
        for (link, _, _), group in groups.items():
            for frame in _frames(group):
                self._send_together(link, frame)

    def _outgoing_rows(self, row_bytes: int) -> int:
        """Return how many rows go out in one step at most."""
        return min(max(OUTGOING_ROWS, OUTGOING_BYTES // row_bytes), max(1, MAX_STEP_BYTES // row_bytes - MAX_DRAFTS))

    def _cut(self, each: _Outgoing) -> Iterator[_Outgoing]:
        """Yield rows in steps' worth; what is drawn is drawn behind the last."""
        part, most = each.part, self._outgoing_rows(each.tensor.row_bytes)
        # The rows behind which tokens are drawn stay together.
        last = (part.rows - max(1, part.draws)) // most * most
        for start in range(0, last, most):
            before = replace(part, position=part.position + start, rows=most, draws=0, drafts=())
            yield replace(each, part=before, tensor=each.tensor.cut(start, start + most))
        behind = replace(part, position=part.position + last, rows=part.rows - last)
        yield replace(each, part=behind, tensor=each.tensor.cut(last, part.rows))

    def _send_together(self, link: OutboundLink, group: Sequence[_Outgoing]) -> None:
        step = Step(slices=tuple(each.part for each in group), tensor=join([each.tensor for each in group]))
        try:
            sent = link.try_send_step(step)
        except LinkBroken as broken:
            for each in group:
                self._cut_off(each.session, str(broken), broken.peer)
            return
        except LocalProtocolError as error:  # what came in made it impossible to say what follows from it
            if len(group) == 1:
                self.fail(group[0].session, FailureReason.ENGINE, str(error))
            else:
                for each in group:  # one of them is at fault, the others are not to suffer
                    self._send_together(link, [each])
            return
        if not sent:
            for each in group:
                self._put_off(each)

    def _put_off(self, each: _Outgoing) -> None:
        """Keep the order, and send as soon as link and credit allow it; a copy, as a batch's outputs share memory."""
        session = each.session
        is_sending = bool(session.backlog or session.again)
        tensor = replace(each.tensor, data=bytes(each.tensor.data))
        session.backlog.append((each.to, Step(slices=(each.part,), tensor=tensor)))
        if not is_sending:
            self._start_sending(session)

    def _start_sending(self, session: StageSession) -> None:
        """Send what a session has to send, and compute nothing more of it until that has left."""
        if self._nursery is not None:
            self._scheduler.hold(session.id)
            session.sending = trio.CancelScope()
            self._nursery.start_soon(self._send_backlog, session)

    def _pay(self, session: StageSession) -> None:
        """Give credit for the rows whose outputs have all left: so a slow next stage slows the one before, too."""
        for work in session.owed:
            session.pay(work)
        session.owed.clear()

    async def _send_backlog(self, session: StageSession) -> None:
        try:
            with session.sending:
                await self._send_again(session)
                while session.backlog:
                    to, step = session.backlog[0]
                    await session.outputs[to].send_step(step)
                    session.backlog.popleft()
                self._pay(session)
                self._scheduler.release(session.id)
                self._queue_filled.set()
        except LinkBroken as broken:
            self._cut_off(session, str(broken), broken.peer)
        except (LocalProtocolError, ValueError) as error:
            self.fail(session, FailureReason.ENGINE, str(error))

    async def _send_again(self, session: StageSession) -> None:
        """Send kept outputs, copied step by step. Raises ValueError where they are not kept any more."""
        following = SessionId(session.id.job, session.id.stage + 1)
        while session.again is not None:
            start, end, rows = session.again
            tensor = session.kept.read(start, min(end, start + rows))
            part = Slice(session=following, position=start, rows=tensor.rows, draws=0)
            session.bytes_out += len(tensor.data)
            await session.outputs[following].send_step(Step(slices=(part,), tensor=tensor))
            session.again = (start + rows, end, rows) if start + rows < end else None


def pages_of(positions: int) -> int:
    """Return how many pages of KV memory a session of so many positions takes."""
    return -(-positions // PAGE_POSITIONS)


def _frames(group: Sequence[_Outgoing]) -> Iterable[list[_Outgoing]]:
    """Yield what fits into one step each: the slices and bytes of a step are bounded."""
    frame: list[_Outgoing] = []
    payload_bytes = 0
    for each in group:
        size = len(each.tensor.data)
        if frame and (len(frame) == MAX_SLICES or payload_bytes + size > MAX_STEP_BYTES):
            yield frame
            frame, payload_bytes = [], 0
        frame.append(each)
        payload_bytes += size
    yield frame
