"""Sortition by a beacon: which members sign an epoch's statement (the committee), and which peers measure which cells.

The beacon is the digest of the previous statement and the epoch, unknown before that statement has its quorum. Peers
and cells are ordered by their digest with the beacon, so that every peer computes the same selection.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.consensus_values import Cell, digest_of
from protocol.forms import Digest
from protocol.identity import PeerId

COMMITTEE: Final = 128
"""Members that sign a statement; all members of a smaller swarm."""

READINGS_PER_CELL: Final = 7
"""Peers that measure the same cell."""

MAX_CELLS: Final = 24
"""Cells measured in one epoch: the cost of an epoch does not grow with the swarm."""

MAX_CELLS_PER_PEER: Final = 2
"""Cells that one peer measures in one epoch."""


@dataclass(frozen=True, slots=True)
class MeasurementPlan:
    """The cells to measure: every method under every workload, on every hardware class among the members."""

    workloads: tuple[str, ...]
    methods: tuple[str, ...]

    def cells(self, hardware: Iterable[str]) -> tuple[Cell, ...]:
        """Return all cells of some hardware classes."""
        return tuple(
            Cell(kind, workload, method)
            for kind in sorted(set(hardware))
            for workload in self.workloads
            for method in self.methods
        )


def beacon_of(parent: Digest, epoch: int) -> Digest:
    """Return the beacon of an epoch. It covers the epoch, so that the selection changes after a failed one."""
    return digest_of("beacon", parent, epoch)


def select_committee(beacon: Digest, members: Iterable[PeerId], size: int = COMMITTEE) -> tuple[PeerId, ...]:
    """Return the members that sign, in the order in which they may propose."""
    return tuple(sorted(members, key=lambda peer: digest_of("committee", beacon, peer))[:size])


def assign_cells(
    beacon: Digest,
    members: Sequence[tuple[PeerId, str]],
    plan: MeasurementPlan,
    measured: Mapping[Cell, int],
    *,
    max_cells: int = MAX_CELLS,
    max_cells_per_peer: int = MAX_CELLS_PER_PEER,
    readings_per_cell: int = READINGS_PER_CELL,
) -> dict[Cell, tuple[PeerId, ...]]:
    """Return which peers measure which cells.

    `members`: each with its hardware class. `measured`: the epoch in which a cell was last measured. Cells never
    measured come first, then the oldest; ties are ordered by the beacon. A cell is measured by min(`readings_per_cell`,
    members with that hardware) peers.
    """
    eligible: dict[str, list[PeerId]] = {}
    for peer, hardware in members:
        eligible.setdefault(hardware, []).append(peer)
    load: Counter[PeerId] = Counter()
    assignments: dict[Cell, tuple[PeerId, ...]] = {}
    cells = plan.cells(eligible)
    for cell in sorted(cells, key=lambda cell: (measured.get(cell, -1), digest_of("cell", beacon, cell))):
        if len(assignments) == max_cells:
            break
        wanted = min(readings_per_cell, len(eligible[cell.hardware]))
        available = [peer for peer in eligible[cell.hardware] if load[peer] < max_cells_per_peer]
        if len(available) >= wanted:
            selected = sorted(available, key=lambda peer: digest_of("replica", beacon, cell, peer))[:wanted]
            assignments[cell] = tuple(selected)
            load.update(selected)
    return assignments
