"""Block placement: which blocks each node should serve, to maximise the rate of the least served block.

There is no coordinator. A joining node takes the blocks where the swarm is weakest. Later all nodes compute the same
plan of moves at the same time, from the same announcements, and each carries out its own part: so a hole is filled by
the nodes in the plan and not by all at once. Where views differ for a moment, a move that has become needless is
dropped before it begins; see `still_worthwhile`.

The objective is a power mean of the blocks' rates with a high negative power, which the lowest rates dominate; unlike
the minimum itself it tells for every single move whether it helps.
"""

import random
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from protocol.identity import BlockRange, PeerId, Stage

CLEAR_GAIN: Final = 0.01
"""Blocks are moved only where the lowest rate of any block rises by more than this share."""

MOVE_COST: Final = 0.1
"""Relative cost of a plan in which all nodes move: loading blocks takes time and traffic."""

ROUND_S: Final = 30.0
"""Nodes plan whenever Unix time is a multiple of this."""

CUT_S: Final = 5.0
"""A plan uses the announcements until this long before: all nodes have received those, and plan the same."""

SETTLE_S: Final = (3.0, 5.0)
"""How long a node that announced a move waits for others' announcements before it moves."""

POWERS: Final = (4.0, 10.0, 30.0)
"""Powers of the mean, applied in order: a low one fills large holes, a high one the last of them."""

TRIALS: Final = 150
"""Further trials for a better plan, for up to a hundred servers; fewer for more, as each takes longer."""

DISTURBED: Final = 8
"""Servers relocated before each trial: alternately anywhere and over the least served block."""

_Rates: TypeAlias = NDArray[np.float64]
_Starts: TypeAlias = NDArray[np.intp]


@dataclass(frozen=True, slots=True, order=True)
class Server:
    """A node that serves blocks: `rate` tokens a second, each through all of them.

    `movable`: it chooses its blocks itself. One that is about to move counts where it will be.
    """

    stage: Stage
    rate: float
    movable: bool = True


def block_rates(block_count: int, servers: Iterable[Server]) -> _Rates:
    """Return the tokens per second of each block."""
    rates = np.zeros(block_count)
    for server in servers:
        rates[_slice(server.stage.blocks)] += server.rate
    return rates


def choose_span(block_count: int, others: Iterable[Server], longest: Sequence[int], block_rate: float) -> BlockRange:
    """Return the blocks for a joining node, which passes `block_rate` tokens a second through one block.

    `longest`: how many blocks it holds from each start on, fewer where the embedding or the head take room. Considered
    are spans that begin or end where the coverage changes: one of the best does, and it leaves no remainder behind that
    is too small to be worth a node.
    """
    if not any(longest):
        raise ValueError("a node needs room for at least one block")
    rates = block_rates(block_count, others)
    edges = {0, block_count, *(np.flatnonzero(np.diff(rates)) + 1).tolist()}
    reach = [min(start + length, block_count) for start, length in enumerate(longest)]  # never decreases
    ends = edges | {reach[edge] for edge in edges if edge < block_count}
    spans = [(bisect_left(reach, end), end) for end in sorted(ends)]
    scale = max(block_rate / max(longest), 1e-9)

    def cost(span: tuple[int, int]) -> float:
        before, own = rates[slice(*span)], block_rate / (span[1] - span[0])
        return float((_costs((before + own) / scale, POWERS[-1]) - _costs(before / scale, POWERS[-1])).sum())

    return BlockRange(*min((span for span in spans if span[0] < span[1]), key=cost))


