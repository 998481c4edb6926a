"""Training set: the history as weighted samples, as one peer sees them.

Absolute times do not travel between machines. The target is therefore the residual of a measurement over the heuristic,
less what all measurements on the same route within the same hour have in common: a busy evening or a slow machine says
nothing about methods.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from selector.dataset import Contexts, Dataset, FloatArray, Pairs
from selector.effects import fit_effects
from selector.heuristic import predicted_cost
from selector.task import Method, MethodError, TaskContext, parse_method
from selector.task_buckets import Viewpoint, canonicalise, task_bucket

MAX_SAMPLES: Final = 20_000
"""Only the newest samples are learned from."""

MAX_RESIDUAL: Final = 2.5
"""Natural logarithm: residuals are clipped at a factor of twelve either way."""

HALF_LIFE_HOURS: Final = 7 * 24
MAX_NAME: Final = 128
"""Characters of a name in a table, where all names take the width of the longest; longer ones are hashed."""

MAX_HARDWARE: Final = 8
"""Hardware classes with an indicator column: the most frequent ones."""

MIN_PEER_LIMIT: Final = 10.0
"""Total weight that another peer's samples may have, however few the viewpoint's own are."""

_SERVED_WEIGHT: Final = 0.5
"""Of a served job relative to a ratio to the baseline, which is free of drift."""

_PEER_WEIGHT: Final = 0.5
_UNSIGNED_WEIGHT: Final = 0.2
_OTHER_HARDWARE_WEIGHT: Final = 0.3
_OTHER_SOFTWARE_WEIGHT: Final = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement of a method in a context.

    `log_cost`: natural logarithm of the cost in seconds. `log_ratio`: of the cost over the baseline's, measured
    alternately on the same route; None for a served job. `route`, `software`: opaque names. `hour`: of issue, from any
    origin. `countersigned`: whether every stage signed its figures.
    """

    context: TaskContext
    method: str
    log_cost: float
    log_ratio: float | None
    observer: str
    route: str
    hour: int
    software: str
    countersigned: bool


@dataclass(frozen=True, slots=True)
class ContextColumns:
    """Feature columns of contexts. `hardware`: the classes with an indicator column."""

    hardware: tuple[str, ...]

    @classmethod
    def of(cls, contexts: Sequence[TaskContext]) -> "ContextColumns":
        """Return the columns that distinguish these contexts."""
        counts = Counter(context.hardware for context in contexts)
        return cls(tuple(sorted(name for name, _ in counts.most_common(MAX_HARDWARE))))

    def table(self, contexts: Sequence[TaskContext]) -> Contexts:
        """Return the contexts as a table."""
        names = {
            "model": np.array([_brief(context.architecture) for context in contexts], dtype=np.str_),
            "hardware": np.array([_brief(context.hardware) for context in contexts], dtype=np.str_),
            "task": np.array([_brief(task_bucket(context)) for context in contexts], dtype=np.str_),
            "budget": np.array([context.objective for context in contexts], dtype=np.str_),
        }
        rows = [_features(context) for context in contexts]
        columns = (*rows[0], *(f"hardware={name}" for name in self.hardware))
        same = [[float(context.hardware == name) for name in self.hardware] for context in contexts]
        table = np.hstack([np.array([list(row.values()) for row in rows]), np.array(same).reshape(len(rows), -1)])
        return Contexts(tuple(str(i) for i in range(len(rows))), names, columns, table)


def _brief(name: str) -> str:
    """Return a name of bounded length: that of a route of many stages may be kilobytes long."""
    return name if len(name) <= MAX_NAME else hashlib.sha256(name.encode()).hexdigest()


def _features(context: TaskContext) -> dict[str, float]:
    def log2(value: float | None) -> float:
        return math.log2(value) if value else math.nan

    new_rows = context.prompt_tokens * (1 - context.shared_prefix_share)
    return {
        "l_weight_bytes": log2(context.weight_bytes),
        "l_weight_bits": log2(_weight_bits(context.weight_type)),
        "l_hidden": log2(context.hidden_size),
        "blocks": float(context.block_count),
        "l_vocabulary": log2(context.vocabulary_size),
        "l_intermediate": log2(context.intermediate_size),
        "l_gqa": log2((context.head_count or 0) / (context.kv_head_count or 1)),
        "l_experts": log2(context.expert_count),
        "l_prompt": log2(context.prompt_tokens),
        "l_new": log2(context.max_tokens),
        "l_rows": math.log2(1 + new_rows),
        "l_prompt_over_new": math.log2((1 + new_rows) / max(1, context.max_tokens)),
        "shared": context.shared_prefix_share,
        "repetitiveness": context.repetitiveness,
        "l_concurrency": log2(context.concurrency),
        "stages": float(context.stage_count),
        "l_link": math.log2(1e-4 + context.link_s),
    }


