"""A worker process and the frames to and from it; `client.py` makes an engine of them."""

import socket
from contextlib import suppress

import trio

from node.engine import worker_protocol
from node.engine.interface import EngineError, EngineOptions
from node.models.layout import GGUF
from node.util.child_process import Child, ChildError, start
from node.util.interpreter import child_environment, python
from node.util.priority import BRIEFLY_SPINNING_THREADS
from node.util.processor import physical_cores

READ_AHEAD_BYTES = 16 << 10
"""What is read from a worker at once, at least: a small frame whole."""


class WorkerExited(Exception):
    """The worker closed its end of the socket."""


class WorkerProcess:
    """A worker process and the socket to it; one task may send while another receives."""

    def __init__(self, sock: trio.socket.SocketType, child: Child) -> None:
        self.child = child
        self._socket = sock
        self._ahead = b""
        """What has arrived behind what was asked for."""

    async def send(self, buffers: list[worker_protocol.Buffer]) -> None:
        """Send the buffers of a frame. Raises WorkerExited."""
        try:
            for buffer in buffers:
                data = memoryview(buffer)
                while data:
                    data = data[await self._socket.send(data) :]
        except OSError as error:
            raise WorkerExited from error

    async def receive(self) -> tuple[worker_protocol.Header, memoryview]:
        """Return the next frame. Raises WorkerExited."""
        header_bytes, payload_bytes = worker_protocol.PREFIX.unpack(
            await self._receive_exactly(worker_protocol.PREFIX.size)
        )
        header = worker_protocol.decode_header(await self._receive_exactly(header_bytes))
        return header, await self._receive_exactly(payload_bytes)

    async def _receive_exactly(self, count: int) -> memoryview:
        """Return so many bytes. A small frame comes with one call of the socket, a large one without a copy."""
        data = memoryview(bytearray(count))
        received = 0
        while received < count:
            if count - received >= READ_AHEAD_BYTES and not self._ahead:
                received += await self._receive_into(data[received:])
                continue
            if not self._ahead:
                ahead = bytearray(READ_AHEAD_BYTES)
                self._ahead = bytes(memoryview(ahead)[: await self._receive_into(memoryview(ahead))])
            taken = self._ahead[: count - received]
            self._ahead = self._ahead[len(taken) :]
            data[received : received + len(taken)] = taken
            received += len(taken)
        return data

    async def _receive_into(self, data: memoryview) -> int:
        try:
            size = await self._socket.recv_into(data)
        except OSError as error:
            raise WorkerExited from error
        if size == 0:
            raise WorkerExited
        return size

    async def kill(self) -> None:
        """End the process, also under cancellation."""
        await self.child.kill()
        self._socket.close()


class SpareWorker:
    """A worker process that is started before the span is known, and imports torch once a span is to need it.

    These imports take seconds; the node may take as long to fetch the span's files.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._expected = trio.Event()
        self._taken = trio.Event()
        self._process: WorkerProcess | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the process until it is taken, or cancelled; a failed start is left to the engine to report."""
        with suppress(EngineError):
            self._process = await start_process(self._options, "a worker")
        task_status.started()
        try:
            await self._expected.wait()
            if self._process is not None:
                with suppress(WorkerExited):
                    await self._process.send(worker_protocol.encode_frame({"do": "import"}))
            await self._taken.wait()
        finally:
            if (process := self._give()) is not None:
                await process.kill()

    def expect(self, package_format: str) -> None:
        """Have the process import what a span of this format will need; for one of GGUF files that is nothing."""
        if package_format != GGUF:
            self._expected.set()

    def take(self, package_format: str) -> "WorkerProcess | None":
        """Give the process away, if it is still there and holds nothing that a span of this format does not need."""
        return None if package_format == GGUF and self._expected.is_set() else self._give()

    def _give(self) -> "WorkerProcess | None":
        process, self._process = self._process, None
        self._taken.set()
        self._expected.set()
        return process


async def start_process(options: EngineOptions, name: str) -> WorkerProcess:
    """Start a worker process. Raises EngineError."""
    threads = str(options.threads or physical_cores())
    changes = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        **BRIEFLY_SPINNING_THREADS,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            child = await start(
                python("-m", "node.engine.worker", str(theirs.fileno())),
                what=name,
                environment=child_environment(changes),
                pass_fds=[theirs.fileno()],
            )
        except BaseException as error:
            ours.close()
            if isinstance(error, ChildError):
                raise EngineError(str(error)) from error
            raise
    return WorkerProcess(trio.socket.from_stdlib_socket(ours), child)
