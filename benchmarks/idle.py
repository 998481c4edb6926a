"""An idle node: memory of the daemon and all its children, its CPU time, and what it sends.

    python -m benchmarks.idle [--json] [--minutes N] [--settle SECONDS] [--peers N] [--serve] [--history N]

N peers without a model, and a node that is watched: without a model, or with --serve with all blocks of the demo model.
--history gives it a history of N observations, from which its training worker learns. Without --serve nothing is in
the cache of models: each file there would be announced once, one every two seconds. Memory: the proportional set size
(PSS), which counts a page that several processes share in parts. CPU: of all its processes, also those that have ended.
"""

import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import psutil
import trio

from benchmarks.daemons import Daemon, run_command, running_daemon
from benchmarks.spread import write_history
from node.models.catalogue import DEMO_MODEL

MIB = 2**20


@dataclass(frozen=True)
class Idle:
    """What the watched node took. `pss_mib`: by process, at the end."""

    minutes: float
    pss_mib: dict[str, float]
    cpu_s: float
    sent_bytes: int
    received_bytes: int

    @property
    def total_mib(self) -> float:
        """The memory of all processes."""
        return sum(self.pss_mib.values())


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--minutes", type=float, default=5.0)
@click.option("--settle", "settle_s", type=float, default=60.0, help="Seconds before anything is counted.")
@click.option("--peers", type=int, default=2)
@click.option("--serve", is_flag=True)
@click.option("--history", type=int, default=0, help="Observations in its history.")
def main(as_json: bool, minutes: float, settle_s: float, peers: int, serve: bool, history: int) -> None:
    """Watch an idle node."""
    found = trio.run(partial(watch, minutes, settle_s, peers, serve, history))
    if as_json:
        print(json.dumps({**vars(found), "total_mib": found.total_mib}))
        return
    for name, mib in found.pss_mib.items():
        print(f"{name:<44}{mib:8.1f} MiB")
    print(f"{'all processes':<44}{found.total_mib:8.1f} MiB")
    print(f"CPU {found.cpu_s:.2f} s in {found.minutes:g} min, {found.cpu_s / found.minutes:.2f} s a minute")
    print(f"sent {found.sent_bytes / 1024:.0f} KiB, received {found.received_bytes / 1024:.0f} KiB")


async def watch(minutes: float, settle_s: float, peers: int, serve: bool, history: int) -> Idle:
    """Run the peers and the node; return what it took."""
    with TemporaryDirectory(prefix="metaswarm-idle-") as folder:
        async with AsyncExitStack() as stack:
            first: Daemon | None = None
            common = [] if serve else ["--cache-dir", str(Path(folder) / "cache")]
            for number in range(peers):
                flags = common + (["--bootstrap", first.ready.multiaddrs[0]] if first else [])
                daemon = await stack.enter_async_context(running_daemon(Path(folder) / f"peer-{number}", *flags))
                first = first or daemon
            flags = common + (["--bootstrap", first.ready.multiaddrs[0]] if first else [])
            flags += ["--serve", DEMO_MODEL] if serve else []
            data_dir = Path(folder) / "watched"
            if history:
                dataset = Path(folder) / "history.jsonl"
                write_history(dataset, history)
                await run_command("history", "import", str(dataset), "--data-dir", str(data_dir))
            node = await stack.enter_async_context(running_daemon(data_dir, *flags))
            await trio.sleep(settle_s)
            process = psutil.Process(node.process.pid)
            before_s, traffic = cpu_s(process), (await node.get("/swarm/status"))["traffic"]
            await trio.sleep(60 * minutes)
            spent_s, after = cpu_s(process) - before_s, (await node.get("/swarm/status"))["traffic"]
            return Idle(
                minutes=minutes,
                pss_mib=dict(pss_by_process(process)),
                cpu_s=round(spent_s, 2),
                sent_bytes=after["sent_bytes"] - traffic["sent_bytes"],
                received_bytes=after["received_bytes"] - traffic["received_bytes"],
            )


def cpu_s(process: psutil.Process) -> float:
    """Return the CPU time of a process and all its descendants so far, those that have ended included."""
    own = process.cpu_times()
    running = sum(sum(child.cpu_times()[:2]) for child in process.children(recursive=True))
    return own.user + own.system + own.children_user + own.children_system + running


def pss_by_process(process: psutil.Process) -> Iterator[tuple[str, float]]:
    """Yield each process, by what it runs, and its memory in MiB."""
    for number, each in enumerate([process, *process.children(recursive=True)]):
        words = each.cmdline()
        module = words[words.index("-m") + 1] if "-m" in words else each.name()
        yield f"{module} #{number}" if number else "daemon", each.memory_full_info().pss / MIB


if __name__ == "__main__":
    main()