def _weight_bits(weight_type: str) -> int | None:
    """Return the bits of a weight, which come first in the name of its type: `bf16`, `q4_k`; None where unknown."""
    found = re.search(r"\d+", weight_type)
    return int(found[0][:3]) if found else None


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSet:
    """A dataset whose cost is the residual over the heuristic, and the columns of its contexts.

    `support`: total weight of the samples of each method; `weight`: of all samples, in units of an own measurement.
    """

    dataset: Dataset
    columns: ContextColumns
    support: Mapping[str, float]
    weight: float


def build_training_set(samples: Sequence[Sample], viewpoint: Viewpoint) -> TrainingSet | None:
    """Return the training set of a viewpoint; None where fewer than two methods can be compared.

    Samples of methods unknown to this version are left out.
    """
    newest = sorted(samples, key=lambda sample: sample.hour)[-MAX_SAMPLES:]
    weights = _weights(newest, viewpoint)
    rows: list[_Row] = []
    for number, (sample, weight) in enumerate(zip(newest, weights, strict=True)):
        rows += _rows_of(sample, number, weight) if weight else []
    methods = sorted({row.method for row in rows})
    if len(methods) < 2:
        return None
    contexts = [row.context for row in rows if row.is_first]
    columns = ContextColumns.of(contexts)
    pairs = Pairs(
        columns.table(contexts),
        tuple(methods),
        np.cumsum([row.is_first for row in rows]) - 1,
        np.array([methods.index(row.method) for row in rows], dtype=np.intp),
    )
    weight_of_rows = np.array([row.weight for row in rows])
    support = np.bincount(pairs.method, weights=weight_of_rows, minlength=len(methods))
    dataset = Dataset(pairs, _residuals(rows, pairs), weight_of_rows, name="history")
    return TrainingSet(dataset, columns, dict(zip(methods, support.tolist(), strict=True)), sum(weights))


@dataclass(frozen=True, slots=True)
class _Row:
    context: TaskContext
    method: str
    residual: float
    weight: float
    level: tuple[str, int]
    """Rows of one route and hour share a level."""
    is_first: bool
    """Whether it is the first row of its sample: rows of one sample are compared with one another."""


def _rows_of(sample: Sample, number: int, weight: float) -> list[_Row]:
    """Return the rows of a sample: a ratio to the baseline gives a row of the baseline, too, and a level of its own."""
    try:
        method = parse_method(sample.method)
    except MethodError:
        return []
    context = canonicalise(sample.context)
    level = (sample.route if sample.log_ratio is None else f"sample {number}", sample.hour)

    def row(of: Method, log_cost: float, *, is_first: bool) -> _Row:
        return _Row(context, of.name, log_cost - predicted_cost(context, of), weight, level, is_first)

    rows = [row(method, sample.log_cost, is_first=True)]
    if sample.log_ratio is None:
        return rows
    if method == method.baseline:
        return []  # compared with itself
    return [*rows, row(method.baseline, sample.log_cost - sample.log_ratio, is_first=False)]


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


def _residuals(rows: Sequence[_Row], pairs: Pairs) -> FloatArray:
    """Return each row's residual over the heuristic and the level of its route and hour, clipped."""
    levels = {level: i for i, level in enumerate(sorted({row.level for row in rows}))}
    level = np.array([levels[row.level] for row in rows], dtype=np.intp)
    no_features = Contexts(tuple(map(str, levels.values())), {}, (), np.zeros((len(levels), 0)))
    residual = np.array([row.residual for row in rows])
    weight = np.array([row.weight for row in rows])
    effects = fit_effects(Pairs(no_features, pairs.methods, level, pairs.method), residual, weight)
    return np.clip(residual - effects.of_context[level], -MAX_RESIDUAL, MAX_RESIDUAL)
