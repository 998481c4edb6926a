"""Evidence: how much each measurement counts when a meta-model is trained.

The daemon, the simulation and the benchmark of the consensus all ask `weigh`. First comes the agreed table: a firm
cell, which enough peers measured alike, has the full weight of an own measurement; a hint has little, by its support.
Cells of other hardware count less, by how many members have it: a few can make up a class, and what is firm there.
Then come free observations, by their observer's reputation. While peers choose what to report, no statistics help:
colluders become the majority in the cells that decide. So of what the table has a cell for, or one much like it, the
reports of others count only if they are ratios that agree with it, and all together at most as much as what was agreed;
what this peer measured itself counts in any case.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from statistics import median_low
from typing import Any, Final, NamedTuple

from protocol.consensus_values import VALUE_SCALE, Cell
from protocol.forms import Digest
from protocol.measurements import ObservationKind
from selector.consensus.table import TOLERANCE, AgreedCell, supports
from selector.sample import Sample
from selector.task import MethodError, TaskContext, baseline_of, parse_method
from selector.task_buckets import Viewpoint, are_alike
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

_ANY_WORKLOAD: Final = next(iter(WORKLOADS.values()))

_UNKNOWN_PEERS: Final = "unknown peers"
"""In place of an observer: all that are no members of a model's chain, whose identities are free."""

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
    members: Mapping[str, int] = field(default_factory=dict)
    """How many members each hardware class has."""

    def firm_part(self, hardware: Collection[str]) -> "AgreedTable":
        """Return the table with nothing but its firm cells of these hardware classes."""
        firm = {cell: each for cell, each in self.cells.items() if each.firm and cell.hardware in hardware}
        return replace(self, cells=firm, measured=frozenset(cell.hardware for cell in self.cells))

    def share_of(self, hardware: str) -> float:
        """Return how many members a class has, relative to the one with most."""
        return self.members.get(hardware, 0) / max(self.members.values()) if self.members else 1.0

    def is_ahead(self, method: str, other: str, hardware: str, workload: str) -> bool:
        """Return whether a method is clearly cheaper than another on this hardware under a workload.

        On hardware of which there is no cell: whether it is on all that there are cells of.
        """
        known = {cell.hardware for cell in self.cells}
        classes = {hardware} if hardware in known | self.measured else known
        return bool(classes) and all(self._is_ahead(method, other, each, workload) for each in classes)

    def _is_ahead(self, method: str, other: str, hardware: str, workload: str) -> bool:
        own, others = (self._value(Cell(hardware, workload, name)) for name in (method, other))
        return own is not None and others is not None and others - own > TOLERANCE

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
    known: defaultdict[Hashable, list[tuple[TaskContext, AgreedCell]]] = defaultdict(list)
    for table, contexts in tables:
        for cell, entry in table.cells.items():
            if (context := contexts.get(cell)) is None:
                continue
            weight = 1.0 if entry.firm else HINT_WEIGHT * entry.support
            if cell.hardware != viewpoint.hardware:
                weight *= _OTHER_HARDWARE_WEIGHT * table.share_of(cell.hardware)
            sample = _agreed_sample(table, cell, entry, context, viewpoint)
            agreed.append(Evidence(sample, weight))
            known[_key(sample, cell.hardware)].append((context, entry))
    counted = []
    for sample in samples:
        if sample.log_ratio is None and not sample.countersigned and sample.observer != viewpoint.peer:
            continue  # nothing but one peer's word, perhaps of a route through this node
        found = (each for name in sample.context.hardware.split("+") for each in known.get(_key(sample, name), ()))
        cells = [entry for context, entry in found if are_alike(context, sample.context)]
        if not cells or _adds_to(cells, sample, viewpoint):
            counted.append(sample)
    weights = _weights(counted, viewpoint, sum(each.weight for each in agreed))
    return [each for each in (*agreed, *map(Evidence, counted, weights)) if each.weight > 0]


