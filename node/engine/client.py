"""The real engine as the node sees it: a worker process of its own, so that computing never holds up the network loop.

Whatever happens to the worker, nothing here raises but EngineError and its kinds, and only in the calls that it
concerns. KV pages are given out on this side: opening, beginning and closing never wait for a computation.
"""

import itertools
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import psutil
import trio

from node.engine import worker_protocol
from node.engine.engine_config import EngineOptions, ShardSource
from node.engine.interface import (
    EngineCrashed,
    EngineError,
    EngineStatistics,
    KvCompatibilityKey,
    Prefix,
    SessionOptions,
    SliceFault,
    SliceInput,
    SpanInfo,
    StepFailed,
    StepResult,
    Variant,
    VariantNotReady,
)
from node.engine.kv_allocator import KvAllocator
from node.models.store import Package
from node.util.child_process import Child, ChildError, child_environment, python, start
from protocol.identity import BlockRange, SessionId


class SpareWorker:
    """A worker's process that is started before it is known what it is to serve: what it imports takes seconds."""

    def __init__(self, options: EngineOptions) -> None:
        """Start nothing yet; `options` are those of the engine that will take it."""
        self._options = options
        self._taken = trio.Event()
        self._connection: _Connection | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Have the process until it is taken, or cancelled; where there can be none, whoever needs one will say so."""
        with suppress(EngineError):
            self._connection = await _spawn(self._options, "a worker")
        task_status.started()
        try:
            await self._taken.wait()
        finally:
            if (connection := self.take()) is not None:
                await connection.kill()

    def take(self) -> "_Connection | None":
        """Give the process away, if there is one still."""
        connection, self._connection = self._connection, None
        self._taken.set()
        return connection


@asynccontextmanager
async def start_engine(
    package: Package, blocks: BlockRange, options: EngineOptions | None = None, *, spare: SpareWorker | None = None
) -> AsyncIterator["WorkerEngine"]:
    """Run an engine for a span of a model package whose files are there; see `start_worker`."""
    async with start_worker(source_from_package(package, blocks), blocks, options, spare=spare) as engine:
        yield engine


@asynccontextmanager
async def start_worker(
    source: ShardSource, blocks: BlockRange, options: EngineOptions | None = None, *, spare: SpareWorker | None = None
) -> AsyncIterator["WorkerEngine"]:
    """Run a worker process with a span loaded, until the block is left; then it is killed, having nothing to lose.

    `spare`: taken if it is there, else another is started. Raises EngineError if the span cannot be served here, ever,
    and EngineCrashed if the worker died while it loaded. What is raised inside the block comes out in an
    ExceptionGroup, as from any nursery.
    """
    options = options or EngineOptions()
    name = f"the worker of blocks {blocks}"
    connection = (spare.take() if spare is not None else None) or await _spawn(options, name)
    connection.child.what = name
    try:
        engine = WorkerEngine(connection, *await _load(connection, source, blocks, options))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.child.relay_stderr)
            nursery.start_soon(engine.receive_loop)
            nursery.start_soon(engine.send_loop)
            yield engine
            nursery.cancel_scope.cancel()
    finally:
        await connection.kill()


async def _spawn(options: EngineOptions, name: str) -> "_Connection":
    """Start a worker's process. Raises EngineError."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            child = await start(
                python("-m", "node.engine.worker", str(theirs.fileno())),
                what=name,
                environment=_environment(options),
                pass_fds=[theirs.fileno()],
            )
        except BaseException as error:
            ours.close()
            if isinstance(error, ChildError):
                raise EngineError(str(error)) from error
            raise
    return _Connection(trio.socket.from_stdlib_socket(ours), child)


