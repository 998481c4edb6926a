"""Fuzzing of every decoder of peers' input: only RemoteProtocolError may be raised, and memory must not grow.

    python -m benchmarks.mutations [--count 1000000] [--seed 1] [--json]

The decoders take turns. Valid inputs are mutated by bit flips, truncation, insertion, splicing, deep nesting and huge
lengths; payloads of signed records also with a new signature, to reach the code behind the signature check. Any other
exception ends the run and shows the input. Needs no model and no daemon.
"""

import json
import random
import time
from collections.abc import Mapping
from typing import Any

import click
import psutil

from benchmarks.common import verdict
from protocol.errors import RemoteProtocolError
from tests.support.mutants import mutant, targets

TARGET_GROWTH_MIB = 16.0
WARM_UP_SHARE = 0.02
"""Of the mutants, before memory is measured: whatever is loaded or filled once is there by then."""
LOOK_EVERY = 5_000


@click.command()
@click.option("--count", type=click.IntRange(1_000), default=1_000_000, show_default=True, help="Mutants.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(count: int, seed: int, as_json: bool) -> None:
    """Feed mutants to every decoder."""
    result = measure(count, seed)
    click.echo(json.dumps(result) if as_json else report(result))


def measure(count: int, seed: int) -> dict[str, Any]:
    """Return the mutants that each decoder accepted and refused, and the growth of this process."""
    dice = random.Random(seed)
    process = psutil.Process()
    everything = targets()
    refused = dict.fromkeys((target.name for target in everything), 0)
    taken = dict(refused)
    before_bytes = most_bytes = 0
    began_s = time.perf_counter()
    for number in range(count):
        target = everything[number % len(everything)]
        data = mutant(dice, target.seeds)
        try:
            target.decode(data)
        except RemoteProtocolError:
            refused[target.name] += 1
        except Exception as error:
            raise click.ClickException(f"{target.name} raises {error!r} for {data.hex()}") from error
        else:
            taken[target.name] += 1
        if number == int(count * WARM_UP_SHARE):
            before_bytes = most_bytes = process.memory_info().rss
        elif before_bytes and number % LOOK_EVERY == 0:
            most_bytes = max(most_bytes, process.memory_info().rss)
    growth_mib = (max(most_bytes, process.memory_info().rss) - before_bytes) / (1 << 20)
    return {
        "count": count,
        "decoders": {name: {"refused": refused[name], "taken": taken[name]} for name in refused},
        "growth_mib": growth_mib,
        "target_mib": TARGET_GROWTH_MIB,
        "verdict": verdict(growth_mib, TARGET_GROWTH_MIB),
        "took_s": time.perf_counter() - began_s,
    }


def report(result: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    lines = [f"{'decoder':32}{'refused':>10}{'taken':>10}"]
    for name, counts in result["decoders"].items():
        lines.append(f"{name:32}{counts['refused']:>10,}{counts['taken']:>10,}")
    lines += [
        "",
        f"{result['count']:,} mutants in {result['took_s']:.0f} s: nothing but RemoteProtocolError",
        f"memory grew by {result['growth_mib']:.1f} MiB; at most {result['target_mib']:.0f}: {result['verdict']}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
