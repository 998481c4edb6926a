"""Fits selectors in parallel worker processes.

A worker receives a dataset, then tasks, and answers each with scores. When its parent is gone it exits at once, where
one of multiprocessing or joblib would finish its fit first.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Final

from threadpoolctl import threadpool_limits

from node.util.child_process import ChildError, running
from node.util.interpreter import child_environment, python
from selector.dataset import Dataset, FloatArray
from selector.estimator import NotApplicableError, Selector
from selector.evaluation.measures import Fold, checked

COMMAND: Final = f"from {__name__} import main; main()"
"""Program of a worker. With `-m` this module would be `__main__`, and its classes could not be unpickled."""

_IF_MEMORY_RAN_OUT: Final = "if memory ran out, use --sample with fewer contexts"
_EXIT_LIMIT_S: Final = 0.2
"""Time for a worker whose connection has ended to exit."""


@dataclass(frozen=True, slots=True, eq=False)
class FitTask:
    """A selector to fit on a fold's training rows."""

    name: str
    selector: Selector
    fold: int


@dataclass(frozen=True, slots=True, eq=False)
class FitResult:
    """Scores of the fold's test rows; None if the selector does not apply or failed, for the reason in `inapplicable`.

    `deviation`: of these scores; None where the selector does not know it.
    """

    name: str
    fold: int
    scores: FloatArray | None
    seconds: float
    deviation: FloatArray | None = None
    inapplicable: str = ""


class FittingError(RuntimeError):
    """A worker process ended before it answered, or the meta-model could not be fitted."""


def fit_all(
    dataset: Dataset, folds: tuple[Fold, ...], tasks: Iterable[FitTask], process_count: int
) -> Generator[FitResult]:
    """Yield the results as they complete; a task is drawn when a worker is idle. Raises FittingError.

    A `process_count` of 1 computes in this thread.
    """
    if process_count > 1:
        yield from _fit_in_processes(dataset, folds, iter(tasks), process_count)
        return
    with threadpool_limits(1):  # OpenMP's threads spin while they wait
        for task in tasks:
            yield _fit(dataset, folds, task)


def _fit_in_processes(
    dataset: Dataset, folds: tuple[Fold, ...], tasks: Iterator[FitTask], process_count: int
) -> Iterator[FitResult]:
    with ExitStack() as stack:
        idle = [stack.enter_context(_process()) for _ in range(process_count)]
        busy: list[Connection] = []
        try:
            for each in idle:
                each.send((dataset, folds))
            while True:
                while idle and (task := next(tasks, None)) is not None:
                    busy.append(idle.pop())
                    busy[-1].send(task)
                if not busy:
                    return
                for connection in wait(busy):
                    assert isinstance(connection, Connection)
                    result: FitResult = connection.recv()
                    busy.remove(connection)
                    idle.append(connection)
                    yield result
        except (EOFError, ConnectionError):
            raise FittingError(f"a worker process exited early: {_IF_MEMORY_RAN_OUT}") from None


@contextmanager
def _process() -> Iterator[Connection]:
    """Run one worker process inside the block, and yield the connection to it."""
    ours, theirs = Pipe()
    command = python("-c", COMMAND, str(theirs.fileno()))
    environment = child_environment({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    with ours, theirs:
        try:
            with running(
                command, what="a worker process", environment=environment, pass_fds=[theirs.fileno()], own_session=True
            ) as child:
                theirs.close()
                try:
                    yield ours
                except (EOFError, ConnectionError):
                    child.check_ended(_EXIT_LIMIT_S)  # unless another one did
                    raise
        except ChildError as error:
            raise FittingError(f"cannot fit selectors: {error}; {_IF_MEMORY_RAN_OUT}") from None


def _fit(dataset: Dataset, folds: tuple[Fold, ...], task: FitTask) -> FitResult:
    began_s = time.perf_counter()
    fold = folds[task.fold]
    test = dataset.pairs.take(fold.test)
    try:
        selector = task.selector.fit_dataset(dataset.take(fold.train))
        scores, deviation = checked(selector.predict(test), fold), selector.deviation(test)
    except NotApplicableError as error:
        return FitResult(task.name, task.fold, None, 0.0, inapplicable=str(error))
    except Exception as error:  # noqa: BLE001  # whatever it is, a worker must answer, and others go on
        advice = f"; {_IF_MEMORY_RAN_OUT}" if isinstance(error, MemoryError) else ""
        reason = f"it failed with {type(error).__name__}: {error}{advice}"
        return FitResult(task.name, task.fold, None, 0.0, inapplicable=" ".join(reason.split()))
    return FitResult(task.name, task.fold, scores, time.perf_counter() - began_s, deviation)


def main() -> None:
    """Fit and answer until the parent is gone."""
    connection = Connection(int(sys.argv[1]))
    dataset, folds = connection.recv()
    tasks: queue.SimpleQueue[FitTask] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    while True:
        connection.send(_fit(dataset, folds, tasks.get()))


def _receive(connection: Connection, tasks: "queue.SimpleQueue[FitTask]") -> None:
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)
