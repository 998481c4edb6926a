"""Training data for the meta-model from the agreed table, and from free reports as far as their peers are trusted.

While peers choose what to report, no statistics help: colluders become the majority in the cells that decide. A free
report therefore counts by its peer's weight, and for nothing where it contradicts the agreed table.
"""

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from protocol.consensus_values import VALUE_SCALE, Cell
from protocol.identity import PeerId
from selector.consensus.table import TOLERANCE, AgreedCell

HINT_WEIGHT: Final = 0.25
"""Weight of a cell without enough support."""

FREE_WEIGHT: Final = 0.2
"""Weight of a free report by the most trusted peer."""


class Evidence(NamedTuple):
    """A weighted measurement to learn from: the natural logarithm of the ratio to the baseline."""

    cell: Cell
    log_ratio: float
    weight: float


def evidence_of(
    table: Mapping[Cell, AgreedCell], reports: Iterable[tuple[PeerId, Cell, float]], weights: Mapping[str, int]
) -> list[Evidence]:
    """Return the evidence of the agreed table and of free reports (peer, cell, log ratio).

    `weights`: of the members; reports of other peers count for nothing.
    """
    found = [
        Evidence(cell, agreed.value / VALUE_SCALE, 1.0 if agreed.firm else HINT_WEIGHT)
        for cell, agreed in table.items()
    ]
    most = max(weights.values(), default=0)
    for peer, cell, log_ratio in reports:
        known = table.get(cell)
        contradicted = known is not None and abs(log_ratio * VALUE_SCALE - known.value) > TOLERANCE
        if most and not contradicted and (weight := weights.get(peer, 0)):
            found.append(Evidence(cell, log_ratio, FREE_WEIGHT * weight / most))
    return found
