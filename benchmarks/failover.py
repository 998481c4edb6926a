"""How long a reader waits when a stage is lost in the middle of a job: from the loss to the next token.

    python -m benchmarks.failover [--rounds N] [--json]

Three stages with a spare each, and a coordinator that serves none, are real daemons. In each round a stage is lost, in
turn the first, the second and the third; whoever was lost is started again before the next.
"""

import json
import signal
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import trio

from benchmarks.common import Spread, demo_package, describe_machine, spread_of, verdict
from tests.process.failover import SparedSwarm, spared_swarm

CASES = (
    ("SIGKILL", 50, signal.SIGKILL, 0.3),
    ("SIGKILL", 200, signal.SIGKILL, 1.0),
    ("SIGSTOP", 50, signal.SIGSTOP, 3.0),
)
"""Name, tokens of context when the stage is lost, signal, and the longest pause that is wanted, in seconds."""

AFTER = 12
"""Tokens of the answer after which the stage is lost; the rest of the context is prompt."""


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=6, show_default=True, help="Losses of each kind.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(rounds: int, as_json: bool) -> None:
    """Measure the pause after the loss of a stage."""
    demo_package()
    result = trio.run(measure, rounds)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(rounds: int) -> dict[str, Any]:
    """Return all figures, in seconds."""
    with TemporaryDirectory(prefix="metaswarm-failover-") as folder:
        async with spared_swarm(Path(folder)) as swarm:
            machine = describe_machine()
            cases = [
                {
                    "case": name,
                    "context": context,
                    "target_s": target_s,
                    **await measure_case(swarm, rounds, context, how),
                }
                for name, context, how, target_s in CASES
            ]
    return {**machine, "cases": cases}


async def measure_case(swarm: SparedSwarm, rounds: int, context: int, how: int) -> dict[str, Any]:
    """Return the pauses of some losses, and how often the text was another than undisturbed."""
    prompt = " ".join(["word"] * (context - AFTER))
    undisturbed = await swarm.run(prompt, 2 * AFTER)
    pauses_s, different = [], 0
    for number in range(rounds):
        stage = number % 3
        outcome = await swarm.run(prompt, 2 * AFTER, lose=(stage, AFTER, how))
        pauses_s.append(outcome.pause_s)
        different += outcome.text != undisturbed.text
        await swarm.start_peer(stage)
        await swarm.settle()
    return {"pause_s": asdict(spread_of(pauses_s)), "usual_s": undisturbed.pause_s, "different_texts": different}


def report(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores; seconds from the loss to the next",
        "",
        "lost by   context   median   worst   target   texts that differ",
    ]
    for case in result["cases"]:
        pause = Spread(**case["pause_s"])
        lines.append(
            f"{case['case']:<9} {case['context']:7} {pause.median:8.2f} {pause.greatest:7.2f} {case['target_s']:8.1f}"
            f"   {case['different_texts']}   {verdict(pause.median, case['target_s'])}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
