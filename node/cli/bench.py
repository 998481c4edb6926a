"""`metaswarm bench`: measures the portfolio over a grid of workloads, by real jobs of a running node."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from node.cli.explain import short_method
from node.cli.job_options import FiniteRange, quality_option, task_option
from node.cli.json_lines import ResultFile
from node.cli.output import (
    CommandError,
    api_option,
    err,
    json_option,
    model_option,
    new_table,
    out,
    plural,
    print_json,
    printable,
    progress_bars,
)

if TYPE_CHECKING:
    from rich.table import Table

    from node.evaluation.paired_stats import Speedup

F = TypeVar("F", bound=Callable[..., Any])
Workload = dict[str, Any]

AXES: Final[Mapping[str, float]] = {
    "concurrency": 1,
    "prompt_tokens": 64,
    "max_tokens": 32,
    "shared_prefix_share": 0.0,
    "repetitiveness": 0.0,
}
"""The axes of a workload and their defaults."""

WORKLOADS: Final[Sequence[Workload]] = tuple(
    dict(zip(AXES, values, strict=True))
    for values in (
        (1, 16, 32, 0, 0),
        (1, 64, 64, 0, 0.9),
        (1, 512, 1, 0, 0),
        (1, 1024, 16, 0, 0),
        (8, 32, 32, 0, 0),
        (8, 400, 8, 0.9, 0),
        (8, 256, 16, 0, 0),
        (32, 32, 16, 0, 0),
    )
)
"""The default grid: few and different workloads."""


@dataclass(frozen=True, slots=True)
class MethodResult:
    """Speed-up of a method under a workload; None if it failed with `error`."""

    method: str
    speedup: "Speedup | None"
    error: str | None
    figures: Mapping[str, Any]


def _axis(name: str, what: str, kind: "click.ParamType[Any]") -> Callable[[F], F]:
    return click.option(
        f"--{name.replace('_', '-')}", name, type=kind, multiple=True, metavar="N", help=f"{what} Repeatable."
    )


@click.command()
@model_option
@api_option
@task_option
@_axis("concurrency", "Concurrent jobs, 1 to 64.", click.IntRange(1, 64))
@_axis("prompt_tokens", "Tokens of a prompt.", click.IntRange(1))
@_axis("max_tokens", "Tokens of an answer.", click.IntRange(1))
@_axis("shared_prefix_share", "Fraction of the prompt shared by all, 0 to 1.", FiniteRange(0, 1))
@_axis("repetitiveness", "Fraction of the prompt that repeats a phrase, 0 to 1.", FiniteRange(0, 1))
@click.option(
    "--method", "methods", multiple=True, metavar="NAME", help="Method to measure; repeatable [default: all]."
)
@quality_option
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Runs of each method.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Append the measurements to FILE; a rerun resumes: cells already measured are skipped.",
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Plot as PNG, SVG or PDF."
)
@json_option
def bench(
    model: str | None,
    api: str | None,
    task: str,
    methods: tuple[str, ...],
    quality: str,
    rounds: int,
    output: Path | None,
    plot: Path | None,
    as_json: bool,
    **axes: tuple[float, ...],
) -> None:
    """Measure methods over a grid of workloads, and add the observations to the history.

    In each round every method and the baseline run the same workload once, in random order, by real jobs of the swarm;
    speed-ups are paired within a round. The grid is the product of the given axes, or a few different workloads.
    Speed-ups (of mean latency for single jobs, else of the total time) have 95 % confidence intervals. Where a workload
    could not be measured, the exit code is 1; --json has its error.
    """
    import trio

    from node.cli.client import find_api
    from node.evaluation.plot import PlotError, check_plot

    try:
        if plot:
            check_plot(plot)
        cells = [
            {"methods": list(methods) or None, "quality": quality, "rounds": rounds, "workload": workload}
            for workload in grid(axes, task)
        ]
        results = trio.run(_measure, find_api(api), model, cells, output)
        measured = [cell for cell in results if "result" in cell]
        if plot and measured:
            draw(measured, plot)
    except PlotError as error:
        raise CommandError(str(error)) from None
    if as_json:
        print_json({"cells": results})
    else:
        for cell in measured:
            out().print(table(cell))
        if lossy := {each.method for cell in measured for each in ranked(cell) if _is_beyond_bound(cell, each)}:
            count = f"{len(lossy)} others need" if len(lossy) > 1 else "1 other needs"
            out().print(f"{count} --quality near or any", highlight=False)
    if len(measured) < len(results):
        raise CommandError(f"{len(results) - len(measured)} of {len(results)} workloads could not be measured")


def grid(axes: Mapping[str, Sequence[float]], task: str = "generate") -> list[Workload]:
    """Return the product of the axes that have values, or the default grid; of its prompts, if the task has no text."""
    values = [axes.get(name) or (plain,) for name, plain in AXES.items()]
    cells = [dict(zip(AXES, point, strict=True)) for point in itertools.product(*values)]
    cells = cells if any(axes.values()) else [dict(workload) for workload in WORKLOADS]
    if task == "generate":
        return cells
    if axes.get("max_tokens"):
        raise click.UsageError(f"--max-tokens is of texts: --task {task} has none")
    prompts = dict.fromkeys((cell["concurrency"], cell["prompt_tokens"]) for cell in cells)
    return [{"task": task, "concurrency": jobs, "prompt_tokens": tokens} for jobs, tokens in prompts]


async def _measure(
    url: str, model: str | None, cells: Sequence[dict[str, Any]], output: Path | None
) -> list[dict[str, Any]]:
    """Return each cell with its result, written to the file at once, or else its error."""
    from node.cli.client import open_client
    from node.cli.target import choose_model, require_complete

    results: list[dict[str, Any]] = []
    async with open_client(url) as client:
        model = require_complete(await client.models(), await choose_model(client, model))
        file = None if output is None else ResultFile(output, ("cell", "result"), "metaswarm bench")
        kept = []
        if file is not None:
            kept = file.read()
            file.check_writable()
        with progress_bars() as show:
            for number, cell in enumerate(cells):
                show("measuring", number, len(cells))
                cell = {"model": model, **cell}
                result = next((each["result"] for each in kept if each["cell"] == cell), None)
                if result is None:
                    try:
                        result = await client.bench({name: value for name, value in cell.items() if value is not None})
                    except CommandError as error:
                        err().print(f"{describe(cell['workload'])}: {printable(error.format_message())}")
                        results.append({"cell": cell, "error": error.format_message()})
                        continue
                    if file is not None:
                        file.append({"cell": cell, "result": result})
                results.append({"cell": cell, "result": result})
            show("measuring", len(cells), len(cells))
    return results


def ranked(cell: Mapping[str, Any]) -> list[MethodResult]:
    """Return the results of a cell, the fastest first, failed ones last."""
    from node.evaluation.paired_stats import speedup_of

    counts = "latency" if cell["cell"]["workload"]["concurrency"] == 1 else "throughput"
    result = cell["result"]
    tried = []
    for each in (result["baseline"], *result["methods"]):
        log_ratios = each["log_ratios"][counts]
        tried.append(MethodResult(each["method"], speedup_of(log_ratios) if log_ratios else None, each["error"], each))
    return sorted(tried, key=lambda result: -result.speedup.mean if result.speedup else 1.0)


def describe(workload: Mapping[str, Any]) -> str:
    """Describe a workload in words."""
    jobs = int(workload["concurrency"])
    parts = [f"{jobs} job{'s' if jobs > 1 else ''}"]
    parts += [f"{workload['prompt_tokens']:.0f} in", f"{workload.get('max_tokens', 0):.0f} out"]
    if task := workload.get("task"):
        parts[-1] = task
    if workload.get("shared_prefix_share"):
        parts.append(f"{workload['shared_prefix_share']:.0%} shared")
    if workload.get("repetitiveness"):
        parts.append(f"{workload['repetitiveness']:.0%} repetitive")
    return ", ".join(parts)


def table(cell: Mapping[str, Any]) -> "Table":
    """Render the results of a cell."""
    title = f"{describe(cell['cell']['workload'])} ({plural(cell['result']['observations'], 'observation')})"
    shown = new_table("method", ">speed-up", ">95 %", ">TTFT s", ">TPOT ms", ">tokens/s", title=title)
    for result in ranked(cell):
        if _is_beyond_bound(cell, result):
            continue
        if result.speedup is None:
            shown.add_row(short_method(result.method), "-", printable(result.error or ""))
            continue
        figures, speedup = result.figures, result.speedup
        shown.add_row(
            short_method(result.method),
            f"{speedup.mean:.2f}",
            f"{speedup.low:.2f} to {speedup.high:.2f}" if speedup.is_bounded else "",
            f"{figures['ttft_s']:.2f}",
            f"{1e3 * figures['tpot_s']:.0f}",
            f"{figures['tokens_per_s']:.1f}",
        )
    return shown


def _is_beyond_bound(cell: Mapping[str, Any], result: MethodResult) -> bool:
    """Return whether the bound of a cell leaves out a method, which was not asked for by name."""
    from selector.task import PORTFOLIO

    asked, method = cell["cell"], PORTFOLIO.get(result.method)
    return not asked["methods"] and asked["quality"] == "exact" and method is not None and not method.exact


def draw(cells: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Plot the speed-ups, one panel for each cell. Raises PlotError."""
    from node.evaluation.plot import Panel, draw_panels

    panels = []
    for cell in cells:
        had = [(short_method(each.method), each.speedup) for each in ranked(cell) if each.speedup]
        panels.append(
            Panel(
                title=describe(cell["cell"]["workload"]),
                names=[name for name, _ in had],
                values=[speedup.mean for _, speedup in had],
                intervals=[(s.low, s.high) if s.is_bounded else (s.mean, s.mean) for _, s in had],
            )
        )
    draw_panels(panels, path, "speed-up over the baseline")
