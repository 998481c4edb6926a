"""Reads a dataset folder: `contexts.csv` and `observations.csv`, optionally gzipped (`.gz`).

`contexts`: the column `cid`; optionally the names `model`, `hardware` and `budget`; every other column is a feature.
`observations`: `cid`, `method`, and `y`, the natural logarithm of the cost. Invalid rows are left out.
"""

import csv
import gzip
import io
import math
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from selector.dataset import GROUPS, Contexts, Dataset, DatasetError, FloatArray, build_dataset
from selector.task_features import brief

MAX_VALUES: Final = 32
"""Values up to which a non-numeric feature is one-hot encoded."""

MAX_FIELD_BYTES: Final = 1 << 20

MISSING: Final = frozenset({"", "-", "?", "n/a", "na", "nan", "none", "null"})
"""Fields that say, in any case, that a number is not known."""

SHOWN_WORDS: Final = 3

MAX_LOG2: Final = 200.0
"""Largest magnitude of a logarithm to base 2 of anything measured."""

_WITH_UNIT: Final = re.compile(r"[+-]?\d+(?:\.\d*)?\s*([^\W\d_][^\s\d]*|%)")
"""A number with a unit: `7B`, `120 ms`, `50%`."""


def read_folder(folder: Path) -> Dataset:
    """Return the dataset in a folder. Raises DatasetError."""
    contexts, notes = _read_contexts(folder)
    index = {cid: i for i, cid in enumerate(contexts.ids)}
    rows: list[tuple[int, str, float]] = []
    unknown: list[str] = []
    unnamed = 0
    with _table(folder, "observations", ("cid", "method", "y")) as (_, records):
        for record in records:
            context = index.get(record["cid"].strip())
            method = sys.intern(record["method"].strip())
            if context is None:
                unknown.append(record["cid"])
            elif not method:
                unnamed += 1
            else:
                rows.append((context, method, _number(record["y"])))
    if unknown:
        shown = f"{len(unknown)} observations of contexts that are not in contexts.csv, such as {unknown[0]!r}"
        notes.append(f"left out {shown}")
    if unnamed:
        notes.append(f"left out {unnamed} observations without a method")
    try:
        return build_dataset(contexts, rows, name=folder.resolve().name, notes=notes)
    except DatasetError as error:
        raise DatasetError(f"{folder}: observations.csv: {error}") from None


def _read_contexts(folder: Path) -> tuple[Contexts, list[str]]:
    notes: list[str] = []
    by_id: dict[str, dict[str, str]] = {}
    repeated = 0
    with _table(folder, "contexts", ("cid",), GROUPS) as (columns, records):
        for record in records:
            cid = record["cid"].strip()
            repeated += cid in by_id
            by_id.setdefault(cid, record)
    if not by_id:
        raise DatasetError(f"{folder}: contexts.csv has no rows")
    if repeated:
        notes.append(f"contexts.csv has {repeated} rows with a repeated cid; the first one counts")
    texts = {column: [record[column].strip() for record in by_id.values()] for column in columns if column}
    if len(texts) < len(columns):
        notes.append(f"left out {len(columns) - len(texts)} columns of contexts.csv without a name")
    names = {name: np.array(texts[name], dtype=np.str_) for name in GROUPS if name in texts}
    features: dict[str, FloatArray] = {}
    for column in [name for name in texts if name not in {"cid", *GROUPS}]:
        found, note = _feature(column, texts[column])
        features |= found
        if column.startswith("l_") and column in found and np.nanmax(np.abs(found[column]), initial=0.0) > MAX_LOG2:
            notes.append(
                f"the column {column!r} has values over {MAX_LOG2:g}, which no log2 has: are they plain numbers?"
            )
        if column not in found:
            names[column] = np.array([brief(text) for text in texts[column]], dtype=np.str_)
        notes += [note] if note else []
    table = np.column_stack(list(features.values())) if features else np.zeros((len(by_id), 0))
    return Contexts(tuple(by_id), names, tuple(features), table), notes


def _feature(name: str, texts: Sequence[str]) -> tuple[dict[str, FloatArray], str]:
    """Return a column as numbers, or as an indicator for each word where most are no numbers; and a note, or nothing.

    A few words among numbers are missing values: as indicators they would take the column, and all that follows from
    it, from every context. Numbers that all have the same unit are numbers.
    """
    numbers = np.array([_number(text) for text in texts])
    words = [text for text in texts if text.lower() not in MISSING and math.isnan(_number(text))]
    known = np.count_nonzero(~np.isnan(numbers))
    if not words and (known or not any(texts)):
        return {name: numbers}, ""
    if known > len(words):
        shown = ", ".join(map(repr, sorted(set(words))[:SHOWN_WORDS]))
        return {name: numbers}, f"took {len(words)} fields of the numeric column {name!r} for missing values: {shown}"
    units = {found[1] if (found := _WITH_UNIT.fullmatch(word)) else "" for word in words}
    if not known and len(units) == 1 and (unit := units.pop()):
        numbers = np.array([_number(text.removesuffix(unit)) for text in texts])
        return {name: numbers}, f"took the column {name!r} for numbers of the unit {unit!r}"
    values = sorted(set(texts))
    numeral = next((f", such as {word!r}" for word in words if word[0] in "+-.0123456789"), "")
    if len(values) > MAX_VALUES:
        return {}, f"left out the column {name!r}: not numeric, and more than {MAX_VALUES} values{numeral}"
    indicators = {f"{name}={value}": np.array([float(text == value) for text in texts]) for value in values}
    return indicators, f"took the column {name!r} for {len(values)} words{numeral}" if numeral else ""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@contextmanager
def _table(
    folder: Path, stem: str, needed: Sequence[str], known: Sequence[str] = ()
) -> Iterator[tuple[Sequence[str], Iterator[dict[str, str]]]]:
    """Yield the column names and the records of a CSV file; missing fields are empty.

    The names of the columns that are `needed` or `known` may be written in any case.
    """
    candidates = [folder / f"{stem}.csv.gz", folder / f"{stem}.csv"]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise DatasetError(f"{folder} is not a dataset folder: it has no {stem}.csv or {stem}.csv.gz")
    csv.field_size_limit(MAX_FIELD_BYTES)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as opened:
            text = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
            columns = [name.strip() for name in next(csv.reader(text), [])]
            columns = [name.lower() if name.lower() in {*needed, *known} else name for name in columns]
            if missing := [name for name in needed if name not in columns]:
                raise DatasetError(f"{path} lacks the column {', '.join(map(repr, missing))}")
            if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
                raise DatasetError(f"{path} has the column {', '.join(map(repr, twice))} more than once")
            yield columns, csv.DictReader(text, columns, restval="")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"cannot read {path}: {error}") from None
