"""Unequal nodes that join in random order, decide by themselves what to serve, and of which a third leaves at once.

Clocks are a second apart, what a node knows of others is late by as much, and some of it is lost at first. The
decisions are those of `selector.placement`.
"""

import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Final

import numpy as np
from scipy.optimize import linprog

from protocol.identity import BlockRange, PeerId, Stage
from selector.placement import (
    CUT_S,
    ROUND_S,
    SETTLE_S,
    Server,
    block_rates,
    choose_span,
    may_drop,
    plan_moves,
    still_worthwhile,
)

JOINING_S: Final = 300.0
LEAVING_AT_S: Final = 600.0
RECOVERY_S: Final = 120.0
DELAY_S: Final = (0.1, 1.0)
"""When a node hears what another says."""
HEARTBEAT_S: Final = 2.5
LOSS: Final = 0.1
"""Share of what is said that a node hears with the next heartbeat only."""
SILENCE_S: Final = 10.0
"""A node whose last heartbeat is so old is dead."""
CLOCK_SKEW_S: Final = (-1.0, 1.0)
LOAD_BLOCK_S: Final = (0.1, 0.5)
"""How long it takes a node to load a block, its download included."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a swarm. Shares are of the optimum: what the least served block could get at most."""

    joined_share: float
    left_share: float
    """Right after a third has left."""
    recovered_share: float
    """Two minutes later."""
    moves_per_node: float
    most_moves: int
    uncovered_by_moves: int
    """How often a node left a block that nobody else served."""


def play(seed: int, *, nodes: int = 100, block_count: int = 32) -> Result:
    """Return what becomes of a swarm; the same every time."""
    return _Simulation(random.Random(seed), nodes, block_count).run()


def optimum(block_count: int, servers: Sequence[Server]) -> float:
    """Return the most that the least served block could get, if nodes could divide themselves: an upper bound.

    A linear programme: nodes of a length are one, and what share of their rate begins at which block is free.
    """
    rates: dict[int, float] = {}
    for server in servers:
        length = len(server.stage.blocks)
        rates[length] = rates.get(length, 0.0) + server.rate
    windows = [(length, start) for length in rates for start in range(block_count - length + 1)]
    lowest = np.zeros((block_count, len(windows) + 1))
    lowest[:, -1] = 1
    spent = np.zeros((len(rates), len(windows) + 1))
    for column, (length, start) in enumerate(windows):
        lowest[start : start + length, column] = -1
        spent[list(rates).index(length), column] = 1
    goal = np.zeros(len(windows) + 1)
    goal[-1] = -1
    solved = linprog(goal, A_ub=lowest, b_ub=np.zeros(block_count), A_eq=spent, b_eq=list(rates.values()))
    return float(-solved.fun)


def moved(server: Server, blocks: BlockRange) -> Server:
    return replace(server, stage=Stage(server.stage.peer, blocks))


def blocks_of(span: BlockRange) -> set[int]:
    return set(range(span.start, span.end))


# Every node plans for itself. All live in one process, which plans the same only once.
@lru_cache(maxsize=4096)
def _plan(block_count: int, servers: tuple[Server, ...]) -> Mapping[PeerId, BlockRange]:
    return MappingProxyType(plan_moves(block_count, servers, random.Random(0)))


@dataclass
class _Node:
    """One node: what it serves, and what it has heard."""

    server: Server
    load_block_s: float
    clock_skew_s: float
    alive: bool = True
    serving: BlockRange | None = None
    moves: int = 0
    heard: dict[str, list[tuple[float, Server]]] = field(default_factory=dict)
    """What every other node said, with the time when it said so."""
    planned_for: tuple[Server, ...] = ()


