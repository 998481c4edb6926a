"""What the real and the fake engine share: sessions over a KV allocator, counters, and the end of a crashed engine."""

from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

import trio

from node.engine.interface import (
    EngineCrashed,
    EngineError,
    EngineStatistics,
    KvCompatibilityKey,
    Prefix,
    SessionOptions,
    SpanInfo,
    Variant,
    VariantNotReady,
)
from node.engine.kv_allocator import KvAllocator, KvReservation
from protocol.identity import SessionId

S = TypeVar("S")


class PagedEngine(Generic[S]):
    """Implements Engine but for `prepare` and `step`. `S`: what the subclass remembers of a session that has begun."""

    def __init__(self, info: SpanInfo, variants: Iterable[Variant]) -> None:
        self._info = info
        self._variants = set(variants)
        self._building: dict[int, Variant] = {}
        self._pages = KvAllocator(info)
        self._sessions: dict[SessionId, S] = {}
        self._crashed = trio.Event()
        self._reason = ""
        self._steps = 0
        self._compute_s = 0.0

    @property
    def info(self) -> SpanInfo:
        """The span; see Engine."""
        return self._info

    def variants(self) -> frozenset[Variant]:
        """Return the variants that are ready; see Engine."""
        return frozenset(self._variants)

    async def open(
        self, session: SessionId, positions: int, prefix: Prefix | None = None
    ) -> Mapping[KvCompatibilityKey, int]:
        """Reserve KV memory for a session; see Engine."""
        await trio.lowlevel.checkpoint()
        self._raise_if_crashed()
        return self._pages.open(session, positions, prefix)

    async def begin(self, session: SessionId, options: SessionOptions) -> int:
        """Begin a session on its reservation; see Engine."""
        await trio.lowlevel.checkpoint()
        self._raise_if_crashed()
        try:
            if options.variant not in self._variants:
                raise VariantNotReady(f"the variant {options.variant} is not ready here")
            reservation = self._pages.begin(session, options)
        except EngineError:
            self._close(session, keep=False)
            raise
        self._sessions[session] = self._begun(session, options, reservation)
        return reservation.cached

    async def rename(self, session: SessionId, successor: SessionId) -> None:
        """Carry a session on under another id; see Engine."""
        await trio.lowlevel.checkpoint()
        self._raise_if_crashed()
        self._pages.rename(session, successor)
        if (begun := self._sessions.pop(session, None)) is not None:
            self._sessions[successor] = begun
            self._renamed(session, successor)

    async def close(self, session: SessionId) -> None:
        """Free a session; see Engine."""
        await trio.lowlevel.checkpoint()
        self._close(session, keep=True)

    async def wait_crashed(self) -> str:
        """Wait until the engine has crashed, and return why; see Engine."""
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
            worker_pid=self._worker_pid(),
        )

    def _begun(self, session: SessionId, options: SessionOptions, reservation: KvReservation) -> S:
        """Start a session in whatever computes, and return what is to be remembered of it."""
        raise NotImplementedError

    def _renamed(self, session: SessionId, successor: SessionId) -> None:
        """Pass a renaming on to whatever computes."""

    def _worker_pid(self) -> int | None:
        return None

    def _close(self, session: SessionId, *, keep: bool) -> None:
        """Free a session. `keep`: whether its pages stay in the prefix cache."""
        self._pages.close(session, keep=keep)
        self._sessions.pop(session, None)

    def _crash(self, reason: str) -> None:
        """Lose every session; from now on every call raises EngineCrashed."""
        self._reason = reason
        self._crashed.set()
        self._sessions.clear()
        self._building.clear()
        self._pages = KvAllocator(self._info)

    def _raise_if_crashed(self) -> None:
        if self._crashed.is_set():
            raise EngineCrashed(self._reason)
