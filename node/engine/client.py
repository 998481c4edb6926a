"""The real engine as the node sees it: a worker process of its own, so that computing never blocks the network loop.

Whatever happens to the worker, only EngineError and its subclasses are raised here, and only in the calls concerned.
The KV allocator runs on this side: opening, beginning and closing never wait for a computation.
"""

import itertools
import math
from collections import deque
from collections.abc import AsyncIterator, Sequence, Set
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import trio

from node.engine import worker_protocol
from node.engine.base import Engine
from node.engine.interface import (
    REFERENCE,
    BadRequest,
    EngineCrashed,
    EngineError,
    EngineOptions,
    NoVariantMemory,
    SessionNotOpen,
    SessionOptions,
    ShardSource,
    SliceFault,
    SliceInput,
    SpanInfo,
    StepFailed,
    StepResult,
    Variant,
    source_from_package,
)
from node.engine.kv_allocator import KvReservation
from node.engine.on_demand import UNLOAD_AFTER_S, OnDemand
from node.engine.worker_process import SpareWorker, WorkerExited, WorkerProcess, start_process
from node.models.store import Package
from node.util.signal import Signal
from protocol.identity import BlockRange, SessionId

UNLOAD_ROUND_S = 5.0
"""How often it is checked what can be unloaded."""

EXPIRY_ROUND_S = 60.0
"""How often cached prompts that were not used meanwhile come closer to their eviction."""


def start_engine(
    package: Package, blocks: BlockRange, options: EngineOptions | None = None, *, spare: SpareWorker | None = None
) -> AbstractAsyncContextManager["WorkerEngine"]:
    """Run an engine for a span of a model package whose files are present; see `start_worker`."""
    return start_worker(source_from_package(package, blocks), blocks, options, spare=spare)


@asynccontextmanager
async def start_worker(
    source: ShardSource, blocks: BlockRange, options: EngineOptions | None = None, *, spare: SpareWorker | None = None
) -> AsyncIterator["WorkerEngine"]:
    """Run a worker process with a span loaded, until the block is left; then it is killed: it has no state to save.

    `spare`: taken if it is there, else a process is started. Raises EngineError if the span cannot be served here,
    ever, and EngineCrashed if the worker died while it loaded. What is raised inside the block comes out in an
    ExceptionGroup, as from any nursery.
    """
    options = options or EngineOptions()
    name = f"the worker of blocks {blocks}"
    process = (spare.take(source.format) if spare is not None else None) or await start_process(options, name)
    process.child.what = name
    try:
        engine = WorkerEngine(process, *await _load(process, source, blocks, options))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.child.relay_stderr)
            nursery.start_soon(engine.receive_loop)
            nursery.start_soon(engine.send_loop)
            nursery.start_soon(engine.unload_loop)
            yield engine
            nursery.cancel_scope.cancel()
    finally:
        await process.kill()


async def _load(
    process: WorkerProcess, source: ShardSource, blocks: BlockRange, options: EngineOptions
) -> tuple[SpanInfo, frozenset[Variant]]:
    """Have the worker load its span; its stderr is shown meanwhile."""
    header: worker_protocol.Header | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.child.relay_stderr)
        with trio.move_on_after(options.start_timeout_s) as loading:
            with suppress(WorkerExited):
                await process.send(worker_protocol.encode_load(source, blocks, options))
                header, _ = await process.receive()
            reason = "" if header is not None else str(await process.child.exit_reason())
        nursery.cancel_scope.cancel()
    if loading.cancelled_caught:
        raise EngineError(f"{process.child.what} did not load within {options.start_timeout_s:g} s")
    if header is None:
        raise EngineCrashed(reason)
    if header["did"] == "failed":
        raise EngineError(header["error"])
    return worker_protocol.decode_loaded(header)


@dataclass(slots=True, eq=False)
class _Frame:
    """A frame to send; `taken` once sending has begun, after which it cannot be withdrawn."""

    buffers: list[worker_protocol.Buffer]
    taken: bool = False
    dropped: tuple[int, ...] = ()
    """Pages that the worker learns from it to have been given up."""


@dataclass(slots=True, eq=False)
class _Call:
    """A call that waits for its answer. `order`: the session of each slice. `ends`: how far the step takes each.

    `loading`: what is in memory once it is answered, also where its caller was cancelled.
    """

    begun: dict[SessionId, _Frame] = field(default_factory=dict)
    order: tuple[SessionId, ...] = ()
    ends: dict[SessionId, int] = field(default_factory=dict)
    loading: OnDemand | None = None
    answered: trio.Event = field(default_factory=trio.Event)
    result: StepResult | None = None
    error: EngineError | None = None


