"""The agreed table: of each cell the weighted median of its replicas, and how many of them support it."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from selector.consensus.values import VALUE_SCALE, Cell, Digest, digest_of

TOLERANCE: Final = VALUE_SCALE // 5
"""A replica supports a value that differs from its own by no more than this: a fifth of a natural logarithm."""

FIRM_SUPPORT: Final = 3
"""Replicas, or all members where they are fewer, that must support a cell for more than a hint."""


class Replica(NamedTuple):
    """One peer's reading of a cell."""

    peer: str
    value: int


class Replicas(NamedTuple):
    """What was measured of a cell, ascending by peer, and in which epoch it was drawn last."""

    epoch: int
    replicas: tuple[Replica, ...]


class Entry(NamedTuple):
    """What is agreed of a cell: the logarithm of its ratio to the baseline, and how many replicas support that.

    `firm`: the support suffices; if not, it is a hint.
    """

    value: int
    support: int
    firm: bool


def weighted_median(values: Sequence[tuple[int, int]]) -> int:
    """Return the lower weighted median of pairs (value, weight); with no weight at all everybody's counts alike."""
    total = sum(weight for _, weight in values)
    if not total:
        values = [(value, 1) for value, _ in values]
        total = len(values)
    below = 0
    for value, weight in sorted(values):
        below += weight
        if 2 * below >= total:
            return value
    raise ValueError("the median of nothing")


def agree_on(replicas: Sequence[Replica], weights: Mapping[str, int], needed: int) -> Entry:
    """Return what replicas of one cell come to. `weights`: of the peers; who is not in it has none."""
    value = weighted_median([(replica.value, weights.get(replica.peer, 0)) for replica in replicas])
    support = sum(supports(replica.value, value) and weights.get(replica.peer, 0) > 0 for replica in replicas)
    return Entry(value, support, support >= needed)


def supports(value: int, agreed: int) -> bool:
    """Whether a reading supports an agreed value."""
    return abs(value - agreed) <= TOLERANCE


def needed_support(member_count: int) -> int:
    """Return how many replicas must support a cell for more than a hint."""
    return min(FIRM_SUPPORT, member_count)


def table_of(measured: Mapping[Cell, Replicas], weights: Mapping[str, int], member_count: int) -> dict[Cell, Entry]:
    """Return the agreed table, ascending by cell.

    What was measured long ago is judged with today's weights: a liar that is found out loses its old cells, too.
    """
    needed = needed_support(member_count)
    return {
        cell: agree_on(measured[cell].replicas, weights, needed) for cell in sorted(measured) if measured[cell].replicas
    }


def digest_of_table(table: Mapping[Cell, Entry]) -> Digest:
    """Return the digest of a table, the same in whatever order it was made."""
    entries = [(cell, entry.value, entry.support, int(entry.firm)) for cell, entry in sorted(table.items())]
    return digest_of("table", entries)
