"""Evidence: how much each measurement counts when a meta-model is trained.

The daemon, the simulation and the benchmark of the consensus all ask `weigh`. First comes the agreed table: a firm
cell, which enough peers measured alike, has the full weight of an own measurement; a hint has little, by its support.
Then come free observations, by their observer's reputation. While peers choose what to report, no statistics help:
colluders become the majority in the cells that decide. So of what the table has a cell for, the reports of others count
only if they are ratios that agree with it; what this peer measured itself counts in any case.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, NamedTuple

from protocol.consensus_values import VALUE_SCALE, Cell
from protocol.forms import Digest
from protocol.measurements import ObservationKind
from selector.consensus.table import AgreedCell, supports
from selector.sample import Sample
from selector.task import MethodError, TaskContext, baseline_of, parse_method
from selector.task_buckets import Viewpoint, canonicalise
from selector.workloads import WORKLOADS, TrialWorkload

HALF_LIFE_HOURS: Final = 7 * 24
MIN_PEER_LIMIT: Final = 10.0
"""Total weight that another peer's samples may have, however few the viewpoint's own are."""

HINT_WEIGHT: Final = 0.12
"""Weight of a hint for each reading that supports it: two make a quarter of a firm cell."""

_SERVED_WEIGHT: Final = 0.5
"""Of a served job relative to a ratio to the baseline, which is free of drift."""

_PEER_WEIGHT: Final = 0.5
_UNSIGNED_WEIGHT: Final = 0.2
_OTHER_HARDWARE_WEIGHT: Final = 0.3
_OTHER_SOFTWARE_WEIGHT: Final = 0.4

AGREED: Final = ""
"""In place of an observer: the swarm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreedTable:
    """What the swarm agreed about a model. `model`: its id. `epoch`, `digest`: of the statement's table."""

    model: str
    epoch: int
    digest: Digest
    cells: Mapping[Cell, AgreedCell]
    measured: frozenset[str] = frozenset()
    """Hardware classes with cells that `firm_part` left out."""

    def firm_part(self, hardware: Collection[str]) -> "AgreedTable":
        """Return the table with nothing but its firm cells of these hardware classes."""
        firm = {cell: each for cell, each in self.cells.items() if each.firm and cell.hardware in hardware}
        return replace(self, cells=firm, measured=frozenset(cell.hardware for cell in self.cells))

    def is_ahead(self, method: str, other: str, hardware: str) -> bool:
        """Return whether a method is cheaper than another on this hardware under any workload with cells of both.

        On hardware of which there is no cell: whether it is on all that there are cells of.
        """
        known = {cell.hardware for cell in self.cells}
        classes = {hardware} if hardware in known | self.measured else known
        return bool(classes) and all(self._is_ahead(method, other, each) for each in classes)

    def _is_ahead(self, method: str, other: str, hardware: str) -> bool:
        for workload in WORKLOADS:
            own, others = (self._value(Cell(hardware, workload, name)) for name in (method, other))
            if own is not None and others is not None and own < others:
                return True
        return False

    def _value(self, cell: Cell) -> int | None:
        if cell.method == baseline_of(cell.method).name:
            return 0  # by definition
        found = self.cells.get(cell)
        return found.value if found else None


class Evidence(NamedTuple):
    """A sample and its weight, 1 for an own measurement."""

    sample: Sample
    weight: float


Contexts = Mapping[Cell, TaskContext]
"""The task contexts in which cells were measured."""


def weigh(
    samples: Sequence[Sample], viewpoint: Viewpoint, tables: Iterable[tuple[AgreedTable, Contexts]] = ()
) -> list[Evidence]:
    """Return the evidence: the agreed cells whose context is known, then the samples, without those that weigh 0."""
    agreed: list[Evidence] = []
    known: defaultdict[Hashable, list[tuple[str, AgreedCell]]] = defaultdict(list)
    for table, contexts in tables:
        for cell, entry in table.cells.items():
            if (context := contexts.get(cell)) is None:
                continue
            sample = _agreed_sample(table, cell, entry, context, viewpoint)
            agreed.append(Evidence(sample, 1.0 if entry.firm else HINT_WEIGHT * entry.support))
            known[_key(sample)].append((cell.hardware, entry))
    found = []
    for sample, weight in zip(samples, _weights(samples, viewpoint), strict=True):
        hardware = sample.context.hardware.split("+")
        cells = [entry for name, entry in known.get(_key(sample), ()) if name in hardware]
        if not cells or _adds_to(cells, sample, viewpoint):
            found.append(Evidence(sample, weight))
    return [each for each in (*agreed, *found) if each.weight > 0]


