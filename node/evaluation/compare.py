"""Cross-validates the meta-model and every baseline on a dataset."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from node.evaluation.parallel_fit import FitResult, FitTask, FittingError, fit_all
from selector.dataset import GROUPS, Dataset, context_minima
from selector.estimator import Selector
from selector.evaluation.baselines import BASELINES, TextEmbedding, VirtualBest, contexts_without_roofline
from selector.evaluation.certainty import Certainty, certainty_of
from selector.evaluation.measures import Measures, outcomes, split
from selector.evaluation.text_embedding import Encoder, KnownTexts, texts_of
from selector.metamodel import MetaModel

METAMODEL: Final = "metaswarm"
"""The meta-model's name in tables."""

MAX_ROWS: Final = 20_000
"""Rows above which a dataset is sampled by default."""

MIN_ROWS_OF_PROCESSES: Final = 2_000
"""Rows below which worker processes do not pay off."""

MAX_SPREAD: Final = 50.0
"""Difference of the logarithms of two methods' costs in one context over which they are doubtful."""

TEXT_BATCH: Final = 64

RANDOM: Final = "random"
"""The group of random folds."""

RULE: Final = "rule"
"""The baseline that needs figures of a context."""

ORACLE: Final = "virtual_best"
"""The one selector that is fitted on the test rows."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One selector's measures. `seconds`: training and prediction, summed over all folds.

    `certainty`: how true its statements about its own errors are; None for a selector that makes none.
    """

    selector: str
    measures: Measures
    more_than_n: Measures
    seconds: float
    certainty: Certainty | None

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return {
            "selector": self.selector,
            **asdict(self.measures),
            "seconds": self.seconds,
            "more_than_n": asdict(self.more_than_n),
            "certainty": asdict(self.certainty) if self.certainty else None,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Results of all selectors on a dataset. `left_out`: selectors that do not apply to it, and why."""

    dataset: Dataset
    group: str
    probes: int
    folds: int
    rows: tuple[Row, ...]
    left_out: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison for JSON."""
        return {
            "dataset": self.dataset.name,
            "group": self.group,
            "probes": self.probes,
            "contexts": self.rows[0].measures.contexts if self.rows else 0,
            "observations": len(self.dataset),
            "methods": len(self.dataset.measured_methods()),
            "folds": self.folds,
            "rows": [row.as_dict() for row in self.rows],
            "left_out": dict(self.left_out),
            "notes": list(self.dataset.notes),
        }


def compare(
    dataset: Dataset,
    group: str,
    *,
    probes: int = 0,
    default: str | None = None,
    seed: int = 0,
    encode: Encoder | None = None,
    process_count: int = 1,
    progress: Progress = lambda stage, done, total: None,
) -> Comparison:
    """Evaluate every selector. `encode`: text encoder of the text-embedding baseline, hashed n-grams if None.

    `group`: `random`, or a column of the contexts. Raises DatasetError for fewer than two groups, and FittingError.
    """
    dataset = dataset.compact()
    group = group.lower() if group.lower() in {RANDOM, *GROUPS} else group
    folds = tuple(split(dataset, group, seed))
    makers: dict[str, Callable[[], Selector]] = {
        METAMODEL: lambda: MetaModel(None if group == RANDOM else group, random_state=seed),
        **BASELINES,
        "text_embedding": lambda: TextEmbedding(encode and _encode_texts(dataset, encode, progress)),
    }
    results: dict[str, dict[int, FitResult]] = {name: {} for name in makers}
    del makers[ORACLE]
    oracle = VirtualBest().fit_dataset(dataset)
    for i, fold in enumerate(folds):
        results[ORACLE][i] = FitResult(ORACLE, i, oracle.predict(dataset.pairs.take(fold.test)), 0.0)
    if len(dataset) < MIN_ROWS_OF_PROCESSES:
        process_count = 1
    with closing(fit_all(dataset, folds, _tasks(makers, len(folds), progress), process_count)) as found:
        for result in found:
            results[result.name][result.fold] = result
            progress(result.name, len(results[result.name]), len(folds))
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for name, by_fold in results.items():
        of_folds = [by_fold[i] for i in range(len(folds))]
        scores = [each.scores for each in of_folds if each.scores is not None]
        if len(scores) < len(folds):
            left_out[name] = next(each.inapplicable for each in of_folds if each.scores is None)
            if name == METAMODEL:
                raise FittingError(f"cannot fit {name}: {left_out[name]}")
            continue
        chosen = outcomes(dataset, folds, scores, probes=probes, default=default)
        seconds = sum(each.seconds for each in of_folds)
        deviations = [each.deviation for each in of_folds if each.deviation is not None]
        certainty = certainty_of(dataset, folds, scores, deviations) if deviations else None
        rows.append(Row(name, chosen.measures(), chosen.measures(more_than=max(1, probes)), seconds, certainty))
    return Comparison(_with_notes(dataset, left_out), group, probes, len(folds), tuple(rows), left_out)


def _with_notes(dataset: Dataset, left_out: Mapping[str, str]) -> Dataset:
    """Return the dataset with notes of the contexts that the measures leave out, that are doubtful, or lack figures."""
    notes = list(dataset.notes)
    if single := int(np.count_nonzero(np.bincount(dataset.pairs.context) == 1)):
        why = "in which a single method was measured: there is no choice"
        notes.append(f"left out of the measures {single} contexts {why}")
    context, count = dataset.pairs.context, len(dataset.pairs.contexts)
    spread = -context_minima(-dataset.cost, context, count) - context_minima(dataset.cost, context, count)
    if wide := int(np.count_nonzero(spread > MAX_SPREAD)):
        why = f"differ by more than {MAX_SPREAD:g}: is y the natural logarithm of the cost?"
        notes.append(f"in {wide} contexts values of y {why}")
    if RULE not in left_out and (unknown := len(contexts_without_roofline(dataset.pairs))):
        notes.append(f"{RULE} is the single best in {unknown} contexts, of which figures for the roofline are missing")
    return replace(dataset, notes=tuple(notes))


def _tasks(makers: Mapping[str, Callable[[], Selector]], folds: int, progress: Progress) -> Iterator[FitTask]:
    """Yield the fits, slowest (the meta-model's) first."""
    for name, make in makers.items():
        progress(name, 0, folds)
        selector = make()
        for fold in range(folds):
            yield FitTask(name, selector, fold)


def _encode_texts(dataset: Dataset, encode: Encoder, progress: Progress) -> KnownTexts:
    """Encode all texts of the text-embedding baseline, each once."""
    texts = sorted(texts_of(dataset.pairs), key=len)
    vectors = []
    for start in range(0, len(texts), TEXT_BATCH):
        progress("sentences", start, len(texts))
        vectors.append(encode(texts[start : start + TEXT_BATCH]))
    progress("sentences", len(texts), len(texts))
    return KnownTexts(texts, np.concatenate(vectors))
