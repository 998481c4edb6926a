"""The stages of this node: sessions that coordinators open here, and the steps that the engines take for them.

Rows arrive from the stage before (or the coordinator), wait in the span's queue, pass through its engine, and leave for
the next stage. The last stage draws the token, tells the coordinator, and starts the next round at the first stage, so
that the coordinator is on nobody's path from one token to the next.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.engine.interface import (
    Engine,
    EngineCrashed,
    EngineError,
    EngineFull,
    SessionOptions,
    SliceInput,
    SpanInfo,
)
from node.jobs.link import InboundLink, LinkBroken, OutboundLink, SessionLost
from node.jobs.switchboard import Switchboard
from node.network.interface import Network
from protocol.errors import LocalProtocolError
from protocol.identity import BlockRange, ModelId, PeerId, SessionId
from protocol.limits import MAX_STAGES, MAX_STEP_BYTES
from protocol.measurements import StageObservation
from protocol.messages import (
    Closed,
    FailureReason,
    FinishReason,
    Load,
    Open,
    Opened,
    RefusalReason,
    Refused,
    SessionStatistics,
    Slice,
    Step,
)
from protocol.observations import countersign
from protocol.records import ServedSpan
from protocol.tensors import Tensor, tensor_from_tokens, tokens_from_tensor

IDLE_LIMIT_S = 300.0
"""A session whose coordinator lives, but that gets no rows for this long, gives its memory back."""

IDLE_ROUND_S = 10.0
"""How often idle sessions are looked for."""

_logger = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Work:
    """Rows that wait for the engine."""

    session: "StageSession"
    part: Slice
    tensor: Tensor
    link: InboundLink
    arrived_s: float


class StageSession:
    """One job's session on one span of this node; takes the rows that arrive for it."""

    def __init__(self, message: Open, span: "Span", opened_by: InboundLink) -> None:
        self.id = message.session
        self.span = span
        self.opened_by = opened_by
        self.method = message.method
        self.sampling = message.sampling
        self.positions = message.positions
        self.drawn = 0
        self.steps = 0
        self.rows = 0
        self.compute_s = 0.0
        self.queue_s = 0.0
        self.bytes_in = 0
        self.bytes_out = 0
        self.ended = trio.Event()
        self.sources: set[InboundLink] = set()
        self.outputs: dict[SessionId, OutboundLink] = {}
        self.unwatch: list[Callable[[], None]] = []
        self.opened = trio.Event()
        self.backlog: deque[tuple[SessionId, Step]] = deque()
        self.owed: list[tuple[InboundLink, int]] = []
        """Credit for rows whose outputs are in the backlog; given once they have left."""
        self.active_s = trio.current_time()
        self.sending = trio.CancelScope()
        """Around the task that sends the backlog; it ends with the session."""
        self._permitted = {opened_by.peer, *message.upstream}

    def permits(self, peer: PeerId) -> bool:
        """Whether this peer is the coordinator or stands before us on the route."""
        return peer in self._permitted

    def receive(self, part: Slice, tensor: Tensor, link: InboundLink) -> None:
        """Queue rows for the engine, unless they would not fit what was reserved: then the session is lost."""
        self.sources.add(link)
        self.active_s = trio.current_time()
        self.bytes_in += len(tensor.data)
        if part.position + part.rows > self.positions:
            self.span.fail(self, FailureReason.ENGINE, f"rows up to {part.position + part.rows} of {self.positions}")
            return
        self.span.queue(_Work(self, part, tensor, link, trio.current_time()))

    def statistics(self) -> SessionStatistics:
        """Return what the session cost so far."""
        return SessionStatistics(
            steps=self.steps,
            rows=self.rows,
            compute_s=self.compute_s,
            queue_s=self.queue_s,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
        )


