"""Which method wins under which workload, on one node and on three: a table of winners with their speed-ups.

    python -m benchmarks.methods [--peers 1|3 …] [--rounds N] [--workload N …] [--method NAME …] [--resume FILE]
                                 [--json]

Real daemons, measured as `metaswarm bench` does: in every round each method and the baseline once, in an order drawn
anew, nothing timed before everything is built. A workload is a heat and a final. In the heat, of two rounds, the whole
portfolio runs, less what can do nothing there: a cache where prompts have nothing in common, a chunk as long as the
prompt, a wire codec without a wire; such a method is the one without that switch. In the final the fastest of the heat
run, those that keep the outputs exact and those of any quality. Only the final counts. A method wins by its lead over
the second, from pairs within the rounds, beyond doubt where that is more than 15 % and its interval excludes a tie.
What only adds switches to a method, or lacks some, and is within the same 15 % of it did the same under that workload:
the two count as one, with the fewer switches, and are not each other's second.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import httpx
import trio

from benchmarks.common import demo_package, describe_machine, whole_model
from benchmarks.learning import judge
from node.cli.bench import WORKLOADS, Standing, describe, keep, read_kept, short, standings
from node.models.catalogue import DEMO_MODEL
from node.selection.paired import Speedup, speedup_of
from selector.task import BASELINE, PORTFOLIO, Method, MethodError, parse_method

HEAT_ROUNDS: Final = 2
FINALISTS: Final = 5
"""That keep the outputs exact, and as many of any quality."""

OF_ONE_TEXT: Final = 6
"""Times as many rounds where a round is one job with a long answer: some texts are guessed more easily than others."""

LONG_ANSWER: Final = 32
MIN_LEAD: Final = 1.15
MIN_WINNERS: Final = 5

Workload = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Kept:
    """The cells that were measured before, and the file for more."""

    file: Path | None
    cells: Sequence[dict[str, Any]]


@click.command()
@click.option("--peers", type=click.IntRange(1, 8), multiple=True, default=(1, 3), show_default=True)
@click.option("--rounds", type=click.IntRange(2), default=5, show_default=True, help="Of a final.")
@click.option("--workload", "numbers", type=click.IntRange(0, len(WORKLOADS) - 1), multiple=True, help="Of the grid.")
@click.option("--method", "methods", multiple=True, help="Of the portfolio (default: all).")
@click.option(
    "--resume", type=click.Path(dir_okay=False, path_type=Path), help="Keep what is measured here, and skip what is."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    peers: Sequence[int],
    rounds: int,
    numbers: Sequence[int],
    methods: Sequence[str],
    resume: Path | None,
    as_json: bool,
) -> None:
    """Measure the portfolio over a grid of workloads."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    workloads = [WORKLOADS[number] for number in numbers] or list(WORKLOADS)
    try:
        tried = [parse_method(name) for name in methods] or list(PORTFOLIO.values())
    except MethodError as error:
        raise click.BadParameter(str(error)) from None
    result = trio.run(measure, tuple(dict.fromkeys(peers)), workloads, tried, rounds, resume)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(
    peers: Sequence[int], workloads: Sequence[Workload], methods: Sequence[Method], rounds: int, resume: Path | None
) -> dict[str, Any]:
    """Return the final of every workload, for every number of peers."""
    package = demo_package()
    machine = describe_machine()
    kept = Kept(resume, read_kept(resume))
    finals: list[dict[str, Any]] = []
    for count in peers:
        async with (
            whole_model(package, count) as first,
            httpx.AsyncClient(base_url=first.api_url, timeout=None) as client,
        ):
            await judge(client)
            for workload in workloads:
                heat = await run_cell(client, kept, count, workload, unlike(methods, workload, count), HEAT_ROUNDS)
                of_one_text = workload["concurrency"] == 1 and workload["max_tokens"] >= LONG_ANSWER
                own_rounds = rounds * (OF_ONE_TEXT if of_one_text else 1)
                finals.append(await run_cell(client, kept, count, workload, finalists(heat), own_rounds))
    return {**machine, "cells": finals}


