"""Keeps this node's model of the history fresh: starts a worker that learns whenever enough came to be known.

The worker trains at the lowest priority and then answers; it is replaced by the next one and has nothing to lose.
Training rests between two runs for several times as long as one took, so that it never takes more than a share of a
core.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from node.selection.prediction_cache import Predictions
from node.storage.database import StorageError
from node.util.child_process import Child, ChildError, child_environment, python, start
from selector.expectation import MIN_EXPERIENCES
from selector.task import TaskContext
from selector.task_buckets import Viewpoint

POLL_S: Final = 2.0
"""Between two looks at how much the history holds."""

GROWTH: Final = 0.2
"""The model is refreshed once the history has grown by this share,"""

MAX_AGE_S: Final = 24 * 3600.0
"""or after so long in any case: what is old leaves the history, which then changes without growing."""

REST: Final = 4.0
"""Between two trainings, in durations of the last one."""

TRAINING_LIMIT_S: Final = 3600.0
"""A training that takes longer is given up. Where all cores are always full it gets about a hundredth of one."""

ANSWER_LIMIT_S: Final = 10.0
"""A worker that does not answer for so long is given up."""

MAX_LINE_BYTES: Final = 1 << 20
_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """The model in use. `share`: what it says beside the rule, 0 to 1. `trained_s`: trio's clock."""

    version: int
    experiences: int
    share: float
    training_s: float
    trained_s: float
    peak_bytes: int


class Learner:
    """Trains on the history of this node and gives `Predictions` what it learned."""

    def __init__(
        self,
        database: Path,
        opinions: Predictions,
        *,
        count: Callable[[], Awaitable[int]],
        viewpoint: Callable[[], Viewpoint],
    ) -> None:
        """Learn nothing yet. `count`: observations in the history; `viewpoint`: for whom they are weighed."""
        self.status: ModelStatus | None = None
        self._database = database
        self._opinions = opinions
        self._count = count
        self._viewpoint = viewpoint

    async def run(self) -> None:
        """Keep learning until cancelled. Nothing that fails here ends the node."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._opinions.run)
            seen = 0
            began_s = trio.current_time()
            worker: _Worker | None = None
            try:
                while True:
                    try:
                        count = await self._count()
                    except StorageError:
                        count = seen
                    if worker is not None and not self._opinions.experiences:
                        # It broke, and what it knew is lost. The history has not grown, but is to be learned again.
                        await worker.stop()
                        worker, seen = None, 0
                    is_due = count >= seen * (1 + GROWTH) or trio.current_time() - began_s >= MAX_AGE_S
                    if count >= MIN_EXPERIENCES and is_due:
                        began_s = trio.current_time()
                        trained = await self._train(nursery)
                        if trained is not None:
                            if worker is not None:
                                await worker.stop()
                            worker = trained
                        seen = count
                        await trio.sleep(REST * (trio.current_time() - began_s))
                    await trio.sleep(POLL_S)
            finally:
                if worker is not None:
                    with trio.CancelScope(shield=True):
                        await worker.stop()

    async def _train(self, nursery: trio.Nursery) -> "_Worker | None":
        """Return a worker that has learned, which answers from now on; None where nothing came of it."""
        worker: _Worker | None = None
        done = False
        try:
            worker = await _Worker.start()
            nursery.start_soon(worker.relay_stderr)
            with trio.fail_after(TRAINING_LIMIT_S):
                asked = {"database": str(self._database), "viewpoint": asdict(self._viewpoint())}
                said = await worker.ask(asked)
            if said.get("experiences"):
                self._opinions.renew(worker.predict, said["experiences"])
                self.status = ModelStatus(
                    version=self.status.version + 1 if self.status else 1,
                    experiences=said["experiences"],
                    share=said["share"],
                    training_s=said["seconds"],
                    trained_s=trio.current_time(),
                    peak_bytes=said["peak_bytes"],
                )
                _logger.info("learned", **{key: round(value, 3) for key, value in said.items()})
                done = True
        except (ChildError, OSError, ValueError, KeyError, trio.TooSlowError) as error:
            _logger.warning("nothing learned: the worker failed", reason=str(error))
        finally:
            if worker is not None and not done:
                with trio.CancelScope(shield=True):
                    await worker.stop()
        return worker if done else None


class _Worker:
    """One worker process, which is asked one thing at a time."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._buffer = bytearray()
        self._turn = trio.Lock()

    @classmethod
    async def start(cls) -> "_Worker":
        """Start a process. Raises ChildError."""
        child = await start(
            python("-m", "node.selection.training_worker"),
            what="the worker",
            environment=child_environment({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}),
            stdin=True,
            stdout=True,
        )
        return cls(child)

    async def relay_stderr(self) -> None:
        """Show what the worker writes to stderr until it ends."""
        await self._child.relay_stderr()

    async def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a line. Raises OSError, ValueError where there is none."""
        try:
            async with self._turn:
                await self._child.stdin.send_all(json.dumps(question).encode() + b"\n")
                while (end := self._buffer.find(b"\n")) < 0:
                    chunk = await self._child.stdout.receive_some()
                    if not chunk:
                        raise OSError(str(await self._child.exit_reason()))
                    if len(self._buffer) > MAX_LINE_BYTES:
                        raise OSError(f"the worker's answer has more than {MAX_LINE_BYTES} bytes")
                    self._buffer += chunk
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                answer = json.loads(line)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise OSError(str(await self._child.exit_reason())) from error
        if not isinstance(answer, dict):
            raise OSError("the worker speaks in riddles")
        return answer

    async def predict(self, context: TaskContext) -> Mapping[str, tuple[float, float]]:
        """Return what the model expects; see `opinions.Ask`."""
        try:
            with trio.fail_after(ANSWER_LIMIT_S):
                said = await self.ask(context.values())
        except (ValueError, trio.TooSlowError) as error:
            raise OSError(str(error)) from None
        return {name: (cost, deviation) for name, (cost, deviation) in said.items()}

    async def stop(self) -> None:
        """End the process, which has nothing to lose."""
        await self._child.kill()
