"""Span move: the old and the new span of a node are both served until one of them may go.

Whatever happens to one of them meanwhile, the sessions on the other go on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog
import trio

from node.stages.block_placement import DROP_ROUND_S, BlockPlacer
from node.stages.span import Span
from node.stages.stage_server import StageServer
from protocol.identity import BlockRange

_logger = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class RunningSpan:
    """A span that is served, in parts where it has several devices, until the scope is cancelled."""

    blocks: BlockRange
    parts: Sequence[Span]
    scope: trio.CancelScope
    crash: str | None = field(default=None, init=False)
    """Why its engine died, if it did during a move."""
    move: trio.CancelScope | None = field(default=None, init=False)
    """What waits while another span is served beside it."""

    def step_s(self) -> float:
        """Return the recent duration of a step through all parts, 0 where unknown."""
        times_s = [part.load().step_s for part in self.parts]
        return sum(times_s) if all(times_s) else 0.0

    def on_crashed(self, why: str) -> bool:
        """End a move where an engine died; return whether it did, so that another span is left to be served."""
        if self.move is None or self.move.cancel_called:
            return False
        self.crash = why
        _logger.warning("span failed during a move", blocks=str(self.blocks), reason=why)
        self.move.cancel()
        return True


async def hand_over(
    old: RunningSpan, new: RunningSpan, *, placer: BlockPlacer, stages: StageServer, announce: Callable[[], None]
) -> bool:
    """Serve both spans until the old one may go, or an engine of one of them dies; return whether the new one is left.

    The old one goes once its last session has ended while others serve its blocks; it is back where they no longer do.
    """
    with trio.CancelScope() as move:
        old.move = new.move = move
        while True:
            await placer.wait_dispensable(old.blocks, new.blocks)
            for part in old.parts:
                stages.withdraw_span(part)
            announce()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_once_needed, old, new, placer, nursery.cancel_scope)
                for part in old.parts:
                    await stages.drain_span(part)
                nursery.cancel_scope.cancel()
            if placer.is_dispensable(old.blocks, new.blocks):
                break
            _logger.info("old blocks are needed again", blocks=str(old.blocks))
            for part in old.parts:
                stages.restore_span(part)
            announce()
    old.move = new.move = None
    model = new.parts[0].info.model
    if new.crash is None:
        old.scope.cancel()
        _logger.info("moved to other blocks", model=model, dropped=str(old.blocks), blocks=str(new.blocks))
    else:
        for part in old.parts:
            stages.restore_span(part)
        why = f"they were served and failed: {new.crash}"
        _logger.warning("stayed with the old blocks", model=model, wanted=str(new.blocks), reason=why)
    announce()
    return new.crash is None


async def _cancel_once_needed(old: RunningSpan, new: RunningSpan, placer: BlockPlacer, scope: trio.CancelScope) -> None:
    while placer.is_dispensable(old.blocks, new.blocks):  # noqa: ASYNC110 - known by heartbeats
        await trio.sleep(DROP_ROUND_S)
    scope.cancel()
