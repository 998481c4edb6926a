"""Runs the meta-model and every baseline over the folds of a dataset, and measures them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from threadpoolctl import threadpool_limits

from selector.baselines import BASELINES, TextEmbedding, VirtualBest
from selector.dataset import Dataset, FloatArray
from selector.estimator import NotApplicableError, Selector
from selector.evaluation import Fold, Group, Measures, outcomes, predict_folds, split
from selector.metamodel import MetaModel
from selector.text import Encoder

METAMODEL: Final = "metaswarm"
"""The meta-model's name in tables."""

MAX_ROWS: Final = 200_000
"""A dataset with more rows is sampled, unless its reader asks for another sample: whole contexts are drawn by lot."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One selector's measures. `seconds`: its training and predicting over all folds."""

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
    # OpenMP's threads spin while they wait for one another: two are far slower than one where others compute, too.
    with threadpool_limits(1):
        return _compare(dataset, group, folds, probes, default, seed, encode, threads, progress)


def _compare(
    dataset: Dataset,
    group: Group,
    folds: Sequence[Fold],
    probes: int,
    default: str | None,
    seed: int,
    encode: Encoder | None,
    threads: int,
    progress: Progress,
) -> Comparison:
    makers: dict[str, Callable[[], Selector]] = {
        METAMODEL: lambda: MetaModel(None if group == "random" else group, random_state=seed, n_jobs=threads),
        **BASELINES,
        "text_embedding": lambda: TextEmbedding(encode),
    }
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for name, make in makers.items():
        began_s = time.perf_counter()
        try:
            scores = _scores(dataset, folds, make, lambda done, name=name: progress(name, done, len(folds)))  # type: ignore[misc]
        except NotApplicableError as error:
            left_out[name] = str(error)
            progress(name, len(folds), len(folds))
            continue
        seconds = time.perf_counter() - began_s
        found = outcomes(dataset, folds, scores, probes=probes, default=default)
        rows.append(Row(name, found.measures(), found.measures(more_than=probes), seconds))
    return Comparison(dataset, group, probes, len(folds), tuple(rows), left_out)


def _scores(
    dataset: Dataset, folds: Sequence[Fold], make: Callable[[], Selector], progress: Callable[[int], None]
) -> list[FloatArray]:
    oracle = VirtualBest().fit_dataset(dataset) if isinstance(make(), VirtualBest) else None
    scores = []
    progress(0)
    for fold_scores in predict_folds(
        dataset, folds, lambda training, test: (oracle or make().fit_dataset(training)).predict(test)
    ):
        scores.append(fold_scores)
        progress(len(scores))
    return scores
