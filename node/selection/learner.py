"""Keeps this node's model of the history fresh: starts a worker process that trains whenever the history has grown.

The worker trains at the lowest priority, then answers predictions until the next worker replaces it. Between two
trainings the learner rests for several times the duration of the last one, which bounds its share of a core.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from node.selection.agreed_tables import dump_table
from node.selection.prediction_cache import PredictionCache
from node.stages.voter import TableVersion
from node.storage.database import StorageError
from node.util.child_process import Child, ChildError, child_environment, python, start
from protocol.forms import Digest
from protocol.identity import ModelId
from protocol.schema import to_map
from selector.evidence import AgreedTable
from selector.heuristic import MIN_SAMPLES
from selector.task import TaskContext
from selector.task_buckets import Viewpoint

POLL_S: Final = 2.0
"""Interval of checks of the history's size."""

GROWTH: Final = 0.2
"""The model is trained anew once the history has grown by this share,"""

MAX_AGE_S: Final = 24 * 3600.0
"""or after this time in any case: old observations expire, and the history changes without growing."""

REST: Final = 4.0
"""Pause after a training, in durations of that training."""

TRAINING_LIMIT_S: Final = 3600.0
"""Timeout of a training, which gets about a hundredth of a core where all are always busy."""

ANSWER_LIMIT_S: Final = 10.0
"""Timeout of a prediction, after which the worker is given up."""

MAX_LINE_BYTES: Final = 1 << 20
_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """The model in use. `share`: its weight relative to the heuristic, 0 to 1. `trained_s`: trio's clock."""

    version: int
    sample_count: int
    share: float
    training_s: float
    trained_s: float
    peak_bytes: int


class Learner:
    """Trains on the history of this node, and sets the predictor of its `PredictionCache`."""

    def __init__(
        self,
        database: Path,
        predictions: PredictionCache,
        *,
        count: Callable[[], Awaitable[int]],
        viewpoint: Callable[[], Viewpoint],
        tables: Callable[[], Sequence[AgreedTable]] = tuple,
    ) -> None:
        """`count`: observations in the history; `viewpoint`: the peer for which they are weighted.

        `tables`: what the swarm agreed about each model.
        """
        self.status: ModelStatus | None = None
        self._database = database
        self._predictions = predictions
        self._count = count
        self._viewpoint = viewpoint
        self._tables = tables
        self._trained_tables: frozenset[Digest] = frozenset()
        """The digests of the agreed tables of the last training."""
        self._worker: _Worker | None = None
        self._trained_count = 0
        """Size of the history at the last training."""
        self._began_s = 0.0

    async def run(self) -> None:
        """Keep the model fresh until cancelled. No failure here ends the node."""
        self._began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._predictions.run)
            try:
                while True:
                    await self._refresh(nursery)
                    await trio.sleep(POLL_S)
            finally:
                await self._replace_worker(None)

    async def _refresh(self, nursery: trio.Nursery) -> None:
        """Train a new model if one is due, then rest."""
        if self._worker is not None and not self._predictions.sample_count:
            # The worker failed and its model is lost: train again, though the history has not grown.
            await self._replace_worker(None)
            self._trained_count = 0
        try:
            count = await self._count()
        except StorageError:
            return
        tables = self._tables()
        digests = frozenset(table.digest for table in tables)
        is_old = trio.current_time() - self._began_s >= MAX_AGE_S
        has_grown = count >= self._trained_count * (1 + GROWTH)
        if count < MIN_SAMPLES or not (has_grown or is_old or digests != self._trained_tables):
            return
        self._began_s = trio.current_time()
        worker = await self._train(nursery, tables)
        if worker is not None:
            await self._replace_worker(worker)
        self._trained_count, self._trained_tables = count, digests
        await trio.sleep(REST * (trio.current_time() - self._began_s))

    async def _replace_worker(self, worker: "_Worker | None") -> None:
        old, self._worker = self._worker, worker
        if old is not None:
            await old.stop()

    async def _train(self, nursery: trio.Nursery, tables: Sequence[AgreedTable]) -> "_Worker | None":
        """Return a worker with a trained model, which the predictions use from now on; None if training failed."""
        worker: _Worker | None = None
        trained = False
        try:
            worker = await _Worker.start()
            nursery.start_soon(worker.relay_stderr)
            with trio.fail_after(TRAINING_LIMIT_S):
                result = await worker.ask(
                    {
                        "database": str(self._database),
                        "viewpoint": asdict(self._viewpoint()),
                        "tables": [dump_table(table) for table in tables],
                    }
                )
            if result.get("samples"):
                learned_from = {
                    ModelId(table.model): TableVersion(table.epoch, table.digest)
                    for table in tables
                    if table.model in result["learned_from"]
                }
                self._predictions.set_predictor(worker.predict, result["samples"], learned_from)
                self.status = ModelStatus(
                    version=self.status.version + 1 if self.status else 1,
                    sample_count=result["samples"],
                    share=result["share"],
                    training_s=result["seconds"],
                    trained_s=trio.current_time(),
                    peak_bytes=result["peak_bytes"],
                )
                _logger.info("model trained", **result)
                trained = True
        except (ChildError, OSError, ValueError, KeyError, trio.TooSlowError) as error:
            _logger.warning("training failed", reason=str(error))
        finally:
            if worker is not None and not trained:
                await worker.stop()
        return worker if trained else None


class _Worker:
    """A worker process with one request at a time."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._buffer = bytearray()
        self._turn = trio.Lock()

    @classmethod
    async def start(cls) -> "_Worker":
        """Start a process. Raises ChildError."""
        child = await start(
            python("-m", "node.selection.training_worker"),
            what="the training worker",
            environment=child_environment({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}),
            stdin=True,
            stdout=True,
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

    async def predict(self, context: TaskContext) -> Mapping[str, tuple[float, float]]:
        """Return the model's predictions; see `prediction_cache.Predictor`."""
        try:
            with trio.fail_after(ANSWER_LIMIT_S):
                facts = [to_map(each) for each in context.stage_facts]
                values = await self.ask({**context.values(), "stage_facts": facts})
        except (ValueError, trio.TooSlowError) as error:
            raise OSError(str(error)) from None
        return {name: (cost, deviation) for name, (cost, deviation) in values.items()}

    async def stop(self) -> None:
        """Kill the process, which holds no state worth saving."""
        await self._child.kill()
