"""Fastest method under each workload, on one node and on three, with its speed-up.

    python -m benchmarks.methods [--peers 1|3 …] [--delay-ms N] [--bytes-per-s N] [--rounds N] [--workload N …]
                                 [--method NAME …] [--output FILE] [--json]

Real daemons, measured as by `metaswarm bench`: in each round every method and the baseline run once, in random order,
and nothing is timed before everything is built. Several peers are connected through relays of `benchmarks.link` with
`--delay-ms` and `--bytes-per-s`; then the first one also has the model in int8 as a draft model. Each workload has a
heat and a final. The heat runs the whole portfolio without methods that have no effect there: a prefix cache where
prompts share nothing, a chunk as long as the prompt, a wire codec on loopback, speculation where one token is wanted.
The final runs the fastest of the heat, among exact methods and among all. Only the final counts. A method wins if its
lead over the second, from pairs within the rounds, is above 15 % and its interval excludes a tie.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import httpx
import trio

from benchmarks.common import demo_package, describe_machine, whole_model
from benchmarks.learning import judge
from benchmarks.link import LinkShape
from benchmarks.wan import distant_daemons
from node.cli.bench import WORKLOADS, MethodResult, describe, ranked
from node.cli.explain import short_method as short
from node.cli.json_lines import ResultFile
from node.config import NodeReady
from node.demo import split_evenly
from node.evaluation.paired_stats import Speedup, speedup_of
from node.models.catalogue import DEMO_MODEL
from selector.task import Method, MethodError, TaskContext, baseline_of, parse_method, portfolio
from selector.task_buckets import effective_switches, simplest_first

FINALISTS: Final = 4
"""That keep the outputs exact, and as many of any quality."""

OF_ONE_TEXT: Final = 4
"""Times as many rounds where a round is one job with a long answer: drafts of some texts are better than of others."""

LONG_ANSWER: Final = 32
MIN_LEAD: Final = 1.15
MIN_WINNERS: Final = 5

Workload = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Setting:
    """The number of peers, and the links between them."""

    peers: int
    link: LinkShape


@dataclass(frozen=True, slots=True)
class Kept:
    """Cells measured before, and the file to append to."""

    file: ResultFile | None
    cells: Sequence[dict[str, Any]]


@click.command()
@click.option("--peers", type=click.IntRange(1, 8), multiple=True, default=(1, 3), show_default=True)
@click.option("--delay-ms", type=click.FloatRange(0), default=0.0, show_default=True, help="Of each link, one way.")
@click.option("--bytes-per-s", type=click.FloatRange(0), default=0.0, help="Bandwidth of each link; 0: unlimited.")
@click.option("--rounds", type=click.IntRange(2), default=5, show_default=True, help="Of a final.")
@click.option("--workload", "numbers", type=click.IntRange(0, len(WORKLOADS) - 1), multiple=True, help="Of the grid.")
@click.option("--method", "methods", multiple=True, help="Of the portfolio (default: all).")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write what is measured here; skip what is there."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    peers: Sequence[int],
    delay_ms: float,
    bytes_per_s: float,
    rounds: int,
    numbers: Sequence[int],
    methods: Sequence[str],
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure the portfolio over a grid of workloads."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    workloads = [WORKLOADS[number] for number in numbers] or list(WORKLOADS)
    try:
        package_format = demo_package().manifest.format
        tried = [parse_method(name, package_format) for name in methods] or portfolio(package_format)
    except MethodError as error:
        raise click.BadParameter(str(error)) from None
    link = LinkShape(delay_s=delay_ms / 1000, bytes_per_s=bytes_per_s)
    settings = [Setting(count, link) for count in dict.fromkeys(peers)]
    result = trio.run(measure, settings, workloads, tried, rounds, output)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(
    settings: Sequence[Setting],
    workloads: Sequence[Workload],
    methods: Sequence[Method],
    rounds: int,
    output: Path | None,
) -> dict[str, Any]:
    """Return the final of every workload, in every setting."""
    demo_package()
    machine = describe_machine()
    file = None if output is None else ResultFile(output, ("cell", "result"), "python -m benchmarks.methods")
    kept = Kept(file, [] if file is None else file.read())
    finals: list[dict[str, Any]] = []
    for setting in settings:
        async with running(setting) as first, httpx.AsyncClient(base_url=first.api_url, timeout=None) as client:
            await judge(client)
            for workload in workloads:
                of_one_text = workload["concurrency"] == 1 and workload["max_tokens"] >= LONG_ANSWER
                run = partial(run_cell, client, kept, setting, workload)
                heat = await run(unlike(methods, workload, setting), 2 if of_one_text else 1)
                finals.append(await run(finalists(heat), rounds * (OF_ONE_TEXT if of_one_text else 1)))
    return {**machine, "cells": finals}


@asynccontextmanager
async def running(setting: Setting) -> AsyncIterator[NodeReady]:
    """Run the peers inside the block, each with its part of the model; yield the first."""
    package = demo_package()
    if setting.link == LinkShape():
        async with whole_model(package, setting.peers) as first:
            yield first
        return
    flags: list[tuple[str, ...]]
    parts = split_evenly(package.manifest.block_count, setting.peers)
    flags = [("--serve", f"{DEMO_MODEL}:{part}", "--threads", "1") for part in parts]
    flags[0] = (*flags[0], "--draft", DEMO_MODEL)
    async with distant_daemons(flags, setting.link) as daemons:
        yield daemons[0].ready


async def run_cell(
    client: httpx.AsyncClient, kept: Kept, setting: Setting, workload: Workload, methods: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Return the times of methods under a workload, measured unless the file has them."""
    asked = {"model": DEMO_MODEL, "methods": methods, "quality": "any", "rounds": rounds, "workload": workload}
    cell = {**asdict(setting), **asked}
    for each in kept.cells:
        if each["cell"] == cell:
            return each
    answer = await client.post("/swarm/bench", json=asked)
    if answer.is_error:
        raise click.ClickException(answer.json()["error"]["message"])
    if kept.file is not None:
        kept.file.append({"cell": cell, "result": answer.json()})
    return {"cell": cell, "result": answer.json()}