class Span:
    """A span served here: an engine, its sessions, and the queue of work for it."""

    def __init__(self, engine: Engine, switchboard: Switchboard, session_ended: trio.lowlevel.ParkingLot) -> None:
        self.engine = engine
        self._session_ended = session_ended
        self.sessions: dict[SessionId, StageSession] = {}
        self._switchboard = switchboard
        self._queue: deque[_Work] = deque()
        self._queue_filled = trio.Event()
        self._step_times_s: deque[float] = deque(maxlen=64)
        self._nursery: trio.Nursery | None = None

    @property
    def info(self) -> SpanInfo:
        """What the engine holds."""
        return self.engine.info

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take steps until cancelled, or until the engine's worker is gone: then EngineCrashed passes."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._wait_for_crash)
                nursery.start_soon(self._expire_idle)
                task_status.started()
                try:
                    await self._work()
                finally:
                    self._nursery = None
        finally:
            for session in tuple(self.sessions.values()):
                self.fail(session, FailureReason.ENGINE, "the span is no longer served here")

    async def _work(self) -> None:
        while True:
            while self._queue:
                await self._step(self._queue.popleft())
            self._queue_filled = trio.Event()
            await self._queue_filled.wait()

    async def _wait_for_crash(self) -> None:
        raise EngineCrashed(await self.engine.wait_crashed())

    async def _expire_idle(self) -> None:
        while True:
            await trio.sleep(IDLE_ROUND_S)
            oldest_s = trio.current_time() - IDLE_LIMIT_S
            for session in tuple(self.sessions.values()):
                if session.active_s < oldest_s:
                    self.fail(session, FailureReason.EXPIRED, f"no rows came for {IDLE_LIMIT_S:.0f} s")

    def load(self) -> Load:
        """Return how busy the span is."""
        statistics = self.engine.statistics()
        times_s = sorted(self._step_times_s)
        return Load(
            sessions=len(self.sessions),
            queued_rows=sum(work.part.rows for work in self._queue),
            free_positions=max(0, self.info.kv_positions - statistics.reserved_positions),
            step_s=times_s[len(times_s) // 2] if times_s else 0.0,
        )

    def queue(self, work: _Work) -> None:
        """Put rows in line for the engine."""
        self._queue.append(work)
        self._queue_filled.set()

    async def _step(self, work: _Work) -> None:
        session, part = work.session, work.part
        if session.ended.is_set():
            return
        session.queue_s += trio.current_time() - work.arrived_s
        try:
            result = await self.engine.step(
                [SliceInput(session=session.id, position=part.position, tensor=work.tensor, draws=part.draws)]
            )
        except EngineError as error:
            self.fail(session, FailureReason.ENGINE, str(error))
            return
        if part.rows == 1:
            self._step_times_s.append(result.compute_s)
        session.steps += 1
        session.rows += part.rows
        session.compute_s += result.compute_s
        if session.ended.is_set():
            return
        for output in result.outputs:
            try:
                self._route(session, part, output.tensor)
            except LinkBroken as broken:
                self.fail(session, FailureReason.DOWNSTREAM, str(broken), broken.peer)
                return
            except LocalProtocolError as error:  # what came in made it impossible to say what follows from it
                self.fail(session, FailureReason.ENGINE, str(error))
                return
        session.owed.append((work.link, len(work.tensor.data)))
        if not session.backlog:
            self._pay(session)

    def _route(self, session: StageSession, part: Slice, output: Tensor) -> None:
        """Send what the engine made of a slice where it has to go."""
        job, stage = session.id
        if session.sampling is None:
            following = SessionId(job, stage + 1)
            self._send(session, following, Step(slices=(replace(part, session=following),), tensor=output))
            return
        first_position = part.position + part.rows - part.draws + 1
        for offset, token in enumerate(tokens_from_tensor(output)):
            session.drawn += 1
            finish = _finish_reason(session, token)
            rows = tensor_from_tokens([token])
            position = first_position + offset
            told = Slice(session=SessionId(job, stage + 1), position=position, rows=1, draws=0, finish_reason=finish)
            self._send(session, told.session, Step(slices=(told,), tensor=rows))
            if finish:
                return
            again = Slice(session=SessionId(job, 0), position=position, rows=1, draws=1)
            self._send(session, again.session, Step(slices=(again,), tensor=rows))

    def _send(self, session: StageSession, to: SessionId, step: Step) -> None:
        """Send now where link and credit allow it; else keep the order and send as soon as they do."""
        session.bytes_out += len(step.tensor.data)
        if len(step.tensor.data) > MAX_STEP_BYTES:
            self.fail(session, FailureReason.ENGINE, "the rows are too many for one step: send them in parts")
            return
        if session.backlog or not session.outputs[to].try_send_step(step):
            session.backlog.append((to, step))
            if len(session.backlog) == 1 and self._nursery:
                self._nursery.start_soon(self._send_backlog, session)

    def _pay(self, session: StageSession) -> None:
        """Give credit for the rows whose outputs have all left: so a slow next stage slows the one before, too."""
        for link, consumed_bytes in session.owed:
            link.consumed(session.id, consumed_bytes)
        session.owed.clear()

    async def _send_backlog(self, session: StageSession) -> None:
        try:
            with session.sending:
                while session.backlog:
                    to, step = session.backlog[0]
                    await session.outputs[to].send_step(step)
                    session.backlog.popleft()
                self._pay(session)
        except LinkBroken as broken:
            self.fail(session, FailureReason.DOWNSTREAM, str(broken), broken.peer)

    def fail(self, session: StageSession, reason: FailureReason, message: str, blamed: PeerId | None = None) -> None:
        """Tell the coordinator that the session is lost here, and free it."""
        if not session.ended.is_set():
            session.opened_by.fail(session.id, reason, message, blamed)
            self.end(session)

    def lost(self, session: StageSession, lost: SessionLost) -> None:
        """Give a session up because the other side of an output did."""
        self.fail(session, FailureReason.DOWNSTREAM, lost.message, lost.blamed)

    def end(self, session: StageSession) -> None:
        """Free a session: from now on its rows are unknown here."""
        if session.ended.is_set():
            return
        session.ended.set()
        session.sending.cancel()
        session.backlog.clear()
        session.owed.clear()
        self._queue = deque(work for work in self._queue if work.session is not session)
        self.sessions.pop(session.id, None)
        self._switchboard.receivers.remove(session.id)
        for unwatch in session.unwatch:
            unwatch()
        for to, link in session.outputs.items():
            link.forget(to)
        for source in session.sources - {session.opened_by}:
            source.forget(session.id)
        self._session_ended.unpark_all()
        if self._nursery:
            self._nursery.start_soon(self._free, session.id)

    async def _free(self, session: SessionId) -> None:
        try:
            await self.engine.close(session)
        except EngineError as error:
            _logger.debug("engine gone before a session was closed", session=session, error=str(error))


class Stages:
    """All spans of this node: admits sessions and ends them."""

    def __init__(
        self, network: Network, agent: str, *, private_key: Ed25519PrivateKey, hardware: Callable[[], str]
    ) -> None:
        """Serve nothing yet. `private_key` countersigns what jobs cost here; `hardware` names what they ran on."""
        self.draining = False
        self._private_key = private_key
        self._hardware = hardware
        self.switchboard = Switchboard(network, agent, self)
        self._spans: dict[tuple[ModelId, BlockRange], Span] = {}
        self._session_ended = trio.lowlevel.ParkingLot()

    def spans(self) -> tuple[Span, ...]:
        """Return the spans that are served now."""
        return tuple(self._spans.values())

    def served_spans(self) -> tuple[ServedSpan, ...]:
        """Return the spans that are served now, as heartbeats tell them; none once this node is about to leave."""
        if self.draining:
            return ()
        return tuple(ServedSpan(model=s.info.model, blocks=s.info.blocks, load=s.load()) for s in self.spans())

    async def wait_idle(self) -> None:
        """Wait until no session is open here."""
        while any(span.sessions for span in self.spans()):
            await self._session_ended.park()

    async def serve(self, engine: Engine, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve an engine's span until cancelled, or until its worker is gone; sessions that are left then fail.

        The latter raises EngineCrashed, in a group.
        """
        key = (engine.info.model, engine.info.blocks)
        if key in self._spans:
            raise EngineError(f"blocks {engine.info.blocks} are served already")
        span = self._spans[key] = Span(engine, self.switchboard, self._session_ended)
        try:
            await span.run(task_status=task_status)
        finally:
            del self._spans[key]

    async def open(self, message: Open, link: InboundLink) -> Opened | Refused:
        """Admit a session if its span is served here, has KV memory for it, and the next stage can be reached."""
        span = self._spans.get((message.model, message.blocks))
        if self.draining:
            return _refusal(message, RefusalReason.LEAVING, "this peer is about to leave", span)
        if span is None:
            return _refusal(message, RefusalReason.NOT_SERVED, f"blocks {message.blocks} are not served here", None)
        if fault := _fault_of(message, span.info):
            return _refusal(message, RefusalReason.INVALID, fault, span)
        session = StageSession(message, span, link)
        try:
            self.switchboard.receivers.add(message.session, session)
        except KeyError:
            return _refusal(message, RefusalReason.INVALID, "the session is open already", span)
        span.sessions[message.session] = session
        try:
            await self._join(session, message)
            await span.engine.open(message.session, message.positions)
            await span.engine.begin(message.session, SessionOptions(sampling=message.sampling))
        except LinkBroken as broken:
            refused = RefusalReason.UNREACHABLE, f"cannot reach {broken.peer}: {broken}"
        except EngineFull as error:
            refused = RefusalReason.FULL, str(error)
        except EngineError as error:
            refused = RefusalReason.NOT_SERVED, str(error)
        else:
            if session.ended.is_set():  # the coordinator went away while the engine reserved memory
                await span.engine.close(message.session)
                return _refusal(message, RefusalReason.INVALID, "closed while it was opened", span)
            return Opened(session=message.session, load=span.load())
        finally:
            session.opened.set()
        span.end(session)
        return _refusal(message, *refused, span)

    async def close(self, session: SessionId, link: InboundLink) -> Closed:
        """Free a session that this link opened and say what it cost. An unknown one is no error."""
        for span in self._spans.values():
            found = span.sessions.get(session)
            if found and found.opened_by is link:
                await found.opened.wait()
                span.end(found)
                return self._countersigned(found)
        return Closed(session=session, statistics=SessionStatistics())

    def _countersigned(self, session: StageSession) -> Closed:
        """Return what a session cost here, signed for its coordinator, who may tell it to everybody."""
        info = session.span.info
        observed = countersign(
            StageObservation(
                peer=self.switchboard.peer_id,
                blocks=info.blocks,
                hardware=self._hardware(),
                statistics=session.statistics(),
            ),
            job=session.id.job,
            observer=session.opened_by.peer,
            model=info.model,
            method=session.method,
            private_key=self._private_key,
        )
        return Closed(
            session=session.id,
            statistics=observed.statistics,
            hardware=observed.hardware,
            countersignature=observed.countersignature,
        )

    def link_broken(self, link: InboundLink) -> None:
        """Free every session that was opened over the link: nobody is left who could want its tokens."""
        for span in self._spans.values():
            for session in tuple(span.sessions.values()):
                if session.opened_by is link:
                    span.end(session)

    async def _join(self, session: StageSession, message: Open) -> None:
        """Link up with those that the session's outputs go to, before the first row: later would be too late."""
        job, stage = session.id
        following = SessionId(job, stage + 1)
        if message.downstream is not None:
            targets = {following: message.downstream}
        else:
            targets = {following: session.opened_by.peer, SessionId(job, 0): message.feedback or session.opened_by.peer}
        for to, peer in targets.items():
            link = await self.switchboard.link_to(peer)
            if session.ended.is_set():
                raise LinkBroken(peer, "the session was lost while it was opened")
            session.outputs[to] = link
            session.unwatch.append(link.watch(to, lambda lost: session.span.lost(session, lost)))


def _refusal(message: Open, reason: RefusalReason, why: str, span: Span | None) -> Refused:
    return Refused(session=message.session, reason=reason, message=why, load=span.load() if span else Load())


def _fault_of(message: Open, info: SpanInfo) -> str | None:
    """Return why a request makes no sense for a span, if it does not."""
    if message.session.stage >= MAX_STAGES:
        return f"a route has at most {MAX_STAGES} stages"
    if message.positions > info.max_positions:
        return f"{message.positions} positions asked, the model allows {info.max_positions}"
    if info.is_last != (message.sampling is not None) or info.is_last != (message.downstream is None):
        return "sampling belongs to the last stage, a downstream peer to every other"
    return None


def _finish_reason(session: StageSession, token: int) -> FinishReason | None:
    sampling = session.sampling
    if sampling is None:
        return None
    if token in sampling.stop_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if session.drawn >= sampling.max_tokens else None
