"""The worker process of an engine: its start, its environment, and frames to and from it."""

import os
import socket
from contextlib import suppress

import psutil
import trio

from node.engine.interface import EngineError, EngineOptions
from node.engine.worker_protocol import PREFIX, Buffer, Header, decode_header
from node.util.child_process import Child, ChildError, child_environment, python, start


class WorkerExited(Exception):
    """The worker closed its end of the socket."""


class WorkerProcess:
    """A worker process and the socket to it; one task may send while another receives."""

    def __init__(self, sock: trio.socket.SocketType, child: Child) -> None:
        self.child = child
        self._socket = sock

    async def send(self, buffers: list[Buffer]) -> None:
        """Send the buffers of a frame. Raises WorkerExited."""
        try:
            for buffer in buffers:
                data = memoryview(buffer)
                while data:
                    data = data[await self._socket.send(data) :]
        except OSError as error:
            raise WorkerExited from error

    async def receive(self) -> tuple[Header, memoryview]:
        """Return the next frame. Raises WorkerExited."""
        header_bytes, payload_bytes = PREFIX.unpack(await self._receive_exactly(PREFIX.size))
        header = decode_header(await self._receive_exactly(header_bytes))
        return header, await self._receive_exactly(payload_bytes)

    async def _receive_exactly(self, count: int) -> memoryview:
        data = memoryview(bytearray(count))
        received = 0
        while received < count:
            try:
                size = await self._socket.recv_into(data[received:])
            except OSError as error:
                raise WorkerExited from error
            if size == 0:
                raise WorkerExited
            received += size
        return data

    async def exit_reason(self) -> str:
        """Return in one line why the worker exited."""
        return str(await self.child.exit_reason())

    async def kill(self) -> None:
        """End the process, also under cancellation."""
        await self.child.kill()
        self._socket.close()


class SpareWorker:
    """A worker process that is started before the span is known: its imports take seconds."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._taken = trio.Event()
        self._process: WorkerProcess | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the process until it is taken, or cancelled; a failed start is left to the engine to report."""
        with suppress(EngineError):
            self._process = await start_process(self._options, "a worker")
        task_status.started()
        try:
            await self._taken.wait()
        finally:
            if (process := self.take()) is not None:
                await process.kill()

    def take(self) -> WorkerProcess | None:
        """Give the process away, if it is still there."""
        process, self._process = self._process, None
        self._taken.set()
        return process


async def start_process(options: EngineOptions, name: str) -> WorkerProcess:
    """Start a worker process. Raises EngineError."""
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
    return WorkerProcess(trio.socket.from_stdlib_socket(ours), child)


def _environment(options: EngineOptions) -> dict[str, str]:
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
