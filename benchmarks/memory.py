"""Memory of a daemon: idle, with 10 blocks, with all 30; and what blocks add relative to their size on disk.

    python -m benchmarks.memory [--json]

Proportional set sizes from /proc: shared pages are divided among the processes that map them, except those of model
files. A job runs before each reading, because mapped weights occupy memory only once they are used. The blocks' share
is the difference between a worker with all blocks (and the embedding) and one with the 10 in the middle. Another daemon
serves the remaining blocks throughout, so that all measured workers share libraries with the same number of
processes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import httpx
import psutil
import trio

from benchmarks.common import demo_package, describe_machine, verdict
from node.models.catalogue import DEMO_MODEL
from node.models.store import Package
from protocol.identity import BlockRange
from tests.process.daemons import Daemon, running_daemon

TARGET = 0.15
MIDDLE = BlockRange(10, 20)
WHOLE = BlockRange(0, 30)
QUIET = ("--log-level", "error")
MIB = 2**20


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(as_json: bool) -> None:
    """Measure the memory of a daemon."""
    result = trio.run(measure, demo_package())
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(package: Package) -> dict[str, Any]:
    """Return all figures, in MiB."""
    with TemporaryDirectory() as folder:
        path = Path(folder)
        rest = (f"{DEMO_MODEL}:0-{MIDDLE.start}", f"{DEMO_MODEL}:{MIDDLE.end}-{WHOLE.end}")
        async with running_daemon(path / "rest", *QUIET, "--serve", rest[0], "--serve", rest[1]) as neighbour:
            bootstrap = (*QUIET, "--bootstrap", neighbour.multiaddr)
            async with running_daemon(path / "idle", *bootstrap) as daemon:
                idle = weigh(daemon, package, None)
            rows = [idle]
            for blocks in (MIDDLE, WHOLE):
                flags = (*bootstrap, "--serve", f"{DEMO_MODEL}:{blocks}")
                async with running_daemon(path / str(blocks), *flags) as daemon:
                    await run_job_through(daemon, neighbour)
                    rows.append(weigh(daemon, package, blocks))
    _, middle, whole = rows
    added, on_disk = whole["worker_mib"] - middle["worker_mib"], whole["files_mib"] - middle["files_mib"]
    excess = added / on_disk - 1
    return {
        **describe_machine(),
        "daemons": rows,
        "worker_fixed_mib": middle["worker_mib"] - middle["files_mib"] * (1 + excess),
        "blocks": {"added_mib": added, "files_mib": on_disk, "excess": excess},
        "target": TARGET,
        "verdict": verdict(abs(excess), TARGET),
    }


async def run_job_through(daemon: Daemon, neighbour: Daemon) -> None:
    """Submit short jobs to the neighbour until one went through the daemon."""
    body = {"model": DEMO_MODEL, "prompt": "Once", "max_tokens": 8, "metaswarm": {"ignore_eos": True}}
    async with httpx.AsyncClient(timeout=120) as client:
        with trio.fail_after(60):
            while True:
                answer = await client.post(f"{neighbour.api_url}/v1/completions", json=body)
                route = () if answer.is_error else answer.json()["metaswarm"]["route"]
                if any(stage["peer"] == daemon.peer_id for stage in route):
                    return
                await trio.sleep(0.2)  # it is not known there yet, or one that has left still is


def weigh(daemon: Daemon, package: Package, blocks: BlockRange | None) -> dict[str, Any]:
    """Return the memory of a daemon and its worker, and the size of their files."""
    pid = daemon.process.pid
    workers = [child.pid for child in psutil.Process(pid).children() if "node.engine.worker" in child.cmdline()]
    return {
        "blocks": str(blocks) if blocks else None,
        "daemon_mib": proportional_set_size(pid) / MIB,
        "worker_mib": sum(map(proportional_set_size, workers)) / MIB,
        "files_mib": package.manifest.bytes_of(blocks) / MIB if blocks else 0.0,
    }


def proportional_set_size(pid: int) -> int:
    """Return a process's proportional set size in bytes, with the pages of model files counted whole.

    Other processes that map the same files must not make this process look smaller.
    """
    total_bytes = 0
    is_weights = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        field, _, value = line.partition(":")
        if field == ("Rss" if is_weights else "Pss"):
            total_bytes += int(value.split()[0]) * 1024
        elif "-" in field.split(" ")[0]:
            is_weights = line.endswith((".safetensors", ".gguf"))
    return total_bytes


def report(result: Mapping[str, Any]) -> str:
    """Return the figures as a table."""
    lines = ["MiB              daemon   worker   files of the span"]
    for row in result["daemons"]:
        name = f"blocks {row['blocks']}" if row["blocks"] else "idle"
        lines.append(f"{name:14} {row['daemon_mib']:8.0f} {row['worker_mib']:8.0f} {row['files_mib']:19.0f}")
    blocks = result["blocks"]
    lines += [
        "",
        f"a worker without any blocks: {result['worker_fixed_mib']:.0f} MiB",
        f"20 blocks and the embedding add {blocks['added_mib']:.0f} MiB and are {blocks['files_mib']:.0f} MiB on disk",
        f"that is {blocks['excess']:+.1%}; target: within {result['target']:.0%}: {result['verdict']}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
