"""The step loop of one engine and the tasks beside it, which spans and draft models share."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence

import structlog
import trio

from node.engine.base import Engine
from node.engine.interface import EngineCrashed, EngineError
from protocol.identity import SessionId

_logger = structlog.get_logger(__name__)


class EngineLoop(ABC):
    """Runs an engine's steps one after another, and frees sessions of it in the background."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._in_step: frozenset[SessionId] = frozenset()
        """Sessions of the step under way: they are freed after it, since freeing one within it costs the others."""
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run steps until cancelled. Raises EngineCrashed, in a group, when the engine's worker is gone."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for task in (self._wait_for_crash, *self._background_tasks()):
                    nursery.start_soon(task)
                task_status.started()
                try:
                    await self._step_loop()
                finally:
                    self._nursery = None
        finally:
            self._on_stopped()

    @abstractmethod
    def _background_tasks(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """Return the tasks that run beside the step loop."""

    @abstractmethod
    async def _step_loop(self) -> None:
        """Run steps."""

    @abstractmethod
    def _on_stopped(self) -> None:
        """Give up the sessions that are left."""

    def start_soon(self, function: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run a task beside the loop, if that runs."""
        if self._nursery is not None:
            self._nursery.start_soon(function, *args)

    def start_freeing(self, session: SessionId) -> None:
        """Have the engine free a session; an unknown one is not an error."""
        self.start_soon(self._free, session)

    async def _free(self, session: SessionId) -> None:
        try:
            await self.engine.close(session)
        except EngineError as error:
            _logger.debug("engine gone before a session was freed", session=session, error=str(error))

    async def _wait_for_crash(self) -> None:
        raise EngineCrashed(await self.engine.wait_crashed())
