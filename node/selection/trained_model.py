"""A trained model, and the process that holds it while it is asked: an idle model's process ends, and its file remains.

The file is unlinked: nobody else can write it, and it goes with the node.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

import structlog
import trio

from node.util.child_process import Child, ChildError, start
from node.util.interpreter import child_environment, python
from selector.task import TaskContext

ANSWER_LIMIT_S: Final = 10.0
"""Timeout of a prediction, after which the model is given up."""

LOAD_LIMIT_S: Final = 60.0
"""The same of a prediction for which a process has to load the model: it imports for seconds."""

IDLE_S: Final = 120.0
"""A process that is not asked for so long ends."""

MAX_LINE_BYTES: Final = 1 << 20

_logger = structlog.get_logger(__name__)


class TrainedModel:
    """Trains one model, and answers with it. Errors are OSError and ValueError."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        """`folder`: where there is room for the file. `nursery`: relays what the process writes to stderr."""
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `stop`
        self._nursery = nursery
        self._worker: _Worker | None = None
        self._used_s = trio.current_time()
        self._turn = trio.Lock()
        self._is_stopped = False
        self._is_kept = False
        """Whether the file has it: not on a full disk, where the process has to stay."""

    async def train(self, database: Path, viewpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Train on the history in a database; return how it went. Raises ChildError, too."""
        async with self._turn:
            self._worker = await self._start()
            result = await self._worker.ask({"database": str(database), "viewpoint": viewpoint})
            self._used_s = trio.current_time()
            self._is_kept = bool(result.get("kept"))
            return result

    async def predict(self, context: TaskContext) -> Mapping[str, tuple[float, float]]:
        """Return the model's predictions; see `prediction_cache.Predictor`."""
        async with self._turn:
            try:
                with trio.fail_after(ANSWER_LIMIT_S if self._worker else LOAD_LIMIT_S):
                    if self._worker is None:
                        self._worker = await self._start()
                        await self._worker.ask({"load": True})
                    values = await self._worker.ask(context.values())
            except (ChildError, ValueError, trio.TooSlowError) as error:
                raise OSError(str(error)) from None
            finally:
                self._used_s = trio.current_time()
        return {name: (cost, deviation) for name, (cost, deviation) in values.items()}

    @property
    def is_loaded(self) -> bool:
        """Whether its process runs."""
        return self._worker is not None

    async def unload_if_idle(self) -> None:
        """End the process if it was not asked for a while."""
        if not self._is_kept or trio.current_time() - self._used_s < IDLE_S or self._turn.locked():
            return
        async with self._turn:
            await self._stop_worker()

    async def stop(self) -> None:
        """End the process, and forget the model; also under cancellation."""
        self._is_stopped = True  # a process that is being started does not stay
        await self._stop_worker()
        self._file.close()

    async def _stop_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.stop()

    def _check_use(self) -> None:
        if self._is_stopped:
            raise ChildError("the model was replaced")

    async def _start(self) -> "_Worker":
        self._check_use()
        worker = await _Worker.start(self._file.fileno())
        try:
            self._check_use()
        except ChildError:
            await worker.stop()
            raise
        self._nursery.start_soon(worker.relay_stderr)
        return worker


class _Worker:
    """A worker process with one request at a time."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._buffer = bytearray()
        self._turn = trio.Lock()

    @classmethod
    async def start(cls, model_file: int) -> "_Worker":
        """Start a process, with the descriptor of the file for the model. Raises ChildError."""
        child = await start(
            python("-m", "node.selection.training_worker", str(model_file)),
            what="the training worker",
            environment=child_environment({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}),
            stdin=True,
            stdout=True,
            pass_fds=[model_file],
        )
        return cls(child)

    async def relay_stderr(self) -> None:
        """Copy the worker's stderr to ours until it ends."""
        await self._child.relay_stderr()

    async def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a request. Raises OSError, ValueError."""
        try:
            async with self._turn:
                await self._child.stdin.send_all(json.dumps(request).encode() + b"\n")
                while (end := self._buffer.find(b"\n")) < 0:
                    chunk = await self._child.stdout.receive_some()
                    if not chunk:
                        raise OSError(str(await self._child.exit_reason()))
                    if len(self._buffer) > MAX_LINE_BYTES:
                        raise OSError(f"response from the training worker exceeds {MAX_LINE_BYTES} bytes")
                    self._buffer += chunk
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                answer = json.loads(line)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise OSError(str(await self._child.exit_reason())) from error
        if not isinstance(answer, dict):
            raise OSError("malformed response from the training worker: not an object")
        return answer

    async def stop(self) -> None:
        """Kill the process: what is worth saving is in the file."""
        await self._child.kill()
