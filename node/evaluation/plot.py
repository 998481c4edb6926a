"""Plots comparisons of selectors and of methods, with matplotlib from the extra `metaswarm[plot]`."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from node.evaluation.compare import METAMODEL, Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES: Final = (".png", ".svg", ".pdf")


class PlotError(Exception):
    """Failed plot. The message is one line for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Bars with error intervals."""

    title: str
    names: Sequence[str]
    values: Sequence[float]
    intervals: Sequence[tuple[float, float]]


def check_plot(path: Path) -> None:
    """Raise PlotError unless a plot can be written to this file; called before minutes of work."""
    if path.suffix.lower() not in SUFFIXES:
        raise PlotError(f"cannot plot to {path}: its name must end in {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise PlotError(f"cannot plot to {path}: there is no folder {path.absolute().parent}")
    if find_spec("matplotlib") is None:
        raise PlotError("plots need matplotlib: pip install 'metaswarm[plot]'")


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Plot accuracy, ratio to the virtual best and closed gap of every selector."""
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
    _save(figure, path)


def draw_panels(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Plot panels one below the other."""
    from matplotlib.figure import Figure

    heights = [1 + 0.25 * len(panel.names) for panel in panels]
    figure = Figure(figsize=(11, 0.5 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        most = 1.5 * max(panel.values)
        off = [
            [value - low for value, (low, _) in zip(panel.values, panel.intervals, strict=True)],
            [min(high, most) - value for value, (_, high) in zip(panel.values, panel.intervals, strict=True)],
        ]
        axis.barh(panel.names, panel.values, xerr=off, color="tab:blue", ecolor="tab:gray")
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(panel.title, fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise PlotError(f"cannot write {path}: {error}") from None
