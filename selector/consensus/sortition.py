"""Whom the beacon draws: the committee that signs, and the peers that measure.

The beacon is the digest of the statement before and the epoch, which nobody knows before that statement has its quorum.
Peers and cells are ordered by what it makes of their names, so that everybody draws the same and nobody chooses.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from selector.consensus.values import Cell, Digest, digest_of

COMMITTEE: Final = 128
"""Members that sign a statement; all of a smaller swarm."""

REPLICAS: Final = 7
"""Peers that measure the same cell."""

MAX_CELLS: Final = 24
"""Cells measured in one epoch: what an epoch costs does not grow with the swarm."""

MAX_CELLS_PER_PEER: Final = 2
"""Cells that one peer measures in one epoch."""


@dataclass(frozen=True, slots=True)
class Agenda:
    """What there is to measure: every method under every workload, on every class of hardware among the members."""

    workloads: tuple[str, ...]
    methods: tuple[str, ...]

    def cells(self, hardware: Iterable[str]) -> tuple[Cell, ...]:
        """Return all cells for some classes of hardware."""
        return tuple(
            Cell(kind, workload, method)
            for kind in sorted(set(hardware))
            for workload in self.workloads
            for method in self.methods
        )


def beacon_of(parent: Digest, epoch: int) -> Digest:
    """Return the beacon of an epoch. The epoch is in it, so that after a failure others are drawn."""
    return digest_of("beacon", parent, epoch)


def draw_committee(beacon: Digest, members: Iterable[str], size: int = COMMITTEE) -> tuple[str, ...]:
    """Return the members that sign, in the order in which they may propose."""
    return tuple(sorted(members, key=lambda peer: digest_of("committee", beacon, peer))[:size])


def draw_assignments(
    beacon: Digest,
    members: Sequence[tuple[str, str]],
    agenda: Agenda,
    measured: Mapping[Cell, int],
    *,
    max_cells: int = MAX_CELLS,
    max_cells_per_peer: int = MAX_CELLS_PER_PEER,
    replicas: int = REPLICAS,
) -> dict[Cell, tuple[str, ...]]:
    """Return which peers measure which cells.

    `members`: each with its class of hardware. `measured`: the epoch of each cell that was measured. What was never
    measured comes first, then what was measured longest ago; of equals the beacon draws. A cell is measured by
    min(`replicas`, members with that hardware) peers.
    """
    eligible: dict[str, list[str]] = {}
    for peer, hardware in members:
        eligible.setdefault(hardware, []).append(peer)
    load: Counter[str] = Counter()
    assignments: dict[Cell, tuple[str, ...]] = {}
    cells = agenda.cells(eligible)
    for cell in sorted(cells, key=lambda cell: (measured.get(cell, -1), digest_of("cell", beacon, cell))):
        if len(assignments) == max_cells:
            break
        wanted = min(replicas, len(eligible[cell.hardware]))
        willing = [peer for peer in eligible[cell.hardware] if load[peer] < max_cells_per_peer]
        if len(willing) >= wanted:
            drawn = sorted(willing, key=lambda peer: digest_of("replica", beacon, cell, peer))[:wanted]
            assignments[cell] = tuple(drawn)
            load.update(drawn)
    return assignments
