"""The variants of a span: built when jobs ask for them, and dropped where there is no memory for others.

Any coordinator may have variants built. So what one has asked for, and no session uses, must not keep others' out.
"""

import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Final

import structlog
import trio
from cachetools import TTLCache

from node.engine.base import Engine
from node.engine.interface import EngineCrashed, EngineError, NoVariantMemory, Variant

BUILD_MAX_WAIT_S: Final = 30.0
"""A variant waits this long for the span to be idle; then it is built beside the sessions, which slows them down."""

MAX_VARIANTS: Final = 64
"""Variants that wait to be built, and failures that are remembered, at most."""

UNUSED_S: Final = 600.0
"""A variant that no session has used for so long gives its memory to another one."""

RETRY_S: Final = 300.0
"""After so long a variant that could not be built is tried again, if a job asks for it: there may be memory then."""

_logger = structlog.get_logger(__name__)


class VariantBuilder:
    """Builds the variants of one span, one after another."""

    def __init__(
        self, engine: Engine, in_use: Callable[[], Collection[Variant]], wait_idle: Callable[[], Awaitable[None]]
    ) -> None:
        """`in_use`: returns the variants that sessions use, or may be about to. `wait_idle`: until there are none."""
        self._engine = engine
        self._in_use = in_use
        self._wait_idle = wait_idle
        self._requested_in, self._requested = trio.open_memory_channel[tuple[Sequence[Variant], bool]](MAX_VARIANTS)
        self._waiting: set[Variant] = set()
        """Requested, and not tried yet."""
        self._failed: TTLCache[Variant, None] = TTLCache(MAX_VARIANTS, RETRY_S, timer=trio.current_time)
        self._used_s: dict[Variant, float] = {}
        """When those that were built here were used last, or built; the one that stays is always in use."""

    def is_unavailable(self, variant: Variant) -> bool:
        """Return whether a variant was requested lately and could not be built here."""
        return variant in self._failed

    def request(self, variants: Iterable[Variant]) -> None:
        """Have variants built that are not yet, one after another; each is tried once in a while."""
        for variant in variants:
            known = variant in self._waiting or variant in self._failed or variant in self._engine.variants()
            if not known and len(self._waiting) < MAX_VARIANTS:
                self._waiting.add(variant)
                self._requested_in.send_nowait(([variant], False))

    def request_first_of(self, variants: Sequence[Variant]) -> None:
        """Have the first of the variants that is available here built; the others are built when they are requested.

        It stays, whether it is used or not, and also where a job asks for it, too.
        """
        self._requested_in.send_nowait((variants, True))

    def used(self, variant: Variant) -> None:
        """Record that a session has used a variant until now."""
        if variant in self._used_s:
            self._used_s[variant] = max(self._used_s[variant], trio.current_time())

    async def run(self) -> None:
        """Build what is requested. Returns when the engine crashes, of which others raise."""
        async for variants, stays in self._requested:
            with trio.move_on_after(BUILD_MAX_WAIT_S):
                await self._wait_idle()
            for variant in variants:
                try:
                    await self._build(variant)
                except EngineCrashed:
                    return
                except EngineError as error:
                    self._failed[variant] = None
                    blocks = str(self._engine.info.blocks)
                    _logger.info("variant unavailable", variant=str(variant), span=blocks, why=str(error))
                else:
                    self._used_s[variant] = math.inf if stays else self._used_s.get(variant, trio.current_time())
                    break
                finally:
                    self._waiting.discard(variant)

    async def _build(self, variant: Variant) -> None:
        """Build a variant, in place of unused ones where there is no memory beside them. Raises EngineError."""
        while True:
            try:
                await self._engine.prepare(variant)
            except NoVariantMemory:
                unused = self._unused()
                if unused is None:
                    raise
            else:
                return
            del self._used_s[unused]
            self._engine.drop(unused)
            _logger.info("variant dropped", variant=str(unused), span=str(self._engine.info.blocks))

    def _unused(self) -> Variant | None:
        """Return the variant that was used least recently, if that is long ago."""
        oldest_s, in_use = trio.current_time() - UNUSED_S, self._in_use()
        unused = [each for each, used_s in self._used_s.items() if used_s <= oldest_s and each not in in_use]
        return min(unused, key=self._used_s.__getitem__, default=None)