class _Simulation:
    def __init__(self, rng: random.Random, count: int, block_count: int) -> None:
        self._rng = rng
        self._block_count = block_count
        self._now_s = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._entries = 0
        self._said: list[tuple[float, Server]] = []
        self._last_beats_s: dict[str, float] = {}
        """When those that are dead were last heard."""
        self._nodes: dict[str, _Node] = {}
        self._uncovered_by_moves = 0
        for number in range(count):
            length = min(block_count, rng.choice((2, 3, 4, 6, 8, 12, 16, 24, 32)))
            rate = 100 * rng.lognormvariate(0, 0.7) / length
            node = _Node(
                Server(Stage(PeerId(f"{number:04}"), BlockRange(0, length)), rate),
                rng.uniform(*LOAD_BLOCK_S),
                rng.uniform(*CLOCK_SKEW_S),
            )
            self._at(rng.uniform(0, JOINING_S), lambda node=node: self._join(node))  # type: ignore[misc]

    def run(self) -> Result:
        self._run_until(LEAVING_AT_S)
        joined_share = self._share()
        present = sorted(self._nodes)
        for peer in self._rng.sample(present, len(present) // 3):
            node = self._nodes.pop(peer)
            node.alive = False
            self._last_beats_s[peer] = self._now_s + node.clock_skew_s - self._rng.uniform(0, HEARTBEAT_S)
        left_share = self._share()
        self._run_until(LEAVING_AT_S + RECOVERY_S)
        recovered_share = self._share()
        # Whoever still has something to say may say it: nobody goes on moving.
        self._run_until(LEAVING_AT_S + 4 * RECOVERY_S)
        moves = [node.moves for node in self._nodes.values()]
        return Result(
            joined_share=joined_share,
            left_share=left_share,
            recovered_share=recovered_share,
            moves_per_node=sum(moves) / len(moves),
            most_moves=max(moves),
            uncovered_by_moves=self._uncovered_by_moves,
        )

    def _at(self, when_s: float, act: Callable[[], None]) -> None:
        self._entries += 1
        heapq.heappush(self._agenda, (when_s, self._entries, act))

    def _after(self, seconds: float, node: _Node, act: Callable[[_Node], None]) -> None:
        self._at(self._now_s + seconds, lambda: act(node) if node.alive else None)

    def _run_until(self, end_s: float) -> None:
        while self._agenda and self._agenda[0][0] <= end_s:
            self._now_s, _, act = heapq.heappop(self._agenda)
            act()
        self._now_s = end_s

    def _share(self) -> float:
        servers = [moved(node.server, node.serving) for node in self._nodes.values() if node.serving]
        return float(block_rates(self._block_count, servers).min()) / optimum(self._block_count, servers)

    # What a node does

    def _say(self, node: _Node) -> None:
        """Tell everybody what a node serves, or will serve soon."""
        said = (self._now_s + node.clock_skew_s, node.server)
        self._said.append(said)
        for other in self._nodes.values():
            late_s = self._rng.uniform(*DELAY_S) + (HEARTBEAT_S if self._rng.random() < LOSS else 0)
            self._after(late_s, other, lambda other, said=said: self._hear(other, *said))  # type: ignore[misc]

    def _hear(self, node: _Node, when_s: float, server: Server) -> None:
        node.heard.setdefault(server.stage.peer, []).append((when_s, server))
        node.heard[server.stage.peer].sort(key=lambda said: said[0])

    def _others(self, node: _Node, until_s: float) -> tuple[Server, ...]:
        """Return what the others who were alive at a time had said until then, as far as a node has heard."""
        found = []
        for peer, said in node.heard.items():
            beat_s = self._last_beats_s.get(peer, until_s)
            before = [server for when_s, server in said if when_s <= until_s]
            if before and beat_s > until_s - SILENCE_S and peer != node.server.stage.peer:
                found.append(before[-1])
        return tuple(sorted(found))

    def _join(self, node: _Node) -> None:
        length = len(node.server.stage.blocks)
        for when_s, server in self._said:
            self._hear(node, when_s, server)
        others = self._others(node, self._now_s + CLOCK_SKEW_S[1])
        longest = [length] * self._block_count
        blocks = choose_span(self._block_count, others, longest, node.server.rate * length)
        node.server = moved(node.server, blocks)
        self._nodes[node.server.stage.peer] = node
        self._say(node)
        self._after(node.load_block_s * length, node, self._loaded)

    def _loaded(self, node: _Node) -> None:
        node.serving = node.server.stage.blocks
        self._check_next_round(node)

    def _check_next_round(self, node: _Node) -> None:
        to_next_s = ROUND_S - (self._now_s + node.clock_skew_s) % ROUND_S
        self._after(to_next_s, node, self._check)

    def _check(self, node: _Node) -> None:
        # Not what was said since the cut: some have not heard it yet, and would plan otherwise.
        cut_s = ROUND_S * round((self._now_s + node.clock_skew_s) / ROUND_S) - CUT_S
        known = tuple(sorted((*self._others(node, cut_s), node.server)))
        moves = _plan(self._block_count, known) if known != node.planned_for else {}
        node.planned_for = known
        if (span := moves.get(node.server.stage.peer)) is None:
            self._check_next_round(node)
            return
        node.server = moved(node.server, span)
        self._say(node)
        self._after(self._rng.uniform(*SETTLE_S), node, self._confirm)

    def _confirm(self, node: _Node) -> None:
        assert node.serving is not None
        now = moved(node.server, node.serving)
        then = node.server.stage.blocks
        if not still_worthwhile(self._block_count, self._others(node, self._now_s + CLOCK_SKEW_S[1]), now, then):
            node.server = now
            self._say(node)
            self._check_next_round(node)
            return
        node.moves += 1
        new = blocks_of(then) - blocks_of(node.serving)
        self._after(node.load_block_s * len(new), node, self._switch)

    def _switch(self, node: _Node) -> None:
        assert node.serving is not None
        then = node.server.stage.blocks
        served = [
            moved(other.server, other.serving) for other in self._nodes.values() if other is not node and other.serving
        ]
        if not may_drop(self._block_count, served, node.serving, then):
            self._after(1.0, node, self._switch)
            return
        left = blocks_of(node.serving) - blocks_of(then)
        rates = block_rates(self._block_count, served)
        self._uncovered_by_moves += sum(bool(rates[block] == 0) for block in left)
        node.serving = then
        self._check_next_round(node)
