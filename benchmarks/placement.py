"""Balance of block placement in simulated swarms whose nodes choose their blocks themselves.

    python -m benchmarks.placement [--seeds N] [--nodes N] [--json]

A hundred unequal nodes join in random order, then a third of them leaves at once. The optimum is an upper bound: the
throughput of the least served block if nodes could be divided.
"""

import json
from dataclasses import asdict

import click
import numpy as np

from tests.simulation.placement import Result, play


@click.command()
@click.option("--seeds", type=click.IntRange(1), default=20, show_default=True, help="Swarms.")
@click.option("--nodes", type=click.IntRange(10), default=100, show_default=True, help="Nodes of each.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(seeds: int, nodes: int, as_json: bool) -> None:
    """Simulate placement."""
    results = [play(seed, nodes=nodes) for seed in range(seeds)]
    click.echo(json.dumps([asdict(result) for result in results]) if as_json else report(results))


def report(results: list[Result]) -> str:
    """Return the figures as a table."""
    lines = ["of the optimum                        worst   median   target"]
    for name, title, target in (
        ("joined_share", "after all have joined", "90 %"),
        ("left_share", "right after a third has left", ""),
        ("recovered_share", "two minutes later", "95 %"),
    ):
        shares = [100 * getattr(result, name) for result in results]
        lines.append(f"{title:<34} {min(shares):6.1f} % {np.median(shares):6.1f} %   {target}")
    moves = [result.moves_per_node for result in results]
    uncovered = sum(result.uncovered_by_moves for result in results)
    lines.append(f"moves a node: {np.median(moves):.2f}, at most {max(moves):.2f} (target: below 2)")
    lines.append(f"most moves of any node: {max(result.most_moves for result in results)}")
    lines.append(f"blocks left without anybody by a move: {uncovered}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
