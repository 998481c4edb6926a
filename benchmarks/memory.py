"""Memory of nodes with all their processes: one that serves nothing, one with the whole model, three with a third each.

    python -m benchmarks.memory [--settle SECONDS] [--json]

Proportional set sizes from /proc: pages that several processes map are divided among them, so that the processes of a
row may be added up. A job of 64 tokens goes through the model before each reading, because mapped weights occupy memory
only once they are used.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import psutil
import trio

from benchmarks.common import demo_package, describe_machine, verdict
from node.models.catalogue import DEMO_MODEL
from tests.process.daemons import THIRDS, Daemon, is_complete, running_daemon, until

QUIET = ("--log-level", "error")
MIB = 2**20
TARGETS_MIB = {"serves nothing": 150.0, "whole model": 350.0, "three nodes, a third each": 600.0}
PARTS = {
    "node.engine.worker": "engine",
    "node.models.tokenizer_worker": "tokenizer",
    "node.selection.training_worker": "selection",
}
"""Which process a module runs in; all others are the daemon's own."""


@click.command()
@click.option("--settle", type=click.FloatRange(0), default=10.0, show_default=True, help="Seconds before a reading.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(settle: float, as_json: bool) -> None:
    """Measure the memory of nodes."""
    result = trio.run(measure, settle)
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(settle_s: float) -> dict[str, Any]:
    """Return the memory of each arrangement, in MiB."""
    demo_package()  # the daemons find it in the store
    arrangements: Mapping[str, Sequence[str | None]] = {
        "serves nothing": (None,),
        "whole model": ("0-30",),
        "three nodes, a third each": THIRDS,
    }
    rows = {}
    for name, spans in arrangements.items():
        with TemporaryDirectory() as folder:
            rows[name] = await _weigh_nodes(Path(folder), spans, settle_s)
    verdicts = {name: verdict(row["total"], TARGETS_MIB[name]) for name, row in rows.items()}
    return {**describe_machine(), "mib": rows, "targets_mib": TARGETS_MIB, "verdicts": verdicts}


async def _weigh_nodes(folder: Path, spans: Sequence[str | None], settle_s: float) -> dict[str, float]:
    async with AsyncExitStack() as stack:
        nodes: list[Daemon] = []
        for number, span in enumerate(spans):
            flags = ("--serve", f"{DEMO_MODEL}:{span}") if span else ()
            bootstrap = ("--bootstrap", nodes[0].multiaddr) if nodes else ()
            node = running_daemon(folder / str(number), *QUIET, *flags, *bootstrap)
            nodes.append(await stack.enter_async_context(node))
        if spans != (None,):
            await until(lambda: is_complete(nodes[0]), timeout_s=60)
            await nodes[0].complete(prompt="Once upon a time", max_tokens=64, metaswarm={"ignore_eos": True})
        await trio.sleep(settle_s)
        return weigh([node.process.pid for node in nodes])


def weigh(pids: Sequence[int]) -> dict[str, float]:
    """Return the memory of daemons and all their descendants in MiB: by kind of process, and in `total`."""
    parts = dict.fromkeys(("daemon", *PARTS.values(), "other"), 0.0)
    for pid in pids:
        daemon = psutil.Process(pid)
        parts["daemon"] += _memory_mib(daemon)
        for child in daemon.children(recursive=True):
            modules = [name for module, name in PARTS.items() if module in child.cmdline()]
            parts[modules[0] if modules else "other"] += _memory_mib(child)
    return {**parts, "total": sum(parts.values())}


def _memory_mib(process: psutil.Process) -> float:
    return float(process.memory_full_info().pss) / MIB


def report(result: Mapping[str, Any]) -> str:
    """Return the figures as a table."""
    rows = result["mib"]
    columns = list(next(iter(rows.values())))
    lines = [f"{'MiB':26}" + "".join(f"{column:>11}" for column in (*columns, "target"))]
    for name, row in rows.items():
        figures = "".join(f"{row[column]:11.0f}" for column in columns)
        lines.append(f"{name:26}{figures}{result['targets_mib'][name]:11.0f} {result['verdicts'][name]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
