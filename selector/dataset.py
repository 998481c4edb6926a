"""Datasets for training: a table of contexts, the methods, and one measured cost per pair of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
StringArray = npt.NDArray[np.str_]

GROUPS = ("model", "hardware", "budget")
"""Name columns of a context that are never features: of leave-one-group-out. `budget` holds the objective."""


MAX_LOG_COST = 1e4
"""Largest magnitude of a natural logarithm of a cost: it has thousands of digits."""

IS_IT_A_LOGARITHM = "no logarithm of a cost is: is it the natural logarithm?"


@dataclass(frozen=True, slots=True, eq=False)
class Contexts:
    """A table of task contexts.

    `names`: for each column of GROUPS present, and others of words, one string per context. `columns`: names of the
    features. `features`: float64, shape (contexts, columns); NaN where unknown.
    """

    ids: tuple[str, ...]
    names: Mapping[str, StringArray]
    columns: tuple[str, ...]
    features: FloatArray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: IntArray) -> "Contexts":
        """Return some of the contexts, in the order of `indices`."""
        ids = tuple(self.ids[i] for i in indices)
        return Contexts(
            ids, {name: of[indices] for name, of in self.names.items()}, self.columns, self.features[indices]
        )

    def siblings(self) -> IntArray:
        """Return a number for each context, equal for those that differ only in their budget.

        Where nothing but their ids is known, each is one of its own.
        """
        names = [values for name, values in self.names.items() if name != "budget"]
        if not names and not self.columns:
            return np.arange(len(self))
        keys = [(*(of[i] for of in names), self.features[i].tobytes()) for i in range(len(self))]
        numbers: dict[tuple[object, ...], int] = {}
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.intp)

    def groups(self) -> tuple[str, ...]:
        """Return the columns by whose values contexts can be left out."""
        return (*self.names, *(name for name in self.columns if name.partition("=")[0] not in self.names))

    def labels(self, group: str) -> IntArray | None:
        """Return a number for each context, equal for those with the same value of a column; None if there is none."""
        values = self.names[group] if group in self.names else self.column(group)
        return None if values is None else np.unique(values, return_inverse=True)[1].astype(np.intp)

    def column(self, name: str) -> FloatArray | None:
        """Return one feature of every context, or None if there is no such column."""
        return self.features[:, self.columns.index(name)] if name in self.columns else None


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Pairs of a context and a method: the X of every selector.

    `context` and `method`: indices into `contexts` and `methods` for each pair.
    """

    contexts: Contexts
    methods: tuple[str, ...]
    context: IntArray
    method: IntArray

    def __len__(self) -> int:
        return len(self.context)

    def take(self, rows: npt.NDArray[np.bool_] | IntArray) -> "Pairs":
        """Return some of the pairs over the same contexts and methods."""
        return replace(self, context=self.context[rows], method=self.method[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Measured pairs with the natural logarithm of their cost, and their weight.

    `notes`: one line for each remark about the source, such as rows left out.
    """

    pairs: Pairs
    cost: FloatArray
    weight: FloatArray
    name: str = ""
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.cost)

    def take(self, rows: npt.NDArray[np.bool_] | IntArray) -> "Dataset":
        """Return some of the rows over the same contexts and methods."""
        return replace(self, pairs=self.pairs.take(rows), cost=self.cost[rows], weight=self.weight[rows])

    def of_contexts(self, contexts: IntArray) -> "Dataset":
        """Return the rows of some contexts over the same tables."""
        wanted = np.zeros(len(self.pairs.contexts), dtype=bool)
        wanted[contexts] = True
        return self.take(wanted[self.pairs.context])

    def measured_methods(self) -> list[str]:
        """Return the names of the methods that the rows are of."""
        return [self.pairs.methods[i] for i in np.unique(self.pairs.method)]

    def compact(self) -> "Dataset":
        """Return the same rows over a table without unmeasured contexts."""
        used, position = np.unique(self.pairs.context, return_inverse=True)
        return replace(self, pairs=replace(self.pairs, contexts=self.pairs.contexts.take(used), context=position))

    def sample(self, count: int, seed: int = 0) -> "Dataset":
        """Return the rows of at most `count` contexts, sampled without replacement."""
        present = np.unique(self.pairs.context)
        if len(present) <= count:
            return self
        drawn = np.random.default_rng(seed).choice(present, size=count, replace=False)
        return self.of_contexts(np.sort(drawn))


class DatasetError(ValueError):
    """Unusable dataset. The message is one line for the user, with the notes on what was left out: they may say why."""

    def __init__(self, message: str, notes: Sequence[str] = ()) -> None:
        super().__init__("; ".join((message, *notes)))


def build_dataset(
    contexts: Contexts, rows: Sequence[tuple[int, str, float]], *, name: str = "", notes: Sequence[str] = ()
) -> Dataset:
    """Return the dataset of rows (index of a context, method, natural logarithm of the cost).

    Rows without a finite cost, or with one that no logarithm has, are left out; repeated measurements of a pair are
    averaged. Raises DatasetError if nothing is left.
    """
    cost = np.fromiter((row[2] for row in rows), dtype=np.float64, count=len(rows))
    notes = list(notes)
    finite = np.isfinite(cost)
    if not finite.all():
        notes.append(f"left out {np.count_nonzero(~finite)} rows whose cost is not finite")
    possible = np.abs(cost) <= MAX_LOG_COST
    rows, cost = [row for row, is_left in zip(rows, possible, strict=True) if is_left], cost[possible]
    if beyond := np.count_nonzero(finite & ~possible):
        notes.append(f"left out {beyond} rows whose cost is beyond ±{MAX_LOG_COST:g}, which {IS_IT_A_LOGARITHM}")
    if not rows:
        raise DatasetError("no measurement is left", notes)
    methods = tuple(sorted({method for _, method, _ in rows}))
    index = {method: i for i, method in enumerate(methods)}
    context = np.array([row[0] for row in rows], dtype=np.intp)
    method = np.array([index[row[1]] for row in rows], dtype=np.intp)
    keys, inverse, counts = np.unique(context * len(methods) + method, return_inverse=True, return_counts=True)
    if len(keys) < len(cost):
        notes.append(f"averaged {len(cost) - len(keys)} repeated measurements of the same method in the same context")
    cost = np.bincount(inverse, weights=cost) / counts
    pairs = Pairs(contexts, methods, keys // len(methods), keys % len(methods))
    return Dataset(pairs, cost, counts.astype(np.float64), name, tuple(notes))


def context_means(values: FloatArray, context: IntArray, count: int, weight: FloatArray | None = None) -> FloatArray:
    """Return the (weighted) mean of each context, shape (count,); 0 for a context without values."""
    weight = np.ones_like(values) if weight is None else weight
    sums = np.bincount(context, weights=weight * values, minlength=count)
    return sums / np.maximum(np.bincount(context, weights=weight, minlength=count), 1e-300)


def context_minima(values: FloatArray, context: IntArray, count: int) -> FloatArray:
    """Return the minimum of each context, shape (count,); infinity for a context without values."""
    least = np.full(count, np.inf)
    np.minimum.at(least, context, values)
    return least
