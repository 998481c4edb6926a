"""What a meta-model learns from: the agreed table, and beside it what peers reported freely, as far as it is believed.

While peers choose what to report, statistics cannot save anybody: colluders become the majority in the cells that
decide. So a free report counts for no more than the word of who gave it, and for nothing where the swarm has agreed
otherwise.
"""

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from selector.consensus.table import TOLERANCE, Entry
from selector.consensus.values import VALUE_SCALE, Cell

HINT_WEIGHT: Final = 0.25
"""Of a cell that too few support."""

FREE_WEIGHT: Final = 0.2
"""Of a free report by whoever is believed most."""


class Evidence(NamedTuple):
    """A measurement to learn from: natural logarithm of the ratio to the baseline, and what it counts beside others."""

    cell: Cell
    log_ratio: float
    weight: float


def evidence_of(
    table: Mapping[Cell, Entry], reports: Iterable[tuple[str, Cell, float]], weights: Mapping[str, int]
) -> list[Evidence]:
    """Return what to learn from.

    `reports`: who says that a cell's log ratio is what. `weights`: of the members' word; nobody else's counts.
    """
    found = [
        Evidence(cell, entry.value / VALUE_SCALE, 1.0 if entry.firm else HINT_WEIGHT) for cell, entry in table.items()
    ]
    most = max(weights.values(), default=0)
    for peer, cell, log_ratio in reports:
        agreed = table.get(cell)
        contradicted = agreed is not None and abs(log_ratio * VALUE_SCALE - agreed.value) > TOLERANCE
        if most and not contradicted and (weight := weights.get(peer, 0)):
            found.append(Evidence(cell, log_ratio, FREE_WEIGHT * weight / most))
    return found
