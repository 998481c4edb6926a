"""Which method wins under which workload, on one node and on three: a table of winners with their speed-ups.

    python -m benchmarks.methods [--peers 1|3 …] [--rounds N] [--workload N …] [--method NAME …]
                                 [--quality exact|near|any …] [--resume FILE] [--json]

Each workload is served within each of the bounds on quality, by the methods that it admits. Real daemons, measured as
`metaswarm bench` does: in every round each method and the baseline once, in an order drawn anew, nothing timed before
everything is built. A method wins a workload by its lead over the second, from pairs within the rounds; the lead counts
where it is more than 15 % and its interval excludes a tie. Switches that cannot do anything in a workload (a cache
where prompts have nothing in common, a chunk as long as the prompt, a wire codec without a wire) make no other method:
the second is the fastest of those that do something else.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
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
from selector.task import BASELINE, MethodError, parse_method

MIN_LEAD: Final = 1.15
MIN_WINNERS: Final = 5


@click.command()
@click.option("--peers", type=click.IntRange(1, 8), multiple=True, default=(1, 3), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--workload", "numbers", type=click.IntRange(0, len(WORKLOADS) - 1), multiple=True, help="Of the grid.")
@click.option("--method", "methods", multiple=True, help="Of the portfolio (default: all).")
@click.option(
    "--quality",
    "bounds",
    type=click.Choice(["exact", "near", "any"]),
    multiple=True,
    default=("exact", "any"),
    show_default=True,
)
@click.option(
    "--resume", type=click.Path(dir_okay=False, path_type=Path), help="Keep what is measured here, and skip what is."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    peers: Sequence[int],
    rounds: int,
    numbers: Sequence[int],
    methods: Sequence[str],
    bounds: Sequence[str],
    resume: Path | None,
    as_json: bool,
) -> None:
    """Measure the portfolio over a grid of workloads."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    workloads = [WORKLOADS[number] for number in numbers] or list(WORKLOADS)
    bodies = [{"model": DEMO_MODEL, "rounds": rounds, "quality": bound} for bound in dict.fromkeys(bounds)]
    if methods:
        try:
            exact = [name for name in methods if parse_method(name).exact]
        except MethodError as error:
            raise click.BadParameter(str(error)) from None
        bodies = [body | {"methods": exact if body["quality"] == "exact" else list(methods)} for body in bodies]
        bodies = [body for body in bodies if body["methods"]]
    result = trio.run(measure, tuple(dict.fromkeys(peers)), workloads, bodies, resume)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(
    peers: Sequence[int],
    workloads: Sequence[dict[str, float]],
    bodies: Sequence[dict[str, Any]],
    resume: Path | None = None,
) -> dict[str, Any]:
    """Return every cell for every number of peers."""
    package = demo_package()
    machine = describe_machine()
    kept = read_kept(resume)
    cells: list[dict[str, Any]] = []
    for count in peers:
        wanted = [{"peers": count, **body, "workload": workload} for workload in workloads for body in bodies]
        cells += [each for each in kept if each["cell"] in wanted]
        missing = [cell for cell in wanted if all(each["cell"] != cell for each in kept)]
        if not missing:
            continue
        async with (
            whole_model(package, count) as first,
            httpx.AsyncClient(base_url=first.api_url, timeout=None) as client,
        ):
            if any(cell["quality"] != "exact" for cell in missing):
                await judge(client)
            for cell in missing:
                asked = {name: value for name, value in cell.items() if name != "peers"}
                answer = await client.post("/swarm/bench", json=asked)
                if answer.is_error:
                    raise click.ClickException(answer.json()["error"]["message"])
                keep(resume, cell, answer.json())
                cells.append({"cell": cell, "result": answer.json()})
    return {**machine, "cells": cells}


def effect(name: str, cell: Mapping[str, Any]) -> dict[str, str]:
    """Return the switches in which a method differs from the baseline and that can do anything in a cell."""
    method, workload = parse_method(name), cell["workload"]
    idle = set()
    if not workload["shared_prefix_share"]:
        idle.add("prefix_cache")
    if method.prefill_chunk is not None and method.prefill_chunk >= workload["prompt_tokens"]:
        idle.add("prefill_chunk")
    if cell["peers"] == 1:
        idle.add("activations")
    if workload["max_tokens"] == 1:
        idle.add("speculation")
    return {
        switch: value
        for switch, value in method.switches.items()
        if switch not in idle and value != BASELINE.switches[switch]
    }


def lead(cell: Mapping[str, Any]) -> tuple[Standing, Speedup] | None:
    """Return who is second, doing something else than the first, and by how much the first is ahead of it."""
    first, *others = (each for each in standings(cell) if each.speedup)
    counts = "latency" if cell["cell"]["workload"]["concurrency"] == 1 else "throughput"
    for other in others:
        if effect(other.method, cell["cell"]) != effect(first.method, cell["cell"]):
            pairs = zip(*(each.figures["log_ratios"][counts] for each in (first, other)), strict=True)
            return other, speedup_of([one - another for one, another in pairs])
    return None


def report(result: dict[str, Any]) -> str:
    """Return the winners as a table."""
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores; speed-ups over the baseline",
        "",
        "peers  quality  workload                                  winner",
    ]
    winners: dict[str, set[frozenset[tuple[str, str]]]] = defaultdict(set)
    for cell in result["cells"]:
        first = standings(cell)[0]
        asked = cell["cell"]
        line = f"{asked['peers']:5}  {asked['quality']:<7}  {describe(asked['workload']):<40}  {short(first.method)}"
        if first.speedup is not None:
            line += f" {_told(first.speedup)}"
        if found := lead(cell):
            second, ahead = found
            line += f", {_told(ahead)} times {short(second.method)}"
            if ahead.mean > MIN_LEAD and ahead.low > 1:
                winners[asked["quality"]].add(frozenset(effect(first.method, asked).items()))
                line += " *"
        lines.append(line)
        lines += [f"       not had: {short(each.method)}: {each.error}" for each in standings(cell) if each.error]
    count = len(set().union(*winners.values()))
    within = ", ".join(f"{len(of)} within {bound}" for bound, of in winners.items())
    verdict = "met" if count >= MIN_WINNERS else "missed"
    lines += ["", f"* wins by more than 15 % beyond doubt: {count} methods ({within}; aim: {MIN_WINNERS}) {verdict}"]
    return "\n".join(lines)


def _told(speedup: Speedup) -> str:
    return f"{speedup.mean:.2f} ({speedup.low:.2f} to {speedup.high:.2f})"


if __name__ == "__main__":
    main()
