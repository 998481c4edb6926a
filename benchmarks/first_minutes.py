"""A new node beside its best plain engine: what it costs that a node with an empty history still has to learn.

One daemon serves jobs of the families of `benchmarks.learning`, all of them with exact outputs, one after another
without a gap. Each is served anew with every plain engine, in random order: an exact method with all else off.

`python -m benchmarks.first_minutes [--minutes 10] [--json]`
"""

import itertools
import json
import random
import time
from collections import defaultdict
from typing import Any

import click
import httpx
import trio

from benchmarks.common import demo_package, describe_machine, verdict, whole_model
from benchmarks.learning import FAMILIES, body_of, in_exact, serve
from node.cli.explain import short_method as short
from selector.task import Method, portfolio

WINDOW = 20
"""Jobs over which a ratio is given."""

TARGET = 1.1


def plain_engines(methods: list[Method]) -> list[str]:
    """Return the exact methods that set nothing but the engine."""
    found = []
    for method in methods:
        plain = method.baseline.switches
        changed = {switch for switch, value in method.switches.items() if value != plain.get(switch)}
        if method.exact and changed <= {"engine"}:
            found.append(method.name)
    return found


async def measure(minutes: float) -> dict[str, Any]:
    """Return the figures."""
    package = demo_package()
    engines = plain_engines(list(portfolio(package.manifest.format)))
    served: list[dict[str, Any]] = []
    rng = random.Random(1)
    async with whole_model(package, 1) as ready, httpx.AsyncClient(base_url=ready.api_url, timeout=600) as client:
        began_s = time.monotonic()
        for number in itertools.count():
            if time.monotonic() > began_s + 60 * minutes:
                break
            family = list(FAMILIES)[number % len(FAMILIES)]
            took_s: dict[str, float] = {}
            for method in rng.sample(["auto", *engines], 1 + len(engines)):
                done = await serve(client, in_exact(body_of(family, number, method)))
                took_s[method] = done["timing"]["total_s"]
                if method == "auto":
                    chosen = done["method"]["name"]
            served.append(
                {"family": family, "chosen": chosen, "took_s": took_s, "at_s": round(time.monotonic() - began_s, 1)}
            )
        status = (await client.get("/swarm/status")).raise_for_status().json()["selection"]
    return {**describe_machine(), "jobs": served, "selection": status, "windows": windows(served), "engines": engines}


def windows(served: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the ratio to the best plain engine of each family: of every window, and of all jobs."""
    plain: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for each in served:
        for method, took_s in each["took_s"].items():
            if method != "auto":
                plain[each["family"]][method] += took_s
    best = {family: min(sums, key=sums.__getitem__) for family, sums in plain.items()}
    parts = [served[start : start + WINDOW] for start in range(0, len(served), WINDOW)]
    return [
        {
            "jobs": len(part),
            "until_s": part[-1]["at_s"],
            "ratio": sum(each["took_s"]["auto"] for each in part)
            / sum(each["took_s"][best[each["family"]]] for each in part),
        }
        for part in (*parts, served)
    ]


@click.command()
@click.option("--minutes", type=click.FloatRange(0), default=10.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(minutes: float, as_json: bool) -> None:
    """Measure what it costs that a new node has to learn."""
    found = trio.run(measure, minutes)
    if as_json:
        print(json.dumps(found))
        return
    print(f"load average {found['load_average']:.1f} on {found['cores']:.0f} cores")
    print(f"plain engines: {', '.join(map(short, found['engines']))}")
    for each in found["windows"]:
        ratio = f"{each['ratio']:.3f} of the best engine  {verdict(each['ratio'], TARGET)}"
        print(f"{each['jobs']:4} jobs, until {each['until_s']:4.0f} s: {ratio}")
    for family in FAMILIES:
        print(f"{family:<16} in the end {short([x['chosen'] for x in found['jobs'] if x['family'] == family][-1])}")
    selection = found["selection"]
    print(f"{selection['trials']} trials took {selection['trial_s']:.0f} s beside the jobs")


if __name__ == "__main__":
    main()