def plan_moves(block_count: int, servers: Iterable[Server], rng: random.Random) -> Mapping[PeerId, BlockRange]:
    """Return the moves by which the least served block gains clearly: the new blocks, by peer.

    The plan is deterministic for the same servers and random numbers. Every move in it is needed for its gain.
    """
    servers = sorted(server for server in servers if server.stage.blocks.end <= block_count)
    swarm = _Swarm(block_count, servers)
    if not swarm.movable:
        return {}
    before = swarm.lowest(swarm.starts)
    best = swarm.without_needless(swarm.descend(swarm.starts, POWERS)[0])
    lowest, worth = swarm.lowest(best), swarm.worth(best)
    for trial in range(min(TRIALS, 100 * TRIALS // len(swarm.movable)) if swarm.pays(before, lowest) else 0):
        disturbed, weakest = best.copy(), swarm.weakest(best)
        for number in rng.choices(range(len(swarm.movable)), k=DISTURBED):
            length = int(swarm.lengths[number])
            first, last = (max(0, weakest - length + 1), weakest) if trial % 2 else (0, block_count)
            disturbed[number] = rng.randint(first, min(last, block_count - length))
        found, its_lowest = swarm.descend(disturbed, POWERS[1:])
        if its_lowest[0] >= lowest[0] and its_lowest[1] > lowest[1] * (1 - CLEAR_GAIN):
            found = swarm.without_needless(found)
            if (its_worth := swarm.worth(found)) > worth:
                best, lowest, worth = found, swarm.lowest(found), its_worth
    if not swarm.pays(before, worth):
        return {}
    return {
        server.stage.peer: BlockRange(int(start), int(start) + len(server.stage.blocks))
        for server, start in zip(swarm.movable, best, strict=True)
        if start != server.stage.blocks.start
    }


def still_worthwhile(block_count: int, others: Iterable[Server], now: Server, then: BlockRange) -> bool:
    """Return whether a planned move still helps, now that others may have moved."""
    rates = block_rates(block_count, others)
    scale = max(float(rates.mean()), now.rate, 1e-9)

    def cost(blocks: BlockRange, power: float) -> float:
        moved = rates.copy()
        moved[_slice(blocks)] += now.rate
        return float(_costs(moved / scale, power).sum())

    return any(cost(then, power) < cost(now.stage.blocks, power) * (1 - 1e-9) for power in POWERS)


def may_drop(block_count: int, others: Iterable[Server], old: BlockRange, new: BlockRange) -> bool:
    """Return whether every old block is served by others or among the new ones, so that none becomes unserved."""
    rates = block_rates(block_count, others)
    rates[_slice(new)] += 1
    return bool((rates[_slice(old)] > 0).all())


def _slice(blocks: BlockRange) -> slice:
    return slice(blocks.start, blocks.end)


def _costs(rates: _Rates, power: float) -> _Rates:
    """Return each block's cost; an unserved block outweighs all others together."""
    return np.power(np.maximum(rates, 0) + 1e-3, -power)


def _window_costs(rates: _Rates, lengths: _Starts, own: _Rates, power: float) -> _Rates:
    """Return each server's change of the sum of costs at each start; infinite where it does not fit.

    `rates`: (servers, blocks), those of the others. Only differences within a row are meaningful.
    """
    count, blocks = rates.shape
    change = _costs(rates + own[:, None], power) - _costs(rates, power)
    sums = np.concatenate([np.zeros((count, 1)), np.cumsum(change, axis=1)], axis=1)
    starts = np.arange(blocks)
    ends = starts[None, :] + lengths[:, None]
    costs = np.take_along_axis(sums, np.minimum(ends, blocks), axis=1) - sums[:, :blocks]
    return np.where(ends <= blocks, costs, np.inf)


class _Swarm:
    """The movable servers, as arrays, and the rates of the others."""

    def __init__(self, block_count: int, servers: Sequence[Server]) -> None:
        self.movable = [server for server in servers if server.movable]
        self.starts: _Starts = np.array([server.stage.blocks.start for server in self.movable], dtype=np.intp)
        self.lengths: _Starts = np.array([len(server.stage.blocks) for server in self.movable], dtype=np.intp)
        scale = max(float(block_rates(block_count, servers).mean()), 1e-9)
        self._own: _Rates = np.array([server.rate for server in self.movable], dtype=float) / scale
        self._fixed = block_rates(block_count, (server for server in servers if not server.movable)) / scale
        self._blocks = np.arange(block_count)

    def lowest(self, starts: _Starts) -> tuple[int, float]:
        """Return the quality of an arrangement: blocks served, then the lowest rate of those."""
        rates = self._rates(starts)
        return int((rates > 0).sum()), float(rates[rates > 0].min(initial=np.inf))

    def weakest(self, starts: _Starts) -> int:
        """Return the least served block."""
        return int(self._rates(starts).argmin())

    def worth(self, starts: _Starts) -> tuple[int, float]:
        """Return the quality of an arrangement, less the cost of its moves."""
        served, lowest = self.lowest(starts)
        return served, lowest * (1 - MOVE_COST * float((starts != self.starts).mean()))

    def pays(self, before: tuple[int, float], after: tuple[int, float]) -> bool:
        """Return whether an arrangement is clearly better."""
        return after[0] > before[0] or (after[0] == before[0] and after[1] > before[1] * (1 + CLEAR_GAIN))

    def descend(self, starts: _Starts, powers: Sequence[float]) -> tuple[_Starts, tuple[int, float]]:
        """Make the best single move while there is one (hill climbing); return the best arrangement on the way."""
        starts = starts.copy()
        best, lowest = starts.copy(), self.lowest(starts)
        all_servers = np.arange(len(starts))
        for power in powers:
            for _ in range(3 * len(starts)):
                rates = self._rates(starts)[None, :] - self._covers(starts) * self._own[:, None]
                costs = _window_costs(rates, self.lengths, self._own, power)
                targets = costs.argmin(axis=1)
                gains = costs[all_servers, starts] - costs[all_servers, targets]
                mover = int(gains.argmax())
                if gains[mover] <= 1e-9 * abs(costs[mover, starts[mover]]):
                    break
                starts[mover] = targets[mover]
                found = self.lowest(starts)
                if found > lowest:
                    best, lowest = starts.copy(), found
        return best, lowest

    def without_needless(self, starts: _Starts) -> _Starts:
        """Return an arrangement without the moves that gain next to nothing."""
        served, lowest = self.lowest(starts)
        kept = starts.copy()
        for number in np.flatnonzero(kept != self.starts):
            moved, kept[number] = kept[number], self.starts[number]
            if self.lowest(kept) < (served, lowest * (1 - CLEAR_GAIN / 10)):
                kept[number] = moved
        return kept

    def _rates(self, starts: _Starts) -> _Rates:
        rates: _Rates = self._own @ self._covers(starts) + self._fixed
        # Rounding may leave a trace where no server is.
        return np.where(rates < 1e-9, 0.0, rates)

    def _covers(self, starts: _Starts) -> NDArray[np.bool_]:
        """Return which server covers which block, (servers, blocks)."""
        return (starts[:, None] <= self._blocks) & (self._blocks < (starts + self.lengths)[:, None])
