"""Reads an exported history as a dataset, with the features that the daemon learns from."""

from pathlib import Path

from node.selection.samples import sample_of
from node.storage.dataset import DatasetError as LineError
from node.storage.dataset import from_line
from selector.dataset import Dataset, DatasetError, build_dataset
from selector.task import TaskContext, baseline_of
from selector.task_buckets import canonicalise
from selector.task_features import tabulate


def read_history(path: Path) -> Dataset:
    """Return the dataset in a file of JSON lines from `metaswarm history export`. Raises DatasetError.

    One context is a task on a route; the cost of a method there is its ratio to the baseline. Served jobs, which have
    none, are left out, and so are replayed jobs and routes without all blocks.
    """
    contexts: dict[tuple[TaskContext, str], int] = {}
    rows: list[tuple[int, str, float]] = []
    invalid = partial = unpaired = 0
    try:
        with path.open("rb") as lines:
            for line in filter(bytes.strip, lines):
                try:
                    sample = sample_of(from_line(line, None).observation)
                except LineError:
                    invalid += 1
                    continue
                if sample is None:
                    partial += 1
                    continue
                if sample.log_ratio is None:
                    unpaired += 1
                    continue
                baseline = baseline_of(sample.method).name
                if sample.method != baseline:
                    key = canonicalise(sample.context), sample.route
                    context = contexts.setdefault(key, len(contexts))
                    rows += [(context, sample.method, sample.log_ratio), (context, baseline, 0.0)]
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from None
    notes = []
    if invalid:
        notes.append(f"left out {invalid} lines that are not observations with a valid signature")
    if partial:
        notes.append(f"left out {partial} observations of replayed jobs, or of routes without all blocks")
    if unpaired:
        notes.append(f"left out {unpaired} served jobs, which have no ratio to the baseline")
    if not rows and invalid and not partial and not unpaired:
        raise DatasetError(
            f"{path} has no observation: DATASET is a file of JSON lines from `metaswarm history export`, "
            "or a folder with contexts.csv and observations.csv"
        )
    if not rows:
        message = f"{path} has no trials or benchmarks: see `metaswarm history export` and `metaswarm bench`"
        raise DatasetError(message, notes)
    return build_dataset(tabulate([context for context, _ in contexts]), rows, name=path.stem, notes=notes)