async def _load(
    connection: "_Connection", source: ShardSource, blocks: BlockRange, options: EngineOptions
) -> tuple[SpanInfo, frozenset[Variant]]:
    """Tell the worker what to be, and wait until it is; what it writes to stderr meanwhile is shown."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.child.relay_stderr)
        try:
            return await _loaded(connection, source, blocks, options)
        except EngineError as error:
            failure = error
        finally:
            nursery.cancel_scope.cancel()
    raise failure


async def _loaded(
    connection: "_Connection", source: ShardSource, blocks: BlockRange, options: EngineOptions
) -> tuple[SpanInfo, frozenset[Variant]]:
    """Tell the worker what to be, and wait until it is."""
    with trio.move_on_after(options.start_timeout_s):
        try:
            await connection.send(worker_protocol.encode_load(source, blocks, options))
            header, _ = await connection.receive()
        except _WorkerExited:
            raise EngineCrashed(str(await connection.child.exit_reason())) from None
        if header["did"] == "failed":
            raise EngineError(header["error"])
        return worker_protocol.decode_loaded(header)
    raise EngineError(f"{connection.child.what} did not load within {options.start_timeout_s:g} s")


def source_from_package(package: Package, blocks: BlockRange) -> ShardSource:
    """Return where the files of a span lie in a model package."""
    manifest = package.manifest
    first, last = blocks.start == 0, blocks.end == manifest.block_count
    return ShardSource(
        model=manifest.model_id,
        config=manifest.config,
        block_files={block: package.path_of(manifest.blocks[block]) for block in range(blocks.start, blocks.end)},
        embed_file=package.path_of(manifest.embed) if first or (last and manifest.tied) else None,
        head_file=package.path_of(manifest.head) if last else None,
    )


class WorkerEngine:
    """Implements Engine over a worker process. Made by `start_engine`, which runs its two tasks."""

    def __init__(self, connection: "_Connection", info: SpanInfo, variants: frozenset[Variant]) -> None:
        self._connection = connection
        self._info = info
        self._variants = variants
        self._building: dict[int, Variant] = {}
        self._pages = KvAllocator(info)
        # The frame that began a session tells it from an earlier one of the same name.
        self._sessions: dict[SessionId, _Frame] = {}
        # Bounded by the sessions that fit (an open or a close each) and by the callers that wait for a step.
        self._outbox: deque[_Frame] = deque()
        self._outbox_filled = trio.Event()
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count()
        self._crashed = trio.Event()
        self._reason = ""
        self._steps = 0
        self._compute_s = 0.0

    @property
    def info(self) -> SpanInfo:
        """What it holds."""
        return self._info

    def variants(self) -> frozenset[Variant]:
        """Return the variants that are ready; see Engine."""
        return self._variants

    async def prepare(self, variant: Variant) -> None:
        """Have the worker build a variant; see Engine. If the caller is cancelled, it is built all the same."""
        self._raise_if_crashed()
        if variant in self._variants:
            return
        number = next(self._numbers)
        call = self._calls[number] = _Call({}, ())
        self._building[number] = variant
        self._post(worker_protocol.encode_prepare(number, variant))
        await call.answered.wait()
        if variant not in self._variants:
            raise call.error or EngineCrashed(self._reason)

    async def open(
        self, session: SessionId, positions: int, prefix: Prefix | None = None
    ) -> Mapping[KvCompatibilityKey, int]:
        """Reserve KV memory for a session; see Engine."""
        await trio.lowlevel.checkpoint()
        self._raise_if_crashed()
        return self._pages.open(session, positions, prefix)

    async def begin(self, session: SessionId, options: SessionOptions) -> int:
        """Tell the worker of a session; see Engine."""
        await trio.lowlevel.checkpoint()
        self._raise_if_crashed()
        try:
            if options.variant not in self._variants:
                raise VariantNotReady(f"the variant {options.variant} is not ready here")
            reservation = self._pages.begin(session, options)
        except EngineError:
            self._close(session, keep=False)
            raise
        self._sessions[session] = self._post(worker_protocol.encode_begin(session, options, reservation))
        return reservation.cached

    async def step(self, slices: Sequence[SliceInput]) -> StepResult:
        """Run one step in the worker; see Engine. If the caller is cancelled, a step that is under way still runs."""
        self._raise_if_crashed()
        unknown = tuple(
            SliceFault(rows.session, f"session {rows.session.job}/{rows.session.stage} is not open, or has not begun")
            for rows in slices
            if rows.session not in self._sessions
        )
        for fault in unknown:
            self._close(fault.session, keep=False)
        slices = [rows for rows in slices if rows.session in self._sessions]
        if not slices:
            raise StepFailed(unknown)
        sessions = tuple(rows.session for rows in slices)
        for rows in slices:
            self._pages.rewind(rows.session, rows.position)
        number = next(self._numbers)
        ends = {rows.session: rows.position + rows.tensor.rows for rows in slices}
        call = self._calls[number] = _Call({session: self._sessions[session] for session in sessions}, sessions, ends)
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
        """Carry a session on under another id; see Engine."""
        await trio.lowlevel.checkpoint()
        self._raise_if_crashed()
        self._pages.rename(session, successor)
        if (begun := self._sessions.pop(session, None)) is not None:
            self._sessions[successor] = begun
            self._post(worker_protocol.encode_rename(session, successor))

    async def close(self, session: SessionId) -> None:
        """Free a session; see Engine."""
        await trio.lowlevel.checkpoint()
        self._close(session, keep=True)

    async def wait_crashed(self) -> str:
        """Wait until the worker is dead, and return why; see Engine."""
        await self._crashed.wait()
        return self._reason

    def statistics(self) -> EngineStatistics:
        """Return the counts; see Engine."""
        return EngineStatistics(
            sessions=len(self._pages),
            reserved_positions=self._pages.reserved_positions,
            cached_positions=self._pages.cached_positions,
            hit_positions=self._pages.hit_positions,
            evicted_positions=self._pages.evicted_positions,
            building=tuple(self._building.values()),
            steps=self._steps,
            compute_s=self._compute_s,
            worker_pid=None if self._crashed.is_set() else self._connection.child.process.pid,
        )

    async def send_loop(self) -> None:
        """Send what is posted, in order, until the worker hangs up."""
        try:
            while True:
                while self._outbox:
                    frame = self._outbox.popleft()
                    frame.taken = True
                    await self._connection.send(frame.buffers)
                self._outbox_filled = trio.Event()
                await self._outbox_filled.wait()
        except _WorkerExited:
            return  # receive_loop notices, too, and tells everybody

    async def receive_loop(self) -> None:
        """Hand out answers until the worker hangs up; then end every call that waits for one."""
        try:
            while True:
                self._answer(*await self._connection.receive())
        except _WorkerExited:
            self._reason = str(await self._connection.child.exit_reason())
        self._crashed.set()
        for frame in self._outbox:
            frame.taken = True
        self._outbox.clear()
        self._sessions.clear()
        self._building.clear()
        self._pages = KvAllocator(self._info)
        for call in self._calls.values():
            call.answered.set()
        self._calls.clear()

    def _answer(self, header: worker_protocol.Header, payload: memoryview) -> None:
        number = header["call"]
        call = self._calls.pop(number)
        building = self._building.pop(number, None)
        if header["did"] == "error":
            faults = worker_protocol.decode_faults(header)
            call.error = StepFailed(faults) if faults else EngineError(header["error"])
            for session, begun in call.begun.items():  # the worker has closed them already
                if self._sessions.get(session) is begun:
                    self._free(session, keep=False)
        elif building is not None:
            self._variants |= {building}
        else:
            call.result = worker_protocol.decode_result(header, payload, call.order)
            failed = {fault.session for fault in call.result.faults}
            for session, begun in call.begun.items():
                if self._sessions.get(session) is not begun:
                    continue
                if session in failed:  # the worker has closed it already
                    self._free(session, keep=False)
                else:
                    self._pages.advance(session, call.ends[session])
            self._steps += 1
            self._compute_s += call.result.compute_s
        call.answered.set()

    def _post(self, buffers: list[worker_protocol.Buffer]) -> "_Frame":
        frame = _Frame(buffers)
        self._outbox.append(frame)
        self._outbox_filled.set()
        return frame

    def _close(self, session: SessionId, *, keep: bool) -> None:
        begun = self._sessions.get(session)
        self._free(session, keep=keep)
        if begun is None:  # the worker never heard of it
            return
        if begun.taken:
            self._post(worker_protocol.encode_close(session))
        else:
            self._outbox.remove(begun)

    def _free(self, session: SessionId, *, keep: bool) -> None:
        self._pages.close(session, keep=keep)
        self._sessions.pop(session, None)

    def _raise_if_crashed(self) -> None:
        if self._crashed.is_set():
            raise EngineCrashed(self._reason)


@dataclass(slots=True, eq=False)
class _Frame:
    """Something to send; `taken` once sending has begun, after which it cannot be taken back."""

    buffers: list[worker_protocol.Buffer]
    taken: bool = False


@dataclass(slots=True, eq=False)
class _Call:
    """A step that waits for its answer. `order`: the session of each slice. `ends`: how far the step takes each."""

    begun: dict[SessionId, _Frame]
    order: tuple[SessionId, ...]
    ends: dict[SessionId, int] = field(default_factory=dict)
    answered: trio.Event = field(default_factory=trio.Event)
    result: StepResult | None = None
    error: EngineError | None = None


class _WorkerExited(Exception):
    """The worker closed its end."""


class _Connection:
    """Frames to and from a worker process; one task may send while another receives."""

    def __init__(self, sock: trio.socket.SocketType, child: Child) -> None:
        self.child = child
        self._socket = sock

    async def send(self, buffers: list[worker_protocol.Buffer]) -> None:
        """Send the buffers of a frame."""
        try:
            for buffer in buffers:
                data = memoryview(buffer)
                while data:
                    data = data[await self._socket.send(data) :]
        except OSError as error:
            raise _WorkerExited from error

    async def receive(self) -> tuple[worker_protocol.Header, memoryview]:
        """Return the next frame."""
        prefix = await self._receive_exactly(worker_protocol.PREFIX.size)
        header_bytes, payload_bytes = worker_protocol.PREFIX.unpack(prefix)
        header = worker_protocol.decode_header(await self._receive_exactly(header_bytes))
        return header, await self._receive_exactly(payload_bytes)

    async def _receive_exactly(self, count: int) -> memoryview:
        data = memoryview(bytearray(count))
        received = 0
        while received < count:
            try:
                size = await self._socket.recv_into(data[received:])
            except OSError as error:
                raise _WorkerExited from error
            if size == 0:
                raise _WorkerExited
            received += size
        return data

    async def kill(self) -> None:
        """End the process, also under cancellation."""
        await self.child.kill()
        self._socket.close()


def _environment(options: EngineOptions) -> dict[str, str]:
    """Return the environment of a worker: no spinning threads, no hub, no chatter."""
    threads = str(options.threads or physical_cores())
    changes = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # Threads that wait by spinning would take the cores from the node's event loop.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return child_environment(changes)


def physical_cores() -> int:
    """Return how many physical cores this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(psutil.cpu_count(logical=False) or 1, allowed or 1))
