"""Delivery of observations by gossip alone, by anti-entropy alone, and by both: share, delay and traffic.

    python -m benchmarks.paths [--peers 8] [--rate 2 --rate 8] [--duration 20] [--json]

Processes with the node's own network and dissemination, without engine and database, connected over loopback. They make
observations at random times, `--rate` a second altogether, and record when each arrives. The results are read a while
after the last observation.
"""

import hashlib
import json
import math
import random
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from subprocess import PIPE
from typing import Any

import click
import trio

from benchmarks.common import describe_machine, spread_of
from node.identity import Identity
from node.network.host import Libp2pNetwork
from node.replication.observations import ObservationReplicator, ReplicationLimits
from node.swarm.dht_records import RecordKinds
from node.testing.memory_history import MemoryHistory
from protocol.observations import SignedObservation
from tests.support.observations import signed

PATHS = {
    "gossip": ReplicationLimits(shortest_interval_s=math.inf, longest_interval_s=math.inf),
    "anti-entropy": ReplicationLimits(),
    "both": ReplicationLimits(),
}
"""The node's limits; what is not asked for never begins by itself. Without gossip, observations are only kept."""

DIALLED = 4
SETTLE_S = 5.0
GRACE_S = 20.0
"""After the last observation."""


@click.group(invoke_without_command=True)
@click.option("--peers", type=click.IntRange(3), default=8, show_default=True, help="Processes.")
@click.option("--rate", "rates", type=click.FloatRange(0.1), multiple=True, default=(2, 8), show_default=True)
@click.option("--duration", "duration_s", type=click.FloatRange(1), default=20, show_default=True, help="Seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def main(context: click.Context, peers: int, rates: Sequence[float], duration_s: float, as_json: bool) -> None:
    """Measure gossip and anti-entropy apart."""
    if context.invoked_subcommand is None:
        runs = [trio.run(measure, path, peers, rate, duration_s) for rate in rates for path in PATHS]
        result = {**describe_machine(), "peers": peers, "duration_s": duration_s, "runs": runs}
        click.echo(json.dumps(result) if as_json else report(result))


async def measure(path: str, peers: int, rate: float, duration_s: float) -> dict[str, Any]:
    """Return the share, delay and traffic of observations that arrived by one path."""
    dice = random.Random(peers)
    async with AsyncExitStack() as stack:
        processes = [await stack.enter_async_context(peer_process(number, path)) for number in range(peers)]
        addresses = [json.loads(await read_line(process)) for process in processes]
        for process in processes:
            order = {
                "dial": dice.sample(addresses, min(DIALLED, peers)),
                "rate": rate / peers,
                "duration_s": duration_s,
            }
            await tell(process, order)
        reports = [json.loads(await read_line(process)) for process in processes]
    made_at_s = {made: at_s for each in reports for made, at_s in each["made"].items()}
    delays_s = [at_s - made_at_s[heard] for each in reports for heard, at_s in each["heard"].items()]
    return {
        "path": path,
        "rate_per_s": rate,
        "observations": len(made_at_s),
        "arrived": len(delays_s) / (len(made_at_s) * (peers - 1)),
        "delay_s": asdict(spread_of(delays_s or [math.nan])),
        "cpu_share": sum(each["cpu_s"] / each["wall_s"] for each in reports) / peers,
    }


@asynccontextmanager
async def peer_process(number: int, path: str) -> AsyncIterator[trio.Process]:
    """Run one peer inside the block."""
    command = [sys.executable, "-m", "benchmarks.paths", "peer", str(number), path]
    process = await trio.lowlevel.open_process(command, stdin=PIPE, stdout=PIPE)
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


async def read_line(process: trio.Process) -> bytes:
    """Return the next line that a process prints."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        if not (data := await process.stdout.receive_some()):
            raise click.ClickException("a peer of the benchmark ended early; its last words are above")
        line += data
    return line


async def tell(process: trio.Process, order: Mapping[str, Any]) -> None:
    """Write a line to a process."""
    assert process.stdin is not None
    await process.stdin.send_all(json.dumps(order).encode() + b"\n")


# The peer's side


@main.command(hidden=True)
@click.argument("number", type=int)
@click.argument("path", type=click.Choice(list(PATHS)))
def peer(number: int, path: str) -> None:
    """Run one peer."""
    print(json.dumps(trio.run(take_part, number, path)), flush=True)


class NotedHistory(MemoryHistory):
    """Records the time at which each observation was stored."""

    def __init__(self) -> None:
        super().__init__()
        self.at_s: dict[str, float] = {}

    async def add_many(self, observations: Sequence[SignedObservation]) -> Sequence[SignedObservation]:
        """Store observations; return those that are new."""
        new = await super().add_many(observations)
        self.at_s |= {each.id.hex(): time.time() for each in new}
        return new


async def take_part(number: int, path: str) -> dict[str, Any]:
    """Follow the order on stdin; return when observations were made and received, in Unix time."""
    identity = Identity(hashlib.sha256(f"peer {number}".encode()).digest())
    network = Libp2pNetwork(identity.seed, listen=("/ip4/127.0.0.1/tcp/0",))
    history = NotedHistory()
    dissemination = ObservationReplicator(
        network=network,
        identity=identity,
        history=history,
        records=RecordKinds(network),
        jitter=random.Random(number),
        limits=PATHS[path],
    )
    made: dict[str, float] = {}
    async with network.running(), trio.open_nursery() as nursery:
        nursery.start_soon(dissemination.run)
        print(json.dumps(network.multiaddrs[0]), flush=True)
        order = json.loads(await trio.to_thread.run_sync(sys.stdin.readline))
        for address in order["dial"]:
            if network.peer_id not in address:
                await network.connect(address)
        await trio.sleep(SETTLE_S)
        began_s, cpu_s = time.perf_counter(), time.process_time()
        dice = random.Random(number)
        with trio.move_on_after(order["duration_s"]):
            while True:
                await trio.sleep(dice.expovariate(order["rate"]))
                observation = signed(1000 * len(made) + number, observer=number, issued_at_s=int(time.time()))
                made[observation.id.hex()] = time.time()
                if path == "anti-entropy":
                    await history.add_many([observation])
                else:
                    await dissemination.publish(observation)
        await trio.sleep(GRACE_S)
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - began_s
        nursery.cancel_scope.cancel()
    heard = {content_id: at_s for content_id, at_s in history.at_s.items() if content_id not in made}
    return {"made": made, "heard": heard, "cpu_s": cpu_s, "wall_s": wall_s}


def report(result: Mapping[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores; {result['peers']} peers",
        "",
        "path           a second     made   arrived   median      p99   of a core, each peer",
    ]
    for run in result["runs"]:
        delay_s = run["delay_s"]
        lines.append(
            f"{run['path']:<14} {run['rate_per_s']:>8g} {run['observations']:>8} {run['arrived']:>8.1%}"
            f" {delay_s['median']:>6.2f} s {delay_s['p99']:>6.2f} s {run['cpu_share']:>8.1%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
