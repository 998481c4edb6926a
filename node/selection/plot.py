"""Draws a comparison of selectors. Needs matplotlib, which is not installed unless asked for: `metaswarm[plot]`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from node.selection.comparison import METAMODEL, Comparison

SUFFIXES: Final = (".png", ".svg", ".pdf")


class PlotError(Exception):
    """A plot cannot be drawn. The message is one line for the user."""


def check_plot(path: Path) -> None:
    """Raise PlotError where a plot could not be drawn into this file: better before minutes of work than after."""
    if path.suffix.lower() not in SUFFIXES:
        raise PlotError(f"cannot draw {path}: its name must end in {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise PlotError(f"cannot draw {path}: there is no folder {path.absolute().parent}")
    if find_spec("matplotlib") is None:
        raise PlotError("drawing needs matplotlib: pip install 'metaswarm[plot]'")


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draw accuracy, ratio to the virtual best and closed gap of every selector, side by side."""
    from matplotlib.figure import Figure

    rows = comparison.rows[::-1]
    names = [row.selector.replace("_", " ") for row in rows]
    colours = ["tab:orange" if row.selector == METAMODEL else "tab:blue" for row in rows]
    panels = {
        "accuracy": [row.measures.accuracy for row in rows],
        "ratio to the virtual best": [row.measures.ratio_to_virtual_best for row in rows],
        "closed gap": [row.measures.closed_gap for row in rows],
    }
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        shown = [0.0 if value is None else value for value in values]
        bars = axis.barh(names, [max(value, -0.5) for value in shown], color=colours)
        axis.bar_label(
            bars, labels=["-" if value is None else f"{value:.2f}" for value in values], padding=3, fontsize=8
        )
        axis.set_title(title, fontsize=10)
        axis.set_xlim(-0.5 if min(shown) < 0 else 0, 1.15)
        axis.spines[["top", "right"]].set_visible(False)
    probes = f", {comparison.probes} probes" if comparison.probes else ""
    figure.suptitle(f"{comparison.dataset.name}, folds by {comparison.group}{probes}", fontsize=11)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise PlotError(f"cannot write {path}: {error}") from None