def unlike(methods: Sequence[Method], workload: Workload, setting: Setting) -> list[str]:
    """Return the methods that differ in a workload: the simplest of each equivalent group."""
    task = TaskContext(
        prompt_tokens=int(workload["prompt_tokens"]),
        max_tokens=int(workload["max_tokens"]),
        shared_prefix_share=workload["shared_prefix_share"],
        stage_count=setting.peers,
        transfer_s=0.0 if setting.link == LinkShape() else math.inf,
    )
    baseline = methods[0].baseline
    found: dict[frozenset[tuple[str, str]], Method] = {effective_switches(baseline, task): baseline}
    for method in simplest_first(methods):
        found.setdefault(effective_switches(method, task), method)
    return [method.name for method in found.values() if method != baseline]


def had(cell: Mapping[str, Any], bound: str) -> list[MethodResult]:
    """Return the available methods within a bound, the fastest first."""
    return [each for each in ranked(cell) if each.speedup and (bound == "any" or parse_method(each.method).exact)]


def finalists(heat: Mapping[str, Any]) -> list[str]:
    """Return the methods that were fastest in a heat, within either bound."""
    found = {each.method for bound in ("exact", "any") for each in had(heat, bound)[:FINALISTS]}
    return sorted(name for name in found if name != baseline_of(name).name)


def lead(cell: Mapping[str, Any], bound: str) -> tuple[MethodResult, MethodResult, Speedup]:
    """Return the first and the second within a bound, and the lead of the first."""
    first, second, *_ = had(cell, bound)
    return first, second, _ahead(cell, first, second)


def _ahead(cell: Mapping[str, Any], first: MethodResult, second: MethodResult) -> Speedup:
    counts = "latency" if cell["cell"]["workload"]["concurrency"] == 1 else "throughput"
    pairs = zip(*(each.figures["log_ratios"][counts] for each in (first, second)), strict=True)
    return speedup_of([one - other for one, other in pairs])


def report(result: dict[str, Any]) -> str:
    """Return the winners as a table."""
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores; speed-ups over the baseline",
        "",
        "peers  links           quality  workload                       winner",
    ]
    winners: dict[str, set[str]] = defaultdict(set)
    for cell in result["cells"]:
        peers, workload, link = (cell["cell"][name] for name in ("peers", "workload", "link"))
        for bound in ("exact", "any"):
            if len(had(cell, bound)) < 2:
                continue
            first, second, ahead = lead(cell, bound)
            wins = ahead.mean > MIN_LEAD and ahead.low > 1
            if wins:
                winners[bound].add(first.method)
            lines.append(
                f"{peers:5}  {_told_link(link):<14}  {bound:<7}  {describe(workload):<29}  {short(first.method)} "
                f"{_told(first.speedup)}, {_told(ahead)} times {short(second.method)}{' *' if wins else ''}"
            )
    count = len(set().union(*winners.values()))
    within = ", ".join(f"{len(of)} within {bound}" for bound, of in winners.items())
    verdict = "met" if count >= MIN_WINNERS else "missed"
    lines += ["", f"* wins by more than 15 % beyond doubt: {count} methods ({within}; aim: {MIN_WINNERS}) {verdict}"]
    return "\n".join(lines)


def _told(speedup: Speedup | None) -> str:
    if speedup is None:
        return "-"
    interval = f" ({speedup.low:.2f} to {speedup.high:.2f})" if speedup.is_bounded else ""
    return f"{speedup.mean:.2f}{interval}"


def _told_link(link: Mapping[str, float]) -> str:
    width = f", {8e-6 * link['bytes_per_s']:.0f} Mb/s" if link["bytes_per_s"] else ""
    return f"{1e3 * link['delay_s']:.0f} ms{width}" if link["delay_s"] or width else "loopback"


if __name__ == "__main__":
    main()