class WorkerEngine(Engine):
    """An engine over a worker process. Made by `start_worker`, which runs its tasks.

    `_sessions` keeps the frame that began a session, which tells it from an earlier one with the same id.

    The reference is available always, but in memory only while sessions want it, and so is what texts that follow a
    JSON Schema need: the first of them waits until it is loaded, beside the steps of others.
    """

    _sessions: dict[SessionId, _Frame]

    def __init__(self, process: WorkerProcess, info: SpanInfo, variants: frozenset[Variant]) -> None:
        super().__init__(info, variants)
        self._process = process
        # Bounded by the sessions that fit (an open or a close each) and by the callers that wait for a step.
        self._outbox: deque[_Frame] = deque()
        self._outbox_filled = Signal()
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count()
        self._reference = OnDemand()
        self._constraints = OnDemand()
        self._stepped_s: float | None = None
        """When the last step was asked for; None if the worker has given back since all that steps had taken."""
        self._trimmed_s = -math.inf
        """When the worker last gave back what the busiest moment since the time before had not needed."""
        self._expired_s = trio.current_time()
        """When cached prompts last came closer to their eviction."""

    async def begin(self, session: SessionId, options: SessionOptions) -> int:
        """Begin a session as Engine describes it, once what it uses is loaded; BadRequest if that cannot be."""
        is_on_reference, is_constrained = options.variant == REFERENCE, _is_constrained(options)
        # Before the first wait: else it could be unloaded meanwhile, and a session that is closed then would stay here.
        if is_on_reference:
            self._reference.sessions.add(session)
        if is_constrained:
            self._constraints.sessions.add(session)
        try:
            if is_on_reference and not self._reference.is_loaded:
                await self._request({"do": "prepare", "variant": REFERENCE}, REFERENCE, self._reference)
            if is_constrained and not self._constraints.is_loaded:
                await self._request({"do": "constrain"}, loading=self._constraints)
            return await super().begin(session, options)
        except EngineError:
            self._close(session, keep=False)
            raise
        except trio.Cancelled:
            self._leave(session)
            raise

    async def unload_loop(self) -> None:
        """Have what nothing has used for a while unloaded; the reference only where something else can serve."""
        while True:
            await trio.sleep(UNLOAD_ROUND_S)
            if self._reference.can_unload and self._variants != {REFERENCE}:
                self._reference.is_loaded = False
                self._post(worker_protocol.encode_frame({"do": "unload"}))
            if self._constraints.can_unload:
                self._constraints.is_loaded = False
                self._post(worker_protocol.encode_frame({"do": "unconstrain"}))
            if (now_s := trio.current_time()) - self._expired_s >= EXPIRY_ROUND_S:
                self._expired_s = now_s
                if self._pages.expire():
                    self._stepped_s = self._stepped_s or now_s  # there is memory to give back
            if self._stepped_s is not None:
                self._trim(self._stepped_s)

    def _trim(self, stepped_s: float) -> None:
        """Have the worker give back memory: all that sessions had taken some time after they ended, else now and then.

        A span that some job or trial always uses would otherwise keep what its busiest minute took.
        """
        now_s = trio.current_time()
        is_idle = not self._sessions and now_s - stepped_s >= UNLOAD_AFTER_S
        if not is_idle and now_s - self._trimmed_s < UNLOAD_AFTER_S:
            return
        self._trimmed_s = now_s
        if is_idle:
            self._stepped_s = None
        header = {"do": "trim", "dropped": self._pages.take_dropped(), "idle": is_idle}
        self._post(worker_protocol.encode_frame(header))

    async def prepare(self, variant: Variant) -> None:
        """Have the worker build a variant. If the caller is cancelled, it is built all the same."""
        self._raise_if_crashed()
        if variant not in self._variants:
            await self._request({"do": "prepare", "variant": variant}, building=variant)

    def drop(self, variant: Variant) -> None:
        """Have the worker give up a variant, before it builds another one."""
        super().drop(variant)
        self._post(worker_protocol.encode_frame({"do": "drop", "variant": variant}))

    async def _request(
        self, header: worker_protocol.Header, building: Variant | None = None, loading: OnDemand | None = None
    ) -> None:
        """Have the worker load or build something beside its steps, also if the caller is cancelled."""
        self._raise_if_crashed()
        number = next(self._numbers)
        call = self._calls[number] = _Call(loading=loading)
        if building is not None:
            self._building[number] = building
        self._post(worker_protocol.encode_frame({**header, "call": number}))
        await call.answered.wait()
        if call.error is not None:
            raise call.error
        self._raise_if_crashed()

    async def step(self, slices: Sequence[SliceInput]) -> StepResult:
        """Run one step in the worker. If the caller is cancelled, a step that is under way still runs."""
        self._raise_if_crashed()
        unknown = tuple(
            SliceFault(rows.session, str(SessionNotOpen(rows.session)))
            for rows in slices
            if rows.session not in self._sessions
        )
        for fault in unknown:
            self._close(fault.session, keep=False)
        slices = [rows for rows in slices if rows.session in self._sessions]
        if not slices:
            raise StepFailed(unknown)
        for rows in slices:
            self._pages.rewind(rows.session, rows.position)
        self._stepped_s = trio.current_time()
        number = next(self._numbers)
        call = self._calls[number] = _Call(
            begun={rows.session: self._sessions[rows.session] for rows in slices},
            order=tuple(rows.session for rows in slices),
            ends={rows.session: rows.position + rows.tensor.rows for rows in slices},
        )
        frame = self._post(worker_protocol.encode_step(number, slices))
        try:
            await call.answered.wait()
        finally:
            if not frame.taken:
                self._outbox.remove(frame)
                del self._calls[number]
        if call.result is None:
            raise call.error or EngineCrashed(self._reason)
        return replace(call.result, faults=unknown + call.result.faults) if unknown else call.result

    async def rename(self, session: SessionId, successor: SessionId) -> None:
        """Carry a session on under another id, here and in the worker."""
        await super().rename(session, successor)
        for loaded in (self._reference, self._constraints):
            loaded.rename(session, successor)
        if successor in self._sessions:
            self._post(worker_protocol.encode_frame({"do": "rename", "session": session, "successor": successor}))

    async def send_loop(self) -> None:
        """Send the posted frames, in order, until the worker exits."""
        try:
            while True:
                while self._outbox:
                    frame = self._outbox.popleft()
                    frame.taken = True
                    await self._process.send(frame.buffers)
                await self._outbox_filled.wait()
        except WorkerExited:
            return  # receive_loop notices, too, and ends the calls

    async def receive_loop(self) -> None:
        """Deliver answers until the worker exits; then end every call that waits for one."""
        try:
            while True:
                self._answer(*await self._process.receive())
        except WorkerExited:
            reason = str(await self._process.child.exit_reason())
        self._crash(reason)
        for frame in self._outbox:
            frame.taken = True
        self._outbox.clear()
        for call in self._calls.values():
            call.answered.set()
        self._calls.clear()

    def _answer(self, header: worker_protocol.Header, payload: memoryview) -> None:
        number = header["call"]
        call = self._calls.pop(number)
        building = self._building.pop(number, None)
        if header["did"] == "error":
            faults = worker_protocol.decode_faults(header)
            by_request, by_memory = header.get("by_request"), header.get("by_memory")
            kind = BadRequest if by_request else NoVariantMemory if by_memory else EngineError
            call.error = StepFailed(faults) if faults else kind(header["error"])
            self._settle(call, failed=call.begun.keys())
        elif header["did"] == "ready":
            self._variants |= set() if building is None else {building}
            if call.loading is not None:
                call.loading.loaded()
        else:
            call.result = worker_protocol.decode_result(header, payload, call.order)
            self._settle(call, failed={fault.session for fault in call.result.faults})
            self._steps += 1
            self._compute_s += call.result.compute_s
        call.answered.set()

    def _settle(self, call: _Call, failed: Set[SessionId]) -> None:
        """Advance the sessions of a step; free those that failed, which the worker has closed already."""
        for session, begun in call.begun.items():
            if self._sessions.get(session) is not begun:
                continue
            if session in failed:
                self._leave(session)
                super()._close(session, keep=False)
            else:
                self._pages.advance(session, call.ends[session])

    def _post(self, buffers: list[worker_protocol.Buffer]) -> _Frame:
        frame = _Frame(buffers)
        self._outbox.append(frame)
        self._outbox_filled.set()
        return frame

    def _begun(self, session: SessionId, options: SessionOptions, reservation: KvReservation) -> _Frame:
        frame = self._post(worker_protocol.encode_begin(session, options, reservation))
        frame.dropped = reservation.dropped
        return frame

    def _close(self, session: SessionId, *, keep: bool) -> None:
        begun = self._sessions.get(session)
        self._leave(session)
        super()._close(session, keep=keep)
        if begun is None:  # the worker has no such session
            return
        if begun.taken:
            self._post(worker_protocol.encode_frame({"do": "close", "session": session}))
        else:
            self._outbox.remove(begun)
            self._pages.drop_again(begun.dropped)

    def _leave(self, session: SessionId) -> None:
        self._reference.leave(session)
        self._constraints.leave(session)

    def _worker_pid(self) -> int | None:
        return None if self._crashed.is_set() else self._process.child.process.pid


def _is_constrained(options: SessionOptions) -> bool:
    return options.sampling is not None and bool(options.sampling.json_schema)
