"""The history as measurements to learn from: what was measured where, by whom, and how much each is worth to one peer.

Absolute times do not travel between machines. What is learned is therefore how far a measurement is from what the
hand-written rule expects, less what all measurements on the same route within the same hour have in common. So a busy
evening, or a machine twice as slow, is nobody's merit or fault.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from selector.dataset import Contexts, Dataset, FloatArray, Pairs
from selector.effects import fit_effects
from selector.heuristic import predicted_cost
from selector.task import BASELINE, Method, MethodError, TaskContext, parse_method
from selector.task_buckets import Viewpoint, kind_of, representative

MAX_EXPERIENCES: Final = 20_000
"""The newest so many are learned from."""

MAX_SURPRISE: Final = 2.5
"""Natural logarithm. What is further from the rule and its route's level than a factor of twelve counts as that."""

HALF_LIFE_HOURS: Final = 7 * 24
MAX_NAME: Final = 128
"""Characters of a name in a table, in which every name takes as much room as the longest: of a longer one the hash."""

MAX_HARDWARE: Final = 8
"""Classes of hardware that are told apart, the most frequent ones."""

FEW: Final = 10.0
"""Measurements that anybody else is believed, by somebody who has none."""

_SERVED_WORTH: Final = 0.5
"""Of a served job beside a measurement against the baseline, which all that changes from hour to hour has left."""

_OTHERS_WORTH: Final = 0.5
_UNVOUCHED_WORTH: Final = 0.2
_OTHER_HARDWARE_WORTH: Final = 0.3
_OTHER_SOFTWARE_WORTH: Final = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """One measurement of a method in a context.

    `log_cost`: natural logarithm of what it cost, seconds. `log_ratio`: of that divided by the baseline's cost,
    measured alternately on the same route; None for a served job. `route`: what names its stages. `hour`: of its issue,
    counted from anywhere. `software`: what names the versions in use. `vouched`: whether every stage vouches for its
    figures.
    """

    context: TaskContext
    method: str
    log_cost: float
    log_ratio: float | None
    observer: str
    route: str
    hour: int
    software: str
    vouched: bool


@dataclass(frozen=True, slots=True)
class ContextColumns:
    """Which features contexts are described by; `hardware`: the classes that have an indicator."""

    hardware: tuple[str, ...]

    @classmethod
    def of(cls, contexts: Sequence[TaskContext]) -> "ContextColumns":
        """Return the columns that tell these contexts apart."""
        counts = Counter(context.hardware for context in contexts)
        return cls(tuple(sorted(name for name, _ in counts.most_common(MAX_HARDWARE))))

    def table(self, contexts: Sequence[TaskContext]) -> Contexts:
        """Return the contexts as a table."""
        names = {
            "model": np.array([_brief(context.architecture) for context in contexts], dtype=np.str_),
            "hardware": np.array([_brief(context.hardware) for context in contexts], dtype=np.str_),
            "task": np.array([_brief(kind_of(context)) for context in contexts], dtype=np.str_),
            "budget": np.array([context.objective for context in contexts], dtype=np.str_),
        }
        rows = [_features(context) for context in contexts]
        columns = (*rows[0], *(f"hardware={name}" for name in self.hardware))
        same = [[float(context.hardware == name) for name in self.hardware] for context in contexts]
        table = np.hstack([np.array([list(row.values()) for row in rows]), np.array(same).reshape(len(rows), -1)])
        return Contexts(tuple(str(i) for i in range(len(rows))), names, columns, table)


def _brief(name: str) -> str:
    """Return what stands for a name: a route of many stages may have one that is kilobytes long."""
    return name if len(name) <= MAX_NAME else hashlib.sha256(name.encode()).hexdigest()


