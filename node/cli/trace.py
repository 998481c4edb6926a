"""The summary of `metaswarm submit --trace`: where the time of the tokens went, stage by stage."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from node.cli.output import format_duration, new_table, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

PARTS: Final = ("link_s", "queue_s", "compute_s", "serialise_s")
"""In the order in which they pass."""


def render_trace(document: Mapping[str, Any]) -> "RenderableType":
    """Render a traced job: median and 95th percentile of each part, over all steps but those with the prompt."""
    from rich.console import Group
    from rich.text import Text

    trace = document.get("trace")
    if not trace or not any(stage["clock_error_s"] is not None for stage in trace["stages"]):
        return Text("no trace: no stage reported its timings: its version does not, or it was too slow")
    rounds = [each for each in trace["rounds"] if not each["has_prompt"]]
    headings = [f">{part.removesuffix('_s')}" for part in PARTS]
    table = new_table(
        "stage", "peer", "blocks", *headings, ">total", title=f"milliseconds a step, median/p95 of {len(rounds)}"
    )
    for number, stage in enumerate(trace["stages"]):
        seen = [timing for each in rounds for timing in each["stages"] if timing["stage"] == number]
        columns = [[timing[part] for timing in seen if timing[part] is not None] for part in PARTS]
        sums = [sum(timing[part] or 0.0 for part in PARTS) for timing in seen]
        blocks = f"{stage['start']}-{stage['end']}"
        table.add_row(str(number + 1), stage["peer"][-8:], blocks, *map(_figures, columns), _figures(sums))
    whole = [
        [sum(timing[part] or 0.0 for timing in each["stages"]) for part in PARTS] for each in rounds if each["stages"]
    ]
    if len(trace["stages"]) > 1 and whole:
        columns = [list(column) for column in zip(*whole, strict=True)]
        table.add_row("all", "", "", *map(_figures, columns), _figures([sum(parts) for parts in whole]), style="bold")
    return Group(table, Text("\n".join(printable(line) for line in _remarks(document, trace, rounds))))


def _remarks(document: Mapping[str, Any], trace: Mapping[str, Any], rounds: Sequence[Any]) -> list[str]:
    """Return lines on what the table leaves out."""
    timing = document["timing"]
    lines = []
    prompts = [each for each in trace["rounds"] if each["has_prompt"]]
    if prompts:
        parts = {part: sum(timing[part] or 0.0 for timing in prompts[0]["stages"]) for part in ("queue_s", "compute_s")}
        lines.append(
            f"prompt    {format_duration(prompts[0]['arrived_s'])} to the first token: "
            f"{format_duration(parts['compute_s'])} compute and {format_duration(parts['queue_s'])} queue on all stages"
        )
    tokens = sum(each["tokens"] for each in rounds)
    if rounds:
        lines.append(
            f"tokens    {tokens} in {len(rounds)} steps, one every {timing['tpot_s'] * 1000:.1f} ms at the coordinator"
        )
    if len(prompts) > 1:
        lines.append(f"replays   {len(prompts) - 1}, not in the table")
    errors = [stage["clock_error_s"] for stage in trace["stages"] if stage["clock_error_s"] is not None]
    lines.append(f"clocks    a link may be off by {max(errors) * 1000:.1f} ms, the sum of all is not")
    if trace["dropped_steps"]:
        lines.append(f"missing   {trace['dropped_steps']} steps that their stages did not retain")
    return lines


def _figures(seconds: Sequence[float]) -> str:
    """Return median and 95th percentile in milliseconds."""
    if not seconds:
        return "-"
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return f"{_milliseconds(median(ordered))}/{_milliseconds(p95)}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f}" if seconds < 0.01 else f"{seconds * 1000:.1f}"
