"""`metaswarm evaluate DATASET`: cross-validation of the meta-model and all baselines."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from node.cli.output import CommandError, err, json_option, new_table, out, print_json, printable, progress_bars

if TYPE_CHECKING:
    from rich.table import Table

    from node.evaluation.compare import Comparison
    from selector.evaluation.certainty import Certainty

MAX_PROCESSES = 8
"""Each takes some 300 MiB."""

_COLUMNS = {
    "accuracy": "accuracy", "within 5 %": "accuracy_within_5_percent", "speed-up": "mean_speedup",
    "ratio to best": "ratio_to_virtual_best", "closed gap": "closed_gap", "F1": "f1",
}  # fmt: skip
"""Columns of the table and the measures in them."""


@click.command()
@click.argument("dataset_path", metavar="DATASET", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--group",
    default="random",
    show_default=True,
    metavar="random|COLUMN",
    help="Held-out groups: random contexts, or each value of a column (model, hardware, …) in turn.",
)
@click.option(
    "--probes",
    type=click.IntRange(0, 1000),
    default=0,
    show_default=True,
    metavar="N",
    help="Measure the N most promising methods and take the best; the baselines, too.",
)
@click.option("--default", metavar="METHOD", help="Reference method for speed-ups [default: the most widely measured].")
@click.option("--sample", type=click.IntRange(2), metavar="N", help="Use a random sample of N contexts.")
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Seed of folds and sample."
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Plot the table as PNG, SVG or PDF."
)
@json_option
def evaluate(
    dataset_path: Path,
    group: str,
    probes: int,
    default: str | None,
    sample: int | None,
    seed: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Evaluate the meta-model and the baselines by cross-validation on DATASET.

    DATASET is a folder with contexts.csv and observations.csv, gzipped or not (see docs/selection.md), or a file
    from `metaswarm history export`.
    """
    from node.engine.sentence_encoder import find_sentence_encoder
    from node.evaluation.compare import MAX_ROWS, compare
    from node.evaluation.csv_dataset import read_folder
    from node.evaluation.history_dataset import read_history
    from node.evaluation.parallel_fit import FittingError
    from node.evaluation.plot import PlotError, check_plot, draw_comparison
    from selector.dataset import DatasetError

    try:
        if plot:
            check_plot(plot)
        dataset = read_folder(dataset_path) if dataset_path.is_dir() else read_history(dataset_path)
        contexts = len(set(dataset.pairs.context.tolist()))
        if sample is None and len(dataset) > MAX_ROWS:
            sample = max(2, contexts * MAX_ROWS // len(dataset))
            err().print(
                f"{len(dataset)} observations are too many: using {sample} of {contexts} contexts; see --sample"
            )
        if sample is not None:
            dataset = dataset.sample(sample, seed)
        methods = dataset.measured_methods()
        if default is not None and default not in methods:
            where = f"{dataset_path}" if sample is None else f"the sampled contexts of {dataset_path}"
            raise CommandError(f"{default!r} was not measured in {where}; the methods are {', '.join(methods[:5])}, …")
        with progress_bars() as progress:
            comparison = compare(
                dataset,
                group,
                probes=probes,
                default=default,
                seed=seed,
                encode=find_sentence_encoder(),
                process_count=min(MAX_PROCESSES, os.cpu_count() or 1),
                progress=progress,
            )
        if plot:
            draw_comparison(comparison, plot)
    except (DatasetError, FittingError, PlotError) as error:
        raise CommandError(str(error)) from None
    if as_json:
        print_json(comparison.as_dict())
    else:
        _print_table(comparison)


def _print_table(comparison: "Comparison") -> None:
    dataset, document = comparison.dataset, comparison.as_dict()
    by = (
        "by random folds" if comparison.group == "random" else f"whole values of {printable(comparison.group)} left out"
    )
    probes = f", best of {comparison.probes} probes" if comparison.probes else ""
    title = (
        f"{printable(dataset.name)}: {document['contexts']} contexts, {document['methods']} methods, "
        f"{document['observations']} observations; {by}, {comparison.folds} folds{probes}"
    )
    out().print(_table(comparison, more_than_n=False, title=title))
    if comparison.probes:
        more = comparison.rows[0].more_than_n.contexts if comparison.rows else 0
        title = f"only the {more} contexts with more than {comparison.probes} methods"
        out().print(_table(comparison, more_than_n=True, title=title))
    for row in comparison.rows:
        if row.certainty is not None:
            out().print(f"{row.selector}: {_describe_certainty(row.certainty)}")
    for name, reason in comparison.left_out.items():
        err().print(f"without {name}: {reason}")
    for note in dataset.notes:
        err().print(f"note: {printable(note)}")


def _describe_certainty(found: "Certainty") -> str:
    """Return how far the meta-model knows its own errors, without probes, in words."""
    text = (
        f"90 % intervals cover {found.interval_coverage:.1%}; accuracy {found.accuracy_at_70_percent:.3f} "
        "in the 70 % of contexts with the highest confidence"
    )
    if found.stated_confidence is None:
        return f"{text}; no choice is confident enough to need no probes"
    return (
        f"{text}; {found.answered:.0%} of the choices are confident enough to need no probes, of which "
        f"{found.within_5_percent_of_answered:.1%} cost at most 5 % too much (stated {found.stated_confidence:.1%})"
    )


def _table(comparison: "Comparison", *, more_than_n: bool, title: str) -> "Table":
    table = new_table("selector", *(f">{name}" for name in _COLUMNS), ">seconds", title=title)
    for row in comparison.rows:
        measures = row.more_than_n if more_than_n else row.measures
        figures = [getattr(measures, attribute) for attribute in _COLUMNS.values()]
        cells = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
        style = "bold" if row.selector == "metaswarm" else None
        table.add_row(row.selector, *cells, f"{row.seconds:.1f}", style=style)
    return table
