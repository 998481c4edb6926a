"""Runs the meta-model and every baseline over the folds of a dataset, and measures them."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from threadpoolctl import threadpool_limits

from selector.baselines import BASELINES, TextEmbedding, VirtualBest
from selector.dataset import Dataset, FloatArray
from selector.estimator import NotApplicableError, Selector
from selector.evaluation import Fold, Group, Measures, checked, outcomes, split
from selector.metamodel import MetaModel
from selector.text import Encoder

METAMODEL: Final = "metaswarm"
"""The meta-model's name in tables."""

MAX_ROWS: Final = 20_000
"""A dataset with more rows is sampled, unless its reader asks for another sample: whole contexts are drawn by lot."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One selector's measures. `seconds`: its training and predicting, summed over all folds."""

    selector: str
    measures: Measures
    more_than_n: Measures
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON shows it."""
        measures = self.measures.as_dict()
        return {
            "selector": self.selector,
            **measures,
            "seconds": self.seconds,
            "more_than_n": self.more_than_n.as_dict(),
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the selectors did on a dataset. `left_out`: those that could say nothing about it, and why."""

    dataset: Dataset
    group: Group
    probes: int
    folds: int
    rows: tuple[Row, ...]
    left_out: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as one JSON document."""
        pairs = self.dataset.pairs
        return {
            "dataset": self.dataset.name,
            "group": self.group,
            "probes": self.probes,
            "contexts": self.rows[0].measures.contexts if self.rows else 0,
            "observations": len(self.dataset),
            "methods": len(set(pairs.method.tolist())),
            "folds": self.folds,
            "rows": [row.as_dict() for row in self.rows],
            "left_out": dict(self.left_out),
            "notes": list(self.dataset.notes),
        }


def compare(
    dataset: Dataset,
    group: Group,
    *,
    probes: int = 0,
    default: str | None = None,
    seed: int = 0,
    encode: Encoder | None = None,
    threads: int = 1,
    progress: Progress = lambda stage, done, total: None,
) -> Comparison:
    """Evaluate every selector. `encode`: the sentence encoder of the text-embedding baseline, hashed n-grams if None.

    Raises DatasetError where nothing can be left out.
    """
    folds = split(dataset, group, seed)
    # A fold a thread. OpenMP's own threads spin while they wait for one another; their number is set thread by thread.
    with threadpool_limits(1), ThreadPoolExecutor(threads, initializer=threadpool_limits, initargs=(1,)) as pool:
        return _compare(dataset, group, folds, probes, default, seed, encode, pool, progress)


def _compare(
    dataset: Dataset,
    group: Group,
    folds: Sequence[Fold],
    probes: int,
    default: str | None,
    seed: int,
    encode: Encoder | None,
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> Comparison:
    makers: dict[str, Callable[[], Selector]] = {
        METAMODEL: lambda: MetaModel(None if group == "random" else group, random_state=seed),
        **BASELINES,
        "text_embedding": lambda: TextEmbedding(encode),
    }
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for name, make in makers.items():
        try:
            scores, seconds = _scores(dataset, folds, name, make, pool, progress)
        except NotApplicableError as error:
            left_out[name] = str(error)
            progress(name, len(folds), len(folds))
            continue
        found = outcomes(dataset, folds, scores, probes=probes, default=default)
        rows.append(Row(name, found.measures(), found.measures(more_than=probes), seconds))
    return Comparison(dataset, group, probes, len(folds), tuple(rows), left_out)


def _scores(
    dataset: Dataset,
    folds: Sequence[Fold],
    name: str,
    make: Callable[[], Selector],
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> tuple[list[FloatArray], float]:
    """Return the scores of every fold's test rows, and the seconds that all folds took together."""
    oracle = VirtualBest().fit_dataset(dataset) if isinstance(make(), VirtualBest) else None

    def of_fold(fold: Fold) -> tuple[FloatArray, float]:
        began_s = time.perf_counter()
        selector = oracle or make().fit_dataset(dataset.take(fold.train))
        scores = selector.predict(dataset.pairs.take(fold.test))
        return checked(scores, fold), time.perf_counter() - began_s

    progress(name, 0, len(folds))
    pending = [pool.submit(of_fold, fold) for fold in folds]
    try:
        found = []
        for each in pending:
            found.append(each.result())
            progress(name, len(found), len(folds))
    finally:
        for each in pending:
            each.cancel()
    return [scores for scores, _ in found], sum(seconds for _, seconds in found)
