"""`metaswarm explain`: which method a task would be served with, why, and how past choices turned out."""

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli.job_options import FiniteRange, objective_options, quality_option, task_option
from node.cli.output import (
    api_option,
    format_duration,
    json_option,
    model_option,
    new_table,
    out,
    plural,
    print_json,
    printable,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from node.api.interface import Explanation

MAX_METHOD_COLUMNS = 12
"""Methods in the table; --json has all."""

_share_option = partial(click.option, type=FiniteRange(0, 1), default=0.0)

MAX_VOTE_SHOWN: Final = 30.0
"""Natural logarithm of seconds: a peer may vote whatever it likes."""


@click.command()
@model_option
@api_option
@task_option
@click.option("--prompt-tokens", type=click.IntRange(1), default=64, show_default=True, metavar="N")
@click.option("--max-tokens", type=click.IntRange(0), metavar="N", help="New tokens [default: 64, else 0].")
@_share_option("--shared-prefix", "shared_prefix_share", metavar="S", help="Fraction of a shared prefix.")
@_share_option("--repetitiveness", metavar="R", help="Fraction that repeats earlier text.")
@click.option("--concurrency", type=click.IntRange(1), metavar="N", help="Concurrent jobs [default: as now].")
@quality_option
@objective_options
@json_option
def explain(as_json: bool, api: str | None, **task: Any) -> None:
    """Show which method a task would be served with, and why.

    For every admitted method: predicted speed-up over the baseline with its 90 % interval, votes of the stages, and
    measured trials; then how sure the choice is, and the outcome of past choices.
    """
    import trio

    from node.cli.client import find_api, open_client
    from node.cli.target import choose_model

    async def ask() -> "Explanation":
        async with open_client(find_api(api)) as client:
            given = {name: value for name, value in task.items() if value is not None}
            return await client.explain(given | {"model": await choose_model(client, task["model"])})

    answer = trio.run(ask)
    if as_json:
        print_json(answer)
    else:
        out().print(render_explanation(answer))


def render_explanation(answer: "Explanation") -> "RenderableType":
    """Render an explanation."""
    from rich.console import Group
    from rich.text import Text

    table = new_table("method", ">speed-up", ">90 % range", ">expected", ">tried", ">votes of the peers", "")
    for method in answer["methods"][:MAX_METHOD_COLUMNS]:
        mark = "chosen" if method["name"] == answer["agreed"] else "accepted" if method["accepted"] else ""
        cells = (
            short_method(method["name"]),
            f"{method['predicted_speedup']:.2f}x",
            f"{method['speedup_low']:.2f}-{method['speedup_high']:.2f}",
            format_duration(method["predicted_s"]),
            "" if method["trial_speedup"] is None else f"{method['trial_speedup']:.2f}x",
            " ".join(format_duration(math.exp(min(cost, MAX_VOTE_SHOWN))) for cost in method["votes"].values()),
            mark,
        )
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in cells))
    selection, past = answer["selection"], answer["past"]
    basis = (
        f"a model of {plural(selection['experiences'], 'observation')}"
        if selection["basis"] == "model"
        else "the heuristic: too few observations that compare methods yet; `metaswarm bench` makes some"
    )
    error = past["typical_error"]
    facts = {
        "chosen": answer["reason"],
        "sure": _certainty(answer),
        "based on": basis + (", and the table that the swarm agreed on" if answer["table_digest"] else ""),
        "votes": "what each peer of the route predicts for the job; the lowest mean, by reputation, wins",
        "tried": f"{plural(selection['trials'], 'trial')} in {format_duration(selection['trial_s'])}, "
        f"{selection['explored_jobs']} of {plural(selection['jobs'], 'job')} for "
        f"{format_duration(selection['regret_s'])}",
        "past": "no jobs yet"
        if error is None
        else f"{plural(past['jobs'], 'job')}, predictions off by {error:.0%}, "
        f"expected regret {format_duration(past['mean_regret_s'])} a job",
    }
    if answer["not_offered"]:
        names = ", ".join(map(short_method, answer["not_offered"][:MAX_METHOD_COLUMNS]))
        facts["not now"] = f"{names}: not every peer of the route has built them, or has the draft model for them"
    return Group(table, Text("\n".join(f"{name:<8} {printable(value)}" for name, value in facts.items())))


def _certainty(answer: "Explanation") -> str:
    """Return how sure the choice is, and what is measured where it is not."""
    from selector.confidence import MIN_CONFIDENCE

    if answer["confidence"] is None:
        return "unknown: the route does not offer the method in use for tasks like this one"
    sure = f"{answer['confidence']:.0%} that no other method is clearly better than the one in use"
    if not answer["probes"]:
        return sure
    probes = " and ".join(short_method(name) for name in answer["probes"])
    why = "as this is not sure enough" if answer["confidence"] < MIN_CONFIDENCE else "as the votes say otherwise"
    return f"{sure}; {why}, jobs like this one start a trial of {probes}"


def short_method(name: str) -> str:
    """Return the switches of a method that differ from the baseline."""
    from selector.task import baseline_of

    baseline = baseline_of(name)
    if name == baseline.name:
        return "baseline"
    return " ".join(part for part in name.split("|") if part not in baseline.name.split("|"))