async def run_cell(
    client: httpx.AsyncClient, kept: Kept, peers: int, workload: Workload, methods: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Return what methods took under a workload, measured now unless it was before."""
    asked = {"model": DEMO_MODEL, "methods": methods, "quality": "any", "rounds": rounds, "workload": workload}
    cell = {"peers": peers, **asked}
    for each in kept.cells:
        if each["cell"] == cell:
            return each
    answer = await client.post("/swarm/bench", json=asked)
    if answer.is_error:
        raise click.ClickException(answer.json()["error"]["message"])
    keep(kept.file, cell, answer.json())
    return {"cell": cell, "result": answer.json()}


def effect(name: str, workload: Workload, peers: int) -> frozenset[tuple[str, str]]:
    """Return the switches in which a method differs from the baseline and that can do anything in a workload."""
    method = parse_method(name)
    idle = set()
    if not workload["shared_prefix_share"]:
        idle.add("prefix_cache")
    if method.prefill_chunk is not None and method.prefill_chunk >= workload["prompt_tokens"]:
        idle.add("prefill_chunk")
    if peers == 1:
        idle.add("activations")
    if workload["max_tokens"] == 1:
        idle.add("speculation")
    return frozenset(
        (switch, value)
        for switch, value in method.switches.items()
        if switch not in idle and value != BASELINE.switches[switch]
    )


def unlike(methods: Sequence[Method], workload: Workload, peers: int) -> list[str]:
    """Return the methods that do different things in a workload: of those that do the same, that with least to it."""
    found: dict[frozenset[tuple[str, str]], Method] = {effect(BASELINE.name, workload, peers): BASELINE}
    for method in sorted(methods, key=lambda method: len(short(method.name))):
        found.setdefault(effect(method.name, workload, peers), method)
    return [method.name for method in found.values() if method != BASELINE]


def had(cell: Mapping[str, Any], bound: str) -> list[Standing]:
    """Return the methods within a bound that could be had, the fastest first."""
    return [each for each in standings(cell) if each.speedup and (bound == "any" or parse_method(each.method).exact)]


def finalists(heat: Mapping[str, Any]) -> list[str]:
    """Return the methods that were fastest in a heat, within either bound."""
    found = {each.method for bound in ("exact", "any") for each in had(heat, bound)[:FINALISTS]}
    return sorted(found - {BASELINE.name})


def lead(cell: Mapping[str, Any], bound: str) -> tuple[Standing, Standing | None, Speedup | None]:
    """Return who is first within a bound, who is second, and by how much the first is ahead."""
    standing = had(cell, bound)
    switches = [effect(each.method, cell["cell"]["workload"], cell["cell"]["peers"]) for each in standing]
    near = [i for i, each in enumerate(standing) if _ahead(cell, standing[0], each).mean <= MIN_LEAD]
    simplest = min((i for i in near if switches[i] <= switches[0]), key=lambda i: len(switches[i]))
    for i, other in enumerate(standing):
        nested = switches[i] <= switches[simplest] or switches[i] >= switches[simplest]
        if not nested or i not in near:
            return standing[simplest], other, _ahead(cell, standing[simplest], other)
    return standing[simplest], None, None


def _ahead(cell: Mapping[str, Any], first: Standing, second: Standing) -> Speedup:
    counts = "latency" if cell["cell"]["workload"]["concurrency"] == 1 else "throughput"
    pairs = zip(*(each.figures["log_ratios"][counts] for each in (first, second)), strict=True)
    return speedup_of([one - other for one, other in pairs])


def report(result: dict[str, Any]) -> str:
    """Return the winners as a table."""
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores; speed-ups over the baseline",
        "",
        "peers  quality  workload                       winner",
    ]
    winners: dict[str, set[frozenset[tuple[str, str]]]] = defaultdict(set)
    for cell in result["cells"]:
        peers, workload = cell["cell"]["peers"], cell["cell"]["workload"]
        for bound in ("exact", "any"):
            first, second, ahead = lead(cell, bound)
            wins = ahead is not None and ahead.mean > MIN_LEAD and ahead.low > 1
            if wins:
                winners[bound].add(effect(first.method, workload, peers))
            lines.append(
                f"{peers:5}  {bound:<7}  {describe(workload):<29}  {short(first.method)} {_told(first.speedup)}, "
                f"{_told(ahead)} times {short(second.method) if second else 'nobody'}{' *' if wins else ''}"
            )
    count = len(set().union(*winners.values()))
    within = ", ".join(f"{len(of)} within {bound}" for bound, of in winners.items())
    verdict = "met" if count >= MIN_WINNERS else "missed"
    lines += ["", f"* wins by more than 15 % beyond doubt: {count} methods ({within}; aim: {MIN_WINNERS}) {verdict}"]
    return "\n".join(lines)


def _told(speedup: Speedup | None) -> str:
    return f"{speedup.mean:.2f} ({speedup.low:.2f} to {speedup.high:.2f})" if speedup else "-"


if __name__ == "__main__":
    main()
