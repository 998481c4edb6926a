"""Small synthetic datasets whose best methods are known."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from selector.dataset import Contexts, Dataset, FloatArray, build_dataset
from selector.estimator import Selector
from selector.evaluation.measures import Fold

METHODS = tuple(f"{engine}|{bits}|tp{devices}" for engine in "ab" for bits in ("bf16", "fp8") for devices in (1, 2))


def made_up(contexts: int = 60, per_context: int = 5, seed: int = 1, noise: float = 0.02) -> Dataset:
    """Engine `a` is slower by half; fp8 wins for large batches and loses for small ones; two devices win a little."""
    generator = np.random.default_rng(seed)
    features = generator.uniform(4, 12, size=(contexts, 4))
    table = Contexts(
        tuple(f"c{i}" for i in range(contexts)),
        {
            "model": np.array([f"m{i % 4}" for i in range(contexts)]),
            "hardware": np.array([f"h{i % 3}" for i in range(contexts)]),
            "budget": np.array([str(i % 2) for i in range(contexts)]),
        },
        ("l_isl", "l_osl", "l_bs", "l_params"),
        features,
    )
    rows = []
    for i in range(contexts):
        for method in generator.choice(METHODS, size=per_context, replace=False).tolist():
            cost = features[i, 0] + 0.1 * features[i, 1]
            cost += 0.5 * method.startswith("a") - 0.2 * ("tp2" in method) + (8 - features[i, 2]) * ("fp8" in method)
            rows.append((i, method, float(cost + generator.normal(scale=noise))))
    return build_dataset(table, rows, name="made up")


def method_names(dataset: Dataset) -> list[str]:
    """Return the method of every row."""
    return [dataset.pairs.methods[i] for i in dataset.pairs.method]


def out_of_fold_scores(dataset: Dataset, folds: Sequence[Fold], make: Callable[[], Selector]) -> list[FloatArray]:
    """Return the scores of every fold's test rows by a selector fitted on its training rows."""
    return [make().fit_dataset(dataset.take(fold.train)).predict(dataset.pairs.take(fold.test)) for fold in folds]


def write_folder(folder: Path, dataset: Dataset) -> None:
    """Write a dataset as the two files that `metaswarm evaluate` reads."""
    pairs = dataset.pairs
    write(folder / "contexts.csv", ["cid", *pairs.contexts.names, *pairs.contexts.columns], [
        [cid, *(names[i] for names in pairs.contexts.names.values()), *pairs.contexts.features[i]]
        for i, cid in enumerate(pairs.contexts.ids)
    ])  # fmt: skip
    rows = zip(pairs.context, method_names(dataset), dataset.cost, strict=True)
    write(folder / "observations.csv", ["cid", "method", "y"], [[f"c{i}", name, cost] for i, name, cost in rows])


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write one CSV file."""
    with path.open("w", newline="") as opened:
        csv.writer(opened).writerows([header, *rows])
