"""Time for an honest peer to connect while one address holds a thousand idle connections.

    python -m benchmarks.connections [--connections N] [--json]

A daemon without blocks. One address opens N bare TCP connections, then N with a finished handshake, each under an
identity of its own; none sends anything. Before, between and during these phases an honest peer dials the daemon
repeatedly, from another address and from the same one. The idle connections belong to a separate process at low
priority, so that its own CPU time does not distort the result.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import psutil
import trio

from benchmarks.common import describe_machine, spread_of, verdict
from benchmarks.daemons import running_daemon
from node.config import NodeReady
from node.network.host import Libp2pNetwork
from node.network.interface import NetworkError
from tests.support.idle_peer import hold_idle_connection

OTHER_ADDRESS = "127.0.0.99"
"""Where the connections come from; all of 127.0.0.0/8 is this machine."""
DIALS = 20
TIMEOUT_S = 5.0
TARGET_S = 1.0
CONCURRENT_HANDSHAKES = 16


@click.command()
@click.option("--connections", type=click.IntRange(1, 4000), default=1000, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--hold", type=(str, str, str), hidden=True, help="For the other process: kind, source, multiaddr.")
def main(connections: int, as_json: bool, hold: tuple[str, str, str] | None) -> None:
    """Measure how soon an honest peer connects while others hold connections."""
    if hold is not None:
        os.nice(19)
        trio.run(hold_many, connections, *hold)
        return
    result = trio.run(measure, connections)
    click.echo(json.dumps(result) if as_json else report(result))


async def hold_many(connections: int, kind: str, source: str, multiaddr: str) -> None:
    """Open connections and print `ready` when all are open; hold them, and reopen those that are closed."""
    places = trio.CapacityLimiter(CONCURRENT_HANDSHAKES)
    opened = 0

    async def hold(number: int) -> None:
        nonlocal opened
        first = True
        while True:
            with suppress(Exception):  # whatever the daemon does to us
                async with hold_idle_connection(multiaddr, source, secured=kind == "finished", limiter=places) as ended:
                    opened += first
                    first = False
                    await ended.wait()
            await trio.sleep(1 + number % 100 / 100)

    async with trio.open_nursery() as nursery:
        for number in range(connections):
            nursery.start_soon(hold, number)
        while opened < connections:
            await trio.sleep(0.05)
        print("ready", flush=True)


async def measure(connections: int) -> dict[str, Any]:
    """Return the honest peer's dial times, in seconds, and the daemon's memory in each phase."""
    with TemporaryDirectory(prefix="metaswarm-benchmark-") as folder:
        async with running_daemon(Path(folder) / "data", "--cache-dir", str(Path(folder) / "cache")) as daemon:
            phases = await measure_phases(connections, daemon.ready)
    worst_s = max(phase["dial_s"]["greatest"] for phase in phases.values())
    failed = sum(phase["failed"] for phase in phases.values())
    return {
        **describe_machine(),
        "connections": connections,
        "phases": phases,
        "target_s": TARGET_S,
        "verdict": "missed" if failed else verdict(worst_s, TARGET_S),
    }


async def measure_phases(connections: int, daemon: NodeReady) -> dict[str, Any]:
    """Return the figures of each phase, by what others do in it."""
    phases: dict[str, Any] = {"no other connections": await dial_often(daemon)}
    for kind in ("silent", "finished"):
        for title, source in (("another", OTHER_ADDRESS), ("the same", "127.0.0.1")):
            command = [sys.executable, "-m", "benchmarks.connections", "--connections", str(connections)]
            process = await trio.lowlevel.open_process(
                [*command, "--hold", kind, source, daemon.multiaddrs[0]],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert process.stdout is not None
            try:
                started_s = time.monotonic()
                if not await process.stdout.receive_some():
                    raise click.ClickException("the process that holds connections ended before it was ready")
                phase = await dial_often(daemon)
                phases[f"{connections} {kind}, from {title} address"] = phase | {
                    "opened_in_s": time.monotonic() - started_s
                }
            finally:
                with trio.CancelScope(shield=True):
                    process.kill()
                    await process.wait()
                    await process.stdout.aclose()
    return phases


async def dial_often(daemon: NodeReady) -> dict[str, Any]:
    """Have newcomers connect and be answered, one after another."""
    times_s: list[float] = []
    failed = 0
    for _ in range(DIALS):
        newcomer = Libp2pNetwork(os.urandom(32), listen=["/ip4/127.0.0.1/tcp/0"])
        async with newcomer.running():
            started_s = trio.current_time()
            try:
                with trio.fail_after(TIMEOUT_S):
                    peer = await newcomer.connect(daemon.multiaddrs[0])
                    await newcomer.ping(peer)
            except (NetworkError, trio.TooSlowError):
                failed += 1
            times_s.append(trio.current_time() - started_s)
    process = psutil.Process(daemon.pid)
    spread = spread_of(times_s)
    return {
        "dial_s": {"median": spread.median, "greatest": spread.greatest},
        "failed": failed,
        "descriptors": process.num_fds(),
        "memory_mib": process.memory_info().rss / 2**20,
    }


def report(result: Mapping[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores",
        "",
        "a newcomer connects and is answered, ms     median      max   failed   descriptors   MiB",
    ]
    for title, phase in result["phases"].items():
        dial = phase["dial_s"]
        lines.append(
            f"{title:42} {dial['median'] * 1e3:8.0f} {dial['greatest'] * 1e3:8.0f} {phase['failed']:8}"
            f" {phase['descriptors']:13} {phase['memory_mib']:5.0f}"
        )
    return "\n".join([*lines, "", f"target: every one within {result['target_s']:.0f} s: {result['verdict']}"])


if __name__ == "__main__":
    main()
