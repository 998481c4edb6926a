"""Pause of a job's token stream when a stage is lost: from the loss to the next token.

    python -m benchmarks.failover [--rounds N] [--signal SIGKILL|SIGSTOP] [--context N] [--json]

Real daemons: three stages with a spare each, and a coordinator that serves no blocks. A round loses each stage once,
each in a job of its own, and then restarts it. The pause runs from the signal to the next token, detection included.
"""

import json
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeAlias

import click
import trio

from benchmarks.common import Spread, demo_package, describe_machine, spread_of, verdict
from tests.process.failover import SparedSwarm, spared_swarm

Case: TypeAlias = tuple[str, int, int, float]

CASES: Final[tuple[Case, ...]] = (
    ("SIGKILL", 50, signal.SIGKILL, 0.3),
    ("SIGKILL", 200, signal.SIGKILL, 1.0),
    ("SIGSTOP", 50, signal.SIGSTOP, 3.0),
)
"""Name, tokens of context when the stage is lost, signal, and the longest pause that is wanted, in seconds."""

AFTER = 12
"""Tokens of the answer after which the stage is lost; the rest of the context is prompt."""


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Losses of every stage.")
@click.option("--signal", "names", type=click.Choice(["SIGKILL", "SIGSTOP"]), multiple=True, help="Default: both.")
@click.option("--context", "contexts", type=click.Choice(["50", "200"]), multiple=True, help="Default: both.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(rounds: int, names: Sequence[str], contexts: Sequence[str], as_json: bool) -> None:
    """Measure the pause after the loss of a stage."""
    cases = [case for case in CASES if (not names or case[0] in names) and (not contexts or str(case[1]) in contexts)]
    if not cases:
        raise click.UsageError("no case is of that signal and that context")
    demo_package()
    result = trio.run(measure, rounds, cases)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(rounds: int, cases: Sequence[Case]) -> dict[str, Any]:
    """Return the figures of some cases, in seconds."""
    with TemporaryDirectory(prefix="metaswarm-failover-") as folder:
        async with spared_swarm(Path(folder)) as swarm:
            machine = describe_machine()
            found = [
                {
                    "case": name,
                    "context": context,
                    "target_s": target_s,
                    **await measure_case(swarm, rounds, context, how),
                }
                for name, context, how, target_s in cases
            ]
    return {**machine, "cases": found}


async def measure_case(swarm: SparedSwarm, rounds: int, context: int, how: int) -> dict[str, Any]:
    """Return the pauses of some losses, and how often the text was another than undisturbed."""
    prompt = " ".join(["word"] * (context - AFTER))
    await swarm.replenish()
    undisturbed = await swarm.run(prompt, 2 * AFTER)
    pauses_s, different = [], 0
    for _ in range(rounds):
        await swarm.replenish()
        for stage in range(3):
            outcome = await swarm.run(prompt, 2 * AFTER, lose=(stage, AFTER, how))
            if outcome.replays:
                pauses_s.append(outcome.pause_s)
            different += outcome.text != undisturbed.text
    return {
        "pause_s": asdict(spread_of(pauses_s)),
        "pauses_s": pauses_s,
        "usual_s": undisturbed.pause_s,
        "different_texts": different,
    }


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
