"""What a daemon weighs: idle, with 10 blocks, with all 30; and what the blocks add against their bytes on disk.

    python -m benchmarks.memory [--json]

Proportional set sizes from /proc: pages that processes share are divided among them, save those of model files. A job
is run before the figures are read, because mapped weights weigh nothing until they are used. A worker brings torch
along, whatever it serves; so the blocks are weighed as the difference between 30 and 10 of them.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import httpx
import psutil
import trio

from node.models.catalogue import DEMO_MODEL
from node.models.store import ModelStore
from protocol.identity import BlockRange
from tests.process.daemons import Daemon, running_daemon

TARGET = 0.15


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(as_json: bool) -> None:
    """Weigh a daemon."""
    result = trio.run(measure)
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo("MiB               daemon   worker   files of the span")
    for name in ("idle", "blocks 10-20", "blocks 0-30"):
        row = result[name]
        click.echo(f"{name:14} {row['daemon']:9.0f} {row['worker']:8.0f} {row['files']:19.0f}")
    blocks = result["blocks"]
    click.echo(
        f"20 blocks, embedding and head add {blocks['added']:.0f} MiB and are {blocks['files']:.0f} MiB on disk: "
        f"{blocks['excess']:+.1%} (target: within {TARGET:.0%})"
    )


async def measure() -> dict[str, dict[str, float]]:
    """Return all figures, in MiB."""
    store = ModelStore()
    manifest = store.get(store.resolve(DEMO_MODEL)).manifest
    result: dict[str, dict[str, float]] = {}
    for name, blocks in (("idle", None), ("blocks 10-20", BlockRange(10, 20)), ("blocks 0-30", BlockRange(0, 30))):
        async with weighed_daemons(blocks) as daemon:
            daemon_bytes, worker_bytes = weigh(daemon.process.pid)
        files = manifest.bytes_of(blocks) if blocks else 0
        result[name] = {"daemon": daemon_bytes / 2**20, "worker": worker_bytes / 2**20, "files": files / 2**20}
    added = result["blocks 0-30"]["worker"] - result["blocks 10-20"]["worker"]
    on_disk = result["blocks 0-30"]["files"] - result["blocks 10-20"]["files"]
    result["blocks"] = {"added": added, "files": on_disk, "excess": added / on_disk - 1}
    return result


@asynccontextmanager
async def weighed_daemons(blocks: BlockRange | None) -> AsyncIterator[Daemon]:
    """Run a daemon with the blocks, and one with the rest of the model; give it after a job has touched everything."""
    with TemporaryDirectory() as folder:
        path = Path(folder)
        if blocks is None:
            async with running_daemon(path / "weighed") as daemon:
                yield daemon
            return
        async with running_daemon(path / "weighed", "--serve", f"{DEMO_MODEL}:{blocks}") as daemon:
            rest = [f"{DEMO_MODEL}:{r}" for r in (f"0-{blocks.start}", f"{blocks.end}-30") if r not in ("0-0", "30-30")]
            flags = [flag for spec in rest for flag in ("--serve", spec)]
            async with running_daemon(path / "rest", *flags, "--bootstrap", daemon.multiaddr) as other:
                async with httpx.AsyncClient(timeout=120) as client:
                    body = {"model": DEMO_MODEL, "prompt": "Once", "max_tokens": 8, "metaswarm": {"ignore_eos": True}}
                    with trio.fail_after(60):
                        while (await client.post(f"{other.api_url}/v1/completions", json=body)).is_error:
                            await trio.sleep(0.5)
                yield daemon


def weigh(pid: int) -> tuple[int, int]:
    """Return the proportional set size of a daemon and of its worker, in bytes."""
    workers = [child.pid for child in psutil.Process(pid).children() if "node.engine.worker" in child.cmdline()]
    return proportional_set_size(pid), sum(map(proportional_set_size, workers))


def proportional_set_size(pid: int) -> int:
    """Return a process's proportional set size in bytes, with the pages of model files counted whole.

    Who else on this machine happens to map the same files should not make this process look lighter.
    """
    total = 0
    is_weights = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        field, _, value = line.partition(":")
        if field == ("Rss" if is_weights else "Pss"):
            total += int(value.split()[0]) * 1024
        elif "-" in field.split(" ")[0]:
            is_weights = line.endswith(".safetensors")
    return total


if __name__ == "__main__":
    main()