def contexts_of_cells(table: AgreedTable, samples: Iterable[Sample], viewpoint: Viewpoint) -> dict[Cell, TaskContext]:
    """Return the contexts of a table's cells, as members measured them.

    Members are those of the table's own chain. It is the route of an assigned measurement on a cell's hardware that all
    stages signed, with the workload of the cell: of the viewpoint's own, the newest, if there is one. Else it is what
    the members' newest have in the middle, figure by figure, of those on the kind of route on which most of the trust
    is. No other report can move what was agreed to another context, nor can a single member. A cell whose hardware no
    such sample has is left out.
    """
    newest: defaultdict[str, dict[str, TaskContext]] = defaultdict(dict)
    heard = {viewpoint.peer, *viewpoint.members(table.model)}
    for sample in sorted(samples, key=lambda sample: (sample.hour, sample.route)):
        is_assigned = sample.kind is ObservationKind.ASSIGNED and sample.countersigned and sample.model == table.model
        if is_assigned and sample.observer in heard:
            for hardware in sample.context.hardware.split("+"):
                newest[hardware][sample.observer] = sample.context
    routes = {hardware: _typical(contexts, table.model, viewpoint) for hardware, contexts in newest.items()}
    return {
        cell: _under(routes[cell.hardware], workload)
        for cell in table.cells
        if cell.hardware in routes and (workload := WORKLOADS.get(cell.workload)) is not None
    }


def _typical(contexts: Mapping[str, TaskContext], model: str, viewpoint: Viewpoint) -> TaskContext:
    """Return the viewpoint's own context; else the one in the middle of several observers', of the same stages."""
    if viewpoint.peer in contexts:
        return contexts[viewpoint.peer]
    of_kind: defaultdict[tuple[int, str, int], list[str]] = defaultdict(list)
    for observer, context in contexts.items():
        of_kind[context.stage_count, context.hardware, len(context.stage_facts)].append(observer)
    trust = viewpoint.trust[model]
    chosen = max(of_kind, key=lambda kind: (sum(trust[observer] for observer in of_kind[kind]), kind))
    found: TaskContext = _middle([_under(contexts[observer], _ANY_WORKLOAD) for observer in of_kind[chosen]])
    return found


def _middle(values: Sequence[Any]) -> Any:
    """Return the median of values, where they have fields or items that of each; None unless most are known."""
    first = values[0]
    if is_dataclass(first) and not isinstance(first, type):
        return replace(first, **{f.name: _middle([getattr(each, f.name) for each in values]) for f in fields(first)})
    if isinstance(first, tuple):
        return tuple(_middle(items) for items in zip(*values, strict=True))
    known = [each for each in values if each is not None]
    return median_low(known) if 2 * len(known) > len(values) else None


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


def _key(sample: Sample, hardware: str) -> Hashable:
    """Return what samples of a cell on this hardware have in common: nothing that observers can spell as they like."""
    return sample.model, _canonical_name(sample.method), hardware


@lru_cache(maxsize=1024)
def _canonical_name(method: str) -> str:
    try:
        return parse_method(method).name
    except MethodError:
        return method


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


def _weights(samples: Sequence[Sample], viewpoint: Viewpoint, agreed_weight: float) -> list[float]:
    """Return the weight of each sample. `agreed_weight`: of all agreed cells.

    The samples of another peer weigh at most half as much in total as the viewpoint's own ratios, or MIN_PEER_LIMIT:
    many served jobs, perhaps all with one method, do not raise that limit. Once there are members, all
    other peers count as one. If something is agreed, all samples of others weigh together at most as much as that, or
    as the viewpoint's own ratios.
    """
    weights: list[float] = []
    of_source: defaultdict[str, float] = defaultdict(float)
    own = 0.0
    sources = [
        _UNKNOWN_PEERS if viewpoint.is_unknown(sample.observer, sample.model) else sample.observer for sample in samples
    ]
    for sample, source in zip(samples, sources, strict=True):
        weight = 0.5 ** (max(0, viewpoint.hour - sample.hour) / HALF_LIFE_HOURS)
        weight *= _SERVED_WEIGHT if sample.log_ratio is None else 1.0
        if sample.observer != viewpoint.peer:
            weight *= _PEER_WEIGHT if sample.countersigned else _UNSIGNED_WEIGHT
            weight *= viewpoint.trust_in(sample.observer, sample.model)
        if viewpoint.hardware not in sample.context.hardware.split("+"):
            weight *= _OTHER_HARDWARE_WEIGHT
        if sample.software != viewpoint.software:
            weight *= _OTHER_SOFTWARE_WEIGHT
        weights.append(weight)
        if sample.observer != viewpoint.peer:
            of_source[source] += weight
        elif sample.log_ratio is not None:
            own += weight
    limit = max(MIN_PEER_LIMIT, own / 2)
    in_all = sum(min(limit, total) for total in of_source.values())
    most = max(MIN_PEER_LIMIT, own, agreed_weight) if agreed_weight else math.inf
    scale = min(1.0, most / in_all) if in_all else 1.0
    factors = {source: scale * limit / max(limit, total) for source, total in of_source.items()}
    return [weight * factors.get(source, 1.0) for weight, source in zip(weights, sources, strict=True)]
