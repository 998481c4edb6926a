"""Sortition by a beacon: which members sign an epoch's statement (the committee), and which peers measure which cells.

Peers and cells are ordered by their digest with the beacon, so that every peer computes the same selection. The next
beacon is the digest of this one and of the nonces of the first members of the committee, which were committed to before
any of them was revealed: a proposer cannot choose among beacons, and each of these few members could only withhold its
own nonce, which costs it reputation. Nobody knows the beacon before commits are closed.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from protocol.consensus_values import Cell, Member, digest_of
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

BEACON_NONCES: Final = 5
"""Members of the committee, the first ones, whose nonces make the next beacon."""


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


@dataclass(frozen=True)
class Sortition:
    """What the beacon has drawn for one epoch."""

    committee: tuple[PeerId, ...]
    """The members that sign, in the order in which they may propose."""
    cells: Mapping[Cell, tuple[PeerId, ...]]
    """The cells that are measured, and by which members."""
    audits: Mapping[PeerId, tuple[Cell, ...]]
    """The cells among them that each candidate measures as well. Its readings are compared, and do not count."""

    @cached_property
    def expected(self) -> tuple[PeerId, ...]:
        """The peers whose contributions are expected, ascending."""
        measuring = (peer for peers in self.cells.values() for peer in peers)
        return tuple(sorted({*self.committee, *self.audits, *measuring}))

    def cells_of(self, peer: PeerId) -> tuple[Cell, ...]:
        """Return the cells that a peer measures."""
        return self.audits.get(peer) or tuple(cell for cell, peers in self.cells.items() if peer in peers)


def beacon_of(beacon: Digest, epoch: int) -> Digest:
    """Return what draws for an epoch after a statement's beacon. It changes with the epoch after a failed one."""
    return digest_of("draw", beacon, epoch)


def next_beacon(beacon: Digest, epoch: int, nonces: Mapping[PeerId, bytes]) -> Digest:
    """Return the beacon after an epoch with these nonces."""
    return digest_of("beacon", beacon, epoch, sorted(nonces.items()))


def select_committee(beacon: Digest, members: Iterable[PeerId], size: int = COMMITTEE) -> tuple[PeerId, ...]:
    """Return the members that sign, in the order in which they may propose."""
    return tuple(sorted(members, key=lambda peer: digest_of("committee", beacon, peer))[:size])


def newcomers_in_order(beacon: Digest, newcomers: Iterable[PeerId]) -> list[PeerId]:
    """Return newcomers in the order in which they are taken.

    `beacon`: of after the epoch in which they came, so that nobody can make ids that come first.
    """
    return sorted(newcomers, key=lambda peer: newcomer_rank(beacon, peer))


def newcomer_rank(beacon: Digest, peer: PeerId) -> Digest:
    """Return a newcomer's rank: those of the lowest ranks are taken."""
    return digest_of("newcomer", beacon, peer)


def draw(
    beacon: Digest,
    members: Sequence[Member],
    candidates: Sequence[Member],
    plan: MeasurementPlan,
    measured: Mapping[Cell, int],
) -> Sortition:
    """Return what a beacon draws. `measured`: the epoch in which a cell was last measured."""
    cells = assign_cells(beacon, [(member.peer, member.hardware) for member in members], plan, measured)
    audits = {
        each.peer: tuple(
            sorted(
                (cell for cell in cells if cell.hardware == each.hardware),
                key=lambda cell: digest_of("audit", beacon, cell, each.peer),
            )[:MAX_CELLS_PER_PEER]
        )
        for each in candidates
    }
    return Sortition(select_committee(beacon, [member.peer for member in members]), cells, audits)


def assign_cells(
    beacon: Digest, members: Sequence[tuple[PeerId, str]], plan: MeasurementPlan, measured: Mapping[Cell, int]
) -> dict[Cell, tuple[PeerId, ...]]:
    """Return which members measure which cells.

    `members`: each with its hardware class. `measured`: the epoch in which a cell was last measured. A cell is measured
    by min(READINGS_PER_CELL, members with that hardware) members.
    """
    eligible: dict[str, list[PeerId]] = {}
    for peer, hardware in members:
        eligible.setdefault(hardware, []).append(peer)
    load: Counter[PeerId] = Counter()
    assignments: dict[Cell, tuple[PeerId, ...]] = {}
    for cell in _cells_in_turn(beacon, {kind: len(peers) for kind, peers in eligible.items()}, plan, measured):
        if len(assignments) == MAX_CELLS:
            break
        wanted = min(READINGS_PER_CELL, len(eligible[cell.hardware]))
        available = [peer for peer in eligible[cell.hardware] if load[peer] < MAX_CELLS_PER_PEER]
        if len(available) >= wanted:
            selected = sorted(available, key=lambda peer: digest_of("replica", beacon, cell, peer))[:wanted]
            assignments[cell] = tuple(selected)
            load.update(selected)
    return assignments


def _cells_in_turn(
    beacon: Digest, sizes: Mapping[str, int], plan: MeasurementPlan, measured: Mapping[Cell, int]
) -> list[Cell]:
    """Return all cells in the order in which they are measured. `sizes`: members of each hardware class.

    Of one class, cells never measured come first, then the oldest; ties are ordered by the beacon. Classes come in a
    random order, as often as they have members: otherwise a few peers with classes of their own would have all other
    measurements wait.
    """
    of_class: dict[str, list[Cell]] = {}
    for cell in sorted(plan.cells(sizes), key=lambda cell: (measured.get(cell, -1), digest_of("cell", beacon, cell))):
        of_class.setdefault(cell.hardware, []).append(cell)
    order: list[tuple[int, Cell]] = []
    for kind, cells in of_class.items():
        position = 0
        for number, cell in enumerate(cells):
            position += int.from_bytes(digest_of("turn", beacon, kind, number)[:8]) // sizes[kind]
            order.append((position, cell))
    return [cell for _, cell in sorted(order)]
