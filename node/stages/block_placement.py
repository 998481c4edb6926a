"""Block placement: announces what this node will serve, and decides when blocks that it chose itself should change.

Placement is deterministic: every node computes the same plan of moves for all of them, at the same time and from the
announcements until a moment before (`selector.placement`), and carries out its own part. It announces where it will be,
waits for the announcements of others, and moves unless these have made the move needless. A move needs memory for both
spans at once, so it may well fail; a node announces then that it stays for a while, and another one is planned with.
"""

import random
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace

import structlog
import trio

from node.swarm.directory import AnnouncedPlacements
from node.swarm.membership import Membership
from node.util.offload import Offload, run_in_thread
from protocol.announcements import Placement
from protocol.identity import BlockRange, ModelId, PeerId, Stage
from protocol.limits import MAX_CLOCK_SKEW_S
from selector.cuts import Cuts
from selector.peer_speed import UNKNOWN_BLOCK_S
from selector.placement import CUT_S, ROUND_S, SETTLE_S, Server, choose_span, may_drop, plan_moves, still_worthwhile

REVISED_RATIO = 2.0
"""A rate is announced anew only where it is off by this factor: moving for every change of load would never end."""

FAILED_MOVE_S = 600.0
"""After a failed move a node stays for this long, and says so: others plan without it, and one of them may move."""

DROP_ROUND_S = 1.0
"""How often to check whether others serve the blocks that are to be dropped."""

_logger = structlog.get_logger(__name__)


class PlacementAnnouncements:
    """What this node will serve, as its heartbeats announce it; nothing at first, since its start.

    Others may remember what it announced before it was restarted. `announce` has a heartbeat sent soon.
    """

    def __init__(self, announce: Callable[[], None], wall_clock: Callable[[], float] = time.time) -> None:
        self._announce = announce
        self._wall_clock = wall_clock
        self._placements: dict[Hashable, Placement] = {}
        self._published_at_ms = self.now_ms()

    def current(self) -> AnnouncedPlacements:
        """Return what is announced now; since now, where that was announced by a clock that was ahead.

        Plans leave out what is announced from a later time on, and others take no heartbeats that are ahead so far.
        """
        if self._published_at_ms > (now_ms := self.now_ms()) + 1000 * MAX_CLOCK_SKEW_S:
            self._published_at_ms = now_ms
        return AnnouncedPlacements(self._published_at_ms, tuple(self._placements.values()))

    def now_ms(self) -> int:
        """Return Unix time in milliseconds."""
        return int(self._wall_clock() * 1000)

    def of(self, key: Hashable) -> Placement | None:
        """Return what is announced under a key."""
        return self._placements.get(key)

    def publish(self, key: Hashable, placement: Placement | None) -> None:
        """Announce from now on what will be served under a key; None withdraws it."""
        if self._placements.get(key) == placement:
            return
        if placement is None:
            del self._placements[key]
        else:
            self._placements[key] = placement
        # Two announcements of the same time would contradict each other.
        self._published_at_ms = max(self.now_ms(), self._published_at_ms + 1)
        self._announce()


