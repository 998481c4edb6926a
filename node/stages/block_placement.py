"""Says what this node means to serve, and when blocks that it chose by itself should become others.

Every node computes the same plan of moves for all of them, at the same time and from what all had said until a moment
before (`selector.placement`), and carries out its own part: it says where it will be, waits for what the others say,
and goes unless that has made the move needless.
"""

import random
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import structlog
import trio

from node.swarm.directory import Statement
from node.swarm.membership import Membership
from node.util.offload import Offload, run_in_thread
from protocol.announcements import Placement
from protocol.identity import BlockRange, ModelId, PeerId, Stage
from selector.peer_speed import UNKNOWN_BLOCK_S
from selector.placement import (
    CUT_S,
    ROUND_S,
    SETTLE_S,
    Server,
    choose_span,
    may_drop,
    plan_moves,
    still_worthwhile,
)

REVISED_RATIO = 2.0
"""A rate is said anew only where it is off by so much: whoever moves for every change of load never rests."""

BARRED_S = 600.0
"""For so long a move is not tried again that failed."""

DROP_ROUND_S = 1.0
"""How often it is asked whether others serve what is to be dropped."""

_logger = structlog.get_logger(__name__)


class PlacementAnnouncements:
    """What this node means to serve, as its heartbeats say it."""

    def __init__(self, announce: Callable[[], None], wall_clock: Callable[[], float] = time.time) -> None:
        """Mean to serve nothing yet; `announce` has a heartbeat sent soon.

        That is said from now on, as others may remember what was said before this node was started again.
        """
        self._announce = announce
        self._wall_clock = wall_clock
        self._placements: dict[Hashable, Placement] = {}
        self._said_at_ms = self.now_ms()

    def current(self) -> Statement:
        """Return what is said now."""
        return Statement(self._said_at_ms, tuple(self._placements.values()))

    def now_ms(self) -> int:
        """Return Unix time in milliseconds."""
        return int(self._wall_clock() * 1000)

    def of(self, key: Hashable) -> Placement | None:
        """Return what is said under a key."""
        return self._placements.get(key)

    def say(self, key: Hashable, placement: Placement | None) -> None:
        """Say from now on what is meant to be served under a key; None takes it back."""
        if self._placements.get(key) == placement:
            return
        if placement is None:
            del self._placements[key]
        else:
            self._placements[key] = placement
        # Whoever says two things at the same time says nothing clear.
        self._said_at_ms = max(self.now_ms(), self._said_at_ms + 1)
        self._announce()


class BlockPlacer:
    """Where this node stands in one model of which it chooses the blocks itself."""

    def __init__(
        self,
        model: ModelId,
        block_count: int,
        *,
        own_peer: PeerId,
        membership: Membership,
        statements: PlacementAnnouncements,
        jitter: random.Random,
        offload: Offload = run_in_thread,
    ) -> None:
        self._model = model
        self._block_count = block_count
        self._own_peer = own_peer
        self._membership = membership
        self._statements = statements
        self._jitter = jitter
        self._offload = offload
        self._planned_for: tuple[Server, ...] = ()
        self._barred_until_s: dict[BlockRange, float] = {}

    def choose(self, length: int) -> BlockRange:
        """Return the blocks that the swarm lacks most, as many as this node holds."""
        length = min(length, self._block_count)
        return choose_span(self._block_count, self._others(), length, unknown_rate(length))

    def say(self, blocks: BlockRange | None, rate: float | None = None) -> None:
        """Say that these blocks are meant to be served, or none any more, at the rate said before or another."""
        said = None
        if blocks is not None:
            said = Placement(model=self._model, blocks=blocks, rate=rate or self._rate(blocks), movable=True)
        self._statements.say(self._model, said)

    def bar(self, blocks: BlockRange) -> None:
        """Leave a move alone for a while that failed."""
        self._barred_until_s[blocks] = trio.current_time() + BARRED_S

    async def next_move(self, now: BlockRange, step_s: Callable[[], float]) -> BlockRange:
        """Wait until other blocks should be served, and return them; it has been said by then that they will be.

        `step_s`: how long a step through the blocks takes of late, 0 where unknown.
        """
        while True:
            await self._next_round()
            target = await self._planned(now)
            if target is None:
                self._revise(now, step_s())
                continue
            self.say(target)
            await trio.sleep(self._jitter.uniform(*SETTLE_S))
            here = Server(Stage(self._own_peer, now), self._rate(now))
            if still_worthwhile(self._block_count, self._others(), here, target):
                _logger.info("moving to other blocks", model=self._model, blocks=str(now), to=str(target))
                return target
            self.say(now)

    async def wait_dispensable(self, old: BlockRange, new: BlockRange) -> None:
        """Wait until the old blocks may go, as every one of them is served by others or among the new ones."""
        while True:  # nobody tells us: what others serve is heard with their heartbeats
            if may_drop(self._block_count, self._serving(), old, new):
                return
            await trio.sleep(DROP_ROUND_S)

    async def _next_round(self) -> None:
        now_s = self._statements.now_ms() / 1000
        await trio.sleep(ROUND_S - now_s % ROUND_S)

    async def _planned(self, now: BlockRange) -> BlockRange | None:
        """Return where the plan of this round puts us, if it moves us and that did not fail of late."""
        round_s = ROUND_S * round(self._statements.now_ms() / 1000 / ROUND_S)
        known = self._membership.directory.servers(self._model, int(1000 * (round_s - CUT_S)))
        if known == self._planned_for:
            return None
        # Everybody draws the same, and so plans the same.
        moves = await self._offload(lambda: plan_moves(self._block_count, known, random.Random(0)))
        self._planned_for = known
        target = moves.get(self._own_peer)
        if target is None or target == now or len(target) != len(now):
            return None  # or planned by what we said before
        return None if self._barred_until_s.get(target, 0) > trio.current_time() else target

    def _revise(self, now: BlockRange, step_s: float) -> None:
        """Say another rate where the one that was said is far off."""
        if step_s and not 1 / REVISED_RATIO < self._rate(now) * step_s < REVISED_RATIO:
            self.say(now, 1 / step_s)

    def _rate(self, now: BlockRange) -> float:
        said = self._statements.of(self._model)
        return said.rate if said else unknown_rate(len(now))

    def _others(self) -> Sequence[Server]:
        """Return who else serves or will serve what, by what they said last."""
        directory = self._membership.directory
        servers = directory.servers(self._model, self._statements.now_ms() + 1000 * int(ROUND_S))
        told = {server.stage.peer for server in servers}
        # Of whom only a record was found it is not known what it means to serve.
        silent = [
            Server(c.stage, unknown_rate(len(c.stage.blocks)), movable=False)
            for c in directory.candidates(self._model)
            if c.stage.peer not in told
        ]
        return [server for server in (*servers, *silent) if server.stage.peer != self._own_peer]

    def _serving(self) -> list[Server]:
        """Return who else serves what, and will go on doing so."""
        meant: dict[PeerId, list[Server]] = {}
        for server in self._others():
            meant.setdefault(server.stage.peer, []).append(server)
        return [
            replace(server, stage=Stage(c.stage.peer, overlap))
            for c in self._membership.directory.candidates(self._model, without=(self._own_peer,))
            for server in meant.get(c.stage.peer, ())
            if (overlap := server.stage.blocks.overlap(c.stage.blocks)) is not None
        ]


def unknown_rate(blocks: int) -> float:
    """Return the tokens a second through so many blocks, where nothing was measured."""
    return 1 / (UNKNOWN_BLOCK_S * max(1, blocks))
