"""Training set: the history as weighted samples, as one peer sees them.

Absolute times do not travel between machines. The target is therefore the residual of a measurement over the heuristic,
less what all measurements of one observer, of a kind of task and an objective on the same route within the same hour,
have in common: a busy evening, a slow machine, or that scores take longer than the heuristic says, tells nothing about
methods. Costs for latency are times, others are of computing alone: waiting would be credited to methods.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from selector.dataset import Contexts, Dataset, FloatArray, IntArray, Pairs
from selector.effects import fit_effects
from selector.evidence import AgreedTable, contexts_of_cells, weigh
from selector.heuristic import predicted_cost
from selector.sample import Sample
from selector.task import MethodError, TaskContext, parse_method
from selector.task_buckets import Viewpoint, canonicalise
from selector.task_features import tabulate

MAX_RESIDUAL: Final = 2.5
"""Natural logarithm: residuals are clipped at a factor of twelve either way."""


_RATIOS: Final = ("", "", "", "", 0)
"""The level of all ratios: the baseline's residual is 0, whatever others say of other methods."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSet:
    """A dataset whose cost is the residual over the heuristic.

    `sample_count`: samples and agreed cells in it. `support`: total weight of the samples of each method; `weight`: of
    all samples, in units of an own measurement.
    `learned_from`: the hardware classes whose cells of the agreed tables are among the samples, by model.
    """

    dataset: Dataset
    sample_count: int
    support: Mapping[str, float]
    weight: float
    learned_from: Mapping[str, frozenset[str]]


def build_training_set(
    samples: Sequence[Sample], viewpoint: Viewpoint, tables: Sequence[AgreedTable] = ()
) -> TrainingSet | None:
    """Return the training set of a viewpoint; None where fewer than two methods can be compared.

    `tables`: what the swarm agreed. Samples of methods unknown to this version are left out.
    """
    agreed = [(table, contexts_of_cells(table, samples, viewpoint)) for table in tables]
    rows: list[_Row] = []
    for sample, weight in weigh(samples, viewpoint, agreed):
        rows += _rows_of(sample, weight)
    rows = _compared(rows)
    methods = sorted({row.method for row in rows})
    if len(methods) < 2:
        return None
    contexts = [row.context for row in rows if row.is_first]
    pairs = Pairs(
        tabulate(contexts),
        tuple(methods),
        np.cumsum([row.is_first for row in rows]) - 1,
        np.array([methods.index(row.method) for row in rows], dtype=np.intp),
    )
    weight_of_rows = np.array([row.weight for row in rows])
    support = np.bincount(pairs.method, weights=weight_of_rows, minlength=len(methods))
    learned_from = {table.model: frozenset(cell.hardware for cell in known) for table, known in agreed if known}
    weight = sum(row.weight for row in rows if row.is_first)
    support_of = dict(zip(methods, support.tolist(), strict=True))
    dataset = Dataset(pairs, _residuals(rows, pairs), weight_of_rows, name="history")
    return TrainingSet(dataset, len(contexts), support_of, weight, learned_from)


@dataclass(frozen=True, slots=True)
class _Row:
    context: TaskContext
    method: str
    residual: float
    weight: float
    level: tuple[str, str, str, str, int]
    """Rows of one observer, route, kind of task, objective and hour share a level: others' reports do not move ours."""
    is_first: bool
    """Whether it is the first row of its sample: rows of one sample are compared with one another."""


def _rows_of(sample: Sample, weight: float) -> list[_Row]:
    """Return the rows of a sample: a ratio to the baseline gives a row of the baseline, too."""
    try:
        method = parse_method(sample.method)
    except MethodError:
        return []
    context = canonicalise(sample.context)
    if sample.log_ratio is None:
        level = (sample.observer, sample.route, context.task_kind, context.objective, sample.hour)
        residual = sample.log_cost - predicted_cost(context, method)
        return [_Row(context, method.name, residual, weight, level, is_first=True)]
    baseline = method.baseline
    if method == baseline:
        return []  # compared with itself
    residual = sample.log_ratio - (predicted_cost(context, method) - predicted_cost(context, baseline))
    return [
        _Row(context, method.name, residual, weight, _RATIOS, is_first=True),
        _Row(context, baseline.name, 0.0, weight, _RATIOS, is_first=False),
    ]


def _compared(rows: Sequence[_Row]) -> list[_Row]:
    """Return the rows of levels with several methods: others would but repeat what is told of theirs elsewhere."""
    methods: defaultdict[Hashable, set[str]] = defaultdict(set)
    for row in rows:
        methods[row.level].add(row.method)
    return [row for row in rows if len(methods[row.level]) > 1]


def _residuals(rows: Sequence[_Row], pairs: Pairs) -> FloatArray:
    """Return each row's residual over the heuristic and its level, clipped.

    What is absurd is clipped before levels are fitted, which many methods have in common. That of the ratios is known.
    """
    levels = {level: i for i, level in enumerate(sorted({row.level for row in rows}))}
    level = np.array([levels[row.level] for row in rows], dtype=np.intp)
    no_features = Contexts(tuple(map(str, levels.values())), {}, (), np.zeros((len(levels), 0)))
    residual = np.array([row.residual for row in rows])
    weight = np.array([row.weight for row in rows])
    known = levels.get(_RATIOS)
    middle = _medians(residual, level)
    if known is not None:
        middle[known] = 0.0
    residual = np.clip(residual - middle[level], -MAX_RESIDUAL, MAX_RESIDUAL)
    fitted = fit_effects(Pairs(no_features, pairs.methods, level, pairs.method), residual, weight).of_context
    common = 0.0 if known is None else fitted[known]
    return np.clip(residual - fitted[level] + common, -MAX_RESIDUAL, MAX_RESIDUAL)


def _medians(values: FloatArray, level: IntArray) -> FloatArray:
    """Return the median of each level, of which there are none without values."""
    ordered = values[np.lexsort((values, level))]
    count = np.bincount(level)
    first = np.cumsum(count) - count
    medians: FloatArray = (ordered[first + (count - 1) // 2] + ordered[first + count // 2]) / 2
    return medians
