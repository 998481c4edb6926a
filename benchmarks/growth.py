"""Convergence time and traffic of the history under faults, by swarm size (simulated).

    python -m benchmarks.growth [--peers 30 --peers 100 --peers 300 --peers 1000] [--json]

The node's own membership, gossip and anti-entropy over the in-memory network in virtual time: links of 30 to 70 ms with
30 % packet loss, a partition of 60 s, and churn (at 300 peers one joins and one leaves each second; in proportion
otherwise). The whole swarm makes five observations a second. The convergence time runs from the last fault until all
live peers hold the same history. `--without-membership` leaves out heartbeats, which isolates the cost of the history
and makes a thousand peers take minutes instead of an hour.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click
import numpy as np
import structlog

from benchmarks.common import describe_machine
from tests.simulation.scenario import Scenario, play

SIZES = (30, 100, 300)
CHURN_SIZE = 300
"""Of a swarm so large one peer joins and one leaves a second."""

FIGURES = {
    "convergence_s": "until all hold the same, s",
    "median_delay_s": "median delay, s",
    "busy_bytes_per_s": "bytes/s of a peer, busy",
    "idle_bytes_per_s": "bytes/s of a peer, idle",
}


@click.command()
@click.option("--peers", "sizes", type=click.IntRange(8), multiple=True, default=SIZES, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--without-membership", is_flag=True, help="Neighbours are chosen by the simulation; no heartbeats.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(sizes: Sequence[int], seed: int, without_membership: bool, as_json: bool) -> None:
    """Measure how the cost of convergence grows with the swarm."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    runs = [measure(size, seed, with_membership=not without_membership) for size in sizes]
    exponents = {name: exponent(sizes, [run[name] for run in runs]) for name in FIGURES} if len(runs) > 1 else {}
    result = {**describe_machine(), "membership": not without_membership, "runs": runs, "exponents": exponents}
    click.echo(json.dumps(result) if as_json else report(result))


def measure(peers: int, seed: int, *, with_membership: bool) -> dict[str, Any]:
    """Return the figures of a swarm of this size. Raises TooSlowError if it does not converge."""
    churn = peers / CHURN_SIZE
    scenario = Scenario(peers=peers, seed=seed, joins_per_s=churn, leaves_per_s=churn, with_membership=with_membership)
    began_s = time.perf_counter()
    result = play(scenario)
    return {
        **asdict(result),
        "started_with": peers,
        "heartbeat_interval_s": scenario.heartbeat_interval_s if with_membership else None,
        "took_s": time.perf_counter() - began_s,
    }


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return b of value = a * size ** b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-9)), 1)[0])


def report(result: Mapping[str, Any]) -> str:
    """Return the figures as a table."""
    heartbeats = "with" if result["membership"] else "without"
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores; {heartbeats} membership",
        "",
        "".join(
            ["peers at the start".ljust(34), *(f"{run['started_with']:>10}" for run in result["runs"]), "  exponent"]
        ),
    ]
    for name, title in FIGURES.items():
        figures = "".join(f"{run[name]:>10.1f}" for run in result["runs"])
        grows = f"{result['exponents'][name]:>10.2f}" if result["exponents"] else ""
        lines.append(f"{title:34}{figures}{grows}")
    for name, title in {
        "observations": "observations",
        "missing": "of live peers, missing somewhere",
        "lost_with_their_observer": "lost with their only holder",
        "took_s": "real time, s",
    }.items():
        lines.append(title.ljust(34) + "".join(f"{run[name]:>10.0f}" for run in result["runs"]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