def contexts_of_cells(table: AgreedTable, samples: Iterable[Sample], viewpoint: Viewpoint) -> dict[Cell, TaskContext]:
    """Return the contexts of a table's cells, as members measured them.

    That is the route of an assigned measurement on a cell's hardware that all stages signed, with the workload of the
    cell: of the viewpoint's own if there is one, else of the member with the most trust, the newest. No other report
    can move what was agreed to another context. A cell whose hardware no such sample has is left out.
    """
    trust = {**viewpoint.trust, viewpoint.peer: math.inf}
    assigned = (
        sample
        for sample in samples
        if sample.kind is ObservationKind.ASSIGNED and sample.countersigned and trust.get(sample.observer, 0.0) > 0
    )
    routes: dict[str, TaskContext] = {}
    for sample in sorted(assigned, key=lambda sample: (trust[sample.observer], sample.hour, sample.observer)):
        if sample.model == table.model:
            routes.update(dict.fromkeys(sample.context.hardware.split("+"), sample.context))
    return {
        cell: _under(routes[cell.hardware], workload)
        for cell in table.cells
        if cell.hardware in routes and (workload := WORKLOADS.get(cell.workload)) is not None
    }


def _under(context: TaskContext, workload: TrialWorkload) -> TaskContext:
    """Return the context of another workload on the same route."""
    rows, new_rows = (each.prompt_tokens + each.max_tokens for each in (context, workload))
    return replace(context, **workload.task, transfer_s=context.transfer_s * new_rows / rows)


def _agreed_sample(
    table: AgreedTable, cell: Cell, entry: AgreedCell, context: TaskContext, viewpoint: Viewpoint
) -> Sample:
    log_ratio = entry.value / VALUE_SCALE
    return Sample(
        kind=ObservationKind.ASSIGNED,
        model=table.model,
        context=context,
        method=cell.method,
        log_cost=log_ratio,  # only the ratio counts
        log_ratio=log_ratio,
        observer=AGREED,
        route=table.digest.hex(),
        hour=viewpoint.hour,
        software=viewpoint.software,
        countersigned=True,
    )


def _key(sample: Sample) -> Hashable:
    """Return what samples of one cell have in common, hardware apart: nothing that observers can spell as they like."""
    return sample.model, _canonical_name(sample.method), _sizes(sample.context)


@lru_cache(maxsize=1024)
def _canonical_name(method: str) -> str:
    try:
        return parse_method(method).name
    except MethodError:
        return method


def _sizes(context: TaskContext) -> Hashable:
    context = canonicalise(context)
    shares = (context.shared_prefix_share, context.repetitiveness)
    return context.task_kind, context.prompt_tokens, context.max_tokens, context.concurrency, *shares


def _adds_to(cells: Sequence[AgreedCell], sample: Sample, viewpoint: Viewpoint) -> bool:
    """Return whether a sample counts beside the agreed cells that it is of.

    Assigned measurements are what the table was made of, and must not count twice. Of its own a peer leaves out those
    alone that firm cells have in full.
    """
    is_assigned = sample.kind is ObservationKind.ASSIGNED
    if sample.observer == viewpoint.peer:
        return not (is_assigned and all(each.firm and _agrees(sample, each) for each in cells))
    return not is_assigned and all(_agrees(sample, each) for each in cells)


def _agrees(sample: Sample, cell: AgreedCell) -> bool:
    """Return whether a sample says what was agreed; one without a ratio says nothing that can be compared."""
    return sample.log_ratio is not None and supports(round(sample.log_ratio * VALUE_SCALE), cell.value)


def _weights(samples: Sequence[Sample], viewpoint: Viewpoint) -> list[float]:
    """Return the weight of each sample.

    The samples of another peer weigh at most half as much in total as the viewpoint's own, or MIN_PEER_LIMIT.
    """
    weights: list[float] = []
    of_observer: defaultdict[str, float] = defaultdict(float)
    for sample in samples:
        weight = 0.5 ** (max(0, viewpoint.hour - sample.hour) / HALF_LIFE_HOURS)
        weight *= _SERVED_WEIGHT if sample.log_ratio is None else 1.0
        if sample.observer != viewpoint.peer:
            weight *= _PEER_WEIGHT if sample.countersigned else _UNSIGNED_WEIGHT
            weight *= viewpoint.trust.get(sample.observer, viewpoint.default_trust)
        if viewpoint.hardware not in sample.context.hardware.split("+"):
            weight *= _OTHER_HARDWARE_WEIGHT
        if sample.software != viewpoint.software:
            weight *= _OTHER_SOFTWARE_WEIGHT
        weights.append(weight)
        of_observer[sample.observer] += weight
    limit = max(MIN_PEER_LIMIT, of_observer[viewpoint.peer] / 2)
    return [
        weight if sample.observer == viewpoint.peer else weight * limit / max(limit, of_observer[sample.observer])
        for sample, weight in zip(samples, weights, strict=True)
    ]
