"""Which method wins under which workload, on one node and on three: a table of winners with their speed-ups.

    python -m benchmarks.methods [--peers 1|3] [--rounds N] [--workload N …] [--method NAME …] [--quality Q] [--json]

Real daemons, measured as `metaswarm bench` does: in every round each method and the baseline once, in an order drawn
anew, nothing timed before everything is built. A method wins a workload by its lead over the second, from pairs within
the rounds; the lead counts where it is more than 15 % and its interval excludes a tie.
"""

import json
import os
from collections.abc import Sequence
from typing import Any, Final

import click
import httpx
import trio

from benchmarks.common import demo_package, describe_machine, whole_model
from node.cli.bench import WORKLOADS, describe, lead, short, standings
from node.models.catalogue import DEMO_MODEL

MIN_LEAD: Final = 1.15
MIN_WINNERS: Final = 5


@click.command()
@click.option("--peers", type=click.IntRange(1, 8), multiple=True, default=(1, 3), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--workload", "numbers", type=click.IntRange(0, len(WORKLOADS) - 1), multiple=True, help="Of the grid.")
@click.option("--method", "methods", multiple=True, help="Of the portfolio (default: all).")
@click.option("--quality", type=click.Choice(["exact", "near", "any"]), default="any", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    peers: Sequence[int],
    rounds: int,
    numbers: Sequence[int],
    methods: Sequence[str],
    quality: str,
    as_json: bool,
) -> None:
    """Measure the portfolio over a grid of workloads."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    workloads = [WORKLOADS[number] for number in numbers] or list(WORKLOADS)
    body = {"model": DEMO_MODEL, "rounds": rounds, "quality": quality}
    if methods:
        body["methods"] = list(methods)
    result = trio.run(measure, tuple(dict.fromkeys(peers)), workloads, body)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(peers: Sequence[int], workloads: Sequence[dict[str, float]], body: dict[str, Any]) -> dict[str, Any]:
    """Return every cell for every number of peers."""
    package = demo_package()
    machine = describe_machine()
    cells = []
    for count in peers:
        async with (
            whole_model(package, count) as first,
            httpx.AsyncClient(base_url=first.api_url, timeout=None) as client,
        ):
            for workload in workloads:
                cell = {**body, "workload": workload}
                answer = await client.post("/swarm/bench", json=cell)
                if answer.is_error:
                    raise click.ClickException(answer.json()["error"]["message"])
                cells.append({"peers": count, "cell": cell, "result": answer.json()})
    return {**machine, "cells": cells}


def report(result: dict[str, Any]) -> str:
    """Return the winners as a table."""
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores; speed-ups over the baseline",
        "",
        "peers  workload                                  winner",
    ]
    winners = set()
    for cell in result["cells"]:
        first, *others = (each for each in standings(cell) if each.speedup is not None)
        ahead = lead(cell)
        line = f"{cell['peers']:5}  {describe(cell['cell']['workload']):<40}  {short(first.method)}"
        if first.speedup is not None:
            line += f" {first.speedup.mean:.2f} ({first.speedup.low:.2f} to {first.speedup.high:.2f})"
        if others and ahead is not None:
            line += f", {ahead.mean:.2f} ({ahead.low:.2f} to {ahead.high:.2f}) times {short(others[0].method)}"
            if ahead.mean > MIN_LEAD and ahead.low > 1:
                winners.add(first.method)
                line += " *"
        lines.append(line)
        lines += [f"       not had: {short(each.method)}: {each.error}" for each in standings(cell) if each.error]
    verdict = "met" if len(winners) >= MIN_WINNERS else "missed"
    lines += ["", f"* wins by more than 15 % beyond doubt: {len(winners)} methods (aim: {MIN_WINNERS}) {verdict}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