def _features(context: TaskContext) -> dict[str, float]:
    def log2(value: float | None) -> float:
        return math.log2(value) if value else math.nan

    new_rows = context.prompt_tokens * (1 - context.shared_prefix_share)
    return {
        "l_weight_bytes": log2(context.weight_bytes),
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


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """What there is to learn: a dataset whose cost is the surprise over the rule, and how the contexts are described.

    `support`: of each method, the weight of all that was measured of it; `weight`: of everything, in measurements of
    one's own.
    """

    dataset: Dataset
    columns: ContextColumns
    support: Mapping[str, float]
    weight: float


def lesson_of(experiences: Sequence[Experience], viewpoint: Viewpoint) -> Lesson | None:
    """Return what experiences teach a peer; None where there is nothing to compare.

    Measurements of methods that this version does not know are left out.
    """
    newest = sorted(experiences, key=lambda each: each.hour)[-MAX_EXPERIENCES:]
    weights = _weights(newest, viewpoint)
    rows: list[_Row] = []
    for number, (each, weight) in enumerate(zip(newest, weights, strict=True)):
        rows += _rows_of(each, number, weight) if weight else []
    if len({row.method for row in rows}) < 2:
        return None
    methods = sorted({row.method for row in rows})
    described = [row.context for row in rows if row.opens]
    columns = ContextColumns.of(described)
    pairs = Pairs(
        columns.table(described),
        tuple(methods),
        np.cumsum([row.opens for row in rows]) - 1,
        np.array([methods.index(row.method) for row in rows], dtype=np.intp),
    )
    worth = np.array([row.weight for row in rows])
    support = np.bincount(pairs.method, weights=worth, minlength=len(methods))
    dataset = Dataset(pairs, _less_common_level(rows), worth, name="history")
    return Lesson(dataset, columns, dict(zip(methods, support.tolist(), strict=True)), sum(weights))


@dataclass(frozen=True, slots=True)
class _Row:
    context: TaskContext
    method: str
    surprise: float
    weight: float
    level: tuple[str, int]
    """What is measured on one route within one hour has a level in common."""
    opens: bool
    """Whether it is the first row of its experience: what is of one experience is compared with one another."""


def _rows_of(each: Experience, number: int, weight: float) -> list[_Row]:
    """Return an experience as rows: one against the baseline tells of the baseline, too, and has a level of its own."""
    try:
        method = parse_method(each.method)
    except MethodError:
        return []
    context = representative(each.context)
    level = (each.route, each.hour) if each.log_ratio is None else (f"experience {number}", each.hour)

    def row(of: Method, log_cost: float, *, opens: bool) -> _Row:
        return _Row(context, of.name, log_cost - predicted_cost(context, of), weight, level, opens)

    rows = [row(method, each.log_cost, opens=True)]
    if each.log_ratio is None:
        return rows
    if method.name == BASELINE.name:
        return []  # compared with itself
    return [*rows, row(BASELINE, each.log_cost - each.log_ratio, opens=False)]


def _weights(experiences: Sequence[Experience], viewpoint: Viewpoint) -> list[float]:
    """Return what each experience is worth.

    Nobody else's are worth more in all than half of one's own, or than a few where those are few.
    """
    weights: list[float] = []
    of_observer: defaultdict[str, float] = defaultdict(float)
    for each in experiences:
        weight = 0.5 ** (max(0, viewpoint.hour - each.hour) / HALF_LIFE_HOURS)
        weight *= _SERVED_WORTH if each.log_ratio is None else 1.0
        if each.observer != viewpoint.peer:
            weight *= _OTHERS_WORTH if each.vouched else _UNVOUCHED_WORTH
            weight *= viewpoint.trust.get(each.observer, viewpoint.trust_in_strangers)
        if viewpoint.hardware not in each.context.hardware.split("+"):
            weight *= _OTHER_HARDWARE_WORTH
        if each.software != viewpoint.software:
            weight *= _OTHER_SOFTWARE_WORTH
        weights.append(weight)
        of_observer[each.observer] += weight
    limit = max(FEW, of_observer[viewpoint.peer] / 2)
    return [
        weight if each.observer == viewpoint.peer else weight * limit / max(limit, of_observer[each.observer])
        for each, weight in zip(experiences, weights, strict=True)
    ]


def _less_common_level(rows: Sequence[_Row]) -> FloatArray:
    """Return every row's surprise, less what its route and hour have in common, within bounds."""
    levels = {level: i for i, level in enumerate(sorted({row.level for row in rows}))}
    methods = {method: i for i, method in enumerate(sorted({row.method for row in rows}))}
    nothing = Contexts(tuple(map(str, levels.values())), {}, (), np.zeros((len(levels), 0)))
    level = np.array([levels[row.level] for row in rows], dtype=np.intp)
    method = np.array([methods[row.method] for row in rows], dtype=np.intp)
    pairs = Pairs(nothing, tuple(methods), level, method)
    surprise = np.array([row.surprise for row in rows])
    effects = fit_effects(pairs, surprise, np.array([row.weight for row in rows]))
    return np.clip(surprise - effects.of_context[level], -MAX_SURPRISE, MAX_SURPRISE)
