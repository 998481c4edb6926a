"""Comparison of an epoch's readings with what is agreed: who earns reputation, and how much.

Agreement on a cell whose value could be guessed earns little: else who copies the former table, and never measures,
would earn as much as who does, and could spend it on lies in the cells that decide.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Final

from protocol.consensus_values import Cell, CellReadings, Member
from protocol.identity import PeerId
from selector.consensus.reputation import COUNT_SCALE, updated, weight_of
from selector.consensus.table import AgreedCell, agree_on, needed_support, supports

GUESSABLE: Final = COUNT_SCALE // 4
"""What a reading of a cell counts whose value could be guessed; of others it is COUNT_SCALE."""

_ROUNDS: Final = 3
"""Iterations between medians and reputations, which depend on each other."""


class Guesses:
    """What a peer can guess that does not measure."""

    def __init__(self, table: Mapping[Cell, AgreedCell]) -> None:
        """`table`: before the epoch."""
        self._table = table
        values: defaultdict[str, list[int]] = defaultdict(list)
        for cell, agreed in table.items():
            values[cell.method].append(agreed.value)
        self._of_method = {method: median_low(found) for method, found in values.items()}

    def importance(self, cell: Cell, value: int) -> int:
        """Return what a reading of a cell counts, for or against its peer, whose value turned out to be this.

        A cell that was firm before counts little even if its value has changed: else colluders, once they are the
        majority on a cell, would earn most by overturning it.
        """
        former = self._table.get(cell)
        guess = former.value if former else self._of_method.get(cell.method, 0)
        is_guessable = (former is not None and former.firm) or supports(guess, value)
        return GUESSABLE if is_guessable else COUNT_SCALE


def credited(
    members: Sequence[Member],
    candidates: Sequence[Member],
    fresh: Mapping[Cell, CellReadings],
    audited: Mapping[PeerId, Mapping[Cell, int]],
    table: Mapping[Cell, AgreedCell],
) -> tuple[list[Member], list[Member], frozenset[Cell]]:
    """Return members and candidates with their reputations after the epoch's readings, and the cells these made firm.

    `fresh`: of members. `audited`: of candidates. `table`: before this epoch.
    """
    guesses = Guesses(table)
    after = [*members]
    firm: dict[Cell, int] = {}
    for _ in range(_ROUNDS):
        weights: dict[str, int] = {member.peer: weight_of(member) for member in after}
        firm = _firm_values(fresh, weights, needed_support(len(members)))
        readings: defaultdict[PeerId, dict[Cell, int]] = defaultdict(dict)
        for cell, measured in fresh.items():
            # Of two readings that differ, neither is known to be wrong.
            if len(measured.readings) > 2:
                for peer, value in measured.readings:
                    readings[peer][cell] = value
        after = _compared(members, readings, firm, guesses)
    return after, _compared(candidates, audited, firm, guesses), frozenset(firm)


def _firm_values(fresh: Mapping[Cell, CellReadings], weights: Mapping[str, int], needed: int) -> dict[Cell, int]:
    entries = {cell: agree_on(measured.readings, weights, needed) for cell, measured in fresh.items()}
    return {cell: entry.value for cell, entry in entries.items() if entry.firm}


def _compared(
    members: Sequence[Member], readings: Mapping[PeerId, Mapping[Cell, int]], firm: Mapping[Cell, int], guesses: Guesses
) -> list[Member]:
    agreed: Counter[PeerId] = Counter()
    deviated: Counter[PeerId] = Counter()
    for member in members:
        for cell, value in readings.get(member.peer, {}).items():
            if cell in firm:
                counter = agreed if supports(value, firm[cell]) else deviated
                counter[member.peer] += guesses.importance(cell, firm[cell])
    return [updated(member, agreed[member.peer], deviated[member.peer]) for member in members]
