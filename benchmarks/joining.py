"""Time until a node with an empty disk serves a third of the demo model, fetched from two peers.

    python -m benchmarks.joining [--rounds N] [--json]

Each peer serves a third and holds all files. The newcomer knows only their addresses and the model's name. The time
runs from the start of its process until the other peers see the model served completely.
"""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import trio

from benchmarks.common import demo_package, describe_machine, spread_of, verdict
from node.models.store import Package
from node.stages.memory_admission import span_bytes_for
from protocol.identity import BlockRange
from tests.process.daemons import MODEL, is_complete, running_daemon, until

TARGET_S = 15.0


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Newcomers, one after another.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(rounds: int, as_json: bool) -> None:
    """Measure the time to join from an empty disk."""
    result = trio.run(measure, rounds, demo_package())
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(rounds: int, package: Package) -> dict[str, Any]:
    """Return all figures; times are in seconds."""
    manifest = package.manifest
    third_bytes = sum(file.size_bytes for file in manifest.blocks[10:20])
    memory_bytes = span_bytes_for(manifest, BlockRange(10, 20))
    joins = []
    with TemporaryDirectory(prefix="metaswarm-joining-") as folder:
        async with (
            running_daemon(Path(folder, "first"), "--serve", f"{MODEL}:0-10") as first,
            running_daemon(
                Path(folder, "second"), "--serve", f"{MODEL}:20-30", "--bootstrap", first.multiaddr
            ) as second,
        ):
            for number in range(rounds):
                started_s = time.perf_counter()
                async with running_daemon(
                    Path(folder, f"newcomer-{number}"),
                    *("--serve", MODEL, "--memory", str(memory_bytes), "--no-catalogue"),
                    *("--bootstrap", first.multiaddr, "--bootstrap", second.multiaddr),
                    environment={"METASWARM_CACHE_DIR": str(Path(folder, f"cache-{number}"))},
                ) as newcomer:
                    await until(lambda: is_complete(first), timeout_s=120)
                    joined_s = time.perf_counter() - started_s
                    status = await newcomer.get("/swarm/status")
                    [span] = status["spans"]
                    received = status["transfers"]["received_bytes"]
                    joins.append(
                        {
                            "joined_s": round(joined_s, 2),
                            "blocks": f"{span['start']}-{span['end']}",
                            "bytes_by_peer": [received.get(peer.peer_id, 0) for peer in (first, second)],
                        }
                    )
                # Others forget it before the next one chooses.
                await until(lambda: _is_incomplete(first), timeout_s=60)
    return {**describe_machine(), "target_s": TARGET_S, "third_bytes": third_bytes, "joins": joins}


async def _is_incomplete(daemon: Any) -> bool:
    return not await is_complete(daemon)


def report(result: dict[str, Any]) -> str:
    """Return the figures as text."""
    joins = result["joins"]
    times_s = [join["joined_s"] for join in joins]
    median_s = spread_of(times_s).median
    lines = [
        f"an empty disk to serving a third: median {median_s:.1f} s, {min(times_s):.1f} to {max(times_s):.1f} s",
        f"target {TARGET_S:.0f} s: {verdict(median_s, TARGET_S)}",
    ]
    for join in joins:
        first, second = (count / 2**20 for count in join["bytes_by_peer"])
        lines.append(f"  {join['blocks']}: {join['joined_s']:.1f} s, {first:.0f} MiB and {second:.0f} MiB from the two")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
