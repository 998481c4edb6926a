"""The engine as the rest of the node sees it: tensors in, tensors out, no network."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import trio

from node.engine.interface import (
    EngineCrashed,
    EngineError,
    EngineStatistics,
    KvCompatibilityKey,
    Prefix,
    SessionOptions,
    SliceInput,
    SpanInfo,
    StepResult,
    Variant,
    session_part,
)
from node.engine.kv_allocator import KvAllocator, KvReservation
from protocol.identity import SessionId


class Engine(ABC):
    """One span of one model, with its sessions over a KV allocator.

    Calls may overlap; steps are carried out one after another, in the order of the calls.
    """

    _sessions: dict[SessionId, Any]
    """The sessions that have begun, with the subclass's state of each."""

    def __init__(self, info: SpanInfo, variants: Iterable[Variant]) -> None:
        self.info = info
        """The span."""
        self._variants = set(variants)
        self._building: dict[int, Variant] = {}
        self._pages = KvAllocator(info)
        self._sessions = {}
        self._crashed = trio.Event()
        self._reason = ""
        self._steps = 0
        self._compute_s = 0.0

    def variants(self) -> frozenset[Variant]:
        """Return the variants that are ready: built and warmed at every shape."""
        return frozenset(self._variants)

    @abstractmethod
    async def prepare(self, variant: Variant) -> None:
        """Build a variant in the background, and return when it is ready. Raises EngineError if it is unavailable."""

    def drop(self, variant: Variant) -> None:
        """Give up a variant that no session uses; at once, as one that opens meanwhile would be offered it."""
        self._raise_if_crashed()
        self._variants.discard(variant)

    async def open(
        self, session: SessionId, positions: int, prefix: Prefix | None = None
    ) -> Mapping[KvCompatibilityKey, int]:
        """Reserve KV memory; return how many positions of the prompt are cached, by KV key.

        The pages found are pinned until the session begins. Raises EngineFull, or EngineError when it cannot be served
        at all.
        """
        await trio.lowlevel.checkpoint()
        self._raise_if_crashed()
        return self._pages.open(session, positions, prefix)

    async def begin(self, session: SessionId, options: SessionOptions) -> int:
        """Take over the cached pages with the chosen KV key, unpin the others; return the positions now cached.

        Raises VariantNotReady, or EngineError; the session is closed then.
        """
        await trio.lowlevel.checkpoint()
        self._raise_if_crashed()
        try:
            session_part(self.info, self._variants, options)
            reservation = self._pages.begin(session, options)
        except EngineError:
            self._close(session, keep=False)
            raise
        self._sessions[session] = self._begun(session, options, reservation)
        return reservation.cached

    def held_positions(self, session: SessionId) -> int:
        """Return how much KV memory an open session has, in positions of the usual type. Raises SessionNotOpen."""
        return self._pages.held_positions(session)

    @abstractmethod
    async def step(self, slices: Sequence[SliceInput]) -> StepResult:
        """Run one step over rows of any sessions, grouped by variant; a session has at most one slice in it.

        A slice that makes a forward pass fail costs its own session alone: the pass is repeated by halves until the
        slices that fail are alone, and the result names them in `faults`. Raises StepFailed where all slices fail,
        EngineError where the engine does; all sessions in the step are closed then.
        """

    async def rename(self, session: SessionId, successor: SessionId) -> None:
        """Carry a session on under another id, with all that it holds; it is in no step meanwhile.

        Raises EngineError where the one is not open, or the other is.
        """
        await trio.lowlevel.checkpoint()
        self._raise_if_crashed()
        self._pages.rename(session, successor)
        if (begun := self._sessions.pop(session, None)) is not None:
            self._sessions[successor] = begun

    def uncache(self, session: SessionId) -> None:
        """Keep what a session computed out of the prefix cache, from now on and also after it: its rows were wrong.

        At once, and not when it is closed, as it may be in a step then, while another attempt of its job opens.
        """
        self._pages.uncache(session)

    async def close(self, session: SessionId) -> None:
        """Free a session, whose prompt's whole pages stay in the prefix cache; an unknown one is ignored."""
        await trio.lowlevel.checkpoint()
        self._close(session, keep=True)

    async def wait_crashed(self) -> str:
        """Wait until the engine has crashed, and return why in one line; for most engines that is never."""
        await self._crashed.wait()
        return self._reason

    def statistics(self) -> EngineStatistics:
        """Return the counts, without waiting for a running step."""
        return EngineStatistics(
            reserved_positions=self._pages.reserved_positions,
            cached_positions=self._pages.cached_positions,
            steps=self._steps,
            compute_s=self._compute_s,
            worker_pid=self._worker_pid(),
        )

    @abstractmethod
    def _begun(self, session: SessionId, options: SessionOptions, reservation: KvReservation) -> Any:
        """Begin a session in the backend, and return what `_sessions` keeps of it."""

    def _worker_pid(self) -> int | None:
        return None

    def _close(self, session: SessionId, *, keep: bool) -> None:
        self._pages.close(session, keep=keep)
        self._sessions.pop(session, None)

    def _crash(self, reason: str) -> None:
        """Lose every session; from now on every call raises EngineCrashed."""
        self._reason = reason
        self._crashed.set()
        self._sessions.clear()
        self._building.clear()
        self._pages = KvAllocator(self.info)

    def _raise_if_crashed(self) -> None:
        if self._crashed.is_set():
            raise EngineCrashed(self._reason)
