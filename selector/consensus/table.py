"""The agreed table: of each cell the weighted median of its readings, and how many of them support it."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from protocol.consensus_values import VALUE_SCALE, Cell, CellReadings, PeerReading, digest_of
from protocol.forms import Digest

TOLERANCE: Final = VALUE_SCALE // 5
"""The largest deviation of a reading from a value that it supports: a fifth of a natural logarithm."""

FIRM_SUPPORT: Final = 3
"""Readings, or all members where they are fewer, that must support a firm cell."""


class AgreedCell(NamedTuple):
    """The agreed value of a cell: the logarithm of its ratio to the baseline, and how many readings support it.

    `firm`: enough readings support it; otherwise it is a hint.
    """

    value: int
    support: int
    firm: bool


def weighted_median(values: Sequence[tuple[int, int]]) -> int:
    """Return the lower weighted median of pairs (value, weight); with no weight at all, the unweighted one."""
    total = sum(weight for _, weight in values)
    if not total:
        values = [(value, 1) for value, _ in values]
        total = len(values)
    below = 0
    for value, weight in sorted(values):
        below += weight
        if 2 * below >= total:
            return value
    raise ValueError("the median of no values")


def agree_on(readings: Sequence[PeerReading], weights: Mapping[str, int], needed: int) -> AgreedCell:
    """Return the agreed value of one cell. `weights`: of the members; other peers have none."""
    value = weighted_median([(reading.value, weights.get(reading.peer, 0)) for reading in readings])
    support = sum(supports(reading.value, value) and weights.get(reading.peer, 0) > 0 for reading in readings)
    return AgreedCell(value, support, support >= needed)


def supports(value: int, agreed: int) -> bool:
    """Return whether a reading supports an agreed value."""
    return abs(value - agreed) <= TOLERANCE


def needed_support(member_count: int) -> int:
    """Return how many readings must support a firm cell."""
    return min(FIRM_SUPPORT, member_count)


def table_of(
    measured: Mapping[Cell, CellReadings], weights: Mapping[str, int], member_count: int
) -> dict[Cell, AgreedCell]:
    """Return the agreed table, ascending by cell.

    Old readings count with today's weights: a liar that is found out loses its old cells, too.
    """
    needed = needed_support(member_count)
    return {
        cell: agree_on(measured[cell].readings, weights, needed) for cell in sorted(measured) if measured[cell].readings
    }


def digest_of_table(table: Mapping[Cell, AgreedCell]) -> Digest:
    """Return the digest of a table, independent of its order."""
    rows = [(cell, agreed.value, agreed.support, int(agreed.firm)) for cell, agreed in sorted(table.items())]
    return digest_of("table", rows)