class BlockPlacer:
    """Chooses the blocks of one model that this node serves.

    `cuts`: where the model may be cut; all planning is in its units. `longest`: how many of them fit into this node's
    memory from each on, fewer where the embedding or the head is among them.
    """

    def __init__(
        self,
        model: ModelId,
        cuts: Cuts,
        longest: Sequence[int],
        *,
        own_peer: PeerId,
        membership: Membership,
        placements: PlacementAnnouncements,
        jitter: random.Random,
        offload: Offload = run_in_thread,
    ) -> None:
        self._model = model
        self._cuts = cuts
        self._unit_count = cuts.unit_count
        self._longest = longest
        self._own_peer = own_peer
        self._membership = membership
        self._placements = placements
        self._jitter = jitter
        self._offload = offload
        self._planned_for: tuple[Server, ...] = ()
        self._stays_until_s = 0.0

    def choose(self) -> BlockRange:
        """Return the least covered blocks, as many as this node holds, between places where the model may be cut.

        Raises ValueError where it holds none.
        """
        rate = unknown_rate(self._cuts.granularity)
        units = choose_span(self._unit_count, self._in_units(self._others()), self._longest, rate)
        return self._cuts.blocks_of(units)

    def publish(self, blocks: BlockRange | None, rate: float | None = None) -> None:
        """Announce that these blocks will be served, or none any more, at the rate announced before or another."""
        placement = None
        if blocks is not None:
            movable = trio.current_time() >= self._stays_until_s
            placement = Placement(model=self._model, blocks=blocks, rate=rate or self._rate(blocks), movable=movable)
        self._placements.publish(self._model, placement)

    def on_move_failed(self, now: BlockRange) -> None:
        """Stay with the present blocks for a while, and plan anew then, also where nothing else has changed."""
        self._stays_until_s = trio.current_time() + FAILED_MOVE_S
        self._planned_for = ()
        self.publish(now)

    async def next_move(self, now: BlockRange, step_s: Callable[[], float]) -> BlockRange:
        """Wait until other blocks should be served, and return them; they have been announced by then.

        `step_s`: the recent duration of a step through the blocks, 0 where unknown.
        """
        while True:
            await trio.sleep(ROUND_S - self._placements.now_ms() / 1000 % ROUND_S)
            self.publish(now)  # as movable again, once it is
            target = await self._planned_target(now)
            if target is None:
                took_s = step_s()
                if took_s and not 1 / REVISED_RATIO < self._rate(now) * took_s < REVISED_RATIO:
                    self.publish(now, 1 / took_s)
                continue
            self.publish(target)
            await trio.sleep(self._jitter.uniform(*SETTLE_S))
            here = Server(Stage(self._own_peer, now), self._rate(now))
            if self._still_worthwhile(here, target):
                _logger.info("moving to other blocks", model=self._model, blocks=str(now), to=str(target))
                return target
            self.publish(now)

    def _still_worthwhile(self, here: Server, target: BlockRange) -> bool:
        now, then = self._in_units([here]), self._cuts.units_of(target)
        if not now or then is None:
            return False
        return still_worthwhile(self._unit_count, self._in_units(self._others()), now[0], then)

    def is_dispensable(self, old: BlockRange, new: BlockRange) -> bool:
        """Whether the old blocks may be dropped, as each of them is served by others or among the new ones."""
        return may_drop(self._cuts.block_count, self._serving(), old, new)

    async def wait_dispensable(self, old: BlockRange, new: BlockRange) -> None:
        """Wait until the old blocks may be dropped."""
        while not self.is_dispensable(old, new):  # noqa: ASYNC110 - known by heartbeats
            await trio.sleep(DROP_ROUND_S)

    async def _planned_target(self, now: BlockRange) -> BlockRange | None:
        """Return where the plan of this round puts us, if it moves us; None while we stay after a failed move."""
        if trio.current_time() < self._stays_until_s:
            return None
        round_s = ROUND_S * round(self._placements.now_ms() / 1000 / ROUND_S)
        known = self._membership.directory.servers(self._model, int(1000 * (round_s - CUT_S)))
        if known == self._planned_for:
            return None
        # The same seed everywhere, and so the same plan.
        servers = self._in_units(known)
        moves = await self._offload(lambda: plan_moves(self._unit_count, servers, random.Random(0)))
        self._planned_for = known
        units, own = moves.get(self._own_peer), self._cuts.units_of(now)
        if units is None or own is None or len(units) != len(own):
            return None  # or planned by what we announced before
        fitting = self._fitting(units)
        if fitting is None or fitting == own:
            return None
        return self._cuts.blocks_of(fitting)

    def _fitting(self, units: BlockRange) -> BlockRange | None:
        """Return what fits of planned units: as many as now, but for the embedding or the head if they come with them.

        These are wanted, so the units at the other end are left out.
        """
        if units.end < self._unit_count:
            length = min(len(units), self._longest[units.start])
            return BlockRange(units.start, units.start + length) if length else None
        starts = range(units.start, units.end)
        start = next((start for start in starts if start + self._longest[start] >= units.end), units.end)
        return BlockRange(start, units.end) if start < units.end else None

    def _rate(self, now: BlockRange) -> float:
        announced = self._placements.of(self._model)
        return announced.rate if announced else unknown_rate(len(now))

    def _others(self) -> Sequence[Server]:
        """Return the other servers of the model, by their last announcements."""
        directory = self._membership.directory
        servers = directory.servers(self._model, self._placements.now_ms() + 1000 * int(ROUND_S))
        announced = {server.stage.peer for server in servers}
        # Of a peer of which only a record was found it is not known what it will serve.
        silent = [
            Server(c.stage, unknown_rate(len(c.stage.blocks)), movable=False)
            for c in directory.candidates(self._model)
            if c.stage.peer not in announced
        ]
        return [server for server in (*servers, *silent) if server.stage.peer != self._own_peer]

    def _in_units(self, servers: Iterable[Server]) -> list[Server]:
        """Return servers with units of the model for its blocks, those that serve a whole one."""
        found = ((server, self._cuts.units_of(server.stage.blocks)) for server in servers)
        return [replace(each, stage=Stage(each.stage.peer, units)) for each, units in found if units is not None]

    def _serving(self) -> list[Server]:
        """Return the other servers with the blocks that they serve and will go on serving."""
        announced: dict[PeerId, list[Server]] = {}
        for server in self._others():
            announced.setdefault(server.stage.peer, []).append(server)
        return [
            replace(server, stage=Stage(c.stage.peer, overlap))
            for c in self._membership.directory.candidates(self._model, without=(self._own_peer,))
            for server in announced.get(c.stage.peer, ())
            if (overlap := server.stage.blocks.overlap(c.stage.blocks)) is not None
        ]


def unknown_rate(blocks: int) -> float:
    """Return the default rate of a number of blocks, in tokens a second."""
    return 1 / (UNKNOWN_BLOCK_S * max(1, blocks))
